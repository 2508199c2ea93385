"""Fused experts of a mixture whose stacks are products of two thin ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.experts import routed
from ..adapters.sites.experts import Routing, grouped
from .stacks import Stack

GUARD = 2  # rows and columns of what stands where the dense stack was
OWN = frozenset(vars(nn.Module())) | {"forward", "observe", "_hf_hook", "_old_forward"}  # of an instance, or put there


class LowRankStack(nn.Module):
    """`down` (E, rank, in_features) and `up` (E, rank, out_features): y = x down^T up for each row's expert.

    The rank is nowhere the last axis, which grouped products want to be aligned, so that any rank will do.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features, self.rank = experts, in_features, out_features, rank
        where: dict[str, Any] = {"device": device or torch.get_default_device(), "dtype": dtype}
        for part, shape in self.sizes().items():
            self.register_parameter(part, nn.Parameter(torch.empty(shape, **where)))

    @classmethod
    def like(cls, stack: Stack, rank: int) -> LowRankStack:
        """Empty factors of `rank` for a stack: its sizes, device and dtype."""
        there = stack.parameter
        return cls(stack.experts, stack.in_features, stack.out_features, rank, there.device, there.dtype)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Of both factors."""
        return {
            "down": (self.experts, self.rank, self.in_features),
            "up": (self.experts, self.rank, self.out_features),
        }

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, in_features), sorted by expert; (T, out_features)."""
        h = grouped(x, self.down, routing.offsets, inner=True)
        return grouped(h, self.up, routing.offsets, transposed=True, inner=True)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(E, out_features, in_features), multiplied expert by expert in at least fp32 and cast once."""
        weight = self.up.new_empty(self.experts, self.out_features, self.in_features)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for one, up, down in zip(weight, self.up, self.down, strict=True):
            one.copy_(up.to(wide).T @ down.to(wide))
        return weight

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"experts={self.experts}, {sizes}"


class LowRankExperts(nn.Module):
    """Experts of a mixture, computed by grouped products over the rows sorted by expert, as transformers' `grouped_mm`
    does, some or all of whose stacks are in `factors`, by the parameter's name. Biases, gate and norm are as they were.

    In the place of a dense stack is a buffer (E, 2, 2) of its name, a guard: a program that does not know this module
    expects the stack there, and stops at its size instead of going on with a random one.

    Args:
        experts: a module that transformers' `use_experts_implementation` decorates; its tensors are taken over.
    """

    is_transposed: bool
    factors: Any  # by name

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.kind: Any = type(experts)
        _take_over(self, experts)
        self.factors = nn.ModuleDict()

    def thin(self, name: str, factors: LowRankStack) -> None:
        """Puts factors in the place of a dense stack, which is let go."""
        dense = getattr(self, name)
        self.factors[name] = factors.train(self.training)
        delattr(self, name)
        self.register_buffer(name, dense.new_zeros(len(dense), GUARD, GUARD))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes: hidden_states (T, hidden), top_k_index and top_k_weights (T, k); (T, hidden)."""
        return routed(self, {}, hidden_states, top_k_index, top_k_weights)

    def product(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """Of rows x (T, in_features), sorted by expert, with the stack that was or is a parameter of this name."""
        if name in self.factors:
            return self.factors[name](x, routing)
        return grouped(x, getattr(self, name), routing.offsets, transposed=self.is_transposed)

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self.kind._apply_gate(self, x)

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The module as it was before, with the product of its factors.

        Raises:
            ValueError: something is on the factors.
        """
        stacks = dict(self.factors.items())
        if any(type(stack) is not LowRankStack for stack in stacks.values()):
            raise ValueError("its factors are wrapped or quantised: merge the adapter first")
        made: Any = self.kind.__new__(self.kind)
        nn.Module.__init__(made)
        _take_over(made, self, without={"factors"})
        for name, stack in stacks.items():
            weight = stack.dense()
            delattr(made, name)
            if self.is_transposed:
                weight = weight.mT.contiguous()
            made.register_parameter(name, nn.Parameter(weight, stack.up.requires_grad))
        return made


def put_thin(model: nn.Module, name: str, factors: LowRankStack) -> None:
    """Puts factors in the place of the stack that the model has under this name."""
    parent, _, key = name.rpartition(".")
    experts = model.get_submodule(parent)
    if not isinstance(experts, LowRankExperts):
        experts = LowRankExperts(experts)
        model.set_submodule(parent, experts)
    experts.thin(key, factors)


def _take_over(made: Any, other: nn.Module, without: frozenset[str] | set[str] = frozenset()) -> None:
    """Gives a module the attributes, parameters, buffers and submodules of another one."""
    vars(made).update({key: value for key, value in vars(other).items() if key not in OWN | {"kind"}})
    made.training = other.training
    for name, parameter in other._parameters.items():
        made.register_parameter(name, parameter)
    for name, buffer in other._buffers.items():
        made.register_buffer(name, buffer, name not in other._non_persistent_buffers_set)
    for name, module in other._modules.items():
        if name not in without:
            made.add_module(name, module)
