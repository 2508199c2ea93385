"""Fine-tune one encoder with LoRA and every method of peftx; save, load back and merge each adapter, and compare.

All methods get the same layers, head, batches, number of steps and seed; only the learning rate of the adapter is their
own. Pooler and classifier are new to every method and learn at one rate.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import peftx

from ..files import claim
from ..utils import quiet
from . import model as encoder
from .data import load
from .errors import DemoError

BASELINE = "lora"
LOAD_TOLERANCE = 0.0
MERGE_TOLERANCE = 1e-4
LEARNING_RATE = 2e-3  # LoRA's, and of every method's head
WARMUP = 0.05  # share of the steps
EXAMPLES = 3  # answers that are kept

Watch = Callable[[str, int, int, float], None]  # method, step, steps, training loss


@dataclass(frozen=True)
class Options:
    """What the user chooses. `methods` names variants, none means all; `texts` limits the data set."""

    model: Path
    output: Path
    methods: tuple[str, ...] = ()
    epochs: float = 2.0
    batch_size: int = 8
    seed: int = 0
    texts: int | None = None


@dataclass(frozen=True)
class Contender:
    """One row of the comparison: a config class with its arguments, the learning rate, and what drives its rule."""

    name: str
    config: Callable[..., PeftConfig]
    settings: Mapping[str, Any]
    learning_rate: float
    mergeable: bool = True
    callback: type[TrainerCallback] | None = None


@dataclass(frozen=True)
class Result:
    """What one method did. Differences are the largest between held-out logits; None if the method cannot merge.
    Examples are held-out texts, one of each length from short to long, with their family and the method's answer."""

    name: str
    accuracy: float
    learning_rate: float
    adapter_parameters: int
    head_parameters: int
    adapter_bytes: int
    loaded_difference: float
    merged_difference: float | None
    same_predictions: bool
    losses: list[float] = field(repr=False)
    step_seconds: list[float] = field(repr=False)
    examples: list[tuple[str, str, str]] = field(repr=False)

    @property
    def equal(self) -> bool:
        """Whether the loaded and the merged model answer like the trained one."""
        close = self.loaded_difference <= LOAD_TOLERANCE and (self.merged_difference or 0.0) <= MERGE_TOLERANCE
        return close and self.same_predictions


@dataclass(frozen=True)
class Report:
    """The results, the baseline's first, and what they are measured against."""

    options: Options
    families: list[str]
    train_texts: int
    test_texts: int
    majority: float
    probe: float
    results: list[Result]

    def step_ratio(self, result: Result) -> float:
        """CPU time of a step against the baseline's on the same batch; the median over all steps."""
        pairs = zip(result.step_seconds, self.results[0].step_seconds, strict=True)
        return statistics.median(own / baseline for own, baseline in pairs)


def contenders(names: tuple[str, ...] = ()) -> list[Contender]:
    """LoRA, then the named variants of peftx's methods, or all of them."""
    lora = Contender(BASELINE, LoraConfig, {"r": 8, "lora_alpha": 16}, learning_rate=LEARNING_RATE)
    ours = [
        Contender(name, info.config, settings, info.learning_rate, info.mergeable, info.callback)
        for info in peftx.methods()
        for name, settings in info.variants.items()
    ]
    known = [contender.name for contender in [lora, *ours]]
    if unknown := [name for name in names if name not in known]:
        raise DemoError(f"unknown method {', '.join(unknown)}: the demo knows {', '.join(known)}")
    return [lora, *(contender for contender in ours if not names or contender.name in names)]


def first_variants(count: int | None = None) -> tuple[str, ...]:
    """One variant of each of the first `count` methods, or of all."""
    return tuple(next(iter(info.variants)) for info in peftx.methods()[:count])


def check(options: Options, overwrite: bool = False) -> list[Contender]:
    """What would run; a `DemoError` for what the user has to change first.

    Args:
        overwrite: whether what an earlier demo wrote to the output folder may be replaced.
    """
    entries = contenders(options.methods)
    if not 0 < options.epochs < float("inf"):
        raise DemoError(f"epochs must be a positive number, got {options.epochs}")
    encoder.check_folder(options.model)
    try:
        claim(options.output, "demo", {"model": options.model}, overwrite=overwrite)
    except (ValueError, OSError) as error:
        raise DemoError(f"cannot write to the folder {options.output}: {error}") from error
    return entries


def run(options: Options, watch: Watch = lambda *_: None) -> Report:
    """The whole demo. Adapters are written to `options.output/<method>`, an empty folder or a new one."""
    entries = check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    with quiet():
        tokenizer = encoder.tokenizer(options.model)
        data = load(tokenizer, options.texts)
        bench = Bench(options, data["train"], data["test"], DataCollatorWithPadding(tokenizer), watch)
        probe = bench.probe()
        results = [bench.contend(entry) for entry in entries]
    labels = torch.tensor(data["test"]["label"])
    majority = (labels.bincount().max() / len(labels)).item()
    return Report(options, bench.families, len(bench.train), len(bench.test), majority, probe, results)


@dataclass(frozen=True)
class Bench:
    """What every method is given."""

    options: Options
    train: Dataset
    test: Dataset
    collate: Callable
    watch: Watch

    @property
    def families(self) -> list[str]:
        return self.test.features["label"].names

    def base(self, seed: int):
        return encoder.classifier(self.options.model, len(self.families), seed)

    def accuracy(self, predictions) -> float:
        return float(accuracy_score(self.test["label"], predictions))

    def probe(self) -> float:
        """Accuracy of logistic regression on the frozen encoder's embeddings."""
        base = self.base(self.options.seed)
        train, test = (encoder.embeddings(base, data, self.collate).numpy() for data in (self.train, self.test))
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        return self.accuracy(regression.fit(train, self.train["label"]).predict(test))

    def contend(self, entry: Contender) -> Result:
        """Train one method, save it, load it into a fresh base and merge it there."""
        folder = self.options.output / entry.name
        base = self.base(self.options.seed)
        model = get_peft_model(base, peft_config(entry, base))
        recorder = self.fit(model, entry, folder)
        trained = encoder.logits(model, self.test, self.collate)
        model.save_pretrained(str(folder))
        adapter, head = (sum(p.numel() for p in part) for part in encoder.trainable(model))

        other = self.base(self.options.seed + 1)  # with another random head, which the saved one must replace
        reloaded = PeftModel.from_pretrained(other, folder).to(model.device)
        answers = [encoder.logits(reloaded, self.test, self.collate)]
        if entry.mergeable:
            answers.append(encoder.logits(reloaded.merge_and_unload(), self.test, self.collate))
        loaded, *merged = [(answer - trained).abs().max().item() for answer in answers]
        return Result(
            entry.name,
            self.accuracy(trained.argmax(-1)),
            entry.learning_rate,
            adapter,
            head,
            adapter_bytes=sum(path.stat().st_size for path in folder.glob("adapter_model.*")),
            loaded_difference=loaded,
            merged_difference=merged[0] if merged else None,
            same_predictions=all(torch.equal(answer.argmax(-1), trained.argmax(-1)) for answer in answers),
            losses=recorder.losses,
            step_seconds=recorder.seconds,
            examples=self.examples(trained.argmax(-1)),
        )

    def examples(self, answers: torch.Tensor) -> list[tuple[str, str, str]]:
        """Text, family and answer, at fixed places of the test texts, which are sorted by length."""
        rows = [len(self.test) * (2 * i + 1) // (2 * EXAMPLES) for i in range(EXAMPLES)]
        return [
            (self.test[row]["text"], self.families[self.test[row]["label"]], self.families[int(answers[row])])
            for row in rows
        ]

    def fit(self, model: PeftModel, entry: Contender, folder: Path) -> "Recorder":
        recorder = Recorder(entry.name, self.watch)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.options.epochs,
            per_device_train_batch_size=self.options.batch_size,
            warmup_steps=WARMUP,
            seed=self.options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        adapter, head = encoder.trainable(model)
        groups = [{"params": adapter, "lr": entry.learning_rate}, {"params": head, "lr": LEARNING_RATE}]
        trainer = LengthGroupedTrainer(
            model,
            arguments,
            self.collate,
            self.train.remove_columns("text"),
            callbacks=[recorder, *([entry.callback()] if entry.callback else [])],
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return recorder


def peft_config(entry: Contender, base) -> PeftConfig:
    """Every linear layer of the encoder gets an adapter; pooler and classifier are trained in full."""
    return entry.config(
        task_type=TaskType.SEQ_CLS,
        target_modules=encoder.adapted_modules(base),
        modules_to_save=encoder.head_modules(base),
        **entry.settings,
    )


class LengthGroupedTrainer(Trainer):
    """Batches of texts of like length, drawn by the seed alone: every method sees the same ones in the same order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        train_dataset = train_dataset or self.train_dataset
        lengths = [len(ids) for ids in train_dataset["input_ids"]]
        generator = torch.Generator().manual_seed(self.args.seed)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths, generator=generator)


class Recorder(TrainerCallback):
    """Keeps the loss and the CPU seconds of every step, and tells the watcher."""

    def __init__(self, name: str, watch: Watch):
        self.name, self.watch = name, watch
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.watch(self.name, state.global_step, state.max_steps, self.losses[-1])
