"""The demo's outcome as a table for the terminal, as Markdown, JSON and a picture."""

import json
import platform
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .run import BASELINE, LOAD_TOLERANCE, MERGE_TOLERANCE, Report, Result

HEADER = ["method", "accuracy", "lr", "params", "file kB", "step", "loaded", "merged"]
PACKAGES = ("peftx", "peft", "transformers", "torch")


def rows(report: Report) -> list[list[str]]:
    """One line of cells for each method, as `HEADER` names them."""
    return [
        [
            result.name,
            f"{result.accuracy:.3f}",
            f"{result.learning_rate:g}",
            f"{result.adapter_parameters:,}",
            f"{result.adapter_bytes / 1000:,.0f}",
            f"{report.step_ratio(result):.2f}x",
            verdict(result, result.loaded_difference),
            verdict(result, result.merged_difference),
        ]
        for result in report.results
    ]


def verdict(result: Result, difference: float | None) -> str:
    """How far the logits moved; a word if they did not move, moved too far, or were never computed."""
    if difference is None:
        return "no"
    if not result.equal:
        return f"DIFFERS {difference:.0e}"
    return f"±{difference:.0e}" if difference else "equal"


def baselines(report: Report) -> list[tuple[str, float]]:
    """What a method must beat, with its accuracy."""
    return [("majority class", report.majority), ("frozen probe", report.probe)]


def notes(report: Report) -> list[str]:
    """How to read the table, a sentence a line."""
    return [
        f"accuracy: on {report.test_texts} held-out docstrings after {len(report.results[0].losses)} steps on "
        f"{report.train_texts} others; an accuracy of 0.9 has a standard error of {standard_error(report, 0.9):.3f}",
        "frozen probe: logistic regression on the embeddings of the encoder as it came",
        f"params: the adapter's; every method also trains the same {report.results[0].head_parameters:,} of pooler "
        "and classifier, which are part of the file",
        f"step: CPU time of a training step over {BASELINE}'s on the same batch, median",
        "loaded, merged: largest change of a held-out logit by saving and loading the adapter, and by merging it; the "
        f"limits are {LOAD_TOLERANCE:g} and {MERGE_TOLERANCE:g}, and no answer may change",
        f"families: {', '.join(report.families)}",
    ]


def standard_error(report: Report, accuracy: float) -> float:
    """Of a share of `test_texts` independent answers."""
    return (accuracy * (1 - accuracy) / report.test_texts) ** 0.5


def table(report: Report) -> Table:
    """For the terminal: the baselines, then the methods, the most accurate in bold, a broken one in red."""
    best = max(result.accuracy for result in report.results)
    title, caption = "Which module does this docstring come from?", "\n".join(notes(report))
    view = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.caption_justify = "left"
    for name in HEADER:
        view.add_column(name, justify="left" if name == HEADER[0] else "right", no_wrap=True)
    for name, accuracy in baselines(report):
        view.add_row(name, f"{accuracy:.3f}", style="dim")
    view.add_section()
    for cells, result in zip(rows(report), report.results, strict=True):
        view.add_row(*cells, style="red" if not result.equal else "bold" if result.accuracy == best else None)
    return view


def markdown(report: Report) -> str:
    """The same as `table`, for people."""
    rule = [":--", *["--:"] * (len(HEADER) - 1)]
    references = [[name, f"{accuracy:.3f}", *[""] * (len(HEADER) - 2)] for name, accuracy in baselines(report)]
    lines = [f"| {' | '.join(cells)} |" for cells in [HEADER, rule, *references, *rows(report)]]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(report)), ""])


def as_json(report: Report) -> str:
    versions = {"python": platform.python_version()} | {name: import_module(name).__version__ for name in PACKAGES}
    return json.dumps(asdict(report) | {"versions": versions}, default=str, indent=1) + "\n"


def write(report: Report) -> list[Path]:
    """Write results.md, results.json and results.png beside the adapters; their paths."""
    paths = [report.options.output / f"results.{kind}" for kind in ("md", "json", "png")]
    paths[0].write_text(markdown(report), encoding="utf-8")
    paths[1].write_text(as_json(report), encoding="utf-8")
    plot(report, paths[2])
    return paths


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Exponential moving average without its bias towards zero at the start; its window is a `share` of the values."""
    keep = 1 - 1 / max(1.0, share * len(values))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def plot(report: Report, path: Path) -> None:
    """Accuracy, size and step time, a method a row under the baselines, beside the training losses."""
    results, references = report.results, baselines(report)
    names = [name for name, _ in references] + [result.name for result in results]
    accuracies = [accuracy for _, accuracy in references] + [result.accuracy for result in results]
    palette = colormaps["tab10" if len(results) <= 10 else "tab20"]
    colours = [palette(index) for index in range(len(results))]
    rows = range(len(names))
    own_rows = rows[len(references) :]

    figure = Figure(figsize=(14, 2 + 0.4 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, width_ratios=(3.2, 2, 1.6, 4))
    quality, size, speed, learning = panels

    for row, accuracy, colour in zip(rows, accuracies, [*["grey"] * len(references), *colours], strict=True):
        error = standard_error(report, accuracy)
        quality.hlines(row, report.majority, accuracy, colors=[colour], alpha=0.35, linewidth=2)
        quality.errorbar(accuracy, row, xerr=error, fmt="o", color=colour, capsize=4, markersize=7)
        quality.annotate(f"{accuracy:.3f}", (accuracy + error, row), (6, -4), textcoords="offset points")
    for _, accuracy in references:
        quality.axvline(accuracy, color="grey", linestyle="--", linewidth=1, zorder=0)
    sizes = [result.adapter_parameters for result in results]
    ratios = [report.step_ratio(result) for result in results]
    size.bar_label(size.barh(own_rows, sizes, color=colours, height=0.6), [f" {value:,}" for value in sizes])
    speed.bar_label(speed.barh(own_rows, ratios, color=colours, height=0.6), [f" {value:.2f}x" for value in ratios])
    for axes in (quality, size, speed):
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(rows, names if axes is quality else [""] * len(names))
        axes.tick_params(axis="y", length=0)
    quality.set(xlim=(report.majority - 0.05, 1.08), title="held-out accuracy ± s.e.")
    size.set(xscale="log", xlim=(min(sizes) / 4, max(sizes) * 60), title="adapter parameters")
    speed.set(xlim=(0, max(ratios) * 1.45), title=f"step time / {BASELINE}'s")

    for result, colour in zip(results, colours, strict=True):
        steps = range(1, len(result.losses) + 1)
        learning.plot(steps, smooth(result.losses), color=colour, label=result.name)
    learning.set(xlabel="step", ylim=(0, None), title="training loss, moving average")
    learning.legend(frameon=False, ncols=1 + (len(results) > 6))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is not learning else "both", alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"Which of {len(report.families)} module families does a docstring come from? "
        f"Fine-tuned on {report.train_texts} docstrings, {len(results[0].losses)} steps"
    )
    figure.savefig(path, format="png", dpi=120)
