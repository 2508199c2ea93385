"""What a compression did: a table, a picture, and the model card of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Point = tuple[float, float]  # kept share of the parameters, score


@dataclass(frozen=True)
class LayerReport:
    """One layer. `rank` None: left dense by the global allocation. `error`: ||L (W - U V) R|| / ||L W R||."""

    shape: tuple[int, int]
    rank: int | None
    error: float

    @property
    def dense(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def kept(self) -> int:
        """Entries of what replaced it."""
        return self.dense if self.rank is None else self.rank * sum(self.shape)


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
                f"{row.shape[0]} x {row.shape[1]}",
                "dense" if row.rank is None else str(row.rank),
                f"{row.kept / row.dense:.1%}",
                f"{row.error:.4f}",
            )
            for name, row in self.layers.items()
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def __str__(self) -> str:
        left = [f"left as it is: {name} ({why})" for name, why in self.skipped.items()]
        return "\n\n".join([self.table(), *left, self.summary()])


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
        results=[f"| | {score} |\n| --- | ---: |\n{rows}"],
        details=f", {report.allocation} ranks. Calibration: {calibration}",
    )
