"""Convolutions of one to three axes, with any groups, stride, dilation and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..products import would_round
from .site import Site


class ConvSite(Site):
    layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    shown = "nn.Conv1d, nn.Conv2d, nn.Conv3d"

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.base.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.base.kernel_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features // self.groups, *self.kernel

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.base._conv_forward(x, weight, bias)  # stride, padding of every mode, dilation, groups

    def tokens(self, x: torch.Tensor) -> int:
        return x.numel() // (self.in_features * math.prod(self.base.stride))

    def add_dense(self, delta: torch.Tensor, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result + self.project(x, delta.to(x.dtype)).to(result.dtype)

    def reduces_first(self, ranks: Sequence[int]) -> bool:
        reduced, direct = self._costs(ranks)
        return reduced < direct

    def cost(self, ranks: Sequence[int]) -> int:
        return min(self._costs(ranks))

    def _costs(self, ranks: Sequence[int]) -> tuple[int, int]:
        """Multiply-adds for one output position: reducing the channels before the convolution, or by it."""
        r1, r2, *spatial = ranks
        kernel, r = math.prod(self.kernel), min(r2, r1 * math.prod(spatial))
        reduced = self.in_features * math.prod(self.base.stride) * r1 + self.groups * kernel * r1 * r2
        return reduced + r2 * self.out_features, self.in_features * kernel * r + r * self.out_features

    def reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return pointwise(factor.to(x.dtype).expand(self.groups, -1, -1), x, len(self.kernel))

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.project(x, torch.cat([weight.to(x.dtype)] * self.groups))

    def accumulate(
        self, result: torch.Tensor, h: torch.Tensor, factor: torch.Tensor, scale: float = 1.0
    ) -> torch.Tensor:
        return pointwise(factor.to(h.dtype).unflatten(0, (self.groups, -1)), h, len(self.kernel), result, scale)

    def check_dense_kernel(self) -> None:
        if max(self.base.dilation) > 1 or self.base.padding_mode != "zeros":
            raise TypeError(
                f"PEFT's LoRA for convolutions ignores dilation={self.base.dilation} and padding_mode="
                f"{self.base.padding_mode!r} of the layer. Use FLoRA, which has both, or leave the module out by "
                "`exclude_modules`."
            )

    def check_lora(self, method: str) -> None:
        groups, dilation, padding = self.groups, self.base.dilation, self.base.padding_mode
        reasons = {
            "connects every input channel to every group and cannot be merged": groups > 1,
            "ignores the dilation of the base layer": max(dilation) > 1,
            "ignores the padding_mode of the base layer": padding != "zeros",
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            raise NotImplementedError(
                f"{method} has no exact LoRA form for a {type(self.base).__name__} with groups={groups}, "
                f"dilation={dilation} and padding_mode={padding!r}: PEFT's LoRA for convolutions {reason}. "
                f"Keep the {method} adapter, or merge it into the base model by `merge_and_unload`."
            )


def pointwise(
    weight: torch.Tensor, x: torch.Tensor, axes: int, result: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """A convolution with 1 x 1 kernels in groups, added to `result` in the same product.

    Shapes: weight (groups, out / groups, in / groups), x (batch, in, *`axes` axes); out and in may be repeated.
    """
    out, channels = weight.shape[1:]
    flat = x.reshape(-1, channels, math.prod(x.shape[-axes:]))  # (batch * groups, channels, positions)
    weight = weight.expand(len(flat) // len(weight), -1, -1, -1).flatten(0, 1)
    shape = (*x.shape[: -axes - 1], x.shape[-axes - 1] // channels * out, *x.shape[-axes:])
    if result is None:
        return torch.bmm(weight, flat).view(shape)
    if would_round(result):
        return result + (scale * torch.bmm(weight, flat)).view(shape).to(result.dtype)
    base = result.reshape(len(flat), out, flat.shape[-1])
    return torch.baddbmm(base, weight.to(result.dtype), flat.to(result.dtype), alpha=scale).view(shape)
