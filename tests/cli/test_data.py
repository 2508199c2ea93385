"""Data as people have it, in every command that takes data."""

import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, words
from typer.testing import CliRunner

from peftx.cli import app

COMMANDS = {
    "train": ("--output", "out", "--training", "use_cpu=true"),
    "compare": ("--output", "out", "--methods", "lora", "--training", "use_cpu=true"),
    "prune": ("--out", "out.jsonl", "--device", "cpu"),
    "compress": ("--out", "out", "--device", "cpu"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("bert").save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def call(command: str, model: Path, data: Path, *more: Any) -> Any:
    options = [str(data.parent / part) if part.startswith("out") else part for part in COMMANDS[command]]
    given = [command, "--model", str(model), "--data", str(data), *options, *map(str, more)]
    return CliRunner().invoke(app, given, env={"COLUMNS": "200"})


def sentences(path: Path, *empty: int) -> Path:
    """SST-2's columns between semicolons; the cells in the rows `empty`, from 1, are empty."""
    draw = random.Random(0)
    rows = [f"{'' if i in empty else f'w{draw.randrange(1, 60)} w{i}'};{i % 2}" for i in range(1, 31)]
    path.write_text("\n".join(["sentence;label", *rows]))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_cell_is_named_by_file_and_row(model: Path, tmp_path: Path, command: str) -> None:
    data = sentences(tmp_path / "data.csv", 5, 27)
    outcome = call(command, model, data)
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert (
        f"peftx: {data}, 2 records have (5, 27) an empty field 'sentence': fill it, or leave them out" in outcome.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_label_that_is_not_there_lists_the_columns(model: Path, tmp_path: Path, command: str) -> None:
    outcome = call(command, model, sentences(tmp_path / "data.csv"), "--label", "stars")
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert "field 'stars'" in outcome.stderr and "sentence, label" in outcome.stderr


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_sentences_between_semicolons(model: Path, tmp_path: Path, command: str) -> None:
    """As `train` and `compare` have it in tests/train."""
    more = {"prune": ("--show", 0), "compress": ("--recover-epochs", 0)}[command]
    outcome = call(command, model, sentences(tmp_path / "data.csv"), *more)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    if command == "prune":
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9
    else:
        assert "accuracy on 3 held-out samples" in (tmp_path / "out" / "README.md").read_text()
