"""The outcome of a comparison as a table, in CSV and Markdown, and as a picture."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .intervals import Interval, deviation, t_interval
from .metrics import more_is_better, value_of

FILES = ("results.md", "results.csv", "pareto.png")
Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One method over all its seeds. Memory and step time are medians; memory and file in bytes.

    `quality_std` is the sample's standard deviation over seeds, None with one seed. `step` is a ratio to the first
    method's, seed by seed, and `difference` the quality less the first method's: their mean with its 95 % t-interval;
    None of the first method itself, and of fewer than two seeds. `others` are mean and standard deviation of what else
    was asked for.
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
    difference: Interval | None = None
    others: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def quality_of(runs: Runs) -> tuple[str, bool]:
    """Its name, and whether more of it is better: of what chose the checkpoints, else of accuracy or loss."""
    name = runs[0].get("best", {}).get("metric") or ("accuracy" if "accuracy" in runs[0]["eval"] else "loss")
    return name, more_is_better(name)


def other_names(runs: Runs) -> list[str]:
    """Of the metrics beside the quality that were asked for."""
    name, _ = quality_of(runs)
    return [other for other in runs[0]["eval"] if other not in (name, "loss", "accuracy", "perplexity")]


def rows(runs: Runs) -> list[Row]:
    """A row for each method and its settings, in the order of their first runs."""
    name, _ = quality_of(runs)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], describe(run["method_settings"])), []).append(run)
    first = next(iter(groups.values()))
    yardstick = {run["seed"]: run["step_seconds"] for run in first}
    base = {run["seed"]: value_of(run["eval"], name) for run in first}
    found = []
    for (method, settings), group in groups.items():
        qualities = {run["seed"]: value_of(run["eval"], name) for run in group}
        differences = [quality - base[seed] for seed, quality in qualities.items() if seed in base]
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
                *spread([*qualities.values()]),
                statistics.median(run["peak_memory"] for run in group),
                statistics.median(ratios) if ratios else float("nan"),
                group[0]["bytes"],
                None if group is first else t_interval(differences),
                {other: spread([run["eval"][other] for run in group]) for other in other_names(runs)},
            )
        )
    return found


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation: None with one value, nan where a run diverged."""
    return statistics.fmean(values), deviation(values) if len(values) > 1 else None


def shown(mean: float, std: float | None) -> str:
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def told(difference: Interval | None) -> str:
    """`=` where the interval holds 0."""
    if difference is None:
        return ""
    return "=" if difference.holds_zero else f"{difference.mean:+.4f} ± {difference.high - difference.mean:.4f}"


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
    known = [i for i, point in enumerate(points) if math.isfinite(point[1])]  # the rest diverged
    for i in sorted(known, key=lambda i: (points[i][0], sign * points[i][1])):
        if not found or sign * points[i][1] < sign * points[found[-1]][1]:
            found.append(i)
    return found


def cells(table: Sequence[Row], runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the printed table."""
    name, _ = quality_of(runs)
    first = table[0].method
    others, differ = other_names(runs), any(row.difference for row in table)
    heads = ["method", "settings", "lr", "trained values", f"held-out {name}"]
    heads += [*([f"less {first}'s"] if differ else []), *others]
    heads += ["peak memory, MB", f"step / {first}", "file, kB"]
    body = [
        [
            row.method,
            row.settings,
            f"{row.learning_rate:g}",
            f"{row.trained_values:,}",
            shown(row.quality, row.quality_std),
            *([told(row.difference)] if differ else []),
            *(f"{row.others[other][0]:.4f}" for other in others),
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
    if any(row.difference for row in table):
        found.insert(
            1,
            f"less {table[0].method}'s: with the same seed, mean with the 95 % interval (Student's t over the seeds); "
            "= where that holds 0, and these seeds do not tell them apart",
        )
    found += [f"{row.method} has {row.seeds} of {seeds} seeds" for row in table if row.seeds < seeds]
    lost = [run for run in runs if not math.isfinite(value_of(run["eval"], name))]
    which = ", ".join(f"{run['method']} with seed {run['seed']}" for run in lost)
    found += [f"diverged: {which}"] if lost else []
    lower = {run["method"]: lower_ranks(run) for run in runs}
    found += [f"{method} has {'; '.join(told)}" for method, told in lower.items() if told]
    if table[0].whole_values:
        found.append(f"every adapter has {table[0].whole_values:,} values of new modules beside it, in the file too")
    return found


def markdown(runs: Runs, remarks: Sequence[str] = (), failures: Mapping[str, str] | None = None) -> str:
    table = rows(runs)
    heads, body = cells(table, runs)
    rule = ["---", "---", *["---:"] * (len(heads) - 2)]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in body]
    lines = [f"| {' | '.join(line)} |" for line in [heads, rule, *escaped]]
    said = [*notes(table, runs), *remarks, *(f"{name} did not run: {why}" for name, why in (failures or {}).items())]
    return "\n".join([*lines, "", *(f"- {line}" for line in said), ""])


def write_csv(runs: Runs, path: Path) -> None:
    """One line a method, all numbers in full."""
    name, _ = quality_of(runs)
    of = "cuda" if runs[0]["memory_of"].startswith("CUDA") else "process"
    heads = ["method", "settings", "learning_rate", "trained_values", "whole_module_values", "seeds", f"{name}_mean"]
    heads += [f"{name}_std", f"peak_memory_{of}_bytes", "step_ratio", "file_bytes"]
    heads += ["difference", "difference_low", "difference_high"]
    heads += [f"{other}_{kind}" for other in other_names(runs) for kind in ("mean", "std")]
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(heads)
        for row in rows(runs):
            line = [row.method, row.settings, row.learning_rate, row.trained_values, row.whole_values, row.seeds]
            line += [row.quality, row.quality_std, row.memory, row.step, row.adapter_bytes]
            line += [row.difference.mean, row.difference.low, row.difference.high] if row.difference else [None] * 3
            out.writerow([*line, *(value for pair in row.others.values() for value in pair)])
