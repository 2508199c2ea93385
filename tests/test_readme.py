"""The README is one screen, and says what the registry and the results say."""

import importlib.util
import re
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 150


def test_the_method_table_is_that_of_registry_and_results():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.short_methods() in README, (
        "put the output of `python docs/tables.py` between the markers in README.md"
    )


def test_the_two_commands_name_what_exists():
    extras = metadata("peftx").get_all("Provides-Extra")
    for extra in ("demo", "test"):
        assert f'pip install -c constraints.txt -e ".[{extra}]" && ' in README and extra in extras
    assert "pytest" in (ROOT / ".ci" / "run").read_text()


def test_links_and_pictures_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README) + re.findall(r'src(?:set)?="([^"]+)"', README)
    assert len(targets) > 20
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target
