"""Two gloo processes under TRL's trainers: methods train as one process does, sums and selections are those of all."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CASES, Case
from processes import join, leave
from runs import driver, logged, make, rows, trained, values
from torch import nn

import peftx
from peftx.compression import Statistics, target_layers
from peftx.utils import innermost

pytestmark = pytest.mark.trl
FIRST = {case.info.name: case for case in reversed(CASES)}
EXACT: dict[str, Any] = dict(estimator="per_sample", what="fisher", directions=None, max_samples=None)
WAYS: dict[str, dict[str, Any]] = {
    "passes of the training": {},
    "padding free": {"padding_free": True, "max_length": None},
    "accumulation": {"gradient_accumulation_steps": 2},
    "a pass after it": {"when": "calibration"},
}


def run_of(case: Case, name: str, folder: Path, size: int, **options: Any) -> Any:
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": size, **options}
    run = make(name, folder, trained(case, name), gradient_checkpointing=True, **options)
    run.train()
    return run


def fisher_of(way: str, folder: Path, **options: Any) -> Statistics:
    settings = {**WAYS[way]}
    callback = peftx.FisherCallback(**EXACT, when=settings.pop("when", "last_epoch"))
    options |= {"callbacks": [callback], "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, **settings}
    run_of(FIRST["bone"], "SFT", folder, 2, **options)
    assert callback.statistics is not None
    return callback.statistics


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    transformers.logging.set_verbosity_error()
    for method, case in FIRST.items():
        for name in ("SFT", "DPO"):
            run = run_of(case, name, folder / f"{name}-{method}", 2, callbacks=driver(case), ddp_backend="gloo")
            found = {"values": values(run.model), "losses": logged(run)}
            torch.save(found, folder / f"{name}-{method}-{rank}")
    for number, way in enumerate(WAYS):
        fisher_of(way, folder / f"fisher-{number}", ddp_backend="gloo").save(folder / f"fisher-{number}-{rank}")
    callback = peftx.DonodCallback(keep=0.5)
    run_of(FIRST["bone"], "DPO", folder / "donod", 2, callbacks=[callback], ddp_backend="gloo")
    assert callback.selection is not None
    torch.save(callback.selection.indices, folder / f"donod-{rank}")
    leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("name", ["SFT", "DPO"])
@pytest.mark.parametrize("method", FIRST)
def test_two_processes_train_as_one(two_processes: Path, method: str, name: str, tmp_path: Path) -> None:
    first, second = (torch.load(two_processes / f"{name}-{method}-{rank}") for rank in range(2))
    assert all(torch.equal(tensor, second["values"][key]) for key, tensor in first["values"].items())
    one = run_of(FIRST[method], name, tmp_path, 4, callbacks=driver(FIRST[method]))
    if method != "loraggpo":  # draws other noise in each process
        torch.testing.assert_close(first["values"], values(one.model), rtol=1e-3, atol=1e-5)
    if name == "DPO":
        assert first["losses"][0] == pytest.approx(math.log(2), abs=1e-6)


def explicit(model: Any, samples: list[dict[str, Any]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Row sums of the squared gradient of each sample's summed loss, in float64."""
    model = copy.deepcopy(model).double().eval()
    layers = target_layers(model)
    for layer in layers.values():
        innermost(layer).weight.requires_grad_()
    squares: dict[str, Any] = dict.fromkeys(layers, 0)
    for sample in samples:
        model.zero_grad()
        ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1]
        nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum").backward()
        for name, layer in layers.items():
            squares[name] = squares[name] + innermost(layer).weight.grad.square()
    count = len(samples)
    return {name: (square.sum(0) / count, square.sum(1) / count) for name, square in squares.items()}


@pytest.mark.parametrize("way", WAYS)
def test_fisher_sums_are_those_of_all_processes(two_processes: Path, way: str, tmp_path: Path) -> None:
    number = list(WAYS).index(way)
    case = FIRST["bone"]
    data = make("SFT", tmp_path, trained(case, "SFT")).train_dataset
    wanted = explicit(trained(case, "SFT"), list(data))
    for rank in range(2):
        found = Statistics.load(two_processes / f"fisher-{number}-{rank}")
        assert found.samples == len(data) == len(rows("SFT")) and list(found) == list(wanted)
        for name, layer in found.items():
            for mine, theirs in zip((layer.fisher_in, layer.fisher_out), wanted[name], strict=True):
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-5 * float(theirs.max()))


def test_pairs_are_chosen_by_all_processes(two_processes: Path, tmp_path: Path) -> None:
    callback = peftx.DonodCallback(keep=0.5)
    run_of(FIRST["bone"], "DPO", tmp_path, 4, callbacks=[callback])
    assert callback.selection is not None
    assert all(torch.load(two_processes / f"donod-{rank}") == callback.selection.indices for rank in range(2))
