"""ALLoRA's rule against its formula: dense G, diag(s), and PEFT's own LoRA; all in float64."""

import peft
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftx

ETA = 2.0


def wrap(base: nn.Module, config=peftx.ALLoRAConfig, std: float = 0.5, **kwargs):
    """One layer with a trained adapter, in float64."""
    torch.manual_seed(0)
    kwargs = {"r": 3, "target_modules": ["0"], **kwargs}
    model = peft.get_peft_model(nn.Sequential(base), config(**kwargs)).double()
    (layer,) = (m for m in model.modules() if isinstance(m, LoraLayer))
    for name, parameter in model.named_parameters():
        if "lora_" in name and std:
            parameter.data += std * torch.randn_like(parameter)
    return model, layer


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def plain_twin(model):
    """PEFT's own LoRA with the same weights and scaling 1."""
    layer = model.base_model.model[0]
    r = layer.r["default"]
    twin, twin_layer = wrap(layer.get_base_layer(), peft.LoraConfig, std=0, r=r, lora_alpha=r)
    for mine, theirs in zip(factors(twin_layer), factors(layer), strict=True):
        mine.data.copy_(theirs.data)
    return twin, twin_layer


def row_scale(B, A, eta=ETA):
    return ((B @ A).norm(dim=1) + eta**-2) ** -0.5


@pytest.mark.parametrize("base", [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), Conv1D(5, 7)], ids=str)
def test_forward_and_input_gradient_are_loras_and_the_weights_gradients_are_scaled_by_rows(base):
    model, layer = wrap(base)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(2, 4, 5, dtype=torch.float64)
    model(x).backward(delta)
    A, B = factors(layer)
    grads, dx = (A.grad.clone(), B.grad.clone()), x.grad.clone()

    twin, twin_layer = plain_twin(model)
    x.grad = None
    torch.testing.assert_close(twin(x), model(x))
    twin(x).backward(delta)
    torch.testing.assert_close(dx, x.grad)

    G = torch.einsum("bto,bti->oi", delta, x.detach())
    s = row_scale(B.detach(), A.detach())
    torch.testing.assert_close(grads[0], B.detach().T @ torch.diag(s) @ G)
    torch.testing.assert_close(grads[1], torch.diag(s) @ G @ A.detach().T)
    torch.testing.assert_close(grads[1], s[:, None] * twin_layer.lora_B["default"].weight.grad)


@given(
    o=st.integers(1, 9),
    i=st.integers(1, 9),
    r=st.integers(1, 4),
    size=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 100.0]),
    eta=st.sampled_from([1e-3, 0.5, 1.0, 2.0, 8.0, 1e6]),
)
@settings(deadline=None, max_examples=60)
def test_factored_row_norms_equal_dense_ones_and_s_is_bounded_and_falls(o, i, r, size, eta):
    _model, layer = wrap(nn.Linear(i, o), r=r, eta=eta)
    A, B = factors(layer)
    B.data *= size
    s = layer.lora_variant["default"].gradient_scale(layer, "default")
    torch.testing.assert_close(s, row_scale(B, A, eta).detach(), rtol=1e-6, atol=0)
    assert s.dtype == torch.float64 and (s > 0).all() and (s <= eta * (1 + 1e-12)).all()
    order = (B @ A).norm(dim=1).argsort()
    assert (s[order].diff() <= 1e-12 * eta).all()
    if size == 0:
        torch.testing.assert_close(s, torch.full_like(s, eta))
    if eta == 1e-3:
        torch.testing.assert_close(
            s, torch.full_like(s, eta), rtol=1e-3 * (1 + (B @ A).norm(dim=1).max().item()), atol=0
        )
    if eta == 1e6 and size == 100:
        torch.testing.assert_close(s, (B @ A).norm(dim=1).detach() ** -0.5, rtol=1e-6, atol=0)


def test_s_depends_on_the_product_only():
    _model, layer = wrap(nn.Linear(7, 5))
    A, B = factors(layer)
    rule = layer.lora_variant["default"]
    before = rule.gradient_scale(layer, "default")
    R = torch.randn(3, 3, dtype=torch.float64)
    with torch.no_grad():
        A.copy_(torch.linalg.solve(R, A))
        B.copy_(B @ R)
    after = rule.gradient_scale(layer, "default")
    torch.testing.assert_close(after, before)
    assert not after.requires_grad


def test_norm_of_b_is_blind_to_a():
    _model, layer = wrap(nn.Linear(7, 5), norm_of="b")
    A, B = factors(layer)
    A.data *= 3
    s = layer.lora_variant["default"].gradient_scale(layer, "default")
    torch.testing.assert_close(s, (B.detach().norm(dim=1) + ETA**-2) ** -0.5)


@pytest.mark.parametrize("change", ["optimizer", "copy_", "data", "bitsandbytes", "scale"])
def test_s_follows_every_change_of_the_weights(change):
    model, layer = wrap(nn.Linear(64, 80), r=64)
    model.float()
    A, B = factors(layer)
    rule = layer.lora_variant["default"]
    rule.gradient_scale(layer, "default")
    scale = 1.0
    if change == "optimizer":
        B.grad = torch.ones_like(B)
        torch.optim.AdamW([B], lr=0.1).step()
    elif change == "copy_":
        B.detach().copy_(2 * B.detach())
    elif change == "data":
        B.data = 2 * B.data
    elif change == "bitsandbytes":
        import bitsandbytes as bnb

        B.grad = torch.ones_like(B)
        bnb.optim.AdamW8bit([B], lr=0.1, min_8bit_size=1).step()
    else:
        model.base_model.model[0].set_scale("default", 3.0)
        scale = 3.0
    torch.testing.assert_close(rule.gradient_scale(layer, "default"), row_scale(scale * B, A).detach())


def test_the_loss_scales_the_gradients_and_accumulation_adds_them():
    model, layer = wrap(nn.Linear(7, 5))
    x = torch.randn(6, 7, dtype=torch.float64)

    def grads(*losses):
        model.zero_grad()
        for factor, rows in losses:
            (factor * model(rows).square().sum()).backward()
        return [w.grad.clone() for w in factors(layer)]

    whole = grads((1, x))
    torch.testing.assert_close(grads((3, x)), [3 * g for g in whole])
    torch.testing.assert_close(grads((1, x[:2]), (1, x[2:4]), (1, x[4:])), whole)


def test_first_step_of_sgd_on_b_is_that_of_lora_with_scaling_eta():
    model, layer = wrap(nn.Linear(7, 5), std=0)
    x, delta = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    model(x).backward(delta)
    twin, twin_layer = wrap(nn.Linear(7, 5), peft.LoraConfig, std=0, lora_alpha=3 * ETA)
    factors(twin_layer)[0].data.copy_(factors(layer)[0].data)
    twin(x).backward(delta)
    torch.testing.assert_close(factors(layer)[1].grad, factors(twin_layer)[1].grad)


def test_embedding_and_convolution_follow_the_rule():
    model, layer = wrap(nn.Embedding(11, 6))
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    ids = torch.tensor([[1, 2, 2], [0, 10, 1]])
    delta = torch.randn(2, 3, 6, dtype=torch.float64)
    y = model(ids)
    torch.testing.assert_close(y, (layer.base_layer.weight + (B @ A).T)[ids])
    y.backward(delta)
    onehot = nn.functional.one_hot(ids, 11).double()
    G, s = torch.einsum("bto,bti->oi", delta, onehot), row_scale(B.detach(), A.detach())
    torch.testing.assert_close(A.grad, B.detach().T @ (s[:, None] * G))
    torch.testing.assert_close(B.grad, s[:, None] * (G @ A.detach().T))

    model, layer = wrap(nn.Conv2d(4, 6, 3, padding=1))
    A, B = factors(layer)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    y = model(x)
    weight = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    weight.requires_grad_()
    wanted = nn.functional.conv2d(x, weight, layer.base_layer.bias, padding=1)
    torch.testing.assert_close(y, wanted)
    dx, G = torch.autograd.grad(wanted, [x, weight], delta)
    y.backward(delta)
    torch.testing.assert_close(x.grad, dx)
    flat = (B.detach().flatten(1), A.detach().flatten(1))
    s = row_scale(*flat)
    torch.testing.assert_close(A.grad.flatten(1), flat[0].T @ (s[:, None] * G.flatten(1)))
    torch.testing.assert_close(B.grad.flatten(1), s[:, None] * (G.flatten(1) @ flat[1].T))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_grouped_convolution_follows_the_rule():
    model, layer = wrap(nn.Conv2d(4, 6, 3, groups=2), r=4)
    A, B = factors(layer)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    delta = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    model(x).backward(delta)
    half = [(B.detach()[3 * g : 3 * g + 3].flatten(1), A.detach()[2 * g : 2 * g + 2].flatten(1)) for g in range(2)]
    s = torch.cat([row_scale(*pair) for pair in half])
    h = nn.functional.conv2d(x, A.detach())
    torch.testing.assert_close(
        B.grad,
        torch.autograd.functional.vjp(
            lambda w: nn.functional.conv2d(h, w, groups=2), B.detach(), delta * s.view(-1, 1, 1)
        )[1],
    )


def test_a_watched_module_is_called_and_the_gradients_stay_the_same():
    model, layer = wrap(nn.Linear(7, 5))
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    found = []
    for watched in (False, True):
        model.zero_grad()
        calls = []
        if watched:
            layer.lora_B["default"].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.square().sum().backward()
        found.append([y, dx, *(w.grad.clone() for w in factors(layer))])
        assert bool(calls) == watched
    torch.testing.assert_close(*found)


def test_dropout_stays_on_the_adapters_side():
    model, layer = wrap(nn.Linear(7, 5), lora_dropout=0.5)
    twin, twin_layer = wrap(layer.base_layer, peft.LoraConfig, std=0, lora_alpha=3, lora_dropout=0.5)
    for mine, theirs in zip(factors(twin_layer), factors(layer), strict=True):
        mine.data.copy_(theirs.data)
    x = torch.randn(6, 7, dtype=torch.float64)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(1)
        outputs.append(each.train()(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_bf16_autocast_and_checkpointing_keep_the_gradients(tokens, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peftx.ALLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=checkpointing):
            model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for fp32, bf16 in zip(*grads, strict=True):
        assert bf16.dtype == torch.float32
        assert (bf16 - fp32).norm() <= 0.03 * fp32.norm()


def test_the_file_is_a_plain_lora(tmp_path, tokens):
    model = tiny_model("llama")
    config = peftx.ALLoRAConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    wanted = model.eval()(input_ids=tokens).logits
    saved = peft.PeftConfig.from_pretrained(tmp_path)
    assert (saved.lora_alpha, saved.alpha_pattern, saved.lora_dropout) == (4, {"q_proj": 2}, 0.0)
    plain = peft.LoraConfig(
        r=4, lora_alpha=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2}, target_modules=saved.target_modules
    )
    stock = peft.get_peft_model(tiny_model("llama"), plain)
    peft.set_peft_model_state_dict(stock, peft.load_peft_weights(tmp_path))
    torch.testing.assert_close(stock.eval()(input_ids=tokens).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"eta": 0}, "`eta` must be positive"),
        ({"eta": -1.0}, "`eta` must be positive"),
        ({"eta": float("inf")}, "`eta` must be finite"),
        ({"eta": float("nan")}, "`eta` must be finite"),
        ({"eta": "2"}, "`eta` must be of type"),
        ({"norm_of": "a"}, "`norm_of` must be of type"),
        ({"lora_alpha": 16}, "leave out `lora_alpha`"),
        ({"use_rslora": True}, "leave out `lora_alpha`"),
        ({"alpha_pattern": {"q": 3}}, "leave out `lora_alpha`"),
        ({"use_dora": True}, "`use_dora=True` cannot be combined"),
        ({"init_lora_weights": "mica"}, "'mica'` cannot be combined"),
        ({"lora_bias": True}, "`lora_bias=True` cannot be combined"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        peftx.ALLoRAConfig(r=8, **kwargs)


def test_a_layer_that_ignores_the_rule_is_refused_and_the_model_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match=r"ALLORA cannot adapt the module '1': MultiheadAttention is not supported"):
        peft.get_peft_model(model, peftx.ALLoRAConfig(target_modules=["0", "1"]))
    assert list(model.state_dict()) == keys and type(model[0]) is nn.Linear
