"""PEFT's LoRA layers, asking the rule of an adapter for its delta too."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Embedding, Linear

from .mixed import by_adapter
from .products import onloaded


class VariantLayer:
    """Mixin for PEFT's LoRA layers: where a rule has a `delta_weight`, that is the adapter's, and not s B A."""

    lora_variant: dict[str, Any]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """W' - W, at least in fp32, in the layout of the base weight."""
        rule = self.lora_variant.get(adapter)
        if rule is not None and hasattr(rule, "delta_weight"):
            return rule.delta_weight(self, adapter)
        return super().get_delta_weight(adapter)  # type: ignore[misc]

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        layer: Any = self
        factors, rules = layer.lora_A, self.lora_variant
        if not all(hasattr(rules.get(name), "kept") for name in adapter_names if name in factors):
            # plain LoRA, or one of PEFT's own variants
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc]

        def adapt(name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
            if name not in factors:
                return result
            x = x.to(factors[name].weight.dtype)
            return rules[name].forward(layer, active_adapter=name, x=x, result=result).to(result.dtype)

        kwargs = {key: value for key, value in kwargs.items() if key not in VARIANT_KWARG_KEYS}
        return by_adapter(adapter_names, adapt, x, layer.base_layer(x, *args, **kwargs))


class VariantLinear(VariantLayer, Linear):
    """PEFT's LoRA layer over nn.Linear or transformers' Conv1D."""


class VariantEmbedding(Embedding):
    """PEFT's LoRA layer over nn.Embedding; nobody calls the containers of its factors, so it fetches offloaded ones."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with onloaded(self.lora_embedding_A, self.lora_embedding_B):
            return super().forward(*args, **kwargs)
