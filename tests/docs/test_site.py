"""The site: each method has its page, numbers and messages are the code's, and MkDocs builds it without a warning."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SECTIONS = ["Formula", "Settings", "What it can do", "Measured", "When not to use it", "Paper"]


SPEC = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)
tables = hooks.load("tables")
PAGES = sorted(DOCS.rglob("*.md"))


def headings(text):
    return re.findall(r"^##+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


@pytest.mark.parametrize("info", tables.ours(), ids=lambda info: info.name)
def test_a_method_has_its_page_with_all_that_belongs_on_it(info):
    name, text = tables.slug(info), (DOCS / "methods" / f"{tables.slug(info)}.md").read_text()
    assert [heading for heading in headings(text) if heading in SECTIONS] == SECTIONS
    idea = text.split("\n\n")[1]
    assert len(re.findall(r"[.:](?=\s|$)", idea)) >= 3, "the idea in three sentences"
    for directive in (f"{{{{ figure {name} ", f"{{{{ settings {info.config.__name__} ", f"{{{{ abilities {name} "):
        assert directive in text
    assert f"{{{{ measured {name} }}}}" in text and f"{{{{ paper {name} }}}}" in text
    assert "```python" in text and f"peftx.{info.config.__name__}(" in text and "```math" in text


def test_the_tables_of_a_method_are_the_registry_and_the_results():
    info = tables.record("loldu")
    abilities, settings, measured = tables.abilities("loldu"), tables.settings("LoLDUConfig"), tables.measured("loldu")
    assert f"| {info.learning_rate:g} |" in abilities and info.config.__name__ in abilities
    assert "| `r` | `int` | `64` |" in settings and "`target_modules`" in settings and "`peft_type`" not in settings
    row = tables.load("amd-epyc-fp32")["models"]["bert"]["loldu r=64"]["ratios"]["LoRA"]
    assert f"{row['step']:.2f}" in measured and f"{row['memory']:.2f}" in measured
    allora, refused = tables.settings("ALLoRAConfig").split("Refused")
    assert "| `lora_dropout` |" in allora and "| `use_dora` |" not in allora and "`use_dora`" in refused
    assert tables.value("experts", "rows/0/trained", ",") == "114,688"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_directives_of_a_page_are_known(page):
    read = hooks.read(page.read_text())
    assert "{{ " not in read and not re.search(r"\b(TODO|TBD|FIXME|lorem)\b", read, re.IGNORECASE)


def test_every_page_is_in_the_navigation_and_every_name_in_the_reference():
    def leaves(part):
        if isinstance(part, str):
            return [part]
        return [leaf for item in (part.values() if isinstance(part, dict) else part) for leaf in leaves(item)]

    text = (ROOT / "mkdocs.yml").read_text()
    nav = leaves(yaml.safe_load(text)["nav"])
    assert {page.relative_to(DOCS).as_posix() for page in PAGES} <= set(nav) and max(Counter(nav).values()) == 1
    import peftx

    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    assert not [name for name in peftx.__all__ if f"::: peftx.{name}\n" not in reference]


BY_HAND = {"0.011", "0.026", "0.047"}  # of a binomial, of the paper's table of sizes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_measured_numbers_are_not_written_by_hand(page):
    text = re.sub(r"^```.*?^```|\{\{.*?\}\}|`[^`]*`|\]\([^)]*\)", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(PEFT|Python) \d\.\d+( to \d\.\d+)?", "", text)
    assert set(re.findall(r"(?<![\d.])\d\.\d\d+", text)) - BY_HAND <= {"5.23", "1.15", "1.16"}, "use `{{ value ... }}`"


def messages():
    """The texts of the package, with `…` for what is put in."""
    found = []
    for path in (ROOT / "peftx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("`", "") for text in found]


OTHERS = ("KeyError: 'LOLDU'", "Failed to load CPU gemm_4bit_forward", "FutureWarning: … is_gradient_checkpointing")


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    known = messages()
    shown = [heading.strip("`") for heading in headings((DOCS / "troubleshooting.md").read_text()) if heading[0] == "`"]
    assert len(shown) > 30 and set(OTHERS) <= set(shown)
    for message in set(shown) - set(OTHERS):
        pattern = re.compile(".+?".join(map(re.escape, message.strip("…").split("…"))), re.DOTALL)
        assert any(pattern.search(text) for text in known), message


def figures():
    return {path.stem.rpartition("-")[0] for path in (DOCS / "figures").glob("*.svg")}


def shapes(path):
    """All that is no text, which every release of matplotlib draws alike."""
    return re.findall(r'<g id="patch_\d+">\s*<path d="([^"]+)"', path.read_text())


def test_every_figure_is_on_a_page():
    shown = "".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"\{\{ figure ([\w-]+) ", shown) + re.findall(r"figures/([\w-]+)-light\.svg", shown))
    assert shown == figures()
    assert len(list((DOCS / "figures").glob("*.svg"))) == 2 * len(shown)


@pytest.mark.parametrize(
    "names", [["leaderboard"], pytest.param(sorted(figures() - {"leaderboard"}), marks=pytest.mark.slow, id="all")]
)
def test_the_figures_are_those_of_their_scripts_and_the_results(names, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, DOCS / "figures" / "draw.py", *names, "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for path in sorted(tmp_path.iterdir()):
        kept = shapes(DOCS / "figures" / path.name)
        assert kept and shapes(path) == kept, f"python docs/figures/draw.py {path.stem.rpartition('-')[0]}"


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if find_spec(package) is None:
            pytest.skip("needs peftx[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "methods" / "loldu" / "index.html").read_text()
    assert "<math" in page and "loldu-dark.svg" in page and "number | None" in page
    assert "peftx.LoLDUConfig" in (tmp_path / "reference" / "configs" / "index.html").read_text()
