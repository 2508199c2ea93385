"""The documentation's table of what a method costs: step time, memory, size and export of every one.

    python benchmarks/step_time.py --aa --reference --save   # results/amd-epyc-fp32.json, or another device's
    python benchmarks/method_table.py                        # prints the table

The site takes it from here when it is built.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import peftx

RESULTS = Path(__file__).parent / "results"
REFERENCES = {  # row of the table: row of the step times
    "PEFT LoRA": "LoRA",
    "PEFT DoRA": "PEFT DoRA",
    "PEFT MiSS": "PEFT MiSS",
    "frozen model, no adapter": "floor",
}
EXPORT = {"bone-bat": "cut to a rank"}  # of variants that are not exported as their method is
HEADS = ["", "step: Llama", "BERT", "memory: Llama", "BERT", "trained values (Llama)", "LoRA export"]


def cells(title: str, names: list[str], models: dict[str, Any], export: str) -> list[str]:
    """One line; a second name, at the method's own rank, goes into brackets."""

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
        export,
    ]


def table(speed: dict[str, Any]) -> str:
    models = speed["models"]
    lines = [HEADS, ["---", *["---:"] * (len(HEADS) - 2), "---"]]
    for title, row in REFERENCES.items():
        lines.append(cells(title, [row], models, ""))
    for info in peftx.methods():
        for variant in info.variants:
            names = [name for name in models["llama"] if name.split(" r=")[0] == variant]
            rank = ", ".join(name.removeprefix(variant).strip() for name in names[:1] if " r=" in name)
            own = "".join(f" ({name.removeprefix(variant).strip()})" for name in names[1:])
            title = f"`{variant}`{', ' if rank else ''}{rank}{own}"
            export = EXPORT.get(variant, info.lora_export)
            lines.append(cells(title, names, models, export))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, default=RESULTS / "amd-epyc-fp32.json", help="of step_time.py --save")
    args = parser.parse_args()
    print(table(json.loads(args.speed.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
