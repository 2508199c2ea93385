"""What stands beside the package: citation, workflow, pre-commit, bounds."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import peftx

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_is_of_this_version_and_names_no_address():
    citation = read("CITATION.cff")
    assert citation["version"] == peftx.__version__ and citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "http" not in (ROOT / "CITATION.cff").read_text() and "urls" not in PROJECT


def test_the_workflow_runs_every_python_and_both_ends_of_the_bounds():
    matrix = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"] and {"lowest", "newest"} <= set(matrix["bounds"])
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"


def test_the_hooks_are_ruff_line_ends_and_large_files():
    hooks = [hook["id"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {"ruff", "ruff-format", "end-of-file-fixer", "check-added-large-files"} <= set(hooks)


def test_the_tested_versions_lie_within_the_bounds():
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    lines = PROJECT["dependencies"] + [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    bounds = {r.name: r.specifier for r in map(Requirement, lines) if r.name != PROJECT["name"]}
    assert all(any(s.operator in (">=", "==") for s in specifier) for specifier in bounds.values())
    shared = bounds.keys() & tested.keys()
    assert {"torch", "peft", "transformers"} <= shared
    assert all(Version(tested[name]) in bounds[name] for name in shared)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md"])
def test_links_of_the_other_pages_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert all(target.startswith("http") or (page.parent / target).exists() for target in targets)
