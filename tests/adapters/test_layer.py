"""What every registered method inherits from the shared layer and tuner, on small layers; oracles in float64."""

import copy
import warnings

import peft
import pytest
import torch
from conftest import MLP, randomize, starts_as, tuner_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftx
from peftx.adapters.products import accumulate
from peftx.adapters.sites import LinearSite

TARGETS = ["lin0", "lin1"]


def wrap(model, case, trained=True, name="default", **kwargs):
    model = peft.get_peft_model(model, case.config(**{"target_modules": TARGETS, **kwargs}), adapter_name=name)
    if trained:
        randomize(model, case)
    return model


def add(model, case, name, seed, **kwargs):
    """A further trained adapter, not active."""
    model.add_adapter(name, case.config(**{"target_modules": TARGETS, **kwargs}))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if case.info.prefix in key and name in key.split("."):
            parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)


def layers(model):
    return list(tuner_layers(model).values())


def outputs(model, x, *names):
    """Output of the model with each adapter active in turn."""
    result = []
    for name in names:
        model.set_adapter(name)
        result.append(model(x))
    return result


@given(
    batch=st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple),
    n=st.integers(1, 6),
    r=st.integers(1, 4),
    scale=st.floats(-3, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_accumulate_is_a_sum(batch, n, r, scale, dtype, transposed):
    result, h = torch.randn(*batch, n, dtype=dtype), torch.randn(*batch, r, dtype=dtype)
    weight = torch.randn(n, r, dtype=dtype).T if transposed else torch.randn(r, n, dtype=dtype)
    wanted = result.double() + scale * (h.double() @ weight.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    kept = result.clone()
    found = accumulate(result, h, weight, scale)
    assert found.dtype == dtype and torch.equal(result, kept)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("result, h", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("autocast", [False, True])
def test_accumulate_keeps_the_dtype_and_precision_of_the_result(result, h, autocast):
    base = torch.linspace(1, 2, 12).view(3, 4).to(result)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = accumulate(base, torch.zeros(3, 2, dtype=h), torch.zeros(2, 4, dtype=h))
    assert torch.equal(found, base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_base(case, mlp, dtype):
    mlp = mlp.to(dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    y = mlp(x)
    assert starts_as(case, wrap(mlp, case, trained=False)(x), y)


def test_init_weights_false_starts_elsewhere(case, mlp):
    x = torch.randn(3, 12)
    y = mlp(x)
    if isinstance(getattr(case.config(), case.init_field), str):
        pytest.skip("the mode is chosen by init_weights itself")
    assert not torch.allclose(wrap(mlp, case, trained=False, **{case.init_field: False})(x), y)


@pytest.mark.parametrize("layer", ["Linear", "Linear without bias", "Conv1D"])
def test_forward_gradients_and_merge_equal_the_dense_delta(mergeable, layer):
    torch.manual_seed(0)
    base = Conv1D(8, 12) if layer == "Conv1D" else nn.Linear(12, 8, bias=layer == "Linear")
    model = wrap(nn.Sequential(base).double(), mergeable, target_modules=["0"])
    (adapted,) = layers(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = base.weight.detach().T if layer == "Conv1D" else base.weight.detach()
    delta = adapted.get_delta_weight("default").detach()
    assert delta.shape == base.weight.shape and delta.dtype == torch.float64
    wanted = F.linear(x, weight + (delta.T if layer == "Conv1D" else delta), base.bias)
    y = model(x)
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(y)
    mine, theirs = torch.autograd.grad(y, x, g, retain_graph=True)[0], torch.autograd.grad(wanted, x, g)[0]
    torch.testing.assert_close(mine, theirs)
    y.backward(g)
    assert base.weight.grad is None and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    assert type(merged[0]) is type(base)
    torch.testing.assert_close(merged(x), wanted)


def test_gradients_are_those_of_finite_differences(case):
    model = wrap(nn.Sequential(nn.Linear(6, 4)).double(), case, target_modules=["0"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def output(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    if not case.info.exact_gradient:  # a training rule rescales them; that of the input stays exact
        parameters = [p.detach() for p in parameters]
    assert torch.autograd.gradcheck(output, (x, *parameters))


def test_training_changes_the_adapter_only(case, mlp):
    model = wrap(mlp, case, modules_to_save=["head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(case.info.prefix in name or "modules_to_save" in name for name in changed) and changed
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_adapter_params_are_fp32_on_a_half_base_and_the_output_keeps_its_dtype(case, mlp):
    model = wrap(mlp.bfloat16(), case)
    assert {p.dtype for n, p in model.named_parameters() if case.info.prefix in n} == {torch.float32}
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = copy.deepcopy(model).float()
    torch.testing.assert_close(y.float(), exact(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_a_half_base_rounds_once(mergeable, mlp, safe_merge):
    model = wrap(mlp.bfloat16(), mergeable)
    wanted = {m: (m.base_layer.weight.float() + m.get_delta_weight("default")).bfloat16() for m in layers(model)}
    model.merge_adapter(safe_merge=safe_merge)
    assert len(wanted) == 2 and all(torch.equal(m.base_layer.weight, weight) for m, weight in wanted.items())


def test_several_adapters_of_different_settings(case, mlp):
    model = wrap(mlp, case)
    add(model, case, "two", 1, **({"r": 4} if hasattr(case.config(), "r") else {}))
    add(model, case, "three", 2, target_modules=["lin1", "head"])
    x = torch.randn(3, 12)
    with model.disable_adapter():
        base = model(x)
    a, b, c = outputs(model, x, "default", "two", "three")
    assert not any(torch.allclose(first, second) for first, second in [(a, b), (b, c), (a, c), (a, base)])
    model.base_model.set_adapter(["default", "three"])
    both = model(x)
    assert not torch.allclose(both, a) and not torch.allclose(both, c)
    if case.info.mergeable:
        model.merge_adapter()
        torch.testing.assert_close(model(x), both)
        model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, x, "two")[0], b)


def test_merge_in_order_unmerge_in_reverse(mergeable, mlp):
    model = wrap(mlp.double(), mergeable)
    add(model, mergeable, "two", 1)
    weights = [m.base_layer.weight.clone() for m in layers(model)]
    x = torch.randn(3, 12, dtype=torch.float64)
    (a,) = outputs(model, x, "default")
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that one is merged already
        model.merge_adapter(["two"])
    assert all(m.merged_adapters == ["default", "two"] for m in layers(model))
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), weights, strict=True):
        torch.testing.assert_close(layer.base_layer.weight, weight)
    torch.testing.assert_close(model(x), a)


def test_merging_what_is_no_delta_is_refused_and_changes_nothing(unmergeable, mlp):
    x, base = torch.randn(3, 12), copy.deepcopy(mlp)
    model = wrap(mlp, unmergeable)
    layer, y = layers(model)[0], model(x)
    refused = [model.merge_adapter, model.merge_and_unload, model.unmerge_adapter, layer.merge, layer.unmerge]
    refused += [lambda: model.merge_adapter(["default"], safe_merge=True), lambda: peft.convert_to_lora(model, rank=2)]
    refused += [lambda: layer.get_delta_weight("default"), lambda: layer.lora_factors("default")]
    for call in refused:
        with pytest.raises(NotImplementedError, match=rf"{unmergeable.info.name.upper()} .*: .+\. .*unload\(\)"):
            call()
        assert torch.equal(model(x), y) and not any(m.merged for m in layers(model))
    assert not model.supports_lora_conversion() and unmergeable.lora_export == "none"
    assert torch.equal(model.unload()(x), base(x))


def test_a_safe_merge_that_fails_writes_nothing(mergeable, mlp):
    model = wrap(mlp, mergeable)
    broken = layers(model)[-1]
    next(p for p in broken.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")
    before = [m.base_layer.weight.clone() for m in layers(model)]
    for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="The adapter default seems to be broken"):
            merge()
        assert all(torch.equal(m.base_layer.weight, w) for m, w in zip(layers(model), before, strict=True))
        assert len(layers(model)) == 2 and not any(m.merged for m in layers(model))


def test_disable_is_exactly_the_base(case, mlp):
    x, base = torch.randn(3, 12), copy.deepcopy(mlp)
    model = wrap(mlp, case)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not torch.allclose(model(x), base(x))
    assert torch.equal(model.unload()(x), base(x))


def test_delete_and_add_again(case, mlp):
    model = wrap(mlp, case)
    x = torch.randn(3, 12)
    add(model, case, "two", 1)
    (b,) = outputs(model, x, "two")
    model.delete_adapter("default")
    assert torch.equal(model(x), b) and list(model.peft_config) == ["two"]
    assert not any("default" in key for key in model.state_dict())
    for layer in layers(model):
        assert all("default" not in getattr(layer, n) for n in (*layer.adapter_layer_names, *layer.other_param_names))
    model.add_adapter("default", case.config(target_modules=TARGETS))
    with model.disable_adapter():
        base = model(x)
    (again,) = outputs(model, x, "default")
    assert starts_as(case, again, base)


def test_mixed_batches(case, mlp):
    model = wrap(mlp, case)
    add(model, case, "two", 1)
    model.eval()
    x = torch.randn(5, 12)
    with model.disable_adapter():
        base = model(x)
    a, b = outputs(model, x, "default", "two")
    names = ["two", "default", "__base__", "two", "default"]
    wanted = torch.stack([{"default": a, "two": b, "__base__": base}[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(model(x, adapter_names=names), wanted)
    torch.testing.assert_close(model(x, adapter_names=["__base__"] * 5), base, rtol=0, atol=0)
    torch.testing.assert_close(model(x), b)  # the hooks are gone
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        model(x, adapter_names=["two"])
    with pytest.raises(ValueError, match="non-existing adapter.*: nobody"):
        model(x, adapter_names=["nobody"] * 5)
    if case.info.mergeable:
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged adapters"):
            model(x, adapter_names=names)
        model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=names)


def test_scales(case, mlp):
    model = wrap(mlp, case, target_modules=["head"])
    (layer,) = layers(model)
    x = torch.randn(3, 12)
    with model.disable_adapter():
        base = model(x)
    y = model(x)
    linear = case.lora_export != "dora"  # a magnitude of its own is not scaled
    layer.set_scale("default", 0.25)
    quarter = model(x)
    layer.scale_layer(2)
    if linear:
        torch.testing.assert_close(quarter - base, (y - base) / 4)
        torch.testing.assert_close(model(x) - base, (y - base) / 2)
    assert not torch.allclose(quarter, y) and not torch.allclose(quarter, model(x))
    if case.info.mergeable:
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(x), model(x))
    layer.unscale_layer(2)
    layer.unscale_layer()
    assert torch.equal(model(x), y)


def test_deepcopy_is_independent(case, mlp):
    model = wrap(mlp, case)
    x = torch.randn(3, 12)
    y, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    randomize(twin, case, seed=5)
    assert torch.equal(model(x), y) and not torch.allclose(twin(x), y)


@pytest.mark.parametrize("inner", [peft.LoraConfig, peft.LoHaConfig])
def test_a_tuner_layer_can_be_wrapped_again(case, mlp, inner):
    # PEFT allows other methods' layers as a base, e.g. a LoRA that was injected first.
    if inner is peft.LoraConfig and case.is_lora:
        pytest.skip("PEFT puts all LoRAs of a module into one layer")
    awake = {"init_lora_weights": False} if inner is peft.LoraConfig else {"init_weights": False}
    peft.inject_adapter_in_model(inner(r=2, target_modules=["lin0"], **awake), mlp)
    x = torch.randn(3, 12)
    y = mlp(x)
    with pytest.warns(UserWarning, match="second time"):
        model = wrap(mlp, case, trained=False, target_modules=["lin0"])
    (outer,) = (layer for layer in layers(model) if isinstance(layer, case.info.model.tuner_layer_cls))
    assert outer.get_base_layer() is outer.base_layer.base_layer
    assert starts_as(case, model(x), y)


def test_observed_base_layers_are_called(case, mlp):
    # Hooks on a base layer (offloading, statistics) must fire even where the weight could be used directly.
    seen = []
    mlp.lin0.register_forward_hook(lambda *_: seen.append(1))
    model = wrap(mlp, case)
    x = torch.randn(3, 12)
    y = model(x)
    assert seen
    mlp.lin0.base_layer._forward_hooks.clear()
    torch.testing.assert_close(model(x), y)


def test_layers_of_either_layout_are_adapted_without_a_warning(case):
    model = nn.Sequential(Conv1D(8, 12), nn.Linear(8, 4), Conv1D(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = wrap(model, case, target_modules=["0", "1", "2"])
    x = torch.randn(3, 12)
    y = model(x)
    if case.info.mergeable:
        torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_repr_names_the_layer(case, mlp):
    model = wrap(mlp, case)
    package = "lora" if case.is_lora else "peftx"
    assert f"{package}.{type(layers(model)[0]).__name__}" in repr(model) and "base_layer" in repr(model)


def test_an_adapter_needs_a_delta():
    class Half(peftx.Adapter):
        pass

    half = Half(LinearSite(nn.Linear(2, 2)), peftx.BoneConfig(r=1))
    with pytest.raises(NotImplementedError):
        half.delta_weight()
    with pytest.raises(NotImplementedError):
        half(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(NotImplementedError, match="Half has no exact LoRA form"):
        half.lora_factors()


def test_the_global_rng_is_left_alone_in_training(case):
    model = wrap(MLP(), case).train()
    state = torch.get_rng_state()
    model(torch.zeros(2, 12)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
