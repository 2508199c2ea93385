"""The demo's outcome as a picture: accuracy and size of each method, and how its loss fell."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from .model import public_name
from .run import BASELINE, Report, Result

INK, DIM, FRAME = "#1f2933", "#7b8794", "#cbd2d9"
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "text.color": INK,
    "axes.labelcolor": DIM,
    "xtick.color": DIM,
    "ytick.color": INK,
}
STYLE |= {"axes.edgecolor": FRAME, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}


def standard_error(report: Report, accuracy: float) -> float:
    """Of a share of `test_texts` independent answers."""
    return (accuracy * (1 - accuracy) / report.test_texts) ** 0.5


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Exponential moving average without its bias towards zero at the start; its window is a `share` of the values."""
    keep = 1 - 1 / max(1.0, share * len(values))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def colours(results: list[Result]) -> list:
    """The baseline in grey, each other method in a colour of its own."""
    others = [result for result in results if result.name != BASELINE]
    palette = colormaps["tab10" if len(others) <= 10 else "tab20"]
    found = {result.name: palette(index) for index, result in enumerate(others)}
    return [found.get(result.name, DIM) for result in results]


def size(values: int) -> str:
    """Three digits of a count: 2,340 and 332 K and 1.33 M."""
    for unit, factor in (("M", 1e6), ("K", 1e3)):
        if values >= 10 * factor or (unit == "M" and values >= factor):
            return f"{values / factor:.3g} {unit}"
    return f"{values:,}"


def plot(report: Report, path: Path) -> None:
    """A dot a method with its standard error, the best on top, against the frozen encoder; beside it the losses."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12.8, 3.6 + 0.45 * max(6, len(report.results))))
        figure.set_layout_engine("constrained", w_pad=0.25, h_pad=0.12)
        quality, learning = figure.subplots(1, 2, width_ratios=(3, 2))
        shown = dict(zip((result.name for result in report.results), colours(report.results), strict=True))
        _accuracies(quality, report, shown)
        _losses(learning, report, shown)
        best, steps = report.best, len(report.results[0].losses)
        points = 100 * (best.accuracy - report.probe)
        side = "below" if points < 0 else "above"
        figure.suptitle(
            f"{best.name}: {best.accuracy:.1%} of unseen texts right, "
            f"{abs(points):.1f} points {side} the frozen encoder",
            fontsize=19,
            fontweight="bold",
            x=0.02,
            ha="left",
        )
        kept = "answers stay equal when saved, loaded, merged and exported"
        figure.supxlabel(
            f"peftx demo: {Path(public_name(report.options.model)).name}, "
            f"{report.train_texts:,} texts of {len(report.families)} classes, {steps} steps, one seed"
            + (f"; {kept}" if all(result.equal for result in report.results) else ""),
            fontsize=11,
            color=DIM,
            x=0.02,
            ha="left",
        )
        figure.savefig(path, format="png", dpi=150)


def _accuracies(axes, report: Report, shown: dict) -> None:
    ordered = sorted(report.results, key=lambda result: (result.accuracy, -result.adapter_parameters))
    for row, result in enumerate(ordered):
        colour, error = shown[result.name], standard_error(report, result.accuracy)
        axes.plot(
            [report.probe, result.accuracy], [row, row], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt"
        )
        axes.errorbar(result.accuracy, row, xerr=error, fmt="o", color=colour, markersize=11, capsize=0, elinewidth=1.5)
        text = f"{result.accuracy:.1%}"
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontweight="bold")
        text = f"{size(result.adapter_parameters)} values"
        axes.annotate(text, (1.18, row), xycoords=("axes fraction", "data"), va="center", color=DIM)
    axes.axvline(report.probe, color=INK, linestyle=(0, (4, 3)), linewidth=1.3, zorder=0)
    axes.annotate(
        f"frozen encoder {report.probe:.1%}",
        (report.probe, 1),
        (0, 6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        color=INK,
    )
    axes.set_yticks(range(len(ordered)), [result.name for result in ordered])
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.tick_params(axis="x", color=FRAME)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    low = min(report.probe, *(result.accuracy for result in ordered)) - 0.025
    axes.set_xlim(low, max(report.probe, *(result.accuracy for result in ordered)) + 0.025)
    axes.grid(axis="x", color=FRAME, alpha=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy on unseen texts, with its standard error")


def _losses(axes, report: Report, shown: dict) -> None:
    for result in report.results:
        curve = smooth(result.losses)
        first = min(len(curve) - 1, len(curve) // 20)  # where the average has something to average
        axes.plot(range(first + 1, len(curve) + 1), curve[first:], color=shown[result.name], linewidth=2.4)
    axes.set_ylim(0, None)
    axes.set_xlabel("step")
    axes.annotate("training loss", (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", color=INK)
    axes.grid(axis="y", color=FRAME, alpha=0.5)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=DIM)
    axes.set_axisbelow(True)
