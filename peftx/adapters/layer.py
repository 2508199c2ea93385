"""The tuner layer shared by all methods that own their tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .config import AdapterConfig
from .tuner import AdapterModel, forget, unsupported


def accumulate(result: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`result + scale * h @ weight` as one product, without a further pass over `result`.

    Shapes: result (..., n), h (..., r), weight (r, n). The sum has result's dtype.
    """
    device = result.device.type
    if torch.is_autocast_enabled(device) and result.dtype != torch.get_autocast_dtype(device):
        return result + (scale * (h @ weight)).to(result.dtype)  # addmm would round `result` to the autocast dtype
    # Autograd takes the layout of its two products from that of `weight`; skinny ones are up to 3x faster row-major.
    h, weight = h.to(result.dtype), weight.to(result.dtype).contiguous()
    flat = result.reshape(-1, result.shape[-1])
    return torch.addmm(flat, h.reshape(-1, h.shape[-1]), weight, alpha=scale).view(result.shape)


def unobserved(module: nn.Module) -> bool:
    """Whether nobody would notice if the module's parameters were used without calling it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, in fp32 where its own dtype is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unpack(base_layer: Any) -> None:
    """Restores the usual layout of a 4-bit weight that bitsandbytes laid out anew; others are left alone.

    On CPUs with AVX512-BF16 it does so at the first evaluation; read or trained in that layout the weight is noise.
    """
    # `state_dict()` restores the usual layout in place, except that the scales of a weight without double quantisation
    # stay transposed. Each round costs precision, so this one is the last.
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base_layer.state_dict()
        base_layer.support_avx512bf16_for_cpu = False
        state = base_layer.weight.quant_state
    if state is not None and not getattr(state, "packing_format_for_cpu", False) and state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def check_writable(layer: BaseTunerLayer) -> None:
    """Raises NotImplementedError, with the reason and the way out, where the base weight cannot be written."""
    backend = layer.quantization_backend
    if backend is not None and not backend.supports_merge:
        raise NotImplementedError(
            f"Cannot merge into {type(layer.get_base_layer()).__name__}: {backend.backend_name} layers cannot be "
            "dequantised and written again. Keep the adapter unmerged, or merge into the unquantised model."
        )


class FrozenDict(BufferDict):
    """Frozen tensors keyed by adapter name; each of them is saved with the adapter or not."""

    def set(self, adapter_name: str, tensor: torch.Tensor, persistent: bool) -> None:
        self.register_buffer(adapter_name, tensor, persistent=persistent)

    def __setitem__(self, adapter_name: str, tensor: torch.Tensor) -> None:
        self.set(adapter_name, tensor, persistent=adapter_name not in self._non_persistent_buffers_set)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Wraps a layer and adapts it; here a linear one: nn.Linear, transformers' Conv1D, or a quantised linear.

    A method subclasses this and says which tensors an adapter owns and what they do:

    - `adapter_layer_names`: names of the trainable tensors; each becomes an `nn.ParameterDict` keyed by adapter name;
    - `frozen_names`: names of the frozen tensors; each becomes a `FrozenDict`;
    - `create(adapter_name, config)`: makes and initialises the tensors. With `config.init_weights=True` the adapted
      layer must equal the base layer bit for bit;
    - `delta_weight(adapter_name)`: the dense weight delta, (out_features, in_features);
    - `add_delta(adapter_name, x, result)`: adds the adapter's contribution to the output (default: by the dense delta);
    - `lora_factors(adapter_name)`: the delta as a LoRA, where it is exactly one;
    - `no_delta`: where an adapter is no change of the weight, the reason. It defines `add_delta` then, which may also
      read the base layer's output, `result`; there is no `delta_weight`, and merging is refused with the reason.

    A method for other layers (see FLoRA) says which by `layer_types`, returns the class for each from `for_base_layer`,
    and in that class overrides `project`, `add_dense` and `_tokens`, which are those of a linear layer here.

    Everything else (several adapters, merging, quantised bases, mixed batches, dtypes, deletion, saving) is here.
    Config values of an adapter, resolved for this module, are in `self.adapter_config[adapter_name]`.

    Args:
        base_layer: the layer to wrap; it may be a tuner layer itself.
        adapter_name: name of the first adapter.
        config: its config, resolved for this module.
        quantization_kwargs: passed to PEFT's `resolve_quantization_backend`.

    Raises:
        TypeError: the base layer is of a type the method does not support.
    """

    model_cls: ClassVar[type[BaseTuner]] = AdapterModel
    no_delta: ClassVar[str] = ""
    frozen_names: ClassVar[tuple[str, ...]] = ()
    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    supported: ClassVar[str] = "nn.Linear, transformers' Conv1D and quantised linear layers"

    base_layer: nn.Module
    in_features: int
    out_features: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.other_param_names = (*cls.frozen_names, "scaling", "adapter_config")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdapterConfig, **quantization_kwargs: Any):
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization_kwargs)
        self.check_base_layer(base)
        self.in_features, self.out_features = _get_in_out_features(base)  # type: ignore[assignment]
        self.scaling: dict[str, float] = {}
        self.adapter_config: dict[str, Any] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.frozen_names:
            setattr(self, name, FrozenDict(persistent=True))
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # What a method defines

    def create(self, adapter_name: str, config: Any) -> None:
        raise NotImplementedError

    def delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Dense weight delta (out_features, in_features), without `self.scaling`."""
        raise NotImplementedError

    def add_delta(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The output with the adapter's contribution. Shapes: x (..., in_features), result (..., out_features)."""
        return self.add_dense(self.scaling[adapter_name] * self.delta_weight(adapter_name), x, result)

    def apply_delta(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (out_features, in_features) with the adapter merged in; a new tensor."""
        return weight + self.scaling[adapter_name] * self.delta_weight(adapter_name).to(weight.dtype)

    def remove_delta(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        """Inverse of `apply_delta`."""
        return weight - self.scaling[adapter_name] * self.delta_weight(adapter_name).to(weight.dtype)

    def lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in_features) and B (out_features, r) with B A equal to the delta.

        Raises:
            NotImplementedError: the delta has no such factors.
        """
        self.check_delta()
        raise NotImplementedError(f"{type(self).__name__} has no exact LoRA form for adapter {adapter_name!r}.")

    def prefers_dense(self, adapter_name: str, tokens: int) -> bool:
        """Whether the adapted weight should be built for an input of `tokens` rows, instead of calling `add_delta`."""
        return False

    def prepare_load(self, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Called with an adapter's tensors from a file, by attribute name, before they are loaded; may refuse them by a
        ValueError, or replace them in `tensors`."""

    # The base layer

    @classmethod
    def for_base_layer(cls, base_layer: nn.Module) -> type[AdapterLayer]:
        """The class that wraps `base_layer`; a method with one class for each layer type overrides this."""
        return cls

    def check_base_layer(self, base_layer: nn.Module) -> None:
        backend = self.quantization_backend
        if isinstance(base_layer, self.layer_types) or (backend is not None and backend.layer_type == "linear"):
            return
        raise unsupported(base_layer, self.supported)

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What a base layer of `layer_types` computes, with `weight` (out_features, in_features) and `bias`."""
        return F.linear(x, weight, bias)

    def add_dense(self, delta: torch.Tensor, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The output `result` for `x` with the contribution of a dense delta (out_features, in_features)."""
        return accumulate(result, x, delta.T.to(result.dtype))

    def _tokens(self, x: torch.Tensor) -> int:
        """How many times the input `x` makes the base layer use its weight."""
        return x.numel() // max(x.shape[-1], 1)

    @property
    def _transposed(self) -> bool:
        return isinstance(self.get_base_layer(), (Conv1D, nn.Embedding))

    @property
    def _plain(self) -> bool:
        """Whether the base layer computes nothing but `project(x, weight, bias)` and nobody watches it do so."""
        return type(self.base_layer) in self.layer_types and unobserved(self.base_layer)

    def get_base_weight(self) -> torch.Tensor:
        unpack(self.get_base_layer())
        return super().get_base_weight()

    def train(self, mode: bool = True) -> AdapterLayer:
        if mode and self.quantization_backend is not None:
            unpack(self.get_base_layer())
        return super().train(mode)

    def base_weight(self) -> torch.Tensor:
        """The base weight as it stands, (out_features, in_features), dequantised if need be; not a copy."""
        weight = self.get_base_weight()
        return weight.T if self._transposed else weight

    def unmerged_weight(self) -> torch.Tensor:
        """The base weight without the adapters that are merged into it, at least in fp32."""
        weight = at_least_fp32(self.base_weight())
        for name in reversed(self.merged_adapters):
            weight = self.remove_delta(name, weight)
        return weight

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The dtype PEFT gives to new adapter tensors of this layer before it decides on upcasting them."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else torch.float32

    # Adapters

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Adds an adapter; where that fails, the layer is left as it was."""
        is_new = adapter_name not in self.adapter_config
        try:
            self.create(adapter_name, config)
        except Exception:
            if is_new:
                forget(self, adapter_name)
            raise
        self.scaling[adapter_name] = 1.0
        self.adapter_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def freeze(self, adapter_name: str, *names: str) -> None:
        """Keeps the named tensors of an adapter frozen whatever becomes active."""
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: names}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT moves to the device and dtype of the base. Frozen tensors keep their dtype: an offset rounded to bf16
        # would no longer cancel what it offsets.
        dtypes = {
            name: getattr(self, name)[adapter_name] for name in self.frozen_names if adapter_name in getattr(self, name)
        }
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, tensor in dtypes.items():
            frozen = getattr(self, name)
            frozen[adapter_name] = tensor.to(frozen[adapter_name].device)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies the adapter's delta by `scale` (initially 1)."""
        if adapter_name in self.scaling:
            self.scaling[adapter_name] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of all active adapters by `scale`."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of all active adapters by `scale`, or resets it to 1."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _present(self, adapter_names: Sequence[str]) -> list[str]:
        return [name for name in adapter_names if name in self.adapter_config]

    # Forward

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        names = self._present(self.active_adapters)
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self._plain and self._dense(names, x):
            weight = self._adapted_weight(names, self.base_weight())
            return self.project(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return self._adapt(names, x, self.base_layer(x, *args, **kwargs))

    def _dense(self, names: Sequence[str], x: torch.Tensor) -> bool:
        tokens = self._tokens(x)
        return any(self.prefers_dense(name, tokens) for name in names)

    def _adapted_weight(self, names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        weight = at_least_fp32(weight)
        for name in names:
            weight = self.apply_delta(name, weight)
        return weight

    def _adapt(self, names: Sequence[str], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The base layer's output `result` for `x`, with the contributions of the adapters `names`."""
        if self._dense(names, x):
            weight = at_least_fp32(self.base_weight())
            return self.add_dense(self._adapted_weight(names, weight) - weight, x, result)
        for name in names:
            result = self.add_delta(name, x, result)
        return result

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in self._present(list(dict.fromkeys(adapter_names))):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            result = result.index_copy(0, rows, self._adapt([name], x[rows], result[rows]))
        return result

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the base weight, in the given order.

        Args:
            safe_merge: refuse a result that is not finite. The base weight is written only after the check.
            adapter_names: default: the active adapters.

        Raises:
            ValueError: the merged weight is not finite (`safe_merge`).
            NotImplementedError: the adapter is no weight delta, or the quantised base layer cannot be written.
        """
        self.check_mergeable()
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if names:
            self._write_weight(self.merged_weight(names, check=safe_merge))
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def merged_weight(self, adapter_names: Sequence[str], check: bool = False) -> torch.Tensor:
        """The base weight with the adapters merged in, (out_features, in_features), at least in fp32; a new tensor."""
        self.check_mergeable()
        weight = at_least_fp32(self.base_weight())
        for name in adapter_names:
            weight = self.apply_delta(name, weight)
            if check and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes all merged adapters out of the base weight again, the last merged first."""
        self.check_mergeable()
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.unmerged_weight()
        self.merged_adapters.clear()
        self._write_weight(weight)

    def check_delta(self) -> None:
        """Raises NotImplementedError, with the reason and the way out, where an adapter is no weight delta."""
        if self.no_delta:
            method = next((config.peft_type.value for config in self.adapter_config.values()), type(self).__name__)
            raise NotImplementedError(
                f"{method} adapters cannot be merged or converted to LoRA: {self.no_delta}. Keep the adapter attached "
                "for inference, or call `unload()` to get the base model back."
            )

    def check_mergeable(self) -> None:
        """Raises NotImplementedError, with the reason and the way out, where the weight cannot be written."""
        self.check_delta()
        check_writable(self)

    def _write_weight(self, weight: torch.Tensor) -> None:
        dtype = self.get_base_weight().dtype
        self.set_base_weight((weight.T if self._transposed else weight).to(dtype).contiguous())

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The delta in the layout of the base weight and at least in fp32 (PEFT's name for it)."""
        self.check_delta()
        delta = self.scaling[adapter_name] * at_least_fp32(self.delta_weight(adapter_name))
        return delta.T if self._transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Asked by PEFT's `convert_to_lora`, whose own error does not say why; the tuner's method answers False."""
        self.check_delta()
        return True

    # Representation

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "peftx." + super().__repr__()
