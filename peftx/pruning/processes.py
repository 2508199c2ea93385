"""Several processes that share the samples: what they add up, and how none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed


def agree(failure: Exception | None, count: int, world: int, reduce: Callable[[Tensor], Tensor]) -> float:
    """The sum of the processes' counts. All call it before what all must reach: where one has failed, all raise."""
    if world == 1:
        if failure is not None:
            raise failure
        return count
    failed, counted = reduce(torch.tensor([float(failure is not None), count], dtype=torch.float64)).tolist()
    if failed:
        raise failure or RuntimeError("scoring failed on another process; its error says why")
    return counted


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes of `torch.distributed`."""
    device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    tensor = tensor.to(device)
    distributed.all_reduce(tensor)
    return tensor.cpu()


def synchronise(model: torch.nn.Module, accelerator: Any) -> None:
    """What trains gets the first process's values, as DDP will give it soon: an adapter's start is random."""
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                value = parameter.data.to(accelerator.device)  # DeepSpeed moves the model later
                distributed.broadcast(value, src=0)
                parameter.data.copy_(value)
