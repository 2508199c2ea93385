"""FisherCallback's file beside a user's own: what it did not write stays, and what it writes is whole."""

import json
import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model
from transformers import Trainer, TrainingArguments

import peftx
from peftx.compression import Statistics


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def trainer(folder: Path, **settings: Any) -> Trainer:
    rows = torch.randint(1, 64, (8, 6), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    callback = peftx.FisherCallback(max_samples=None, **settings)
    run = Trainer(tiny_model("llama"), arguments, train_dataset=data, callbacks=[callback])
    run.remove_callback(transformers.PrinterCallback)
    run.fisher = callback
    return run


@pytest.mark.parametrize("name", ["fisher.safetensors", "my sums.safetensors"])
@pytest.mark.parametrize("when", ["last_epoch", "calibration"])
def test_a_file_of_somebody_else_stops_the_training_at_its_start(tmp_path: Path, name: str, when: str) -> None:
    (tmp_path / name).write_text("mine")
    run = trainer(tmp_path, output=name, when=when)
    with pytest.raises(ValueError, match=f"{name} is there already, and not by peftx FisherCallback: move it away"):
        run.train()
    assert run.state.global_step == 0 and [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_second_run_and_a_resume_replace_their_own(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    trainer(tmp_path).train()
    first = path.read_bytes()
    trainer(tmp_path, what="abs").train()
    assert path.read_bytes() != first
    second = path.stat().st_ino
    trainer(tmp_path, what="abs").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(Statistics.load(path)) and path.stat().st_ino != second
    path.write_bytes(first)  # of another training: nobody knows whose
    with pytest.raises(ValueError, match=r"fisher.safetensors has changed since .*: move it away"):
        trainer(tmp_path).train()
    assert path.read_bytes() == first


def test_a_full_disk_costs_neither_the_file_nor_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "fisher.safetensors"
    trainer(tmp_path).train()
    before = path.read_bytes()
    run = trainer(tmp_path, what=("fisher", "abs"))
    run.args.save_strategy = "no"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    transformers.logging.enable_propagation()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, old[1]))
    try:
        with caplog.at_level(logging.ERROR):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        transformers.logging.disable_propagation()
    assert f"could not write {path}" in caplog.text and "free some space" in caplog.text
    assert path.read_bytes() == before and run.state.global_step == 2
    assert not [part for part in tmp_path.iterdir() if part.name.endswith(".part")]
    run.fisher.statistics.save(tmp_path / "again.safetensors")
    assert len(Statistics.load(tmp_path / "again.safetensors")) == len(run.fisher.statistics)


@pytest.mark.parametrize("name", [".peftx.json", "selection.md", "Metrics.json"])
def test_names_that_peftx_writes_itself_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="which training writes itself"):
        peftx.FisherCallback(output=name)


def test_the_list_names_the_file(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    files = json.loads((tmp_path / ".peftx.json").read_text())["files"]
    assert files["fisher.safetensors"]["bytes"] == (tmp_path / "fisher.safetensors").stat().st_size
