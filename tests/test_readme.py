"""The README says what the registry says."""

import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_method_table_is_the_registry():
    command = [sys.executable, "-m", "peftx.cli", "methods", "--markdown"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.strip() in README, f"put the output of `{' '.join(command[1:])}` between the markers in README.md"


def test_the_measured_table_is_that_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "method_table.py"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.strip() in README, "put the output of `python benchmarks/method_table.py` into README.md"


def test_the_two_commands_name_what_exists():
    extras = metadata("peftx").get_all("Provides-Extra")
    for extra in ("demo", "test"):
        assert f'pip install -c constraints.txt -e ".[{extra}]" && ' in README and extra in extras
    assert "pytest" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere():
    for target in (part.split(")")[0] for part in README.split("](")[1:]):
        assert target.startswith("http") or (ROOT / target).exists(), target
