"""The tuner layer of all methods that own their tensors: a layer of the base model with its adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr
from torch import nn

from .adapter import Adapter, is_dense
from .mixed import by_adapter
from .products import at_least_fp32, base_weight, kept, onloaded, unobserved, unpack
from .sites import Site, site_of
from .weighted import LowRank

PORTING = (
    "A method is a subclass of `peftx.Adapter` now, one module for one adapter of one layer: what was "
    "`create(adapter_name, config)` is its constructor, `self.krona_A[adapter_name]` is `self.A`, and "
    "`adapter_layer_names` is gone. See the section 'Porting a method' of CONTRIBUTING.md."
)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Wraps a layer of the base model and holds its adapters, in one ModuleDict called `<method>_adapter`.

    `peftx.register` makes a subclass for each `Adapter` class; nobody else has to.

    Args:
        base_layer: the layer to wrap; it may be a tuner layer itself.
        adapter_name: name of the first adapter.
        config: its config, resolved for this module.
        options: passed to `site_for`: those of PEFT's `resolve_quantization_backend`.

    Raises:
        TypeError: the base layer is of a type the method does not support.
    """

    adapter_cls: ClassVar[type[Adapter]]
    by_site: ClassVar[dict[type[Site], type[AdapterLayer]]] = {}
    experts_cls: ClassVar[Any] = None  # the class of a layer over fused experts, where the method has linear ones

    base_layer: nn.Module
    kept: dict[Any, Any] | None = None  # what is made of the weights, within `peftx.inference`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "adapter_cls"):
            raise TypeError(f"{cls.__name__} is written for an earlier peftx. {PORTING}")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any):
        super().__init__()
        self.base_layer = base_layer
        self.site = self.site_for(self.get_base_layer(), **options)
        self.quantization_backend = self.site.backend
        self.in_features, self.out_features = self.site.in_features, self.site.out_features
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @classmethod
    def site_for(cls, base_layer: nn.Module, **quantization_kwargs: Any) -> Site:
        """The site that the method's adapters have on a layer; errors as for the class."""
        return site_of(base_layer, cls.adapter_cls.sites, **quantization_kwargs)

    @classmethod
    def make_adapter(cls, site: Any, config: Any) -> Adapter:
        return LowRank(site, config) if config.combined_rank else cls.adapter_cls(site, config)

    @classmethod
    def over(cls, base_layer: nn.Module, **quantization_kwargs: Any) -> type[AdapterLayer]:
        """The class of a layer over this one: PEFT's `"all-linear"` knows linear ones by the name of their class."""
        return cls.by_site.get(type(cls.site_for(base_layer, **quantization_kwargs)), cls)

    @property
    def adapters(self) -> Any:
        """The adapters by name."""
        return self._modules[self.adapter_layer_names[0]]

    def present(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the names that have an adapter in this layer."""
        adapters = self.adapters
        return [name for name in adapter_names if name in adapters]

    def train(self, mode: bool = True) -> AdapterLayer:
        if mode and self.quantization_backend is not None:
            unpack(self.site.base)
        return super().train(mode)

    # Adapters

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Adds an adapter; where that fails, the layer is left as it was."""
        self.adapters[adapter_name] = self.make_adapter(self.site, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def copy_adapter(self, source: str, target: str) -> None:
        """Makes the adapter `target` a copy of `source`, buffers and scale included; neither is trained less."""
        if source in self.adapters:
            old, adapter = self.adapters[source], self.adapters[target]
            new = copy.deepcopy(old, {id(self.site): self.site, id(old.config): adapter.config})
            for parameter, former in zip(new.parameters(), adapter.parameters(), strict=True):
                parameter.requires_grad_(former.requires_grad)
            self.adapters[target] = new

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT moves all to the device and dtype of the base. Buffers keep their dtype: an offset rounded to bf16 would
        # no longer cancel what it offsets.
        adapter, device = self.adapters[adapter_name], device or self.site.device
        if device is None or any(parameter.is_meta for parameter in adapter.parameters()):
            return
        adapter.to(device)
        for owner in adapter.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.dtype != self.site.dtype:
                    cast = nn.Parameter(parameter.data.to(self.site.dtype), requires_grad=parameter.requires_grad)
                    setattr(owner, name, cast)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT calls this after whatever makes adapters trainable.
        for adapter in self.adapters.values():
            for name in adapter.frozen:
                adapter.get_parameter(name).requires_grad_(False)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies the adapter's delta by `scale` (initially 1)."""
        if adapter_name in self.adapters:
            self.adapters[adapter_name].scale = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of all active adapters by `scale`."""
        for name in self.present(self.active_adapters):
            self.adapters[name].scale *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of all active adapters by `scale`, or resets it to 1."""
        for name in self.present(self.active_adapters):
            self.adapters[name].scale = 1.0 if scale is None else self.adapters[name].scale / scale

    # Forward

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if adapter_names is not None:
            adapter_names = self.site.samples(adapter_names, x)
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        adapters = [self.adapters[name] for name in self.present(self.active_adapters)]
        if self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        if not is_dense(adapters, self.site.tokens(x)):
            result = self.base_layer(x, *args, **kwargs)
            if adapters[0].joins and not adapters[0].drops and unobserved(adapters[0]):
                weight = base_weight(self.base_layer, x, result)
                if weight is not None:
                    first, *adapters = adapters
                    result = first(x, result.detach(), weight)
            return added(adapters, x, result)
        if self._is_plain:
            return self._projected(adapters, x)
        return self._adapt(adapters, x, self.base_layer(x, *args, **kwargs))

    def _projected(self, adapters: Sequence[Adapter], x: torch.Tensor) -> torch.Tensor:
        """What the layer computes with the adapted weight in the place of its own."""
        weight = kept(self, (self._state(adapters), x.dtype), lambda: adapted(adapters, self.site.weight()).to(x.dtype))
        return self.site.project(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    @property
    def _is_plain(self) -> bool:
        """Whether the base layer computes nothing but `site.project(x, weight, bias)`, and nobody watches it do so."""
        return type(self.base_layer) in self.site.layer_types and unobserved(self.base_layer)

    def _adapt(self, adapters: Sequence[Adapter], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The base layer's output `result` for `x`, with the contributions of the adapters."""
        if is_dense(adapters, self.site.tokens(x)):
            return self.site.add_dense(kept(self, self._state(adapters), lambda: self._change(adapters)), x, result)
        return added(adapters, x, result)

    @staticmethod
    def _state(adapters: Sequence[Adapter]) -> tuple[Any, ...]:
        """What the dense weight depends on beside the tensors."""
        return tuple((adapter, adapter.scale) for adapter in adapters)

    def _change(self, adapters: Sequence[Adapter]) -> torch.Tensor:
        weight = at_least_fp32(self.site.weight())
        return adapted(adapters, weight) - weight

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
        tokens = self.site.tokens(x) // max(len(x), 1)
        keys = [self._batched(name, tokens) for name in adapter_names]
        own = {key for key in {*keys} if self._is_own(key, tokens * keys.count(key))}

        def whole(key: Any, x: torch.Tensor) -> torch.Tensor:
            return self._projected([self.adapters[key]], x) if key in own else self.base_layer(x, *args, **kwargs)

        def adapt(key: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
            if key is None or key in own:
                return result
            adapters = [self.adapters[name] for name, other in zip(adapter_names, keys, strict=True) if other == key]
            if isinstance(key, str):
                return self._adapt(adapters[:1], x, result)
            with onloaded(*adapters):
                return self.adapter_cls.add_rows(adapters, x, result)

        result = by_adapter([key if key in own else None for key in keys], whole, x)
        return by_adapter(keys, adapt, x, result)

    def _batched(self, name: str, tokens: int) -> Any:
        """What the rows of an adapter in a mixed batch, of so many tokens each, share with those that are computed
        with them: its name, or of those that `add_rows` takes together what they have in common; None of no adapter."""
        if name not in self.adapters:
            return None
        shared = self.adapters[name].shares(tokens)
        return name if shared is None else (shared,)

    def _is_own(self, key: Any, tokens: int) -> bool:
        """Whether an adapter's own weight takes the place of the base's for its rows of a mixed batch."""
        return isinstance(key, str) and self._is_plain and is_dense([self.adapters[key]], tokens)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the base weight, in the given order.

        Args:
            safe_merge: refuse a result that is not finite in the dtype of the weight, which is written only then.
            adapter_names: default: the active adapters.

        Raises:
            ValueError: the merged weight is not finite (`safe_merge`).
            NotImplementedError: the adapter is no weight delta, or the quantised base layer cannot be written.
        """
        self.check_mergeable()
        names = self.present(check_adapters_to_merge(self, adapter_names))
        if names:
            self._write(self.merged_weight(names, check=safe_merge))
            self.merged_adapters.extend(names)
            self.site.merged.extend(self.adapters[name] for name in names)

    @torch.no_grad()
    def merged_weight(self, adapter_names: Sequence[str], check: bool = False) -> torch.Tensor:
        """The base weight with the adapters merged in, (out_features, in_features), at least in fp32; a new tensor."""
        self.check_mergeable()
        stored = self.site.weight()
        weight = at_least_fp32(stored)
        for name in adapter_names:
            weight = adapted([self.adapters[name]], weight)
            if check and not torch.isfinite(weight.to(stored.dtype)).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return weight

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Raises ValueError where merging these adapters would give NaNs or infinities."""
        self.merged_weight(adapter_names, check=True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes all merged adapters out of the base weight again, the last merged first."""
        self.check_mergeable()
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.site.unmerged_weight()
        self.merged_adapters.clear()
        self.site.merged.clear()
        self._write(weight)

    def check_delta(self) -> None:
        """Raises NotImplementedError, with the reason and the way out, where an adapter is no weight delta."""
        if reason := self.adapter_cls.no_delta:
            method = next((adapter.config.peft_type.value for adapter in self.adapters.values()), type(self).__name__)
            raise NotImplementedError(
                f"{method} adapters cannot be merged or converted to LoRA: {reason}. Keep the adapter attached "
                "for inference, or call `unload()` to get the base model back."
            )

    def check_mergeable(self) -> None:
        """Raises NotImplementedError, with the reason and the way out, where the weight cannot be written."""
        self.check_delta()
        self.site.check_writable()

    def _write(self, weight: torch.Tensor) -> None:
        dtype = self.site.weight().dtype
        self.set_base_weight(self.site.laid_out(weight).to(dtype).contiguous())

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The delta in the layout of the base weight and at least in fp32 (PEFT's name for it)."""
        self.check_delta()
        adapter = self.adapters[adapter_name]
        return self.site.laid_out(adapter.scale * at_least_fp32(adapter.delta_weight()))

    def lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter, see `Adapter.lora_factors`; errors as there, or the reason why there is no delta."""
        self.check_delta()
        self.site.check_lora(self.adapters[adapter_name].config.peft_type.value)
        return self.adapters[adapter_name].lora_factors()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Asked by PEFT's `convert_to_lora`, whose own error does not say why; the tuner's method answers False."""
        self.check_delta()
        return self.site.linear

    # Representation

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "peftx." + super().__repr__()


def added(adapters: Sequence[Adapter], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The base layer's output `result` for `x` with the contributions of the adapters, one after the other."""
    for adapter in adapters:
        result = adapter(x, result)
    return result


def adapted(adapters: Sequence[Adapter], weight: torch.Tensor) -> torch.Tensor:
    """The weight with the adapters' changes, one after the other, at least in fp32."""
    weight = at_least_fp32(weight)
    for adapter in adapters:
        with onloaded(adapter):
            weight = adapter.apply_delta(weight)
    return weight
