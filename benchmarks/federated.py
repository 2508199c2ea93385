"""FedSVD without a federation: its refactorisation beside the naive SVD, what is sent, and what noise becomes.

The naive way makes the d_out x d_in product and decomposes it, as the reference does. Times are CPU time of this
process with one thread, medians. No model is downloaded: sizes come from the shapes of the published configs.

    python benchmarks/federated.py                    # the tables on the terminal; about two minutes
    python benchmarks/federated.py --save             # and results/federated.md and .json
    python benchmarks/federated.py --parts bytes noise
    python benchmarks/federated.py --naive-limit 2048 # leave the naive SVD out above this side
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import peft
import torch
import transformers
from step_time import RESULTS, device_name, markdown
from tqdm.auto import tqdm

import peftx
from peftx.federated import refactorize

SHAPES = [(1024, 1024, 8), (4096, 4096, 8), (4096, 4096, 16), (4096, 4096, 64), (14336, 4096, 16)]  # d_out, d_in, r
ETAS = [0.001, 0.003, 0.01, 0.03, 0.06, 0.09]  # 0.06 to 0.09: the reference's private runs


def factors(d_out: int, d_in: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's start of A, and a B of about the size that training gives it."""
    generator = torch.Generator().manual_seed(0)
    bound = d_in**-0.5  # Kaiming-uniform with a = sqrt(5)
    A = torch.empty(r, d_in).uniform_(-bound, bound, generator=generator)
    return A, 0.02 * torch.randn(d_out, r, generator=generator)


def naive(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By the dense product, as the reference does."""
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return Vh[: len(A)], U[:, : len(A)] * S[: len(A)]


def seconds(work: Callable[[], Any], runs: int) -> float:
    """Median CPU time of this process."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that torch held at a time beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    del result
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def refactorisation(limit: int) -> list[dict[str, Any]]:
    rows = []
    for d_out, d_in, r in tqdm(SHAPES, "refactorising", leave=False, disable=None):
        A, B = factors(d_out, d_in, r)
        refactorize(A, B)
        new_A, new_B = refactorize(A, B)
        product = B.double() @ A.double()
        row = {
            "d_out": d_out,
            "d_in": d_in,
            "r": r,
            "seconds": seconds(lambda A=A, B=B: refactorize(A, B), 21),  # type: ignore[misc]
            "bytes": peak_bytes(lambda A=A, B=B: refactorize(A, B)),  # type: ignore[misc]
            "error": float((new_B.double() @ new_A.double() - product).norm() / product.norm()),
            "orthonormality": float((new_A @ new_A.T - torch.eye(r)).abs().max()),
        }
        del product
        if max(d_out, d_in) <= limit and r == 8:  # the naive time does not depend on r; one run of 4096 takes a minute
            row["naive"] = seconds(lambda A=A, B=B: naive(A, B), 3 if d_out <= 1024 else 1)  # type: ignore[misc]
        rows.append(row)
    return rows


def refactorisation_cells(row: dict[str, Any]) -> dict[str, str]:
    naive = row.get("naive")
    factor_bytes = 4 * row["r"] * (row["d_out"] + row["d_in"])
    return {
        "d_out x d_in, r": f"{row['d_out']} x {row['d_in']}, {row['r']}",
        "peftx": f"{1e3 * row['seconds']:.2f} ms",
        "naive": f"{naive:.2f} s" if naive else "",
        "speed-up": f"{naive / row['seconds']:,.0f}" if naive else "",
        "peak memory": f"{row['bytes'] / 2**20:.2f} MiB",
        "over that of A and B": f"{row['bytes'] / factor_bytes:.1f}",
        "error of the product": f"{row['error']:.0e}",
        "max of A A^T - I": f"{row['orthonormality']:.0e}",
    }


def on_meta(config: transformers.PretrainedConfig, targets: list[str], r: int) -> dict[str, int]:
    """Bytes of one message for a model that is never made: fp32 tensors, without headers."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    adapter = peftx.FedSVDConfig(r=r, target_modules=targets)
    model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    return {
        "layers": len(layers),
        "A+B": 4 * r * sum(d_out + d_in for d_out, d_in in sizes),
        "B": 4 * r * sum(d_out for d_out, _ in sizes),
        "delta": 4 * sum(d_out * d_in for d_out, d_in in sizes),
    }


def messages() -> dict[str, dict[str, int]]:
    roberta = transformers.RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=50265
    )
    llama = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
    )
    return {
        "RoBERTa-large, query and value, r = 8": on_meta(roberta, ["query", "value"], 8),
        "Llama 7B, q_proj and v_proj, r = 16": on_meta(llama, ["q_proj", "v_proj"], 16),
    }


def message_cells(name: str, row: dict[str, int]) -> dict[str, str]:
    return {
        "MiB of one message": f"{name} ({row['layers']} layers)",
        "B (client to server)": f"{row['B'] / 2**20:.1f}",
        "A and B (server to client; FedIT both ways)": f"{row['A+B'] / 2**20:.1f}",
        "the full delta": f"{row['delta'] / 2**20:,.0f}",
        "full delta / B": f"{row['delta'] / row['B']:.0f}",
    }


def noise(d: int = 1024, r: int = 8, draws: int = 16) -> list[dict[str, float]]:
    """E |change of B A|_F^2 under independent N(0, eta^2) noise on the trained factors: measured, dense, and by the
    closed forms d_out eta^2 |A|^2 (B only) and d_out eta^2 |A|^2 + d_in eta^2 |B|^2 + r d_out d_in eta^4 (A and B)."""
    A, B = factors(d, d, r)
    turned_A, _ = refactorize(A, B)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for eta in tqdm(ETAS, "adding noise", leave=False, disable=None):
        found: dict[str, list[float]] = {"A+B": [], "B": [], "B, orthonormal A": []}
        for _ in range(draws):
            E_A, E_B = (eta * torch.randn(f.shape, generator=generator) for f in (A, B))
            found["A+B"].append(((B + E_B) @ (A + E_A) - B @ A).square().sum().item())
            found["B"].append((E_B @ A).square().sum().item())
            found["B, orthonormal A"].append((E_B @ turned_A).square().sum().item())
        b_only = d * eta**2 * A.square().sum().item()
        rows.append(
            {
                "eta": eta,
                **{name: statistics.fmean(values) for name, values in found.items()},
                "A+B, closed": b_only + d * eta**2 * B.square().sum().item() + r * d * d * eta**4,
                "B, closed": b_only,
                "B, orthonormal A, closed": d * eta**2 * r,
            }
        )
    return rows


def noise_cells(row: dict[str, float]) -> dict[str, str]:
    names = ("A+B", "B", "B, orthonormal A")
    return {
        "eta": f"{row['eta']:g}",
        **{name: f"{row[name]:.3g} ({row[name] / row[name + ', closed'] - 1:+.1%})" for name in names},
        "A+B / B": f"{row['A+B'] / row['B']:.2f}",
        "orthonormal / Kaiming": f"{row['B, orthonormal A'] / row['B']:.2f}",
        "A+B / orthonormal": f"{row['A+B'] / row['B, orthonormal A']:.2f}",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, parts = parser.add_argument, ("time", "bytes", "noise")
    option("--parts", nargs="*", choices=parts, default=parts)
    option("--naive-limit", type=int, default=4096, help="longest side for the naive SVD; default: 4096, a minute")
    option("--save", action="store_true", help="write results/federated.md and .json beside this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    environment = {
        "device": device_name("cpu"),
        "threads": 1,
        "torch": torch.__version__,
        "peftx": peftx.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    pages = [", ".join(f"{key} {value}" for key, value in environment.items())]
    data: dict[str, Any] = {"environment": environment}
    if "time" in args.parts:
        data["time"] = refactorisation(args.naive_limit)
        pages.append(markdown([refactorisation_cells(row) for row in data["time"]]))
    if "bytes" in args.parts:
        data["bytes"] = messages()
        pages.append(markdown([message_cells(*item) for item in data["bytes"].items()]))
    if "noise" in args.parts:
        data["noise"] = noise()
        title = (
            "E |noise of the weight change|^2, 1024 x 1024, r = 8, scale 1, PEFT's start of A; in brackets the "
            "difference from the closed form. From eta = "
            f"{1 / math.sqrt(3 * 1024):.3f} on the product of the two noises is the largest term of A+B."
        )
        pages.append(f"{title}\n\n{markdown([noise_cells(row) for row in data['noise']])}")
    page = "\n\n".join(pages) + "\n"
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "federated.md").write_text(page)
        (RESULTS / "federated.json").write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
