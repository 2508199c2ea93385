"""Quantised bases: bitsandbytes' real CPU kernels (8-bit, nf4 and fp4, with and without double quantisation), and a
backend that can only compute forward. Every oracle starts from an untouched copy of the quantised model."""

import copy
from functools import partial

import pytest
import torch
from conftest import MLP, Case, randomize, tiny_model
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peftx

bnb = pytest.importorskip("bitsandbytes")

TARGETS = ["lin0", "lin1"]
LINEAR = {
    "int8": lambda dtype: partial(bnb.nn.Linear8bitLt, has_fp16_weights=False),
    **{
        f"{code}{'-double' if double else ''}": lambda dtype, code=code, double=double: partial(
            bnb.nn.Linear4bit, compute_dtype=dtype, quant_type=code, compress_statistics=double
        )
        for code in ("nf4", "fp4")
        for double in (False, True)
    },
}


def quantize(linear: nn.Linear, make: type[nn.Module]) -> nn.Module:
    layer = make(linear.in_features, linear.out_features)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # bitsandbytes quantises when a layer is moved to a device


def dequantize(layer: nn.Module) -> torch.Tensor:
    return resolve_quantization_backend(layer).get_base_weight(layer).float()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=list(LINEAR))
def base(request: pytest.FixtureRequest, dtype: torch.dtype) -> MLP:
    """An MLP with two quantised layers and a plain head that compute in `dtype`."""
    torch.manual_seed(0)
    model = MLP().to(dtype)
    for name in TARGETS:
        setattr(model, name, quantize(getattr(model, name), LINEAR[request.param](dtype)))
    return model.eval()


@pytest.fixture
def x(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(base: nn.Module, case: Case, std: float = 0.1, **kwargs) -> PeftModel:
    """A copy of `base` with an adapter that does something."""
    model = get_peft_model(copy.deepcopy(base), case.config(target_modules=TARGETS, **kwargs))
    randomize(model, case, std)
    return model.eval()


def layers_of(model: nn.Module) -> list[peftx.AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, peftx.AdapterLayer)]


def expected(base: MLP, deltas: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The MLP with `x @ delta^T` added to each quantised layer's own output, in float64."""
    for name, delta in zip(TARGETS, deltas, strict=True):
        x = torch.tanh((getattr(base, name)(x).double() + x.double() @ delta.double().T).to(x.dtype))
    return base.head(x)


def close(actual: torch.Tensor, wanted: torch.Tensor, units: float = 4) -> bool:
    """Whether two tensors differ by at most `units` roundings of the largest entry, in the dtype of `actual`."""
    tolerance = units * torch.finfo(actual.dtype).eps * max(1.0, wanted.abs().max().item())
    return (actual.double() - wanted.double()).abs().max().item() <= tolerance


def rounding(layer: nn.Module) -> torch.Tensor:
    """Largest error of each entry of a quantised weight, (out, in): half a quantisation step.

    int8: a 254th of the row's maximum (the codes are -127..127), and the rounding to fp16 that precedes it. 4 bits: half
    the widest gap of the code book times the block's maximum, which double quantisation itself stores within 2 %.
    """
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return (scale.float() * (1 / 254 + 2**-11))[:, None].expand(layer.out_features, layer.in_features)
    state = weight.quant_state
    absmax = state.absmax.float()
    if state.nested:
        absmax = (bnb.functional.dequantize_blockwise(absmax.to(torch.uint8), state.state2) + state.offset) * 1.02
    half_gap = state.code.sort().values.diff().max() / 2
    return (half_gap * absmax).repeat_interleave(state.blocksize)[: weight.quant_state.shape.numel()].view(state.shape)


def test_starts_as_the_quantized_base(case: Case, base: MLP, x: torch.Tensor) -> None:
    wanted = base(x)
    model = get_peft_model(base, case.config(target_modules=TARGETS))
    assert len(layers_of(model)) == 2
    assert torch.equal(model(x), wanted)


def test_forward_adds_the_delta(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = adapted(base, case)
    deltas = [layer.get_delta_weight("default") for layer in layers_of(model)]
    assert close(model(x), expected(base, deltas, x), units=8)
    assert not close(model(x), base(x), units=8)


def test_gradients_reach_adapter_and_input(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = adapted(base, case)
    layer = layers_of(model)[0]
    x = x.requires_grad_()
    reference = x.detach().clone().requires_grad_()
    delta = layer.get_delta_weight("default").detach()
    upstream = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(2)).to(x.dtype)

    layer(x).backward(upstream)
    base.lin0(reference).backward(upstream)
    assert close(x.grad, reference.grad.double() + upstream.double() @ delta.double(), units=8)

    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in trainable)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_merge_writes_the_quantized_sum(case: Case, base: MLP, x: torch.Tensor, safe: bool) -> None:
    model = adapted(base, case)
    before = [dequantize(getattr(base, name)) for name in TARGETS]
    sums = [weight + layer.get_delta_weight("default") for weight, layer in zip(before, layers_of(model), strict=True)]
    unmerged = model(x)
    model.merge_adapter(safe_merge=safe)

    bounds = []
    for layer, wanted in zip(layers_of(model), sums, strict=True):
        stored = layer.get_base_layer()
        error = (dequantize(stored) - wanted.detach()).abs()
        slack = 2 * torch.finfo(x.dtype).eps * wanted.abs().max()  # bitsandbytes dequantises to the dtype of the weight
        assert (error <= rounding(stored) + slack).all()
        bounds.append(error)
    assert not torch.equal(dequantize(layers_of(model)[0].get_base_layer()), before[0])
    # Each of two layers shifts the output by at most |error| |x|, and tanh and the head keep it of that size.
    assert (model(x) - unmerged).abs().max() < 12 * max(error.max() for error in bounds) + 8 * torch.finfo(x.dtype).eps


def test_unmerge_returns_within_two_roundings(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = adapted(base, case)
    model.merge_adapter()
    merged = [rounding(layer.get_base_layer()) for layer in layers_of(model)]
    model.unmerge_adapter()
    for name, layer, bound in zip(TARGETS, layers_of(model), merged, strict=True):
        before, after = dequantize(getattr(base, name)), dequantize(layer.get_base_layer())
        # Taking the delta out of a rounded weight can widen its error, where the delta depends on the weight.
        limit = 2 * bound.max() + rounding(layer.get_base_layer()).max() + 4 * torch.finfo(x.dtype).eps * before.abs().max()
        assert (after - before).abs().max() <= limit
    assert not model.base_model.model.lin0.merged


def test_safe_merge_writes_nothing_when_one_layer_is_broken(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = adapted(base, case)
    stored = [layer.get_base_layer().weight.data.clone() for layer in layers_of(model)]
    broken = next(p for p in layers_of(model)[1].parameters() if p.requires_grad)
    broken.data.fill_(float("nan"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
    for layer, wanted in zip(layers_of(model), stored, strict=True):
        assert torch.equal(layer.get_base_layer().weight.data, wanted) and not layer.merged


def test_merge_and_unload_gives_bitsandbytes_layers_back(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = adapted(base, case)
    twin = copy.deepcopy(model)
    twin.merge_adapter()
    unloaded = model.merge_and_unload()
    assert [type(getattr(unloaded, name)) for name in TARGETS] == [type(getattr(base, name)) for name in TARGETS]
    assert not layers_of(unloaded)
    assert torch.equal(unloaded(x), twin(x))


def test_unload_gives_the_base_back(case: Case, base: MLP, x: torch.Tensor) -> None:
    unloaded = adapted(base, case).unload()
    assert not layers_of(unloaded) and torch.equal(unloaded(x), base(x))


def two_adapters(base: MLP, case: Case) -> PeftModel:
    model = adapted(base, case)
    model.add_adapter("other", case.config(target_modules=TARGETS))
    model.set_adapter("other")
    randomize(model, case, seed=5)
    return model.eval()


def test_several_adapters_add_up(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = two_adapters(base, case)
    layer, plain = layers_of(model)[0], base.lin0(x)
    first, second = (layer.get_delta_weight(name).double() for name in ("default", "other"))
    assert close(layer(x), plain.double() + x.double() @ second.T, units=8)
    model.base_model.set_adapter(["default", "other"])
    if case.name == "bone-bat":  # the second delta is that of the weight which the first has changed
        block = layer.bone_block["other"].detach().double()
        second = peftx.tuners.bone.bat_delta(dequantize(base.lin0).double() + first, block)
    assert close(layer(x), plain.double() + x.double() @ (first + second).T, units=8)
    model.delete_adapter("default")
    assert layer.active_adapters == ["other"] and "default" not in layer.scaling
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_mixed_batch_equals_separate_rows(case: Case, base: MLP, x: torch.Tensor) -> None:
    model = two_adapters(base, case)
    names = ["other", "__base__", "default", "other"]
    actual = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            wanted = base(x)[row]
        else:
            model.set_adapter(name)
            wanted = model(x)[row]
        assert close(actual[row], wanted)


@pytest.fixture(params=["int8", "nf4-double"])
def quantized_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Loads a tiny Llama as a user does, quantised by transformers; a function, to load it again."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if request.param == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    return partial(AutoModelForCausalLM.from_pretrained, path, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem"])
def test_saved_adapter_loads_onto_the_quantized_base(
    case: Case, quantized_llama, tokens: torch.Tensor, tmp_path, low_cpu_mem_usage: bool
) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(quantized_llama()), case.config(target_modules="all-linear"))
    assert len(layers_of(model)) == 14
    randomize(model, case)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)

    wanted = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)
    base = prepare_model_for_kbit_training(quantized_llama())
    plain = base(tokens).logits
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(tokens).logits, wanted)
    assert not torch.allclose(plain, wanted, atol=1e-3)


class ForwardOnlyLinear(nn.Module):
    """Stands for a GPTQ layer: it multiplies, and shows its weight to nobody."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.data * 1000).to(torch.int32))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight / 1000, self.bias)


@pytest.fixture
def forward_only(monkeypatch: pytest.MonkeyPatch, mlp: MLP) -> MLP:
    def resolve(layer: nn.Module, **kwargs):
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, ForwardOnlyLinear) else None

    monkeypatch.setattr("peftx.tuners.layer.resolve_quantization_backend", resolve)
    mlp.lin1 = ForwardOnlyLinear(mlp.lin1)
    return mlp


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, about the stand-in
def test_forward_only_backend_refuses_to_merge(case: Case, forward_only: MLP) -> None:
    x = torch.randn(4, 12)
    plain = copy.deepcopy(forward_only)
    try:
        model = get_peft_model(forward_only, case.config(target_modules=TARGETS))
    except (TypeError, ValueError, NotImplementedError) as error:  # the method needs the weight itself
        assert "lin1" in str(error) and "gptq" in str(error)
        assert type(forward_only.lin0) is nn.Linear and torch.equal(forward_only(x), plain(x))
        return
    assert torch.equal(model(x), plain(x))
    randomize(model, case)
    unmerged = model(x)
    assert not torch.allclose(unmerged, plain(x))
    weight = layers_of(model)[0].base_layer.weight.clone()
    for merge in (model.merge_adapter, partial(model.merge_adapter, safe_merge=True), model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"(?s)gptq.*(unmerged|unquantised)"):
            merge()
    assert torch.equal(layers_of(model)[0].base_layer.weight, weight)
    assert torch.equal(model(x), unmerged)
    assert torch.equal(model.unload()(x), plain(x))
