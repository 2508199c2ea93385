"""What it takes to score a million samples as a stream: time, memory, and what a kill in the middle costs.

The rows are a `datasets.IterableDataset` of generated token ids (8 to 24 of them, the first third masked), the model is
a tiny Llama, the scores are DON and NOD. Each scoring is a process of its own: a tenth of the rows, all rows, all rows
killed (SIGKILL) when half of the parts are written, and the same again, which goes on behind the whole parts. Its
scores must be those of the run without a kill, bit for bit. CPU minutes count where the machine has other work. Memory
is the peak resident size less what the process took with model and data loaded. With `--save` the table goes to
results/pruning-stream.md and .json.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import datasets
import numpy as np
import torch
import transformers

from peftx.data.text import pad
from peftx.pruning import score_dataset, select

RESULTS = Path(__file__).parent / "results"
VOCABULARY, BLOCK = 512, 4096


def rows(count: int) -> Iterator[dict[str, list[int]]]:
    for start in range(0, count, BLOCK):
        draw = np.random.default_rng(start)
        lengths = draw.integers(8, 25, BLOCK)
        ids = draw.integers(1, VOCABULARY, (BLOCK, 24)).tolist()
        for length, row in zip(lengths[: count - start].tolist(), ids, strict=False):
            masked = length // 3
            yield {"input_ids": row[:length], "labels": [-100] * masked + row[masked:length]}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def child(count: int, folder: Path, batch_size: int) -> None:
    """Scores, and writes what it took beside the folder."""
    torch.set_num_threads(1)
    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"count": count})
    model = network()
    next(iter(stream))
    before, wall, processor = peak(), time.perf_counter(), time.process_time()
    scores = score_dataset(model, stream, pad, batch_size=batch_size, folder=folder, progress=False)
    took = {
        "minutes": (time.perf_counter() - wall) / 60,
        "CPU minutes": (time.process_time() - processor) / 60,
        "MB": peak() - before,
    }
    start = time.process_time()
    kept = select(scores, 0.3)
    took |= {"select seconds": time.process_time() - start, "rows": len(scores["don"]), "kept": len(kept)}
    torch.save(scores, folder.with_suffix(".pt"))
    folder.with_suffix(".json").write_text(json.dumps(took))


def run(count: int, folder: Path, batch_size: int, stop_at: int | None = None) -> dict[str, Any] | None:
    """What a scoring took; None of one that was killed when there were `stop_at` parts."""
    command = [sys.executable, __file__, "--rows", str(count), "--batch-size", str(batch_size), "--child", str(folder)]
    process = subprocess.Popen(command)
    while process.poll() is None:
        if stop_at is not None and len(list(folder.glob("part-*.parquet"))) >= stop_at:
            process.kill()
            process.wait()
            return None
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit("the scoring failed")
    return json.loads(folder.with_suffix(".json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--save", action="store_true", help="write results/pruning-stream.md and .json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.rows, args.child, args.batch_size)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        found = {"a tenth": run(max(1, args.rows // 10), home / "tenth", args.batch_size)}
        found["all"] = run(args.rows, home / "whole", args.batch_size)
        parts = len(list((home / "whole").glob("part-*.parquet")))
        run(args.rows, home / "killed", args.batch_size, stop_at=parts // 2)
        there = len(list((home / "killed").glob("part-*.parquet")))
        found[f"after a kill, with {there} of {parts} parts"] = run(args.rows, home / "killed", args.batch_size)
        whole, resumed = (torch.load(home / f"{which}.pt") for which in ("whole", "killed"))
        equal = all(torch.equal(whole[column], resumed[column]) for column in whole)
        size = sum(part.stat().st_size for part in (home / "whole").glob("*")) / 2**20
    lines = ["| | rows | minutes | CPU minutes | MB above the model | select, s | kept |", "| --- |" + " ---: |" * 6]
    for what, row in found.items():
        assert row is not None
        times = f"{row['minutes']:.2f} | {row['CPU minutes']:.2f} | {row['MB']:.0f} | {row['select seconds']:.2f}"
        lines.append(f"| {what} | {row['rows']:,} | {times} | {row['kept']:,} |")
    environment = {
        "torch": torch.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
        "threads": 1,
        "batch": args.batch_size,
        "date": date.today().isoformat(),
    }
    page = f"{', '.join(f'{key} {value}' for key, value in environment.items())}\n\n" + "\n".join(lines)
    page += f"\n\nScores after the kill equal to those without: {'yes, bit for bit' if equal else 'NO'}. "
    page += f"Files of all scores: {size:.1f} MB.\n"
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "pruning-stream.md").write_text(page)
        record = {"environment": environment, "rows": found, "equal": equal, "MB of files": size}
        (RESULTS / "pruning-stream.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
