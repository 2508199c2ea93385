"""Fine-tunes a real causal LM for a short run with several optimizers and adapters: loss, optimizer bytes, seconds.

    python benchmarks/smollm2.py path/to/SmolLM2-135M path/to/gsm8k

The runs see the same texts in the same order. Times are CPU seconds of the process (on a GPU: wall seconds). Each run
is written to results/smollm2.{json,md,png} when it ends; runs found there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftx
from peftx import optim

RESULTS = Path(__file__).parent / "results"
ADAPTED = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora(model: torch.nn.Module) -> torch.nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(lora_alpha=16, **ADAPTED))


def gradnormlorp(model: torch.nn.Module) -> torch.nn.Module:
    return peft.get_peft_model(model, peftx.GradNormLoRPConfig(lora_alpha=16, **ADAPTED))


def fp32(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def low_rank(**options: Any) -> Callable[[torch.nn.Module, float], torch.optim.Optimizer]:
    return lambda model, lr: optim.create_optimizer(model, lr, weight_decay=0.0, **options)


# name: how the model is adapted, its optimizer, its learning rate
RUNS: dict[str, tuple[Callable, Callable, float]] = {
    "LoRA + AdamW": (lora, fp32, 5e-4),
    "LoRA + 8-bit": (lora, low_rank(min_8bit_size=0), 5e-4),
    "GradNormLoRP": (gradnormlorp, low_rank(rank=0.5, min_8bit_size=0), 5e-4),
    "dense + AdamW": (lambda model: model, fp32, 2e-5),
    "dense + projected 8-bit": (lambda model: model, low_rank(rank=128), 2e-5),
}


def texts(folder: Path, split: str, count: int) -> list[str]:
    lines = (folder / f"{split}.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def batches(tokenizer: Any, lines: list[str], size: int, length: int, device: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(lines), size):
        batch = tokenizer(
            lines[start : start + size], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        ).to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append({**batch, "labels": labels})
    return found


@torch.no_grad()
def held_out(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss per token."""
    model.eval()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data]
    losses = [model(**batch).loss.item() * count for batch, count in zip(data, counts, strict=True)]
    model.train()
    return sum(losses) / sum(counts)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    adapt, make, lr = RUNS[name]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    model.config.use_cache = False
    model = adapt(model).train()
    optimizer = make(model, lr)
    train = batches(tokenizer, texts(args.data, "train", args.steps * args.batch), args.batch, args.length, args.device)
    test = batches(tokenizer, texts(args.data, "test", args.test), args.batch, args.length, args.device)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    losses, seconds, in_optimizer = [], [], []
    for batch in track(train, name, console=Console(stderr=True), transient=True):
        start = clock()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        middle = clock()
        optimizer.step()
        optimizer.zero_grad()
        in_optimizer.append(clock() - middle)
        seconds.append(clock() - start)
    return {
        "learning rate": lr,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state bytes": optim.state_bytes(optimizer),
        "held-out loss": held_out(model, test),
        "losses": losses,
        "seconds": mean(seconds[1:]),
        "optimizer seconds": mean(in_optimizer[1:]),
    }


def table(runs: dict[str, dict]) -> str:
    columns = (
        "run",
        "learning rate",
        "trained",
        "optimizer MB",
        "first 10 steps",
        "last 10 steps",
        "held out",
        "s / step",
    )
    lines = [f"| {' | '.join(columns)} |", f"| --- {'| ---: ' * (len(columns) - 1)}|"]
    for name, row in runs.items():
        cells = [
            name,
            f"{row['learning rate']:g}",
            f"{row['trained']:,}",
            f"{row['state bytes'] / 1e6:.2f}",
            f"{mean(row['losses'][:10]):.3f}",
            f"{mean(row['losses'][-10:]):.3f}",
            f"{row['held-out loss']:.3f}",
            f"{row['seconds']:.2f} ({row['optimizer seconds']:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(runs: dict[str, dict], path: Path, window: int = 10) -> None:
    """Training loss, as a running mean over `window` steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        title="Fine-tuning SmolLM2-135M", xlabel="optimizer step", ylabel=f"loss, mean of {window}"
    )
    for style, (name, row) in zip(cycle(["-", "--"]), runs.items()):  # two runs may lie on each other
        means = [mean(row["losses"][max(0, i - window) : i]) for i in range(1, len(row["losses"]) + 1)]
        axes.plot(range(1, len(means) + 1), means, style, label=f"{name}, {row['state bytes'] / 1e6:.1f} MB of states")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("model", type=Path, help="folder of a causal LM")
    option("data", type=Path, help="folder with train.jsonl and test.jsonl of question and answer")
    option("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    option("--steps", type=int, default=60)
    option("--batch", type=int, default=2)
    option("--length", type=int, default=96)
    option("--test", type=int, default=32, help="held-out texts")
    option("--device", choices=["cpu", "cuda"], default="cpu")
    option("--out", type=Path, default=RESULTS / "smollm2.json")
    args = parser.parse_args()
    runs = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.runs:
        if name not in runs:
            runs[name] = run(name, args)
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps(runs, indent=1))
            args.out.with_suffix(".md").write_text(table(runs))
            picture(runs, args.out.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
