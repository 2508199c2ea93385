"""What DON and NOD of one sample cost once the forward pass has been made: the closed form of `peftx.pruning` against
autograd on the head and against building the gradient of the head.

All three get the input h (T x D) and the output z (T x V) of the head and give |G|^2 and <W, G>; DON and NOD follow
from these two numbers. Autograd has to make z again, to have a graph. Times are CPU time of this process; in every
round each way runs once, in random order, and a speed-up is the median of the ratios within the rounds. Errors are
those of DON and NOD against the gradient in float64. Whether pruning helps: pruning_noise.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from peftx.pruning import don_nod, head_statistics
from peftx.pruning.probe import gradient_way, residual

RESULTS = Path(__file__).parent / "results"
SIZES = [(32000, 2048, 128), (32000, 2048, 512), (32000, 512, 128), (512, 64, 200)]  # V, D, T
ETA = 1e-3
Statistics = tuple[Tensor, Tensor]


def by_autograd(weight: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> Statistics:
    leaf = weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(F.linear(h, leaf), labels), leaf)
    return (weight * gradient).sum(), gradient.norm().square()


def by_explicit_gradient(weight: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> Statistics:
    gradient = residual(z, labels).div_(len(labels)).T @ h
    return (weight * gradient).sum(), gradient.norm().square()


def by_closed_form(weight: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> Statistics:
    inner, square = head_statistics(h[None], z[None], labels[None])
    return inner[0], square[0]


WAYS: dict[str, Callable[..., Statistics]] = {
    "autograd": by_autograd,
    "explicit": by_explicit_gradient,
    "peftx": by_closed_form,
}


def exact(weight: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> Statistics:
    """In float64, in blocks of the vocabulary."""
    d = residual(z.double(), labels) / len(labels)
    square = sum((part.T @ h.double()).square().sum() for part in d.split(1024, -1))
    return (d * z.double()).sum(), square


def measure(v: int, d: int, t: int, rounds: int) -> dict[str, float | str]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=generator) * d**-0.5
    h = torch.randn(t, d, generator=generator)
    z, labels = h @ weight.T, torch.randint(v, (t,), generator=generator)
    inputs = (weight, h, z, labels)
    wanted = don_nod(*exact(*inputs), weight.double().square().sum().item(), ETA)
    row: dict[str, float | str] = {"V": v, "D": d, "T": t, "way": gradient_way(t, v, d)}
    for name, way in WAYS.items():  # also warms up
        inner, square = (part.double() for part in way(*inputs))
        found = don_nod(inner, square, weight.double().square().sum().item(), ETA)
        row[f"{name} error"] = max(abs(a / b - 1).item() for a, b in zip(found, wanted, strict=True))
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    order, shuffle = list(WAYS), random.Random(0).shuffle
    for _ in track(range(rounds), f"{v} x {d}, {t} tokens", transient=True):
        shuffle(order)
        for name in order:
            start = time.process_time()
            WAYS[name](*inputs)
            times[name].append(time.process_time() - start)
    for name, seconds in times.items():
        row[f"{name} ms"] = 1e3 * median(seconds)
        row[f"/ {name}"] = median(a / b for a, b in zip(seconds, times["peftx"], strict=True))
    return row


def markdown(rows: list[dict[str, float | str]]) -> str:
    heads = ["V x D", "T", "way", "autograd", "explicit", "peftx", "speed-up over autograd", "over explicit", "error"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        times = [f"{row[f'{name} ms']:.1f} ms" for name in WAYS]
        gains = [f"{row[f'/ {name}']:.1f}" for name in ("autograd", "explicit")]
        size = f"{row['V']:,} x {row['D']:,}"
        lines.append([size, str(row["T"]), str(row["way"]), *times, *gains, f"{row['peftx error']:.0e}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--save", action="store_true", help="write results/pruning-speed.md and .json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(*size, args.rounds) for size in SIZES]
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "rounds": args.rounds,
        "date": date.today().isoformat(),
    }
    page = f"{', '.join(f'{key} {value}' for key, value in environment.items())}\n\n{markdown(rows)}\n"
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "pruning-speed.md").write_text(page)
        (RESULTS / "pruning-speed.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
