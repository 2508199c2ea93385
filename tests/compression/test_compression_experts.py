"""Fused experts of a mixture: sums, decompositions and factored products against loops over tokens and experts."""

import copy
import json
import logging
import math
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import SMALL, words
from mixtures import HIDDEN, MODULES, SIZES, E, K
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import peftx
from peftx.cli import app
from peftx.compression import (
    METHODS,
    LowRankLinear,
    Statistics,
    collect,
    compress,
    materialize,
    rank_for,
    target_layers,
)
from peftx.compression.compress import count
from peftx.compression.experts import LowRankExperts, LowRankStack
from peftx.compression.factorize import DAMPING, NEEDS
from peftx.compression.hooks import Collector
from peftx.compression.layers import shape_of
from peftx.compression.totals import Totals

f64 = torch.float64
LENGTH = 6


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, E, bias=False)
        config = SimpleNamespace(**SIZES, _experts_implementation="eager")
        self.experts = MODULES[kind](config)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.gate(x)[:, :-1]  # the last expert gets no token
        weights, index = scores.softmax(-1).topk(K)
        return index, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, HIDDEN)
        return x + self.experts(flat, *self.route(flat)).view(x.shape)


class Mixture(nn.Module):
    """Two blocks of experts in float64, whose loss is a mean over rows."""

    def __init__(self, kind: str = "mixtral") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(kind), Block(kind)])
        for parameter in self.to(f64).parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        y = x
        for block in self.blocks:
            y = block(y)
        return SimpleNamespace(loss=(y - labels).square().sum((1, 2)).mean(), y=y)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


ROWS = [{"x": draw(LENGTH, HIDDEN, seed=i), "labels": draw(LENGTH, HIDDEN, seed=10 + i)} for i in range(5)]


def stacked(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


Given = dict[str, list[list[torch.Tensor]]]  # of a stack, by expert


def by_loop(model: Mixture, x: torch.Tensor, weights: dict[str, list[torch.Tensor]], given: Given | None = None) -> Any:
    """The model's output for x (T, hidden), token by token and expert by expert, with weights (out, in) of each."""
    for i, block in enumerate(model.blocks):
        experts: Any = block.experts

        def project(key: str, e: int, row: torch.Tensor, i: int = i, experts: Any = experts) -> torch.Tensor:
            name = f"blocks.{i}.experts.{key}"
            if given is not None:
                given.setdefault(name, [[] for _ in range(E)])[e].append(row.detach())
            bias = getattr(experts, f"{key}_bias")[e] if experts.has_bias else None
            return F.linear(row, weights[name][e], bias)

        index, scores = block.route(x)
        rows = []
        for t, row in enumerate(x):
            total = row
            for k in range(K):
                e = int(index[t, k])
                gated = getattr(experts, "has_gate", True)
                h = project("gate_up_proj" if gated else "up_proj", e, row)
                h = experts._apply_gate(h) if gated else experts.act_fn(h)
                y = project("down_proj", e, h)
                if getattr(experts, "has_post_expert_norm", False):
                    y = experts.post_expert_norm(y[None])[0]
                total = total + scores[t, k] * y
            rows.append(total)
        x = torch.stack(rows)
    return x


def weights_of(model: Mixture) -> dict[str, list[torch.Tensor]]:
    """(out, in) of each expert, as leaves."""
    return {
        name: [one.detach().clone().requires_grad_() for one in stack.weight()]
        for name, stack in target_layers(model, r".*experts.*").items()
    }


@pytest.fixture(params=list(MODULES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# Sums


@pytest.mark.parametrize("estimator", ["per_sample", "per_batch"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_sums_of_each_expert_are_those_of_a_loop(kind: str, estimator: str, frozen: bool) -> None:
    model = Mixture(kind).requires_grad_(not frozen)
    model.blocks[0].gate.requires_grad_(True)
    what = ("fisher", "abs", "gram")
    if frozen:
        found = collect(model, ROWS, stacked, what=what, estimator=estimator, batch_size=2)
    else:  # where per_batch reads the gradient of the stack
        with Collector(model, target_layers(model), what=what, estimator=estimator) as collector:
            for start in range(0, len(ROWS), 2):
                model(**stacked(ROWS[start : start + 2])).loss.backward()
        found = collector.statistics()
        with Collector(model, target_layers(model), estimator=estimator) as collector:  # where nothing is looked at
            for start in range(0, len(ROWS), 2):
                model(**stacked(ROWS[start : start + 2])).loss.backward()
        for name, layer in collector.statistics().items():
            torch.testing.assert_close(layer.fisher_in, found[name].fisher_in)
            torch.testing.assert_close(layer.fisher_out, found[name].fisher_out)
    weights, given = weights_of(model), {}
    squares = {name: [torch.zeros_like(one) for one in ones] for name, ones in weights.items()}
    size = 1 if estimator == "per_sample" else 2
    for start in range(0, len(ROWS), size):
        loss = sum(
            (by_loop(model, row["x"], weights, given) - row["labels"]).square().sum()
            for row in ROWS[start : start + size]
        )
        leaves = [one for ones in weights.values() for one in ones]
        gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
        for ones in squares.values():
            for square in ones:
                if (gradient := next(gradients)) is not None:
                    square += gradient.square()
    assert list(found) == list(weights) and len(found) == 4
    for name, layer in found.items():
        assert layer.shape == shape_of(target_layers(model)[name])
        for e in range(E):
            torch.testing.assert_close(layer.fisher_in[e], squares[name][e].sum(0) / len(ROWS))
            torch.testing.assert_close(layer.fisher_out[e], squares[name][e].sum(1) / len(ROWS))
            rows = torch.stack(given[name][e]) if given[name][e] else torch.zeros(1, layer.shape[2], dtype=f64)
            torch.testing.assert_close(layer.gram[e], rows.T @ rows / (LENGTH * len(ROWS)))
            torch.testing.assert_close(layer.abs_mean[e], rows.abs().sum(0) / (LENGTH * len(ROWS)))
        assert not layer.fisher_in[-1].any() and layer.fisher_in[:-1].any(1).sum() >= 3
    assert not {"forward", "observe"} & set(vars(model.blocks[0].experts))


def test_padding_does_not_count_and_directions_come_near() -> None:
    model = Mixture()
    mask = torch.ones(LENGTH, dtype=torch.long)
    mask[-2:] = 0
    rows = [{**row, "input_ids": mask, "attention_mask": mask} for row in ROWS]  # so many ids as tokens
    model.forward, plain = lambda input_ids=None, **inputs: plain(**inputs), model.forward
    found = collect(model, rows, stacked, what=("abs", "gram"), batch_size=2)
    given: Given = {}
    weights = weights_of(model)
    for row in ROWS:
        by_loop(model, row["x"][:-2], weights, given)
    for name, layer in found.items():
        for e in range(E - 1):
            seen = torch.stack(given[name][e]) if given[name][e] else torch.zeros(1, layer.shape[2], dtype=f64)
            torch.testing.assert_close(layer.gram[e], seen.T @ seen / ((LENGTH - 2) * len(ROWS)))
    model.forward = plain
    exact = collect(model, ROWS, stacked, batch_size=2)
    near = collect(model, ROWS, stacked, batch_size=2, directions=4096)
    for name, layer in exact.items():
        assert (near[name].fisher_in - layer.fisher_in).norm() < 0.1 * layer.fisher_in.norm()


def test_a_file_holds_the_sums_of_experts(tmp_path: Path) -> None:
    model = Mixture("gpt_oss")
    found = collect(model, ROWS, stacked, what=("fisher", "abs", "gram"))
    found.save(tmp_path / "sums")
    again = Statistics.load(tmp_path / "sums")
    again.check(model)
    for name, layer in found.items():
        assert again[name].shape == layer.shape == (E, *layer.shape[1:])
        for field in ("fisher_in", "fisher_out", "abs_mean", "gram", "signature"):
            assert torch.equal(getattr(again[name], field), getattr(layer, field))
    with safe_open(tmp_path / "sums", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["format"] == "peftx.statistics.3"  # which earlier releases refuse by name
    name = next(iter(found))
    for key, changed, said in (
        (f"{name}.fisher_in", found[name].fisher_in[:-1].clone(), "must be"),
        (f"{name}.gram", found[name].gram + torch.eye(HIDDEN)[:, [1, 0, *range(2, HIDDEN)]].cumsum(0), "symmetric"),
        (f"{name}.gram", -found[name].gram, "negative"),
    ):
        save_file({**tensors, key: changed.to(tensors[key].dtype)}, tmp_path / "bad", metadata)
        with pytest.raises(ValueError, match=said):
            Statistics.load(tmp_path / "bad")
    other = Mixture("mixtral")
    with pytest.raises(ValueError, match="statistics of another model"):
        again.check(other)


def test_sums_of_processes_add_up() -> None:
    model = Mixture()
    layers = target_layers(model)
    name = next(iter(layers))
    both = []
    for rank in range(2):  # one of which saw no token of that stack
        totals = Totals(layers, ("gram",))
        totals.samples = totals.tokens = 1
        if rank:
            totals.positions[name] += 3
            totals.add_expert(name, "gram", 2, torch.eye(HIDDEN, dtype=f64))
        both.append(totals)
    barrier, parts = threading.Barrier(2), [None, None]

    def total(rank: int, part: torch.Tensor) -> torch.Tensor:
        parts[rank] = part
        barrier.wait()
        made = parts[0] + parts[1]
        barrier.wait()
        return made

    def work(rank: int) -> None:
        both[rank].reduce(lambda part: total(rank, part))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for totals in both:
        (summed,) = (part for ((owner,), _), part in totals.sums.items() if owner == name)
        assert summed.shape == (E, HIDDEN, HIDDEN) and summed.dtype == f64 and totals.positions[name] == 3
        assert torch.equal(summed[2], torch.eye(HIDDEN, dtype=f64)) and not summed[[0, 1, 3, 4]].any()


# Decomposition


def best(weight: torch.Tensor, rank: int, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """L^-1 (L W R)_r R^-1."""
    p, s, q = torch.linalg.svd(left @ weight @ right)
    return torch.linalg.inv(left) @ (p[:, :rank] * s[:rank]) @ q[:rank] @ torch.linalg.inv(right)


def weighting(method: str, layer: Any, e: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R of an expert, from its sums, or the mean of the others' where it has none."""

    def of(part: torch.Tensor) -> torch.Tensor:
        seen = [i for i in range(E) if part[i].any()]
        return part[e].double() if e in seen else part[seen].double().mean(0)

    def root(part: torch.Tensor) -> torch.Tensor:
        return torch.diag((part / part.mean()).clamp(min=1e-8).sqrt())

    left, right = torch.eye(layer.shape[1], dtype=f64), torch.eye(layer.shape[2], dtype=f64)
    if method == "fwsvd":
        left = root(of(layer.fisher_out)) if side != "in" else left
        right = root(of(layer.fisher_in)) if side != "out" else right
    elif method == "asvd":
        right = root(of(layer.abs_mean))  # alpha 0.5
    elif method == "svd-llm":
        gram = of(layer.gram)
        right = torch.linalg.cholesky(gram / gram.diagonal().mean() + DAMPING * torch.eye(len(gram), dtype=f64))
    return left, right


@pytest.mark.parametrize(("method", "side"), [*((method, "in") for method in METHODS), ("fwsvd", "both")])
def test_each_expert_is_decomposed_as_the_formula_says(kind: str, method: str, side: str) -> None:
    model = Mixture(kind)
    what = NEEDS[method] or ("fisher",)
    rows = [{"x": draw(40, HIDDEN, seed=i), "labels": draw(40, HIDDEN, seed=20 + i)} for i in range(2)]
    statistics = collect(model, rows, stacked, what=what)
    weights = weights_of(model)
    small, report = compress(model, statistics if NEEDS[method] else None, keep=0.6, method=method, side=side)
    for name, layer in statistics.items():
        parent, key = name.rsplit(".", 1)
        stack = small.get_submodule(parent).factors[key]
        row = report.layers[name]
        assert row.rank == stack.rank == rank_for(0.6, *layer.shape[1:]) and row.shape == layer.shape
        assert row.unseen == ((E - 1,) if NEEDS[method] else ())
        lost = energy = 0.0
        for e in range(E):
            left, right = weighting(method, layer, e, side)
            weight = weights[name][e].detach()
            wanted = best(weight, stack.rank, left, right)
            torch.testing.assert_close(stack.up[e].T @ stack.down[e], wanted, rtol=1e-6, atol=1e-8)
            scale = 1.0
            if e in row.unseen:
                scale = 0.0
            elif method == "svd-llm":
                scale = float(layer.gram[e].diagonal().mean())
            elif method == "asvd":
                scale = float(layer.abs_mean[e].mean())
            elif method == "fwsvd":
                scale = float(layer.fisher_in[e].sum())
            lost += scale * float((left @ (weight - wanted) @ right).square().sum())
            energy += scale * float((left @ weight @ right).square().sum())
        assert row.error == pytest.approx(math.sqrt(lost / energy), rel=1e-5)
    if NEEDS[method]:
        assert f"experts of {name} that no token reached, decomposed by the mean of the others: 4 (1 of 5)" in str(
            report
        )
    assert report.parameters[1] == count(small) < report.parameters[0]


def test_output_and_gradients_of_factors_are_those_of_a_loop(kind: str) -> None:
    small, _ = compress(Mixture(kind), keep=0.6, method="svd")
    row = ROWS[0]
    factors = [
        (f"blocks.{i}.experts.{key}", stack)
        for i, block in enumerate(small.blocks)
        for key, stack in block.experts.factors.items()
    ]
    leaves = [part for _, stack in factors for part in (stack.down, stack.up)]
    weights = {name: [up.T @ down for up, down in zip(stack.up, stack.down, strict=True)] for name, stack in factors}
    wanted = by_loop(small, row["x"], weights)
    found = small(**stacked([row])).y[0]
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert not any(leaf.grad is not None for leaf in leaves)
    again = materialize(copy.deepcopy(small))
    assert [type(block.experts) for block in again.blocks] == [MODULES[kind]] * 2
    torch.testing.assert_close(again(**stacked([row])).y[0], wanted)
    assert {name: part.shape for name, part in again.state_dict().items()} == {
        name: part.shape for name, part in Mixture(kind).state_dict().items()
    }


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor):
                self.entries = max(self.entries, part.numel())
        return out


def test_no_dense_stack_is_made() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 96}, num_local_experts=8)
    module = transformers.MixtralForCausalLM(config).model.layers[0].mlp
    holder = nn.Module()
    holder.layers = nn.ModuleList([module])
    small, _ = compress(holder, keep=0.2, method="svd")
    x = torch.randn(1, 4, 64, requires_grad=True)
    with Largest() as largest:
        small.layers[0](x).square().sum().backward()
    stack = small.layers[0].experts.factors["gate_up_proj"]
    assert largest.entries <= stack.up.numel() < 8 * 192 * 64 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_rank_runs_in_every_dtype(dtype: torch.dtype) -> None:
    for rank in (1, 3, 8):
        torch.manual_seed(0)
        stack = LowRankStack(3, 16, 24, rank, dtype=dtype)
        for part in stack.parameters():
            nn.init.normal_(part)
        x = torch.randn(7, 16, dtype=dtype, requires_grad=True)
        experts = torch.tensor([0, 0, 0, 2, 2, 2, 2])
        y = stack(x, peftx.adapters.sites.experts.Routing.of(experts, 3))
        wanted = torch.stack([row @ stack.down[e].T @ stack.up[e] for row, e in zip(x, experts, strict=True)])
        torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
        (y * torch.randn_like(y)).sum().backward()
        assert x.grad.isfinite().all() and not stack.down.grad[1].any() and stack.up.grad[2].any()


def test_ranks_of_stacks_are_allocated_beside_the_others() -> None:
    model = Mixture()
    for i, block in enumerate(model.blocks):  # so that the stacks differ
        block.experts.down_proj.data *= 10**i
    statistics = collect(model, ROWS, stacked, what="gram")
    budget = sum(
        rank_for(0.6, *layer.shape[1:]) * E * sum(layer.shape[1:]) for layer in statistics.values()
    )  # fmt: skip
    small, report = compress(model, statistics, keep=0.6, method="svd-llm", allocation="global")
    ranks = {name: row.rank for name, row in report.layers.items()}
    assert len(set(ranks.values())) > 1
    assert sum(row.kept for row in report.layers.values()) <= budget
    for name, rank in ranks.items():
        parent, key = name.rsplit(".", 1)
        experts = small.get_submodule(parent)
        dense = getattr(experts, "factors", {})
        assert (key in dense) == (rank is not None)
        if rank is not None:
            assert dense[key].rank == rank
    assert small(**stacked(ROWS)).loss.isfinite()


def test_an_interrupted_compression_goes_on_expert_by_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = collect(Mixture(), ROWS, stacked)
    wanted, _ = compress(Mixture(), statistics, keep=0.6)
    module = import_module("peftx.compression.compress")
    calls, original = [], module.solve

    def solve(*args: Any, **options: Any) -> Any:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(module, "solve", solve)
    model = Mixture()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        compress(model, statistics, keep=0.6, folder=tmp_path)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    calls.clear()
    monkeypatch.setattr(module, "solve", lambda *args, **options: calls.append(args) or original(*args, **options))
    small, _ = compress(model, statistics, keep=0.6, folder=tmp_path)
    assert len(calls) == 4 * E - 7
    for name, part in wanted.state_dict().items():
        assert torch.equal(small.state_dict()[name], part)


def test_one_stack_alone_and_what_is_said_about_others(caplog: pytest.LogCaptureFixture) -> None:
    model = Mixture()
    statistics = collect(model, ROWS, stacked, target_modules=["down_proj"])
    with pytest.raises(ValueError, match="blocks.0.experts.gate_up_proj: no statistics for this layer"):
        compress(model, statistics, keep=0.6)
    dense = model.blocks[0].experts.gate_up_proj
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    small, _ = compress(model, statistics, keep=0.6, target_modules=["down_proj"])
    logger.removeHandler(caplog.handler)
    assert "2 experts got no token in the statistics" in caplog.text
    experts: Any = small.blocks[0].experts
    assert list(experts.factors) == ["down_proj"] and experts.gate_up_proj is dense
    with pytest.raises(ValueError, match="compressed already"):
        compress(small, keep=0.6, method="svd")


@pytest.mark.parametrize("how", ["packed", "split"])
def test_stacks_that_cannot_be_read_are_left_out_or_refused(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Mixture()
    model.blocks[0].lin = nn.Linear(HIDDEN, HIDDEN).to(f64)
    for block in model.blocks:
        if how == "packed":
            block.experts.down_proj = nn.Parameter(block.experts.down_proj.to(torch.int8), requires_grad=False)
            block.experts.gate_up_proj.data = block.experts.gate_up_proj.data.to(torch.float8_e4m3fn)
        else:
            block.experts._is_expert_parallel = True
    said = "packed|quantised" if how == "packed" else "expert parallelism"
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    assert list(target_layers(model)) == ["blocks.0.lin"]
    logger.removeHandler(caplog.handler)
    assert "blocks.1.experts.down_proj is left out" in caplog.text
    for name in ("down_proj", "gate_up_proj"):
        with pytest.raises(ValueError, match=said):
            target_layers(model, [name])
        with pytest.raises(ValueError, match=said):
            compress(model, keep=0.5, method="svd", target_modules=[name])


def test_experts_of_another_kind_are_named() -> None:
    config = transformers.Llama4TextConfig(
        **SMALL | {"num_hidden_layers": 1}, intermediate_size_mlp=32, num_key_value_heads=4, head_dim=8,
        num_local_experts=4, pad_token_id=0, interleave_moe_layer_step=1,
    )  # fmt: skip
    _, report = compress(transformers.Llama4ForCausalLM(config), keep=0.6, method="svd")
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    assert "does not decorate" in report.skipped[name] and f"left as it is: {name}" in str(report)


def test_sizes_that_grouped_products_do_not_take() -> None:
    """The eager way of transformers takes them, and so does what collects on it, and what replaces it."""
    sizes = {"hidden_size": 10, "moe_intermediate_size": 7, "num_attention_heads": 2, "intermediate_size": 14}
    config = transformers.Qwen3MoeConfig(
        **SMALL | sizes, head_dim=8, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    statistics = collect(model, samples(), None)
    small, _ = compress(model, statistics, keep=0.6)
    assert isinstance(small.model.layers[0].mlp.experts, LowRankExperts)
    tokens = samples()[0]["input_ids"][None]
    small(input_ids=tokens, labels=tokens).loss.backward()
    assert small.model.layers[0].mlp.experts.factors["down_proj"].up.grad.isfinite().all()


@pytest.mark.parametrize("own", [True, False], ids=["ours", "PEFT's"])
def test_an_adapter_sits_on_a_stack_that_stayed_dense(own: bool) -> None:
    """Beside factors: the output is that of a loop with the delta, before and after merging."""
    small, _ = compress(Mixture(), keep=0.6, method="svd", target_modules=["down_proj"])
    factors = [block.experts.factors["down_proj"] for block in small.blocks]
    kind = peftx.BoneConfig if own else peft.LoraConfig
    model: Any = peft.get_peft_model(small, kind(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model = model.to(f64)
    inputs = stacked(ROWS[:1])
    found = model(**inputs)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    merged = model.merge_and_unload()
    weights = {}
    for i, (block, low) in enumerate(zip(merged.blocks, factors, strict=True)):
        weights[f"blocks.{i}.experts.gate_up_proj"] = list(block.experts.gate_up_proj)
        weights[f"blocks.{i}.experts.down_proj"] = [up.T @ down for up, down in zip(low.up, low.down, strict=True)]
    wanted = by_loop(merged, ROWS[0]["x"], weights)
    torch.testing.assert_close(found.y[0], wanted)
    torch.testing.assert_close(merged(**inputs).y[0], wanted)


# Models of transformers


def mixture(kind: str) -> Any:
    sizes: dict[str, Any] = {**SMALL, "max_position_embeddings": 64, "pad_token_id": 0, "num_key_value_heads": 4}
    torch.manual_seed(0)
    if kind == "mixtral":
        config: Any = transformers.MixtralConfig(**sizes, num_local_experts=4)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **sizes, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8
        )
    elif kind == "gpt_oss":
        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = transformers.GptOssConfig(
            **sizes, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope
        )
    else:
        heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
        config = transformers.DeepseekV3Config(
            **sizes, **heads, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=8, first_k_dense_replace=1,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


def same(found: Any, wanted: Any, tokens: torch.Tensor) -> bool:
    """Bit for bit in every tensor; where these lie in memory may change how products round."""
    first, second = found.state_dict(), wanted.state_dict()
    torch.testing.assert_close(logits(found, tokens), logits(wanted, tokens), rtol=0, atol=1e-5)
    return first.keys() == second.keys() and all(torch.equal(part, second[name]) for name, part in first.items())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "gpt_oss" else ()) for kind in KINDS]
)
def test_a_compressed_mixture_loads_bit_for_bit(kind: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = mixture(kind)
    before = count(model)
    small, report = compress(model, keep=0.6, method="svd")
    wanted = logits(small, tokens)
    small.save_pretrained(tmp_path / "small")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert same(again, small, tokens) and count(again) == count(small)
    stacks = [name for name, row in report.layers.items() if len(row.shape) > 2]
    assert len(stacks) == (2 if kind == "deepseek_v3" else 4)
    assert set(report.layers) == set(again.config.quantization_config.ranks)
    assert sum(isinstance(module, LowRankExperts) for module in again.modules()) == len(stacks) / 2
    body = transformers.AutoModel.from_pretrained(tmp_path / "small", device_map={"": "cpu"})  # without the head
    with torch.no_grad():
        found = body(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(found, small.get_decoder()(input_ids=tokens).last_hidden_state, rtol=0, atol=1e-5)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert {part.dtype for name, part in half.named_parameters() if "experts" in name} == {torch.bfloat16}
    assert logits(half, tokens).isfinite().all()
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"{before:,} parameters became {count(small):,}" in card and f"{len(stacks)} stacks of experts" in card
    again.save_pretrained(tmp_path / "twice")
    twice = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert same(twice, small, tokens)
    materialize(twice).save_pretrained(tmp_path / "dense")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    assert not hasattr(config, "quantization_config")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense, tokens), wanted, rtol=1e-4, atol=1e-4)
    # A program without peftx does not know what the config says, and has the dense model's sizes.
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", config=config)


def test_a_guard_stands_before_random_experts(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    small, _ = compress(model, keep=0.6, method="svd", target_modules=["down_proj"])
    small.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    del config.quantization_config
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again, small, tokens)


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("model.layers.0.mlp.experts.down_proj", 9, "at most rank 8"),
        ("model.layers.0.mlp.experts.down_proj", 3, "size mismatch|mismatch"),
        ("model.layers.0.mlp.experts.up_proj", 2, "does not have"),
        ("model.layers.0.mlp.experts", 2, "not a Linear"),
    ],
)
def test_a_config_that_was_changed_is_refused(name: str, rank: int, said: str, tmp_path: Path) -> None:
    small, _ = compress(mixture("qwen3_moe"), keep=0.9, method="svd", target_modules=r".*experts.*")
    small.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    ranks = config.quantization_config["ranks"] if isinstance(config.quantization_config, dict) else None
    ranks = config.quantization_config.ranks if ranks is None else ranks
    assert rank != ranks.get(name)
    ranks[name] = rank
    config.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=said):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def samples(number: int = 6) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(number):
        ids = torch.randint(1, 64, (8,), generator=generator)
        mask = torch.ones(8, dtype=torch.long)
        mask[8 - i % 3 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return made


def train(folder: Path, model: Any, *callbacks: Any, **options: Any) -> None:
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=1, optim="sgd", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    run = transformers.Trainer(model, arguments, train_dataset=samples(), callbacks=list(callbacks))
    run.remove_callback(transformers.PrinterCallback)
    run.train()


def adapted(how: str) -> Any:
    """A frozen mixture with adapters on its experts that do something, and on no other layer."""
    model = mixture("qwen3_moe")
    if how == "none":
        return model
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peftx.BoneConfig if how == "bone" else peft.LoraConfig
    rank = {"r": 4} if how == "bone" else {"r": 2}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config(target_modules=[], target_parameters=names, **rank))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
            assert "experts" in name
    if how == "fast":
        peftx.fast_experts(model)
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["none", "bone", "lora", "fast"])
def test_training_gives_the_sums_of_the_merged_model(how: str, tmp_path: Path) -> None:
    """Of the weight that an adapter changes the gradient is that of the merged one."""
    model = adapted(how)
    merged = copy.deepcopy(model).merge_and_unload() if how != "none" else copy.deepcopy(model)
    callback = peftx.FisherCallback("per_sample", "train", what="fisher", directions=None, max_samples=None)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3, "learning_rate": 0.0}
    if how == "fast":
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    train(tmp_path, model, callback, **options)
    found, wanted = callback.statistics, collect(merged, samples(), None)
    assert list(found) == list(wanted) and found.samples == 6
    for name, layer in wanted.items():
        for field in ("fisher_in", "fisher_out"):
            mine, theirs = getattr(found[name], field), getattr(layer, field)
            assert theirs.max() > 0 and (mine - theirs).abs().max() < 1e-3 * theirs.max(), name
    small, _ = compress(model, found, keep=0.6)
    assert any(isinstance(module, LowRankExperts) for module in small.modules())
    Statistics.load(tmp_path / "fisher.safetensors").check(mixture("qwen3_moe"))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False], ids=["adapters", "all weights"])
def test_what_is_trained_is_the_same_bit_for_bit(frozen: bool, tmp_path: Path) -> None:
    trained = []
    for callbacks in ((), (peftx.FisherCallback("per_sample", "train", what=("fisher", "abs"), directions=None),)):
        model = adapted("fast") if frozen else mixture("gpt_oss")
        train(tmp_path / str(len(callbacks)), model, *callbacks, learning_rate=0.1)
        trained.append(model.state_dict())
    first, second = trained
    assert all(torch.equal(part, second[name]) for name, part in first.items())


def test_packed_rows_are_their_samples() -> None:
    model = mixture("qwen3_moe")
    texts = [
        torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 5, 7, 4)
    ]

    def packed(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        places = torch.cat([torch.arange(len(row)) for row in rows])
        ids = torch.cat(rows)
        return {
            "input_ids": ids[None],
            "labels": ids.where(places > 0, -100)[None],
            "position_ids": places[None],
        }

    what = ("fisher", "gram")
    wanted = collect(model, texts, packed, what=what, batch_size=1)
    found = collect(model, texts, packed, what=what, batch_size=2)
    for name, layer in wanted.items():
        for field in ("fisher_in", "fisher_out", "gram"):
            mine, theirs = getattr(found[name], field), getattr(layer, field)
            assert (mine - theirs).abs().max() < 1e-5 * theirs.max(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_compressed_mixture_trains_generates_and_compiles(tokens: torch.Tensor, tmp_path: Path) -> None:
    small, _ = compress(mixture("mixtral"), keep=0.6, method="svd")
    assert small.generate(tokens, max_new_tokens=3, do_sample=False).shape == (3, 10)
    before = copy.deepcopy(small.state_dict())
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    train(tmp_path, small, learning_rate=0.1, **options)
    moved = [name for name, part in small.state_dict().items() if not torch.equal(part, before[name])]
    assert "model.layers.0.mlp.experts.factors.gate_up_proj.up" in moved
    assert any(isinstance(module, LowRankLinear) for module in small.modules())
    wanted = logits(small, tokens)
    torch.testing.assert_close(logits(torch.compile(small, backend="eager", fullgraph=True), tokens), wanted)
    torch._dynamo.reset()


def test_adapters_sit_on_factors_of_linear_layers_and_peft_own_lora_on_those_of_stacks(tokens: torch.Tensor) -> None:
    small, _ = compress(mixture("mixtral"), keep=0.6, method="svd")
    wanted = logits(small, tokens)

    def config(kind: Any, name: str) -> Any:
        return kind(target_modules=[], target_parameters=[name])

    with pytest.raises(ValueError, match="no `target_parameters` found"):  # there is no stack any more
        peft.get_peft_model(small, config(peft.LoraConfig, "experts.gate_up_proj"))
    with pytest.raises(TypeError, match="up of a LowRankStack is no parameter of fused experts"):
        peft.get_peft_model(small, config(peftx.ALLoRAConfig, "factors.gate_up_proj.up"))
    small, _ = compress(mixture("mixtral"), keep=0.6, method="svd")
    model = peft.get_peft_model(small, config(peft.LoraConfig, "factors.gate_up_proj.up"))
    assert torch.equal(logits(model, tokens), wanted)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    moved = logits(model, tokens)
    assert (moved - wanted).abs().max() > 1e-3
    with pytest.raises(ValueError, match="merge the adapter first"):
        materialize(model.get_base_model())
    torch.testing.assert_close(logits(materialize(model.merge_and_unload()), tokens), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_command_compresses_a_mixture(tokens: torch.Tensor, tmp_path: Path) -> None:
    mixture("qwen3_moe").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": f"w{i % 60 + 1} w{i * 7 % 60 + 1} w{i % 3 + 60}"}) for i in range(20)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    for out in ("small", "again"):
        outcome = CliRunner().invoke(
            app,
            [
                *("compress", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "lines.jsonl")),
                *("--out", str(tmp_path / out), "--keep", "0.6", "--method", "svd-llm", "--layers"),
                *("--resume", str(tmp_path / "work"), "--recover-epochs", "0.5"),
            ],
            env={"COLUMNS": "200"},
        )
        assert outcome.exit_code == 0, outcome.output
    assert "model.layers.1.mlp.experts.down_proj" in outcome.output and "6 x 16 x 8" in outcome.output
    assert len(list((tmp_path / "work").glob("*.experts.*.safetensors"))) == 4 * 6
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("small", "again"))
    assert torch.equal(logits(first, tokens), logits(second, tokens))
    assert sum(isinstance(module, LowRankExperts) for module in first.modules()) == 2
    assert "4 stacks of experts among them" in (tmp_path / "small" / "README.md").read_text()
