"""The statistics of all layers of an adapter, taken at once: layers of equal shape as one stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...adapters.lora_experts import FactoredParamWrapper
from ...adapters.norms import row_norms2, weight_row_norms2
from ...adapters.products import at_least_fp32
from .noise import gradient_row_norms2

Place = tuple[Any, Any, str]  # a rule, its layer, the adapter's name
BLOCK = 2**18, 2**24  # values of factors and their gradients that are stacked at a time, on a CPU and elsewhere


@torch.no_grad()
def measure(places: Sequence[Place]) -> list[torch.Tensor | None]:
    """Squared row norms (..., out_features) of the gradient in each place, at least in fp32, from those of A and B;
    None where B has none."""
    found: list[torch.Tensor | None] = [None] * len(places)
    learning = [i for i, place in enumerate(places) if _has_gradient(_weights(place)[1])]
    for group in _alike(places, learning):
        members = [places[i] for i in group]
        A, B = _stacks(members)
        pairs = zip(*(map(_gradient, _weights(place)) for place in members), strict=True)
        grad_A, grad_B = stacked(members[0][1], *(at_least_fp32(torch.stack(grads)) for grads in pairs))
        for i, norms2 in zip(group, gradient_row_norms2(A, B, grad_A, grad_B, _scale(members[0])), strict=True):
            found[i] = norms2
    return found


@torch.no_grad()
def take(places: Sequence[Place], found: Sequence[torch.Tensor | None]) -> None:
    """Makes the coming step's statistics from the squared gradient norms; they stay where a gradient overflowed."""
    groups = list(_alike(places, [i for i, norms2 in enumerate(found) if norms2 is not None]))
    stacks: list[torch.Tensor] = [torch.stack([found[i] for i in group]) for group in groups]  # type: ignore[misc]
    totals = [norms2.flatten(1).sum(dim=1) for norms2 in stacks]
    finite = torch.cat([total.to(totals[0].device) for total in totals]).isfinite().all()
    # Where there are statistics to stay with, nobody waits for the device.
    if not all(places[group[0]][0].known for group in groups) and not finite:
        return
    for group, norms2, total in zip(groups, stacks, totals, strict=True):
        members, good = [places[i] for i in group], finite.to(norms2.device)
        config, known = members[0][0].config, members[0][0].known
        if config.mode == "mgpo":
            _keep(members, "mean_norm", total.sqrt(), config.mgpo_ema, good, known)
            continue
        norms2 = _keep(members, "grad_norms2", norms2, config.grad_ema, good, known)
        _keep(members, "tau", deviation(members, norms2), 0.0, good, known)


def deviation(members: Sequence[Place], norms2: torch.Tensor) -> torch.Tensor:
    """tau (L, out_features) of L equal places, from their squared gradient norms (L, out_features)."""
    (rule, layer, _), weight = members[0], weight_norms2(members)
    config = rule.config
    if config.combine == "quadrature":
        return config.ggpo_sigma * (weight + config.ggpo_beta * norms2).sqrt() / layer.in_features**0.5
    return (config.ggpo_sigma * weight.sqrt() + config.ggpo_beta * norms2) / layer.out_features**0.5


def weight_norms2(members: Sequence[Place]) -> torch.Tensor:
    """Squared row norms (L, out_features) of the merged weights of L equal places, at least in fp32."""
    A, B = _stacks(members)
    cross: list[torch.Tensor] = []
    for (rule, layer, _), factor in zip(members, A, strict=True):
        if rule.base_norms2 is None or not rule.config.cheap_norms:
            weight = at_least_fp32(layer.site.weight())
            if rule.base_norms2 is None:
                rule.base_norms2 = row_norms2(weight)
            if not rule.config.cheap_norms:
                cross.append(factor.to(weight.dtype) @ weight.T)
    base = torch.stack([rule.base_norms2.to(A) for rule, *_ in members])
    return weight_row_norms2(base, torch.stack(cross).mT.to(A.dtype) if cross else 0.0, A, B, _scale(members[0]))


def _keep(
    members: Sequence[Place], key: str, value: torch.Tensor, decay: float, good: torch.Tensor, known: bool
) -> torch.Tensor:
    """Sets a statistic of equal places to `value` (L, ...), or to its running mean; leaves it where not `good`."""
    if known:
        former = torch.stack([getattr(rule, key).to(value) for rule, *_ in members])
        value = torch.where(good, decay * former + (1 - decay) * value if decay else value, former)
    for (rule, *_), own in zip(members, value, strict=True):
        setattr(rule, key, own)
    return value


def stacked(layer: Any, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies as the factors of a layer do; over fused experts, with an axis of them before the last two."""
    if not isinstance(layer, FactoredParamWrapper):
        return A, B
    experts = layer.num_experts
    return A.unflatten(-2, (experts, -1)), B.unflatten(-1, (-1, experts)).movedim(-1, -3)


def _weights(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    _, layer, name = place
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _has_gradient(weight: torch.Tensor) -> bool:
    return weight.grad is not None and weight.grad.shape == weight.shape


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _stacks(members: Sequence[Place]) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = (at_least_fp32(torch.stack(weights)) for weights in zip(*map(_weights, members), strict=True))
    return stacked(members[0][1], A, B)


def _scale(place: Place) -> float:
    _, layer, name = place
    return layer.scaling[name]


def _alike(places: Sequence[Place], indices: Sequence[int]) -> Iterator[list[int]]:
    """The places of these indices, by what they must share to be stacked, and so many that a stack stays small."""
    groups: dict[Any, list[int]] = {}
    for i in indices:
        rule, layer, _ = places[i]
        A, B = _weights(places[i])
        sizes = (A.shape, B.shape, getattr(layer, "num_experts", None), layer.in_features, layer.out_features)
        key = (sizes, A.dtype, B.dtype, A.device, _scale(places[i]), rule.known)
        groups.setdefault(key, []).append(i)
    for group in groups.values():
        A, B = _weights(places[group[0]])
        size = max(1, BLOCK[A.device.type != "cpu"] // (2 * (A.numel() + B.numel())))
        yield from (group[start : start + size] for start in range(0, len(group), size))
