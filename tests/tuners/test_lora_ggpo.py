"""LoRA-GGPO and LoRA-MGPO against the dense perturbed weight: the same outputs, and the same gradients everywhere."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import join, leave
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

import peftx
from peftx.adapters.norms import weight_row_norms2
from peftx.tuners import lora_ggpo
from peftx.tuners.lora_ggpo import schedules
from peftx.tuners.lora_ggpo.noise import draw, gradient_row_norms2
from peftx.tuners.lora_ggpo.rule import GGPO
from peftx.tuners.lora_ggpo.statistics import measure


def net(kind: str = "Linear", dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = (Conv1D(6, 7), Conv1D(5, 6)) if kind == "Conv1D" else (nn.Linear(7, 6), nn.Linear(6, 5))
    return nn.Sequential(first, nn.Tanh(), second).to(dtype)


def wrap(base=None, std: float = 0.5, **kwargs):
    """A trained LoRA-GGPO adapter on both layers, in training mode, with large noise, driven by calls."""
    kwargs = {"r": 2, "target_modules": ["0", "2"], "ggpo_sigma": 0.3, "auto_update": False, **kwargs}
    base = net() if base is None else base
    dtype = next(base.parameters()).dtype
    model = peft.get_peft_model(base, peftx.LoRAGGPOConfig(**kwargs)).to(dtype).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += std * torch.randn_like(parameter)
    return model


def data(dtype=torch.float64):
    return torch.randn(4, 3, 7, dtype=dtype, generator=torch.Generator().manual_seed(2))


def step(model, x=None, optimizer=None, **kwargs):
    """One backward, the statistics, and (where given) the optimizer."""
    x = data() if x is None else x
    model(x).square().sum().backward()
    model.base_model.update_ggpo_stats(**kwargs)
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


def layers(model):
    return [m for m in model.modules() if getattr(m, "lora_variant", None)]


def dense_weight(layer, eps=0.0):
    """W + s B A + eps, (out, in), with leaves for A and B."""
    weight = layer.get_base_layer().weight.detach()
    weight = weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight
    A, B = (w["default"].weight.detach().clone().requires_grad_() for w in (layer.lora_A, layer.lora_B))
    return weight + layer.scaling["default"] * B @ A + eps, A, B


def eps_of(layer):
    tau, seed = layer.lora_variant["default"].noise(layer, "default")
    noise = torch.cat([block for _, block in draw(seed, layer.out_features, layer.in_features, torch.device("cpu"))])
    return tau[:, None] * noise.double()


def measured(layer):
    """Squared row norms of its gradient."""
    return measure([(layer.lora_variant["default"], layer, "default")])[0]


def mgpo_eps(layer, optimizer, rho, mean_norm=None, max_scale=10.0):
    A, B = (w["default"].weight for w in (layer.lora_A, layer.lora_B))
    M_A, M_B = (optimizer.state[w]["exp_avg"] for w in (A, B))
    d = layer.scaling["default"] * (M_B @ A + B @ M_A).detach()
    factor = 1.0 if mean_norm is None else min(1 / mean_norm, max_scale)
    return -rho * factor * d / d.norm()


def run(model, x):
    """Outputs and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [w["default"].weight.grad.clone() for layer in layers(model) for w in (layer.lora_A, layer.lora_B)]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


def dense_run(model, x, eps):
    x, leaves, h = x.clone().requires_grad_(), [], None
    for layer, e in zip(layers(model), eps, strict=True):
        weight, *AB = dense_weight(layer, e)
        leaves += AB
        h = F.linear(x if h is None else torch.tanh(h), weight, layer.get_base_layer().bias)
    h.square().sum().backward()
    return [h.detach(), x.grad, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("combine", ["quadrature", "additive"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "watched base"])
@pytest.mark.parametrize("block", [1, 2**22], ids=["blocks", "whole"])
def test_outputs_and_gradients_are_those_of_the_perturbed_weight(monkeypatch, kind, combine, block):
    monkeypatch.setattr(lora_ggpo.noise, "BLOCK", block)
    model = wrap(net(kind), combine=combine)
    if kind == "watched base":
        for layer in layers(model):
            layer.base_layer.register_forward_hook(lambda *args: None)
    plain = run(model, data())
    torch.testing.assert_close(plain, dense_run(model, data(), [0.0, 0.0]))
    step(model)
    found = run(model, data())
    torch.testing.assert_close(found, dense_run(model, data(), [eps_of(layer) for layer in layers(model)]))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, plain, strict=True))


def test_without_perturbation_it_is_lora():
    model = wrap()
    stock = peft.get_peft_model(
        copy.deepcopy(net()), peft.LoraConfig(r=2, lora_alpha=16, target_modules=["0", "2"])
    ).double()
    stock.load_state_dict(model.state_dict())
    wanted = stock(data())
    torch.testing.assert_close(model(data()), wanted)  # no statistics yet
    before = model(data())
    step(model)
    assert not torch.allclose(model(data()), wanted)
    assert torch.equal(model.eval()(data()), before)
    model.train()
    with model.disable_adapter():
        assert torch.equal(model(data()), net()(data()))
    model.merge_adapter()
    torch.testing.assert_close(model(data()), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(data()), wanted)


@pytest.mark.parametrize("kwargs", [{"ggpo_sigma": 0.0}, {"mode": "mgpo", "mgpo_rho": 0.0}, {"warmup_steps": 100}])
def test_no_size_no_perturbation_and_the_trajectory_is_loras(kwargs):
    runs = []
    for config in (
        peftx.LoRAGGPOConfig(r=2, target_modules=["0", "2"], auto_update=False, **kwargs),
        peft.LoraConfig(r=2, lora_alpha=16, target_modules=["0", "2"]),
    ):
        torch.manual_seed(3)
        model = peft.get_peft_model(net(), config).double().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if "mode" in kwargs and hasattr(model.base_model, "attach_optimizer"):
            model.base_model.attach_optimizer(optimizer)
        for _ in range(5):
            model(data()).square().sum().backward()
            if hasattr(model.base_model, "update_ggpo_stats"):
                model.base_model.update_ggpo_stats()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(dict(model.named_parameters()))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


def test_noise_has_the_stated_law():
    numbers = torch.cat([block for _, block in draw(7, 400, 300, torch.device("cpu"))])
    assert numbers.shape == (400, 300) and numbers.dtype == torch.float32
    assert abs(numbers.mean()) < 5 / 400 and abs(numbers.std() - 1) < 0.01
    again = torch.cat([block for _, block in draw(7, 400, 300, torch.device("cpu"))])
    other = torch.cat([block for _, block in draw(8, 400, 300, torch.device("cpu"))])
    assert torch.equal(numbers, again) and abs((numbers * other).mean()) < 5 / 300

    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(300, 400)),
        peftx.LoRAGGPOConfig(target_modules=["0"], ggpo_sigma=0.03, ggpo_beta=0.0, auto_update=False),
    ).train()
    step(model, torch.randn(2, 300))
    (layer,) = layers(model)
    eps, (weight, *_) = eps_of(layer), dense_weight(layer)
    assert abs(eps.norm() / weight.norm() - 0.03) < 5e-4
    tau = layer.lora_variant["default"].tau
    torch.testing.assert_close(eps.std(dim=1).float(), tau, rtol=0.2, atol=0)


def test_beta_enlarges_the_noise_only_in_rows_with_a_gradient():
    taus = []
    for beta in (0.0, 1.0):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(7, 6)).double(), target_modules=["0"], ggpo_beta=beta)
        y = model(data())
        model.zero_grad()
        B = layers(model)[0].lora_B["default"].weight
        B.data[0] = 0  # a row that neither gradient reaches
        y[..., 1:].square().sum().backward()
        model.base_model.update_ggpo_stats()
        taus.append(layers(model)[0].lora_variant["default"].tau)
    assert taus[0][0] == taus[1][0] and (taus[1][1:] > taus[0][1:]).all()


@given(m=st.integers(1, 8), n=st.integers(1, 8), r=st.integers(1, 4), scale=st.floats(0.1, 4), zero=st.booleans())
@settings(deadline=None, max_examples=50)
def test_factored_row_norms_equal_dense_ones(m, n, r, scale, zero):
    W, A, gA = (torch.randn(k, n, dtype=torch.float64) for k in (m, r, r))
    B, gB = (torch.randn(m, r, dtype=torch.float64) for _ in range(2))
    B *= not zero
    dense = (W + scale * B @ A).square().sum(dim=1)
    torch.testing.assert_close(weight_row_norms2(W.square().sum(dim=1), W @ A.T, A, B, scale), dense)
    without = W.square().sum(dim=1) + (scale * B @ A).square().sum(dim=1)
    torch.testing.assert_close(weight_row_norms2(W.square().sum(dim=1), 0.0, A, B, scale), without)
    dense = (scale * (B @ gA + gB @ A)).square().sum(dim=1)
    torch.testing.assert_close(gradient_row_norms2(A, B, gA, gB, scale), dense)


@pytest.mark.parametrize("combine", ["quadrature", "additive"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_statistics_are_those_of_the_formula(kind, combine):
    model = wrap(net(kind), combine=combine, ggpo_sigma=0.2, ggpo_beta=0.7)
    model(data()).square().sum().backward()
    wanted = []
    for layer in layers(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        G = layer.scaling["default"] * (B @ A.grad + B.grad @ A).detach()
        weight = dense_weight(layer)[0].detach()
        w, g = weight.norm(dim=1), G.norm(dim=1)
        n = weight.shape
        if combine == "quadrature":
            wanted.append(0.2 / n[1] ** 0.5 * (w**2 + 0.7 * g**2).sqrt())
        else:
            wanted.append((0.2 * w + 0.7 * g**2) / n[0] ** 0.5)
    model.base_model.update_ggpo_stats()
    torch.testing.assert_close([layer.lora_variant["default"].tau for layer in layers(model)], wanted)


def test_gradient_mean_cheap_norms_and_ramp():
    model = wrap(grad_ema=0.5, cheap_norms=True, ramp="cosine", total_step=4)
    rule = layers(model)[0].lora_variant["default"]
    norms = []
    for _ in range(2):
        model(data()).square().sum().backward()
        norms.append(measured(layers(model)[0]))
        model.base_model.update_ggpo_stats()
        model.zero_grad()
    torch.testing.assert_close(rule.grad_norms2, (norms[0] + norms[1]) / 2)
    (schedule,) = schedules(model)
    torch.testing.assert_close(rule.noise(layers(model)[0], "default")[0], 0.5 * rule.tau)
    schedule.step = 4
    torch.testing.assert_close(rule.noise(layers(model)[0], "default")[0], rule.tau)
    schedule.total_step = None
    with pytest.warns(UserWarning, match="needs `total_step`"):
        assert rule.noise(layers(model)[0], "default")[0] is rule.tau


def test_same_micro_step_same_noise_and_a_backward_moves_on():
    for noise_per in ("micro", "step"):
        model = wrap(noise_per=noise_per)
        step(model)
        first = model(data())
        assert torch.equal(first, model(data()))
        first.sum().backward()
        second = model(data())
        assert torch.equal(first, second) == (noise_per == "step")
        second.sum().backward()
        model.base_model.update_ggpo_stats()
        model.zero_grad()
        assert schedules(model)[0].step == 2
        assert not torch.equal(model(data()), first)


def test_accumulated_gradients_give_one_update():
    whole, parts = wrap(noise_per="step"), wrap(noise_per="step")
    for model, batches in ((whole, [data()]), (parts, [data()[:2], data()[2:]])):
        step(model)
        for batch in batches:
            model(batch).square().sum().backward()
        model.base_model.update_ggpo_stats()
    for a, b in zip(layers(whole), layers(parts), strict=True):
        torch.testing.assert_close(a.lora_variant["default"].tau, b.lora_variant["default"].tau)


def test_update_counts_a_named_step_once_and_needs_gradients():
    model = wrap()
    with pytest.raises(RuntimeError, match="found no gradients"):
        model.base_model.update_ggpo_stats()
    step(model, step=3)
    assert schedules(model)[0].step == 3
    model.base_model.update_ggpo_stats(step=3)
    assert schedules(model)[0].step == 3


def test_an_overflowed_gradient_changes_nothing_but_the_count():
    model = wrap()
    step(model)
    before = [layer.lora_variant["default"].tau.clone() for layer in layers(model)]
    model(data()).square().sum().backward()
    layers(model)[1].lora_B["default"].weight.grad[0, 0] = float("inf")
    model.base_model.update_ggpo_stats()
    assert schedules(model)[0].step == 2
    assert all(
        torch.equal(layer.lora_variant["default"].tau, tau) for layer, tau in zip(layers(model), before, strict=True)
    )


@pytest.mark.parametrize("mode", ["ggpo", "mgpo"])
def test_base_weights_and_global_random_numbers_are_untouched(mode):
    base = net(dtype=torch.bfloat16)
    kept = copy.deepcopy(base.state_dict())
    config = peftx.LoRAGGPOConfig(r=2, target_modules=["0", "2"], mode=mode, auto_update=False, ggpo_sigma=0.3)
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.base_model.attach_optimizer(optimizer)
    state = torch.get_rng_state()
    for _ in range(3):
        step(model, data(torch.bfloat16), optimizer)
    handle = layers(model)[1].lora_A["default"].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(data(torch.bfloat16))
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    for layer, name in zip(layers(model), ("0", "2"), strict=True):
        assert torch.equal(layer.base_layer.weight, kept[f"{name}.weight"])


def test_dropout_masks_are_those_of_lora():
    masks = []
    for sigma in (0.0, 0.3):
        model = wrap(lora_dropout=0.5, ggpo_sigma=sigma)
        step(model)
        seen = []
        layers(model)[0].lora_dropout["default"].register_forward_hook(lambda m, i, o, seen=seen: seen.append(o == 0))
        torch.manual_seed(5)
        model(data())
        masks.append(seen[0])
    assert torch.equal(*masks) and masks[0].any()


@pytest.mark.parametrize("mode", ["ggpo", "mgpo"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_noise_again(tokens, mode, reentrant):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = peftx.LoRAGGPOConfig(
            r=2, target_modules="all-linear", task_type="CAUSAL_LM", ggpo_sigma=0.5, mode=mode, auto_update=False
        )
        model = peft.get_peft_model(tiny_model("llama"), config).double().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.base_model.attach_optimizer(optimizer)
        losses = []
        for _ in range(3):
            for part in (tokens, tokens.flip(0)):
                loss = model(input_ids=part, labels=part).loss
                loss.backward()
                losses.append(loss.detach())
            model.base_model.update_ggpo_stats()
            grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            optimizer.step()
            optimizer.zero_grad()
        assert schedules(model)[0].step == 3
        found.append([*losses, *grads])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_mgpo_equals_the_dense_step_against_the_momentum(watched, dropout):
    model = wrap(mode="mgpo", mgpo_rho=0.3, mgpo_ema=0.5, lora_dropout=dropout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.base_model.attach_optimizer(optimizer)
    model.eval()
    plain = model(data())
    model.train()
    if not dropout:
        torch.testing.assert_close(model(data()), plain)  # no moments yet
    norms = []
    for _ in range(2):
        model(data()).square().sum().backward()
        norms.append(
            [
                (layer.scaling["default"] * (B @ A.grad + B.grad @ A)).norm()
                for layer in layers(model)
                for A, B in [(layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
            ]
        )
        model.base_model.update_ggpo_stats()
        optimizer.step()
        model.zero_grad()
    means = [(0.5 * a + 0.5 * b).item() for a, b in zip(*norms, strict=True)]
    eps = [mgpo_eps(layer, optimizer, 0.3, mean) for layer, mean in zip(layers(model), means, strict=True)]
    assert all(0 < e.norm() <= 3 + 1e-9 for e in eps)
    if watched:
        layers(model)[0].lora_B["default"].register_forward_hook(lambda *args: None)
    if dropout:
        for layer in layers(model):
            layer.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(run(model, data()), dense_run(model, data(), eps))
    assert not torch.allclose(model(data()), model.eval()(data()))


def test_mgpo_without_full_precision_moments_says_so_once_and_is_lora():
    import bitsandbytes as bnb

    model = wrap(net(dtype=torch.float32), mode="mgpo")
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.01, min_8bit_size=1)
    model.base_model.attach_optimizer(optimizer)
    x = data(torch.float32)
    step(model, x, optimizer)
    with pytest.warns(UserWarning, match="no first moments in full precision") as caught:
        y = model(x)
        model(x)
    assert len(caught) == 1
    torch.testing.assert_close(y, model.eval()(x))


@pytest.mark.parametrize("mode", ["ggpo", "mgpo"])
def test_without_a_driver_it_is_lora_and_says_so_once(mode):
    model = wrap(mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(50):
            y = model(data())
    (warning,) = caught
    assert "plain LoRA so far" in str(warning.message) and "GGPOCallback" in str(warning.message)
    assert ("attach_optimizer" in str(warning.message)) == (mode == "mgpo")
    torch.testing.assert_close(y, model.eval()(data()))


def test_hooks_take_the_statistics_where_nobody_calls():
    auto, driven = wrap(auto_update=True), wrap()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (auto, driven)]
    with pytest.warns(UserWarning, match="statistics come from hooks") as caught:
        for _ in range(3):
            outputs = []
            for model, optimizer in zip((auto, driven), optimizers, strict=True):
                y = model(data())
                y.square().sum().backward()
                if model is driven:
                    model.base_model.update_ggpo_stats()
                optimizer.step()
                optimizer.zero_grad()
                outputs.append(y.detach())
            # the hooks' norms are of the same gradient; the weights they go with are one step newer
            assert (outputs[0] - outputs[1]).abs().max() < 0.1 * outputs[1].abs().max()
    assert len(caught) == 1
    for a, b in zip(layers(auto), layers(driven), strict=True):
        torch.testing.assert_close(
            a.lora_variant["default"].grad_norms2 * 0 + 1, b.lora_variant["default"].grad_norms2 * 0 + 1
        )
    assert schedules(auto)[0].step == 2 and schedules(driven)[0].step == 3


def test_hooks_survive_new_parameters_and_keep_still_when_driven():
    model = wrap(auto_update=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model(data()).square().sum().backward()
    rule = layers(model)[0].lora_variant["default"]
    torch.testing.assert_close(rule.pending, measured(layers(model)[0]))
    step(model)
    model(data()).square().sum().backward()
    assert rule.pending is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_their_own_way(way):
    model = wrap(auto_update=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.base_model.attach_optimizer(optimizer)
    step(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(model(data()), twin(data()))
    assert schedules(twin)[0] is not schedules(model)[0] and schedules(twin)[0].optimizer is None
    step(twin)
    assert (schedules(twin)[0].step, schedules(model)[0].step) == (2, 1)


def test_two_adapters_have_their_own_noise():
    model = wrap()
    model.add_adapter("other", peftx.LoRAGGPOConfig(r=2, target_modules=["0"], ggpo_sigma=0.3, auto_update=False))
    step(model)
    assert schedules(model)[0].step == 1
    model.set_adapter("other")
    step(model)
    assert layers(model)[0].lora_variant["other"].tau is not None
    model.base_model.set_adapter(["default", "other"])
    x, layer = data(), layers(model)[0]
    eps = 0
    for name in ("default", "other"):
        tau, seed = layer.lora_variant[name].noise(layer, name)
        eps = eps + tau[:, None] * next(iter(draw(seed, 6, 7, torch.device("cpu"))))[1].double()
    delta = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    wanted = F.linear(x, layer.base_layer.weight + delta + eps, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    model.delete_adapter("other")
    model(data())


def test_unloading_and_deleting_leave_no_hook_behind():
    for way in ("unload", "merge_and_unload"):
        base = getattr(wrap(), way)()
        assert not base._forward_pre_hooks
    model = wrap()
    model.add_adapter("other", peftx.LoRAGGPOConfig(r=2, target_modules=["0"], auto_update=False))
    inner = model.base_model.model
    assert len(inner._forward_pre_hooks) == 2
    model.delete_adapter("other")
    assert len(inner._forward_pre_hooks) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"kind": "Conv1D"}, {"mode": "mgpo"}, {"warmup_steps": 2}, {"ramp": "cosine", "total_step": 6}],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())) or "Linear",
)
def test_compiled_training_is_one_graph_perturbed_alike(kwargs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kwargs, found = dict(kwargs), []
    kind = kwargs.pop("kind", "Linear")
    for compiled in (False, True):
        model = wrap(net(kind), mgpo_rho=100.0, **kwargs)
        run_ = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
        model.base_model.attach_optimizer(optimizer)
        outputs = []
        for _ in range(5):
            y = run_(data())
            y.square().sum().backward()
            model.base_model.update_ggpo_stats()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(y.detach())
        found.append([*outputs, *(p.detach() for p in model.parameters())])
        assert not torch.allclose(outputs[-1], model.eval()(data()))
    torch.testing.assert_close(*found)
    # without statistics, warming up, and with them: no graph for each step
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()


def test_base_biases_can_be_trained():
    model = wrap(bias="all")
    step(model)
    assert run(model, data())  # no shared state with the check below
    model(data()).sum().backward()
    assert layers(model)[1].base_layer.bias.grad.tolist() == [12.0] * 5


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_bf16_and_autocast_are_close_to_fp32(base_dtype):
    found = []
    for low in (False, True):
        model = wrap(net(dtype=torch.float32), std=0.1)
        if low:
            model = model.to(base_dtype)
        x = data(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and base_dtype == torch.float32):
            for _ in range(2):
                y = model(x.to(base_dtype) if low else x)
                y.float().square().sum().backward()
                model.base_model.update_ggpo_stats()
        found.append([y.float(), *(p.grad.float() for p in model.parameters() if p.requires_grad)])
    for fp32, low in zip(*found, strict=True):
        assert (low - fp32).norm() < 0.05 * fp32.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_are_perturbed_and_not_written(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    source = nn.Linear(64, 32)
    cls = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    kwargs = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
    base = cls(64, 32, **kwargs)
    base.load_state_dict(source.state_dict())
    model = nn.Sequential(base.to("cpu"))
    config = peftx.LoRAGGPOConfig(r=2, target_modules=["0"], ggpo_sigma=0.3, auto_update=False)
    model = peft.get_peft_model(model, config).train()
    kept = model.base_model.model[0].base_layer.weight.data.clone()
    x = torch.randn(8, 64)
    plain = model(x).detach()
    step(model, x)
    (layer,) = layers(model)
    x.requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    with torch.no_grad():
        eps = eps_of(layer).float()
    torch.testing.assert_close(y, plain + x @ eps.T, rtol=2e-2, atol=2e-2)
    x2 = x.detach().clone().requires_grad_()
    (dx_plain,) = torch.autograd.grad(layer.base_layer(x2).sum(), x2)
    torch.testing.assert_close(dx, dx_plain + eps.sum(dim=0).expand_as(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(layer.base_layer.weight.data, kept)


def trainer(tmp_path, mode="ggpo", steps=6, callbacks=True, **kwargs):
    torch.manual_seed(0)
    config = peftx.LoRAGGPOConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", mode=mode, ggpo_sigma=0.1, lora_dropout=0.1
    )
    model = peft.get_peft_model(tiny_model("llama"), config)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(1, 64, (8,), generator=generator)), "labels": ids} for _ in range(24)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "learning_rate": 0.01, "per_device_train_batch_size": 2, **kwargs},
    )
    return Trainer(model, args, train_dataset=rows, callbacks=[peftx.GGPOCallback()] if callbacks else [])


@pytest.mark.parametrize("mode", ["ggpo", "mgpo"])
def test_trainer_resumes_bit_for_bit(tmp_path, mode):
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "whole", mode, **settings)
    whole.train()
    (schedule,) = schedules(whole.model)
    assert (schedule.step, schedule.total_step) == (6, 6)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "ggpo_state.safetensors").is_file()
    saved = peft.load_peft_weights(checkpoint)
    assert all(key.split(".")[-2] in ("lora_A", "lora_B") for key in saved)
    resumed = trainer(tmp_path / "whole", mode, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class Probe(TrainerCallback):
    """Keeps the statistics of every step."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        rules = [layer.lora_variant["default"] for layer in layers(model)]
        self.seen.append([getattr(rule, key) for rule in rules for key in ("tau", "grad_norms2", "mean_norm")])


def test_the_callback_sees_clipped_gradients(tmp_path):
    norms = []
    for limit in (0.0, 1e-3):
        run_ = trainer(tmp_path, steps=1, max_grad_norm=limit)
        run_.add_callback(probe := Probe())
        run_.train()
        norms.append(torch.stack([norm.sum() for norm in probe.seen[0][1::3]]).sqrt())
    (log,) = (entry for entry in run_.state.log_history if "grad_norm" in entry)
    torch.testing.assert_close(norms[1], norms[0] * 1e-3 / float(log["grad_norm"]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ["ggpo", "mgpo"])
def test_a_second_training_starts_as_the_first(tmp_path, mode):
    first = trainer(tmp_path, mode, steps=3)
    start = copy.deepcopy(first.model.state_dict())
    first.train()
    (schedule,) = schedules(first.model)
    assert schedule.optimizer is None and not schedule.driven
    assert not any(getattr(rule, key) is not None for rule, *_ in schedule.live() for key in rule.statistics)
    wanted = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    first.model.load_state_dict(start)
    second = Trainer(first.model, first.args, train_dataset=first.train_dataset, callbacks=[peftx.GGPOCallback()])
    second.train()
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize("told", [False, True])
def test_a_resume_finds_its_own_statistics(tmp_path, told):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    foreign = trainer(tmp_path / "other", steps=3, learning_rate=0.1, **settings)  # has a checkpoint-3 too
    foreign.train()
    resumed = trainer(tmp_path / "other", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    if told:  # the folder has moved since
        moved = tmp_path / "moved"
        checkpoint = checkpoint.rename(moved)
        resumed.args.resume_from_checkpoint = str(moved)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_resume_without_statistics_says_so(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, steps=3, **settings).train()
    (tmp_path / "checkpoint-3" / "ggpo_state.safetensors").unlink()
    with pytest.warns(UserWarning, match="the first step is unperturbed"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_long_accumulation_with_the_callback_warns_of_nothing(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, steps=2, gradient_accumulation_steps=30, per_device_train_batch_size=1).train()
    assert not [w for w in caught if "LORAGGPO" in str(w.message)]


def test_an_adapter_nobody_trains_is_silent_and_unperturbed():
    model = wrap()
    step(model)
    noisy = model(data())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            quiet = model(data())
    assert not torch.allclose(noisy, quiet)
    torch.testing.assert_close(quiet, model.eval()(data()))


def test_mgpo_takes_no_step_where_the_adapter_is_scaled_to_nothing():
    model = wrap(mode="mgpo", mgpo_rho=0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.base_model.attach_optimizer(optimizer)
    model(data()).square().sum().backward()
    model.base_model.update_ggpo_stats()
    optimizer.step()
    for layer in layers(model):
        layer.set_scale("default", 0)
    trained = model(data()).detach()
    torch.testing.assert_close(trained, model.eval()(data()), rtol=0, atol=0)


def test_mgpo_uses_the_weights_as_they_stand():
    model = wrap(mode="mgpo", mgpo_rho=1e-12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.base_model.attach_optimizer(optimizer)
    step(model, optimizer=optimizer)
    model(data())
    for layer in layers(model):
        layer.lora_A["default"].weight.data *= 2
    torch.testing.assert_close(model(data()), model.eval()(data()))


@pytest.mark.parametrize("order", ["late", "between", "zeros"])
def test_hooks_follow_every_order_of_a_loop(order):
    model = wrap(auto_update=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    with pytest.warns(UserWarning, match="statistics come from hooks"):
        for _ in range(5):
            y = model(data())
            if order == "between":
                optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
            if order != "between":
                optimizer.zero_grad(set_to_none=order == "late")
    assert schedules(model)[0].step >= 3
    assert all(layer.lora_variant["default"].tau is not None for layer in layers(model))


def test_one_of_two_trained_adapters_without_gradients_is_left_alone():
    model = wrap()
    model.add_adapter("other", peftx.LoRAGGPOConfig(r=2, target_modules=["0", "2"], auto_update=False))
    model.set_requires_grad(["default", "other"])
    step(model)
    assert sorted(schedule.step for schedule in schedules(model)) == [0, 1]


def test_an_overflow_leaves_nothing_pending():
    model = wrap(auto_update=True)
    for layer in layers(model):
        layer.lora_variant["default"].pending = torch.full((layer.out_features,), float("inf"), dtype=torch.float64)
    schedules(model)[0]._take_from_hooks()
    assert not any(layer.lora_variant["default"].pending is not None for layer in layers(model))


def test_a_flat_input_and_trained_biases():
    model = wrap(bias="all")
    step(model)
    model(data()[0, 0]).sum().backward()
    assert layers(model)[1].base_layer.bias.grad.tolist() == [1.0] * 5


def test_a_watched_adapter_on_a_half_base_keeps_the_dtype():
    model = peft.get_peft_model(
        net(dtype=torch.bfloat16), peftx.LoRAGGPOConfig(r=2, target_modules=["0"], auto_update=False)
    ).train()
    layers(model)[0].lora_A["default"].register_forward_hook(lambda *args: None)
    step(model, data(torch.bfloat16))
    assert layers(model)[0](data(torch.bfloat16)).dtype == torch.bfloat16


def test_trainer_without_the_callback_perturbs_and_says_what_is_missing(tmp_path):
    plain = trainer(tmp_path, callbacks=False)
    with pytest.warns(UserWarning, match="GGPOCallback"):
        plain.train()
    assert schedules(plain.model)[0].step == 5


def test_the_callback_needs_an_adapter(tmp_path):
    other = trainer(tmp_path)
    other.model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="trains no LORAGGPO adapter"):
        peftx.GGPOCallback().on_train_begin(other.args, other.state, other.control, model=other.model)


def test_it_works_on_a_bare_transformers_model(tokens):
    model = tiny_model("llama")
    model.add_adapter(peftx.LoRAGGPOConfig(r=2, target_modules=["q_proj"], ggpo_sigma=0.5, auto_update=False))
    model.train()
    first = model(input_ids=tokens, labels=tokens).loss
    first.backward()
    lora_ggpo.update_ggpo_stats(model)
    model.zero_grad()
    assert model(input_ids=tokens, labels=tokens).loss != first
    assert len([m for m in model.modules() if getattr(m, "lora_variant", None)]) == 2


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"ggpo_sigma": -1}, "`ggpo_sigma`"),
        ({"ggpo_sigma": float("nan")}, "`ggpo_sigma`"),
        ({"ggpo_beta": float("inf")}, "`ggpo_beta`"),
        ({"grad_ema": 1.0}, "`grad_ema`"),
        ({"mgpo_ema": -0.1}, "`mgpo_ema`"),
        ({"mgpo_max_scale": 0}, "`mgpo_max_scale`"),
        ({"total_step": 0}, "`total_step`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"mode": "sam"}, "`mode` must be of type"),
        ({"combine": "sum"}, "`combine` must be of type"),
        ({"noise_per": "epoch"}, "`noise_per` must be of type"),
        ({"seed": 1.5}, "`seed` must be of type"),
        ({"use_dora": True}, "cannot be combined"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        peftx.LoRAGGPOConfig(**kwargs)


@pytest.mark.parametrize("base", [nn.Embedding(8, 8), nn.Conv2d(3, 3, 1)], ids=["Embedding", "Conv2d"])
def test_other_layers_are_refused(base):
    with pytest.raises(TypeError, match="LORAGGPO cannot adapt the module '0'"):
        peft.get_peft_model(nn.Sequential(base), peftx.LoRAGGPOConfig(target_modules=["0"]))


def test_rules_are_of_the_right_kind():
    model = wrap()
    assert all(isinstance(layer.lora_variant["default"], GGPO) for layer in layers(model))
    assert all(type(layer) is lora_ggpo.rule.GGPOLinear for layer in layers(model))


def test_steps_that_a_grad_scaler_skips_change_no_statistics():
    model = wrap(net(dtype=torch.float32), std=0.1, ggpo_sigma=0.01)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-20)
    weight = layers(model)[0].lora_B["default"].weight
    stepped, norms = [], []
    for _ in range(6):
        with torch.autocast("cpu", torch.float16):
            loss = model(data(torch.float32)).float().square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        model.base_model.update_ggpo_stats()
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        stepped.append(not torch.equal(before, weight))
        norms.append(layers(model)[0].lora_variant["default"].grad_norms2)
        optimizer.zero_grad()
    assert not stepped[0] and stepped[-1]
    assert [norm is not None for norm in norms] == [any(stepped[: i + 1]) for i in range(6)]
    assert torch.isfinite(norms[-1]).all() and norms[-1].max() < 1e8  # the scale is not in it


def _ddp_process(rank: int, folder: str) -> None:

    join(rank, folder)
    model = wrap()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    outputs = []
    for _ in range(3):
        y = ddp(data())  # the same rows: only the noise tells the processes apart
        y.square().sum().backward()
        model.base_model.update_ggpo_stats()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    taus = [layer.lora_variant["default"].tau for layer in layers(model)]
    weights = [p.detach() for p in model.parameters()]
    torch.save([outputs, taus, weights], f"{folder}/{rank}")
    leave()


@pytest.mark.slow
def test_two_processes_share_statistics_and_weights_but_not_noise(tmp_path):
    torch.multiprocessing.spawn(_ddp_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    torch.testing.assert_close(first[1:], second[1:], rtol=0, atol=0)
    assert torch.equal(first[0][0], second[0][0])
    assert not torch.allclose(first[0][1], second[0][1])
