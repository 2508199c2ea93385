"""PEFT's LoRA layers, asking the rule of an adapter for its delta too."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear

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


class VariantLinear(VariantLayer, Linear):
    """PEFT's LoRA layer over nn.Linear or transformers' Conv1D."""


class VariantEmbedding(Embedding):
    """PEFT's LoRA layer over nn.Embedding; nobody calls the containers of its factors, so it fetches offloaded ones."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with onloaded(self.lora_embedding_A, self.lora_embedding_B):
            return super().forward(*args, **kwargs)
