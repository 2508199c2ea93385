"""TriAdaptLoRA: the mathematics against explicit oracles in float64, and growth in loops, files, Trainer and DDP."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MLP, logits, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from processes import join, leave
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from training import adapter_of, assert_equal, losses, trainer

import peftx
from peftx.tuners.triadaptlora import plot_ranks, update_and_grow
from peftx.tuners.triadaptlora.adapter import TriAdaptLoRALayer

INITS = ["identity", "zero_core"]
TARGETS = ["lin0", "lin1"]
TENSORS = ("A", "B", "lower", "upper")
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


def config(**kwargs: Any) -> peftx.TriAdaptLoRAConfig:
    """Grows at every step of 10, in modules at least 8 wide."""
    options = {"init_r": 2, "target_r": 4, "init_warmup": 0, "growth_interval": 1, "growth_size": 1, "total_step": 10}
    return peftx.TriAdaptLoRAConfig(**{"target_modules": TARGETS, **options, **kwargs})


def layers_of(model: nn.Module) -> dict[str, TriAdaptLoRALayer]:
    names = ((name.removeprefix("base_model.model."), module) for name, module in model.named_modules())
    return {name: module for name, module in names if isinstance(module, TriAdaptLoRALayer)}


def shake(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Moves all adapter tensors, active or not, above or below a diagonal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "triadaptlora_" in name:
            parameter.data += (std * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def wrap(model: nn.Module, **kwargs: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, config(**kwargs))


def state(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}


def ranks(model: nn.Module) -> list[int]:
    return [layer.adapters[layer.active_adapters[0]].rank for layer in layers_of(model).values()]


def only(model: nn.Module) -> tuple[TriAdaptLoRALayer, list[torch.Tensor]]:
    """The only layer, and its A, B, L and U."""
    (layer,) = layers_of(model).values()
    return layer, [getattr(layer.adapters["default"], name) for name in TENSORS]


def assembled(L: torch.Tensor, U: torch.Tensor, r: int) -> torch.Tensor:
    """The core of rank r, one arrow-shaped shell after the other: a row of L and a column of U."""
    core = torch.zeros(r, r, dtype=L.dtype)
    for k in range(r):
        for i in range(k + 1):
            core[k, i] += L[k, i]
            core[i, k] += U[i, k]
    return core


def dense(layer: TriAdaptLoRALayer, r: int, scale: float) -> torch.Tensor:
    A, B, L, U = (getattr(layer.adapters["default"], name).detach() for name in TENSORS)
    return scale * torch.einsum("or,rq,qi->oi", B[:, :r], assembled(L, U, r), A[:r])


# Parameterisation


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("r", [1, 2, 4, 6])
def test_the_output_is_that_of_the_shells(init: str, r: int) -> None:
    base = nn.Linear(7, 9).double()
    model = shake(wrap(nn.Sequential(base), target_modules=["0"], init=init, init_r=r, target_r=6, lora_alpha=9))
    layer, _ = only(model)
    assert layer.adapters["default"].rank == r and layer.adapters["default"].size == 7
    delta, x = dense(layer, r, scale=9 / 6), torch.randn(2, 3, 7, dtype=torch.float64)
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(model(x), F.linear(x, base.weight + delta, base.bias))
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    A, B = layer.lora_factors("default")
    assert A.shape == (r, 7) and B.shape == (9, r)
    torch.testing.assert_close(B @ A, delta)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("r", [1, 3, 5])
def test_r_r_plus_1_entries_of_the_core_live(init: str, r: int) -> None:
    model = shake(wrap(nn.Sequential(nn.Linear(7, 9)).double(), target_modules=["0"], init=init, init_r=r, target_r=5))
    _, tensors = only(model)
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer = torch.optim.Adam(tensors, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(20, 7, dtype=torch.float64)).square().sum().backward()
        alive = [tensor.grad != 0 for tensor in tensors]
        row, column = torch.arange(7)[:, None], torch.arange(7)[None]
        assert torch.equal(alive[0], (row < r).expand(7, 7)) and torch.equal(alive[1], (column < r).expand(9, 7))
        assert torch.equal(alive[2], (row < r) & (column <= row))
        assert torch.equal(alive[3], (column < r) & (row <= column))
        optimizer.step()
    assert int(alive[2].sum() + alive[3].sum()) == r * (r + 1)
    for tensor, start, moved in zip(tensors, before, alive, strict=True):
        assert torch.equal(tensor != start, moved)
    assert model.base_model.get_nb_active_parameters() == sum(int(a.sum()) for a in alive) == r * (7 + 9) + r * (r + 1)


def test_active_and_allocated_parameters(mlp: MLP) -> None:
    model = wrap(mlp, init_r=1, target_r=3)
    allocated = [(6, 12, 16), (6, 16, 8)]
    assert model.get_nb_trainable_parameters()[0] == sum(k * (m + n) + 2 * k * k for k, n, m in allocated)
    assert model.base_model.get_nb_active_parameters() == (12 + 16 + 2) + (16 + 8 + 2)
    layers_of(model)["lin0"].adapters["default"].activate(2, step=1, key="")
    assert model.base_model.get_nb_active_parameters("default") == 3 * (12 + 16) + 12 + (16 + 8 + 2)
    with pytest.raises(ValueError, match="no TriAdaptLoRA adapter 'other'; there are: default"):
        model.base_model.get_nb_active_parameters("other")


@pytest.mark.parametrize("init", INITS)
def test_it_starts_as_the_base_and_learns_at_once(init: str, mlp: MLP) -> None:
    x = torch.randn(5, 12)
    wanted = mlp(x)
    model = wrap(mlp, init=init)
    assert torch.equal(model(x), wanted)
    model(x).square().sum().backward()
    for layer in layers_of(model).values():
        grads = [getattr(layer.adapters["default"], name).grad for name in TENSORS]
        assert [bool(grad.any()) for grad in grads] == ([False, True, False, False] if init == INITS[0] else
                                                        [False, False, True, True])  # fmt: skip
    for layer in layers_of(model).values():
        layer.adapters["default"].activate(1, step=1, key="")
    model.zero_grad()
    model(x).square().sum().backward()
    for layer in layers_of(model).values():  # the new shell lives from its first step on
        grads = [getattr(layer.adapters["default"], name).grad for name in TENSORS]
        assert grads[1][:, 2].any() if init == INITS[0] else grads[2][2].any() and grads[3][:, 2].any()


@pytest.mark.parametrize("init", INITS)
def test_b_and_the_core_are_never_both_zero(init: str) -> None:
    model = wrap(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"], init=init, init_r=1, target_r=8)
    layer, (_, B, L, U) = only(model)
    for r in range(1, 9):
        assert layer.adapters["default"].rank == r
        assert B[:, r - 1].any() != (L[r - 1].any() or U[:, r - 1].any())
        layer.adapters["default"].activate(1, step=r, key="")


# Growth of a module


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("count", [1, 3])
def test_growth_changes_no_output(init: str, count: int) -> None:
    model = shake(wrap(nn.Sequential(nn.Linear(8, 8)).double(), target_modules=["0"], init=init))
    layer, _ = only(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    wanted = model(x)
    layer.adapters["default"].activate(count, step=1, key="")
    assert layer.adapters["default"].rank == 2 + count
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-15)


def test_scaling_by_the_current_rank_shrinks_the_delta() -> None:
    base = nn.Linear(8, 8).double()
    model = shake(wrap(nn.Sequential(base), target_modules=["0"], scale_by_current_rank=True, lora_alpha=3))
    layer, _ = only(model)
    torch.testing.assert_close(layer.get_delta_weight("default"), dense(layer, 2, scale=3 / 2))
    before = layer.get_delta_weight("default").clone()
    layer.adapters["default"].activate(3, step=1, key="")
    torch.testing.assert_close(layer.get_delta_weight("default"), before * 2 / 5)


@pytest.mark.parametrize("init", INITS)
def test_a_new_rank_starts_anew_whatever_weight_decay_did(init: str) -> None:
    models = [wrap(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"], init=init) for _ in range(2)]
    for decay, model in zip([0.5, 5.0], models, strict=True):
        layer, tensors = only(model)
        before = [tensor.detach().clone() for tensor in tensors]
        optimizer = torch.optim.AdamW(tensors, lr=0.1, weight_decay=decay)
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        moved = tensors[0][2:] != before[0][2:]
        assert moved.all(), "AdamW decays what takes no gradient"
        parameters = [id(tensor) for tensor in tensors]
        layer.adapters["default"].activate(2, step=3, key="the same")
        assert parameters == [id(getattr(layer.adapters["default"], name)) for name in TENSORS]
        assert layer.adapters["default"].since.tolist() == [0, 0, 3, 3, -1, -1, -1, -1]
    first, second = (only(model)[1] for model in models)
    assert torch.equal(first[0][2:4], second[0][2:4]) and not torch.equal(first[0][2], first[0][3])
    assert 0.01 < first[0][2:4].std() < 0.03 and not torch.equal(first[0][4:], second[0][4:])
    for _, B, L, U in (first, second):
        assert not U[:, 2:4].any()
        if init == "identity":
            assert torch.equal(L[2:4], torch.eye(8)[2:4]) and not B[:, 2:4].any()
        else:
            assert not L[2:4].any() and torch.equal(B[:, 2:4], first[1][:, 2:4]) and 0.01 < B[:, 2:4].std() < 0.03


# Whose turn


def test_the_norm_and_the_score() -> None:
    model = wrap(nn.Sequential(nn.Linear(8, 8)).double(), target_modules=["0"], init_r=3)
    layer, (_, _, L, U) = only(model)
    assert layer.adapters["default"].score(1) == 0.0
    shake(model, std=1.0)
    now = assembled(L.detach(), U.detach(), 3).norm() / 3
    assert layer.adapters["default"].score(2) == pytest.approx(float(now - 3**0.5 / 3), rel=1e-5)
    assert layer.adapters["default"].score(3) == 0.0
    L.data *= 0.5
    U.data *= 0.5
    assert layer.adapters["default"].score(4) == pytest.approx(-float(now) / 2, rel=1e-5)
    assert layer.adapters["default"].scored.item() == 4


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rebaseline", [False, True])
def test_the_module_whose_core_grew_gets_the_ranks(init: str, rebaseline: bool, mlp: MLP) -> None:
    options = {"target_modules": [*TARGETS, "head"], "target_total_rank": 20, "growth": "exponential"}
    model = wrap(mlp, init=init, total_step=1000, rebaseline_after_growth=rebaseline, max_rank=8, **options)
    layers = layers_of(model)

    def inflate(name: str, by: float) -> None:
        layers[name].adapters["default"].lower.data[0, 0] += by

    inflate("lin1", 0.5)
    inflate("head", 0.25)
    assert model.base_model.update_and_grow(1) == ["lin1"]
    for name, layer in layers.items():  # every module has a new reference, and only the last one's depends on the mode
        since_growth = layer.adapters["default"].core_norm() - layer.adapters["default"].norm
        assert bool(since_growth == 0) is (rebaseline or name != "lin1")
    # Nothing has changed since: with the reference from before the growth, r divides the norm of lin1 down.
    assert model.base_model.update_and_grow(2) == ["lin0"]
    inflate("lin1", -0.5)  # the sign counts
    inflate("head", 0.01)
    assert model.base_model.update_and_grow(3) == ["head"]
    assert model.base_model.ranks() == {"lin0": 3, "lin1": 3, "head": 3}


def test_ties_are_broken_by_the_order_of_the_model(mlp: MLP) -> None:
    options = {"target_modules": ["head", "lin1", "lin0"], "growth": "exponential", "total_step": 1000, "max_rank": 8}
    model = wrap(copy.deepcopy(mlp), init="zero_core", **options)
    assert [model.base_model.update_and_grow(step) for step in (1, 2, 3)] == [["lin0"]] * 3
    model = wrap(mlp, **options)  # L = I: a module that has just grown scores low once
    assert [model.base_model.update_and_grow(step) for step in (1, 2, 3)] == [["lin0"], ["lin1"], ["lin0"]]


# How many, and when

QUOTAS = [
    # growth, step, warm-up, total, budget, q
    ("linear", 200, 100, 3000, 504, 17),  # int(504 * 100 / 2900)
    ("linear", 300, 100, 3000, 436, 30),
    ("linear", 1, 0, 3000, 504, 1),
    ("linear", 1500, 0, 3000, 7, 3),
    ("linear", 3000, 0, 3000, 504, 504),
    ("linear", 3000, 100, 3000, 49, 49),
    ("linear", 4000, 100, 3000, 49, 49),
    ("exponential", 1, 0, 10**9, 504, 1),
    ("exponential", 1500, 0, 3000, 504, 22),  # sqrt(504) = 22.4
    ("exponential", 1500, 0, 3000, 49, 7),
    ("exponential", 1000, 0, 3000, 27, 3),
    ("exponential", 3000, 0, 3000, 504, 504),
    ("exponential", 3000, 2999, 3000, 5, 5),
    ("exponential", 2000, 0, 3000, 1, 1),
]


@pytest.mark.parametrize("growth, step, warmup, total, budget, wanted", QUOTAS)
def test_quota(growth: str, step: int, warmup: int, total: int, budget: int, wanted: int) -> None:
    found = config(growth=growth, init_warmup=warmup, total_step=total).quota(step, budget)
    assert found == wanted


@pytest.mark.parametrize("total, warmup, interval", [(3000, 100, 100), (60, 2, 2), (10, 0, 1)])
def test_the_default_schedule_follows_the_length(total: int, warmup: int, interval: int, mlp: MLP) -> None:
    default = peftx.TriAdaptLoRAConfig(total_step=total, target_modules=TARGETS)
    assert (default.warmup, default.interval) == (warmup, interval)
    model = get_peft_model(mlp, default)
    for step in range(1, total + 1):
        assert not model.base_model.update_and_grow(step) or (step > warmup and step % interval == 0)
    assert sum(ranks(model)) == 16


SCHEDULES = [
    # growth, size, modules that grow in the first rounds (DeBERTa-v3-base: 6 matrices in 12 layers), full at step
    ("linear", 4, [17, 30, 32, 25, 15, 5, 1, 1], 900),
    ("exponential", 4, [1, 1, 1, 2, 2, 3, 4, 5], None),
    ("linear", 1, [17, 33], None),
]


@pytest.mark.parametrize("growth, size, wanted, full", SCHEDULES)
def test_schedule_of_72_modules(growth: str, size: int, wanted: list[int], full: int | None) -> None:
    modules = nn.Sequential(*(nn.Linear(8, 8) for _ in range(72)))
    options = {"init_r": 1, "target_r": 8, "max_rank": 64, "init_warmup": 100, "growth_interval": 100}
    model = wrap(modules, target_modules="all-linear", growth=growth, growth_size=size, total_step=3000, **options)
    counts, totals = [], [72]
    for step in range(1, 3001):
        if grown := model.base_model.update_and_grow(step):
            counts.append(len(grown))
            totals.append(sum(ranks(model)))
            last = step
            assert step % 100 == 0 and step > 100
    assert totals == sorted(set(totals))
    assert counts[: len(wanted)] == wanted and totals[-1] == 8 * 72 == max(totals)
    assert last == (full or last) and 800 < last < 2100


@pytest.mark.parametrize("growth", ["linear", "exponential"])
@pytest.mark.parametrize(
    "size, total_rank, max_rank", [(3, 20, 8), (5, 17, 9), (1, 12, 4), (2, 100, 4), (None, None, None)]
)
def test_the_budget_is_kept_and_used(
    growth: str, size: int | None, total_rank: int | None, max_rank: int | None, mlp: MLP
) -> None:
    options = {"growth_size": size, "target_total_rank": total_rank, "max_rank": max_rank, "growth": growth}
    options |= {"init_r": 1, "init_warmup": 4, "growth_interval": 2, "total_step": 60}
    model = wrap(mlp, target_modules=[*TARGETS, "head"], **options)
    budget = min(total_rank or 12, sum(layer.adapters["default"].size for layer in layers_of(model).values()))
    totals, before = [3], ranks(model)
    for step in range(1, 61):
        shake(model, seed=step)
        grown = model.base_model.update_and_grow(step)
        assert not grown or (step > 4 and step % 2 == 0)
        assert [r > old for r, old in zip(ranks(model), before, strict=True)] == [n in grown for n in layers_of(model)]
        before = ranks(model)
        totals.append(sum(before))
        assert all(
            r <= layer.adapters["default"].size for r, layer in zip(before, layers_of(model).values(), strict=True)
        )
    assert totals == sorted(totals) and totals[-1] == budget == max(totals)


def test_nothing_grows_after_growth_end(mlp: MLP) -> None:
    model = wrap(mlp, growth_end=0.5, total_step=10, target_total_rank=16)
    grown = [bool(model.base_model.update_and_grow(step)) for step in range(1, 11)]
    assert grown == [True] * 5 + [False] * 5


def test_twice_at_one_step_is_once(mlp: MLP) -> None:
    model = shake(wrap(mlp, total_step=100, target_total_rank=16))
    assert model.base_model.update_and_grow(3)
    wanted = state(model)
    shake_free = copy.deepcopy(model)
    assert model.base_model.update_and_grow(3) == []
    assert_equal(state(model), wanted)
    assert shake_free.base_model.update_and_grow(4)


def test_twins_take_the_same_decisions(mlp: MLP) -> None:
    twins = [wrap(copy.deepcopy(mlp), growth="exponential") for _ in range(2)]
    global_rng = torch.get_rng_state()
    for step in range(1, 11):
        first, second = (shake(twin, seed=step).base_model.update_and_grow(step) for twin in twins)
        assert first == second
    assert_equal(state(twins[0]), state(twins[1]))
    assert torch.equal(torch.get_rng_state(), global_rng)


def test_only_active_trainable_adapters_grow(mlp: MLP) -> None:
    model = wrap(mlp)
    model.add_adapter("other", config(init_r=1, target_r=3))
    model.add_adapter("idle", config(total_step=None, target_total_rank=9))  # would be an error, were it active
    tuner = model.base_model
    first, second = state(model), state(model, "other")
    assert tuner.update_and_grow(1) and ranks(model) == [3, 2]
    assert_equal(state(model, "other"), second)
    model.set_adapter("other")
    first = state(model)
    assert tuner.update_and_grow(1) and tuner.ranks() == {"lin0": 2, "lin1": 1}  # it has a state of its own
    assert_equal(state(model), first)
    with model.disable_adapter():
        assert tuner.update_and_grow(2) == []
    for layer in layers_of(model).values():
        layer.adapters["default"].A.requires_grad_(True)
    assert_equal(state(model), first)
    tuner.update_and_grow(2)
    assert_equal(state(model), first)  # trainable, but not active
    model.requires_grad_(False)
    assert tuner.update_and_grow(3) == []
    model.set_adapter("default")
    assert tuner.update_and_grow(4)
    assert tuner.ranks("other") == {"lin0": 2, "lin1": 2}


def test_a_module_has_room_up_to_its_smaller_width(mlp: MLP) -> None:
    model = wrap(mlp, target_modules=[*TARGETS, "head"], target_r=7, init_r=5)
    assert {name: layer.adapters["default"].size for name, layer in layers_of(model).items()} == {
        "lin0": 12,
        "lin1": 8,
        "head": 5,
    }
    for step in range(1, 11):
        model.base_model.update_and_grow(step)
    assert sum(ranks(model)) == 21 and ranks(model)[2] == 5


# Configs and errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_r": 9}, "init_r=9 is larger than target_r=8"),
        ({"max_rank": 7}, "max_rank=7 is smaller than target_r=8"),
        ({"init_r": 0}, "`init_r` must be positive, got 0"),
        ({"target_r": -1}, "`target_r` must be positive, got -1"),
        ({"growth_interval": 0}, "`growth_interval` must be positive"),
        ({"growth_size": 0}, "`growth_size` must be positive"),
        ({"total_step": 0}, "`total_step` must be positive"),
        ({"target_total_rank": 0}, "`target_total_rank` must be positive"),
        ({"lora_alpha": 0}, "`lora_alpha` must not be zero"),
        ({"init_warmup": -1}, "`init_warmup` must not be negative"),
        (
            {"init_warmup": 100, "total_step": 100},
            "init_warmup=100 leaves none of the total_step=100 optimizer steps for growth",
        ),
        ({"growth_end": 0.0}, r"`growth_end` must be in \(0, 1\]"),
        ({"growth_end": 1.5}, r"`growth_end` must be in \(0, 1\]"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must be in \[0, 1\)"),
        ({"rank_pattern": {"lin0": 0}}, "`rank_pattern` must be positive, got {'lin0': 0}"),
    ],
)
def test_wrong_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peftx.TriAdaptLoRAConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"growth": "cubic"}, {"init": "zeros"}, {"init_r": 1.0}, {"total_step": "100"}, {"rank_pattern": {"a": "b"}}],
)
def test_wrong_types_are_named(options: dict) -> None:
    with pytest.raises(TypeError, match=f"`{next(iter(options))}` must be of type"):
        peftx.TriAdaptLoRAConfig(**options)


def test_a_driver_must_say_how_long_and_when(mlp: MLP) -> None:
    model = wrap(mlp, total_step=None)
    before = state(model)
    with pytest.raises(ValueError, match="'default' does not know how long.*`total_step`.*TriAdaptCallback"):
        model.base_model.update_and_grow(1)
    for step in (0, -1, 1.5):
        with pytest.raises(ValueError, match="counts the optimizer steps from 1"):
            model.base_model.update_and_grow(step)
    assert_equal(state(model), before)


def test_a_merged_adapter_does_not_grow(mlp: MLP) -> None:
    model = shake(wrap(mlp.double()))
    x = torch.randn(3, 12, dtype=torch.float64)
    wanted, before = model(x), state(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(RuntimeError, match="lin0: an adapter is merged.*unmerge_adapter"):
        model.base_model.update_and_grow(1)
    assert_equal(state(model), before)
    model.unmerge_adapter()
    assert model.base_model.update_and_grow(1)
    torch.testing.assert_close(model(x), wanted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), wanted)


def test_sharded_parameters_are_refused(mlp: MLP) -> None:
    model = wrap(mlp)
    factor = layers_of(model)["lin0"].adapters["default"].A
    factor.data = factor.data.flatten()[:10]  # as FSDP shows it outside of a forward pass
    with pytest.raises(RuntimeError, match="sharded parameters cannot grow"):
        model.base_model.update_and_grow(1)
    assert ranks(model) == [2, 2]


def test_a_rank_of_its_own_stays(mlp: MLP, tmp_path: Path) -> None:
    model = wrap(mlp, target_modules=[*TARGETS, "head"], rank_pattern={"lin1": 3, "head": 1})
    assert [layer.adapters["default"].size for layer in layers_of(model).values()] == [8, 3, 1]
    grown = {name for step in range(1, 11) for name in model.base_model.update_and_grow(step)}
    assert grown == {"lin0"} and ranks(model) == [8, 3, 1]
    model.save_pretrained(tmp_path)
    assert ranks(PeftModel.from_pretrained(MLP(), tmp_path)) == [8, 3, 1]


@pytest.mark.parametrize(
    "options, patience",
    [({"total_step": None}, 100), ({"total_step": 999, "init_warmup": 90, "growth_interval": 30}, 120)],
)
def test_nothing_drives_it_and_it_says_so_once(options: dict, patience: int, mlp: MLP) -> None:
    model = wrap(mlp, **options).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(X)
        with torch.no_grad():
            model.train()(X)
        for _ in range(patience):
            model(X)
    with pytest.warns(UserWarning, match=r"'default' do not grow.*TriAdaptCallback.*update_and_grow\(step\)") as caught:
        model(X)
        for _ in range(patience + 1):
            model(X)
    assert len(caught) == 1 and ranks(model) == [2, 2]


def test_who_drives_it_hears_nothing(mlp: MLP) -> None:
    driven = wrap(copy.deepcopy(mlp)).train()
    full = wrap(mlp, init_r=4, target_r=4, max_rank=4).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (driven, full):
            model(X)
            if model is driven:
                model.base_model.update_and_grow(1)
            for _ in range(102):
                model(X)


# Files


@pytest.fixture
def grown(mlp: MLP) -> PeftModel:
    """Grown to ranks 4 and 3 in five steps, with weights that moved in between; its base is `base()`."""
    model = wrap(mlp, growth="exponential", total_step=40, target_total_rank=10)
    for step in range(1, 6):
        shake(model, seed=step)
        layers_of(model)["lin0"].adapters["default"].lower.data[0, 0] += 0.5 * (step % 3 != 0)
        model.base_model.update_and_grow(step)
    assert sorted(ranks(model)) == [4, 5]
    return model.eval()


def base() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_goes_on_as_the_saved_one(grown: PeftModel, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    grown.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "renamed", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    wanted = grown(X)
    for name in ("default", "renamed"):
        twin = copy.deepcopy(grown)
        loaded.set_adapter(name)
        assert ranks(loaded) == ranks(twin) and torch.equal(loaded(X), wanted)
        assert_equal(state(loaded, name), state(twin))
        assert loaded.base_model.rank_history(name)[1:] == [
            {**entry, "adapter": name} for entry in twin.base_model.rank_history()[1:]
        ]
        assert loaded.base_model.update_and_grow(5) == []  # it was done before the adapter was saved
        for step in (6, 7):
            layers_of(twin)["lin1"].adapters["default"].upper.data[0, 1] += step
            layers_of(loaded)["lin1"].adapters[name].upper.data[0, 1] += step
            decision = twin.base_model.update_and_grow(step)
            assert loaded.base_model.update_and_grow(step) == decision and len(decision) == (step == 6)
        assert_equal(state(loaded, name), state(twin))


def test_a_later_load_into_an_adapter_sets_its_ranks(grown: PeftModel, tmp_path: Path) -> None:
    grown.save_pretrained(tmp_path)
    wanted = grown(X)
    model = wrap(base()).eval()
    model.load_adapter(tmp_path, "default")  # as Trainer resumes, and loads the best model
    assert ranks(model) == ranks(grown) and torch.equal(model(X), wanted)
    full = wrap(base()).eval()
    full.load_state_dict(grown.state_dict())
    assert ranks(full) == ranks(grown) and torch.equal(full(X), wanted)


def test_transformers_own_loading_sets_the_ranks(tokens: torch.Tensor, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "total_step": 30}
    model = tiny_model("llama")
    model.add_adapter(config(**options), adapter_name="mine")
    model.train()
    grown = []
    for step in range(1, 6):
        shake(model, seed=step)
        grown += update_and_grow(model, step)
    assert len(grown) > 4 and set(grown) <= set(layers_of(model))
    wanted = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path)
    for name in ("mine", "other"):
        loaded = tiny_model("llama")
        loaded.load_adapter(tmp_path, adapter_name=name)
        assert ranks(loaded) == ranks(model) and torch.equal(logits(loaded.eval(), tokens), wanted)
    peft_model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert ranks(peft_model) == ranks(model) and torch.equal(logits(peft_model.eval(), tokens), wanted)


def test_finalize_keeps_outputs_and_history_and_shrinks_the_file(grown: PeftModel, tmp_path: Path) -> None:
    wanted, history, kept = grown(X), grown.base_model.rank_history(), ranks(grown)
    active = grown.base_model.get_nb_active_parameters()
    grown.save_pretrained(tmp_path / "padded")
    grown.base_model.finalize()
    torch.testing.assert_close(grown(X), wanted, rtol=0, atol=1e-6)
    assert ranks(grown) == kept == [layer.adapters["default"].size for layer in layers_of(grown).values()]
    grown.save_pretrained(tmp_path / "small")
    sizes = {kind: (tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("padded", "small")}
    assert sizes["small"] < 0.7 * sizes["padded"]

    loaded = PeftModel.from_pretrained(base(), tmp_path / "small", is_trainable=True)
    assert loaded.peft_config["default"].rank_pattern == dict(zip(["^lin0", "^lin1"], kept, strict=True))
    assert torch.equal(loaded(X), grown(X)) and loaded.base_model.rank_history() == history
    squares = sum(r * (r - 1) for r in kept)  # the half of each triangle's square that is stored and not used
    assert loaded.get_nb_trainable_parameters()[0] == active + squares
    assert loaded.base_model.update_and_grow(20) == []
    loaded.load_adapter(tmp_path / "padded", "padded")
    loaded.set_adapter("padded")
    torch.testing.assert_close(loaded(X), wanted)


def test_names_in_the_pattern_are_whole_names() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0, self.inner = nn.Linear(8, 8), MLP()

    model = wrap(Outer(), target_modules=["lin0"])
    layers_of(model)["inner.lin0"].adapters["default"].activate(2, step=1, key="")
    model.base_model.finalize()
    again = get_peft_model(Outer(), model.peft_config["default"])
    assert again.base_model.ranks() == {"lin0": 2, "inner.lin0": 4}


def test_files_of_another_allocation_fit(grown: PeftModel, tmp_path: Path) -> None:
    wanted = grown(X)
    padded = state(grown)
    twin = copy.deepcopy(grown)
    twin.base_model.finalize()
    for tensors in (padded, state(twin)):
        for max_rank in (5, 12):
            model = wrap(base(), max_rank=max_rank).eval()
            set_peft_model_state_dict(model, tensors)
            assert ranks(model) == ranks(grown) and {m.adapters["default"].size for m in layers_of(model).values()} == {
                max_rank
            }
            torch.testing.assert_close(model(X), wanted)
            assert model.base_model.rank_history() == grown.base_model.rank_history()
            for step in range(6, 11):  # the room that was padded can be used
                model.base_model.update_and_grow(step)
            torch.testing.assert_close(model(X), wanted)
    model = wrap(base(), max_rank=4)
    before = state(model)
    with pytest.raises(ValueError, match=r"lin0\.triadaptlora_adapter\.A: found shape \(8, 12\), expected \(4, 12\)"):
        set_peft_model_state_dict(model, padded)
    assert_equal(state(model), before)


@pytest.mark.parametrize("values", [[-1] * 8, [0, -1, 3, -1, -1, -1, -1, -1]])
def test_a_file_with_impossible_ranks_is_refused(grown: PeftModel, values: list[int]) -> None:
    tensors = state(grown)
    key = next(key for key in tensors if key.endswith("lin0.triadaptlora_adapter.since"))
    tensors[key] = torch.tensor(values)
    model = wrap(base())
    before = state(model)
    with pytest.raises(ValueError, match="lin0: since: found .*, expected active ranks before inactive"):
        set_peft_model_state_dict(model, tensors)
    assert_equal(state(model), before)


def test_stock_lora_with_the_same_ranks_computes_the_same(grown: PeftModel) -> None:
    grown.double()
    layers = layers_of(grown)
    patterns = {"rank_pattern": grown.base_model.ranks(), "alpha_pattern": grown.base_model.ranks()}
    lora = get_peft_model(base().double(), LoraConfig(r=1, lora_alpha=1, target_modules=TARGETS, **patterns))
    factors = {name: layer.lora_factors("default") for name, layer in layers.items()}
    tensors = {
        f"base_model.model.{name}.lora_{which}.weight": factor
        for name, pair in factors.items()
        for which, factor in zip("AB", pair, strict=True)
    }
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(lora.eval()(X.double()), grown(X.double()))
    assert not torch.allclose(base()(X), grown(X.double()).float(), atol=1e-3)


# Training


def train(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer, skip: tuple[int, ...] = ()) -> None:
    for step in steps:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        if step not in skip:
            optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_grow(step)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("init", INITS)
def test_a_resumed_loop_equals_the_uninterrupted_one(init: str, tmp_path: Path) -> None:
    whole = wrap(base(), init=init, growth="exponential", total_step=20, target_total_rank=12).train()
    optimizer = adamw(whole)
    train(whole, range(1, 6), optimizer)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    middle = ranks(whole)
    train(whole, range(6, 11), optimizer)

    resumed = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    assert ranks(resumed) == middle
    optimizer = adamw(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, range(6, 11), optimizer)
    assert 4 < sum(middle) < sum(ranks(resumed)) == 12
    assert_equal(state(resumed), state(whole))


def test_a_skipped_step_is_harmless() -> None:
    # GradScaler skips the optimizer after an overflow; the Trainer counts the step all the same.
    model = wrap(base(), growth="exponential").train()
    train(model, range(1, 11), adamw(model), skip=(1, 2, 6))
    assert sum(ranks(model)) == 8 and all(p.isfinite().all() for p in model.parameters())


def test_a_compiled_model_sees_the_growth(mlp: MLP) -> None:
    torch._dynamo.reset()
    model = shake(wrap(mlp, init="zero_core"))
    run = torch.compile(model, fullgraph=True, backend="eager")
    for step in (1, 2, 3):
        torch.testing.assert_close(run(X), model(X))
        assert model.base_model.update_and_grow(step)
        shake(model, seed=step)
    torch.testing.assert_close(run(X), model(X))
    torch._dynamo.reset()


@pytest.fixture
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def growing_trainer(folder: Path, callbacks: int = 1, max_steps: int = 6, **arguments: Any):
    options = {
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
        "total_step": None,
        "growth": "exponential",
    }
    options |= arguments.pop("config", {})
    run = trainer(config(**options), folder, max_steps=max_steps, save_steps=3, **arguments)
    for _ in range(callbacks):
        run.add_callback(peftx.TriAdaptCallback())
    return run


def logged(run: Any) -> list[dict]:
    return [entry for entry in run.state.log_history if "triadaptlora_ranks" in entry]


def test_trainer_grows_and_a_resumed_run_is_bit_equal(quiet: None, tmp_path: Path) -> None:
    whole = growing_trainer(tmp_path, config={"lora_dropout": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole.train()
    tuner = whole.model.base_model
    assert whole.model.peft_config["default"].total_step is None
    history = tuner.rank_history()
    assert [{k: v for k, v in entry.items() if k != "epoch"} for entry in logged(whole)] == history
    assert history[0]["step"] == 0 and set(history[0]["triadaptlora_ranks"].values()) == {2}
    steps = [entry["step"] for entry in history]
    assert min(steps[1:]) <= 3 < max(steps) and sum(tuner.ranks().values()) == 16

    checkpoint = tmp_path / "checkpoint-3"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    in_file = {k: int((v >= 0).sum()) for k, v in saved.items() if k.endswith("since")}
    at_three = [entry for entry in history if entry["step"] <= 3][-1]["triadaptlora_ranks"]
    assert list(in_file.values()) == list(at_three.values())  # saved after the growth of that step

    resumed = growing_trainer(tmp_path, config={"lora_dropout": 0.1})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(adapter_of(resumed), adapter_of(whole))
    assert_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert losses(resumed) == losses(whole) and logged(resumed) == logged(whole)


def test_gradient_accumulation_counts_optimizer_steps(quiet: None, tmp_path: Path) -> None:
    run = growing_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, save_strategy="no")
    run.train()
    assert run.state.global_step == 6 and sum(run.model.base_model.ranks().values()) == 16
    plain = growing_trainer(tmp_path, save_strategy="no")
    plain.train()
    assert [entry["step"] for entry in logged(plain)] == [entry["step"] for entry in logged(run)]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient checkpointing
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["bf16", "reentrant", "non-reentrant"])
def test_growth_under_bf16_and_checkpointing(quiet: None, tmp_path: Path, reentrant: bool | None) -> None:
    plain = growing_trainer(tmp_path, save_strategy="no")
    plain.train()
    options: dict = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = growing_trainer(tmp_path, save_strategy="no", **({"bf16": True} if reentrant is None else options))
    run.train()
    assert losses(run) == pytest.approx(losses(plain), rel=3e-2 if reentrant is None else 1e-5)
    if reentrant is None:
        assert sum(run.model.base_model.ranks().values()) == 16
    else:
        assert logged(run) == logged(plain)
        torch.testing.assert_close(adapter_of(run), adapter_of(plain))


def test_the_best_model_has_its_ranks(quiet: None, tmp_path: Path) -> None:
    scores = iter([3.0, 1.0])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 3}
    run = growing_trainer(tmp_path, compute_metrics=lambda prediction: {"score": next(scores)}, **best)
    run.train()
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert ranks(run.model) == [int((v >= 0).sum()) for k, v in saved.items() if k.endswith("since")]
    assert sum(ranks(run.model)) < 16


def test_a_bare_transformers_model_grows_in_the_trainer(quiet: None, tmp_path: Path) -> None:
    run = growing_trainer(tmp_path, save_strategy="no")
    run.model = run.model_wrapped = tiny_model("bert")
    run.model.add_adapter(config(target_modules=["query", "value"], total_step=None))
    run.train()
    assert sum(ranks(run.model)) == 16 and logged(run)[-1]["triadaptlora_ranks"].keys() == layers_of(run.model).keys()


def test_the_callback_s_errors(quiet: None, tmp_path: Path) -> None:
    run = growing_trainer(tmp_path, save_strategy="no", config={"init_warmup": 6})
    with pytest.raises(ValueError, match="init_warmup=6 leaves none of the total_step=6"):
        run.train()
    assert run.model.peft_config["default"].total_step is None
    run = trainer(LoraConfig(target_modules=["query"]), tmp_path)
    run.add_callback(peftx.TriAdaptCallback())
    with pytest.raises(ValueError, match="the model trains no TriAdaptLoRA adapter"):
        run.train()
    run = growing_trainer(tmp_path, save_strategy="no", max_steps=2, config={"total_step": 6})
    with pytest.warns(UserWarning, match="planned for total_step=6, but this training has 2 optimizer steps"):
        run.train()


# Two processes

DDP_STEPS = 6


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    torch.manual_seed(rank)  # the first process's adapter counts
    model = get_peft_model(base(), config(growth="exponential", total_step=DDP_STEPS))
    shake(model, seed=rank)
    if rank:
        layers_of(model)["lin1"].adapters["default"].activate(1, step=0, key="")  # its ranks, too
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer, grown = adamw(model), []
    for step in range(1, DDP_STEPS + 1):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + rank))
        F.cross_entropy(parallel(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        grown.append(model.base_model.update_and_grow(step))
    torch.save({"grown": grown, "state": state(model), "ranks": ranks(model)}, folder / str(rank))
    leave()


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first["grown"] == second["grown"] and first["ranks"] == second["ranks"]
    assert sum(first["ranks"]) == 8 and any(first["grown"])
    assert_equal(first["state"], second["state"])


# A picture


def test_ranks_are_plotted(grown: PeftModel, tmp_path: Path) -> None:
    history = grown.base_model.rank_history()
    assert [entry["step"] for entry in history] == [0, 1, 2, 3, 4, 5]
    assert [sum(entry["triadaptlora_ranks"].values()) for entry in history] == [4, 5, 6, 7, 8, 9]
    assert history[-1]["triadaptlora_ranks"] == grown.base_model.ranks()
    plot_ranks([{"loss": 1.0, "step": 9}, *history], tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    plot_ranks(history[:1], tmp_path / "start.png", adapter_name="default")
    with pytest.raises(ValueError, match=r"no ranks.*rank_history\(\)"):
        plot_ranks([{"loss": 1.0, "step": 9}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def _trainer_for(tmp_path, model, steps):
    rows = [{"input_ids": (ids := torch.arange(1, 7)), "labels": ids} for _ in range(8)]
    settings = {"max_steps": steps, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), **settings)
    return transformers.Trainer(model, args, train_dataset=rows, callbacks=[peftx.TriAdaptCallback()])


def test_a_second_training_is_planned_anew_and_frozen_adapters_are_not_asked(tmp_path):
    config = peftx.TriAdaptLoRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config)
    frozen = peftx.TriAdaptLoRAConfig(
        target_modules=["v_proj"], init_warmup=50, total_step=99, task_type="CAUSAL_LM", inference_mode=True
    )
    model.add_adapter("frozen", frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for steps in (3, 9):
            _trainer_for(tmp_path, model, steps).train()
            assert model.peft_config["default"].total_step is None


def test_a_wrapped_model_grows_too():
    config = peftx.TriAdaptLoRAConfig(target_modules=["q_proj"], total_step=4, init_warmup=0, growth_interval=1)
    model = get_peft_model(tiny_model("llama"), config)
    wrapped = nn.DataParallel(model)
    assert update_and_grow(wrapped, 2)


def test_an_untouched_core_scores_zero_in_bf16_too():
    config = peftx.TriAdaptLoRAConfig(target_modules=["q_proj"], init_r=3, total_step=4, init_warmup=0)
    model = get_peft_model(tiny_model("llama"), config).bfloat16()
    (layer, *_) = (m for m in model.modules() if isinstance(m, TriAdaptLoRALayer))
    assert layer.adapters["default"].score(1) == 0


def orthogonality(model: nn.Module, weight: float) -> torch.Tensor:
    """The penalty from its formula, with the active ranks."""
    parts = []
    for layer in layers_of(model).values():
        adapter = layer.adapters["default"]
        r = adapter.rank
        A, B = adapter.A[:r], adapter.B[:, :r]
        eye = torch.eye(r, dtype=A.dtype)
        parts += [((A @ A.T - eye) ** 2).sum().sqrt(), ((B.T @ B - eye) ** 2).sum().sqrt()]
    return weight * torch.stack(parts).sum() / len(parts)


def test_the_penalty_is_the_mean_over_the_factors_at_their_active_ranks():
    model = shake(get_peft_model(MLP().double(), config(orth_reg_weight=0.5)).double())
    expected = orthogonality(model, 0.5)
    torch.testing.assert_close(model.base_model.orthogonality_loss(), expected)
    assert not get_peft_model(MLP(), config()).base_model.orthogonality_loss().requires_grad


def test_the_callback_adds_the_gradient_of_the_penalty_to_what_is_there():
    model = shake(get_peft_model(MLP().double(), config(orth_reg_weight=0.5)).double())
    model(X.double()).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad.clone() for p in trained]
    peftx.TriAdaptCallback().on_pre_optimizer_step(None, None, None, model=model)
    expected = torch.autograd.grad(orthogonality(model, 0.5), trained, allow_unused=True)
    for parameter, old, gradient in zip(trained, before, expected, strict=True):
        torch.testing.assert_close(parameter.grad, old if gradient is None else old + gradient)
    assert any(g is not None and g.any() for g in expected)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_the_weight_of_the_penalty_is_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="orth_reg_weight"):
        config(orth_reg_weight=weight)
