"""The labels of a classifier, which stand first on its card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

HEADING = "## Labels"
SECTION = re.compile(rf"^{HEADING}\n\n[^\n]*\n*", re.MULTILINE)
MOST = 100  # that are named
IN_CODE = 12  # at most, in the code that loads the base model
NAMED = re.compile(r"(\d+) (?:`` (.+?) ``|`([^`]+)`)(?:, |$)")


def named_labels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a model's config, from 0; none where it does not say them all, or as transformers
    makes them up (`LABEL_0`)."""
    names = settings.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return ()
    by_number = {str(key): str(name) for key, name in names.items()}
    found = tuple(by_number.get(str(i), f"LABEL_{i}") for i in range(len(by_number)))
    return () if any(name == f"LABEL_{i}" for i, name in enumerate(found)) else found


def with_labels(text: str, labels: Sequence[str], of: str = "") -> str:
    """The text of a card with its labels first: these, or where there are none, those that it names already, or that
    another card does (`of`). A few of them are in the code that loads the base model too, for `pipeline` to say."""
    named = labels or labels_on(text) or labels_on(of)
    if 0 < len(named) <= IN_CODE and not any("`" in name for name in named):
        names = ", ".join(f"{i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(named))
        call = re.compile(rf'\(("(?:[^"\\]|\\.)*"), num_labels={len(named)}\)')
        text = call.sub(lambda match: f"(\n    {match[1]}, id2label={{{names}}}\n)", text, count=1)
    if not labels:
        found = SECTION.search(text) or SECTION.search(of)
        return text if found is None else f"{found[0].rstrip()}\n\n{SECTION.sub('', text).lstrip()}"
    shown = ", ".join(f"{i} {code(name)}" for i, name in enumerate(labels[:MOST]))
    more = f", and {len(labels) - MOST:,} more" if len(labels) > MOST else ""
    return f"{HEADING}\n\n{shown}{more}\n\n{SECTION.sub('', text).lstrip()}"


def labels_on(text: str) -> tuple[str, ...]:
    """The labels that a card names, from 0; none where it does not name them all."""
    found = SECTION.search(text)
    line = found[0].removeprefix(f"{HEADING}\n\n").rstrip() if found else ""
    names: list[str] = []
    place = 0
    while (named := NAMED.match(line, place)) and int(named[1]) == len(names):
        names.append(named[2] or named[3])
        place = named.end()
    return tuple(names) if place == len(line) else ()


def code(text: str) -> str:
    """Inline code of Markdown, in one line."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
