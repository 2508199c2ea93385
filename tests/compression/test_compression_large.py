"""What large models need: little memory beside the weights, work that is done once, and runs that go on."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_compression import draw, statistics_of
from torch import nn

from peftx.compression import LayerStatistics, LowRankLinear, Statistics, collect, compress, factorize, target_layers
from peftx.compression import compress as compress_function
from peftx.compression import decompose as decomposing
from peftx.compression.layers import signature
from peftx.compression.ranks import largest, saves
from peftx.compression.totals import Totals

compressing = sys.modules[compress_function.__module__]


class Stack(nn.Module):
    """Many layers of one size."""

    def __init__(self, count: int = 4, size: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(size, size), nn.Tanh()) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def peak(step: Any) -> int:
    """Most bytes of tensors held at one time, beyond those of before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(("method", "allocation"), [("fwsvd", "uniform"), ("svd-llm", "uniform"), ("svd", "global")])
def test_memory_beside_the_model_is_a_tenth(method: str, allocation: str) -> None:
    statistics = statistics_of(Stack(160, 48))
    kept = []

    def run() -> None:
        model = Stack(160, 48)  # here, so that its weights are seen to go
        compress(model, statistics, keep=0.8, method=method, allocation=allocation)
        low = [module for module in model.modules() if isinstance(module, LowRankLinear)]
        kept.append(sum(parameter.nbytes for layer in low for parameter in layer.parameters()))

    size = sum(parameter.nbytes for parameter in Stack(160, 48).parameters())
    most = peak(run)
    assert size <= most < 1.1 * size
    assert allocation == "global" or kept[0] > 0.6 * size  # which was beside the model before


# Work that is done once


@pytest.fixture
def shared() -> tuple[nn.Module, Statistics]:
    model = tiny_model("llama")
    data = [{"input_ids": torch.randint(1, 64, (9,), generator=torch.Generator().manual_seed(i))} for i in range(30)]
    return model, collect(model, data, what="gram")


def test_layers_of_one_input_share_a_gram_matrix(shared: Any, tmp_path: Path) -> None:
    _, found = shared
    for block in ("model.layers.0", "model.layers.1"):
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        grams = [found[f"{attention}.{part}_proj"].gram for part in "qkvo"]
        assert grams[0] is grams[1] is grams[2] and grams[3] is not grams[0]
        assert found[f"{mlp}.gate_proj"].gram is found[f"{mlp}.up_proj"].gram is not found[f"{mlp}.down_proj"].gram
    found.save(tmp_path / "file")
    assert sum(key.endswith(".gram") for key in load_file(tmp_path / "file")) == 8  # of 14 layers
    again = Statistics.load(tmp_path / "file")
    assert list(again) == list(found)
    assert len({id(layer.gram) for layer in again.values()}) == 8
    for name, layer in found.items():
        assert torch.equal(again[name].gram, layer.gram)


def test_files_of_before_load(shared: Any, tmp_path: Path) -> None:
    """Those have a Gram matrix for each layer."""
    _, found = shared
    tensors = {}
    for name, layer in found.items():
        tensors |= {f"{name}.gram": layer.gram.clone(), f"{name}.signature": layer.signature}
    facts = {key: getattr(found, key) for key in ("samples", "tokens", "estimator", "model")}
    header = {**facts, "shapes": {name: list(layer.shape) for name, layer in found.items()}}
    save_file(tensors, tmp_path / "old", {"format": "peftx.statistics.1", "statistics": json.dumps(header)})
    again = Statistics.load(tmp_path / "old")
    assert all(torch.equal(again[name].gram, layer.gram) for name, layer in found.items())


@pytest.mark.parametrize(
    ("gram_of", "reason"),
    [
        ([], "gives layers"),
        ({"model.layers.0.self_attn.k_proj": "nothing"}, "of another one that has none"),
        ({"nothing": "model.layers.0.self_attn.q_proj"}, "of another one that has none"),
        ({"model.layers.0.self_attn.k_proj": 3}, "of another one that has none"),
        ({"model.layers.0.self_attn.o_proj": "model.layers.0.self_attn.q_proj"}, "and another one's"),
        ({"model.layers.0.self_attn.k_proj": "model.layers.0.mlp.down_proj"}, r"gram must be \(16, 16\)"),
    ],
)
def test_forged_sharing(gram_of: Any, reason: str, shared: Any, tmp_path: Path) -> None:
    shared[1].save(tmp_path / "file")
    from safetensors import safe_open

    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["statistics"])
    right = header["gram_of"]
    header["gram_of"] = {**right, **gram_of} if gram_of else gram_of
    save_file(load_file(tmp_path / "file"), tmp_path / "forged", {**metadata, "statistics": json.dumps(header)})
    with pytest.raises(ValueError, match=f"forged holds no statistics of peftx.*{reason}"):
        Statistics.load(tmp_path / "forged")


class Sometimes(nn.Module):
    """Two layers that mostly get the same input, and a third that always does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(6, 6) for name in "abc"})])

    def forward(self, x: torch.Tensor, how: torch.Tensor) -> torch.Tensor:
        block: Any = self.blocks[0]
        first = block["a"](x)
        other = x if how[0] < 2 else 2 * x
        second = block["b"](other) if how[0] else 0
        return first + second + block["c"](x) + (block["c"](x) if how[0] == 3 else 0)


def test_layers_that_share_now_and_then_are_exact() -> None:
    model = Sometimes().double()
    inputs = [draw(1, 5, 6, seed=i) for i in range(8)]
    given: dict[str, list[torch.Tensor]] = {name: [] for name in "abc"}
    for name, layer in model.blocks[0].items():
        layer.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0][0]))
    found = collect(model, range(8), lambda rows: {"x": inputs[rows[0]], "how": torch.tensor([rows[0] % 4])},
                    what=("gram", "abs"), batch_size=1)  # fmt: skip
    for name, parts in given.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[f"blocks.0.{name}"].gram, x.T @ x / len(x))
        torch.testing.assert_close(found[f"blocks.0.{name}"].abs_mean, x.abs().mean(0))


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "not alike"])
def test_processes_that_share_differently_add_up(alike: bool) -> None:
    layers = {name: nn.Linear(3, 3) for name in "abc"}
    wanted = dict.fromkeys("abc", 0)
    all_totals = []
    for rank in range(2):
        totals = Totals(layers, ("gram",))
        groups = [("a", "b", "c")] if alike or not rank else [("a", "b"), ("c",), ("a",)]
        for i, group in enumerate(groups):
            found = draw(3, 3, seed=5 * rank + i)
            for name in group:
                wanted[name] = wanted[name] + found
                totals.positions[name] += 1
            totals.add(group, "gram", found)
        totals.samples = totals.tokens = 1
        all_totals.append(totals)
    barrier, parts = threading.Barrier(2), [None, None]

    def total(rank: int, part: torch.Tensor) -> torch.Tensor:
        parts[rank] = part
        barrier.wait()
        made = parts[0] + parts[1]
        barrier.wait()
        return made

    threads = [
        threading.Thread(target=totals.reduce, args=(lambda part, rank=rank: total(rank, part),))
        for rank, totals in enumerate(all_totals)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for totals in all_totals:
        assert len({group for group, _ in totals.sums}) == (1 if alike else 3)
        for name in "abc":
            torch.testing.assert_close(
                sum(totals.sums[group, "gram"] for group in totals.groups(name, "gram")), wanted[name]
            )


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_each_gram_matrix_is_decomposed_once(shared: Any, allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, statistics = shared
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(a[0].shape) or original(*a, **k))
    compress(model, statistics, keep=0.7, method="svd-llm", allocation=allocation)
    assert len(calls) == 8  # of 14 layers


# Large weights


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
@pytest.mark.parametrize("deficient", [False, True])
def test_the_road_of_large_weights_is_as_exact(shape: Any, deficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (draw(shape[0], 8) @ draw(8, shape[1], seed=1) if deficient else draw(*shape)).float()
    importance = draw(shape[1], seed=2).square()
    monkeypatch.setattr(decomposing, "DOUBLE", 0)
    found = factorize(weight, 15, importance_in=importance)
    right = importance.div(importance.mean()).clamp(min=1e-8).sqrt()
    values = torch.linalg.svdvals(weight.double() * right)
    best = float(values[15:].norm() / values.norm())
    error = float(((weight.double() - found.up.double() @ found.down.double()) * right).norm() / values.norm())
    assert error == pytest.approx(best, rel=1e-4, abs=2e-6)
    assert found.error == pytest.approx(best, rel=1e-4, abs=2e-6)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-4)


def test_wide_layers_need_no_factor_of_their_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be the largest tensor of all, of 11008 inputs or 28672."""
    weight, x = draw(40, 90).float(), draw(300, 90, seed=3) * torch.linspace(0.1, 3, 90, dtype=torch.float64)
    gram = x.T @ x / len(x)
    wanted = factorize(weight.double(), 15, gram=gram)
    monkeypatch.setattr(decomposing, "DOUBLE", 0)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    for given in (gram, gram.float()):
        found = factorize(weight, 15, gram=given)
        product = found.up.double() @ found.down.double()
        torch.testing.assert_close(product, wanted.up @ wanted.down, rtol=1e-3, atol=1e-3)
        assert found.error == pytest.approx(wanted.error, rel=1e-4)
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-4, atol=1e-4)
    few = draw(5, 90, seed=4)  # fewer tokens than inputs
    found = factorize(weight, 10, gram=few.T @ few)
    torch.testing.assert_close((found.up @ found.down).double() @ few.T, weight.double() @ few.T, rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match="far from positive semi-definite"):
        factorize(weight, 15, gram=gram - 0.9 * torch.diag(gram.diagonal().roll(45)))


def test_when_random_projections_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they take less than half the work, and are within a good per cent of the best error."""
    assert decomposing.pays(1228, 4096, 4096) and decomposing.pays(700, 11008, 4096)
    assert not decomposing.pays(1791, 4096, 11008) and not decomposing.pays(10, 384, 1536)
    weight = (draw(300, 300) * torch.arange(1, 301, dtype=torch.float64) ** -0.3).float()
    monkeypatch.setattr(decomposing, "DOUBLE", 10**4)
    best = factorize(weight, 40).error
    found = factorize(weight, 40, randomized=None)
    assert best < found.error < 1.015 * best
    assert found.error == pytest.approx(float((weight - found.up @ found.down).norm() / weight.norm()), rel=1e-4)
    assert factorize(weight, 200, randomized=None).error == pytest.approx(factorize(weight, 200).error, rel=1e-6)


def test_the_largest_rank_that_saves() -> None:
    for shape in ((4, 4), (5, 7), (384, 1536), (1, 9)):
        rank = largest(*shape)
        assert not saves(rank + 1, *shape) and (rank == 0 or saves(rank, *shape))


# Interruptions


def same(model: nn.Module, other: nn.Module) -> bool:
    states = model.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def solving(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[Any]:
    """The decompositions that are made from now on, until the one that is interrupted."""
    calls: list[Any] = []
    original = compressing.solve

    def solve(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(compressing, "solve", solve)
    return calls


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_an_interrupted_run_goes_on(allocation: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 0.7, "method": "svd-llm", "allocation": allocation}
    wanted, report = compress(tiny_model("llama"), statistics_of(tiny_model("llama")), **options)
    model = tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        solving(patch, stop=6)
        compress(model, statistics_of(model), folder=tmp_path / "work", **options)
    assert same(model, tiny_model("llama")) and not hasattr(model.config, "quantization_config")
    assert len(list((tmp_path / "work").iterdir())) == 6
    with pytest.MonkeyPatch.context() as patch:
        calls = solving(patch)
        found, again = compress(model, statistics_of(model), folder=str(tmp_path / "work"), **options)
    assert len(calls) == len(report.layers) - 6
    assert same(found, wanted) and again == report
    with pytest.MonkeyPatch.context() as patch:
        calls = solving(patch)
        assert same(
            compress(tiny_model("llama"), statistics_of(tiny_model("llama")), folder=tmp_path / "work", **options)[0],
            wanted,
        )
    assert not calls


def test_finished_layers_are_those_of_these_weights_and_settings(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 0.7, "method": "fwsvd", "folder": tmp_path}
    count = len(compress(tiny_model("llama"), statistics_of(tiny_model("llama")), **options)[1].layers)

    def made(model: nn.Module, statistics: Statistics, **changes: Any) -> int:
        wanted = compress(copy.deepcopy(model), statistics, **{**options, "folder": None, **changes})[0]
        with pytest.MonkeyPatch.context() as patch:
            calls = solving(patch)
            found = compress(model, statistics, **{**options, **changes})[0]
        assert same(found, wanted)
        return len(calls)

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-3
    assert made(model, statistics_of(model)) == 1
    assert made(tiny_model("llama"), statistics_of(tiny_model("llama"), seed=1)) == count
    assert made(tiny_model("llama"), statistics_of(tiny_model("llama"), seed=1), keep=0.5) == count
    assert made(tiny_model("llama"), statistics_of(tiny_model("llama"), seed=1), keep=0.5, method="svd") == count
    assert made(tiny_model("llama"), None, keep=0.5, method="svd") == 0  # type: ignore[arg-type]


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    name = next(iter(target_layers(tiny_model("llama"))))
    path = tmp_path / f"{name}.safetensors"
    compress(tiny_model("llama"), keep=0.7, method="svd", folder=tmp_path)
    whole = path.read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "text": b"factors", "empty": b""}
    save_file({"up": torch.ones(2)}, tmp_path / "other")
    contents["other"] = (tmp_path / "other").read_bytes()
    for content in contents.values():
        path.write_bytes(content)
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=r"q_proj.safetensors holds no factors of peftx.*another folder"):
            compress(model, keep=0.7, method="svd", folder=tmp_path)
        assert same(model, tiny_model("llama")) and path.read_bytes() == content
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"holds no factors of peftx \(not a file\)"):
        compress(tiny_model("llama"), keep=0.7, method="svd", folder=tmp_path)
    with pytest.raises(ValueError, match="folder must be a folder"):
        compress(tiny_model("llama"), keep=0.7, method="svd", folder=tmp_path / "other")


@pytest.mark.parametrize("problem", [OSError("no space left"), KeyboardInterrupt(), RuntimeError("did not converge")])
def test_nothing_is_left_of_a_failure(problem: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, calls = tiny_model("llama"), []
    original = compressing.solve

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise problem
        return original(*args, **kwargs)

    monkeypatch.setattr(compressing, "solve", failing)
    with pytest.raises(type(problem)):
        compress(model, keep=0.7, method="svd")
    assert same(model, tiny_model("llama")) and not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 100})())
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match="0.0 GB left, and finished layers need"):
            compress(tiny_model("llama"), keep=0.7, method="svd", folder=folder)


def test_half_a_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written stands beside, and is renamed when it is whole."""
    from peftx.compression import statistics as module

    model = tiny_model("bert")
    found = statistics_of(model)
    found.save(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def half(tensors: Any, path: Any, metadata: Any) -> None:
        Path(path).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        found.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="no space"):
        compress(model, keep=0.7, method="svd", folder=tmp_path / "work")
    assert same(model, tiny_model("bert")) and not list((tmp_path / "work").iterdir())


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[2])
from conftest import tiny_model
import peftx
from peftx.compression import compress
module = sys.modules[compress.__module__]
original, calls = module.solve, []
def solve(*args, **kwargs):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
module.solve = solve
compress(tiny_model("gpt2"), keep=0.7, method="svd", folder=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parents[1])], check=False)
    assert run.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 5
    with pytest.MonkeyPatch.context() as patch:
        calls = solving(patch)
        found = compress(tiny_model("gpt2"), keep=0.7, method="svd", folder=tmp_path)[0]
    assert len(calls) == 3
    assert same(found, compress(tiny_model("gpt2"), keep=0.7, method="svd")[0])


def test_an_error_while_layers_are_replaced_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("peftx"), "propagate", True)
    calls, original = [], LowRankLinear.like.__func__  # type: ignore[attr-defined]

    def like(cls: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return original(cls, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LowRankLinear, "like", classmethod(like))
        with caplog.at_level("ERROR"), pytest.raises(MemoryError):
            compress(tiny_model("llama"), keep=0.7, method="svd", folder=tmp_path)
    assert "3 of 14 layers were replaced: load the model again" in caplog.text
    with monkeypatch.context() as patch:
        solved = solving(patch)
        compress(tiny_model("llama"), keep=0.7, method="svd", folder=tmp_path)
    assert not solved


def test_a_bar_is_shown_when_it_is_asked_for(capfd: pytest.CaptureFixture, recwarn: Any) -> None:
    statistics = statistics_of(tiny_model("llama"))
    compress(tiny_model("llama"), statistics, keep=0.7)
    captured = capfd.readouterr()
    assert not captured.out and not captured.err
    compress(tiny_model("llama"), statistics, keep=0.7, progress=True)
    assert "fwsvd: 100%" in capfd.readouterr().err and not len(recwarn)


def test_statistics_of_one_layer_only() -> None:
    model = Stack(3)
    layers = dict(list(target_layers(model).items())[1:2])
    (name, layer), *_ = layers.items()
    made = {name: LayerStatistics(torch.ones(24, dtype=torch.float64), None, None, None, (24, 24), signature(layer))}
    found, report = compress(
        model, Statistics(made, samples=1, tokens=1, estimator="per_batch", model=""), keep=0.5, target_modules=[name]
    )
    assert list(report.layers) == [name] and found is model
