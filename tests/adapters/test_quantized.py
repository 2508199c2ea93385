"""Quantised bases: bitsandbytes' real CPU kernels (8-bit, nf4 and fp4, with and without double quantisation), and a
backend that can only compute forward. Every oracle starts from an untouched copy of the quantised model."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import MLP, Case, adapted, randomize, tuner_layers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

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


class Net(nn.Module):
    """Two quantised layers and a plain head; bitsandbytes' AVX512 kernels want 64 k inputs and 32 k outputs."""

    def __init__(self, make: Callable[[int, int], nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.lin0 = quantize(nn.Linear(64, 128, dtype=dtype), make)
        self.lin1 = quantize(nn.Linear(128, 32, dtype=dtype), make)
        self.head = nn.Linear(32, 4, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def quantize(linear: nn.Linear, make: Callable[[int, int], nn.Module]) -> nn.Module:
    linear.weight.data *= torch.linspace(0.2, 2, linear.out_features)[:, None]  # scales that must not be mixed up
    layer = make(linear.in_features, linear.out_features).to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # bitsandbytes quantises when a layer is moved to a device


def dequantize(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer that has not been called yet (inference on AVX512 repacks it for another kernel)."""
    return resolve_quantization_backend(layer).get_base_weight(layer).float()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=list(LINEAR))
def base(request: pytest.FixtureRequest, dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net(LINEAR[request.param](dtype), dtype).eval()


@pytest.fixture
def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """One input for each quantised layer."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, width, generator=generator).to(dtype) for width in (64, 128)]


def attach(base: Net, case: Case, *names: str) -> PeftModel:
    """A copy of `base` with adapters on its quantised layers."""
    return adapted(copy.deepcopy(base), case, *names, target_modules=TARGETS)


def layers_of(model: nn.Module) -> list[BaseTunerLayer]:
    return list(tuner_layers(model).values())


def merged(layer: BaseTunerLayer, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out_features, in_features) with an adapter merged in."""
    if isinstance(layer, peftx.AdapterLayer):
        return layer.adapters[adapter_name].apply_delta(weight)
    return layer.lora_variant[adapter_name].merge_safe(layer, adapter_name, weight)


def quantized_of(model: nn.Module) -> list[nn.Module]:
    return [layer.get_base_layer() for layer in layers_of(model)]


def close(actual: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors differ by at most 16 roundings of the largest entry in `dtype` (that of `actual`)."""
    tolerance = 16 * torch.finfo(dtype or actual.dtype).eps * max(1.0, wanted.abs().max().item())
    return (actual.double() - wanted.double()).abs().max().item() <= tolerance


def rounding(layer: nn.Module) -> torch.Tensor:
    """The quantisation error of a weight, (out, in), is at most this: half a step.

    int8: a 254th of the row's maximum (codes are -127..127), and the rounding to fp16 that precedes it. 4 bits: half
    the widest gap of the code book times the block's maximum, and what that maximum itself loses: double quantisation
    stores it in 8 bits, as a deviation from the mean, to within 1 % of the largest deviation.
    """
    weight = dequantize(layer)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return weight.abs().amax(1, keepdim=True).expand_as(weight) * (1 / 254 + 2**-11)
    state = layer.weight.quant_state
    half_gap = state.code.sort().values.diff().max() / 2
    absmax, lost = state.absmax, 0.0
    if state.nested:
        deviation = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
        absmax, lost = deviation + state.offset, 0.01 * deviation.abs().max()
    return (half_gap * absmax + lost).repeat_interleave(state.blocksize).view_as(weight)


def test_starts_as_the_quantized_base(case: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    x = inputs[0]
    for training in (True, False):
        model = get_peft_model(copy.deepcopy(base), case.config(target_modules=TARGETS))
        assert len(layers_of(model)) == 2
        actual, wanted = model.train(training)(x), base.train(training)(x)
        assert torch.equal(actual, wanted) if case.info.exact_start else close(actual, wanted)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_adds_the_delta(mergeable: Case, base: Net, inputs: list[torch.Tensor], training: bool) -> None:
    base, model = base.train(training), attach(base, mergeable).train(training)
    kernel = None if training else torch.bfloat16  # at inference on AVX512, 4-bit scales are rounded to bf16
    for plain, layer, x in zip((base.lin0, base.lin1), layers_of(model), inputs, strict=True):
        change = x.double() @ layer.get_delta_weight("default").double().T
        assert change.abs().max() > 0.1
        assert close(layer(x), plain(x).double() + change, kernel)


def test_gradients_reach_adapter_and_input(case: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    model = attach(base, case).train()
    layer = layers_of(model)[0]
    upstream = torch.randn(4, 3, 128, generator=torch.Generator().manual_seed(2)).to(inputs[0].dtype)
    x, reference = inputs[0].clone().requires_grad_(), inputs[0].clone().requires_grad_()
    with torch.enable_grad():
        layer(x).backward(upstream)
        base.lin0.train()(reference).backward(upstream)
    assert not torch.equal(x.grad, reference.grad)
    if case.info.mergeable:
        assert close(x.grad, reference.grad.double() + upstream.double() @ layer.get_delta_weight("default").double())
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in trained)


def test_training_goes_on_after_an_evaluation(case: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    fresh, evaluated = (attach(base, case) for _ in range(2))
    evaluated(inputs[0])
    for model in (fresh, evaluated):
        with torch.enable_grad():
            model.train()(inputs[0]).float().square().mean().backward()
    for wanted, parameter in zip(fresh.parameters(), evaluated.parameters(), strict=True):
        if parameter.requires_grad:  # scales of a 4-bit weight were rounded to bf16 on the way
            assert (parameter.grad - wanted.grad).norm() <= 0.05 * wanted.grad.norm()


def test_evaluating_and_training_leave_the_base_alone(case: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    model, outputs = attach(base, case), []
    for _ in range(5):
        outputs.append((model.eval()(inputs[0]), model.train()(inputs[0])))
    assert torch.equal(outputs[0][1], outputs[-1][1])  # the first evaluation may repack a 4-bit weight, and no other
    assert torch.equal(outputs[1][0], outputs[-1][0])


@pytest.mark.parametrize("evaluated", [False, True], ids=["", "evaluated"])
def test_merge_writes_the_quantized_sum(
    mergeable: Case, base: Net, inputs: list[torch.Tensor], evaluated: bool
) -> None:
    model = attach(base, mergeable)
    before = [dequantize(layer) for layer in quantized_of(model)]
    sums = [w + layer.get_delta_weight("default") for w, layer in zip(before, layers_of(model), strict=True)]
    if evaluated:
        model(inputs[0])
    model.merge_adapter(safe_merge=evaluated)

    for layer, x, wanted, was in zip(layers_of(model), inputs, sums, before, strict=True):
        stored = layer.get_base_layer()
        error = (dequantize(stored) - wanted).abs()
        # The base is read and written in the dtype of its weight; packing for AVX512 rounds its scales to bf16.
        slack = torch.finfo(torch.bfloat16 if evaluated else x.dtype).eps * wanted.abs().max()
        assert (error <= rounding(stored) + slack).all()
        assert (error < (dequantize(stored) - was).abs()).float().mean() > 0.5
        assert torch.equal(layer(x), stored(x))


def test_unmerge_returns_within_two_roundings(mergeable: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    model = attach(base, mergeable)
    model.merge_adapter()
    once = [rounding(layer).max() for layer in quantized_of(model)]
    model.unmerge_adapter()
    for plain, layer, bound, x in zip((base.lin0, base.lin1), layers_of(model), once, inputs, strict=True):
        stored, wanted = layer.get_base_layer(), dequantize(plain)
        # Where the delta depends on the weight, taking it out may widen the first error, by less than a half here.
        limit = 1.5 * bound + rounding(stored).max() + 2 * torch.finfo(x.dtype).eps * wanted.abs().max()
        assert (dequantize(stored) - wanted).abs().max() <= limit
        assert not layer.merged


def test_safe_merge_writes_nothing_when_a_layer_is_broken(mergeable: Case, base: Net) -> None:
    model = attach(base, mergeable)
    stored = [layer.weight.data.clone() for layer in quantized_of(model)]
    next(p for p in layers_of(model)[1].parameters() if p.requires_grad).data.fill_(float("nan"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
    assert all(torch.equal(layer.weight.data, was) for layer, was in zip(quantized_of(model), stored, strict=True))
    assert not any(layer.merged for layer in layers_of(model))


def test_merge_and_unload_gives_bitsandbytes_layers_back(
    mergeable: Case, base: Net, inputs: list[torch.Tensor]
) -> None:
    model = attach(base, mergeable)
    merged = copy.deepcopy(model).merge_and_unload()
    model.merge_adapter()
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(merged(inputs[0]), model(inputs[0]))


def test_unload_gives_the_base_back(case: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    unloaded = attach(base, case).unload()
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(unloaded(inputs[0]), base(inputs[0]))


def test_several_adapters_add_up(mergeable: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    base, model = base.train(), attach(base, mergeable, "first", "second").train()
    weight, plain = dequantize(base.lin0), base.lin0(inputs[0]).double()
    layer, x = layers_of(model)[0], inputs[0]
    first, second = (layer.get_delta_weight(name) for name in ("first", "second"))
    assert close(layer(x), plain + x.double() @ second.double().T)

    model.base_model.set_adapter(["first", "second"])
    both = merged(layer, "second", merged(layer, "first", weight)) - weight  # in order: they may compose
    assert close(layer(x), plain + x.double() @ both.double().T)
    assert (both - first).norm() > 0.5 * second.norm()

    model.delete_adapter("first")
    assert layer.active_adapters == ["second"] and close(layer(x), plain + x.double() @ second.double().T)
    with model.disable_adapter():
        assert torch.equal(layer(x), base.lin0(x))


def test_mixed_batch_equals_separate_rows(case: Case, base: Net, inputs: list[torch.Tensor]) -> None:
    model = attach(base, case, "first", "second")
    x, names = inputs[0], ["second", "__base__", "first", "second"]
    assert model(x, adapter_names=names).shape == (4, 3, 4)
    layer = layers_of(model.train())[0]
    mixed = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            layer.set_adapter([name])
        wanted = layer.base_layer(x) if name == "__base__" else layer(x)
        assert close(mixed[row], wanted[row])


def quantized_llama(path: Path, kind: str) -> nn.Module:
    """A tiny Llama as a user loads it: quantised by transformers."""
    quantization = {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }
    config = BitsAndBytesConfig(**quantization[kind])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(("kind", "low_cpu_mem_usage"), [("int8", False), ("int8", True), ("nf4", True)])
def test_trained_adapter_loads_onto_the_quantized_model(
    case: Case, llama_path: Path, tmp_path: Path, tokens: torch.Tensor, kind: str, low_cpu_mem_usage: bool
) -> None:
    model = prepare_model_for_kbit_training(quantized_llama(llama_path, kind), use_gradient_checkpointing=False)
    model = get_peft_model(model, case.config(target_modules="all-linear"))
    assert len(layers_of(model)) == 7
    randomize(model, case)
    with torch.enable_grad():
        model.train()(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    wanted = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)

    model = quantized_llama(llama_path, kind)
    assert not torch.allclose(model(tokens).logits, wanted, atol=0.1)
    model = PeftModel.from_pretrained(quantized_llama(llama_path, kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(model(tokens).logits, wanted)


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

    def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs):
        if isinstance(target, ForwardOnlyLinear):
            return GPTQLoraLinear(target, adapter_name, config=config, **kwargs)

    monkeypatch.setattr("peftx.adapters.sites.site.resolve_quantization_backend", resolve)
    monkeypatch.setattr("peftx.adapters.lora.resolve_quantization_backend", resolve)
    monkeypatch.setattr("peft.tuners.lora.model.dispatch_gptq", dispatch)
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
    assert torch.equal(model(x), plain(x)) if case.info.exact_start else close(model(x), plain(x))
    randomize(model, case)
    unmerged = model(x)
    assert not torch.allclose(unmerged, plain(x))
    weight = layers_of(model)[0].base_layer.weight.clone()
    reason = r"gptq.*merge into the unquantised" if case.info.mergeable else "cannot be merged"
    for merge in (model.merge_adapter, partial(model.merge_adapter, safe_merge=True), model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=reason):
            merge()
    assert torch.equal(layers_of(model)[0].base_layer.weight, weight)
    assert torch.equal(model(x), unmerged)
    assert torch.equal(model.unload()(x), plain(x))
