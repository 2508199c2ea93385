"""The outcome of a comparison as a table, in CSV and Markdown, and as a picture."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import written

FILES = ("results.md", "results.csv", "pareto.png")
Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One method over all its seeds. Memory and step time are medians; memory and file in bytes.

    `quality_std` is the sample's standard deviation over seeds, None with one seed. `step` is a ratio to the first
    method's, seed by seed.
    """

    method: str
    settings: str
    learning_rate: float
    trained_values: int
    whole_values: int
    seeds: int
    quality: float
    quality_std: float | None
    memory: float
    step: float
    adapter_bytes: int


def quality_of(runs: Runs) -> tuple[str, bool]:
    """Its name, and whether more of it is better."""
    return ("accuracy", True) if "accuracy" in runs[0]["eval"] else ("loss", False)


def rows(runs: Runs) -> list[Row]:
    """A row for each method and its settings, in the order of their first runs."""
    name, _ = quality_of(runs)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], describe(run["method_settings"])), []).append(run)
    yardstick = {run["seed"]: run["step_seconds"] for run in next(iter(groups.values()))}
    found = []
    for (method, settings), group in groups.items():
        qualities = [run["eval"][name] for run in group]
        ratios = [run["step_seconds"] / yardstick[run["seed"]] for run in group if yardstick.get(run["seed"])]
        values = group[0]["trained_values"]
        found.append(
            Row(
                method,
                settings,
                group[0]["learning_rate"],
                values["adapter"],
                values["whole_modules"],
                len(group),
                statistics.fmean(qualities),
                statistics.stdev(qualities) if len(qualities) > 1 else None,
                statistics.median(run["peak_memory"] for run in group),
                statistics.median(ratios) if ratios else float("nan"),
                group[0]["bytes"],
            )
        )
    return found


def describe(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def lower_ranks(run: Mapping[str, Any]) -> list[str]:
    """Where the default rank was more than a layer's width."""
    ranks = run.get("lower_ranks", {})
    groups = {size: [name for name in ranks if ranks[name] == size] for size in dict.fromkeys(ranks.values())}
    return [f"rank {size} in {', '.join(names)} (no wider)" for size, names in groups.items()]


def front(points: Sequence[tuple[float, float]], more_is_better: bool) -> list[int]:
    """The Pareto front of points (cost, quality): those that no other one beats in one without losing in the other.

    Their indices, by cost.
    """
    sign = -1 if more_is_better else 1
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not found or sign * points[i][1] < sign * points[found[-1]][1]:
            found.append(i)
    return found


def cells(table: Sequence[Row], runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the printed table."""
    name, _ = quality_of(runs)
    first = table[0].method
    heads = ["method", "settings", "lr", "trained values", f"held-out {name}"]
    heads += ["peak memory, MB", f"step / {first}", "file, kB"]
    body = [
        [
            row.method,
            row.settings,
            f"{row.learning_rate:g}",
            f"{row.trained_values:,}",
            f"{row.quality:.4f}" + ("" if row.quality_std is None else f" ± {row.quality_std:.4f}"),
            f"{row.memory / 1e6:,.1f}",
            f"{row.step:.2f}",
            f"{row.adapter_bytes / 1e3:,.1f}",
        ]
        for row in table
    ]
    return heads, body


def notes(table: Sequence[Row], runs: Runs) -> list[str]:
    """How to read the table."""
    name, more = quality_of(runs)
    clock = "wall time" if runs[0]["memory_of"].startswith("CUDA") else "CPU time of the process"
    seeds = max(row.seeds for row in table)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    found = [
        f"{name}: on {runs[0]['samples']['eval']:,} held-out samples after {runs[0]['steps']:,} steps, "
        f"{'the more' if more else 'the less'} the better; {over}",
        f"peak memory: of {runs[0]['memory_of']}, by loading and training, median",
        f"step: {clock} of an optimizer step over {table[0].method}'s with the same seed, median",
    ]
    found += [f"{row.method} has {row.seeds} of {seeds} seeds" for row in table if row.seeds < seeds]
    lower = {run["method"]: lower_ranks(run) for run in runs}
    found += [f"{method} has {'; '.join(told)}" for method, told in lower.items() if told]
    if table[0].whole_values:
        found.append(f"every adapter has {table[0].whole_values:,} values of new modules beside it, in the file too")
    return found


def markdown(runs: Runs, remarks: Sequence[str] = (), failures: Mapping[str, str] | None = None) -> str:
    table = rows(runs)
    heads, body = cells(table, runs)
    rule = ["---", "---", *["---:"] * (len(heads) - 2)]
    lines = [f"| {' | '.join(line)} |" for line in [heads, rule, *body]]
    said = [*notes(table, runs), *remarks, *(f"{name} did not run: {why}" for name, why in (failures or {}).items())]
    return "\n".join([*lines, "", *(f"- {line}" for line in said), ""])


def write_csv(runs: Runs, path: Path) -> None:
    """One line a method, all numbers in full."""
    name, _ = quality_of(runs)
    of = "cuda" if runs[0]["memory_of"].startswith("CUDA") else "process"
    heads = ["method", "settings", "learning_rate", "trained_values", "whole_module_values", "seeds", f"{name}_mean"]
    heads += [f"{name}_std", f"peak_memory_{of}_bytes", "step_ratio", "file_bytes"]
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(heads)
        for row in rows(runs):
            line = [row.method, row.settings, row.learning_rate, row.trained_values, row.whole_values, row.seeds]
            out.writerow([*line, row.quality, row.quality_std, row.memory, row.step, row.adapter_bytes])


def plot(runs: Runs, path: Path) -> None:
    """Quality against trained values, peak memory and step time; the line is the front of what nothing else beats."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    table = rows(runs)
    name, more = quality_of(runs)
    costs = {
        "trained values": [float(row.trained_values) for row in table],
        f"peak memory of {runs[0]['memory_of']}, MB": [row.memory / 1e6 for row in table],
        f"step time / {table[0].method}'s": [row.step for row in table],
    }
    qualities = [row.quality for row in table]
    palette = colormaps["tab10" if len(table) <= 10 else "tab20"]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (cost, values) in zip(figure.subplots(1, 3, sharey=True), costs.items(), strict=True):
        best = front(list(zip(values, qualities, strict=True)), more)
        corners = [values[i] for i in best], [qualities[i] for i in best]
        axes.plot(*corners, color="grey", linestyle="--", drawstyle="steps-post", zorder=0)
        for i, row in enumerate(table):
            error = row.quality_std or None
            label = row.method if axes.get_subplotspec().is_first_col() else None
            axes.errorbar(values[i], row.quality, yerr=error, fmt="o", capsize=3, color=palette(i), label=label)
        axes.set_xlabel(cost)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if cost == "trained values":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(f"held-out {name}" + ("" if more else ", less is better"))
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, format="png", dpi=120)


def write(
    runs: Runs, folder: Path, remarks: Sequence[str] = (), failures: Mapping[str, str] | None = None
) -> list[Path]:
    """results.md and results.csv, and pareto.png where matplotlib is installed; their paths."""
    page, sheet, picture = (folder / name for name in FILES)
    with written(page, "compare") as draft:
        draft.write_text(markdown(runs, remarks, failures), encoding="utf-8")
    with written(sheet, "compare") as draft:
        write_csv(runs, draft)
    try:
        with written(picture, "compare") as draft:
            plot(runs, draft)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [page, sheet]
    return [page, sheet, picture]
