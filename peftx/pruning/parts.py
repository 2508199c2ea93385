"""Scores in a folder, part by part, so that a scoring that was interrupted goes on: `scores.json` says of what they
are, and `part-000012.parquet` holds those of the 12th so many samples. Only whole files count."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import beside
from .columns import mark_of, pyarrow_there, read_columns, write_columns
from .selection import Selection, digest_of

MANIFEST = "scores.json"
FOLDER = "selection-scores"  # in an output_dir
FORMAT = 1
ROWS = 8192
VALUES = 64  # of each parameter that go into the digest of a model

WAY_OUT = "Give another folder, or delete this one to score again"


class Parts:
    """The parts of a folder that belong to `key`; made if it is not there.

    Args:
        folder: of these scores alone.
        key: plain data: what the scores depend on.
        rows: samples of a part. Where the folder has parts already, theirs.
        columns: names of the scores.

    Raises:
        ModuleNotFoundError: pyarrow is missing.
        ValueError: the folder holds something else, or scores of something else.
    """

    def __init__(self, folder: Path | str, key: Mapping[str, Any], columns: Sequence[str], rows: int = ROWS) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise ValueError(f"folder must be a path, got {folder!r}")
        if not pyarrow_there():
            raise ModuleNotFoundError("scores in a folder need pyarrow: pip install 'peftx[train]'", name="pyarrow")
        self.folder, self.columns = Path(folder), ("index", *columns)
        self.key = json.loads(json.dumps(key))
        self.rows = self.open(rows)
        self.owner = Selection.digest(self.key)

    def open(self, rows: int) -> int:
        manifest = self.folder / MANIFEST
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, not a folder of scores. Give another folder")
        if not manifest.exists():
            if self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise ValueError(f"{self.folder} holds other files, and no {MANIFEST}. Give a folder for scores alone")
            self.folder.mkdir(parents=True, exist_ok=True)
            with beside(manifest) as draft:  # processes may write it at the same time
                draft.write_text(json.dumps({"format": FORMAT, "rows": rows, "key": self.key}), encoding="utf-8")
        rows, key = read_manifest(manifest)
        if different := [name for name in dict.fromkeys([*key, *self.key]) if key.get(name) != self.key.get(name)]:
            details = ", ".join(f"{name} {key.get(name)!r}, now {self.key.get(name)!r}" for name in different)
            raise ValueError(f"{self.folder} has scores of other {' and '.join(different)} ({details}). {WAY_OUT}")
        return rows

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def done(self, number: int) -> bool:
        return self.path(number).exists()

    def mark(self, number: int, first: Any) -> dict[str, Any]:
        """Whose a part is: of these scores, with that number, and beginning with that sample."""
        return {"scores": self.owner, "part": number, "first": digest_of([first])}

    def write(self, number: int, indices: Sequence[int], scores: Tensor, first: Any) -> None:
        """Writes scores (k, m) of the samples `indices` (m,), the `first` of them given."""
        columns = dict(zip(self.columns, [torch.tensor(indices), *scores], strict=True))
        write_columns(self.path(number), columns, self.mark(number, first))

    def read(self, number: int, indices: Sequence[int], first: Any) -> dict[str, Tensor]:
        """The columns of a part, which are of the samples `indices`, the `first` of them given.

        Raises:
            ValueError: they are of something else.
        """
        try:
            found = read_columns(self.path(number), self.columns, self.mark(number, first), len(indices))
            if found.pop("index").tolist() != list(indices):
                raise ValueError("it has other indices")
        except ValueError as error:
            path = self.path(number)
            raise ValueError(
                f"{path} does not belong to these scores, or is damaged ({error}): delete it to score its samples again"
            ) from error
        return found


def read_manifest(path: Path) -> tuple[int, dict[str, Any]]:
    """Rows of a part, and the key, of the scores in a folder.

    Raises:
        ValueError: the file is something else, or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or type(found["rows"]) is not int or found["rows"] < 1:
            raise ValueError(f"format {found['format']!r}, parts of {found['rows']!r}")
        return found["rows"], dict(found["key"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} says not what its scores are of ({error}). {WAY_OUT}") from error


def remove_parts(folder: Path) -> None:
    """Deletes the scores that belong to a folder's `scores.json`, and the folder if nothing else is in it."""
    try:
        owner = Selection.digest(read_manifest(folder / MANIFEST)[1])
    except ValueError:  # not ours
        return
    for path in folder.glob("part-[0-9]*.parquet"):
        with suppress(ValueError):
            mark = mark_of(path)
            if isinstance(mark, dict) and mark.get("scores") == owner:
                path.unlink(missing_ok=True)
    for path in [*folder.glob(".part-*.parquet.*.part"), *folder.glob(f".{MANIFEST}.*.part"), folder / MANIFEST]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def model_digest(model: nn.Module) -> str:
    """A hash of up to 64 values of each parameter and buffer, at even distances, with names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        flat = tensor.detach().flatten()
        step = max(1, -(-len(flat) // VALUES))
        some = flat[::step].cpu()
        some = some.to(torch.float64) if some.is_floating_point() else some
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()
