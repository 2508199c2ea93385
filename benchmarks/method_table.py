"""The documentation's table of measured numbers: step time, memory, size, accuracy and export of every method.

    python benchmarks/step_time.py --aa --reference --save             # results/amd-epyc-fp32.json, or another device's
    peftx demo --epochs 2 --methods all                                # peftx-demo/results.json; all, or some
    python benchmarks/method_table.py --keep peftx-demo/results.json   # copies what it needs to results/demo.json
    python benchmarks/method_table.py                                  # prints the table

The site takes it from here when it is built.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import peftx

RESULTS = Path(__file__).parent / "results"
DEMO = RESULTS / "demo.json"
REFERENCES = {  # row of the table: (row of the step times, row of the demo)
    "PEFT LoRA": ("LoRA", "lora"),
    "PEFT DoRA": ("PEFT DoRA", None),
    "PEFT MiSS": ("PEFT MiSS", None),
    "frozen model, no adapter": ("floor", None),
}
EXPORT = {"bone-bat": "cut to a rank"}  # of variants that are not exported as their method is
HEADS = ["", "step: Llama", "BERT", "memory: Llama", "BERT", "trained values (Llama)", "accuracy", "LoRA export"]


def keep(path: Path) -> dict[str, Any]:
    """The part of a demo's results.json that the table needs, without losses and step times."""
    report = json.loads(path.read_text(encoding="utf-8"))
    dropped = {"losses", "step_seconds", "examples"}
    results = [{name: value for name, value in row.items() if name not in dropped} for row in report["results"]]
    options = {name: report["options"][name] for name in ("epochs", "batch_size", "seed", "texts")}
    return report | {"results": results, "options": options, "steps": len(report["results"][0]["losses"])}


def cells(title: str, names: list[str], models: dict[str, Any], accuracy: float | None, export: str) -> list[str]:
    """One line; a second name, at the method's own rank, goes into brackets, as does the accuracy, which is at it."""

    def both(model: str, value: Any) -> str:
        first, *rest = [value(models[model][name]) for name in names] or ["not measured"]
        return first + "".join(f" ({other})" for other in rest)

    def ratio(what: str) -> list[str]:
        return [both(model, lambda row: f"{row['ratios']['LoRA'][what]:.2f}") for model in ("llama", "bert")]

    return [
        title,
        *ratio("step"),
        *ratio("memory"),
        both("llama", lambda row: f"{row['trainable']:,}"),
        "" if accuracy is None else f"{accuracy:.3f}" if len(names) < 2 else f"({accuracy:.3f})",
        export,
    ]


def table(speed: dict[str, Any], demo: dict[str, Any]) -> str:
    models = speed["models"]
    accuracies = {row["name"]: row["accuracy"] for row in demo["results"]}
    lines = [HEADS, ["---", *["---:"] * (len(HEADS) - 2), "---"]]
    for title, (row, key) in REFERENCES.items():
        lines.append(cells(title, [row], models, accuracies.get(key), ""))
    for info in peftx.methods():
        for variant in info.variants:
            names = [name for name in models["llama"] if name.split(" r=")[0] == variant]
            rank = ", ".join(name.removeprefix(variant).strip() for name in names[:1] if " r=" in name)
            own = "".join(f" ({name.removeprefix(variant).strip()})" for name in names[1:])
            title = f"`{variant}`{', ' if rank else ''}{rank}{own}"
            export = EXPORT.get(variant, info.lora_export)
            lines.append(cells(title, names, models, accuracies.get(variant), export))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, default=RESULTS / "amd-epyc-fp32.json", help="of step_time.py --save")
    parser.add_argument("--keep", type=Path, help="results.json of a demo, to be kept as results/demo.json")
    args = parser.parse_args()
    if args.keep:
        DEMO.write_text(json.dumps(keep(args.keep), indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(args.speed.read_text(encoding="utf-8")), json.loads(DEMO.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
