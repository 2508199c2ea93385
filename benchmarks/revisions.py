"""Two checkouts of peftx against each other: CPU time of a training step, of decoding, of saving and of loading.

    git worktree add ../old <commit> && python benchmarks/revisions.py --old ../old --rounds 5

Each measurement is a process of its own on one thread; rounds alternate between the checkouts, and the table has the
ratio of the medians, new over old.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = {
    "allora": {"r": 8},
    "bone": {"r": 8},
    "compacter": {},
    "fedsvd": {"r": 8},
    "flora": {"r": 8},
    "gradnormlorp": {"r": 8},
    "loldu": {"r": 8},
    "loraggpo": {"r": 8},
    "triadaptlora": {"init_r": 8, "target_r": 8},
}


def measure(name: str, layers: int) -> dict[str, float]:
    """CPU seconds in this process."""
    import peft
    import torch
    import transformers

    import peftx

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, vocab_size=1024)
    info = next(info for info in peftx.methods() if info.name == name)
    targets = ["o_proj", "down_proj"] if name == "compacter" else "all-linear"
    base = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(base, info.config(**METHODS[name], target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = torch.randint(1, 1024, (4, 128))
    found: dict[str, list[float]] = {"step": [], "decode": [], "save": [], "load": []}

    def timed(key: str, run) -> None:
        start = time.process_time()
        run()
        found[key].append(time.process_time() - start)

    def step() -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(6):
        timed("step", step)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            timed("decode", lambda: [model(input_ids=rows[:1, :1], use_cache=False) for _ in range(10)])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            timed("save", lambda: model.save_pretrained(folder))
            base = transformers.LlamaForCausalLM(config)
            timed("load", lambda base=base: peft.PeftModel.from_pretrained(base, folder))
    return {key: min(values) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.layers)))
        return
    new = Path(__file__).resolve().parents[1]
    print("| method | step | decode | save | load |\n| --- | ---: | ---: | ---: | ---: |")
    for name in args.methods:
        runs: dict[Path, list[dict[str, float]]] = {new: [], args.old.resolve(): []}
        for _ in range(args.rounds):
            for checkout, found in runs.items():
                options = ["--old", str(args.old), "--measure", name, "--layers", str(args.layers)]
                env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
                out = subprocess.run(
                    [sys.executable, __file__, *options], env=env, capture_output=True, text=True, check=True
                )
                found.append(json.loads(out.stdout.strip().splitlines()[-1]))
        medians = [{key: statistics.median(run[key] for run in found) for key in found[0]} for found in runs.values()]
        ratios = [medians[0][key] / medians[1][key] for key in ("step", "decode", "save", "load")]
        print(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
