"""Data pruning: which training samples to keep (DONOD, arXiv:2504.14810, and its baselines).

Two roads. The pure functions, for any training loop:

    scores = score_dataset(model, dataset, collator)              # {"don": (n,), "nod": (n,), "tokens": (n,)}
    kept = subset(dataset, select(scores, keep=0.3))              # of a datasets.Dataset: dataset.select(indices)

and one argument for a transformers `Trainer`: `callbacks=[peftx.DonodCallback(keep=0.3)]`.
"""

from .callback import DonodCallback, prune
from .probe import METRICS, don_nod, gradient_square, head_statistics
from .report import axes_of, scatter, shown_with, table
from .rows import subset
from .scores import score_dataset
from .select import DON_GOAL, GOALS, METHODS, PAPER_DON_GOAL, WEIGHTS, preference, select, topsis
from .selection import FILE_NAME, Selection, fingerprint

__all__ = [
    "DON_GOAL",
    "FILE_NAME",
    "GOALS",
    "METHODS",
    "METRICS",
    "PAPER_DON_GOAL",
    "WEIGHTS",
    "DonodCallback",
    "Selection",
    "axes_of",
    "don_nod",
    "fingerprint",
    "gradient_square",
    "head_statistics",
    "preference",
    "prune",
    "scatter",
    "score_dataset",
    "select",
    "shown_with",
    "subset",
    "table",
    "topsis",
]
