"""The hook of the site: directives become tables, formulas MathML, and links to files of the repository pages.

    {{ name argument ... }}     what the function `name` of tables.py makes of its arguments
    ```math, $`...`$            LaTeX, as GitHub writes it; MathML on the site, so that no script is fetched
    ](../examples/train.yaml)   a file beside docs/: a page or a picture of the site

`read` does all but the links, without MkDocs: the tests run what it returns.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
DIRECTIVE = re.compile(r"\{\{ (\w+)((?:\s[^}]+?)?) \}\}")
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
SOURCES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}


def load(name: str) -> Any:
    """The module `name` of this folder, which is no package."""
    full = f"docs_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, DOCS / f"{name}.py")
        assert spec and spec.loader
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def outside() -> dict[str, str]:
    """Files of the repository that are part of the site: their place there by their path here."""
    found = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    found["benchmarks/README.md"] = "benchmarks/how.md"  # benchmarks.md is a page of its own
    for folder in ("examples", "benchmarks", "model_cards"):
        for path in sorted((ROOT / folder).rglob("*")):
            here = path.relative_to(ROOT).as_posix()
            if path.suffix in {".md", ".png"}:
                found.setdefault(here, here.replace("README.md", "index.md"))
            elif path.suffix in SOURCES and "__pycache__" not in here:
                found[here] = f"{here.removesuffix(path.suffix)}{path.suffix.replace('.', '-')}.md"
    return found


def formulas(text: str) -> str:
    from latex2mathml.converter import convert

    def block(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(" ".join(match[1].split()), display="block")}</div>'

    text = re.sub(r"^```math\n(.*?)^```$", block, text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\$`([^`]+)`\$", lambda match: convert(match[1]), text)


def read(text: str) -> str:
    """The text of a page with its directives done."""
    tables = load("tables")
    return DIRECTIVE.sub(lambda match: getattr(tables, match[1])(*match[2].split()), text)


def links(text: str, here: str, site: str, known: dict[str, str]) -> str:
    """The links of a page that is `here` in the repository and `site` on the site, as the site needs them."""

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target)) if target[0] != "/" else target[1:]
        place = path.removeprefix("docs/") if path.startswith("docs/") else known.get(path)
        if place is None:
            return match[0]
        return f"{before}{posixpath.relpath(place, posixpath.dirname(site) or '.')}{anchor or ''}{after}"

    return LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for here, site in outside().items():
        path = ROOT / here
        if path.suffix == ".png":
            files.append(File.generated(config, site, abs_src_path=str(path)))
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix in SOURCES:
            text = f"---\nsearch: {{exclude: true}}\n---\n# {here}\n\n``````{SOURCES[path.suffix]}\n{text}``````\n"
        files.append(File.generated(config, site, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    site = page.file.src_uri
    known = outside()
    here = next((path for path, place in known.items() if place == site), f"docs/{site}")
    if here.startswith("docs/"):
        markdown = formulas(read(markdown))
    return links(markdown, here, site, known) if not here.endswith(tuple(SOURCES)) else markdown
