"""GradNormLoRP against the dense formula m (W + s B A) / ||W + s B A||, PEFT's DoRA, and its optimizer's rules."""

import copy
import logging
import warnings

import peft
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import peftx
from peftx.optim import create_optimizer, state_bytes, trainer_kwargs
from peftx.tuners import gradnormlorp

MODES = ["detached", "full"]
KINDS = {
    "Linear": lambda: nn.Linear(7, 5),
    "Linear without bias": lambda: nn.Linear(7, 5, bias=False),
    "Conv1D": lambda: Conv1D(5, 7),
}


def wrap(
    base: nn.Module | None = None, config=peftx.GradNormLoRPConfig, std: float = 0.3, names=("default",), **kwargs
):
    """One layer with trained adapters, in float64 and in training mode; the first is active."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5) if base is None else base).double()
    kwargs = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], **kwargs}
    model = peft.get_peft_model(base, config(**kwargs), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**kwargs))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += std * torch.randn_like(parameter)
    (layer,) = (m for m in model.modules() if isinstance(m, LoraLayer))
    return model.train(), layer


def tensors(layer, name="default"):
    """A, B and m."""
    modules = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [module[name].weight for module in modules]


def base_weight(layer):
    weight = layer.get_base_layer().weight.detach()
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def dense(W, A, B, m, s, mode="detached"):
    V = W + s * B @ A
    n = V.norm(dim=1)
    return (m / (n.detach() if mode == "detached" else n))[:, None] * V


def leaves(layer, name="default"):
    return [t.detach().clone().requires_grad_() for t in tensors(layer, name)]


def merged(layer):
    weight = layer.get_base_layer().weight.detach()
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_all_gradients_are_those_of_the_dense_weight(kind, mode):
    model, layer = wrap(KINDS[kind](), norm_grad=mode, bias="lora_only")
    bias = layer.get_base_layer().bias
    x, g = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 5, dtype=torch.float64)
    own = [x, *tensors(layer), *([] if bias is None else [bias])]
    y = model(x)
    found = torch.autograd.grad(y, own, g)
    parts = leaves(layer)
    wanted = F.linear(x, dense(base_weight(layer), *parts, layer.scaling["default"], mode), bias)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, [x, *parts, *own[4:]], g))
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_papers_and_only_the_full_one_is_orthogonal_to_the_rows(mode):
    model, layer = wrap(norm_grad=mode)
    A, B, m = (t.detach() for t in tensors(layer))
    W, s = base_weight(layer), layer.scaling["default"]
    x, g = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    model(x).backward(g)
    V = W + s * B @ A
    n = V.norm(dim=1, keepdim=True)
    G, unit = g.T @ x, V / n
    along = (G * unit).sum(dim=1, keepdim=True)
    T = m[:, None] / n * (G - unit * along if mode == "full" else G)
    wanted = [s * B.T @ T, s * T @ A.T, along[:, 0]]
    torch.testing.assert_close([p.grad for p in tensors(layer)], wanted)
    assert ((T * V).sum(dim=1).abs().max() < 1e-12) == (mode == "full")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_dora(kind, dropout):
    model, layer = wrap(KINDS[kind](), lora_dropout=dropout)
    stock = {"use_dora": True, "fan_in_fan_out": kind == "Conv1D", "lora_dropout": dropout}
    twin, twin_layer = wrap(copy.deepcopy(layer.get_base_layer()), peft.LoraConfig, std=0, **stock)
    for mine, theirs in zip(tensors(twin_layer), tensors(layer), strict=True):
        mine.data.copy_(theirs.data)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    found = []
    for each, its in ((model, layer), (twin, twin_layer)):
        torch.manual_seed(1)
        y = each(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *tensors(its)]), each.eval()(x)])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(model.merge_and_unload()(x), twin.merge_and_unload()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
def test_it_starts_as_the_base_bit_for_bit_whatever_the_dtype_and_with_rows_of_zeros(dtype, cast):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 9)).to(dtype)
    base[0].weight.data[3] = 0
    x = torch.randn(5, 33, dtype=dtype)
    wanted = base(x)
    config = peftx.GradNormLoRPConfig(target_modules=["0", "1"])
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=cast)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), wanted)
    expected = torch.promote_types(dtype, torch.float32) if cast else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros_stay_finite_and_wake_up(mode):
    model, layer = wrap(std=0, norm_grad=mode)
    layer.get_base_layer().weight.data[2] = 0
    tensors(layer)[2].data[2] = 0
    x, target = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    options = {**model.peft_config["default"].optimizer_options(), "weight_decay": 0.0}
    optimizer = create_optimizer(model, 0.05, **options)
    for _ in range(4):
        F.mse_loss(model(x), target).backward()
        assert all(p.grad.isfinite().all() for p in tensors(layer))
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.get_delta_weight("default")[2] != 0).all() and tensors(layer)[2][2] != 0
    y = model(x)
    layer.lora_magnitude_vector["default"].weight.data[2] = 0  # and a row that its magnitude makes zero comes back
    weight = layer.get_base_layer().weight.clone()
    model.merge_adapter()
    assert (layer.get_base_layer().weight[2] == 0).all()
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, weight)
    assert y.isfinite().all()


def test_a_row_that_the_adapter_cancels_is_finite():
    model, layer = wrap()
    A, B, _ = tensors(layer)
    B.data[1], A.data[:] = torch.tensor([1.0, 0, 0]), torch.randn(3, 7)
    layer.get_base_layer().weight.data[1] = -layer.scaling["default"] * A.data[0]
    for module in (model, model.float()):
        x = torch.randn(4, 7, dtype=A.dtype)
        y = module(x)
        y.square().sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in tensors(layer))


@given(
    o=st.integers(1, 9),
    i=st.integers(1, 9),
    r=st.integers(1, 4),
    size=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 100.0]),
    alpha=st.sampled_from([-3, 1, 16]),
)
@settings(deadline=None, max_examples=50)
def test_factored_row_norms_equal_dense_ones(o, i, r, size, alpha):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a rank of 1 cannot be projected
        _model, layer = wrap(nn.Linear(i, o), r=r, lora_alpha=alpha)
    A, B, _ = tensors(layer)
    B.data *= size
    found = layer.lora_variant["default"].row_norms(layer, "default")
    torch.testing.assert_close(found, (base_weight(layer) + alpha / r * B @ A).norm(dim=1).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "change", ["optimizer", "data", "in place", "base", "base data", "base written", "scale", "dtype"]
)
def test_the_output_follows_every_change(change, training):
    model, layer = wrap()
    model.train(training)
    x = torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        model(x)
    A, B, _m = tensors(layer)
    weight = layer.get_base_layer().weight
    if change == "optimizer":
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
        torch.optim.SGD([A, B], lr=0.1).step()
    elif change == "data":
        A.data = 2 * A.data
    elif change == "in place":
        A.detach().mul_(2)
    elif change == "base":
        weight.detach().add_(1)
    elif change == "base data":
        weight.data = weight.data + 1
    elif change == "base written":  # as PEFT's own merge writes
        weight.data += 1
    elif change == "scale":
        layer.set_scale("default", 0.25)
    else:
        model.float()
        x = x.float()
    with torch.no_grad():
        after = model(x)
        wanted = F.linear(
            x, dense(base_weight(layer), *tensors(layer), layer.scaling["default"]), layer.base_layer.bias
        )
    torch.testing.assert_close(after, wanted)
    assert change == "dtype" or not torch.allclose(after, before)


def test_a_quantized_weight_is_read_once_in_training_and_not_again_in_evaluation(monkeypatch):
    reads, read = [], gradnormlorp.unmerged_weight
    monkeypatch.setattr(gradnormlorp, "unmerged_weight", lambda module: reads.append(1) or read(module))
    base = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 32).to("cpu")
    model = peft.get_peft_model(nn.Sequential(base), peftx.GradNormLoRPConfig(target_modules=["0"]))
    x = torch.randn(4, 64)
    counts = []
    for training in (True, True, False, False):
        reads.clear()
        with torch.set_grad_enabled(training):
            model.train(training)(x)
        counts.append(len(reads))
    assert counts == [1, 1, 1, 0]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_copied_after_a_forward_with_gradients(training):
    model, _layer = wrap()
    x = torch.randn(4, 7, dtype=torch.float64)
    y = model.train(training)(x)
    assert torch.equal(copy.deepcopy(model)(x), y)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_exact_and_unmerging_restores_the_weight(kind, safe):
    model, layer = wrap(KINDS[kind](), names=("one", "two"))
    x = torch.randn(4, 7, dtype=torch.float64)
    weight = layer.get_base_layer().weight.clone()
    W, s = base_weight(layer), 2.0
    wanted = dense(W, *tensors(layer, "one"), s)
    delta = layer.get_delta_weight("one")
    assert delta.shape == weight.shape
    model.set_adapter("one")
    y = model(x)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(merged(layer), wanted)
    torch.testing.assert_close(layer.get_delta_weight("one"), delta)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.data, weight.data)

    model.base_model.set_adapter(["one", "two"])  # the second acts on what the first has made, with norms of its own
    A, B, m = tensors(layer, "two")
    c = m / (W + s * B @ A).norm(dim=1)
    both = c[:, None] * (wanted + s * B @ A)
    y = model(x)
    torch.testing.assert_close(y, F.linear(x, both, layer.get_base_layer().bias))
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(merged(layer), both)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.data, weight.data)


def test_a_merged_adapter_is_removed_in_another_dtype():
    model, layer = wrap()
    layer.lora_magnitude_vector["default"].weight.data[2] = 0
    weight = layer.get_base_layer().weight.detach().clone()
    model.float().merge_adapter()
    model.double().unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.data, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [["lora", "ours"], ["ours", "lora"]])
def test_it_merges_before_and_after_plain_lora(order):
    model = tiny_model("llama").double()
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model.add_adapter(peft.LoraConfig(**config), adapter_name="lora")
    model.add_adapter(peftx.GradNormLoRPConfig(**config), adapter_name="ours")
    layer = model.model.layers[0].self_attn.q_proj
    W, s, x = base_weight(layer).clone(), layer.scaling["ours"], torch.randn(3, 16, dtype=torch.float64)
    A, B, m = tensors(layer, "ours")
    c, plain, delta = m / (W + s * B @ A).norm(dim=1), *(layer.get_delta_weight(name) for name in ("lora", "ours"))
    wanted = c[:, None] * (W + plain + s * B @ A) if order[0] == "lora" else W + delta + plain
    model.set_adapter(order)
    torch.testing.assert_close(layer(x), F.linear(x, wanted))
    layer.merge(adapter_names=order)
    torch.testing.assert_close(base_weight(layer), wanted)
    torch.testing.assert_close(layer.get_delta_weight("ours"), delta)
    layer.unmerge()
    torch.testing.assert_close(base_weight(layer), W)


def test_convert_to_lora_and_weighted_adapters_know_the_whole_change():
    model, layer = wrap(names=("one", "two"))
    deltas = [layer.get_delta_weight(name) for name in ("one", "two")]
    model.add_weighted_adapter(["one", "two"], [0.7, 0.5], "sum", "svd", svd_rank=5)
    torch.testing.assert_close(layer.get_delta_weight("sum"), 0.7 * deltas[0] + 0.5 * deltas[1])
    model.set_adapter("one")
    _, state = peft.convert_to_lora(model, rank=5, adapter_name="one")
    A, B = (next(t for key, t in state.items() if name in key) for name in ("lora_A", "lora_B"))
    torch.testing.assert_close((B @ A).double(), deltas[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_layer_is_trained_as_its_dequantized_weight(kind, mode):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    make = {
        "int8": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        "nf4": lambda: bnb.nn.Linear4bit(64, 32),
    }
    base = make[kind]()
    base.load_state_dict(linear.state_dict())
    config = peftx.GradNormLoRPConfig(r=4, target_modules=["0"], norm_grad=mode)
    model = peft.get_peft_model(nn.Sequential(base.to("cpu")), config).train()
    (layer,) = (m for m in model.modules() if isinstance(m, LoraLayer))
    for p in tensors(layer):
        p.data += 0.1 * torch.randn_like(p)
    x, g = torch.randn(6, 64), torch.randn(6, 32)
    y = model(x)
    y.backward(g)
    W, parts = layer.get_base_weight().float(), leaves(layer)
    wanted = F.linear(x, dense(W, *parts, layer.scaling["default"], mode), layer.base_layer.bias)
    tolerance = (
        {"rtol": 0.02, "atol": 0.02 * float(wanted.abs().max())} if kind == "int8" else {"rtol": 1e-4, "atol": 1e-4}
    )
    torch.testing.assert_close(y, wanted, **tolerance)
    found, wanted = [p.grad for p in tensors(layer)], torch.autograd.grad(wanted, parts, g)
    for mine, theirs in zip(found, wanted, strict=True):  # int8 multiplies in 8 bits, so the magnitude sees its errors
        assert (mine - theirs).norm() <= 0.03 * theirs.norm()


# Files


def test_the_file_is_pefts_dora_both_ways(tmp_path, tokens):
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(tiny_model("llama"), peftx.GradNormLoRPConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "ours")
    wanted = model.eval()(input_ids=tokens).logits
    stock = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(use_dora=True, **config))
    stock.save_pretrained(tmp_path / "stock")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock"))
    theirs = {key.replace("_magnitude_vector", "_magnitude_vector.weight"): t for key, t in theirs.items()}
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    peft.set_peft_model_state_dict(stock, peft.load_peft_weights(tmp_path / "ours"))
    torch.testing.assert_close(stock.eval()(input_ids=tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    back = peft.get_peft_model(tiny_model("llama"), peftx.GradNormLoRPConfig(**config))
    peft.set_peft_model_state_dict(back, peft.get_peft_model_state_dict(stock))
    assert torch.equal(back.eval()(input_ids=tokens).logits, wanted)
    saved = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (saved.peft_type, saved.use_dora, saved.norm_grad) == ("GRADNORMLORP", True, "detached")


@pytest.mark.parametrize("layer", [nn.Embedding(7, 5), nn.Conv2d(3, 4, 3)], ids=str)
def test_other_layers_are_refused_and_the_model_left_alone(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match=r"GRADNORMLORP cannot adapt the module '1'.*only linear layers"):
        peft.get_peft_model(model, peftx.GradNormLoRPConfig(target_modules=["0", "1"]))
    assert list(model.state_dict()) == keys and type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"use_dora": False}, "is DoRA's parameterisation"),
        ({"norm_grad": "half"}, "`norm_grad` must be of type"),
        ({"proj_rank": 0}, "`proj_rank` must be at least 1"),
        ({"proj_rank": 0.5}, "`proj_rank` must be of type"),
        ({"update_proj_gap": 0}, "`update_proj_gap` must be at least 1"),
        ({"proj_scale": -1.0}, "`proj_scale` must be finite"),
        ({"proj_scale": float("nan")}, "`proj_scale` must be finite"),
        ({"optim_bits": 4}, "`optim_bits` must be of type"),
        ({"lora_bias": True}, "cannot be combined|not supported for DoRA"),
        ({"use_bdlora": peft.tuners.lora.config.BdLoraConfig()}, "cannot be combined"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        peftx.GradNormLoRPConfig(**kwargs)


def test_a_projection_that_saves_nothing_is_warned_about():
    with pytest.warns(UserWarning, match=r"modules of r=8 are rotated.*proj_rank=8 is not below"):
        peftx.GradNormLoRPConfig(r=8, proj_rank=8)
    with pytest.warns(UserWarning, match=r"modules of r=2, 4 are rotated.*proj_rank=4 is not below"):
        peftx.GradNormLoRPConfig(r=8, proj_rank=4, rank_pattern={"q": 4, "k": 2, "v": 5})
    with pytest.warns(UserWarning, match=r"modules of r=1 are rotated.*rank 1 cannot be projected"):
        peftx.GradNormLoRPConfig(r=2, rank_pattern={"q": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftx.GradNormLoRPConfig(r=2)
        peftx.GradNormLoRPConfig(r=8, proj_rank=4, rank_pattern={"q": 5})


# The optimizer


def train(model, optimizer, steps, seed=0):
    """Steps on random data; returns the gradients that the optimizer saw, by step and parameter."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(8, 7, dtype=torch.float64, generator=generator)
        model(x).sin().sum().backward()
        seen.append({p: p.grad.clone() for group in optimizer.param_groups for p in group["params"]})
        optimizer.step()
        optimizer.zero_grad()
    return seen


def optimized(lr=0.01, std=0.3, base=None, **config):
    """Model, layer and the optimizer that its config asks for, without decay."""
    options = config.pop("options", {})
    model, layer = wrap(base, std=std, **config)
    options = {"weight_decay": 0.0, **model.peft_config["default"].optimizer_options(), **options}
    return model, layer, create_optimizer(model, lr, **options)


def test_only_a_and_b_are_projected_and_states_have_the_low_shapes():
    model, layer, optimizer = optimized(r=4)
    train(model, optimizer, 1)
    A, B, m = tensors(layer)
    states = [optimizer.state[p] for p in (A, B, m)]
    assert [tuple(state["exp_avg"].shape) for state in states] == [(2, 7), (2, 5), (5,)]  # B's is stored transposed
    assert [tuple(state["basis"].shape) for state in states[:2]] == [(4, 2), (4, 2)] and "basis" not in states[2]
    assert all(state["exp_avg"].dtype == torch.uint8 for state in states)


def test_updates_lie_in_the_span_of_an_orthonormal_basis_that_changes_when_due():
    model, layer, optimizer = optimized(r=4, proj_rank=1, update_proj_gap=4, optim_bits=32)
    factors = tensors(layer)[:2]
    bases, start = [], []
    for step in range(9):
        if step % 4 == 0:
            start = [p.detach().clone() for p in factors]
        train(model, optimizer, 1, seed=step)
        bases.append([optimizer.state[p]["basis"].clone() for p in factors])
        for p, before, basis, flip in zip(factors, start, bases[-1], (False, True), strict=True):
            change = (p.detach() - before).T if flip else p.detach() - before
            assert torch.linalg.matrix_rank(change, rtol=1e-8) == 1
            torch.testing.assert_close(basis @ (basis.T @ change), change)
            torch.testing.assert_close(basis.T @ basis, torch.eye(1, dtype=basis.dtype))
    for step in range(1, 9):
        same = [torch.equal(now, then) for now, then in zip(bases[step], bases[step - 1], strict=True)]
        assert same == [step % 4 != 0] * 2


def test_a_projection_of_full_rank_is_adam_in_a_rotated_basis():
    with pytest.warns(UserWarning, match="rotated"):
        model, layer, optimizer = optimized(r=3, proj_rank=3, update_proj_gap=10**9, optim_bits=32)
    factors = tensors(layer)[:2]
    starts = [p.detach().clone() for p in factors]
    seen = train(model, optimizer, 6)
    for p, start, turned in zip(factors, starts, (False, True), strict=True):
        basis = optimizer.state[p]["basis"]
        torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=basis.dtype))
        z = nn.Parameter(basis.T @ (start.T if turned else start))
        adam = torch.optim.Adam([z], lr=0.01)
        for gradients in seen:
            z.grad = basis.T @ (gradients[p].T if turned else gradients[p])
            adam.step()
        torch.testing.assert_close(p.detach(), ((basis @ z).T if turned else basis @ z).detach())


def test_scale_is_a_learning_rate_of_a_and_b():
    changes = []
    for scale, lr in ((2.0, 0.01), (1.0, 0.02)):
        model, layer, optimizer = optimized(lr=lr, proj_scale=scale, optim_bits=32)
        starts = [p.detach().clone() for p in tensors(layer)]
        train(model, optimizer, 1)
        changes.append([p.detach() - start for p, start in zip(tensors(layer), starts, strict=True)])
    torch.testing.assert_close(changes[0][:2], changes[1][:2])
    torch.testing.assert_close(2 * changes[0][2], changes[1][2])


def test_the_first_8_bit_step_is_the_32_bit_one():
    found = []
    for bits in (8, 32):
        model, layer, optimizer = optimized(optim_bits=bits)
        train(model, optimizer, 1)
        found.append([p.detach() for p in tensors(layer)])
    torch.testing.assert_close(*found, rtol=0, atol=2.4e-7)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_equal(bits, mode, tmp_path):
    def fresh():
        return optimized(optim_bits=bits, norm_grad=mode, update_proj_gap=2)

    model, layer, optimizer = fresh()
    train(model, optimizer, 3)
    torch.save({"model": peft.get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, tmp_path / "at3")
    train(model, optimizer, 3, seed=1)
    resumed, its_layer, its_optimizer = fresh()
    saved = torch.load(tmp_path / "at3", weights_only=True)
    peft.set_peft_model_state_dict(resumed, saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, its_optimizer, 3, seed=1)
    for mine, wanted in zip(tensors(its_layer), tensors(layer), strict=True):
        assert torch.equal(mine, wanted)


def test_changes_from_outside_between_steps_survive():
    found = []
    for offset in (0.0, 100.0):
        _model, layer, optimizer = optimized(optim_bits=32)
        for step in range(2):
            for p in tensors(layer):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)
            optimizer.step()
            if step == 0:
                for p in tensors(layer):
                    p.data += offset
        found.append([p.detach() for p in tensors(layer)])
    torch.testing.assert_close([p + 100 for p in found[0]], found[1])


def test_bytes_of_the_states_of_one_module_of_llama_7b():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    model = peft.get_peft_model(base, peftx.GradNormLoRPConfig(r=8, target_modules=["0"]))
    config = model.peft_config["default"]
    optimizer = create_optimizer(model, 1e-3, **config.optimizer_options())
    optimizer.allocate_states()
    low, magnitude, bases = 4 * (4096 + 4096), 4096, 2 * 8 * 4
    assert state_bytes(optimizer) == 2 * (low + magnitude) * (1 + 4 / 256) + 4 * bases
    optimizer = create_optimizer(model, 1e-3, **config.optimizer_options() | {"optim_bits": 32, "rank": None})
    optimizer.allocate_states()
    assert state_bytes(optimizer) == 8 * (8 * (4096 + 4096) + 4096)


def test_one_line_trains_it_in_the_trainer_with_what_its_config_says(tmp_path, caplog):
    torch.manual_seed(0)
    config = peftx.GradNormLoRPConfig(r=4, proj_rank=1, update_proj_gap=7, proj_scale=2.0, task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny_model("bert"), config)
    args = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.02, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    ids = torch.randint(1, 64, (8, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    with caplog.at_level(logging.WARNING, "peftx"):
        trainer = Trainer(model, args, train_dataset=data, **trainer_kwargs(args, **config.optimizer_options()))
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    projected = [group for group in optimizer.param_groups if group["rank"] is not None]
    assert projected and all((g["rank"], g["update_proj_gap"], g["scale"]) == (1, 7, 2.0) for g in projected)
    assert all(state["exp_avg"].dtype == torch.uint8 for state in optimizer.state.values() if state["step"])
    assert not caplog.records


def test_it_shares_a_layer_with_plain_lora():
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="lora")
    layer = model.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("lora")
    model.add_adapter(peftx.GradNormLoRPConfig(r=2, target_modules=["q_proj"]), adapter_name="ours")
    tensors(layer, "ours")[1].data += 0.1
    assert torch.equal(layer.get_delta_weight("lora"), delta)
    x, W = torch.randn(3, 16), base_weight(layer)
    torch.testing.assert_close(layer(x), F.linear(x, dense(W, *tensors(layer, "ours"), layer.scaling["ours"])))
    model.set_adapter("lora")
    torch.testing.assert_close(layer(x), F.linear(x, W + delta))
