"""What a run came to: measured, as numbers and on the card."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from ..cards.adapter import UNFILLED, complete_card
from ..cards.labels import named_labels, with_labels
from ..files import written
from ..saved import METRICS, read_config
from ..utils import IGNORE

PACKAGES = ("peftx", "peft", "transformers", "accelerate", "torch")
WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")

PARTS = {"validation": "validation", "eval": "held-out"}

START, END = "<!-- run: peftx train writes from here -->", "<!-- run: to here -->"
RUN = re.compile(rf"{START}.*?{END}\n*", re.DOTALL)


def classes(logits: Any, labels: Tensor) -> Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(found: Any, labels: Any) -> dict[str, float]:
    return {"accuracy": float((found == labels).mean())}


def token_losses(task: str, logits: Any, labels: Tensor) -> Tensor:
    """Sum of the losses, number of the tokens, and how many of them were right, of each sample: (samples, 3).

    The Trainer's own evaluation loss is a mean of means of batches, which depends on how samples are batched.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    if task == "CAUSAL_LM":
        scores, labels = scores[:, scores.shape[1] - labels.shape[1] :][:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(scores.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    parts = losses, labels != IGNORE, scores.argmax(-1) == labels
    return torch.stack([part.sum(-1).float() for part in parts], dim=-1)


def token_metrics(losses: Any) -> dict[str, float]:
    """Of what `token_losses` gives."""
    total, count, right = losses.astype("float64").sum(0)
    return {"token_loss": float(total / max(1, count)), "token_accuracy": float(right / max(1, count))}


def evaluation_metrics(
    found: Mapping[str, float], task: str, keys: Sequence[str], prefix: str = "eval"
) -> dict[str, float]:
    """`loss`, and `accuracy` or `perplexity`, of TOKEN_CLS over all tokens that have a label; then those of `keys`."""
    if not found:
        return {}
    numbers = {name.removeprefix(f"{prefix}_"): value for name, value in found.items()}
    rest = {name: numbers[name] for name in keys}
    if task == "SEQ_CLS":
        return {"loss": numbers["loss"], "accuracy": numbers["accuracy"], **rest}
    loss = numbers["token_loss"]
    if task == "TOKEN_CLS":
        return {"loss": loss, "accuracy": numbers["token_accuracy"], **rest}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **rest}


def training_loss(history: Sequence[Mapping[str, Any]]) -> float:
    """Mean over all steps and processes. The Trainer's own leaves out the steps before a resume, and, since the last
    log entry, the other processes; `Record` sees to it that no step is without an entry."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / max(last, 1)


def kept(callbacks: Sequence[Any], count: int) -> int:
    """How many samples were trained on."""
    chosen = [callback.selection for callback in callbacks if getattr(callback, "selection", None) is not None]
    return len(chosen[0].indices) if chosen else count


def finish(folder: Path, metrics: dict[str, Any]) -> int:
    """Adds the results to the card, and writes the numbers; bytes saved."""
    size = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))
    versions = {name: version(name) for name in PACKAGES}
    page = json.dumps({**metrics, "bytes": size, "versions": versions}, indent=1, default=str)
    with written(folder / METRICS, "train") as draft:
        draft.write_text(page + "\n", encoding="utf-8")
    path = folder / "README.md"
    with written(path, "train") as draft:
        if path.is_file():
            shutil.copyfile(path, draft)
        else:
            ModelCard("---\n{}\n---\n").save(draft)
        if UNFILLED in draft.read_text(encoding="utf-8"):  # of a method of PEFT's own
            complete_card(draft, read_config(folder))
        card = ModelCard.load(draft, ignore_metadata_errors=True)
        text = f"{RUN.sub('', card.text).rstrip()}\n\n{run_section(metrics)}\n"
        card.text = with_labels(text, named_labels({"id2label": dict(enumerate(metrics["labels"] or ()))}))
        card.save(draft)
    return size


def best_row(metrics: Mapping[str, Any]) -> dict[str, str]:
    if (best := metrics.get("best")) is None or best["step"] is None:
        return {}
    on = PARTS["validation" if "validation" in metrics else "eval"]
    return {"checkpoint": f"of step {best['step']:,}, the best by {best['metric']} on the {on} samples"}


def run_section(metrics: Mapping[str, Any]) -> str:
    """The part of the card that says how it was trained, and how good it is."""
    count = metrics["samples"]
    rows = {
        "trained on": f"{count['trained_on']:,} samples, {metrics['steps']:,} steps",
        "learning rate, seed": f"{metrics['learning_rate']:g}, {metrics['seed']}",
        **(
            {"learning rate of the head": f"{head:g}"}
            if (head := metrics.get("head_learning_rate")) is not None
            else {}
        ),
        "training loss": f"{metrics['train_loss']:.4f}",
        **best_row(metrics),
        **{
            f"{name}, {count[part]:,} {told} samples": f"{v:.4f}"
            for part, told in PARTS.items()
            for name, v in metrics.get(part, {}).items()
        },
    }
    return "\n".join(
        [
            START,
            "",
            "## Training run",
            "",
            "| | |",
            "| --- | ---: |",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            END,
        ]
    )
