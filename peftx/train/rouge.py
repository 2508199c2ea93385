"""ROUGE (Lin 2004): what two texts have in common, in words, pairs of words, and longest common subsequences.

Values as of the package `rouge_score`, which `evaluate` uses, without stemming: F-measures, averaged over the texts.
`evaluate` itself reports the median of 1,000 bootstrap means in place of the mean, some thousandths beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of the F-measures by `NAMES`, each in [0, 1]."""
    rows = [scores(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(NAMES)}


def scores(prediction: str, reference: str) -> tuple[float, float, float, float]:
    ours, theirs = words(prediction), words(reference)
    return (
        overlap(ours, theirs, 1),
        overlap(ours, theirs, 2),
        f_measure(len(common(ours, theirs)), len(ours), len(theirs)),
        summary_level(prediction, reference),
    )


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f_measure(hits: int, ours: int, theirs: int) -> float:
    return 2 * hits / (ours + theirs) if hits else 0.0


def overlap(ours: Sequence[str], theirs: Sequence[str], size: int) -> float:
    one, other = (Counter(zip(*(text[i:] for i in range(size)), strict=False)) for text in (ours, theirs))
    return f_measure((one & other).total(), one.total(), other.total())


def common(ours: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Places in `theirs` of a longest common subsequence; of several the one that `rouge_score` finds."""
    table = [[0] * (len(ours) + 1) for _ in range(len(theirs) + 1)]
    for i, word in enumerate(theirs):
        for j, other in enumerate(ours):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    found, i, j = [], len(theirs), len(ours)
    while i and j:
        if theirs[i - 1] == ours[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found[::-1]


def summary_level(prediction: str, reference: str) -> float:
    """Of texts of several lines: each line of the reference has the union of what it shares with all lines."""
    ours, theirs = ([words(line) for line in text.split("\n") if line] for text in (prediction, reference))
    counts = [Counter(word for line in text for word in line) for text in (ours, theirs)]
    hits = 0
    left = [Counter(count) for count in counts]
    for line in theirs:
        for place in sorted({place for other in ours for place in common(other, line)}):
            word = line[place]
            if all(count[word] > 0 for count in left):
                hits += 1
                for count in left:
                    count[word] -= 1
    return f_measure(hits, *(count.total() for count in counts))
