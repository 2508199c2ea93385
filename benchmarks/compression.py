"""Time and memory of a training step that collects for compression, as ratios to a plain one.

Every contender trains the same model in the same process: in a round each makes one step, in random order. Time is CPU
time of forward, backward and optimizer; a ratio is the median over rounds of the ratio to the plain step of that round.
Memory: what the step holds at most beyond the plain step, and what is held between steps, both as parts of the model.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from contenders import TARGETS, Setup, allocated_peak, laps
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.utils import logging

from peftx.compression.hooks import Collector
from peftx.compression.layers import target_layers
from peftx.utils import innermost

RESULTS = Path(__file__).parent / "results"
TRAINING = {
    "LoRA r=8, all layers": lambda model, name: get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS[name])),
    "all weights": lambda model, name: model.requires_grad_(True),
}
COLLECTORS: dict[str, dict[str, Any]] = {
    "per_batch": {"estimator": "per_batch"},
    "per_batch, input side": {"estimator": "per_batch", "what": ("fisher_in",)},
    "per_batch, 32 directions, input side (FisherCallback's default)": {
        "estimator": "per_batch",
        "what": ("fisher_in",),
        "directions": 32,
    },
    "per_sample, 32 directions, input side": {"estimator": "per_sample", "what": ("fisher_in",), "directions": 32},
    "per_sample": {"estimator": "per_sample"},
    "activations (abs)": {"what": ("abs",)},
}


class FullSquares:
    """The contender: squared gradients of whole weights in fp32, which have to get gradients for it."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [innermost(layer).weight for layer in target_layers(model).values()]
        self.trained = [weight.requires_grad for weight in self.weights]
        self.sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in self.weights]

    def __enter__(self) -> None:
        for weight in self.weights:
            weight.requires_grad_(True)

    def __exit__(self, *error: object) -> None:
        for weight, trained in zip(self.weights, self.trained, strict=True):
            weight.requires_grad_(trained)
            weight.grad = weight.grad if trained else None

    def add(self) -> None:
        for total, weight in zip(self.sums, self.weights, strict=True):
            total.addcmul_(weight.grad, weight.grad)


def step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, how: Any) -> None:
    """One step of training; what `how` collects is in it."""
    with how:
        model(**batch).loss.backward()
        if isinstance(how, FullSquares):
            how.add()
    optimizer.step()
    optimizer.zero_grad()


def held(how: Any) -> int:
    """Bytes between steps."""
    sums = getattr(getattr(how, "totals", how), "sums", ())
    return sum(part.nbytes for part in (sums.values() if isinstance(sums, dict) else sums))


def measure(name: str, training: str, setup: Setup, rounds: int, chosen: list[str]) -> dict[str, Any]:
    """Times (rounds) and memory of every contender."""
    model, batch = setup.build()
    model = TRAINING[training](model, name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ways: dict[str, Any] = {"plain": nullcontext(), "full squares": FullSquares(model)}
    ways |= {way: Collector(model, target_layers(model), **options) for way, options in COLLECTORS.items()}
    ways = {way: how for way, how in ways.items() if way == "plain" or not chosen or way in chosen}
    runs: dict[str, Callable[[], None]] = {
        way: lambda how=how: step(model, batch, optimizer, how) for way, how in ways.items()
    }
    for run in runs.values():
        run()  # states of the optimizer, and buffers
    peaks = {way: allocated_peak(run, "cpu") for way, run in runs.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in logging.tqdm(range(rounds), desc=f"{name}, {training}"):
        shuffle(order)
        for way in order:
            times[way] += laps([runs[way]], "cpu")
    size = sum(parameter.nbytes for parameter in model.parameters())
    rows = [
        {
            "contender": way,
            "step": median(mine / plain for mine, plain in zip(times[way], times["plain"], strict=True)),
            "held": held(ways[way]) / size,
            "peak": (peaks[way] - peaks["plain"]) / size,
            "seconds": median(times[way]),
        }
        for way in runs
    ]
    return {"model": name, "training": training, "parameters": size // 4, "rows": rows, "times": times}


def markdown(case: dict[str, Any]) -> str:
    plain = case["rows"][0]["seconds"]
    lines = [
        f"{case['model']}, {case['parameters'] / 1e6:.1f} M parameters, {case['training']}; "
        f"a plain step takes {plain * 1e3:.0f} ms",
        "",
        "| contender | step time / plain | held between steps, % of the model | peak beyond plain, % of the model |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in case["rows"]:
        lines.append(f"| {row['contender']} | {row['step']:.2f} | {row['held']:.2%} | {row['peak']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", choices=[*TARGETS, "all"], default="all")
    option("--training", choices=[*TRAINING, "all"], default="all")
    option("--contenders", nargs="*", default=[], choices=["full squares", *COLLECTORS], help="default: all")
    option("--rounds", type=int, default=15, help="steps of each contender; default: 15")
    option("--small", action="store_true", help="tiny models: shows that everything runs, not how fast it is")
    option("--threads", type=int, default=1, help="default: 1")
    option("--save", action="store_true", help="write results/compression-cost.md and .json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [
        measure(name, training, Setup(name, args.small, "cpu", "fp32", args.threads), args.rounds, args.contenders)
        for name in (TARGETS if args.model == "all" else (args.model,))
        for training in (TRAINING if args.training == "all" else (args.training,))
    ]
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **{key: getattr(args, key) for key in ("threads", "rounds", "small")},
        "date": date.today().isoformat(),
    }
    title = ", ".join(f"{key} {value}" for key, value in environment.items())
    page = "\n\n".join([title, *map(markdown, cases)]) + "\n"
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compression-cost.md").write_text(page)
        (RESULTS / "compression-cost.json").write_text(
            json.dumps({"environment": environment, "cases": cases}, indent=1)
        )


if __name__ == "__main__":
    main()
