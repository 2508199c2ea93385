"""The layer that two thin factors make in the place of a dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LowRankLinear(nn.Module):
    """y = up(down(x)) + bias: `down` (rank, in) and `up` (out, rank) are ordinary `nn.Linear`, the bias is up's.

    Adapters go on `down` and `up`. The one-element buffer `weight` is a guard: a program that does not know this layer
    expects a dense `weight` of that name, and stops at its size instead of going on with a random one. It also tells
    dtype and device to code that asks the weight for them.

    Args:
        conv1d: whether the dense layer was transformers' `Conv1D` (GPT-2), which `dense` then makes again.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device or torch.get_default_device(), "dtype": dtype}
        # Memory only: nothing is drawn for numbers that are about to be replaced.
        self.down = nn.utils.skip_init(nn.Linear, in_features, rank, bias=False, **where)
        self.up = nn.utils.skip_init(nn.Linear, rank, out_features, bias=bias, **where)
        self.register_buffer("weight", torch.zeros(1, **where))
        self.conv1d = conv1d

    @classmethod
    def like(cls, layer: Any, rank: int) -> LowRankLinear:
        """Empty factors of `rank` for a `Linear` or `Conv1D`: its shape, bias, device, dtype and mode."""
        out_features, in_features = shape_of(layer)
        made = cls(
            in_features,
            out_features,
            rank,
            bias=layer.bias is not None,
            conv1d=isinstance(layer, Conv1D),
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        return made.train(layer.training)

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The `Linear` (or `Conv1D`) with weight up @ down, multiplied in at least fp32 and cast once."""
        if type(self.up) is not nn.Linear or type(self.down) is not nn.Linear:
            raise ValueError("its factors are wrapped or quantised: merge the adapter first")
        up, down = self.up.weight, self.down.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        weight = (up.to(wide) @ down.to(wide)).to(up.dtype)
        with torch.device("meta"):
            made: nn.Module = (
                Conv1D(self.out_features, self.in_features)
                if self.conv1d
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        made.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight, up.requires_grad)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def shape_of(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a `Linear`, also a quantised one, or `Conv1D`."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
