"""Accuracy of methods on real texts over several seeds, beside LoRA at the same rank, batches and steps.

The MiniLM encoder of `peftx demo` learns the demo's task, or SST-2 from a folder with train.tsv and dev.tsv
(`sentence<TAB>label`). Each run is written to the results file when it ends; runs found there are not repeated.

    python benchmarks/real_data.py --methods lora allora lora-ggpo --seeds 0 1 2
    python benchmarks/real_data.py --sst2 path/to/sst2 --texts 1600
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import datasets
import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from transformers import DataCollatorWithPadding

from peftx.demo import data as demo_data
from peftx.demo import model as encoder
from peftx.demo.run import Bench, Contender, Options, contenders, peft_config
from peftx.utils import quiet

RESULTS = Path(__file__).parent / "results" / "real_data.json"


def sst2(folder: Path, tokenizer, texts: int | None) -> datasets.DatasetDict:
    """The first `texts` training sentences and the development set."""
    found = {}
    for split, name, limit in (("train", "train.tsv", texts), ("test", "dev.tsv", None)):
        lines = [line.rsplit("\t", 1) for line in (folder / name).read_text().splitlines()[:limit]]
        columns = {"text": [text for text, _ in lines], "label": [int(label) for _, label in lines]}
        data = datasets.Dataset.from_dict(columns)
        data = data.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
        found[split] = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
    return datasets.DatasetDict(found)


def run(bench: Bench, entry: Contender) -> dict[str, float]:
    """Accuracy on the held-out texts, and the mean training loss of the last tenth of the steps."""
    base = bench.base(bench.options.seed)
    model = get_peft_model(base, peft_config(entry, base))
    with tempfile.TemporaryDirectory() as folder:
        recorder = bench.fit(model, entry, Path(folder))
    last = recorder.losses[-max(1, len(recorder.losses) // 10) :]
    logits = encoder.logits(model, bench.test, bench.collate)
    return {"accuracy": bench.accuracy(logits.argmax(-1)), "loss": mean(last), "steps": len(recorder.losses)}


def table(runs: dict[str, dict]) -> str:
    """Mean and standard deviation over the seeds, by task and method, as Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for row in runs.values():
        groups.setdefault((row["task"], row["method"], row["learning_rate"], row["steps"]), []).append(row)
    lines = [
        "| task | method | learning rate | steps | seeds | accuracy | training loss |",
        "| --- | --- " + "| ---: " * 5 + "|",
    ]
    for (task, method, rate, steps), rows in groups.items():
        cells = []
        for key, factor in (("accuracy", 100), ("loss", 1)):
            values = [factor * row[key] for row in rows]
            cells.append(f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}")
        lines.append(f"| {task} | {method} | {rate:g} | {steps} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--sst2", type=Path, help="folder with SST-2; default: the demo's task")
    option("--methods", nargs="+", help="lora and names of variants; default: all")
    option("--seeds", nargs="+", type=int, default=[0, 1, 2])
    option("--texts", type=int, help="training texts; default: all")
    option("--epochs", type=float, default=2.0)
    option("--learning-rate", type=float, help="of the adapters; default: each method's own")
    option("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the configs, e.g. mgpo_rho=0.005")
    option("--out", type=Path, default=RESULTS, help="results file, which is added to; a .md is written beside it")
    args = parser.parse_args()
    runs = json.loads(args.out.read_text()) if args.out.exists() else {}
    task = "sst2" if args.sst2 else "demo"
    options = Options(encoder.default_folder(), Path(), epochs=args.epochs)
    names = args.methods or [entry.name for entry in contenders()]
    entries = [entry for entry in contenders(tuple(n for n in names if n != "lora")) if entry.name in names]
    if args.learning_rate:
        entries = [replace(entry, learning_rate=args.learning_rate) for entry in entries]
    for name, value in (pair.split("=") for pair in args.set):
        entries = [
            replace(entry, name=f"{entry.name} {name}={value}", settings={**entry.settings, name: json.loads(value)})
            for entry in entries
        ]
    with quiet():
        tokenizer = encoder.tokenizer(options.model)
        data = sst2(args.sst2, tokenizer, args.texts) if args.sst2 else demo_data.load(tokenizer, args.texts)
    todo = [(seed, entry) for seed in args.seeds for entry in entries]
    for seed, entry in track(todo, task, console=Console(stderr=True)):
        key = f"{task} {entry.name} lr={entry.learning_rate:g} seed={seed} texts={args.texts} epochs={args.epochs:g}"
        if key not in runs:
            bench = Bench(
                replace(options, seed=seed),
                data["train"],
                data["test"],
                DataCollatorWithPadding(tokenizer),
                lambda *_: None,
            )
            with quiet():
                found = run(bench, entry)
            runs[key] = {
                "task": task,
                "method": entry.name,
                "learning_rate": entry.learning_rate,
                "seed": seed,
                **found,
            }
            runs[key] |= {"torch": torch.__version__, "texts": len(data["train"])}
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps(runs, indent=1))
            args.out.with_suffix(".md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
