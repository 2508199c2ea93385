"""How much memory an optimizer's states take, and in which form they are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All plain tensors in nested mappings, sequences and tensor subclasses that consist of tensors."""
    if isinstance(value, torch.Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None or type(value) is torch.Tensor:
            yield value
        else:
            yield from tensors([getattr(value, name) for name in inner()[0]])
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state of any optimizer; one that several states share counts once.

    States are made at the first step (`LowRankAdamW.allocate_states` makes them earlier).
    """
    found = {id(tensor): tensor for state in optimizer.state.values() for tensor in tensors(state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


@dataclass(frozen=True)
class StateSummary:
    """Counts of tensors by the form of their moments, and bytes.

    Attributes:
        eight_bit, full: tensors with 8-bit and with 32-bit moments.
        small: those of `full` that `optim_bits=8` left alone because of `min_8bit_size`.
        projected: tensors with a projected gradient, of either width; `rotated` of them at full rank, so to no gain.
        bytes: of all states (`state_bytes`). adamw_bytes: what two fp32 moments of the same parameters would take.
    """

    eight_bit: int
    full: int
    small: int
    projected: int
    rotated: int
    bytes: int
    adamw_bytes: int

    def __str__(self) -> str:
        small = f" ({self.small} of them smaller than min_8bit_size)" if self.small else ""
        rotated = f" ({self.rotated} of them at full rank, which saves nothing)" if self.rotated else ""
        share = 1 - self.bytes / self.adamw_bytes if self.adamw_bytes else 0.0
        return (
            f"{self.eight_bit} tensors with 8-bit states, {self.full} with 32-bit states{small}, {self.projected} "
            f"projected{rotated}; {_megabytes(self.bytes)} instead of fp32 AdamW's {_megabytes(self.adamw_bytes)} "
            f"({share:.1%} saved)"
        )


def summarize(optimizer: torch.optim.Optimizer) -> StateSummary:
    """The form of a `LowRankAdamW`'s states as they are now; parameters that have made no step are not counted."""
    rows = [
        (p, group, optimizer.state[p])
        for group in optimizer.param_groups
        for p in group["params"]
        if optimizer.state.get(p)
    ]
    eight = [state["exp_avg"].dtype == torch.uint8 for _, _, state in rows]
    bases = [state["basis"] for _, _, state in rows if "basis" in state]
    return StateSummary(
        eight_bit=sum(eight),
        full=len(rows) - sum(eight),
        small=sum(group["optim_bits"] == 8 and not is_8 for (_, group, _), is_8 in zip(rows, eight, strict=True)),
        projected=len(bases),
        rotated=sum(basis.shape[0] == basis.shape[1] for basis in bases),
        bytes=state_bytes(optimizer),
        adamw_bytes=sum(8 * p.numel() for p, _, _ in rows),
    )


def log_summary(optimizer: torch.optim.Optimizer, logger: logging.Logger) -> None:
    """One line: INFO, or WARNING where 8 bits were asked for and no tensor has them."""
    found = summarize(optimizer)
    level = logging.WARNING if found.small and not found.eight_bit else logging.INFO
    hint = "; pass min_8bit_size=0 to quantise small tensors too" if found.small else ""
    logger.log(level, "%s: %s%s", type(optimizer).__name__, found, hint)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
