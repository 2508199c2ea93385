"""Fused experts of a mixture as layers: each stacked weight is as many linear layers as there are experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..adapters import ExpertsSite
from ..adapters.experts import check_experts
from ..utils import innermost


class Stack(ExpertsSite):
    """One stacked weight of experts that transformers' `use_experts_implementation` decorates.

    Args:
        outer: what the model calls: the experts, or an adapter's layer over them.
        name: of the parameter.
    """

    def __init__(self, outer: nn.Module, name: str) -> None:
        super().__init__(innermost(outer), name)
        self.outer = outer

    @property
    def parameter(self) -> nn.Parameter:
        """(E, out_features, in_features), or with the last two swapped, as it is stored."""
        return getattr(self.base, self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, out_features, in_features)."""
        return self.experts, self.out_features, self.in_features

    def problem(self) -> str | None:
        """Why it is no stack of ordinary weights, if it is not."""
        try:
            check_experts(self.base, self.name)
        except TypeError as error:
            return str(error)
        if self.parameter.dtype.itemsize < 2:
            return f"{self.name} of a {type(self.base).__name__} is quantised to {self.parameter.dtype}."
        return None


def stacks_in(outer: nn.Module, name: str) -> Iterator[tuple[str, Stack]]:
    """Those of an experts module, under adapters or not, by name; none of another module, or of a compressed one.

    Args:
        name: of `outer` in the model.
    """
    base = innermost(outer)
    if hasattr(base, "is_transposed") and hasattr(base, "_apply_gate") and not hasattr(base, "factors"):
        for key, parameter in base.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield f"{name}.{key}", Stack(outer, key)


def other_stacks(model: nn.Module) -> Iterator[str]:
    """Names of what looks like stacks of experts in a module that transformers does not decorate as such."""
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        if isinstance(count, int) and not hasattr(module, "_apply_gate"):
            for key, parameter in module.named_parameters(name, recurse=False):
                if parameter.ndim == 3 and len(parameter) == count:
                    yield key


Layer = nn.Module | Stack  # what `target_layers` finds


def called(layer: Layer) -> nn.Module:
    """The module that is called for a layer."""
    return layer.outer if isinstance(layer, Stack) else layer
