"""PEFT's LoRA layers over bitsandbytes' ones; imported only where there is such a layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import bnb

from .lora_layers import VariantLayer
from .products import unpack


class Linear4bit(VariantLayer, bnb.Linear4bit):
    """It also reads, trains and merges a base weight that was laid out anew for an evaluation."""

    def get_base_weight(self) -> torch.Tensor:
        unpack(self.get_base_layer())
        return super().get_base_weight()

    def train(self, mode: bool = True) -> Linear4bit:
        if mode:
            unpack(self.get_base_layer())
        return super().train(mode)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        unpack(self.get_base_layer())
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        unpack(self.get_base_layer())
        super().unmerge()


class Linear8bit(VariantLayer, bnb.Linear8bitLt):
    """As PEFT's."""


LAYERS = {bnb.Linear4bit: Linear4bit, bnb.Linear8bitLt: Linear8bit}
