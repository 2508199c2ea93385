"""From scores to a choice: TOPSIS and the kept indices."""

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence, Set
from reprlib import repr as short
from typing import Literal

import torch
from torch import Tensor

from ..utils import IGNORE

Goal = Literal["min", "max"]

# Which scores a method ranks by.
METHODS: dict[str, tuple[str, ...]] = {
    "donod": ("don", "nod"),
    "don": ("don",),
    "nod": ("nod",),
    "loss": ("loss",),
    "el2n": ("el2n",),
    "grand": ("grand",),
    "grand_full": ("grand_full",),
    "ifd": ("ifd",),
    "random": ("random",),
}

# What is kept. Papers want hard samples (El2N, GraNd: "max"); on noisy labels that keeps the noise, so ours is "min".
GOALS: dict[str, Goal] = {
    "nod": "min",
    "loss": "min",
    "el2n": "min",
    "grand": "min",
    "grand_full": "min",
    "ifd": "max",
    "random": "max",
}

DON_GOAL: Goal = "min"
PAPER_DON_GOAL: Goal = "max"
WEIGHTS = (0.5, 0.5)
NAMED = 20  # classes in a warning


def topsis(values: Tensor, benefit: Sequence[bool], weights: Sequence[float] | None = None) -> Tensor:
    """Relative closeness of each alternative to the ideal one (TOPSIS, with vector normalisation).

    Args:
        values: (n, k), one row for each alternative and one column for each criterion; any scale, any sign.
        benefit: k times whether more is better (`True`) or less (`False`).
        weights: k weights of the criteria, not negative; their sum does not matter. Default: equal.

    Returns:
        (n,) in float64, from 0 (worst in every criterion) to 1 (best in every one). 0.5 where best and worst are the
        same, so for a single row or equal rows. A row with NaN or infinity is left out of all norms and gets NaN.

    Raises:
        ValueError: for wrong shapes or weights.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 2 or values.shape[1] != len(benefit):
        raise ValueError(f"values must be (n, {len(benefit)}), one column a criterion, got {tuple(values.shape)}")
    if weights is None:
        weights = [1 / len(benefit)] * len(benefit)
    check_weights(weights, len(benefit))
    finite = values.isfinite().all(1)
    closeness = torch.full((len(values),), math.nan, dtype=torch.float64)
    if not finite.any():
        return closeness
    columns = values[finite]
    columns = columns / columns.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)  # no overflow in the squares
    norm = columns.norm(dim=0)
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    weighted = share * columns / torch.where(norm > 0, norm, 1.0)
    low, high = weighted.amin(0), weighted.amax(0)
    good = torch.tensor(list(benefit))
    to_best = (weighted - torch.where(good, high, low)).norm(dim=1)
    to_worst = (weighted - torch.where(good, low, high)).norm(dim=1)
    span = to_best + to_worst
    closeness[finite] = torch.where(span > 0, to_worst / torch.where(span > 0, span, 1.0), 0.5)
    return closeness


def preference(
    scores: Mapping[str, Tensor],
    method: str = "donod",
    *,
    don_goal: Goal = DON_GOAL,
    goal: Goal | None = None,
    weights: Sequence[float] = WEIGHTS,
) -> Tensor:
    """How much each sample is wanted: (n,) in float64, more is better, NaN is never kept. Arguments as in `select`."""
    check_settings(method, don_goal, goal, weights)
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores must be what score_dataset returns, a dict of tensors, got {short(scores)}")
    if missing := [name for name in METHODS[method] if name not in scores]:
        raise ValueError(
            f"method {method!r} ranks by {', '.join(METHODS[method])}, but {', '.join(missing)} was not scored: "
            f"score_dataset(..., metrics={METHODS[method]!r})"
        )
    columns = [column(scores, name) for name in METHODS[method]]
    columns = [column(scores, name, len(columns[0])) for name in METHODS[method]]
    if method == "donod":
        return topsis(torch.stack(columns, 1), (don_goal == "max", False), weights)
    wanted = columns[0].where(columns[0].isfinite(), math.nan)
    if method == "ifd":
        wanted = wanted.where(wanted < 1, math.nan)  # the prompt did not help to predict the answer
    direction = don_goal if method == "don" else goal or GOALS[method]
    return wanted if direction == "max" else -wanted


def select(
    scores: Mapping[str, Tensor],
    keep: float,
    method: str = "donod",
    *,
    don_goal: Goal = DON_GOAL,
    goal: Goal | None = None,
    weights: Sequence[float] = WEIGHTS,
    balanced: bool | None = None,
) -> list[int]:
    """The samples to keep, as ascending indices: the `ceil(keep * n)` most wanted, ties by index.

    Args:
        scores: what `score_dataset` returned: (n,) for each metric.
        keep: share of all n samples, in (0, 1]. Samples that cannot be kept (no supervised token, NaN, infinity, IFD of
            1 or more) count in n; where they leave fewer than asked for, fewer are kept, with a warning.
        method: a key of `METHODS`: `"donod"` (TOPSIS of DON and NOD), or a single score.
        don_goal: for `"donod"` and `"don"`: whether samples that shrink the head's norm (`"max"`) or grow it (`"min"`)
            are wanted. **The paper's setting is `"max"`** (as its ICLR 2026 submission is described; arXiv:2504.14810
            itself does not give it in its abstract). Ours is `"min"`, since a shrinking norm marks the surprising
            samples: with a share of wrong labels, `"max"` keeps the wrong ones (benchmarks/pruning_noise.py).
        goal: for every other single score: whether its smallest or its largest values are wanted. Default: `GOALS`,
            the smallest, apart from IFD. EL2N's and GraNd's authors (arXiv:2107.07075) keep the hardest: `"max"`.
        weights: of (DON, NOD) in TOPSIS. The paper's could not be found; default: equal.
        balanced: whether each class keeps the same share, and at least one sample where there is room, by
            `scores["label"]`. Default: where that is there, that is for sequence classification. Else a score may keep
            a single class: a model that leans to one finds all of its samples easy. Not in the paper. Classes that
            lose all of their samples are named in a warning.

    Raises:
        ValueError: an argument of the wrong type or out of range, a score (or, for `balanced=True`, the label) that is
            missing or not (n,), no samples, or none that can be kept.
    """
    check_keep(keep)
    check_balanced(balanced)
    wanted = preference(scores, method, don_goal=don_goal, goal=goal, weights=weights)
    if balanced and "label" not in scores:
        raise ValueError("balanced=True needs scores['label'], which score_dataset gives for sequence classification")
    usable = wanted.isfinite()
    count = len(wanted)
    if not count:
        raise ValueError("there are no samples to select from")
    if not usable.any():
        raise ValueError(
            f"none of the {count} samples can be kept: {method} is NaN, infinite or out of range for all of them. "
            "Are all labels -100 (prompt longer than max_length?), or are the model's logits NaN?"
        )
    size = min(kept_size(keep, count), int(usable.sum()))
    if unusable := count - int(usable.sum()):
        fewer = f", so {size} are kept instead of {kept_size(keep, count)}" if size < kept_size(keep, count) else ""
        warnings.warn(
            f"{unusable} of {count} samples are dropped whatever their rank: no supervised token, or a score of "
            f"{method} that is NaN, infinite or out of range{fewer}.",
            stacklevel=2,
        )
    order = torch.sort(wanted.where(usable, -math.inf), descending=True, stable=True).indices[: int(usable.sum())]
    label = column(scores, "label", count) if "label" in scores else None
    if label is not None and balanced is not False:
        if label[order].isnan().any():
            raise ValueError("scores['label'] has NaN for samples that can be kept: balanced=False needs no classes")
        order = spread(order, label)
    kept = order[:size].sort().values
    if label is not None and (lost := lost_classes(label, kept)):
        why = "they have no sample with a score" if balanced is not False else "balanced=False lets that happen"
        if balanced is not False and size < len(label[order].unique()):
            why = "there are more classes than samples to keep; a larger keep has room for them"
        warnings.warn(f"none of the {size} samples that are kept is of class {named(lost)}: {why}.", stacklevel=2)
    return kept.tolist()


def spread(order: Tensor, label: Tensor) -> Tensor:
    """`order` (m,) so changed that the best of each class come first, those of large classes before those of small
    ones, and behind them each class is spread evenly, in its own order: any beginning holds about the same share of
    every class, and at least one sample of each if it is long enough. `label` (n,) is that of all samples."""
    _, kind, counts = label[order].unique(return_inverse=True, return_counts=True)
    grouped = torch.sort(kind, stable=True).indices  # class after class
    rank = torch.empty(len(order), dtype=torch.float64)
    rank[grouped] = (torch.arange(len(order)) - (counts.cumsum(0) - counts)[kind[grouped]]).double()
    place = (rank + 0.5) / counts[kind] - (rank == 0).double()
    return order[torch.sort(place, stable=True).indices]


def lost_classes(label: Tensor, kept: Tensor) -> list[float]:
    """The labels that samples have, but none of those at `kept`."""
    present = label[label.isfinite() & (label != IGNORE)].unique()
    return present[~torch.isin(present, label[kept])].tolist()


def named(classes: Sequence[float]) -> str:
    names = [f"{number:g}" for number in classes[:NAMED]]
    return ", ".join(names) + (f" and {len(classes) - NAMED} more" if len(classes) > NAMED else "")


def column(scores: Mapping[str, Tensor], name: str, count: int | None = None) -> Tensor:
    """One of the scores, (n,) in float64.

    Raises:
        ValueError: it is something else, or not of `count` samples.
    """
    try:
        found = torch.as_tensor(scores[name], dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"scores[{name!r}] must be numbers, one a sample, got {short(scores[name])}") from None
    if found.ndim != 1 or count not in (None, len(found)):
        wanted = "(n,)" if count is None else f"({count},)"
        raise ValueError(f"scores[{name!r}] must be {wanted}, one number a sample, got {tuple(found.shape)}")
    return found


def kept_size(keep: float, count: int) -> int:
    """`ceil(keep * count)`; what binary fractions add to a product such as 0.07 * 100 does not count."""
    return max(1, math.ceil(keep * count * (1 - 1e-12)))


def check_keep(keep: float) -> None:
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real) or not 0 < float(keep) <= 1:
        raise ValueError(f"keep must be a share of the samples in (0, 1], got {short(keep)}")


def check_balanced(balanced: bool | None) -> None:
    if balanced is not None and not isinstance(balanced, bool):
        raise ValueError(f"balanced must be True, False or None, got {short(balanced)}")


def check_weights(weights: Sequence[float], count: int) -> None:
    try:
        found = [] if isinstance(weights, Mapping | Set) else list(getattr(weights, "tolist", lambda: weights)())
    except TypeError:
        found = []
    real = [isinstance(weight, numbers.Real) and not isinstance(weight, bool) for weight in found]
    if len(found) != count or not all(real) or not all(0 <= weight < math.inf for weight in found) or not sum(found):
        raise ValueError(f"weights must be {count} numbers, none negative and not all zero, got {short(weights)}")


def check_settings(method: str, don_goal: str, goal: str | None, weights: Sequence[float]) -> None:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {short(method)}: one of {', '.join(METHODS)}")
    for name, value in (("don_goal", don_goal), ("goal", goal)):
        known = isinstance(value, str) and value in ("min", "max")
        if not known and not (name == "goal" and value is None):
            raise ValueError(f"{name} must be 'min' or 'max', got {short(value)}")
    if goal is not None and method in ("donod", "don", "random"):
        other = "has no goal" if method == "random" else "takes don_goal"
        raise ValueError(f"goal is for the other single scores; {method} {other}")
    check_weights(weights, 2)
