"""Modules that are trained whole, such as a new classifier, at a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer


class HeadTrainer(Trainer):
    """A Trainer whose optimizer has another learning rate for some parameters.

    Args:
        heads: the parameters.
        head_rate: their rate, which the schedule moves as it does the other; None for the same.

    Raises:
        ValueError: the optimizer does not hold these parameters (FSDP's are others).
    """

    def __init__(self, *args: Any, heads: Sequence[nn.Parameter] = (), head_rate: float | None = None, **more: Any):
        super().__init__(*args, **more)
        self.heads, self.head_rate = list(heads), head_rate

    def create_optimizer(self, *args: Any, **more: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **more)
        if new and self.head_rate is not None and self.heads:
            apart(optimizer, self.heads, self.head_rate)
        return optimizer


def apart(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Moves parameters into groups of their own, with all else as it was. Before the first step."""
    chosen = {id(parameter) for parameter in parameters}
    groups = list(optimizer.param_groups)
    for group in groups:
        names = group.get("param_names")  # of an optimizer that keeps them
        places = [i for i, parameter in enumerate(group["params"]) if id(parameter) in chosen]
        if not places:
            continue
        moved = [group["params"][i] for i in places]
        rest = {name: value for name, value in group.items() if name not in ("params", "param_names", "initial_lr")}
        new = moved if names is None else list(zip([names[i] for i in places], moved, strict=True))
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [value for i, value in enumerate(group[key]) if i not in places]
        optimizer.add_param_group({**rest, "params": new, "lr": rate})
        chosen -= {id(parameter) for parameter in moved}
    if chosen:
        raise ValueError("head_learning_rate: the optimizer does not hold the head's parameters as they are (FSDP?)")
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def heads_of(model: nn.Module, new_modules: Iterable[str]) -> list[nn.Parameter]:
    """Trained parameters of the modules that PEFT saves whole, or, without an adapter, of the new ones."""
    found = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    modules: list[nn.Module] = [*found] or [model.get_submodule(name) for name in new_modules]
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())
