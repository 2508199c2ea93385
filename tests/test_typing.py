"""What a type checker sees of names that are imported when they are first used: mypy on a user's file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peftx

pytest.importorskip("mypy")

# What peftx stands on is skipped, so that mypy need not read all of torch; its own sources are read.
SETTINGS = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-torch.*,transformers.*,peft.*,accelerate.*,datasets.*,numpy.*,flwr.*,opacus.*,matplotlib.*,sklearn.*]
follow_imports = skip
"""
RIGHT = """
import peftx
import torch
from peftx.federated import FedSVDStrategy

peftx.DonodCallback(keep=0.3, warmup_steps=10)
peftx.FisherCallback(every=2)
peftx.export_lora("adapter", "plain", rank=8)
peftx.export_gguf("adapter", "gguf", dtype=torch.float16)
peftx.federated.LocalSettings(steps=5)
peftx.federated.DPSpec(epsilon=3.0)
peftx.compression.FisherCallback(seed=1)
peftx.optim.trainer_kwargs(1e-3, rank=4)
peftx.hub.load_adapter
peftx.train.train
FedSVDStrategy
version: str = peftx.__version__
"""
WRONG = """
import peftx
import torch
from peftx.federated import FedSVDStrategy

peftx.DonodCallback(keeep=0.3)
peftx.DonodCallback(keep="0.3")
peftx.FisherCallback(evry=2)
peftx.export_lora("adapter", "plain", rnk=8)
peftx.export_gguf("adapter", "gguf", dtpe=torch.float16)
peftx.federated.LocalSettings(stepz=5)
peftx.federated.DPSpec(epsilonn=3.0)
peftx.federated.dirichlet_partition(alfa=0.1)
FedSVDStrategy(rounds_=3)
peftx.compression.FisherCallback(sed=1)
peftx.compression.collect(modell=1)
peftx.pruning.DonodCallback(keeep=1)
peftx.hub.export_lora()
peftx.optim.LowRankAdamW([], rnk=1)
peftx.train.train(1, 2, 3, 4, 5, 6, 7)
peftx.DonodCallbck
peftx.federated.LocalSetings
peftx.compression.colect
peftx.train.trane
"""


def refused(text: str, folder: Path) -> set[int]:
    """The numbers of the lines to which mypy objects."""
    file, settings = folder / "theirs.py", folder / "mypy.ini"
    file.write_text(text)
    settings.write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", folder / "cache", file]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(peftx.__file__).parents[1])
    assert found.returncode in (0, 1) and not found.stderr, found.stdout + found.stderr
    return {int(line.split(":")[1]) for line in found.stdout.splitlines() if ": error:" in line}


def test_a_misspelt_argument_or_name_fails_and_the_right_one_passes(tmp_path):
    text = RIGHT + WRONG
    first = RIGHT.count("\n")
    wrong = {node.lineno for node in ast.parse(text).body if isinstance(node, ast.Expr) and node.lineno > first}
    assert refused(text, tmp_path) == wrong


@pytest.mark.parametrize("package", ["", ".compression", ".federated", ".train"])
def test_every_name_that_is_imported_later_is_there_and_listed(package):
    module = sys.modules["peftx"] if not package else getattr(peftx, package[1:])
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018
