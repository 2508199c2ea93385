"""What a compression did: a table, a picture, and the model card of the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ranks import price_of

Point = tuple[float, float]  # kept share of the parameters, score


@dataclass(frozen=True)
class LayerReport:
    """One layer, or stack of experts.

    Attributes:
        shape: (out, in), or (E, out, in).
        rank: None: left dense by the global allocation. All experts of a stack have the same.
        error: ||L (W - U V) R|| / ||L W R||; of a stack over all experts, each at its scale beside the others.
        unseen: experts without sums, since no token that counts reached them: decomposed by the mean of the others'.
    """

    shape: tuple[int, ...]
    rank: int | None
    error: float
    unseen: tuple[int, ...] = ()

    @property
    def dense(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Entries of what replaced it."""
        return self.dense if self.rank is None else self.rank * price_of(self.shape)


@dataclass(frozen=True)
class Report:
    """What `compress` did.

    Attributes:
        method, keep, allocation: as asked for.
        layers: of each layer chosen, by name.
        skipped: why a targeted layer was left as it was, by name.
        parameters: of the whole model, before and after (tied ones counted once).
    """

    method: str
    keep: float
    allocation: str
    layers: dict[str, LayerReport]
    parameters: tuple[int, int]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Share of the factorised layers' entries that is left."""
        return sum(row.kept for row in self.layers.values()) / sum(row.dense for row in self.layers.values())

    def summary(self) -> str:
        """One line with both counts, of the whole model and of the factorised layers."""
        before, after = self.parameters
        return (
            f"{self.method}: {before:,} to {after:,} parameters, {1 - after / before:.1%} fewer in the whole model, "
            f"{1 - self.kept:.1%} fewer in {len(self.layers)} layers"
        )

    def table(self) -> str:
        """Markdown: layer, shape, rank, kept share, weighted error."""
        rows = [("layer", "out x in", "rank", "kept", "weighted error"), ("---", "---:", "---:", "---:", "---:")]
        rows += [
            (
                name,
                " x ".join(map(str, row.shape)),
                "dense" if row.rank is None else str(row.rank),
                f"{row.kept / row.dense:.1%}",
                f"{row.error:.4f}",
            )
            for name, row in self.layers.items()
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def __str__(self) -> str:
        left = [f"left as it is: {name} ({why})" for name, why in self.skipped.items()]
        return "\n\n".join([self.table(), *left, *self.told_of_experts(), self.summary()])

    def told_of_experts(self) -> list[str]:
        """A sentence for each stack in which some experts got no token."""
        return [
            f"experts of {name} that no token reached, decomposed by the mean of the others: "
            f"{', '.join(map(str, row.unseen))} ({len(row.unseen)} of {row.shape[0]})"
            for name, row in self.layers.items()
            if row.unseen
        ]


def plot(
    curves: Mapping[str, Sequence[Point]],
    *,
    score: str,
    dense: float | None = None,
    recovered: Mapping[str, Sequence[Point]] | None = None,
) -> Any:
    """The methods side by side: score against kept parameters, recovered ones beside the others on the same scale.

    Args:
        curves: of each method, (kept share, score) without recovery.
        score: name of the vertical axis, e.g. "accuracy" or "loss".
        dense: the score of the model before compression, a line.
        recovered: the same after fine-tuning the factors.

    Returns:
        A `matplotlib.figure.Figure`; needs matplotlib, but no display and no pyplot.
    """
    from matplotlib.figure import Figure

    panels = {"compressed": curves} | ({"recovered": recovered} if recovered else {})
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4), layout="constrained")
    for axes, (title, drawn) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for place, method in enumerate(curves):
            points = sorted(drawn.get(method, ()))
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{place}", label=method)
        if dense is not None:
            axes.axhline(dense, color="black", linestyle=":", label="dense")
        axes.set(title=title, xlabel="kept share of the factorised layers")
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel(score)
    first.legend()
    return figure


def card(
    report: Report,
    *,
    name: str,
    base_model: str,
    loader: str,
    score: str,
    scores: Mapping[str, float],
    calibration: str,
) -> str:
    """The README.md of a compressed model, with the three numbers: dense, compressed, recovered.

    Args:
        name: repository or folder of the result.
        base_model: of the model that was compressed: an id on the Hub, or a folder, of which only the name is told.
        loader: the class that loads it, e.g. "AutoModelForSequenceClassification".
        score: what the numbers are, e.g. "accuracy on 872 held-out samples".
        scores: by name, in the order of the table: "dense", "compressed" and, if it was fine-tuned, "recovered".
        calibration: data that the statistics come from.
    """
    from ..cards.compressed import page

    rows = "\n".join(f"| {what} | {value:.4f} |" for what, value in scores.items())
    return page(
        name=name,
        base_model=base_model,
        loader=loader,
        parameters=report.parameters,
        method=report.method,
        keep=report.keep,
        layers=len(report.layers),
        stacks=sum(len(row.shape) > 2 for row in report.layers.values()),
        results=[f"| | {score} |\n| --- | ---: |\n{rows}"],
        details=f", {report.allocation} ranks. Calibration: {calibration}",
    )
