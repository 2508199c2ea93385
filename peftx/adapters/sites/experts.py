"""Fused experts of a mixture: one parameter that stacks the weights of E linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from ..products import accumulate, onloaded, would_round
from .linear import LinearSite
from .site import Site

ALIGNED = 16  # bytes: torch's grouped product wants rows that are a multiple


class Routing(NamedTuple):
    """Rows that are sorted by the expert that they go to.

    Attributes:
        experts: (T,) the expert of each row, ascending.
        offsets: (E,) int32, where the rows of each expert end.
    """

    experts: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, experts: torch.Tensor, count: int) -> Routing:
        ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True)
        return cls(experts, ends.to(torch.int32))


def grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    inner: bool = False,
) -> torch.Tensor:
    """Each row of x (T, in) times its expert's matrix of weight (E, out, in), or, if it is transposed, (E, in, out),
    plus its row of bias (T, out).

    Args:
        inner: whether the axis of weight before the last one is between two such products, which align their results.
    """
    # Torch's own product is for 16 and 32 bits, and aligned rows; on CPUs it spends as much on an expert without rows
    # as on one with few.
    odd = any(size * weight.itemsize % ALIGNED for size in weight.shape[2 if inner else 1 :])
    idle = x.device.type == "cpu" and 0 < len(x) < len(offsets) and not torch.compiler.is_compiling()
    # Compiled, transformers has an operator for all but bf16, where a loop here would break the graph.
    general = torch.compiler.is_compiling() and weight.dtype != torch.bfloat16
    if general or (weight.dtype != torch.float64 and not (odd or idle)):
        return _grouped_linear(x, weight, bias=bias, offs=offsets, is_transposed=transposed)
    x, matrices = x.to(weight.dtype), weight if transposed else weight.mT
    parts = [x[rows] @ matrices[expert] for expert, rows in segments(offsets)]
    result = torch.cat(parts) if parts else x @ matrices[0]
    return result if bias is None else result + bias


def segments(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, with those."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


class ExpertsSite(LinearSite):
    """The stack as a whole. Factors are those of a linear layer with a leading axis of experts, or, where all experts
    share them, without; the weight that `apply` takes has the experts last, as a convolution's has its kernel.

    Args:
        base: a module that transformers' `use_experts_implementation` decorates.
        name: of the parameter: (E, out_features, in_features), or, where `base.is_transposed`, the last two swapped.

    Attributes:
        routing: of the rows that an adapter works on, while it does.
    """

    routing: Routing | None = None

    def __init__(self, base: nn.Module, name: str) -> None:
        self.base: Any = base
        self.name = name
        self.backend = None
        self.merged: list[Any] = []
        self.experts, *sizes = self._stored.shape
        self.in_features, self.out_features = sizes if self.transposed else sizes[::-1]

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        return self.base.is_transposed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features, self.experts

    @property
    def _stored(self) -> torch.Tensor:
        return getattr(self.base, self.name)

    def weight(self) -> torch.Tensor:
        """(E, out_features, in_features)."""
        with onloaded(self.base):
            weight = self._stored.data
        return weight.mT if self.transposed else weight

    def laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.mT if self.transposed else weight

    def at(self, expert: int) -> ExpertSite:
        """The linear layer of one expert."""
        return ExpertSite(self, expert)

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """While active, rows are those of this routing."""
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    def per_row(self, values: torch.Tensor) -> torch.Tensor:
        return values.index_select(0, self.routing.experts)  # type: ignore[union-attr]

    def row_bias(self) -> torch.Tensor | None:
        """The bias of each row's expert (T, out_features)."""
        bias = getattr(self.base, f"{self.name}_bias", None)
        return None if bias is None else self.per_row(bias)

    def few(self, x: torch.Tensor) -> bool:
        """Whether to take the matrices of the rows x alone, as in decoding, and not to lay out all of them anew."""
        return len(x) < self.experts

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each row of x (T, in) times its expert's matrix of weight (E, out, in), or times one of all (out, in)."""
        weight = weight.to(x.dtype)
        if weight.ndim == 2:
            return x @ weight.T
        if self.few(x):
            return torch.bmm(self.per_row(weight), x[..., None])[..., 0]
        rows, columns = (-size % (ALIGNED // x.element_size()) for size in weight.shape[1:])
        if rows or columns:
            weight, x = F.pad(weight, (0, columns, 0, rows)), F.pad(x, (0, columns))
        elif 1 not in weight.stride()[1:]:
            weight = weight.contiguous()
        result = grouped(x, weight, self.routing.offsets)  # type: ignore[union-attr]
        return result[:, : result.shape[1] - rows] if rows else result

    def reduces_first(self, ranks: Sequence[int]) -> bool:
        return True

    def reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.product(x, factor)

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.product(x, weight.movedim(-1, 0))

    def accumulate(
        self, result: torch.Tensor, h: torch.Tensor, factor: torch.Tensor, scale: float = 1.0
    ) -> torch.Tensor:
        if factor.ndim == 2:
            return accumulate(result, h, factor.T, scale)
        if not self.few(h) or would_round(result):
            return result + self.product(scale * h, factor).to(result.dtype)
        h, factor = h.to(result.dtype), self.per_row(factor).to(result.dtype)
        return torch.baddbmm(result[..., None], factor, h[..., None], alpha=scale)[..., 0]


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` decorates the module's class."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


class MixtureSite(Site):
    """Fused experts as one block, which adapters sit behind. It has no weight."""

    shown = "fused experts"

    def __init__(self, base: nn.Module, backend: Any = None) -> None:
        self.base: Any = base
        self.backend = None
        self.merged: list[Any] = []
        self.in_features = self.out_features = base.down_proj.shape[-1 if base.is_transposed else -2]  # type: ignore

    @classmethod
    def takes(cls, base: nn.Module, backend: Any) -> bool:
        return is_experts(base) and isinstance(base.down_proj, nn.Parameter)

    @property
    def _stored(self) -> torch.Tensor:
        return self.base.down_proj

    def tokens(self, x: torch.Tensor) -> int:
        return len(x)

    def samples(self, adapter_names: list[str], x: torch.Tensor) -> list[str]:
        repeats, rest = divmod(len(x), len(adapter_names))
        return adapter_names if rest else [name for name in adapter_names for _ in range(repeats)]


class ExpertSite(LinearSite):
    """One expert of a stack, as a linear layer."""

    transposed = False

    def __init__(self, stack: ExpertsSite, expert: int) -> None:
        self.stack, self.expert = stack, expert
        self.base, self.backend = stack.base, None
        self.in_features, self.out_features = stack.in_features, stack.out_features

    @property
    def merged(self) -> list[Any]:  # type: ignore[override]
        return [adapter.at(self.expert) for adapter in self.stack.merged]

    @property
    def _stored(self) -> torch.Tensor:
        return self.stack._stored

    def weight(self) -> torch.Tensor:
        return self.stack.weight()[self.expert]

    def bias(self) -> torch.Tensor | None:
        bias = getattr(self.base, f"{self.stack.name}_bias", None)
        return None if bias is None else bias[self.expert]
