"""Time and memory of one training step of every peftx method, as ratios to PEFT's LoRA and to the frozen model.

README.md beside this file says what is measured and how; `python benchmarks/step_time.py --help` lists the options.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import logging
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from datetime import date
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import psutil
import torch
import transformers
from peft import LoraConfig, MissConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peftx

RESULTS = Path(__file__).parent / "results"
PHASES = ("forward", "backward", "optimizer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"llama": "all-linear", "bert": r".*\.encoder\.layer\..*\.(query|key|value|dense)"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all contenders of one run share. Batches are (8, 128) tokens, in the small setup (2, 16)."""

    model: str
    small: bool
    device: str
    dtype: str
    threads: int


def build(setup: Setup) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A frozen model with random weights, and a batch for it. No dropout: every contender computes the same."""
    batch, length = (2, 16) if setup.small else (8, 128)
    width, layers, vocabulary = (64, 2, 128) if setup.small else (512, 8, 8192)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": vocabulary}
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length))
    if setup.model == "llama":
        model, labels = LlamaForCausalLM(LlamaConfig(intermediate_size=3 * width, **sizes)), ids
    else:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(intermediate_size=4 * width, **sizes, **dropout))
        labels = torch.arange(batch) % 2
    model.requires_grad_(False).train().to(setup.device, DTYPES[setup.dtype])
    return model, {"input_ids": ids.to(setup.device), "labels": labels.to(setup.device)}


def laps(phases: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Seconds that each phase took: CPU time of this process, on a GPU the time between events on its stream."""
    if device == "cpu":
        marks = [time.process_time()]
        for phase in phases:
            phase()
            marks.append(time.process_time())
        return [end - start for start, end in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    events[0].record()
    for phase, event in zip(phases, events[1:], strict=True):
        phase()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def settle(device: str) -> int:
    """Gives freed memory back, restarts the count of the peak, and returns the bytes in use."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):  # glibc keeps freed pages, which would hide part of the next peak
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """Most bytes in use since `settle`; where Linux's VmHWM is missing, since the process started."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_bytes(model: torch.nn.Module) -> int:
    return sum(t.nbytes for tensors in (model.parameters(), model.buffers()) for t in tensors)


def structure(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Type of every module, shape and dtype of every tensor: models that agree here run the same operations."""
    tensors = [(name, t.shape, t.dtype) for name, t in model.state_dict().items()]
    return [(name, type(module)) for name, module in model.named_modules()] + tensors


class Job:
    """One contender inside its own process; without a config, the frozen model and its input gradients."""

    def __init__(self, setup: Setup, config: PeftConfig | None) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.model, self.batch = build(setup)
        self.optimizer: torch.optim.Optimizer | None = None
        self.model.enable_input_require_grads()
        self.step()  # library code and workspaces are in memory before the baseline is taken
        self.base_memory = settle(setup.device)
        self.facts: dict[str, Any] = {"r": getattr(config, "r", None), "trainable": 0, "held": 0, "saved": 0}
        if config is not None:
            self.model.disable_input_require_grads()
            self._adapt(config)
        for _ in range(2):
            self.step()

    def _adapt(self, config: PeftConfig) -> None:
        base_bytes, self.base_structure = held_bytes(self.model), structure(self.model)
        self.model = get_peft_model(self.model, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.facts |= {
            "trainable": sum(p.numel() for p in trained),
            "held": held_bytes(self.model) - base_bytes,
            "saved": sum(t.nbytes for t in get_peft_model_state_dict(self.model).values()),
        }

    def step(self) -> list[float]:
        """Seconds of forward, backward and optimizer."""
        return laps((self._forward, self._backward, self._update), self.setup.device)

    def _forward(self) -> None:
        dtype = DTYPES[self.setup.dtype]
        with torch.autocast(self.setup.device, dtype, enabled=dtype != torch.float32):
            self.loss = self.model(**self.batch).loss

    def _backward(self) -> None:
        self.loss.backward()
        del self.loss

    def _update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def finish(self) -> dict[str, Any]:
        """Peak bytes of a step above the bare model, and whether merging gives back the bare model's structure."""
        settle(self.setup.device)
        self.step()
        self.facts["memory"] = peak(self.setup.device) - self.base_memory
        self.facts["merged"] = None
        if self.optimizer is not None:
            with suppress(NotImplementedError):
                self.facts["merged"] = structure(self.model.merge_and_unload()) == self.base_structure
        return self.facts


_job: Job


def start(setup: Setup, config: PeftConfig | None) -> None:
    global _job
    _job = Job(setup, config)


def ask(request: str) -> Any:
    return getattr(_job, request)()


def compare(setup: Setup, contenders: dict[str, PeftConfig | None], rounds: int, label: str) -> dict[str, dict]:
    """Facts and `times` (rounds x phases) by contender. One process each; in every round each runs one step, in
    random order, while the others wait."""
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for name in contenders
        }
        for name, config in contenders.items():
            pools[name].submit(start, setup, config).result()
        times: dict[str, list[list[float]]] = {name: [] for name in contenders}
        names, shuffle = list(contenders), random.Random(0).shuffle
        for _ in track(range(rounds), label, console=Console(stderr=True), transient=True):
            shuffle(names)
            for name in names:
                times[name].append(pools[name].submit(ask, "step").result())
        return {name: pools[name].submit(ask, "finish").result() | {"times": times[name]} for name in contenders}


def measure(setup: Setup, candidates: dict[str, PeftConfig], rounds: int, alive: int) -> dict[str, dict]:
    """Compares `candidates` in groups of at most `alive` processes; each group has a LoRA and a floor of its own, and
    the ratios refer to those."""
    yardsticks = {"floor": None, "LoRA": LoraConfig(r=8, target_modules=TARGETS[setup.model])}
    names, results, size = list(candidates), {}, max(1, alive - 2)
    for first in range(0, max(1, len(names)), size):
        group = names[first : first + size]
        label = f"{setup.model}: {', '.join(group)}"
        measured = compare(setup, yardsticks | {name: candidates[name] for name in group}, rounds, label)
        for name, row in measured.items():
            row["ratio"] = {by: ratios(row, measured[by]) for by in ("LoRA", "floor")}
            results.setdefault(name, row)
    return results


def ratios(row: dict, reference: dict) -> dict[str, Any]:
    """Medians of the ratios within each round, with the quartiles of the whole step's; and the memory's ratio."""

    def by_round(seconds: Callable[[list[float]], float]) -> list[float]:
        pairs = zip(row["times"], reference["times"], strict=True)
        return [seconds(ours) / seconds(theirs) for ours, theirs in pairs if seconds(theirs)]

    low, _, high = statistics.quantiles(by_round(sum), n=4)
    parts = {phase: statistics.median(by_round(lambda t, i=i: t[i]) or [0]) for i, phase in enumerate(PHASES)}
    memory = row["memory"] / max(1, reference["memory"])
    return {"step": statistics.median(by_round(sum)), "iqr": (low, high), "memory": memory, **parts}


def candidates(model: str, chosen: Sequence[str] | None, rank: int, reference: bool, aa: bool) -> dict[str, PeftConfig]:
    """Every registered variant (or the chosen ones), with r = `rank` and with the method's own r."""
    targets = {"target_modules": TARGETS[model]}
    found: dict[str, PeftConfig] = {"LoRA again": LoraConfig(r=8, **targets)} if aa else {}
    if reference:
        found |= {"PEFT DoRA": LoraConfig(r=8, use_dora=True, **targets), "PEFT MiSS": MissConfig(r=8, **targets)}
    for info in peftx.methods():
        for variant, kwargs in info.variants.items():
            if chosen is None or {info.name, variant} & set(chosen):
                own = info.config(**kwargs, **targets)
                if hasattr(own, "r") and own.r != rank:
                    found[f"{variant} r={rank}"] = info.config(**{**kwargs, **targets, "r": rank})
                found[f"{variant} r={own.r}" if hasattr(own, "r") else variant] = own
    return found


def table(results: dict[str, dict]) -> list[dict[str, str]]:
    """The printed rows: column to cell."""

    def cells(name: str, row: dict) -> dict[str, str]:
        lora, floor = row["ratio"]["LoRA"], row["ratio"]["floor"]
        merged = {None: "-", True: "= base", False: "differs"}[row["merged"]]
        step = {"method": name, "step / LoRA": f"{lora['step']:.3f}", "IQR": "{:.2f}-{:.2f}".format(*lora["iqr"])}
        return {
            **step,
            **{phase: f"{lora[phase]:.2f}" for phase in PHASES},
            "step / floor": f"{floor['step']:.3f}",
            "memory / LoRA": f"{lora['memory']:.2f}",
            "memory / floor": f"{floor['memory']:.2f}",
            "trainable": f"{row['trainable']:,}",
            "saved KiB": f"{row['saved'] / 1024:,.0f}",
            "held KiB": f"{row['held'] / 1024:,.0f}",
            "merged": merged,
        }

    return [cells(name, row) for name, row in results.items()]


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *[list(row.values()) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, TypeError):
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def caption(setup: Setup, results: dict[str, dict]) -> str:
    def typical(name: str) -> str:
        row = results[name]
        return f"{statistics.median(map(sum, row['times'])) * 1e3:.0f} ms and {row['memory'] / 2**20:.0f} MiB"

    return f"{setup.model}: a step of PEFT's LoRA r=8 takes {typical('LoRA')}, the floor {typical('floor')}."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted({name for info in peftx.methods() for name in (info.name, *info.variants)})
    parser.add_argument("--model", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--methods", nargs="*", choices=known, help="methods or variants; default: all", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender, at least 2; default: 15")
    parser.add_argument("--rank", type=int, default=8, help="r of peftx's methods beside their own default; default: 8")
    parser.add_argument("--reference", action="store_true", help="also PEFT's DoRA and MiSS")
    parser.add_argument("--aa", action="store_true", help="also LoRA against itself: how far noise moves a ratio")
    parser.add_argument("--small", action="store_true", help="tiny models: shows that it works, not how fast it is")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=[*DTYPES], default="fp32", help="of the base model; bf16 runs in autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alive", type=int, help="processes at a time; default: one for each 2 GB of free memory")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all measured values")
    parser.add_argument("--save", action="store_true", help="write results/<device>.md and .json beside this file")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return args


def main() -> None:
    args = arguments()
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else psutil.virtual_memory().available
    alive = args.alive or max(3, int(free / 2e9))
    environment = {
        "device": device_name(args.device),
        **{key: getattr(args, key) for key in ("dtype", "threads", "rounds", "small")},
        **{module.__name__: module.__version__ for module in (torch, transformers, peft, peftx)},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    models, pages = {}, [", ".join(f"{key} {value}" for key, value in environment.items())]
    for model in TARGETS if args.model == "all" else [args.model]:
        setup = Setup(model, args.small, args.device, args.dtype, args.threads)
        contenders = candidates(model, args.methods, args.rank, args.reference, args.aa)
        models[model] = measure(setup, contenders, args.rounds, alive)
        rows, title = table(models[model]), caption(setup, models[model])
        pages.append(f"{title}\n\n{markdown(rows)}")
        if not args.markdown:
            shown = Table(*rows[0], title=title)
            for row in rows:
                shown.add_row(*row.values())
            Console(width=None if sys.stdout.isatty() else 200).print(shown)
    page, data = "\n\n".join(pages) + "\n", json.dumps({"environment": environment, "models": models}, indent=1)
    if args.markdown:
        print(page)
    if args.json:
        args.json.write_text(data)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        stem = re.sub(r"\W+", "-", environment["device"]).strip("-").lower()
        (RESULTS / f"{stem}.md").write_text(page)
        (RESULTS / f"{stem}.json").write_text(data)


if __name__ == "__main__":
    main()
