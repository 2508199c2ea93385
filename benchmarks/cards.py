"""The finished model cards of model_cards/: of the leaderboard's adapters for SST-2, one of each variant, with seed 0.

    python benchmarks/cards.py --work outputs/leaderboard

An adapter at its method's own size where there is one, else the one at LoRA's. Numbers come from
results/leaderboard.json; card, config and settings from the folders that `leaderboard.py` left in `--work`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaderboard import NATIVE, RESULTS, table

from peftx.demo import model as encoder
from peftx.hub import finish_card
from peftx.train.intervals import t_interval
from peftx.train.methods import find
from peftx.train.report import told

TASK = "sst2"
CARDS = Path(__file__).parents[1] / "model_cards"
LIMITS = (
    "Whole sentences of film reviews in English, one to some dozen words each. Nothing else was measured: no other "
    "texts or languages, and neither bias nor safety."
)


def chosen(found: Mapping[str, Any]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """The group and the runs that stand for each variant, by its name."""
    best: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for group in ("budget", "own"):
        for run in found["groups"].get(group, {"runs": []})["runs"]:
            if run["method"] not in NATIVE:
                before = best.get(run["method"])
                best[run["method"]] = (group, [*(before[1] if before and before[0] == group else []), run])
    return best


def numbers(found: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a card says: metrics and baselines of seed 0, training, notes over the seeds."""
    lora = {run["seed"]: run for run in table(found, ["budget"])[1] if run["method"] == "lora"}
    first = next(run for run in runs if run["seed"] == 0)
    accuracies = [run["eval"]["accuracy"] for run in runs]
    difference = t_interval([run["eval"]["accuracy"] - lora[run["seed"]]["eval"]["accuracy"] for run in runs])
    over = (
        f"Over {len(runs)} seeds: {statistics.fmean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}. "
        f"Less that of LoRA with r=8, each at the rate that was chosen for it, with the same seeds: {told(difference)}"
        + (
            " (a 95 % interval holds 0: not told apart)."
            if difference and difference.holds_zero
            else " (95 % interval)."
        )
    )
    return {
        "metrics": {"accuracy": first["eval"]["accuracy"], "loss": first["eval"]["loss"]},
        "baselines": {"LoRA, r=8, with the same seed": lora[0]["eval"]["accuracy"]},
        "training": {
            "sentences": f"{first['samples']['trained_on']:,}",
            "steps": first["steps"],
            "learning rate of the adapter": first["learning_rate"],
            "learning rate of the head": first["head_learning_rate"],
            "optimizer": optimizer_of(first["method"]) + ", linear to zero",
            "seed": 0,
            "precision": "fp32",
        },
        "notes": [
            over,
            "The learning rate was chosen on a validation part; that choice has not seen the test part.",
        ],
    }


def optimizer_of(method: str) -> str:
    """`peftx train` takes a method's own optimizer where it has one."""
    config = find(method).config
    assert config is not None
    return "LowRankAdamW, projected, 8-bit states" if hasattr(config, "optimizer_options") else "AdamW"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/leaderboard"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=CARDS)
    args = parser.parse_args()
    tasks = json.loads(args.results.read_text())["tasks"]
    if TASK not in tasks:
        raise SystemExit(f"{args.results} has no {TASK}: run it by leaderboard.py")
    found = tasks[TASK]
    known = chosen(found)
    adapters = {name: args.work / TASK / group / name / "seed-0" for name, (group, _) in known.items()}
    for name, (_, runs) in known.items():
        if not adapters[name].is_dir():
            raise SystemExit(
                f"there is no {adapters[name]}: --work is the folder of the run that {args.results} is from"
            )
        if len(runs) < 2:
            raise SystemExit(f"{args.results} has one seed of {name}: a card tells the spread of several")
    for name, (_, runs) in known.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, name)
            shutil.copytree(adapters[name], folder)
            card = finish_card(
                folder,
                dataset="SST-2, whole sentences",
                split="test",
                limits=LIMITS,
                base_model=encoder.public_name(encoder.default_folder()),
                **numbers(found, runs),
            )
            args.out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(card, args.out / f"{name}.md")
    print(f"{len(known)} cards in {args.out}")


if __name__ == "__main__":
    main()
