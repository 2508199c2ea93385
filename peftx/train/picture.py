"""The outcome of a comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .metrics import value_of
from .report import Row, Runs, describe, front, quality_of, rows


def plot(runs: Runs, choices: Runs, path: Path) -> None:
    """Quality against trained values, peak memory and step time; the line is the front of what nothing else beats.

    Below, where there are such: differences to the first method with their 95 % intervals, and what the learning rates
    were chosen by.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = rows(runs)
    palette = colormaps["tab10" if len(table) <= 10 else "tab20"]
    colours = {row.method: palette(i % palette.N) for i, row in enumerate(table)}
    draws = [draw for draw, there in ((differences, any(r.difference for r in table)), (rates, bool(choices))) if there]
    figure = Figure(figsize=(14, 9.2 if draws else 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1) if draws else [figure]
    costs(parts[0].subplots(1, 3, sharey=True), table, runs, colours)
    if draws:
        for axes, draw in zip(parts[1].subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            draw(axes, table, runs, choices, colours)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*parts[0].axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, format="png", dpi=120)


def costs(all_axes: Any, table: list[Row], runs: Runs, colours: dict[str, Any]) -> None:
    from matplotlib.ticker import NullFormatter

    name, more = quality_of(runs)
    costs = {
        "trained values": [float(row.trained_values) for row in table],
        f"peak memory of {runs[0]['memory_of']}, MB": [row.memory / 1e6 for row in table],
        f"step time / {table[0].method}'s": [row.step for row in table],
    }
    qualities = [row.quality for row in table]
    for axes, (cost, values) in zip(all_axes, costs.items(), strict=True):
        best = front(list(zip(values, qualities, strict=True)), more)
        corners = [values[i] for i in best], [qualities[i] for i in best]
        axes.plot(*corners, color="grey", linestyle="--", drawstyle="steps-post", zorder=0)
        for i, row in enumerate(table):
            error = row.quality_std or None
            colour = colours[row.method]
            axes.errorbar(values[i], row.quality, yerr=error, fmt="o", capsize=3, color=colour, label=row.method)
        axes.set_xlabel(cost)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if cost == "trained values":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(f"held-out {name}" + ("" if more else ", less is better"))


def differences(axes: Any, table: list[Row], runs: Runs, choices: Runs, colours: dict[str, Any]) -> None:
    name, more = quality_of(runs)
    told = [(row, row.difference) for row in table if row.difference is not None]
    for i, (row, difference) in enumerate(told):
        error = difference.high - difference.mean
        axes.errorbar(difference.mean, -i, xerr=error, fmt="o", capsize=3, color=colours[row.method])
    axes.margins(y=0.15)
    axes.axvline(0, color="grey", linestyle="--", zorder=0)
    axes.set_yticks([-i for i in range(len(told))], [row.method for row, _ in told])
    better = "" if more else ", less is better"
    axes.set_xlabel(f"held-out {name} less {table[0].method}'s, 95 % intervals{better}")


def rates(axes: Any, table: list[Row], runs: Runs, choices: Runs, colours: dict[str, Any]) -> None:
    name, _ = quality_of(runs)
    for row in table:
        points = sorted(
            (run["learning_rate"], value_of(run["validation"], name))
            for run in choices
            if run["method"] == row.method and describe(run["method_settings"]) == row.settings
        )
        for marker, line, part in ((".", "-", points), ("o", "", [p for p in points if p[0] == row.learning_rate])):
            axes.plot([x for x, _ in part], [y for _, y in part], marker, linestyle=line, color=colours[row.method])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate; the dot is the chosen one")
    axes.set_ylabel(f"{name} on the validation part")
