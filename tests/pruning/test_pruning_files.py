"""DonodCallback's files beside a user's own: what it did not write stays, and what it writes is whole."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model
from transformers import Trainer, TrainingArguments

import peftx
from peftx.pruning.parts import Parts, remove_parts

COUNT = 12


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def trainer(folder: Path, count: int = COUNT, **settings: Any) -> Trainer:
    rows = torch.randint(1, 64, (count, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        str(folder), max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    callback = peftx.DonodCallback(keep=0.5, batch_size=4, **settings)
    run = Trainer(tiny_model("llama"), arguments, train_dataset=data, callbacks=[callback])
    run.remove_callback(transformers.PrinterCallback)
    return run


def pages(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk(size: int) -> Any:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def no_scoring(*_: Any, **__: Any) -> None:
    raise AssertionError("scored")


@pytest.mark.parametrize("name", ["selection.json", "selection.md", "selection.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_somebody_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
) -> None:
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr("peftx.pruning.callback.score_share", no_scoring)
    told = "is not a selection" if name == "selection.json" and not overwrite else f"{name} is there already, and not"
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, overwrite=overwrite).train()
    assert pages(tmp_path) == {name: b"mine"}


def test_the_scores_of_somebody_else_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "selection-scores.parquet").write_text("mine")
    trainer(tmp_path).train()  # so few go into the JSON
    (tmp_path / "selection.json").unlink()
    monkeypatch.setattr("peftx.pruning.callback.IN_JSON", 10)
    monkeypatch.setattr("peftx.pruning.selection.IN_JSON", 10)
    with pytest.raises(ValueError, match="selection-scores.parquet is there already, and not by peftx DonodCallback"):
        trainer(tmp_path).train()
    assert (tmp_path / "selection-scores.parquet").read_text() == "mine"
    (tmp_path / "selection-scores.parquet").unlink()
    trainer(tmp_path).train()
    before = pages(tmp_path)
    trainer(tmp_path, overwrite=True).train()
    assert before["selection-scores.parquet"] and set(pages(tmp_path)) == set(before)


def test_what_a_user_noted_in_a_file_of_ours_stays(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with (tmp_path / "selection.md").open("a") as file:
        file.write("a note")
    before = pages(tmp_path)
    trainer(tmp_path).train()  # used again, nothing is written
    with pytest.raises(ValueError, match=r"selection.md has changed since .*: move it away"):
        trainer(tmp_path, overwrite=True).train()
    assert pages(tmp_path) == before
    (tmp_path / "selection.md").unlink()
    trainer(tmp_path, overwrite=True).train()
    trainer(tmp_path, overwrite=True, method="loss").train()
    assert json.loads((tmp_path / "selection.json").read_text())["key"]["settings"]["method"] == "loss"
    assert b"a note" not in (tmp_path / "selection.md").read_bytes()


def test_a_full_disk_leaves_nothing_half(tmp_path: Path) -> None:
    with full_disk(300), pytest.raises(OSError, match="free some space and start again"):
        trainer(tmp_path / "new").train()
    assert not (tmp_path / "new").exists() or not pages(tmp_path / "new")
    trainer(tmp_path, report=False).train()
    before = pages(tmp_path)
    with full_disk(300), pytest.raises(OSError, match="free some space and start again"):
        trainer(tmp_path, report=False, overwrite=True, method="loss").train()
    assert pages(tmp_path) == before


def test_a_move_that_was_interrupted_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("peftx.files.save_list", killed)
        trainer(tmp_path).train()
    monkeypatch.setattr("peftx.pruning.callback.score_share", no_scoring)
    trainer(tmp_path).train()
    assert "selection.json" in json.loads((tmp_path / ".peftx.json").read_text())["files"]
    assert not (tmp_path / ".peftx-ready").exists()


@pytest.mark.parametrize("manifest", ["{}", '{"format": 1, "rows": 0, "key": {}}', "[1, 2]", "results: 3"])
def test_a_folder_with_the_name_of_the_scores_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("peftx.pruning.callback.PART_ROWS", 8)
    folder = tmp_path / "selection-scores"
    folder.mkdir()
    (folder / "scores.json").write_text(manifest)
    (folder / "part-000001.parquet").write_text("mine")
    (folder / ".draft.part").write_text("mine")
    before = pages(tmp_path)
    with pytest.raises(ValueError, match="says not what its scores are of"):
        trainer(tmp_path, overwrite=True).train()
    assert pages(tmp_path) == before


def test_only_the_parts_of_the_manifest_are_removed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    ours, other = (Parts(tmp_path / name, {"of": name}, ["don"]) for name in ("ours", "other"))
    for parts in (ours, other):
        parts.write(0, [0, 1], torch.zeros(1, 2), 0)
    ours.path(0).rename(other.path(1))
    other.path(2).write_text("mine")
    remove_parts(other.folder)
    assert sorted(path.name for path in other.folder.iterdir()) == [other.path(1).name, other.path(2).name]
