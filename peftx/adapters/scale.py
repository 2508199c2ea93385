"""The strength of adapters for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .layer import AdapterLayer


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """While active, all adapters of a model act `multiplier` times as strongly; afterwards exactly as before.

    As `peft.helpers.rescale_adapter_scale`, which knows LoRA's layers only, for the methods of both families.

    Raises:
        TypeError: `multiplier` is no finite number.
        ValueError: the model has no adapter with a scale.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not math.isfinite(multiplier):
        raise TypeError(f"`multiplier` must be a finite number, got {multiplier!r}.")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, (AdapterLayer, LoraLayer))]
    if not layers:
        raise ValueError("The model has no layer with adapters whose scale could change.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = {name: scale * multiplier for name, scale in scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
