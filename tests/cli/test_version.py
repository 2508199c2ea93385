"""`peftx --version`, and what a command does not print."""

import os
import subprocess
import sys

import pytest

import peftx


def said(*words: str) -> tuple[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "PEFTX_COMMAND"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=environment)
    return done.stdout, done.stderr


def test_version() -> None:
    assert said("-m", "peftx.cli", "--version") == (f"peftx {peftx.__version__}\n", "")


def test_the_library_leaves_the_loggers_of_others_alone() -> None:
    pytest.importorskip("bitsandbytes")
    code = "import logging, peftx; print(logging.getLogger('bitsandbytes.backends.cpu.ops').filters)"
    assert said("-c", code)[0] == "[]\n"
