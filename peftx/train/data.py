"""Records of a file or of a hub data set: read, split, and made into samples."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pruning.text import read_lines
from .settings import Settings

LINES = (".jsonl", ".ndjson")  # what the standard library reads
BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # what `datasets` reads

Records = list[dict[str, Any]]


def read(source: str, *, subset: str | None = None, split: str = "train", label: str = "label") -> Records:
    """All rows of a file (.jsonl, .json, .csv, .tsv, .parquet) or of a data set that `datasets.load_dataset` knows.

    Numbers of a `ClassLabel` become its names.

    Raises:
        ValueError: nothing is there, it cannot be read, or it has no rows; or `datasets` is missing.
    """
    path = Path(source)
    if path.suffix in LINES:
        return read_lines(path)[1]
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ValueError(f"datasets is missing, which reads {source} (all but .jsonl): pip install datasets") from None
    datasets.utils.logging.disable_progress_bar()
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"there is no file {source}")
        options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        arguments: dict[str, Any] = {"path": BUILDERS[path.suffix], "data_files": source, "split": "train", **options}
    else:
        arguments = {"path": source, "name": subset, "split": split}
    try:
        table = datasets.load_dataset(**arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # of a file that cannot be parsed
        raise ValueError(f"cannot read {source}: {' '.join(str(cause).split())}") from error
    rows = list(table)
    if not rows:
        raise ValueError(f"{source} is empty")
    feature = table.features.get(label)
    if isinstance(feature, datasets.ClassLabel):
        rows = [row if row[label] < 0 else {**row, label: feature.int2str(row[label])} for row in rows]
    return rows


def read_both(settings: Settings) -> tuple[Records, Records]:
    """What is trained on, and what is held out: other data, another split, or a share of the training data."""
    common: dict[str, Any] = {"subset": settings.subset, "label": settings.label}
    records = read(settings.data, split=settings.split, **common)
    if settings.eval_data is None and settings.eval_split is None:
        return hold_out(records, settings.eval_share, settings.data)
    source = settings.eval_data or settings.data
    return records, read(source, split=settings.eval_split or settings.split, **common)


def hold_out(records: Records, share: float, name: str = "data") -> tuple[Records, Records]:
    """Two parts in their order; the second one is drawn, the same way whatever the seed of the training."""
    if share == 0:
        return records, []
    count = max(1, round(share * len(records)))
    if count >= len(records):
        raise ValueError(f"{name} has too few samples ({len(records)}) to hold some out: name eval_data")
    held = set(random.Random(0).sample(range(len(records)), count))
    return [r for i, r in enumerate(records) if i not in held], [r for i, r in enumerate(records) if i in held]


def label_names(records: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    """Names of the classes: the texts that occur, or `LABEL_0` to the highest number. Records without are left out.

    Raises:
        ValueError: there are fewer than two classes, or numbers and texts.
    """
    values = {record[field] for record in records if isinstance(record.get(field), str | int | float)}
    if values and all(isinstance(value, str) for value in values):
        names = sorted(values)
    elif any(isinstance(value, str) for value in values):
        raise ValueError(f"the labels in the field {field!r} are numbers and texts: make them one of these")
    else:
        names = [f"LABEL_{i}" for i in range(int(max(values, default=-1)) + 1)]
        if any(value < 0 for value in values):
            raise ValueError(f"labels in the field {field!r} must not be negative, got {min(values)}")
    if len(names) < 2:
        found = f"only {names[0]}" if names else f"none in the field {field!r}"
        raise ValueError(f"a classifier needs samples of at least two labels, found {found}")
    return names
