"""What a selection looks like: a picture of all samples, and the ones at both ends to read."""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .pairs import is_pair
from .probe import OF_HEAD
from .select import METHODS
from .selection import Selection

logger = logging.get_logger(__name__)

PAGE, PICTURE = "selection.md", "selection.png"
ROWS = 10
CHARACTERS = 160


def scatter(
    scores: Mapping[str, Tensor], indices: Sequence[int], path: Path | str, x: str = "don", y: str = "nod"
) -> None:
    """Draws all samples by two of their scores, the kept ones (`indices`) over the dropped ones, into a PNG file.

    Needs matplotlib. Samples with NaN or infinity are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kept = torch.zeros(len(scores[x]), dtype=torch.bool)
    kept[list(indices)] = True
    axes = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    for chosen, label, color in ((~kept, "dropped", "tab:gray"), (kept, "kept", "tab:blue")):
        size = 12 if len(kept) < 2000 else 4
        axes.scatter(
            scores[x][chosen],
            scores[y][chosen],
            s=size,
            alpha=0.6,
            color=color,
            linewidths=0,
            label=f"{label}: {int(chosen.sum())}",
        )
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    if x in ("label", "tokens"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


LABELS = {
    "don": "DON: fall of the head's norm",
    "nod": "NOD: move of the head",
    "loss": "loss (nats a token)",
    "tokens": "supervised tokens",
}


def table(
    scores: Mapping[str, Tensor],
    wanted: Tensor,
    dataset: Any,
    *,
    rows: int = ROWS,
    tokenizer: Any = None,
    characters: int = CHARACTERS,
) -> str:
    """The `rows` most and the `rows` least wanted samples as a Markdown table: rank, index, scores, and their text.

    Args:
        scores: (n,) of each metric.
        wanted: (n,), see `preference`. Samples with NaN are never kept and not shown.
        dataset: of n samples; only those shown are read.
        tokenizer: makes text of `input_ids`. Without one, the strings of a sample are shown, or its JSON.
        characters: a text longer than that is cut in its middle.
    """
    order = ranking(wanted)
    names = [name for name in scores if name not in ("label", "tokens")]
    names += ["tokens"] * ("tokens" in scores and "label" not in scores)  # a classifier's sample has one label
    head = ["rank", "index", "wanted", *names, "text"]
    lines = [head, ["---:"] * (len(head) - 1) + ["---"]]
    ranked = list(enumerate(order, 1))
    for entry in ranked if len(ranked) <= 2 * rows else [*ranked[:rows], None, *ranked[len(ranked) - rows :]]:
        if entry is None:
            lines.append(["..."] * len(head))
            continue
        rank, index = entry
        numbers = [f"{float(scores[name][index]):.4g}" for name in names]
        text = excerpt(dataset[index], tokenizer, characters)
        lines.append([str(rank), str(index), f"{float(wanted[index]):.4g}", *numbers, text])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(wanted: Tensor) -> list[int]:
    """The samples that can be kept, the most wanted first."""
    best = torch.sort(wanted, descending=True, stable=True).indices
    return best[wanted[best].isfinite()].tolist()


def shown(wanted: Tensor, rows: int = ROWS) -> set[int]:
    """The samples that `table` shows."""
    order = ranking(wanted)
    return {*order[:rows], *order[max(0, len(order) - rows) :]}


def excerpt(sample: Any, tokenizer: Any = None, characters: int = CHARACTERS) -> str:
    """A sample on one line, as a cell of Markdown."""
    fields = dict(sample) if isinstance(sample, Mapping) else {"sample": sample}
    ids = [*fields["prompt_ids"], *fields["chosen_ids"]] if is_pair(fields) else fields.get("input_ids")
    if tokenizer is not None and hasattr(tokenizer, "decode") and ids is not None:
        parts = [tokenizer.decode(ids, skip_special_tokens=True)]
    else:
        parts = [value for value in fields.values() if isinstance(value, str)]
        parts = parts or [json.dumps(fields, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))]
    for name in ("label", "labels"):
        value: Any = fields.get(name)
        value = value.item() if getattr(value, "ndim", 1) == 0 else value
        parts += [f"[{value}]"] * isinstance(value, int | float)
    text, half = " ".join(" ".join(parts).split()), characters // 2
    if len(text) > characters:
        text = f"{text[:half]} ... {text[len(text) - half :]}"
    return text.replace("|", "\\|")


def shown_with(method: str) -> tuple[str, ...]:
    """Scores that a report shows beside the method's own, since they cost nothing more."""
    if method == "random":
        return ()
    return ("don", "nod", "loss") if OF_HEAD & set(METHODS[method]) else ("loss",)


def axes_of(method: str, scores: Container[str] = ()) -> tuple[str, str]:
    """The two scores of the picture, of those that there are."""
    if OF_HEAD & set(METHODS[method]):
        return "don", "nod"
    if method in ("loss", "random"):
        return ("label" if "label" in scores else "tokens"), method
    return method, "loss"


def write_report(
    selection: Selection, wanted: Tensor, dataset: Any, folder: Path, *, method: str, tokenizer: Any = None
) -> None:
    """`selection.md`, and `selection.png` where matplotlib is installed, beside `selection.json`."""
    scores = selection.scores
    count, kept = len(wanted), len(selection.indices)
    title = f"{kept} of {count} samples kept by {method}. The most and the least wanted:"
    page = f"{title}\n\n{table(scores, wanted, dataset, tokenizer=tokenizer)}\n"
    (folder / PAGE).write_text(page, encoding="utf-8")
    try:
        scatter(scores, selection.indices, folder / PICTURE, *axes_of(method, scores))
    except ModuleNotFoundError as error:
        logger.info(f"no selection.png: {error.name} is missing")
