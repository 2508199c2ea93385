"""Time and memory of one training step of every peftx method, as ratios to PEFT's LoRA and to the frozen model.

README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch
from contenders import DTYPES, TARGETS, Setup, ask, peftx, references, start, variants, yardsticks
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PHASES = ("forward", "backward", "optimizer")


def compare(setup: Setup, configs: Mapping[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Facts and `times` (rounds x phases) of every contender. Each has a process; in a round each runs one step, in
    random order, while the others wait."""
    with ExitStack() as stack:
        spawn = get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in configs}
        for name, started in [(name, pools[name].submit(start, setup, config)) for name, config in configs.items()]:
            try:
                started.result()
            except Exception as error:
                raise RuntimeError(f"{name} does not run on the {setup.model} model") from error
        times: dict[str, list[list[float]]] = {name: [] for name in configs}
        order, shuffle = list(configs), random.Random(0).shuffle
        for _ in track(range(rounds), f"{setup.model} x{len(order)}", console=Console(stderr=True), transient=True):
            shuffle(order)
            for name in order:
                times[name].append(pools[name].submit(ask, "step").result())
        return {name: {**pools[name].submit(ask, "finish").result(), "times": times[name]} for name in configs}


def measure(setup: Setup, configs: Mapping[str, Any], rounds: int, alive: int) -> dict[str, dict[str, Any]]:
    """`compare` in groups of at most `alive` processes; every group has yardsticks of its own for its ratios."""
    names, results = list(configs), {}
    size = max(1, alive - len(yardsticks(setup.model)))
    for first in range(0, max(1, len(names)), size):
        group = {name: configs[name] for name in names[first : first + size]}
        measured = compare(setup, yardsticks(setup.model) | group, rounds)
        for row in measured.values():
            row["ratios"] = {to: ratios(row, measured[to]) for to in yardsticks(setup.model)}
        results = measured | results
    order = [*yardsticks(setup.model), *names]
    return {name: results[name] for name in order}


def ratios(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of the ratios within each round (of the whole step with their quartiles), and the ratios of memory."""

    def by_round(part: Callable[[list[float]], float]) -> list[float]:
        pairs = [(part(ours), part(theirs)) for ours, theirs in zip(row["times"], other["times"], strict=True)]
        return [ours / theirs for ours, theirs in pairs if theirs > 0] or [0.0, 0.0]

    low, middle, high = quantiles(by_round(sum), n=4)
    phases = {phase: median(by_round(lambda times, i=i: times[i])) for i, phase in enumerate(PHASES)}
    memory = {key: row[key] / max(1, other[key]) for key in ("memory", "resident")}
    return {"step": middle, "quartiles": (low, high), **phases, **memory}


def cells(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """One printed row: column to text."""
    lora, floor = row["ratios"]["LoRA"], row["ratios"]["floor"]
    return {
        "method": name,
        "step / LoRA": f"{lora['step']:.3f}",
        "quartiles": "{:.2f}-{:.2f}".format(*lora["quartiles"]),
        **{phase: f"{lora[phase]:.2f}" for phase in PHASES},
        "step / floor": f"{floor['step']:.3f}",
        "memory / LoRA": f"{lora['memory']:.2f}",
        "/ floor": f"{floor['memory']:.2f}",
        "resident / LoRA": f"{lora['resident']:.2f}",
        "trainable": f"{row['trainable']:,}",
        "saved KiB": f"{row['saved'] / 1024:,.1f}",
        "held KiB": f"{row['held'] / 1024:,.1f}",
        "merged": {None: "-", True: "= base", False: "differs"}[row["merged"]],
    }


def caption(model: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    def absolute(name: str) -> str:
        return f"{median(map(sum, results[name]['times'])) * 1e3:.0f} ms and {results[name]['memory'] / 2**20:.0f} MiB"

    return f"{model}: a step of PEFT's LoRA r=8 takes {absolute('LoRA')}, of the floor {absolute('floor')}"


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted({name for info in peftx.methods() for name in (info.name, *info.variants)})
    option = parser.add_argument
    option("--model", choices=[*TARGETS, "all"], default="all")
    option("--methods", nargs="*", choices=known, help="names of methods or variants; default: all")
    option("--rank", type=int, default=8, help="r of peftx's methods, beside their own default; default: 8")
    option("--rounds", type=int, default=15, help="steps of each contender, at least 2; default: 15")
    option("--reference", action="store_true", help="also PEFT's DoRA and MiSS")
    option("--aa", action="store_true", help="also LoRA against itself, which shows how far noise moves a ratio")
    option("--small", action="store_true", help="tiny models: shows that everything runs, not how fast it is")
    option("--device", choices=["cpu", "cuda"], default="cpu")
    option("--dtype", choices=[*DTYPES], default="fp32", help="of the base model; bf16 runs under autocast")
    option("--threads", type=int, default=1, help="default: 1")
    option("--alive", type=int, help="most processes at a time; default: one for each 2 GB of free memory")
    option("--markdown", action="store_true", help="print Markdown")
    option("--json", type=Path, metavar="OUT", help="write everything that was measured")
    option("--save", action="store_true", help="write results/<device>.md and .json beside this file")
    option("--add", action="store_true", help="with --save: puts its rows into the saved results")
    args = parser.parse_args()
    if args.add and (args.small or not args.save or args.model != "all"):
        parser.error("--add needs --save and both models, and goes with full sizes only")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return args


def main() -> None:
    args = arguments()
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else psutil.virtual_memory().available
    environment = {
        "device": device_name(args.device),
        **{key: getattr(args, key) for key in ("dtype", "threads", "rounds", "small")},
        **{name: sys.modules[name].__version__ for name in ("torch", "transformers", "peft", "peftx")},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    stem = re.sub(r"\W+", "-", f"{environment['device']} {args.dtype}".lower())
    earlier = json.loads((RESULTS / f"{stem}.json").read_text())["models"] if args.add else {}
    models, pages = dict(earlier), [", ".join(f"{key} {value}" for key, value in environment.items())]
    for model in TARGETS if args.model == "all" else (args.model,):
        setup = Setup(model, args.small, args.device, args.dtype, args.threads)
        configs = {"LoRA again": yardsticks(model)["LoRA"]} if args.aa else {}
        configs |= references(model) if args.reference else {}
        configs |= variants(model, args.methods, args.rank)
        models[model] = measure(setup, configs, args.rounds, args.alive or int(free / 2e9))
        if known := earlier.get(model):  # every row keeps its ratios to the yardsticks of its own run
            models[model] = known | {name: row for name, row in models[model].items() if name in configs}
        rows, title = [cells(name, row) for name, row in models[model].items()], caption(model, models[model])
        pages.append(f"{title}\n\n{markdown(rows)}")
        if not args.markdown:
            table = Table(*rows[0], title=title)
            for row in rows:
                table.add_row(*row.values())
            Console(width=None if sys.stdout.isatty() else 200).print(table)
    page, data = "\n\n".join(pages) + "\n", json.dumps({"environment": environment, "models": models}, indent=1)
    if args.markdown:
        print(page)
    if args.json:
        args.json.write_text(data)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{stem}.md").write_text(page)
        (RESULTS / f"{stem}.json").write_text(data)


if __name__ == "__main__":
    main()
