"""How many directions each layer keeps."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from itertools import accumulate

from torch import Tensor


def rank_for(keep: float, out_features: int, in_features: int) -> int:
    """The rank whose factors hold the share `keep` of the weight's entries, rounded down, at least 1."""
    return max(1, int(keep * out_features * in_features / (out_features + in_features) + 1e-9))


def largest(out_features: int, in_features: int) -> int:
    """The largest rank whose factors are smaller than the weight."""
    return (out_features * in_features - 1) // (out_features + in_features)


def saves(rank: int, out_features: int, in_features: int) -> bool:
    """Whether factors of that rank are smaller than the weight."""
    return rank * (out_features + in_features) < out_features * in_features


def price_of(shape: tuple[int, ...]) -> int:
    """Parameters that one more rank of a layer (out, in) costs, or of a stack (E, out, in)."""
    return math.prod(shape[:-2]) * sum(shape[-2:])


def allocate(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], budget: int
) -> dict[str, int | None]:
    """Ranks for all layers together: the directions worth most for each parameter that they cost, within `budget`.

    A direction of a layer costs out + in parameters and is worth its squared weighted singular value; of a stack of
    experts, which have one rank, one of each, and what these are worth together. A layer may also stay dense (None),
    which costs out * in and is worth all of them; it does where that is the better bargain and fits. Every layer gets
    at least rank 1.

    Args:
        spectra: squared weighted singular values of each layer, falling, in units that layers share.
        shapes: (out, in) of each, or (E, out, in).
        budget: parameters of all these layers afterwards, at most.

    Raises:
        ValueError: the budget does not pay for rank 1 everywhere.
    """
    left = budget - sum(price_of(shapes[name]) for name in spectra)
    if left < 0:
        raise ValueError(f"{budget} parameters do not pay for rank 1 in each of {len(spectra)} layers")
    ranks: dict[str, int | None] = dict.fromkeys(spectra, 1)
    offers: list[tuple[float, int, str]] = []  # (-worth of a parameter, rank or 0 for dense, layer)
    for name, squares in spectra.items():
        (*_, out_features, in_features), values = shapes[name], squares.tolist()
        price, whole = price_of(shapes[name]), math.prod(shapes[name])
        remaining = sum(values)
        for rank, held in enumerate(accumulate(values), 1):
            if not saves(rank, out_features, in_features):
                break
            following = values[rank] / price if saves(rank + 1, out_features, in_features) else 0.0
            dense = (remaining - held) / (whole - rank * price)
            if dense >= following:  # from here on the rest together is the better bargain
                offers.append((-dense, 0, name))
                break
        offers += [
            (-value / price, rank, name)
            for rank, value in enumerate(values, 1)
            if rank > 1 and saves(rank, out_features, in_features)
        ]
    heapq.heapify(offers)
    while offers:
        _, rank, name = heapq.heappop(offers)
        now = ranks[name]
        if now is None or rank not in (0, now + 1):
            continue
        price = price_of(shapes[name])
        cost = price if rank else math.prod(shapes[name]) - now * price
        if cost <= left:
            left -= cost
            ranks[name] = rank or None
    return ranks
