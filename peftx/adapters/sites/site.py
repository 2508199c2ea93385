"""The interface of all sites, and the choice of one for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn

from ..products import accumulate, at_least_fp32, onloaded, unpack


class Site:
    """A layer of the base model as its adapters see it: its shape, what it computes, how its weight is read.

    A weight is (out_features, in_features) here, followed by the kernel axes of a convolution, whatever the layout in
    which the layer keeps it. A method writes its delta against three steps, of which a linear layer needs the last two:
    `reduce` mixes the input's channels into fewer, `apply` computes what the layer does with a thinner weight, and
    `accumulate` adds the result to the layer's output through a second thin factor.

    Args:
        base: the layer, under all tuner layers.
        backend: PEFT's for a quantised layer, else None.

    Attributes:
        merged: adapters whose change is in the layer's weight now, in the order of their merging.
        in_features, out_features: of an embedding the number of rows and their length, of a convolution its channels.
    """

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    shown: ClassVar[str] = ""  # in errors
    transposed = False  # whether the layer keeps its weight as (in_features, out_features)
    linear = False  # whether its weight is one matrix that multiplies the input
    groups = 1
    in_features: int
    out_features: int

    def __init__(self, base: nn.Module, backend: QuantizationBackend | None = None) -> None:
        self.base: Any = base
        self.backend = backend
        self.merged: list[Any] = []
        self.in_features, self.out_features = _get_in_out_features(base)  # type: ignore[assignment]

    @classmethod
    def takes(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        return isinstance(base, cls.layer_types)

    # The weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the weight's axes: output, input (of one group), kernel axes."""
        return self.out_features, self.in_features

    @property
    def modes(self) -> tuple[int, ...]:
        """The same with the input first."""
        out, channels, *kernel = self.shape
        return channels, out, *kernel

    @property
    def device(self) -> torch.device | None:
        return getattr(self._stored, "device", None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that PEFT gives to new adapter tensors here before it decides on upcasting them."""
        dtype = getattr(self.base, "compute_dtype", None) or getattr(self._stored, "dtype", None)
        return dtype if dtype is not None and dtype.is_floating_point else torch.float32

    @property
    def _stored(self) -> torch.Tensor | None:
        return getattr(self.base, "weight", getattr(self.base, "qweight", None))

    def weight(self) -> torch.Tensor:
        """The weight as it stands, dequantised and onloaded if need be; not a copy."""
        if self.backend is not None:
            unpack(self.base)
            weight = self.backend.get_base_weight(self.base)
        elif self.base.weight.is_meta:  # offloaded, or never loaded
            with onloaded(self.base):
                weight = self.base.weight.data
        else:
            weight = self.base.weight.data
        return weight.T if self.transposed else weight

    def bias(self) -> torch.Tensor | None:
        """The bias, onloaded if need be."""
        with onloaded(self.base):
            return self.base.bias

    def unmerged_weight(self) -> torch.Tensor:
        """The weight without the adapters that are merged into it, at least in fp32."""
        weight = at_least_fp32(self.weight())
        for adapter in reversed(self.merged):
            weight = adapter.remove_delta(weight)
        return weight

    def laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out_features, in_features) in the layout of the layer."""
        return weight.T if self.transposed else weight

    # What the layer does

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer computes with this weight and bias."""
        raise NotImplementedError

    def samples(self, adapter_names: list[str], x: torch.Tensor) -> list[str]:
        """The adapter of each row of `x`, in a batch whose samples have those named."""
        return adapter_names

    def tokens(self, x: torch.Tensor) -> int:
        """How many times the input `x` makes the layer use its weight."""
        raise NotImplementedError

    def add_dense(self, delta: torch.Tensor, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The output `result` for `x` with the contribution of a dense delta of the weight."""
        return accumulate(result, x, delta.T.to(result.dtype))

    def reduces_first(self, ranks: Sequence[int]) -> bool:
        """Whether a Tucker delta of these ranks (one a mode) is cheaper, or only possible, by `reduce` first."""
        return False

    def cost(self, ranks: Sequence[int]) -> int:
        """Multiply-adds of a Tucker delta of these ranks for one use of the weight."""
        return min(ranks) * (self.in_features + self.out_features)

    def reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The input with its channels (of each group) mixed by `factor` (r, in_features)."""
        raise NotImplementedError

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the layer does with the weight (r, channels, kernel axes), without a bias; x has so many channels."""
        raise NotImplementedError

    def accumulate(
        self, result: torch.Tensor, h: torch.Tensor, factor: torch.Tensor, scale: float = 1.0
    ) -> torch.Tensor:
        """`result` with `scale` times the r channels of `h` mixed into the output's by `factor` (out_features, r)."""
        return accumulate(result, h, factor.T, scale)

    def per_row(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the layer, or, of a stack of experts (E, ...), of each row's expert."""
        return values

    # What it can do

    def check_lora(self, method: str) -> None:
        """Raises NotImplementedError where PEFT's LoRA for this layer cannot be what a low-rank delta is here."""

    def check_dense_kernel(self) -> None:
        """Raises TypeError where PEFT's LoRA computes something else than a change of this layer's weight."""

    def check_writable(self) -> None:
        """Raises NotImplementedError, with the reason and the way out, where the weight cannot be written."""
        if self.backend is not None and not self.backend.supports_merge:
            raise NotImplementedError(
                f"Cannot merge into {type(self.base).__name__}: {self.backend.backend_name} layers cannot be "
                "dequantised and written again. Keep the adapter unmerged, or merge into the unquantised model."
            )


def site_of(base: nn.Module, kinds: Sequence[type[Site]], **quantization_kwargs: Any) -> Site:
    """The site of a layer, of one of the given kinds.

    Args:
        base: the layer, under all tuner layers.
        kinds: in the order in which they are asked.
        quantization_kwargs: for PEFT's `resolve_quantization_backend`.

    Raises:
        TypeError: none of the kinds takes it.
    """
    backend = resolve_quantization_backend(base, **quantization_kwargs)
    for kind in kinds:
        if kind.takes(base, backend):
            return kind(base, backend)
    raise unsupported(base, ", ".join(kind.shown for kind in kinds))


def unsupported(base_layer: nn.Module, supported: str) -> TypeError:
    return TypeError(
        f"{type(base_layer).__name__} is not supported, only {supported} are. "
        "Name other modules in `target_modules`, or leave this one out by `exclude_modules`."
    )
