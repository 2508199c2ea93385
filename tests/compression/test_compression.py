"""The closed forms against numerical optima, and what `compress` does with a model."""

import copy
import logging

import numpy as np
import peft
import pytest
import torch
from conftest import logits, tiny_model
from torch import nn

import peftx
from peftx.compression import METHODS, LowRankLinear, compress, factorize, rank_for
from peftx.compression.compress import count
from peftx.compression.decompose import randomized_svd
from peftx.compression.factorize import scale_for, weighting_for
from peftx.compression.layers import signature, target_layers
from peftx.compression.linear import shape_of
from peftx.compression.ranks import allocate, saves
from peftx.compression.statistics import LayerStatistics, Statistics

f64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def statistics_of(model: nn.Module, seed: int = 0, layers: dict | None = None, **changes) -> Statistics:
    """Random importances that are far from uniform, for every layer that could be asked for."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in (layers or target_layers(model)).items():
        out, into = shape_of(layer)
        x = torch.randn(2 * into, into, dtype=f64, generator=generator) * torch.linspace(0.1, 3, into, dtype=f64)
        parts = {
            "fisher_in": torch.rand(into, dtype=f64, generator=generator).pow(4),
            "fisher_out": torch.rand(out, dtype=f64, generator=generator).pow(4),
            "abs_mean": x.abs().mean(0),
            "gram": x.T @ x / len(x),
        }
        made[name] = LayerStatistics(shape=(out, into), signature=signature(layer), **(parts | changes))
    return Statistics(made, samples=8, tokens=64, estimator="per_sample", model="a test")


# --- the closed form -------------------------------------------------------------------------------------------------


def best_by_search(weight: torch.Tensor, rank: int, left: torch.Tensor, right: torch.Tensor) -> float:
    """min ||L (W - U V) R||_F^2 over U and V, found by LBFGS from random starts."""
    found = []
    for seed in range(3):
        up = draw(weight.shape[0], rank, seed=seed).requires_grad_()
        down = draw(rank, weight.shape[1], seed=seed + 10).requires_grad_()
        search = torch.optim.LBFGS(
            [up, down], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def objective(up=up, down=down, search=search):
            search.zero_grad()
            loss = (left @ (weight - up @ down) @ right).square().sum()
            loss.backward()
            return loss

        search.step(objective)
        found.append(objective().item())
    return min(found)


WEIGHTINGS = ["none", "in", "out", "both", "gram"]


def example(which: str):
    """A weight, the arguments of `factorize`, and dense L and R by their definition."""
    weight, x = draw(9, 7), draw(50, 7, seed=1) * torch.linspace(0.2, 3, 7, dtype=f64)
    into, out = draw(7, seed=2).square(), draw(9, seed=3).square()
    left, right = torch.eye(9, dtype=f64), torch.eye(7, dtype=f64)
    arguments = {}
    if which in ("in", "both"):
        arguments["importance_in"], right = into, torch.diag(into.sqrt())
    if which in ("out", "both"):
        arguments["importance_out"], left = out, torch.diag(out.sqrt())
    if which == "gram":
        arguments["gram"], right = x.T @ x, x.T  # ||(W - U V) X^T||
    return weight, arguments, left, right


@pytest.mark.parametrize("which", WEIGHTINGS)
def test_closed_form_is_the_optimum_of_its_objective(which):
    weight, arguments, left, right = example(which)
    found = factorize(weight, 3, **arguments)
    value = (left @ (weight - found.up @ found.down) @ right).square().sum()
    wanted = best_by_search(weight, 3, left, right)
    assert float(value) == pytest.approx(wanted, rel=1e-5)  # the Gram matrix is damped by 1e-6
    whole = (left @ weight @ right).square().sum()
    assert found.error == pytest.approx(float((value / whole).sqrt()), rel=1e-4)
    assert (found.up.shape, found.down.shape) == ((9, 3), (3, 7))
    plain = factorize(weight, 3)
    if which != "none":  # and plain SVD is not: the test can tell them apart
        assert (left @ (weight - plain.up @ plain.down) @ right).square().sum() > value * 1.05


def test_uniform_importance_is_plain_svd_and_scale_does_not_matter():
    weight = draw(9, 7)
    p, s, q = np.linalg.svd(weight.numpy())
    plain = (p[:, :4] * s[:4]) @ q[:4]
    for arguments in ({}, {"importance_in": torch.full((7,), 3.7)}, {"importance_out": torch.ones(9)}):
        found = factorize(weight, 4, **arguments)
        np.testing.assert_allclose((found.up @ found.down).numpy(), plain, atol=1e-12)
    gram = factorize(weight, 4, gram=torch.eye(7) * 12)
    np.testing.assert_allclose((gram.up @ gram.down).numpy(), plain, atol=1e-5)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))  # S^(1/2) on both sides
    for which in ("in", "out", "both", "gram"):
        weight, arguments, *_ = example(which)
        one = factorize(weight, 3, **arguments)
        other = factorize(weight, 3, **{name: 1e-9 * value for name, value in arguments.items()})
        torch.testing.assert_close(one.up @ one.down, other.up @ other.down, rtol=1e-8, atol=1e-8)


def test_full_rank_is_exact_and_dtype_is_the_weights():
    weight, arguments, *_ = example("gram")
    found = factorize(weight, 7, **arguments)
    torch.testing.assert_close(found.up @ found.down, weight)
    assert found.error < 1e-7
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = factorize(weight.to(dtype), 7, **arguments)
        assert low.up.dtype == low.down.dtype == dtype
        torch.testing.assert_close(
            low.up.double() @ low.down.double(), weight, rtol=0, atol=30 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("which", WEIGHTINGS)
def test_factors_of_a_lower_rank_lead_those_of_a_higher_one(which):
    weight, arguments, *_ = example(which)
    high, low = factorize(weight, 6, **arguments), factorize(weight, 2, **arguments)
    torch.testing.assert_close(high.up[:, :2], low.up)
    torch.testing.assert_close(high.down[:2], low.down)


def test_inputs_that_never_occur_are_no_obstacle():
    weight = draw(9, 7)
    importance = torch.tensor([0, 0, 1, 2, 0, 3, 1.0])
    found = factorize(weight, 4, importance_in=importance)
    assert found.up.isfinite().all() and found.down.isfinite().all()
    torch.testing.assert_close((found.up @ found.down)[:, importance > 0], weight[:, importance > 0], rtol=0, atol=1e-3)
    x = draw(3, 7, seed=4)  # fewer tokens than inputs
    found = factorize(weight, 3, gram=x.T @ x)
    torch.testing.assert_close((found.up @ found.down) @ x.T, weight @ x.T, rtol=0, atol=1e-2)
    assert found.error < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance_in": torch.zeros(7)}, "all zero"),
        ({"importance_in": torch.tensor([1, 2, 3, 4, 5, 6, float("nan")])}, "NaN or infinity"),
        ({"importance_in": torch.tensor([1, 2, 3, 4, 5, 6, -1.0])}, "negative"),
        ({"importance_in": torch.ones(6)}, "6 importances for 7 inputs"),
        ({"importance_out": torch.full((9,), float("inf"))}, "outputs have NaN or infinity"),
        ({"gram": torch.zeros(7, 7)}, "all zero"),
        ({"gram": torch.full((7, 7), float("nan"))}, "NaN or infinity"),
        ({"gram": torch.eye(6)}, "Gram matrix of shape"),
        ({"gram": torch.eye(7) - 2 * torch.ones(7, 7) + 4 * torch.eye(7)}, "semi-definite"),
    ],
)
def test_unusable_importances_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorize(draw(9, 7), 3, **arguments)


def test_a_broken_weight_and_an_impossible_rank_are_refused():
    weight = draw(9, 7)
    for rank in (0, 8):
        with pytest.raises(ValueError, match="rank"):
            factorize(weight, rank)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        factorize(weight, 3)


def test_asvd_and_both_are_what_their_papers_write():
    parts = {"fisher_in": draw(7, seed=5).square(), "fisher_out": draw(9, seed=6).square()}
    known = LayerStatistics(abs_mean=draw(7, seed=7).abs(), gram=None, shape=(9, 7), signature=torch.zeros(63), **parts)
    asvd = weighting_for("asvd", known, (9, 7), alpha=0.5)
    wanted = known.abs_mean**0.5
    torch.testing.assert_close(asvd.right / asvd.right[0], wanted / wanted[0])
    for side in ("in", "out", "both"):
        found = weighting_for("fwsvd", known, (9, 7), side=side)
        assert (found.left is None) == (side == "in") and (found.right is None) == (side == "out")
        # The scale makes the squared weighted error of a unit change the mean squared gradient.
        ones = found.apply(torch.ones(9, 7, dtype=f64)).square().mean() * scale_for("fwsvd", known, (9, 7), side=side)
        total = known.fisher_out.sum() if side == "out" else known.fisher_in.sum()
        assert float(ones) == pytest.approx(float(total) / 63)
    with pytest.raises(ValueError, match="no gram was collected, which svd-llm needs"):
        weighting_for("svd-llm", known, (9, 7))


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_rule():
    assert rank_for(0.5, 1536, 384) == 153 and rank_for(0.5, 384, 1536) == 153
    assert rank_for(0.5, 384, 384) == 96
    assert rank_for(0.01, 4, 4) == 1
    assert saves(307, 384, 1536) and not saves(308, 384, 1536)
    assert saves(191, 384, 384) and not saves(192, 384, 384)
    assert not saves(rank_for(0.9, 1, 50), 1, 50)
    for keep in (0.1, 0.3, 0.7, 0.9):  # never more than asked for
        assert rank_for(keep, 100, 300) * 400 <= keep * 30_000


def kept_worth(spectra, ranks):
    return sum(float(s.sum() if ranks[name] is None else s[: ranks[name]].sum()) for name, s in spectra.items())


def test_global_allocation_spends_its_budget_better_than_uniform():
    shapes = {"a": (24, 20), "b": (30, 10), "c": (16, 16), "d": (40, 8)}
    matrices = {
        name: draw(*shape, seed=i) @ torch.diag(torch.linspace(1, 0, shape[1], dtype=f64) ** i) * 3**-i
        for i, (name, shape) in enumerate(shapes.items())
    }
    spectra = {name: torch.linalg.svdvals(m).square() for name, m in matrices.items()}
    for keep in (0.3, 0.5, 0.8):
        uniform = {name: rank_for(keep, *shape) for name, shape in shapes.items()}
        budget = sum(rank * sum(shapes[name]) for name, rank in uniform.items())
        ranks = allocate(spectra, shapes, budget)
        cost = {n: shapes[n][0] * shapes[n][1] if r is None else r * sum(shapes[n]) for n, r in ranks.items()}
        assert sum(cost.values()) <= budget
        open_ended = [n for n, r in ranks.items() if r is not None and saves(r + 1, *shapes[n])]
        assert budget - sum(cost.values()) < min(sum(shapes[n]) for n in open_ended)  # nothing more fits
        assert kept_worth(spectra, ranks) > kept_worth(spectra, uniform)
        assert all(rank is None or rank >= 1 for rank in ranks.values())
        assert all(rank is None or saves(rank, *shapes[name]) for name, rank in ranks.items())


def test_global_allocation_is_the_optimum_of_a_small_case():
    shapes = {"a": (4, 6), "b": (5, 5), "c": (3, 8)}
    spectra = {name: torch.linalg.svdvals(draw(*s, seed=i)).square() for i, (name, s) in enumerate(shapes.items())}
    options = {n: [None, *(r for r in range(1, 9) if saves(r, *s))] for n, s in shapes.items()}
    price = lambda n, r: shapes[n][0] * shapes[n][1] if r is None else r * sum(shapes[n])
    budget = 2 * 10 + 1 * 10 + 11
    best = 0.0
    for a in options["a"]:
        for b in options["b"]:
            for c in options["c"]:
                ranks = {"a": a, "b": b, "c": c}
                if sum(price(n, r) for n, r in ranks.items()) <= budget:
                    best = max(best, kept_worth(spectra, ranks))
    found = allocate(spectra, shapes, budget)
    assert kept_worth(spectra, found) >= 0.9 * best
    with pytest.raises(ValueError, match="do not pay for rank 1"):
        allocate(spectra, shapes, 20)


def test_global_allocation_leaves_a_layer_dense_where_that_is_the_better_bargain():
    flat, steep = torch.ones(8, dtype=f64), torch.tensor([9.0, 1e-3, 1e-4, 0, 0, 0, 0, 0], dtype=f64)
    shapes = {"flat": (8, 8), "steep": (8, 8)}
    assert allocate({"flat": flat, "steep": steep}, shapes, 64 + 16) == {"flat": None, "steep": 1}


# --- randomised ------------------------------------------------------------------------------------------------------


def test_randomised_factors_are_close_to_the_best_and_say_how_close():
    weight = draw(300, 200) @ torch.diag(torch.arange(1, 201, dtype=f64) ** -0.5)
    importance = draw(200, seed=1).square()
    exact = factorize(weight, 40, importance_in=importance)
    state = torch.get_rng_state()
    found = factorize(weight, 40, importance_in=importance, randomized=True)
    assert torch.equal(torch.get_rng_state(), state)
    error = (weight - found.up @ found.down) * importance.sqrt()
    measured = error.norm() / (weight * importance.sqrt()).norm()
    assert found.error == pytest.approx(float(measured), rel=1e-5)  # what it says is what it is
    assert exact.error <= found.error < 1.03 * exact.error
    again = factorize(weight, 40, importance_in=importance, randomized=True)
    assert torch.equal(found.up, again.up) and torch.equal(found.down, again.down)
    errors = []
    for seed in range(5):  # with no power iteration, within the bound in the mean
        p, s, q = randomized_svd(weight, 40, powers=0, seed=seed)
        errors.append(float((weight - (p * s) @ q).norm()))
    tail = float(torch.linalg.svdvals(weight)[40:].norm())
    assert tail <= np.mean(errors) <= tail * (1 + 40 / 15) ** 0.5 * 1.01


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_compressed_models_are_smaller_and_whole_ones_at_their_full_rank_unchanged(kind, tokens):
    model = tiny_model(kind)
    before, dense = count(model), logits(model, tokens)
    targets = target_layers(model)
    biases = {name: layer.bias for name, layer in targets.items() if getattr(layer, "bias", None) is not None}
    state = torch.get_rng_state()
    found, report = compress(model, statistics_of(model), keep=0.7, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert found is model and count(model) == report.parameters[1] < before == report.parameters[0]
    assert set(report.layers) | set(report.skipped) == set(targets)
    for name, row in report.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        assert (layer.rank, (layer.out_features, layer.in_features)) == (row.rank, row.shape)
        assert row.rank == rank_for(0.7, *row.shape) and row.kept == row.rank * sum(row.shape)
        assert name not in biases or torch.equal(layer.bias, biases[name])
        assert layer.training is model.training
    after = logits(model, tokens)
    assert after.isfinite().all() and not torch.equal(after, dense)
    assert "parameters" in str(report) and all(name in str(report) for name in report.layers)
    assert before - report.parameters[1] == sum(row.dense - row.kept for row in report.layers.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_method_minimises_its_own_error(method, allocation):
    model = tiny_model("llama")
    statistics = statistics_of(model)
    weights = {name: layer.weight.detach().double() for name, layer in target_layers(model).items()}
    _, report = compress(model, statistics, keep=0.6, method=method, allocation=allocation, progress=False)
    for name, row in report.layers.items():
        right = {
            "svd": torch.ones(row.shape[1], dtype=f64).diag(),
            "fwsvd": statistics[name].fisher_in.sqrt().diag(),
            "asvd": statistics[name].abs_mean.sqrt().diag(),
            "svd-llm": torch.linalg.cholesky(statistics[name].gram),
        }[method]
        layer = model.get_submodule(name)
        if row.rank is None:
            assert isinstance(layer, nn.Linear) and row.error == 0
            continue
        product = layer.up.weight.detach().double() @ layer.down.weight.detach().double()
        whole = weights[name] @ right
        tail = torch.linalg.svdvals(whole)[row.rank :].norm() / whole.norm()
        assert row.error == pytest.approx(float(tail), rel=1e-3)
        assert float(((weights[name] - product) @ right).norm() / whole.norm()) == pytest.approx(row.error, rel=1e-3)
    assert report.kept <= 0.6
    if allocation == "global":
        assert len({row.rank for row in report.layers.values() if row.shape == (16, 16)}) > 1


def test_conv1d_is_transposed(tokens):
    model = tiny_model("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    weight = model.get_submodule(name).weight.detach()
    compress(model, keep=0.9, method="svd", progress=False)
    layer = model.get_submodule(name)
    assert (layer.in_features, layer.out_features) == tuple(weight.shape)
    p, s, q = torch.linalg.svd(weight.T.double())
    wanted = (p[:, : layer.rank] * s[: layer.rank]) @ q[: layer.rank]
    torch.testing.assert_close((layer.up.weight @ layer.down.weight).double(), wanted, rtol=0, atol=1e-6)


def test_adapters_are_merged_first(tokens):
    base = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    merged = copy.deepcopy(model).merge_and_unload()
    wanted, report = compress(merged, keep=0.8, method="svd", progress=False)
    found, same = compress(model, keep=0.8, method="svd", progress=False)
    assert not isinstance(found, peft.PeftModel) and found is base
    assert torch.equal(logits(found, tokens), logits(wanted, tokens))
    assert (same.parameters, same.layers) == (report.parameters, report.layers)


def test_statistics_under_an_adapter_are_those_of_the_base(tokens):
    base = tiny_model("bert")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    statistics = statistics_of(model)
    assert all("base_layer" not in name for name in statistics)
    found, _ = compress(model, statistics, keep=0.7, progress=False)
    assert isinstance(found.bert.encoder.layer[0].attention.self.query, LowRankLinear)
    assert logits(found, tokens).isfinite().all()


def test_only_the_layers_asked_for():
    model = tiny_model("llama")
    _, report = compress(
        model,
        keep=0.5,
        method="svd",
        target_modules=["q_proj", "up_proj"],
        exclude_modules=r".*\.1\..*",
        progress=False,
    )
    assert set(report.layers) == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear


def test_low_precision_models_stay_in_their_dtype(tokens):
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model("llama").to(dtype)
        compress(model, statistics_of(model), keep=0.8, method="svd-llm", progress=False)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert logits(model, tokens).isfinite().all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchanged():
    """A model, and a check that nothing happened to it."""
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    yield model
    assert str(model) == str(before) and not hasattr(model.config, "quantization_config")
    for (name, one), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other) or "k_proj" in name  # the layer that a test spoils itself


@pytest.mark.parametrize("keep", [0, 1, -0.1, 1.5, float("nan"), "half", True])
def test_keep_is_a_share(unchanged, keep):
    with pytest.raises(ValueError, match=r"keep must be a share in \(0, 1\)"):
        compress(unchanged, keep=keep, method="svd")


@pytest.mark.parametrize(
    "settings",
    [{"method": "tucker"}, {"allocation": "greedy"}, {"side": "left"}, {"alpha": -1}, {"alpha": float("nan")}],
)
def test_settings_are_checked(unchanged, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        compress(unchanged, keep=0.5, **settings)


def test_missing_statistics_are_named(unchanged):
    with pytest.raises(ValueError, match="fwsvd needs statistics"):
        compress(unchanged, keep=0.5)
    layers = target_layers(unchanged)
    last = list(layers)[-1]
    partial = statistics_of(unchanged, layers={name: layer for name, layer in layers.items() if name != last})
    with pytest.raises(ValueError, match=f"{last}: no statistics"):
        compress(unchanged, partial, keep=0.5)
    with pytest.raises(ValueError, match="no gram was collected, which svd-llm needs"):
        compress(unchanged, statistics_of(unchanged, gram=None), keep=0.5, method="svd-llm")


def test_statistics_of_another_model_are_refused(unchanged):
    torch.manual_seed(5)
    other = type(unchanged)(unchanged.config)
    with pytest.raises(ValueError, match="another model"):
        compress(unchanged, statistics_of(other), keep=0.5)
    with pytest.raises(ValueError, match="another model"):
        compress(unchanged, statistics_of(tiny_model("bert")), keep=0.5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "field"), [("fwsvd", "fisher_in"), ("asvd", "abs_mean"), ("svd-llm", "gram")])
def test_useless_importances_are_named(unchanged, value, method, field):
    statistics = statistics_of(unchanged)
    name = list(statistics)[-1]
    getattr(statistics[name], field).fill_(value)
    with pytest.raises(ValueError, match=rf"{name}: .*(all zero|NaN or infinity)"):
        compress(unchanged, statistics, keep=0.5, method=method)


def test_a_broken_weight_is_named(unchanged):
    unchanged.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj: its weight has NaN"):
        compress(unchanged, keep=0.5, method="svd")


def test_quantised_layers_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear8bitLt(16, 32, bias=False, has_fp16_weights=False).to("cpu")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is quantised \(Linear8bitLt\)"):
        compress(model, keep=0.5, method="svd")
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="is quantised"):
        compress(model, keep=0.5, method="svd")


def test_compiled_models_are_refused():
    """Their layers have other names, which would go into the file."""
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="compress it before torch.compile"):
        compress(torch.compile(model, backend="eager"), keep=0.5, method="svd")
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compress it before torch.compile"):
        compress(model, keep=0.5, method="svd")


def test_twice_is_refused():
    model = tiny_model("llama")
    compress(model, keep=0.5, method="svd", progress=False)
    with pytest.raises(ValueError, match="compressed already"):
        compress(model, keep=0.5, method="svd", progress=False)


def test_adapters_that_cannot_be_merged_are_refused(tokens):
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters outside a PeftModel"):
        compress(model, keep=0.5, method="svd")
    prompt = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        compress(prompt, keep=0.5, method="svd")
    config = peftx.CompacterConfig(phm_dim=2, reduction_factor=2, target_modules=["q_proj"])
    compacter = peft.get_peft_model(tiny_model("llama"), config)
    before = copy.deepcopy(compacter)
    with pytest.raises(NotImplementedError):
        compress(compacter, keep=0.5, method="svd")
    assert str(compacter) == str(before)


class Shared(nn.Module):
    """Two layers with one weight, one alone, one too thin to gain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.thin = (nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.thin(self.c(self.b(self.a(x))))


def test_tied_and_thin_layers_are_left_and_logged(caplog, monkeypatch):
    model = Shared()
    with pytest.raises(ValueError, match="shares its weight"):
        compress(model, keep=0.5, method="svd", target_modules=["a", "c"])
    assert type(model.c) is nn.Linear
    monkeypatch.setattr(logging.getLogger("peftx"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        _, report = compress(model, keep=0.9, method="svd", target_modules=["c", "thin"], progress=False)
    assert set(report.layers) == {"c"} and report.skipped == {"thin": "too small to gain"}
    assert "too small to gain: thin" in caplog.text and "thin (too small to gain)" in str(report)
    with pytest.raises(ValueError, match="no layer can be made smaller: thin: too small"):
        compress(Shared(), keep=0.9, method="svd", target_modules=["thin"], progress=False)
