"""Fine-tune one encoder with LoRA and methods of peftx; save, load back, merge and export each adapter, and compare.

All methods get the same layers, head, batches, number of steps and seed; only the learning rate of the adapter is their
own. Pooler and classifier are trained with every method, at one rate.
"""

import statistics
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
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import peftx

from ..files import claim
from ..registry import MethodInfo
from ..utils import quiet
from . import model as encoder
from .data import load
from .errors import DemoError
from .recorder import Recorder, Watch

BASELINE = "lora"
LOAD_TOLERANCE = 0.0
MERGE_TOLERANCE = 1e-4
LEARNING_RATE = 2e-3  # LoRA's, and of every method's head
WARMUP = 0.05  # share of the steps
EXAMPLES = 3  # answers that are kept
CHECKED = 4  # one held-out text in so many is answered again by the loaded, the merged and the exported model
PLAIN = "plain-lora"  # where an adapter is exported to, in its own folder


@dataclass(frozen=True)
class Options:
    """What the user chooses. `methods` names variants, none means all; `texts` limits the data set; without `dropout`
    the encoder's is left out."""

    model: Path
    output: Path
    methods: tuple[str, ...] = ()
    epochs: float = 2.0
    batch_size: int = 8
    seed: int = 0
    texts: int | None = None
    dropout: bool = True


@dataclass(frozen=True)
class Contender:
    """One row of the comparison: a config class with its arguments, the learning rate, and what drives its rule."""

    name: str
    config: Callable[..., PeftConfig]
    settings: Mapping[str, Any]
    learning_rate: float
    mergeable: bool = True
    callback: type[TrainerCallback] | None = None
    exported: bool = False  # whether it is a plain LoRA (or DoRA) too


@dataclass(frozen=True)
class Result:
    """What one method did. Differences are the largest between logits of every fourth held-out text; None if the method
    cannot merge, or is no plain LoRA (or is one already).
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
    exported_difference: float | None = None
    held_out_loss: float = float("nan")

    @property
    def equal(self) -> bool:
        """Whether the loaded, the merged and the exported model answer like the trained one."""
        summed = max(self.merged_difference or 0.0, self.exported_difference or 0.0)
        return self.loaded_difference <= LOAD_TOLERANCE and summed <= MERGE_TOLERANCE and self.same_predictions


@dataclass(frozen=True)
class Report:
    """The results, the baseline's first, and what they are measured against: the accuracy of the largest class and of
    a logistic regression on the frozen encoder, and the held-out loss before the training, under the new head."""

    options: Options
    families: list[str]
    train_texts: int
    test_texts: int
    majority: float
    probe: float
    results: list[Result]
    start_loss: float = float("nan")

    @property
    def best(self) -> Result:
        """The most accurate; of several the smallest."""
        return max(self.results, key=lambda result: (result.accuracy, -result.adapter_parameters))

    def step_ratio(self, result: Result) -> float:
        """CPU time of a step against the baseline's on the same batch; the median over all steps."""
        pairs = zip(result.step_seconds, self.results[0].step_seconds, strict=True)
        return statistics.median(own / baseline for own, baseline in pairs)


def contenders(names: tuple[str, ...] = ()) -> list[Contender]:
    """LoRA, then the named variants of peftx's methods, or all of them."""
    lora = Contender(BASELINE, LoraConfig, {"r": 8, "lora_alpha": 16}, learning_rate=LEARNING_RATE)
    ours = [
        Contender(
            name, info.config, settings, info.learning_rate, info.mergeable, info.callback, is_exported(info, settings)
        )
        for info in peftx.methods()
        for name, settings in info.variants.items()
    ]
    known = [contender.name for contender in [lora, *ours]]
    if unknown := [name for name in names if name not in known]:
        raise DemoError(f"unknown method {', '.join(unknown)}: the demo knows {', '.join(known)}")
    return [lora, *(contender for contender in ours if not names or contender.name in names)]


def is_exported(info: MethodInfo, settings: Mapping[str, Any]) -> bool:
    """Whether a LoRA or DoRA of the adapter's own rank has equal outputs."""
    return info.lora_export_of(settings) in ("exact", "dora")


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
        start_loss = bench.loss(encoder.logits(bench.base(options.seed), bench.test, bench.collate))
        results = [bench.contend(entry) for entry in entries]
    labels = torch.tensor(data["test"]["label"])
    majority = (labels.bincount().max() / len(labels)).item()
    sizes = len(bench.train), len(bench.test)
    return Report(options, bench.families, *sizes, majority, probe, results, start_loss)


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

    def base(self, seed: int) -> PreTrainedModel:
        """The encoder under a random head."""
        base = encoder.classifier(self.options.model, len(self.families), seed)
        base.config.id2label = dict(enumerate(self.families))  # for the card
        return base

    def accuracy(self, predictions) -> float:
        return float(accuracy_score(self.test["label"], predictions))

    def loss(self, logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits, torch.tensor(self.test["label"])).item()

    def probe(self) -> float:
        """Accuracy of logistic regression on the frozen encoder's embeddings."""
        base = self.base(self.options.seed)
        train, test = (encoder.embeddings(base, data, self.collate).numpy() for data in (self.train, self.test))
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        return self.accuracy(regression.fit(train, self.train["label"]).predict(test))

    def contend(self, entry: Contender) -> Result:
        """Train one method, save it, load it into a fresh base, merge it there, and export it for stock PEFT."""
        folder = self.options.output / entry.name
        base = self.base(self.options.seed)
        if not self.options.dropout:
            encoder.without_dropout(base)
        model = get_peft_model(base, peft_config(entry, base))
        recorder = self.fit(model, entry, folder)
        trained = encoder.logits(model, self.test, self.collate)
        model.save_pretrained(str(folder))
        adapter, head = (sum(p.numel() for p in part) for part in encoder.trainable(model))

        some = self.test.select(range(0, len(self.test), CHECKED))

        def answers(network: torch.nn.Module) -> torch.Tensor:
            return encoder.logits(network.to(model.device), some, self.collate)

        def loaded(path: Path) -> PeftModel:  # with another random head, which the saved one must replace
            return PeftModel.from_pretrained(self.base(self.options.seed + 1), path)

        unmoved = answers(model)
        again = loaded(folder)
        moved = {"loaded": answers(again)}
        if entry.mergeable:
            moved["merged"] = answers(again.merge_and_unload())
        if entry.exported:
            peftx.export_lora(model, folder / PLAIN)
            moved["exported"] = answers(loaded(folder / PLAIN))
        differences = {how: (logits - unmoved).abs().max().item() for how, logits in moved.items()}
        return Result(
            entry.name,
            self.accuracy(trained.argmax(-1)),
            entry.learning_rate,
            adapter,
            head,
            adapter_bytes=sum(path.stat().st_size for path in folder.glob("adapter_model.*")),
            loaded_difference=differences["loaded"],
            merged_difference=differences.get("merged"),
            same_predictions=all(torch.equal(logits.argmax(-1), unmoved.argmax(-1)) for logits in moved.values()),
            losses=recorder.losses,
            step_seconds=recorder.seconds,
            examples=self.examples(trained.argmax(-1)),
            exported_difference=differences.get("exported"),
            held_out_loss=self.loss(trained),
        )

    def examples(self, answers: torch.Tensor) -> list[tuple[str, str, str]]:
        """Text, family and answer, at fixed places of the test texts, which are sorted by length."""
        rows = [len(self.test) * (2 * i + 1) // (2 * EXAMPLES) for i in range(EXAMPLES)]
        return [
            (self.test[row]["text"], self.families[self.test[row]["label"]], self.families[int(answers[row])])
            for row in rows
        ]

    def fit(self, model: PeftModel, entry: Contender, folder: Path) -> Recorder:
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
