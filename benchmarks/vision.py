"""FLoRA against PEFT's LoRA for convolutions, at equal numbers of trained values, on real images.

A small ResNet is pre-trained on the handwritten digits 0 to 4 of scikit-learn and adapted to 5 to 9 with 20 images of
each. For every seed all methods start from the same pre-trained weights, the same new head and the same batches; the
head is trained in all of them. The learning rate of each row is the one of RATES with the best mean accuracy on
validation images; the table shows the accuracy on test images that played no part in any choice.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import peft
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

import peftx

RESULTS = Path(__file__).parent / "results"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS, BATCH = 120, 25
CONVOLUTIONS = r".*convolution"
Data = tuple[torch.Tensor, torch.Tensor]
Start = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Task:
    """One seed: a model that knows the digits 0 to 4 and has a new head, and images (n, 1, 32, 32) of 5 to 9."""

    model: ResNetForImageClassification
    train: Data
    valid: Data
    test: Data
    source_accuracy: float


def images(digits: range) -> Data:
    """scikit-learn's 8 x 8 digits, enlarged to 32 x 32, and labels from 0."""
    pixels, labels = load_digits(return_X_y=True)
    kept = [i for i, label in enumerate(labels) if label in digits]
    x = torch.tensor(pixels[kept], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(x, scale_factor=4, mode="bilinear"), torch.tensor(labels[kept]) - digits.start


def split(data: Data, size: int, seed: int) -> tuple[Data, Data]:
    """`size` images, equally many of each class, and the rest."""
    first, rest = train_test_split(range(len(data[1])), train_size=size, stratify=data[1], random_state=seed)
    return (data[0][first], data[1][first]), (data[0][rest], data[1][rest])


def fit(model: nn.Module, data: Data, rate: float, steps: int, seed: int) -> float:
    """Trains with AdamW and a linear decay; CPU seconds."""
    x, y = data
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator, started = torch.Generator().manual_seed(seed), time.process_time()
    for _ in range(steps):
        batch = torch.randint(len(y), (BATCH,), generator=generator)
        model(pixel_values=x[batch], labels=y[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.process_time() - started


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return (model.eval()(pixel_values=data[0]).logits.argmax(-1) == data[1]).float().mean().item()


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=5
    )
    model = ResNetForImageClassification(config).train()
    source, held_out = split(images(range(5)), 700, seed)
    fit(model, source, 3e-3, 300, seed)
    known = accuracy(model, held_out)
    model.classifier[-1].reset_parameters()
    train, rest = split(images(range(5, 10)), 100, seed)
    valid, test = split(rest, 250, seed)
    return Task(model, train, valid, test, known)


def adapter(config: Callable[[], peft.PeftConfig]) -> Start:
    return lambda model: peft.get_peft_model(model, config())


def lora(r: int) -> Start:
    return adapter(lambda: peft.LoraConfig(r=r, target_modules=CONVOLUTIONS, modules_to_save=["classifier"]))


def flora(r: int) -> Start:
    return adapter(lambda: peftx.FloraConfig(r=r, target_modules=CONVOLUTIONS, modules_to_save=["classifier"]))


def head_only(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def trained(start: Start, model: nn.Module) -> int:
    """Trained values without the head's."""
    model = start(copy.deepcopy(model))
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)


def contenders(model: nn.Module) -> dict[str, Start]:
    """LoRA at three ranks, each with the FLoRA of the largest rank that trains no more values."""
    rows: dict[str, Start] = {"head only": head_only}
    for r in (1, 2, 4):
        budget = trained(lora(r), model)
        own = max(rank for rank in range(1, 17) if trained(flora(rank), model) <= budget)
        rows |= {f"LoRA r={r}": lora(r), f"FLoRA r={own}": flora(own)}
    return {**rows, "full fine-tuning": lambda model: model}


def contend(start: Start, tasks: list[Task]) -> tuple[float, list[float], float]:
    """The rate that is best in validation, the test accuracy of each seed at that rate, and CPU seconds of a step."""
    runs: dict[float, list[tuple[float, float, float]]] = {}
    for rate in RATES:
        runs[rate] = []
        for seed, current in enumerate(tasks):
            torch.manual_seed(seed)
            # In eval mode batch normalisation keeps its statistics, which no adapter file would hold.
            model = start(copy.deepcopy(current.model)).eval()
            seconds = fit(model, current.train, rate, STEPS, seed)
            runs[rate].append((accuracy(model, current.valid), accuracy(model, current.test), seconds / STEPS))
    rate = max(RATES, key=lambda rate: statistics.mean(valid for valid, _, _ in runs[rate]))
    seconds = [run[2] for runs_at_rate in runs.values() for run in runs_at_rate]
    return rate, [test for _, test, _ in runs[rate]], statistics.median(seconds)


def table(tasks: list[Task]) -> str:
    """Markdown."""
    sizes = f"{len(tasks[0].train[1])} training, {len(tasks[0].valid[1])} validation, {len(tasks[0].test[1])} test"
    source = statistics.mean(current.source_accuracy for current in tasks)
    lines = [
        f"Digits 5 to 9, {sizes} images, {STEPS} steps of {BATCH}, {len(tasks)} seeds. The pre-trained ResNet knows "
        f"0 to 4 to {source:.1%}. torch {torch.__version__}, peft {peft.__version__}, peftx {peftx.__version__}.",
        "",
        "| | trained values (without the head) | learning rate | test accuracy, mean ± sd | of each seed | ms a step |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for name, start in contenders(tasks[0].model).items():
        rate, scores, seconds = contend(start, tasks)
        lines.append(
            f"| {name} | {trained(start, tasks[0].model):,} | {rate:g} | {statistics.mean(scores):.1%} ± "
            f"{statistics.stdev(scores):.1%} | {', '.join(f'{score:.1%}' for score in scores)} | {1e3 * seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, at least 2; default: 3")
    parser.add_argument("--save", action="store_true", help="write results/vision.md beside this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    page = table([task(seed) for seed in range(args.seeds)])
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "vision.md").write_text(page)


if __name__ == "__main__":
    main()
