"""Output folders of `peftx train` and `peftx compare`: what is there stays, whatever happens."""

# ruff: noqa: F811  (fixtures of another file)

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_train import SHORT, call, files, here, own_cache, settings, trained  # noqa: F401  (fixtures)

from peftx.files import LIST, NEW, note, written
from peftx.train import comparison, run
from peftx.train.checkpoints import damage

SAVES = ("--training", "save_steps=1", "--training", "logging_steps=1", "--training", "save_total_limit=5")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def given(files: Path, output: Path, *more: Any) -> tuple[Any, ...]:
    data = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", output)
    return (*data, *SHORT, "--set", "r=2", *more)


class Killed(transformers.TrainerCallback):
    """Ends the process like a power cut, when the Trainer has come to `event` in step 1."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.kill)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Any) -> int:
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("place", ["model", "data", "parent", "link", "relative"])
@pytest.mark.parametrize("ways", [(), ("--overwrite",)])
def test_the_output_is_neither_model_nor_data(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    place: str,
    ways: tuple,
) -> None:
    shutil.copytree(files / "llama", tmp_path / "in" / "model")
    shutil.copy(files / "pairs.jsonl", tmp_path / "in" / "pairs.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "model")
    monkeypatch.chdir(tmp_path / "in")
    output = {
        "model": tmp_path / "in" / "model",
        "data": tmp_path / "in" / "pairs.jsonl",
        "parent": tmp_path / "in",
        "link": tmp_path / "link",
        "relative": Path("../in/./model"),
    }[place]
    before = contents(tmp_path)
    data = ("--model", tmp_path / "in" / "model", "--data", tmp_path / "in" / "pairs.jsonl", "--output", output)
    outcome = call(command, *data, *SHORT, *ways)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1, outcome.output
    assert "is the " in outcome.stderr or "holds the " in outcome.stderr
    assert contents(tmp_path) == before


def test_files_of_the_user_stay(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mine = {"my_config.json": b"1", "adapter_notes.txt": b"2", "checkpoint-old/x": b"3", "model.safetensors": b"4"}
    for name, page in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(page)
    trained("train", *given(files, out, "--overwrite"))
    trained("train", *given(files, out, "--overwrite", "--seed", 3))
    assert {name: contents(out)[name] for name in mine} == mine
    assert not (out / NEW).exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "README.md", "tokenizer.json", "settings.yaml"])
def test_a_file_of_the_user_in_the_way_is_found_before_the_training(files: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    outcome = call("train", *given(files, out, "--overwrite"))
    assert outcome.exit_code == 2 and f"{out / name} is there already, and not by peftx train" in outcome.stderr
    assert contents(out) == {name: b"mine"}


def test_a_checkpoint_of_somebody_else_is_not_removed(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-7").mkdir(parents=True)
    (out / "checkpoint-7" / "x").write_text("mine")
    outcome = call("train", *given(files, out, "--overwrite"))
    assert outcome.exit_code == 2 and "checkpoint-7 is there already, and not by peftx train" in outcome.stderr
    assert contents(out) == {"checkpoint-7/x": b"mine"}


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_step_end", "on_save", "on_log"])
@pytest.mark.slow
def test_a_killed_run_that_replaces_leaves_the_old_one(files: Path, tmp_path: Path, event: str) -> None:
    out = tmp_path / "out"
    training = {"save_steps": 1, "logging_steps": 1}
    run.train(settings(files, out, method_settings={"r": 2}, training=training))
    old = contents(out)
    training["seed"] = 7
    new = settings(files, out, method_settings={"r": 4}, training=training, overwrite=True)
    code = in_child(lambda: run.train(new, [Killed(event)]))
    assert code == (0 if event == "on_train_begin" else -signal.SIGKILL)
    if event == "on_train_begin":  # the event is of step 0: nothing was killed, and the new one is there
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
        return
    found = contents(out)
    assert {name: found[name] for name in old} == old
    if event == "on_log":  # before the first checkpoint
        refused = call("train", "--output", out, "--resume")
        assert refused.exit_code == 2 and "there is no checkpoint in" in refused.stderr
    if event == "on_step_end":
        again = call("train", *given(files, out, "--overwrite", "--seed", 9))
        assert again.exit_code == 0, again.output
    if event == "on_save":
        metrics = trained("train", "--output", out, "--resume")
        assert metrics["method_settings"] == {"r": 4} and metrics["seed"] == 7
        assert not (out / NEW).exists() and "seed: 7" in (out / "settings.yaml").read_text()
        assert "peftx-new" not in (out / "checkpoint-2" / "trainer_state.json").read_text()


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("adapter_model.safetensors", b"", "0 of"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("optimizer.pt", 100, "100 of"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("trainer_state.json", b"{", "trainer_state.json"),
        ("scheduler.pt", None, "scheduler.pt is missing"),
        ("rng_state.pth", 0, "0 of"),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    files: Path,
    tmp_path: Path,
    name: str,
    change: Any,
    problem: str,
    listed: bool,
) -> None:
    out = tmp_path / "out"
    metrics = trained("train", *given(files, out, *SAVES, "--max-steps", 3))
    whole = load_file(out / "adapter_model.safetensors")
    path = out / "checkpoint-3" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:change] if isinstance(change, int) else change)
    if not listed:
        (out / LIST).unlink()
        for name in ("adapter_model.safetensors", "metrics.json", "README.md", "settings.yaml"):
            shutil.move(out / name, tmp_path / name)
        for other in [path for path in out.iterdir() if path.is_file()]:
            other.unlink()
        shutil.move(tmp_path / "settings.yaml", out / "settings.yaml")
        reason = damage(out / "checkpoint-3", {})
        assert reason and not damage(out / "checkpoint-2", {})
        return
    outcome = call("train", "--output", out, "--resume")
    assert outcome.exit_code == 0, outcome.output
    assert "peftx: checkpoint-3 is damaged (" in outcome.stderr and problem in outcome.stderr
    assert "resuming from checkpoint-2" in outcome.stderr
    again = json.loads((out / "metrics.json").read_text())
    assert [e for e in again["history"] if "loss" in e] == [e for e in metrics["history"] if "loss" in e]
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert (out / "damaged-checkpoint-3").is_dir() and not damage(out / "checkpoint-3", {})
    trained("train", *given(files, out, *SAVES, "--overwrite", "--max-steps", 1))
    assert not (out / "damaged-checkpoint-3").exists() and not (out / "checkpoint-3").exists()


def test_no_whole_checkpoint_is_one_error(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained("train", *given(files, out, *SAVES))
    for path in out.glob("checkpoint-*/optimizer.pt"):
        path.write_bytes(path.read_bytes()[:-10])
    before = contents(out)
    outcome = call("train", "--output", out, "--resume")
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1
    assert f"no checkpoint in {out} is whole (checkpoint-2: optimizer.pt has" in outcome.stderr
    assert "start anew with overwrite" in outcome.stderr and contents(out) == before


def test_a_flipped_bit_in_the_optimizer_is_found(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained("train", *given(files, out, *SAVES))
    path = out / "checkpoint-2" / "optimizer.pt"
    page = bytearray(path.read_bytes())
    page[len(page) // 2] ^= 1
    path.write_bytes(bytes(page))
    assert "optimizer.pt: " in damage(out / "checkpoint-2", {})


def test_a_full_disk_leaves_what_can_be_resumed(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    save = torch.save

    def full(thing: Any, path: Any, *rest: Any, **more: Any) -> None:
        if "checkpoint-2" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(thing, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    outcome = call("train", *given(files, out, *SAVES, "--max-steps", 3))
    assert outcome.exit_code == 2 and "free some space and go on by resume" in outcome.stderr, outcome.output
    monkeypatch.setattr(torch, "save", save)
    metrics = trained("train", "--output", out, "--resume")
    assert metrics["steps"] == 3


# Comparisons


def compared(files: Path, out: Path, *more: Any) -> Any:
    data = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out)
    return call("compare", *data, *SHORT, "--methods", "lora", "--seeds", 1, "--rank", 2, *more)


def test_a_comparison_replaces_only_its_own(files: Path, tmp_path: Path, here: list) -> None:
    out = tmp_path / "out"
    assert compared(files, out).exit_code == 0
    (out / "mine.json").write_text("mine")
    (out / "lora" / "seed-0" / "mine.json").write_text("mine")
    before = contents(out)
    outcome = compared(files, out, "--overwrite", "--max-steps", 1)
    assert outcome.exit_code == 0, outcome.output
    after = contents(out)
    assert after["mine.json"] == after["lora/seed-0/mine.json"] == b"mine" and not (out / NEW).exists()
    assert json.loads(after["results.json"])["runs"][0]["steps"] == 1
    assert after["lora/seed-0/adapter_model.safetensors"] != before["lora/seed-0/adapter_model.safetensors"]
    (out / "results.md").write_text("mine now")
    outcome = compared(files, out, "--overwrite")
    assert outcome.exit_code == 2 and "results.md has changed since peftx compare wrote it" in outcome.stderr


def test_a_comparison_that_fails_to_replace_leaves_the_old_one(
    files: Path,
    tmp_path: Path,
    here: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert compared(files, out).exit_code == 0
    before = contents(out)

    def interrupted(function: Any, one: Any) -> Any:
        if one.training["seed"] == 1:
            raise KeyboardInterrupt
        return function(one)

    monkeypatch.setattr(comparison, "apart", interrupted)
    compared(files, out, "--overwrite", "--max-steps", 1, "--seeds", 2)
    assert {name: contents(out)[name] for name in before} == before and (out / NEW).is_dir()
    monkeypatch.setattr(comparison, "apart", lambda function, one: function(one))
    outcome = compared(files, out, "--max-steps", 1, "--seeds", 2)  # goes on with the new one
    assert outcome.exit_code == 0 and not (out / NEW).exists(), outcome.output
    assert [r["steps"] for r in json.loads((out / "results.json").read_text())["runs"]] == [1, 1]


def test_a_comparison_goes_on_after_its_first_run_was_cut_off(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def cut_off(function: Any, one: Any) -> Any:
        Path(one.output).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "apart", cut_off)
    assert compared(files, out).exit_code != 0
    monkeypatch.setattr(comparison, "apart", lambda function, one: function(one))
    outcome = compared(files, out)
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.slow
def test_processes_of_a_killed_comparison_end(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out)
    arguments = ("compare", *data, *SHORT, "--methods", "lora", "--seeds", 1, "--max-steps", 100_000)
    parent = psutil.Popen(
        [sys.executable, "-m", "peftx", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "lora" / "seed-0" / "settings.yaml").exists():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = parent.children(recursive=True)
        assert children
    finally:
        parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_other_samples_are_not_mixed_with_earlier_ones(files: Path, tmp_path: Path, here: list) -> None:
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    lines = (files / "pairs.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    more = ("--data", data)
    assert compared(files, out, *more).exit_code == 0
    before = contents(out)
    data.write_text("".join(lines[:-1]))
    outcome = compared(files, out, *more, "--seeds", 2)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1, outcome.output
    assert f"the samples are others than those of the comparison in {out}" in outcome.stderr
    assert contents(out) == before
    data.write_text("".join(lines))
    whole = json.loads((out / "results.json").read_text())
    assert len(whole.pop("samples")) == 64  # one of an earlier version is taken, if it has as many samples
    with written(out / "results.json", "compare") as draft:
        draft.write_text(json.dumps(whole))
    data.write_text("".join(lines[:-1]))
    outcome = compared(files, out, *more, "--seeds", 2)
    assert outcome.exit_code == 2 and "the samples are others than those" in outcome.stderr
    data.write_text("".join(lines))
    assert compared(files, out, *more, "--seeds", 2).exit_code == 0


def test_other_weights_are_not_mixed_with_earlier_ones(files: Path, tmp_path: Path, here: list) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(files / "llama", model)
    more = ("--model", model)
    assert compared(files, out, *more).exit_code == 0
    assert compared(files, out, *more, "--seeds", 2).exit_code == 0
    before, weights = contents(out), load_file(model / "model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    outcome = compared(files, out, *more, "--seeds", 3)
    assert outcome.exit_code == 2 and f"the weights in {model} are others than those of" in outcome.stderr
    assert contents(out) == before


def test_a_comparison_goes_on_where_only_its_list_was_written(files: Path, tmp_path: Path, here: list) -> None:
    out = tmp_path / "out"
    out.mkdir()
    note(out, [], "compare")
    assert [path.name for path in out.iterdir()] == [LIST]
    assert compared(files, out).exit_code == 0


@pytest.mark.parametrize(
    "change",
    [
        "", "[", "[]", "null", '{"settings": {}}', '{"settings": [], "runs": []}', '{"settings": {}, "runs": 3}',
        '{"settings": {}, "runs": [3]}', '{"settings": {}, "runs": [{}]}', "[" * 100_000,
        ("method", None), ("method", "nothing"), ("method_settings", "r=2"), ("seed", "0"), ("eval", {}),
        ("eval", None),
        ("eval", {"loss": "low"}), ("step_seconds", None), ("trained_values", {}), ("samples", [3]),
        ("samples", {"eval": 1, "train": "9"}), ("bytes", "1"),
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_results_file_is_one_error(
    files: Path,
    tmp_path: Path,
    here: list,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    results_page: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    page = change
    if isinstance(change, tuple):
        whole = json.loads(results_page)
        whole["runs"][0][change[0]] = change[1]
        page = json.dumps(whole)
    (out / "results.json").write_text(page)
    outcome = compared(files, out)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1, (outcome.output, outcome.exception)
    assert "results.json is not what compare writes" in outcome.stderr and "move it away" in outcome.stderr
    assert (out / "results.json").read_text() == page and not here


@pytest.fixture(scope="module")
def results_page(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("results") / "out"
    apart, comparison.apart = comparison.apart, lambda function, one: function(one)
    try:
        assert compared(files, out).exit_code == 0
    finally:
        comparison.apart = apart
    return (out / "results.json").read_text()
