"""Three ways to renew the projection of `peftx.optim.LowRankAdamW`: what they cost, what they keep, how they learn.

- time: CPU time of one refresh of a random matrix, the ways in turn, the fastest of `--rounds`.
- energy: ||Q^T G||^2 of the basis that is found, as a share of that of the leading singular vectors, for the first
  gradient of every matrix of a real model.
- loss: held-out loss per token of stories260K after `--steps` steps on GSM8K's questions, on the same batches; "paired"
  is the mean of the differences to the exact refresh over seeds, and its standard error.

    python benchmarks/optimizer_refresh.py                                  # the tables on the terminal
    python benchmarks/optimizer_refresh.py --save                           # and results/optimizer_refresh.md and .json
    python benchmarks/optimizer_refresh.py --parts energy --model smollm2/  # of another causal LM, at --rank 128
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from peftx.optim import create_optimizer, projection

DATA = Path(__file__).parents[2] / "shared" / "data"
WAYS = projection.REFRESH
SIZES = [(8, 768, 4), (64, 172, 16), (576, 1536, 128), (1024, 1024, 128), (4096, 4096, 128)]
EXACT_UP_TO = 1024  # of the short side: a full SVD of 4096 x 4096 takes half a minute; --exact takes it, too
SETTINGS: dict[str, dict[str, Any]] = {
    "full, rank 16 of 64": {"rank": 16, "update_proj_gap": 50},
    "GradNormLoRP, r = 32, rank 8": {"r": 32, "proj_rank": 8, "update_proj_gap": 50},
}


def refresh_times(rounds: int, exact: bool) -> list[dict[str, str]]:
    rows = []
    for short, long, rank in SIZES:
        gradient = torch.randn(short, long, generator=torch.Generator().manual_seed(0))
        ways = [way for way in WAYS if way != "svd" or exact or short <= EXACT_UP_TO]
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                begin = time.process_time()
                projection.basis(gradient, rank, way, seed=0)
                spent[way].append(time.process_time() - begin)
        cells = {way: f"{1e3 * min(spent[way]):,.1f}" if way in spent else "-" for way in WAYS}
        rows.append({"refresh, ms": f"{short} x {long}, rank {rank}", **cells})
    return rows


def load(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()


def questions(model: Path, texts: Path, name: str, rows: int, length: int = 96) -> torch.Tensor:
    """Token ids (rows, length) of GSM8K's questions, one after the other."""
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(model), []
    for line in (texts / name).read_text().splitlines():
        ids += tokenizer(json.loads(line)["question"])["input_ids"]
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(-1, length)
    raise ValueError(f"{texts / name} has less than {rows * length} tokens")


def energies(model: Path, texts: Path, rank: int) -> list[dict[str, str]]:
    network = load(model)
    ids = questions(model, texts, "train.jsonl", 4)
    network(input_ids=ids, labels=ids).loss.backward()
    kept: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    for name, p in network.named_parameters():
        if p.dim() == 2 and p.grad is not None and "proj" in name:
            gradient = projection.lay(p.grad)
            best = projection.basis(gradient, rank, "svd", seed=0).T @ gradient
            for way, shares in kept.items():
                found = projection.basis(gradient, rank, way, seed=0).T @ gradient
                shares.append(float(found.square().sum() / best.square().sum()))
    title = f"energy kept, {len(kept['random'])} matrices of {model.resolve().parent.name}/{model.name}, rank {rank}"
    return [
        {title: way, "least": f"{min(shares):.4f}", "mean": f"{statistics.mean(shares):.4f}"}
        for way, shares in kept.items()
    ]


def trained(
    setting: str, way: str, model: Path, texts: tuple[torch.Tensor, torch.Tensor], seed: int, steps: int
) -> float:
    """Held-out loss after a training."""
    import peft

    import peftx

    torch.manual_seed(seed)
    network, options = load(model), dict(SETTINGS[setting])
    rate = 2e-3
    if "r" in options:
        config = peftx.GradNormLoRPConfig(**options, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        network, options, rate = peft.get_peft_model(network, config), config.optimizer_options(), 5e-3
    optimizer = create_optimizer(network, rate, **{"min_8bit_size": 0, **options, "proj_refresh": way})
    train, held_out = texts
    for batch in torch.randint(len(train), (steps, 4), generator=torch.Generator().manual_seed(seed)):
        network(input_ids=train[batch], labels=train[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    with torch.no_grad():
        return float(network(input_ids=held_out, labels=held_out).loss)


def losses(model: Path, texts: Path, seeds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    from rich.console import Console
    from rich.progress import track

    data = questions(model, texts, "train.jsonl", 1600), questions(model, texts, "test.jsonl", 150)
    found: dict[str, dict[str, list[float]]] = {setting: {way: [] for way in WAYS} for setting in SETTINGS}
    runs = [(setting, way, seed) for seed in range(seeds) for setting in SETTINGS for way in WAYS]
    for setting, way, seed in track(runs, "loss", console=Console(stderr=True), transient=True):
        found[setting][way].append(trained(setting, way, model, data, seed, steps))
    return found


def loss_rows(found: dict[str, dict[str, list[float]]]) -> list[dict[str, str]]:
    rows = []
    for setting, ways in found.items():
        for way, values in ways.items():
            apart = [ours - exact for ours, exact in zip(values, ways["svd"], strict=True)]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
            rows.append(
                {
                    "stories260K on GSM8K": f"{setting}, {way}",
                    "held-out loss": f"{statistics.mean(values):.4f}",
                    "paired": "" if way == "svd" else f"{statistics.mean(apart):+.4f} ± {error:.4f}",
                    "of each seed": ", ".join(f"{value:.4f}" for value in values),
                }
            )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parts", nargs="*", choices=["time", "energy", "loss"], default=["time", "energy", "loss"])
    option("--rounds", type=int, default=3, help="refreshes of each way that are timed; default: 3")
    option("--exact", action="store_true", help=f"time the full SVD above {EXACT_UP_TO}, too")
    option("--seeds", type=int, default=3, help="of the loss; default: 3")
    option("--steps", type=int, default=300, help="of the loss; default: 300")
    option("--rank", type=int, default=16, help="of the energy; default: 16")
    option(
        "--model", type=Path, default=DATA / "stories260k" / "hf", help="folder of a causal LM; default: stories260K"
    )
    option("--texts", type=Path, default=DATA / "gsm8k", help="folder with GSM8K's train.jsonl and test.jsonl")
    option("--save", action="store_true", help="write results/optimizer_refresh.md and .json beside this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    from step_time import RESULTS, device_name, markdown
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    data: dict[str, Any] = {
        "environment": {
            "device": device_name("cpu"),
            "threads": 1,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
        }
    }
    pages = [", ".join(f"{key} {value}" for key, value in data["environment"].items())]
    if "time" in args.parts:
        data["time"] = refresh_times(args.rounds, args.exact)
        pages.append(markdown(data["time"]))
    if "energy" in args.parts:
        data["energy"] = energies(args.model, args.texts, args.rank)
        pages.append(markdown(data["energy"]))
    if "loss" in args.parts:
        data["loss"] = losses(args.model, args.texts, args.seeds, args.steps)
        pages.append(markdown(loss_rows(data["loss"])))
    page = "\n\n".join(pages) + "\n"
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "optimizer_refresh.md").write_text(page)
        (RESULTS / "optimizer_refresh.json").write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
