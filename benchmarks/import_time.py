"""CPU time of `import peftx` against `import peft`: fresh interpreters in turn, median of pairs. Goal: at most 1.10."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from statistics import median, quantiles

from rich.console import Console
from rich.progress import track


def import_seconds(module: str) -> float:
    """User and system time of a new interpreter that imports `module`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="pairs to measure, at least 2; default: 15")
    rounds = max(2, parser.parse_args().rounds)
    modules, pairs = ["peft", "peftx"], []
    for module in modules:
        import_seconds(module)  # compiles byte code and fills the page cache
    for _ in track(range(rounds), "imports", console=Console(stderr=True), transient=True):
        modules.reverse()  # neither is always the first
        spent = {module: import_seconds(module) for module in modules}
        pairs.append((spent["peftx"], spent["peft"]))
    low, middle, high = quantiles([ours / theirs for ours, theirs in pairs], n=4)
    print(f"import peftx takes {middle:.3f} x import peft (quartiles {low:.3f}-{high:.3f}, {rounds} pairs)")
    print(
        f"medians: peftx {median(ours for ours, _ in pairs):.2f} s, peft {median(theirs for _, theirs in pairs):.2f} s"
    )


if __name__ == "__main__":
    main()
