"""PEFT's LoRA on fused experts, factored: the delta of a stack is never built in a forward or backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .experts import Contribution, Routed, check_experts
from .products import at_least_fp32, onloaded
from .sites.experts import ExpertsSite, Routing


class FactoredParamWrapper(Routed, ParamWrapper):
    """PEFT's layer over a stacked parameter, which asks the rule of an adapter (`lora_variant`) for its delta too."""

    @cached_property
    def site(self) -> ExpertsSite:
        return ExpertsSite(self.get_base_layer(), self.parameter_name)

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (E, r, in) and B (E, out, r), as PEFT keeps them."""
        A: Any = self.lora_A[adapter_name].weight
        B: Any = self.lora_B[adapter_name].weight
        return self.stacked(A, B)

    def stacked(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (E, r, in) and (E, out, r) of what lies as PEFT's factors do, (E r, in) and (out, r E)."""
        return A.unflatten(0, (self.num_experts, -1)), B.unflatten(1, (-1, self.num_experts)).movedim(-1, 0)

    def rule(self, adapter_name: str) -> Any:
        """The adapter's training rule, a `Variant`, or None."""
        return self.lora_variant.get(adapter_name)

    def contribution(self, adapter_name: str) -> Contribution | None:
        return partial(self._contribute, adapter_name) if adapter_name in self.lora_A else None

    def _contribute(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor, routing: Routing) -> torch.Tensor:
        rule = self.rule(adapter_name)
        with self.site.routed(routing), onloaded(self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if rule is not None:
                return rule.over_experts(self, adapter_name, x, result)
            return add_low_rank(self, adapter_name, x, result)

    def present(self, adapter_names: Sequence[str]) -> list[str]:
        return [name for name in adapter_names if name in self.lora_A]

    def changed(self, adapter_name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        rule, delta = self.rule(adapter_name), self._delta(adapter_name, expert)
        return rule.change_expert(self, adapter_name, expert, weight, delta) if rule else weight + delta

    def restored(self, adapter_name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        rule, delta = self.rule(adapter_name), self._delta(adapter_name, expert)
        return rule.restore_expert(self, adapter_name, expert, weight, delta) if rule else weight - delta

    def _delta(self, adapter_name: str, expert: int) -> torch.Tensor:
        with onloaded(self.lora_A[adapter_name], self.lora_B[adapter_name]):
            A, B = (at_least_fp32(factor[expert]) for factor in self.factors(adapter_name))
        return self.scaling[adapter_name] * B @ A


def add_low_rank(layer: FactoredParamWrapper, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` with the contribution of a plain LoRA."""
    A, B = layer.factors(adapter_name)
    return layer.site.accumulate(result, layer.site.reduce(x, A), B, layer.scaling[adapter_name])


FactoredParamWrapper.__name__ = "ParamWrapper"  # by which PEFT knows a layer over a parameter


def fast_experts(model: nn.Module, enable: bool = True) -> int:
    """Lets PEFT's own LoRA on fused experts (`target_parameters`) compute with its factors, on this instance only.

    PEFT adds the dense delta to the whole stack of experts in every forward. Factored, the same adapter gives the same
    output up to rounding (1e-5), and a decoded token costs about as much as without it. Training, merging, saving and
    loading are as before; nothing is patched.

    Args:
        model: a `PeftModel`, or any model with such layers.
        enable: False gives PEFT's own forward back.

    Returns:
        The number of layers that have changed.

    Raises:
        ValueError: the model has no LoRA on fused experts that can be factored.
    """
    layers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    fits = [layer for layer in layers if is_stack(layer)]
    if not fits:
        raise ValueError(
            "The model has no LoRA on fused experts: `LoraConfig(target_parameters=[...])` puts one there, on experts "
            "that transformers decorates by `use_experts_implementation`."
        )
    former, kind = (ParamWrapper, FactoredParamWrapper) if enable else (FactoredParamWrapper, ParamWrapper)
    changed = [layer for layer in fits if type(layer) is former and not layer.lora_variant]
    for layer in changed:
        layer.__class__ = kind
    return len(changed)


def is_stack(layer: ParamWrapper) -> bool:
    try:
        check_experts(layer.get_base_layer(), layer.parameter_name)
    except TypeError:
        return False
    return True
