"""States, step time and error of peftx's optimizers beside bitsandbytes, galore-torch, apollo-torch and torchao.

Every contender steps in a process of its own, one round after the other, in random order, in CPU time of that process.
Contenders that are not importable, or that fail, are listed as such. README.md beside this file says how ratios are
made; PYTHONPATH can point to a folder with the packages of the others.

    python benchmarks/optimizer.py                  # the tables on the terminal
    python benchmarks/optimizer.py --save           # and results/optimizer.md and .json
    python benchmarks/optimizer.py --parts memory   # only the states of LLaMA-7B
    python benchmarks/optimizer.py --parts loss --model shared/data/stories260k/hf --texts shared/data/gsm8k
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# What every process would otherwise repeat on the terminal:
for noisy in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")

import torch

DATA = Path(__file__).parents[2] / "shared" / "data"
SHAPES = {
    "LoRA r=8 of 24 layers of 768": [(8, 768), (768, 8)] * 24,
    "dense 1024 x 1024, two": [(1024, 1024)] * 2,
}
RANK = {"LoRA r=8 of 24 layers of 768": 4, "dense 1024 x 1024, two": 128}
WARM = 10  # steps before anything is measured
Build = Callable[[list[torch.nn.Parameter], int], torch.optim.Optimizer]


def peftx_adamw(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    from peftx.optim import LowRankAdamW

    return LowRankAdamW(params, lr=1e-3, weight_decay=0.0, min_8bit_size=0, **options)


def projected(params: list[torch.nn.Parameter], rank: int, **options: Any) -> torch.optim.Optimizer:
    return peftx_adamw(params, rank=rank, **{"proj_refresh": "randomized", **options})


def bitsandbytes_8bit(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-3, weight_decay=0.0, min_8bit_size=0)


def galore(params: list[torch.nn.Parameter], rank: int, cls: str = "GaLoreAdamW") -> torch.optim.Optimizer:
    import galore_torch

    group = {"params": params, "rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    return getattr(galore_torch, cls)([group], lr=1e-3, weight_decay=0.0)


def apollo(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    import apollo_torch

    group = {"params": params, "rank": rank, "proj": "random", "scale_type": "channel", "scale": 1.0}
    group |= {"update_proj_gap": 200, "proj_type": "std"}
    return apollo_torch.APOLLOAdamW([group], lr=1e-3, weight_decay=0.0)


def torchao_8bit(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-3, weight_decay=0.0)


def builder(name: str) -> Build:
    """How the contender of this name makes its optimizer. Names, unlike functions of ours, go to any process."""
    options: dict[str, Build] = {
        "torch AdamW, fp32": lambda params, rank: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
        "bitsandbytes AdamW8bit": bitsandbytes_8bit,
        "torchao AdamW8bit": torchao_8bit,
        "peftx, 8-bit": lambda params, rank: peftx_adamw(params),
        "galore-torch GaLoreAdamW": galore,
        "galore-torch GaLoreAdamW8bit": lambda params, rank: galore(params, rank, "GaLoreAdamW8bit"),
        "peftx, projected, 32-bit": lambda params, rank: projected(params, rank, optim_bits=32),
        "peftx, projected, 8-bit": projected,
        "apollo-torch APOLLOAdamW": apollo,
        "peftx, APOLLO, 32-bit": lambda params, rank: projected(
            params, rank, proj_refresh="random", update="apollo", optim_bits=32
        ),
        "peftx, APOLLO, 8-bit": lambda params, rank: projected(params, rank, proj_refresh="random", update="apollo"),
    }
    return options[name]


YARDSTICK = "bitsandbytes AdamW8bit"
CONTENDERS = (
    "torch AdamW, fp32",
    YARDSTICK,
    "torchao AdamW8bit",
    "peftx, 8-bit",
    "galore-torch GaLoreAdamW",
    "galore-torch GaLoreAdamW8bit",
    "peftx, projected, 32-bit",
    "peftx, projected, 8-bit",
    "apollo-torch APOLLOAdamW",
    "peftx, APOLLO, 32-bit",
    "peftx, APOLLO, 8-bit",
)


def gradient(shape: tuple[int, int], place: int, step: int) -> torch.Tensor:
    """A gradient whose spectrum decays as those of networks do: directions fixed by `place`, coordinates by `step`."""
    fixed = torch.Generator().manual_seed(place)
    short, long = sorted(shape)
    k = min(short, 64)
    basis = torch.linalg.qr(torch.randn(short, k, generator=fixed)).Q
    rows = torch.randn(k, long, generator=fixed) + torch.randn(
        k, long, generator=torch.Generator().manual_seed(10_000 * place + step)
    )
    matrix = basis @ (torch.logspace(0, -2, k)[:, None] * rows)
    return matrix.T.contiguous() if shape[0] > shape[1] else matrix


class Contender:
    """An optimizer at work on the tensors of one table."""

    def __init__(self, name: str, table: str) -> None:
        torch.set_num_threads(1)
        self.shapes = SHAPES[table]
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in self.shapes]
        self.twins = [torch.nn.Parameter(torch.zeros(shape)) for shape in self.shapes]
        self.optimizer = builder(name)(self.params, RANK[table])
        exact = torch.optim.AdamW(self.twins, lr=1e-3, weight_decay=0.0)
        for step in range(WARM):
            for place, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
                p.grad = gradient(p.shape, place, step)
                twin.grad = p.grad.clone()
            before = [[p.detach().clone() for p in params] for params in (self.params, self.twins)]
            spent = self.step()
            exact.step()
            self.first = spent if step == 0 else self.first
        moves = [
            torch.cat([(p.detach() - old).flatten() for p, old in zip(params, olds, strict=True)])
            for params, olds in zip((self.params, self.twins), before, strict=True)
        ]
        self.error = float((moves[0] - moves[1]).norm() / moves[1].norm())

    def step(self) -> float:
        begin = time.process_time()
        self.optimizer.step()
        return time.process_time() - begin

    def facts(self) -> dict[str, float]:
        held = {id(tensor): tensor for tensor in tensors(list(self.optimizer.state.values()))}
        size = sum(tensor.nbytes for tensor in held.values()) / sum(p.numel() for p in self.params)
        return {"bytes": size, "error": self.error, "first": self.first}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a state, also those that tensor subclasses and projector objects consist of."""
    if type(value) is torch.Tensor:
        yield value
    elif isinstance(value, torch.Tensor):
        yield from tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


_contender: Contender


def start(name: str, table: str) -> None:
    global _contender
    _contender = Contender(name, table)


def step() -> float:
    return _contender.step()


def facts() -> dict[str, float]:
    return _contender.facts()


def race(table: str, names: Iterable[str], rounds: int, patience: float) -> dict[str, dict[str, Any]]:
    """Facts and times of every contender; of those that do not run, why."""
    from rich.console import Console
    from rich.progress import track

    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        pools: dict[str, ProcessPoolExecutor] = {}
        console = Console(stderr=True)
        for name in track(list(names), f"{table}: warming up", console=console, transient=True):
            pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            try:
                pool.submit(start, name, table).result(timeout=patience)
                pools[name] = pool
                rows[name] = {"times": []}
            except Exception as error:
                rows[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
                for process in list((pool._processes or {}).values()):
                    process.terminate()
        order, shuffle = list(pools), random.Random(0).shuffle
        for _ in track(range(rounds), table, console=console, transient=True):
            shuffle(order)
            for name in order:
                rows[name]["times"].append(pools[name].submit(step).result())
        for name, pool in pools.items():
            rows[name] |= pool.submit(facts).result()
    for row in rows.values():
        if "times" in row and "times" in rows.get(YARDSTICK, {}):
            row["ratio"] = statistics.median(
                ours / theirs for ours, theirs in zip(row["times"], rows[YARDSTICK]["times"], strict=True)
            )
    return rows


def step_cells(table: str, name: str, row: dict[str, Any]) -> dict[str, str]:
    if "failed" in row:
        return {"": name, "bytes / parameter": row["failed"], "step, ms": "", "/ bnb": "", "first, ms": "", "error": ""}
    return {
        "": name,
        "bytes / parameter": f"{row['bytes']:.2f}",
        "step, ms": f"{1e3 * statistics.median(row['times']):.2f}",
        "/ bnb": f"{row['ratio']:.2f}" if "ratio" in row else "-",
        "first, ms": f"{1e3 * row['first']:.0f}",
        "error": f"{row['error']:.1e}",
    }


def memory() -> list[dict[str, Any]]:
    """Bytes of the states that the real optimizer makes for LLaMA-7B on the "meta" device, and the savings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftx.optim import create_optimizer, state_bytes

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B
    count = sum(p.numel() for p in model.parameters())
    options: dict[str, dict[str, Any]] = {
        "8-bit": {},
        "8-bit, embeddings too": {"embedding_bits": 8},
        "8-bit, rank 1024": {"rank": 1024},
        "8-bit, rank 1024, bf16 basis": {"rank": 1024, "basis_bits": 16},
        "the same, embeddings 8-bit too": {"rank": 1024, "basis_bits": 16, "embedding_bits": 8},
        "the same, embeddings and head projected": {
            "rank": 1024,
            "basis_bits": 16,
            "embedding_bits": 8,
            "target": "weight",
        },
        "8-bit, rank 512": {"rank": 512},
        "8-bit, rank 512, bf16 basis": {"rank": 512, "basis_bits": 16},
        "8-bit, rank 256": {"rank": 256},
        "8-bit, rank 128": {"rank": 128},
    }
    rows = []
    for name, kwargs in options.items():
        optimizer = create_optimizer(model, **kwargs)
        optimizer.allocate_states()
        size = state_bytes(optimizer)
        rows.append({"name": name, "bytes": size, "fp32": 1 - size / (8 * count), "bf16": 1 - size / (4 * count)})
    return rows


def matrix() -> list[dict[str, str]]:
    """The same for one matrix of 4096 x 4096, in bytes per parameter."""
    from peftx.optim import LowRankAdamW, state_bytes

    rows = []
    for rank in (None, 1024, 128):
        p = torch.empty(4096, 4096, device="meta", requires_grad=True)
        optimizer = LowRankAdamW([p], rank=rank)
        optimizer.allocate_states()
        size = f"{state_bytes(optimizer) / p.numel():.3f}"
        rows.append(
            {"4096 x 4096": "8-bit" + (f", rank {rank}, fp32 basis" if rank else ""), "bytes / parameter": size}
        )
    return rows


def memory_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "LLaMA-7B": row["name"],
        "states, GB": f"{row['bytes'] / 1e9:.2f}",
        "less than fp32 AdamW (53.9 GB)": f"{row['fp32']:.1%}",
        "less than bf16 AdamW (27.0 GB)": f"{row['bf16']:.1%}",
    }


LOSS_RUNS: dict[str, dict[str, Any]] = {
    "torch AdamW, fp32": {},
    "peftx, 8-bit": {},
    "peftx, projected to 16 of 64, 8-bit": {"rank": 16, "update_proj_gap": 50, "refresh_moments": "rotate"},
}


def losses(model: Path, texts: Path, seeds: int, count: int) -> dict[str, list[float]]:
    """Held-out loss per token of stories260K after `count` steps of full fine-tuning on GSM8K, for each seed."""
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from peftx.optim import create_optimizer

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def rows(name: str, amount: int, length: int = 96) -> torch.Tensor:
        lines = (texts / name).read_text().splitlines()
        ids = [token for line in lines[: 4 * amount] for token in tokenizer(json.loads(line)["question"])["input_ids"]]
        return torch.tensor(ids[: amount * length]).view(-1, length)

    train, held_out = rows("train.jsonl", 1600), rows("test.jsonl", 150)
    found: dict[str, list[float]] = {}
    runs = [(name, seed) for seed in range(seeds) for name in LOSS_RUNS]
    for name, seed in track(runs, "loss", console=Console(stderr=True), transient=True):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_pretrained(model).train()
        if name.startswith("torch"):
            optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        else:
            optimizer = create_optimizer(network, 2e-3, min_8bit_size=0, **LOSS_RUNS[name])
        batches = torch.randint(len(train), (count, 4), generator=torch.Generator().manual_seed(seed))
        for batch in batches:
            ids = train[batch]
            network(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        network.eval()
        with torch.no_grad():
            value = float(network(input_ids=held_out, labels=held_out).loss)
        found.setdefault(name, []).append(value)
    return found


def loss_cells(name: str, values: list[float]) -> dict[str, str]:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:.4f}" for value in values)
    return {
        "stories260K on GSM8K": name,
        "held-out loss": f"{statistics.mean(values):.4f}{spread}",
        "of each seed": each,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parts", nargs="*", choices=["steps", "memory", "loss"], default=["steps", "memory", "loss"])
    option("--contenders", nargs="*", choices=CONTENDERS, default=CONTENDERS)
    option("--rounds", type=int, default=15, help="measured steps of each contender; default: 15")
    option("--patience", type=float, default=120.0, help="seconds a contender may take to start; default: 120")
    option("--seeds", type=int, default=3, help="of the loss; default: 3")
    option("--steps", type=int, default=300, help="of the loss; default: 300")
    option("--model", type=Path, default=DATA / "stories260k" / "hf", help="folder of stories260K")
    option("--texts", type=Path, default=DATA / "gsm8k", help="folder with GSM8K's train.jsonl and test.jsonl")
    option("--save", action="store_true", help="write results/optimizer.md and .json beside this file")
    return parser.parse_args()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    from step_time import RESULTS, device_name, markdown

    packages = ("torch", "peftx", "bitsandbytes", "galore-torch", "apollo-torch", "torchao", "transformers")
    environment = {
        "device": device_name("cpu"),
        "threads": 1,
        "rounds": args.rounds,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    pages = [", ".join(f"{key} {value}" for key, value in environment.items())]
    data: dict[str, Any] = {"environment": environment}
    if "steps" in args.parts:
        data["steps"] = {}
        for table in SHAPES:
            rows = data["steps"][table] = race(table, args.contenders, args.rounds, args.patience)
            cells = [step_cells(table, name, row) for name, row in rows.items()]
            title = f"{table}, fp32, rank {RANK[table]} where projected; error of step {WARM} against fp32 AdamW's"
            pages.append(f"{title}\n\n{markdown(cells)}")
    if "memory" in args.parts:
        data["memory"] = memory()
        pages += [markdown(matrix()), markdown([memory_cells(row) for row in data["memory"]])]
    if "loss" in args.parts:
        if args.model.exists() and args.texts.exists():
            data["loss"] = losses(args.model, args.texts, args.seeds, args.steps)
            pages.append(markdown([loss_cells(name, values) for name, values in data["loss"].items()]))
        else:
            print(f"loss: skipped, {args.model} or {args.texts} is missing", file=sys.stderr)
    page = "\n\n".join(pages) + "\n"
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "optimizer.md").write_text(page)
        (RESULTS / "optimizer.json").write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
