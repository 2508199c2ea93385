"""From a gradient to what Adam sees of it, and from Adam's direction to the new weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import projection
from .state import working_dtype

GROWTH = 1.01  # APOLLO's limit to the growth of an update's norm from one step to the next
Lane = tuple[torch.Tensor, torch.Tensor, Callable[[], Any] | None]


def plain(p: torch.Tensor) -> Lane:
    """Gradient, target and what to do at the end, for a parameter that moves by the direction itself."""
    gradient, target = p.grad.contiguous(), p.detach().contiguous()  # type: ignore[union-attr]
    return gradient, target, None if p.is_contiguous() else functools.partial(p.copy_, target)


def project(p: torch.Tensor, state: dict[str, Any], group: Mapping[str, Any], decay: float, lr: float) -> Lane:
    """The same for a projected parameter, whose direction has to be lifted when it is complete."""
    gradient = projection.lay(p.grad).to(working_dtype(p.dtype))  # type: ignore[arg-type]
    basis = state["basis"].to(gradient.dtype)
    low = basis.T @ gradient
    weight, step, update = projection.lay(p.detach()), lr * group["scale"], group["update"]
    if update == "galore":
        return low, low, functools.partial(lower, weight, basis, low, decay, step)
    direction = torch.empty_like(low)

    def finish() -> None:
        lifted = lift(basis, direction, low, gradient, update)
        if update == "apollo":
            limit_growth(lifted, state["norm"])
        descend([weight], [lifted], decay, step)

    return low, direction, finish


def lower(weight: torch.Tensor, basis: torch.Tensor, direction: torch.Tensor, decay: float, step: float) -> None:
    """weight = decay * weight - step * Q D, in place, rounded once."""
    if weight.dtype == basis.dtype:
        weight.addmm_(basis, direction, beta=decay, alpha=-step)
    else:
        descend([weight], [basis @ direction], decay, step)


def lift(
    basis: torch.Tensor, direction: torch.Tensor, low: torch.Tensor, gradient: torch.Tensor, update: str
) -> torch.Tensor:
    """APOLLO's or FRUGAL's full update (short, long), from D and R (rank, long) and the gradient G (short, long)."""
    if update == "apollo":
        peak = low.abs().amax(0)
        peak = peak.masked_fill(peak == 0, 1)
        norm = peak * (low / peak).norm(dim=0)  # whose squares cannot overflow
        return gradient * (direction.norm(dim=0) / norm.masked_fill(norm == 0, 1))
    rest = gradient - basis @ low
    return torch.addmm(rest.sign() if update == "frugal-sign" else rest, basis, direction)


def limit_growth(update: torch.Tensor, norm: torch.Tensor) -> None:
    """Shrinks an update whose norm exceeds 1.01 times that of the last one, which `norm` (0-dim) holds."""
    found = update.norm()
    allowed = torch.where(norm > 0, torch.minimum(found, GROWTH * norm), found)
    update.mul_(allowed / found.masked_fill(found == 0, 1))
    norm.copy_(allowed)


def descend(weights: list[torch.Tensor], directions: list[torch.Tensor], decay: float, step: float) -> None:
    """weight = decay * weight - step * direction, rounded once. Weights of one dtype, directions fp32 or fp64."""
    if weights[0].dtype == directions[0].dtype:
        if decay != 1:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, directions, alpha=-step)
        return
    for weight, direction in zip(weights, directions, strict=True):
        weight.copy_(weight.to(working_dtype(weight.dtype)).mul_(decay).add_(direction, alpha=-step))
