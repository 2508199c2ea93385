"""Whether row i of a batch is sample i: a collator that sorts, shuffles, drops or repeats rows would give their scores
to other samples, and nothing in the batch tells."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .scorer import BatchError, check_batch

FIRST = 4  # batches that are looked at in any case
SHARE = 0.01  # of the time, that more looks may take


class Watched:
    """A collator, whose batches are now and then made a second time from the same samples in another order: the rows
    have to follow. The first batches are, and of the others as many as a hundredth of the time pays for."""

    def __init__(self, collator: Callable[[list], Mapping[str, Any]]) -> None:
        self.collator = collator
        self.calls, self.spent, self.begun = 0, 0.0, time.perf_counter()

    def __call__(self, samples: list) -> Mapping[str, Any]:
        start = time.perf_counter()
        first, self.calls = not self.calls, self.calls + 1
        if len(samples) > 1 and (self.calls <= FIRST or self.spent < SHARE * (start - self.begun)):
            check_order(self.collator, samples, thoroughly=first)
            self.spent += time.perf_counter() - start
        return self.collator(samples)


def check_order(
    collator: Callable[[list], Mapping[str, Any]], samples: Sequence[Any], *, thoroughly: bool = True
) -> None:
    """Makes batches of the samples in two orders (`thoroughly`: three, which no rule of places alone survives, since
    only the identity commutes with a rotation and a swap of three or more), and compares them row by row.

    Raises:
        BatchError: the rows do not follow the samples, or are made at random, so that nobody can tell.
    """
    samples = list(samples)
    if len(samples) < 2:
        return
    if thoroughly and len(samples) == 2:  # two places have one other order, which a reversal survives
        samples.append(samples[1])
    places = list(range(len(samples)))
    orders = [[*places[1:], 0]] + [[1, 0, *places[2:]]] * thoroughly
    usual = batch_of(collator, samples, places)
    for order in orders:
        moved = batch_of(collator, samples, order)
        if wrong := [name for name, rows in usual.items() if not same(moved.get(name), rows, order)]:
            again = batch_of(collator, samples, places)
            drawn = [name for name, rows in usual.items() if not same(again.get(name), rows, places)]
            telling = [name for name, rows in usual.items() if name not in drawn and bool((rows != rows[:1]).any())]
            if lost := [name for name in wrong if name not in drawn]:
                raise BatchError(
                    f"the collator does not give row i of a batch to sample i ({lost[0]!r} does not follow the order "
                    "of the samples): it sorts, shuffles, drops or repeats them, and scores would go to the wrong "
                    "ones. Score with a collator that keeps the order, or with batch_size=1"
                )
            if not telling:
                raise BatchError(
                    f"the collator makes {', '.join(map(repr, drawn))} at random, rows or their order, so that which "
                    "row is which sample cannot be told. Score with a collator without chance, or with batch_size=1"
                )


def batch_of(collator: Callable[[list], Mapping[str, Any]], samples: list, order: list[int]) -> dict[str, Tensor]:
    """Labels, and what has one row for each sample; numbers alone may be of something else that is as many. Collators
    may take fields out of the samples, so they get copies."""
    batch = check_batch(collator([copy.copy(samples[place]) for place in order]))
    return {
        name: part
        for name, part in batch.items()
        if isinstance(part, Tensor) and part.ndim > (name != "labels") and len(part) == len(samples)
    }


def same(found: Tensor | None, wanted: Tensor, order: list[int]) -> bool:
    """Whether the rows are those, in that order; of floats, what a batch's sums may differ by does not count."""
    wanted = wanted[order]
    if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-5, equal_nan=True)
