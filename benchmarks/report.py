"""Where the rows of a comparison go: a page on the terminal, and two files beside the scripts."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peftx

RESULTS = Path(__file__).parent / "results"


def ratio(row: Mapping[str, Any], part: str) -> str:
    """A median with its quartiles over the rounds, where they are known and differ."""
    low, high = row.get(f"{part} quartiles", (0, 0))
    return f"{row[part]:.2f}" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def publish(name: str, rows: Any, table: str, yardstick: str, save: bool, **facts: Any) -> None:
    """Prints the table under the versions and facts that it was made with; `save` writes it to results/ too."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, peftx)}
    about = {**versions, "python": platform.python_version(), "date": date.today().isoformat(), **facts}
    page = f"{', '.join(f'{key} {value}' for key, value in about.items())}; ratios to {yardstick}\n\n{table}\n"
    print(page)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(page)
        (RESULTS / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
