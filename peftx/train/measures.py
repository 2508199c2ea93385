"""What an evaluation measures: the task's own numbers, and the metrics that were asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.records import Records
from ..utils import CLASSIFIERS, IGNORE
from .answers import generation_options, prompts_and_answers
from .metrics import Metric, find_metric, names_of
from .plan import Plan
from .results import accuracy, classes, token_losses, token_metrics
from .settings import Section, Settings, section

OWN = {"SEQ_CLS": ("loss", "accuracy"), "TOKEN_CLS": ("loss", "accuracy")}  # measured without being asked for
TAKEN = ("loss", "accuracy", "perplexity", "token_loss", "token_accuracy", "epoch")
OWN |= dict.fromkeys(("CAUSAL_LM", "SEQ_2_SEQ_LM"), ("loss", "perplexity"))


@dataclasses.dataclass(frozen=True)
class Measures:
    """The metrics of a run.

    Attributes:
        metrics: those that were named.
        task: of the model.
        labels: names of a classifier's classes.
        generate: arguments of `generate`; None where nothing is generated.
        keys: of the values of the metrics.
        best: the key of what checkpoints are compared by; None where they are not.
    """

    metrics: tuple[Metric, ...]
    task: str
    labels: tuple[str, ...] = ()
    generate: Section | None = None
    keys: tuple[str, ...] = ()
    best: str | None = None

    @property
    def with_scores(self) -> bool:
        return any(metric.kind == "scores" for metric in self.metrics)

    def reduced(self, logits: Any, labels: Tensor) -> Any:
        """What of the logits of a batch is kept."""
        if self.task == "SEQ_CLS":
            scores = logits[0] if isinstance(logits, tuple) else logits
            return scores.float() if self.with_scores else classes(logits, labels)
        losses = token_losses(self.task, logits, labels)
        return (losses, classes(logits, labels)) if self.task == "TOKEN_CLS" and self.metrics else losses

    def compute(self, prediction: Any) -> dict[str, float]:
        """For the Trainer, of what is kept."""
        kept, labels = prediction.predictions, prediction.label_ids
        if self.task == "SEQ_CLS":
            found, scores = (kept.argmax(-1), kept) if self.with_scores else (kept, None)
            return {**self.of_classes(scores, found, labels), **accuracy(found, labels)}
        if self.task == "TOKEN_CLS" and self.metrics:
            return {**self.of_classes(None, kept[1], labels), **token_metrics(kept[0])}
        return token_metrics(kept)

    def of_classes(self, scores: Any, classes: Any, references: Any) -> dict[str, float]:
        """Values for a classifier.

        Args:
            scores: logits (samples, classes), or None where no metric needs them.
            classes: numbers of the classes, (samples,), or of tokens (samples, tokens).
            references: as classes; of tokens those below 0 have no label.
        """
        real = references >= 0
        given: dict[str, tuple[Any, Any]] = {"classes": (classes[real], references[real])}
        if scores is not None:
            shifted = np.exp(scores - scores.max(-1, keepdims=True))
            given["scores"] = (shifted / shifted.sum(-1, keepdims=True), references)
        if any(metric.kind == "names" for metric in self.metrics):
            given["names"] = tuple(self.named(part, real) for part in (classes, references))  # type: ignore[assignment]
        return self.all(given)

    def named(self, numbers: Any, real: Any) -> list[Any]:
        if self.task != "TOKEN_CLS":
            return [self.labels[number] for number in numbers]
        return [
            [self.labels[number] for number in row[keep]] for row, keep in zip(numbers, real, strict=True) if keep.any()
        ]

    def of_texts(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return self.all({"texts": (list(answers), list(references))})

    def all(self, given: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Values of all metrics; a key that is taken comes with the metric's name before it."""
        found: dict[str, float] = {}
        for metric in self.metrics:
            for key, value in metric.compute(*given[metric.kind]).items():
                taken = key in found or (key in TAKEN and key != metric.name)
                found[f"{Path(metric.name).stem}_{key}" if taken else key] = value
        return found


def measures_of(settings: Settings, plan: Plan, parts: Mapping[str, Records]) -> Measures:
    """The metrics of a run, each tried on the answers of the parts that it will be computed on.

    Raises:
        ValueError: there is no such metric, it does not fit the task, or gives no finite number there.
    """
    names, generate = names_of(settings.metric), section(settings.generate)
    classifier = plan.task in CLASSIFIERS
    if generate is not None and classifier:
        raise ValueError(f"generate is for language models, and the task is {plan.task}: leave it out")
    if generate is not None and not names:
        raise ValueError("generate: name what the answers are measured by, e.g. --metric rouge")
    if names and generate is None and not classifier:
        raise ValueError(f"metric {names[0]} needs answers to compare, which --generate makes")
    real = {name: part for name, part in parts.items() if part}
    if not real and (names or settings.best_metric):
        raise ValueError("a metric needs held-out samples: name eval_data, or an eval_share above 0")
    labels = plan.options.get("id2label", plan.config.id2label) or {} if classifier else {}
    known = tuple(str(labels[i]) for i in sorted(labels))
    metrics = tuple(find_metric(name, plan.task, len(known)) for name in names)
    measures = Measures(metrics, plan.task, known, None if generate is None else generation_options(generate))
    found: dict[str, float] = {}
    for name, part in real.items():
        found |= tried(measures, part, name, plan.tokenizer)
    best = settings.best_metric and best_key(settings.best_metric, plan.task, [*found])
    return dataclasses.replace(measures, keys=tuple(found), best=best)


def tried(measures: Measures, samples: Records, name: str, tokenizer: Any) -> dict[str, float]:
    """The metrics of answers that are all right."""
    if measures.task in CLASSIFIERS:
        rows = [np.atleast_1d(sample["labels"]) for sample in samples]
        labels = np.concatenate(rows) if measures.task == "TOKEN_CLS" else np.array([row[0] for row in rows])
        scores = 8.0 * np.eye(len(measures.labels))[labels] if measures.with_scores else None
        if measures.task == "TOKEN_CLS":
            labels = labels[None]
        found = measures.of_classes(scores, labels, labels)
    elif measures.metrics:
        answers = [answer for _, answer in prompts_and_answers(samples, measures.task)][:64]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        found = measures.of_texts(texts, texts)
    else:
        found = {}
    for key, value in found.items():
        if not np.isfinite(value):
            raise ValueError(f"{key} of right answers is {value} on the {name} part: has it samples of every class?")
    return found


def scored(samples: Records, task: str) -> int:
    """How many answers a proportion is of: labelled tokens, samples with an answer, or samples."""
    if task == "TOKEN_CLS":
        return sum(label != IGNORE for sample in samples for label in sample["labels"])
    return len(samples if task in CLASSIFIERS else prompts_and_answers(samples, task))


def best_key(best: str, task: str, measured: Sequence[str]) -> str:
    """The key of the metric `best`: itself, or the only one that begins so (`f1` for `f1_macro`).

    Raises:
        ValueError: there is none; the names there are stand in the message.
    """
    known = [*OWN[task], *measured]
    longer = [name for name in known if name.startswith(f"{best}_")]
    if best in known or len(longer) == 1:
        return best if best in known else longer[0]
    raise ValueError(f"best_metric is {best!r}, which is not measured: there are {', '.join(dict.fromkeys(known))}")


def of_trainer(name: str, task: str) -> str:
    """What the Trainer calls one of our numbers."""
    if task == "SEQ_CLS" or name not in OWN[task]:
        return f"eval_{name}"
    return "eval_token_accuracy" if name == "accuracy" else "eval_token_loss"
