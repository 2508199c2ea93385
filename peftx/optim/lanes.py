"""From a gradient to what Adam sees of it, and from Adam's direction to the new weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import projection, rounding
from .moments import span_of
from .state import working_dtype

GROWTH = 1.01  # APOLLO's limit to the growth of an update's norm from one step to the next
Lane = tuple[torch.Tensor, torch.Tensor, Any]  # the last: a call, an `Apollo`, or None


def plain(p: torch.Tensor) -> Lane:
    """Gradient, target and what to do at the end, for a parameter that moves by the direction itself."""
    gradient, target = p.grad.contiguous(), p.detach().contiguous()  # type: ignore[union-attr]
    return gradient, target, None if p.is_contiguous() else functools.partial(p.copy_, target)


def project(
    p: torch.Tensor, state: dict[str, Any], group: Mapping[str, Any], decay: float, lr: float, seed: int | None
) -> Lane:
    """The same for a projected parameter, whose direction has to be lifted when it is complete.

    `seed`, here and below: of the stochastic rounding of the weight; None: to the nearest.
    """
    gradient = projection.lay(p.grad).to(working_dtype(p.dtype))  # type: ignore[arg-type]
    basis = state["basis"].to(gradient.dtype)
    low = basis.T @ gradient
    weight, step, update = projection.lay(p.detach()), lr * group["scale"], group["update"]
    if update == "galore":
        return low, low, functools.partial(lower, weight, basis, low, decay, step, seed)
    direction = torch.empty_like(low)
    if update == "apollo":
        return low, direction, Apollo(weight, gradient, low, direction, state["norm"], step, seed)

    def finish() -> None:
        descend([weight], [lift(basis, direction, low, gradient, update)], decay, step, [seed])

    return low, direction, finish


def lower(
    weight: torch.Tensor, basis: torch.Tensor, direction: torch.Tensor, decay: float, step: float, seed: int | None
) -> None:
    """weight = decay * weight - step * Q D, in place, rounded once."""
    if weight.dtype == basis.dtype:
        weight.addmm_(basis, direction, beta=decay, alpha=-step)
    else:
        descend([weight], [basis @ direction], decay, step, [seed])


def lift(
    basis: torch.Tensor, direction: torch.Tensor, low: torch.Tensor, gradient: torch.Tensor, update: str
) -> torch.Tensor:
    """FRUGAL's full update (short, long), from D and R (rank, long) and the gradient G (short, long)."""
    rest = gradient - basis @ low
    return torch.addmm(rest.sign() if update == "frugal-sign" else rest, basis, direction)


class Apollo(NamedTuple):
    """A projected parameter whose direction is complete and scales the columns of its gradient.

    `weight` and `gradient` (short, long), `low` and `direction` (rank, long), `norm` (0-dim): of the last update.
    """

    weight: torch.Tensor
    gradient: torch.Tensor
    low: torch.Tensor
    direction: torch.Tensor
    norm: torch.Tensor
    step: float
    seed: int | None


def descend_apollo(waiting: Sequence[Apollo], decay: float) -> None:
    """APOLLO's steps, for as many tensors at once as have about as many elements as a batch of moments."""
    while waiting:
        count, room = 1, span_of(waiting[0].gradient) - waiting[0].gradient.numel()
        while count < len(waiting) and (room := room - waiting[count].gradient.numel()) >= 0:
            count += 1
        batch, waiting = waiting[:count], waiting[count:]
        updates = [one.gradient * column_scales(one.low, one.direction) for one in batch]
        limit_growth(updates, [one.norm for one in batch])
        descend([one.weight for one in batch], updates, decay, batch[0].step, [one.seed for one in batch])


def column_scales(low: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """|D_j| / |R_j| for each column; where R_j is 0, |D_j|."""
    if low.dtype == torch.float64:  # whose squares nothing wider holds
        peak = low.abs().amax(0)
        peak.masked_fill_(peak == 0, 1)
        norm = (low / peak).square_().sum(0).sqrt_().mul_(peak)
    else:
        norm = low.double().square_().sum(0).sqrt_().to(low.dtype)
    return direction.square().sum(0).sqrt_().div_(norm.masked_fill_(norm == 0, 1))  # `norm(dim=0)` is ten times as slow


def limit_growth(updates: list[torch.Tensor], norms: list[torch.Tensor]) -> None:
    """Shrinks every update whose norm exceeds 1.01 times that of the last one, which its `norm` (0-dim) holds."""
    found, last = torch.stack(torch._foreach_norm(updates)), torch.stack(norms)
    allowed = torch.where(last > 0, torch.minimum(found, GROWTH * last), found)
    factors = allowed / found.masked_fill(found == 0, 1)
    for update, factor in zip(updates, factors.unbind(), strict=True):
        update.mul_(factor)
    torch._foreach_copy_(norms, list(allowed.unbind()))


def descend(
    weights: list[torch.Tensor],
    directions: list[torch.Tensor],
    decay: float,
    step: float,
    seeds: Sequence[int | None],
) -> None:
    """weight = decay * weight - step * direction, rounded once. Weights of one dtype, directions fp32 or fp64."""
    if weights[0].dtype == directions[0].dtype:
        if decay != 1:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, directions, alpha=-step)
        return
    for weight, direction, seed in zip(weights, directions, seeds, strict=True):
        new = weight.to(working_dtype(weight.dtype)).mul_(decay).add_(direction, alpha=-step)
        rounding.write(weight, new, seed)


def shrink(weight: torch.Tensor, decay: float, seed: int | None) -> None:
    """weight = decay * weight, rounded once."""
    if seed is None:
        weight.mul_(decay)
    else:
        rounding.write(weight, weight.to(working_dtype(weight.dtype)).mul_(decay), seed)
