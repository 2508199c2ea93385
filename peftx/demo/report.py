"""The demo's outcome as a table for the terminal, as Markdown, JSON and a picture."""

import json
import platform
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from rich import box
from rich.table import Table

from .picture import plot, standard_error
from .run import BASELINE, CHECKED, LOAD_TOLERANCE, MERGE_TOLERANCE, Report, Result

HEADER = ["method", "accuracy", "values", "file kB", "step", "loaded", "merged", "exported"]
PACKAGES = ("peftx", "peft", "transformers", "torch")


def rows(report: Report) -> list[list[str]]:
    """One line of cells for each method, as `HEADER` names them."""
    return [
        [
            result.name,
            f"{result.accuracy:.3f}",
            f"{result.adapter_parameters:,}",
            f"{result.adapter_bytes / 1000:,.0f}",
            f"{report.step_ratio(result):.2f}x",
            verdict(result, result.loaded_difference),
            verdict(result, result.merged_difference),
            verdict(result, result.exported_difference),
        ]
        for result in report.results
    ]


def verdict(result: Result, difference: float | None) -> str:
    """How far the logits moved; a word if they did not move, moved too far, or were never computed."""
    if difference is None:
        return "-"
    if not result.equal:
        return f"DIFFERS {difference:.0e}"
    return f"±{difference:.0e}" if difference else "equal"


def baselines(report: Report) -> list[tuple[str, float]]:
    """What a method must beat, with its accuracy."""
    return [("majority class", report.majority), ("frozen encoder", report.probe)]


def headline(report: Report) -> str:
    """What the run came to, in a sentence."""
    best = report.best
    gained = round((best.accuracy - report.probe) * report.test_texts)
    how = f"{abs(gained)} {'more' if gained > 0 else 'fewer'} than" if gained else "as many as"
    return (
        f"{best.name} gets {round(best.accuracy * report.test_texts)} of {report.test_texts} unseen texts right, {how} "
        f"the frozen encoder under a logistic regression."
    )


def notes(report: Report) -> list[str]:
    """How to read the table, a sentence a line."""
    how = "" if report.options.dropout else "without dropout "
    return [
        f"accuracy: on {report.test_texts} held-out docstrings, after {len(report.results[0].losses)} steps {how}on "
        f"{report.train_texts:,} others; an accuracy of 0.9 has a standard error of {standard_error(report, 0.9):.3f}",
        "frozen encoder: logistic regression on the embeddings of the encoder as it came",
        f"the held-out loss fell from {report.start_loss:.2f}, under a new head, to "
        f"{', '.join(f'{result.held_out_loss:.2f} ({result.name})' for result in report.results)}",
        f"values: the adapter's; the file holds the {report.results[0].head_parameters:,} of pooler and classifier too",
        f"step: CPU time of a training step over {BASELINE}'s on the same batch, median",
        f"loaded, merged, exported: largest change of a logit, on every {CHECKED}th held-out text, when the adapter is "
        "saved and loaded, merged into the weights, written as a plain LoRA for stock PEFT; the limits are "
        f"{LOAD_TOLERANCE:g} and {MERGE_TOLERANCE:g}, and no answer may change",
        f"the labels: {', '.join(report.families)}",
    ]


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
    return "\n".join([headline(report), "", *lines, "", *(f"- {note}" for note in notes(report)), ""])


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
