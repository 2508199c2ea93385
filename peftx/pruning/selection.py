"""A selection as a file: what was kept, by which scores, of which data."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import beside
from ..utils import is_stream
from .columns import columns_beside, pyarrow_there, read_columns, write_columns

FILE_NAME = "selection.json"
FORMAT = 1
FORMAT_WITH_COLUMNS = 2  # scores in a Parquet file
IN_JSON = 100_000  # samples whose scores still go into the JSON
PROBED = 1024  # samples that go into a fingerprint


@dataclass(frozen=True)
class Selection:
    """Kept samples (ascending), the scores of all n (float64), and what they belong to.

    `key` says of what: `data` (`samples`, `fingerprint`), `model`, and the settings of the callback. A selection is
    used again only where every entry is equal.
    """

    indices: list[int]
    scores: dict[str, Tensor]
    key: dict[str, Any]

    @property
    def in_columns(self) -> bool:
        """Whether its scores are too many for the JSON."""
        return len(next(iter(self.scores.values()), ())) > IN_JSON and pyarrow_there()

    def save(self, path: Path, columns: Path | None = None) -> None:
        """Writes JSON, whole or not at all; NaN and infinity become null. Scores of more than 100,000 samples go into
        a Parquet file beside it, `selection-scores.parquet`, if pyarrow is installed.

        Args:
            columns: the Parquet file, where `path` is a draft that is renamed later. Default: `columns_beside(path)`.

        Raises:
            ValueError: there is a file of that name, which is not of a selection.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        page: dict[str, Any] = {"format": FORMAT, "indices": self.indices, "scores": None, "key": self.key}
        if self.in_columns:
            page["format"] = FORMAT_WITH_COLUMNS
            page["columns"] = write_columns(columns or columns_beside(path), self.scores, self.digest(self.key))
        else:
            page["scores"] = {
                name: [x if math.isfinite(x) else None for x in column.tolist()] for name, column in self.scores.items()
            }
        with beside(path) as draft:
            draft.write_text(json.dumps(page, allow_nan=False), encoding="utf-8")

    @staticmethod
    def digest(key: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Selection":
        """Raises:
        ValueError: the file is not a selection, or contradicts itself.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] not in (FORMAT, FORMAT_WITH_COLUMNS):
                raise ValueError(f"format {found['format']!r} instead of {FORMAT}")
            indices, rows, key = found["indices"], found["scores"], found["key"]
            count = key["data"]["samples"]
            if not all(type(i) is int for i in [count, *indices]):
                raise ValueError("indices must be integers")
            if not indices or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= count:
                raise ValueError(f"indices must be ascending, and from 0 to {count - 1}")
            if found["format"] == FORMAT_WITH_COLUMNS:
                scores = read_columns(columns_beside(path), found["columns"], cls.digest(key), count)
            else:
                scores = {
                    str(name): torch.tensor([math.nan if x is None else x for x in column], dtype=torch.float64)
                    for name, column in rows.items()
                }
            if wrong := [name for name, column in scores.items() if column.shape != (count,)]:
                raise ValueError(f"{', '.join(wrong)}: not one score for each of the {count} samples")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError, OSError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not a selection of peftx ({reason}): delete it to score again") from error
        return cls(indices, scores, key)

    def check(self, key: Mapping[str, Any], path: Path) -> None:
        """Raises:
        ValueError: the selection belongs to other data, another model or other settings than `key` says.
        """
        key = json.loads(json.dumps(key))  # tuples become lists, as in the file
        if key["data"]["samples"] is None:  # a stream, before it is read: what was read of it then
            key["data"]["samples"] = self.key["data"]["samples"]
        names = dict.fromkeys([*self.key, *key])
        if different := [name for name in names if self.key.get(name) != key.get(name)]:
            details = ", ".join(f"{name} {self.key.get(name)!r}, now {key.get(name)!r}" for name in different)
            raise ValueError(
                f"{path} was made for other {' and '.join(different)} ({details}). Train with what it was made for, "
                "use another output_dir, or delete the file (or DonodCallback(overwrite=True)) to score again."
            )


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Length of the data, and a hash of up to 1024 samples at even distances, the first and the last among them; of a
    stream, whose length nobody knows (None), of the first 1024."""
    if is_stream(dataset):
        return {"samples": None, "fingerprint": digest_of(islice(dataset, PROBED))}
    count = len(dataset)
    step = max(1.0, (count - 1) / (PROBED - 1))
    places = sorted({min(count - 1, round(i * step)) for i in range(min(count, PROBED))})
    return {"samples": count, "fingerprint": digest_of(dataset[place] for place in places)}


def digest_of(samples: Iterable[Any]) -> str:
    """A hash of samples in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, default=plain).encode())
    return digest.hexdigest()


def plain(thing: Any) -> Any:
    """What JSON does not know: tensors and arrays as lists, mappings as dicts, the rest by the name of its type."""
    if hasattr(thing, "tolist"):
        return thing.tolist()
    return dict(thing) if isinstance(thing, Mapping) else type(thing).__name__
