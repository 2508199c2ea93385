"""The model cards of the demo's adapters, with what the run measured."""

import platform
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

from ..files import check_free, written
from ..hub import finish_card
from ..registry import methods
from . import model as encoder
from .data import MAX_TOKENS
from .errors import DemoError
from .picture import standard_error
from .run import BASELINE, CHECKED, LEARNING_RATE, WARMUP, Report, Result

LIMITS = (
    "One run with one seed, and each method's learning rate was chosen by hand with this task in view: differences of "
    "a few points between methods mean nothing. Nothing else was measured: no other texts or languages, and neither "
    "bias nor safety. The task shows that the method learns; it is of no use of its own."
)


def finish(report: Report) -> list[Path]:
    """Puts the results of a run onto the card of each adapter; their paths, the baseline's first."""
    return [finish_one(report, result) for result in report.results]


def finish_one(report: Report, result: Result) -> Path:
    options, steps = report.options, len(result.losses)
    baseline = report.results[0]
    baselines = {"LoRA, r=8, in the same run": baseline.accuracy} if result is not baseline else {}
    baselines |= {"logistic regression on the frozen encoder": report.probe, "majority class": report.majority}
    return finish_card(
        options.output / result.name,
        metrics={"accuracy": result.accuracy},
        dataset=f"docstrings of Python {platform.python_version()}'s standard library (peftx demo)",
        split="test",
        baselines=baselines,
        training={
            "texts": f"{report.train_texts:,}",
            "steps": steps,
            "epochs": options.epochs,
            "texts a step": options.batch_size,
            "optimizer": f"AdamW, no weight decay, {WARMUP:.0%} warm-up, then linear to zero",
            "learning rate of the adapter": result.learning_rate,
            "learning rate of the head": LEARNING_RATE,
            **({} if options.dropout else {"dropout": "none"}),
            "trained values": f"{result.adapter_parameters:,} of the adapter, {result.head_parameters:,} of the head",
            "seed": options.seed,
            "precision": "fp32",
            "CPU seconds": round(sum(result.step_seconds)),
        },
        examples=[(textwrap.shorten(text, 200), said(*answer)) for text, *answer in result.examples],
        notes=notes(report, result),
        limits=LIMITS,
        labels=report.families,
        base_model=encoder.public_name(options.model),
    )


def said(family: str, answer: str) -> str:
    return answer if answer == family else f"{answer} (wrong: {family})"


def notes(report: Report, result: Result) -> list[str]:
    """What the numbers stand for, and what somebody needs who uses the adapter."""
    moved = {
        "loaded back": result.loaded_difference,
        "merged": result.merged_difference,
        "exported as a plain LoRA": result.exported_difference,
    }
    told = [
        f"{how}, {f'its logits differ by at most {value:.0e}' if value else 'its logits are equal'}"
        for how, value in moved.items()
        if value is not None
    ]
    broken = [] if result.equal else ["**Its answers changed: do not use it.**"]
    origin = [encoder.ORIGIN] if encoder.public_name(report.options.model) == encoder.HUB_ID else []
    return [
        f"Accuracy on {report.test_texts:,} held-out texts, its standard error is "
        f"{standard_error(report, result.accuracy):.3f}. The file was tried on every {CHECKED}th: {'; '.join(told)}.",
        *broken,
        f"The task: from which module family does a docstring come? Families' names are masked in the texts, which are "
        f"cut to {MAX_TOKENS} tokens.",
        *origin,
    ]


def copied(names: Iterable[str]) -> list[str]:
    """Those of peftx's methods."""
    ours = {variant for info in methods() for variant in info.variants}
    return [name for name in names if name in ours and name != BASELINE]


def check_copies(folder: Path, names: Iterable[str]) -> None:
    """Raises DemoError where a card would be written over a file that the demo did not write."""
    try:
        check_free(folder, [f"{name}.md" for name in copied(names)], "demo")
    except ValueError as error:
        raise DemoError(str(error)) from error


def collect(report: Report, folder: Path) -> list[Path]:
    """Copies the finished cards of peftx's methods to `folder/<method>.md`.

    Raises:
        DemoError: the folder cannot be written to, or has such a file that is not the demo's.
    """
    names = copied(result.name for result in report.results)
    check_copies(folder, names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            with written(folder / f"{name}.md", "demo") as draft:
                shutil.copyfile(report.options.output / name / "README.md", draft)
    except OSError as error:
        raise DemoError(f"cannot write the cards to {folder}: {error.strerror}") from error
    return [folder / f"{name}.md" for name in names]
