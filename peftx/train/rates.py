"""Which learning rate: a grid, and the choice on validation samples."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import more_is_better, value_of

FACTOR = 3.0
AUTO = 5  # rates of a grid
PROPORTIONS = ("accuracy", "exact_match")  # metrics whose standard error follows from their value
FARTHEST = 6  # factors from a method's own rate, at most
SEED = 10_000  # of the runs that choose, which no run that is reported has


def parse_rates(said: str | Sequence[float]) -> list[float] | int:
    """The rates in their order, or how many a grid around a method's own has.

    Args:
        said: `auto` for a grid of five, `auto:3` for one of three, or of another odd number; or rates.

    Raises:
        ValueError: none of these.
    """
    if isinstance(said, str) and (automatic := re.fullmatch(r"auto(?::(\d+))?", said.strip().lower())):
        if (count := int(automatic[1] or AUTO)) % 2 == 0 or not 3 <= count <= 2 * FARTHEST + 1:
            raise ValueError(f"learning_rates: auto takes an odd number from 3 to {2 * FARTHEST + 1}, got {said!r}")
        return count
    parts = [part for part in said.split(",") if part.strip()] if isinstance(said, str) else said
    try:
        rates = sorted({float(part) for part in parts})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates must be auto, auto:3, or numbers above 0 by comma, got {said!r}")
    return rates


def grid(own: float, count: int = AUTO) -> list[float]:
    """This odd number of rates around a method's own."""
    return sorted(scaled(own, power) for power in range(-(count // 2), count // 2 + 1))


def scaled(own: float, power: int) -> float:
    return float(f"{own * FACTOR**power:.3g}") if power else own


def further(own: float, measured: Mapping[float, Mapping[str, float] | None], name: str) -> float | None:
    """The rate to try next, beyond the end of the grid where the best one is; None where it is not, or far enough."""
    best = best_rate(measured, name)
    if best is None:
        return None
    sides = ((max(measured), 1), (min(measured), -1))
    for end, sign in sides:
        powers = {scaled(own, sign * power): power for power in range(1, FARTHEST + 1)}
        if best == end and powers.get(end, FARTHEST) < FARTHEST:
            return scaled(own, sign * (powers[end] + 1))
    return None


def best_rate(measured: Mapping[float, Mapping[str, float] | None], name: str) -> float | None:
    """The rate with the best value of `name`; of equals that with the lowest loss, then the lowest. None of no value.

    Args:
        measured: values of the validation part by rate; None where a run failed.
        name: the metric.
    """
    sign = -1 if more_is_better(name) else 1

    def order(rate: float) -> tuple[float, float, float]:
        found = measured[rate] or {}
        value, loss = sign * value_of(found, name), found.get("loss", math.nan)
        return value if math.isfinite(value) else math.inf, loss if math.isfinite(loss) else math.inf, rate

    ranked = sorted(measured, key=order)
    return ranked[0] if ranked and math.isfinite(order(ranked[0])[0]) else None


def settled_rate(
    own: float, measured: Mapping[float, Mapping[str, float] | None], name: str, count: int
) -> float | None:
    """Of the rates that the validation samples do not tell from the best, the nearest to a method's own.

    Those are the rates within one standard error of the best, sqrt(p (1 - p) / count), for a proportion p of `count`
    samples. The best alone may be one at the edge of what a method bears, where the next seed fails. Of other metrics
    the error is not known from their value: of these, the best. None of no value.
    """
    best = best_rate(measured, name)
    if best is None or name not in PROPORTIONS:
        return best
    values = {rate: value_of(found or {}, name) for rate, found in measured.items()}
    least = values[best] - math.sqrt(values[best] * (1 - values[best]) / count)
    return min((rate for rate in values if values[rate] >= least), key=lambda rate: (abs(math.log(rate / own)), rate))


def summary(
    chosen: Mapping[str, float],
    measured: Mapping[str, Mapping[float, Any]],
    name: str,
    count: int,
    reasons: Mapping[tuple[str, float], str] | None = None,
) -> list[str]:
    """What was chosen from, for the notes of a comparison; and by method and rate, why one failed."""
    sizes = {len(rates) for rates in measured.values()}
    if not sizes:
        return []
    of = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{min(sizes)}"
    which = (
        "the best" if name not in PROPORTIONS else "the nearest to the method's own within a standard error of the best"
    )
    told = [
        f"lr: {which} of {of} by {name} on {count:,} validation samples, one run each with a seed of its own; "
        "the held-out samples had no part in it"
    ]
    ends = [
        method
        for method, rate in chosen.items()
        if len(measured[method]) > 1 and rate in (min(measured[method]), max(measured[method]))
    ]
    if ends:
        told.append(f"the rate of {', '.join(ends)} is at an end of the rates that were tried: try further ones")
    every = [(method, rate, found) for method, rates in measured.items() for rate, found in rates.items()]
    failed, lost = [], []
    for method, rate, found in every:
        if found is None:
            why = (reasons or {}).get((method, rate))
            failed.append(f"{method} at {rate:g}" + (f" ({why})" if why else ""))
        elif not math.isfinite(value_of(found, name)):
            lost.append(f"{method} at {rate:g}")
    told += [f"did not run: {', '.join(failed)}"] if failed else []
    return told + ([f"diverged: {', '.join(lost)}"] if lost else [])
