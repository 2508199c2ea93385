"""The command line."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import peftx
from peftx.cli import app


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_the_commands():
    outcome = call("--help")
    assert outcome.exit_code == 0
    assert "demo" in outcome.output and "methods" in outcome.output


def test_methods_lists_every_record():
    outcome = call("methods")
    assert outcome.exit_code == 0
    for info in peftx.methods():
        assert info.paper in outcome.output
        assert all(variant in outcome.output for variant in info.variants)


def test_runs_as_a_module():
    outcome = subprocess.run([sys.executable, "-m", "peftx.cli", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: peftx" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "bonne"], "peftx: unknown method bonne: the demo knows lora, "),
        (["--model", "no-such-folder", "--output", "{tmp}"], "peftx: no model in no-such-folder"),
        (["--epochs", "0"], "peftx: epochs must be a positive number, got 0.0"),
        (["--output", __file__], "peftx: cannot write to the folder"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    pytest.importorskip("datasets")
    outcome = call("demo", *[argument.format(tmp=tmp_path) for argument in arguments])
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(message)
    assert outcome.stderr.count("\n") == 1


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.startswith("peftx.demo")]:
        monkeypatch.delitem(sys.modules, name)
    outcome = call("demo")
    assert outcome.exit_code == 2
    assert outcome.stderr == 'peftx: datasets is missing: pip install "peftx[demo]"\n'
