"""Intervals of means over few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and what it lies between."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Of the mean of normal values: mean -+ t s / sqrt(n), t with n - 1 degrees of freedom. None of fewer than two."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(level, len(values) - 1) * deviation(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation; nan where a value is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = `level` for Student's T with so many degrees of freedom."""
    low, high = 0.0, 1.0
    while within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < level else (low, middle)
    return high


def within(t: float, freedom: int) -> float:
    """P(|T| < t), Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd, square = freedom % 2, math.cos(angle) ** 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for i in range(freedom // 2):
        total += term
        term *= square * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
