"""Whether a model's parameters are in shards."""

from __future__ import annotations

import torch
from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP (1 or 2) or tensor parallelism holds parameters of the model in shards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
        isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()
    )


def refuse_shards(model: nn.Module, method: str, reason: str) -> None:
    """Raises RuntimeError, with the reason and the way out, where the model is sharded."""
    if is_sharded(model):
        raise RuntimeError(
            f"{method} cannot train sharded parameters (FSDP, tensor parallelism): {reason}. Train with DDP, or on one "
            "device, or with a method whose rule reads no other parameter (`peftx.methods()`)."
        )
