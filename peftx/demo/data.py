"""A text classification task that every machine already has: docstrings of Python's own standard library.

The label of a docstring is its module family: the top-level package or module it lives in. The sources are parsed,
never imported, so the same Python gives the same data everywhere.
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DemoError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

FAMILIES = 8
MAX_TOKENS = 48
MIN_WORDS = 4
HELD_OUT = 0.2
SPLIT_SEED = 0

# An application's insides, and what later Pythons removed: without them, 3.10 to 3.13 agree on the families.
NOT_LIBRARIES = frozenset({"idlelib", "distutils", "lib2to3"})


def sources(family: str, root: Path) -> list[Path]:
    """The public source files of one family, in a fixed order; tests and private copies (`_pydecimal.py`) left out."""

    def public(path: Path) -> bool:
        parts = path.relative_to(root).with_suffix("").parts
        return all(part in {"__init__", "__main__"} or not part.startswith(("_", "test")) for part in parts)

    files = [root / f"{family}.py", *(root / family).rglob("*.py")]
    return sorted((path for path in files if path.is_file() and public(path)), key=Path.as_posix)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of all functions and classes of a file, each on one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text.split()) >= MIN_WORDS:
                yield text


@cache
def library(root: Path | None = None) -> dict[str, list[str]]:
    """Docstrings by family, for every public family of the standard library, or of the modules under `root`."""
    root = root or Path(sysconfig.get_path("stdlib"))
    names = sorted(name for name in sys.stdlib_module_names - NOT_LIBRARIES if not name.startswith("_"))
    return {
        name: list(dict.fromkeys(text for path in sources(name, root) for text in docstrings(path))) for name in names
    }


def examples(mask: str = "[MASK]") -> list[tuple[str, str]]:
    """Pairs (text, family) of the largest families; their names are masked everywhere, so no text says its label."""
    texts = library()
    largest = sorted(texts, key=lambda family: (-len(texts[family]), family))[:FAMILIES]
    if not texts[largest[-1]]:
        raise DemoError(f"found no sources of Python's standard library in {sysconfig.get_path('stdlib')}")
    names = re.compile("|".join(map(re.escape, largest)), re.IGNORECASE)
    return [(names.sub(mask, text), family) for family in largest for text in texts[family]]


def load(tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> "DatasetDict":
    """The task as `train` and `test` (a fifth), stratified; columns text, input_ids (at most 48 tokens) and label.

    Two texts are the same if their first 48 tokens are. Each is there once, and not at all if it comes from two
    families: the test texts are new, and every text has one label. `limit` keeps that many texts, stratified too. The
    test texts are sorted by length, so that batches carry little padding.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    pairs = examples(tokenizer.mask_token or "[MASK]")
    encoded = tokenizer([text for text, _ in pairs], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    keys = [tuple(ids) for ids in encoded]
    owners = Counter(key for key, _ in {(key, family) for key, (_, family) in zip(keys, pairs, strict=True)})
    rows = {key: pair for key, pair in zip(keys, pairs, strict=True) if owners[key] == 1}
    texts, families = zip(*rows.values(), strict=True)
    names = sorted(set(families))
    columns = {"text": texts, "input_ids": list(rows), "label": [names.index(family) for family in families]}
    features = Features(text=Value("string"), input_ids=Sequence(Value("int32")), label=ClassLabel(names=names))

    def split(data: Dataset, size: float | int) -> DatasetDict:
        return data.train_test_split(test_size=size, stratify_by_column="label", seed=SPLIT_SEED)

    data = Dataset.from_dict(columns, features=features)
    if limit is not None and limit < len(data):
        data = split(data, limit)["test"]
    parts = split(data, HELD_OUT)
    test = parts["test"]
    by_length = sorted(range(len(test)), key=lambda i: len(test[i]["input_ids"]))
    return DatasetDict(train=parts["train"], test=test.select(by_length))
