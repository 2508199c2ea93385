"""A user's card survives a full disk and a kill while it is completed."""

import resource
from pathlib import Path
from typing import Any

import peft
import pytest
from conftest import tiny_model

import peftx
from peftx.cards import compressed
from peftx.cards.adapter import complete_card
from peftx.compression import compress

MINE = "---\nlicense: mit\n---\n# Mine\n\n" + "A line of mine.\n" * 400


@pytest.fixture
def full_disk() -> Any:
    """From its call on, no file gets larger than 4,000 bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(params=["bone", "fedsvd"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    config = {"bone": peftx.BoneConfig, "fedsvd": peftx.FedSVDConfig}[request.param]
    model = peft.get_peft_model(tiny_model("llama"), config(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(MINE)
    return model, tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pefts_part_of_a_card(saved: tuple[Any, Path], full_disk: Any) -> None:
    model, folder = saved
    before = names(folder)
    full_disk()
    with pytest.raises(OSError):
        model.create_or_update_model_card(folder)
    assert (folder / "README.md").read_text() == MINE and names(folder) == before


def test_our_part_of_a_card(saved: tuple[Any, Path], full_disk: Any) -> None:
    model, folder = saved
    before = names(folder)
    full_disk()
    with pytest.raises(OSError, match="free some space"):
        complete_card(folder / "README.md", model.peft_config["default"])
    assert (folder / "README.md").read_text() == MINE and names(folder) == before


def test_a_kill_between_the_parts(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.ModelCard.save", killed)
    with pytest.raises(KeyboardInterrupt):
        model.create_or_update_model_card(folder)
    assert (folder / "README.md").read_text() == MINE


def test_with_room_a_card_keeps_what_was_there(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    before = names(folder)
    model.create_or_update_model_card(folder)
    text = (folder / "README.md").read_text()
    assert "license: mit" in text and text.count("A line of mine.") == 400 and "import peftx" in text
    assert names(folder) == before
    (folder / "README.md").unlink()
    model.create_or_update_model_card(folder)
    assert (folder / "README.md").is_file() and names(folder) == before


def test_the_card_of_a_compressed_model(tmp_path: Path, full_disk: Any) -> None:
    model = tiny_model("llama")
    compress(model, method="svd", keep=0.5)
    path = tmp_path / "README.md"
    path.write_text(MINE)
    full_disk()
    text = compressed.card_of(model, "user/small")
    with pytest.raises(OSError, match="free some space"):
        compressed._complete(path, text, "```python\nimport peftx\n```")
    assert path.read_text() == MINE and names(tmp_path) == {"README.md"}
