"""Records of a file or of a hub data set: read, split, and made into samples."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils import IGNORE, muted
from .tables import Records, read_json, read_lines, read_table

LINES = (".jsonl", ".ndjson")
COMMAS = (".csv", ".tsv")
TABLES = (".json", *COMMAS)
FILES = (*LINES, *TABLES, ".parquet")


def read(source: str, *, subset: str | None = None, split: str = "train") -> Records:
    """All rows of a file (.jsonl, .json, .csv, .tsv, .parquet) or of a data set that `datasets.load_dataset` knows.

    Numbers of a `ClassLabel`, alone or in a list, become its names.

    Raises:
        ValueError: nothing is there, it cannot be read, or it has no rows; or `datasets` is missing.
        OSError: a .jsonl file cannot be read.
    """
    path = Path(source)
    kind = path.suffix.lower()
    if kind in LINES:
        return read_lines(path)[1]
    if path.exists() and not path.is_dir() and kind not in FILES:
        raise ValueError(f"{source} is neither a folder nor a file that is known by its ending: {', '.join(FILES)}")
    if kind in FILES and not path.exists():
        raise ValueError(f"there is no file {source}")
    if kind in TABLES and not path.is_dir():
        return read_table(path) if kind in COMMAS else read_json(path)
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ValueError(f"datasets is missing, which reads {source}: pip install datasets") from None
    if kind in FILES and not path.is_dir():
        arguments: dict[str, Any] = {"path": "parquet", "data_files": source, "split": "train"}
    else:
        arguments = {"path": source, "name": subset, "split": split}
    try:
        with muted(datasets.utils.logging, datasets.utils.logging.CRITICAL):  # we report its errors
            table = datasets.load_dataset(**arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # of a file that cannot be parsed
        raise ValueError(f"cannot read {source}: {' '.join(str(cause).split())}") from error
    rows = list(table)
    if not rows:
        raise ValueError(f"{source} is empty")
    for field, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            rows = [{**row, field: named(row[field], inner.int2str)} for row in rows]
    return rows


def named(value: Any, name: Callable[[int], str]) -> Any:
    """A class's name for its number, also in lists; what stands for no class stays."""
    if isinstance(value, list):
        return [named(part, name) for part in value]
    return value if value is None or value < 0 else name(value)


def read_both(settings: Any) -> tuple[Records, Records | None]:
    """The data, and what is held out where it is other data or another split; None where it is a share of the data.

    Raises:
        ValueError: see `read`; or a split or configuration of a single file is asked for.
    """
    source = settings.eval_data or settings.data
    split = settings.split if settings.split != "train" else None
    said = {"subset": (settings.subset, settings.data), "split": (split, settings.data)}
    for name, (value, where) in (said | {"eval_split": (settings.eval_split, source)}).items():
        if value is not None and Path(where).suffix.lower() in FILES:
            raise ValueError(f"{name} is {value!r}, but {where} is a single file, which has none: leave it out")
    records = read(settings.data, subset=settings.subset, split=settings.split)
    if settings.eval_data is None and settings.eval_split is None:
        return records, None
    return records, read(source, subset=settings.subset, split=settings.eval_split or settings.split)


def hold_out(
    samples: Records, share: float, name: str = "data", instead: str = "name eval_data"
) -> tuple[Records, Records]:
    """Two parts in their order; the second one is drawn, the same way whatever the seed of the training."""
    if share == 0:
        return samples, []
    count = max(1, round(share * len(samples)))
    if count >= len(samples):
        raise ValueError(f"{name} has too few samples ({len(samples)}) to hold some out: {instead}")
    held = set(random.Random(0).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in held], [s for i, s in enumerate(samples) if i in held]


def label_names(records: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    """Names of the classes: the texts that occur, or `LABEL_0` to the highest number. Records without are left out.

    A record has one label, or a list of them, where -100 is none.

    Raises:
        ValueError: there are fewer than two classes, or numbers and texts, or a number that is none of a class.
    """
    given = [record.get(field) for record in records]
    parts = [[part for part in value if part != IGNORE] if isinstance(value, list) else [value] for value in given]
    values = {part for one in parts for part in one if isinstance(part, str | int | float)}
    names = sorted(value for value in values if isinstance(value, str))
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if names and numbers:
        raise ValueError(f"the labels in the field {field!r} are numbers and texts: make them one of these")
    if numbers:
        if min(numbers) < 0:
            raise ValueError(f"labels in the field {field!r} must not be negative, got {min(numbers)}")
        if (highest := int(max(numbers))) >= max(1000, len(records)):
            raise ValueError(f"labels in the field {field!r} are to be numbered 0, 1, ..., but one is {highest}")
        names = [f"LABEL_{i}" for i in range(highest + 1)]
    if len(names) < 2:
        found = f"only {names[0]}" if names else f"none in the field {field!r}"
        raise ValueError(f"a classifier needs samples of at least two labels, found {found}")
    return names
