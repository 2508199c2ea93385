"""What adapters make from their weights is kept for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .adapter import Adapter
from .layer import AdapterLayer
from .lora import Variant


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """While active, a model with adapters only infers, and what its adapters make of their weights is made once.

    Attached adapters read their weights in every forward, since a weight can change in ways that nobody sees. Some make
    much of them: GradNormLoRP the norms of all rows, Bone's `"bat"` a dense weight, Compacter its two projections,
    TriAdaptLoRA the product of B and its core. Here these are made at their first use and kept until the end, so that a
    decoded token costs about what LoRA's does.

        with peftx.inference(model):
            model.generate(**inputs)

    Inside, the model is in evaluation mode and gradients are off. Do not change its weights; adapters may be added,
    switched, disabled, merged and mixed in a batch. What is kept takes memory: of GradNormLoRP a number for each row,
    of TriAdaptLoRA r of them, of Compacter 2 d b numbers for each module, of `"bat"` a copy of each adapted weight, for
    each set of adapters that is used together.

    Args:
        model: a `PeftModel`, or any model with adapters.

    Raises:
        RuntimeError: inside, where the model is trained.
    """

    def refuse(module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            raise RuntimeError("Inside `peftx.inference(model)` the model cannot be trained. Leave the block first.")

    modes = {module: module.training for module in model.modules()}
    handle = model.register_forward_pre_hook(refuse)
    try:
        keep(model, True)
        with torch.no_grad():
            yield
    finally:
        handle.remove()
        keep(model, False)
        for module, training in modes.items():
            module.training = training


def keep(model: nn.Module, enable: bool) -> None:
    """Starts or ends keeping what adapters make of their weights."""
    if enable:
        model.eval()
    for module in model.modules():
        owners: list[Any] = [module] if isinstance(module, Adapter | AdapterLayer) else []
        if isinstance(module, LoraLayer):
            owners = [rule for rule in module.lora_variant.values() if isinstance(rule, Variant)]
        for owner in owners:
            owner.kept = {} if enable else None
