"""Draws the figures of the pages, each in light and dark:

    python docs/figures/draw.py                # all, beside this file
    python docs/figures/draw.py loldu --out .  # some, elsewhere

Grey is frozen, colour is trained, an outline is made from others. A drawing is a function of methods.py or guides.py
that takes a `Sheet`; its size is that of the drawing, in inches.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import guides  # noqa: E402
import methods  # noqa: E402
from sheet import COLOURS, Sheet, settings  # noqa: E402

DRAWINGS = {**methods.DRAWINGS, **guides.DRAWINGS}


def draw(name: str, out: Path = HERE) -> list[Path]:
    """Draws one figure in both colours; returns the files."""
    drawing, (width, height) = DRAWINGS[name]
    paths = []
    for kind in COLOURS:
        with matplotlib.rc_context(settings(kind)):
            sheet = Sheet(width, height, kind)
            drawing(sheet)
            text = io.StringIO()
            sheet.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            paths.append(out / f"{name}-{kind}.svg")
            paths[-1].write_text(re.sub(r" +$", "", text.getvalue(), flags=re.MULTILINE), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], help="figures; default: all")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    for name in args.names or DRAWINGS:
        print(*(path.name for path in draw(name, args.out)))


if __name__ == "__main__":
    main()
