"""From scores to a choice: TOPSIS and the kept indices."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

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
    if missing := [name for name in METHODS[method] if name not in scores]:
        raise ValueError(
            f"method {method!r} ranks by {', '.join(METHODS[method])}, but {', '.join(missing)} was not scored: "
            f"score_dataset(..., metrics={METHODS[method]!r})"
        )
    columns = [torch.as_tensor(scores[name], dtype=torch.float64) for name in METHODS[method]]
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
        balanced: whether each class keeps the same share, by `scores["label"]`. Default: where that is there, that is
            for sequence classification. Else a score may keep a single class: a model that leans to one finds all of
            its samples easy. Not in the paper.

    Raises:
        ValueError: `keep` outside (0, 1], an unknown method, goal or weights, a score (or, for `balanced=True`, the
            label) that is missing, no samples, or none that can be kept.
    """
    check_keep(keep)
    if balanced and "label" not in scores:
        raise ValueError("balanced=True needs scores['label'], which score_dataset gives for sequence classification")
    wanted = preference(scores, method, don_goal=don_goal, goal=goal, weights=weights)
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
    if balanced or (balanced is None and "label" in scores):
        order = spread(order, torch.as_tensor(scores["label"]))
    return sorted(order[:size].tolist())


def spread(order: Tensor, label: Tensor) -> Tensor:
    """`order` (m,) so changed that each class is spread evenly over it, in its own order: any beginning of it holds
    about the same share of every class. `label` (n,) is that of all samples."""
    place = torch.empty(len(order), dtype=torch.float64)
    for value in label[order].unique():
        members = label[order] == value
        count = int(members.sum())
        place[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return order[torch.sort(place, stable=True).indices]


def kept_size(keep: float, count: int) -> int:
    """`ceil(keep * count)`; what binary fractions add to a product such as 0.07 * 100 does not count."""
    return max(1, math.ceil(keep * count * (1 - 1e-12)))


def check_keep(keep: float) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"keep must be a share of the samples in (0, 1], got {keep!r}")


def check_weights(weights: Sequence[float], count: int) -> None:
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(0 <= number < math.inf for number in numbers) or not sum(numbers):
        raise ValueError(f"weights must be {count} numbers, none negative and not all zero, got {weights!r}")


def check_settings(method: str, don_goal: str, goal: str | None, weights: Sequence[float]) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    for name, value in (("don_goal", don_goal), ("goal", goal)):
        if value not in ("min", "max") and not (name == "goal" and value is None):
            raise ValueError(f"{name} must be 'min' or 'max', got {value!r}")
    if goal is not None and method in ("donod", "don", "random"):
        other = "has no goal" if method == "random" else "takes don_goal"
        raise ValueError(f"goal is for the other single scores; {method} {other}")
    check_weights(weights, 2)
