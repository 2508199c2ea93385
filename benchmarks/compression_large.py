"""Time and memory of `compress` on layers as large as those of a 7B model, one at a time, and what follows for models.

Time is CPU time of the process, on one thread. Memory: most bytes of tensors held beyond the dense weight and the
statistics, by the allocator. Weights are random with falling scales of their inputs, in bfloat16.

It runs with an older peftx as well, to compare: `git archive COMMIT peftx | tar x -C FOLDER`, then with
`PYTHONPATH=FOLDER` and `--label before`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from contenders import allocated_peak
from torch import nn

from peftx.compression import LayerStatistics, Statistics, compress

try:
    from peftx.compression.layers import signature
except ImportError:
    from peftx.compression.statistics import signature  # type: ignore[attr-defined,no-redef]

RESULTS = Path(__file__).parent / "results"
SHAPES = {"square": (4096, 4096), "wide": (4096, 11008), "tall": (11008, 4096)}
METHODS = ("fwsvd", "svd-llm")
MODELS = {  # hidden, intermediate, of keys and values, blocks, parameters
    "7B": (4096, 11008, 4096, 32, 6.74e9),
    "70B": (8192, 28672, 1024, 80, 69.0e9),
}


class Block(nn.Module):
    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        layer = nn.Linear(into, out, bias=False, dtype=torch.bfloat16)
        scale = torch.arange(1, into + 1) ** -0.3
        with torch.no_grad():
            layer.weight.copy_(torch.randn(out, into, generator=torch.Generator().manual_seed(0)) * scale / 64)
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": layer})])


def statistics_of(model: Block, method: str) -> Statistics:
    layer: Any = model.layers[0]["proj"]  # type: ignore[index]
    out, into = layer.weight.shape
    generator = torch.Generator().manual_seed(1)
    fisher = gram = None
    if method == "fwsvd":
        fisher = torch.rand(into, dtype=torch.float64, generator=generator).pow(4)
    else:
        x = torch.randn(2 * into, into, generator=generator) * torch.linspace(0.1, 3, into)
        gram = x.T @ x / len(x)
    found = LayerStatistics(fisher, None, None, gram, (out, into), signature(layer))
    return Statistics(
        {"layers.0.proj": found}, samples=1024, tokens=10**6, estimator="per_sample", model="a random layer"
    )


def measure(shape: tuple[int, int], method: str, keep: float, options: dict[str, Any]) -> dict[str, Any]:
    model = Block(*shape)
    statistics = statistics_of(model, method)
    spent = error = 0.0
    rank = 0

    def run() -> None:
        nonlocal spent, error, rank
        start = time.process_time()
        report = compress(model, statistics, keep=keep, method=method, progress=False, **options)[1]
        spent = time.process_time() - start
        row = report.layers["layers.0.proj"]
        error, rank = row.error, row.rank or 0

    peak = allocated_peak(run, "cpu")
    return {"shape": shape, "method": method, "rank": rank, "seconds": spent, "peak": peak, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    option("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    option("--keep", type=float, default=0.6)
    option("--exact", action="store_true", help="no random projections")
    option("--label", default="now", help="of the rows")
    option("--small", action="store_true", help="a sixteenth of the sides: shows that it runs")
    option("--save", action="store_true", help="add the rows to results/compression-large.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {"randomized": False} if args.exact else {}
    divisor = 16 if args.small else 1
    rows = []
    for name in args.shapes:
        for method in args.methods:
            out, into = SHAPES[name]
            row = {"label": args.label, **measure((out // divisor, into // divisor), method, args.keep, options)}
            print(
                f"| {args.label} | {row['shape'][0]} x {row['shape'][1]} | {method} | {row['rank']} | "
                f"{row['seconds']:.1f} | {row['peak'] / 1e6:.0f} | {row['error']:.4f} |",
                flush=True,
            )
            rows.append(row)
    if args.save:
        path = RESULTS / "compression-large.json"
        old = json.loads(path.read_text()) if path.exists() else []
        facts = {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}
        path.write_text(json.dumps([*old, *({**row, **facts} for row in rows)], indent=1))


if __name__ == "__main__":
    main()
