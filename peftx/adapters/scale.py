"""The strength of adapters for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .adapter import Adapter


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
    adapters = {module: module.scale for module in model.modules() if isinstance(module, Adapter)}
    layers: dict[Any, dict] = {layer: dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)}
    if not adapters and not layers:
        raise ValueError("The model has no adapter whose scale could change.")
    try:
        for adapter, scale in adapters.items():
            adapter.scale = scale * multiplier
        for layer, scaling in layers.items():
            layer.scaling = {name: scale * multiplier for name, scale in scaling.items()}
        yield
    finally:
        for adapter, scale in adapters.items():
            adapter.scale = scale
        for layer, scaling in layers.items():
            layer.scaling = scaling
