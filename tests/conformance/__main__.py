"""Runs PEFT's own tests against peftx's methods: one JSON line for each method and half; exit code 1 on a failure."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import peftx

HERE = Path(__file__).resolve().parent
HALVES = {"custom": "test_custom.py", "transformers": "transformers_half.py"}


def check(method: str, half: str) -> tuple[dict, list[str]]:
    """Counts of one half for one method, and a line for each failure. In a process of its own."""
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp, "report.xml")
        log = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", HERE / HALVES[half], "-n", "0", "-m", "conformance"),
                *(f"--junitxml={report}", "--tb=short"),
            ],
            cwd=HERE.parent.parent,
            env={**os.environ, "CONFORMANCE": method},
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise SystemExit(log.stdout + log.stderr)
        suite = next(ET.parse(report).iter("testsuite"))
    failed = [(case, case.find(kind)) for kind in ("failure", "error") for case in suite.iter("testcase")]
    failed = [(case, problem) for case, problem in failed if problem is not None]
    skipped = [reason(problem) for problem in suite.iter("skipped")]
    counts = {
        "method": method,
        "half": half,
        "passed": int(suite.get("tests", 0)) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "seconds": round(float(suite.get("time", 0))),
        "reasons": dict(Counter(skipped).most_common()),
    }
    return counts, [f"{case.get('name')}: {problem.get('message')}" for case, problem in failed]


def reason(skipped: ET.Element) -> str:
    """Why a test was skipped; for a whole module, JUnit's format has it in the text."""
    message = skipped.get("message", "")
    return (skipped.text or "") if message == "collection skipped" else message


def main() -> int:
    known = [method.name for method in peftx.methods()]
    parser = argparse.ArgumentParser(prog="python tests/conformance", description=__doc__)
    parser.add_argument("half", nargs="?", choices=[*HALVES, "all"], default="all")
    parser.add_argument("--methods", default=",".join(known), help="comma-separated; default: all registered methods")
    arguments = parser.parse_args()
    halves = list(HALVES) if arguments.half == "all" else [arguments.half]
    bad = False
    for method in arguments.methods.split(","):
        for half in halves:
            counts, failures = check(method, half)
            print(json.dumps(counts), flush=True)
            print(*failures, sep="\n", end="\n" * bool(failures), file=sys.stderr)
            bad |= bool(failures) or not counts["passed"]
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
