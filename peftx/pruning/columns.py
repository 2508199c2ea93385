"""Columns of numbers as Parquet files: written whole or not at all, and read as what somebody else may have written."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import beside

MARK = b"peftx"  # in the file's metadata: what its columns belong to


def pyarrow_there() -> bool:
    return find_spec("pyarrow") is not None


def columns_beside(path: Path) -> Path:
    """The Parquet file with the scores of a selection."""
    return path.with_name(f"{path.stem}-scores.parquet")


def write_columns(path: Path, columns: Mapping[str, Tensor], owner: Any) -> list[str]:
    """Writes columns (n,) of int64 or float64 that belong to `owner` (plain data), and returns their names.

    Raises:
        ValueError: there is a file of that name without an owner.
    """
    import pyarrow
    import pyarrow.parquet

    if path.exists():
        mark_of(path)
    table = pyarrow.table({name: column.numpy() for name, column in columns.items()})
    table = table.replace_schema_metadata({MARK: json.dumps(owner)})
    with beside(path) as draft, draft.open("wb") as file:
        pyarrow.parquet.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    return list(columns)


def mark_of(path: Path) -> Any:
    """What the columns in a file belong to.

    Raises:
        ValueError: it is not a file of ours.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return json.loads(pyarrow.parquet.read_schema(path).metadata[MARK])
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not a file of scores ({type(error).__name__})") from error


def read_columns(path: Path, names: Sequence[str], owner: Any, count: int) -> dict[str, Tensor]:
    """Raises:
    ValueError: the file belongs to something else, or has not these columns, `count` long, of int64 or float64.
    """
    import pyarrow
    import pyarrow.parquet

    if mark_of(path) != owner:
        raise ValueError(f"{path.name} belongs to something else")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if file.metadata.num_rows != count or sorted(file.schema_arrow.names) != sorted(names):
            raise ValueError(
                f"{path.name} has {file.metadata.num_rows} rows of {', '.join(file.schema_arrow.names)} instead of "
                f"{count} of {', '.join(names)}"
            )
        if odd := [field.name for field in file.schema_arrow if str(field.type) not in ("int64", "double")]:
            raise ValueError(f"{path.name}: {', '.join(odd)} is not of numbers")
        table = file.read()
        if any(column.null_count for column in table.columns):
            raise ValueError(f"{path.name} has empty entries")
        return {name: torch.from_numpy(table[name].to_numpy().copy()) for name in names}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
