"""PEFT's LoRA layers over bitsandbytes' ones; imported only where there is such a layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import bnb

from ..tuners.gradnormlorp import DecomposedLayer
from .layer import unpack


class Linear4bit(bnb.Linear4bit):
    """PEFT's layer, which also reads, trains and merges a base weight that was laid out anew for an evaluation."""

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


class DecomposedLinear4bit(DecomposedLayer, Linear4bit):
    """GradNormLoRP's layer over a 4-bit one."""


class DecomposedLinear8bit(DecomposedLayer, bnb.Linear8bitLt):
    """GradNormLoRP's layer over an 8-bit one."""


DECOMPOSED = {Linear4bit: DecomposedLinear4bit, bnb.Linear8bitLt: DecomposedLinear8bit}
