"""Files of records: lines of JSON, JSON, and values between commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]
COMMAS = ",;\t|"
NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.0)?")  # which is written again as it was read


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without its byte order mark.

    Raises:
        ValueError: it is no file, or in another encoding.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be read")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 (line {line}: {error.reason}), but Latin-1 or UTF-16, it may be: convert it, e.g. by "
            f"iconv -f latin1 -t utf-8"
        ) from None


def read_lines(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The lines of a JSONL file that are not blank, as they are and parsed.

    Raises:
        ValueError: the file is not UTF-8, a line is not a JSON object, or there is none.
        OSError: the file cannot be read.
    """
    page = read_text(path)
    lines, records = [], []
    for number, line in enumerate(page.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON, one object a line ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not an object with named fields")
        lines.append(line)
        records.append(record)
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines, records


def read_json(path: Path) -> Records:
    """A list of objects, also as the only field of an object; or an object of columns; or lines of JSON.

    Raises:
        ValueError: it is none of these, or has no rows.
        OSError: the file cannot be read.
    """
    page = read_text(path)
    try:
        found = json.loads(page)
    except ValueError as error:
        if "Extra data" in str(error):  # an object a line
            return read_lines(path)[1]
        raise ValueError(f"cannot read {path}: not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"cannot read {path}: its JSON is nested too deeply") from None
    if isinstance(found, dict) and len(found) == 1 and is_rows(next(iter(found.values()))):
        found = next(iter(found.values()))
    elif isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        if len({len(column) for column in found.values()}) > 1:
            raise ValueError(f"cannot read {path}: its columns are not of one length")
        found = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    elif isinstance(found, dict):
        found = [found]
    if found == []:
        raise ValueError(f"{path} is empty")
    if not is_rows(found):
        raise ValueError(f"cannot read {path}: not a list of objects with named fields")
    return found


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def read_table(path: Path) -> Records:
    """Rows under a line of names. What stands between the values is found in that line; quotes are as in CSV, and in
    a file of tabs may be none at all.

    An empty cell is None. A column of whole numbers is one of numbers; every other stays text, whatever it says
    ("NA", "007").

    Raises:
        ValueError: there are no names, or one twice, or a row with another number of cells; its line is in the message.
        OSError: the file cannot be read.
    """
    page = read_text(path)
    said = re.match(r"sep=(.)\r?\n", page)  # Excel's
    page = page[said.end() :] if said else page
    if not page.strip():
        raise ValueError(f"{path} is empty")
    order = said[1] if said else "\t" + COMMAS if path.suffix.lower() == ".tsv" else COMMAS
    comma = max(
        order, key=lambda c: len(next(csv.reader([re.split("[\r\n]", page.lstrip("\r\n"))[0]], delimiter=c), []))
    )
    try:
        rows = cells(page, comma, csv.QUOTE_MINIMAL)
    except ValueError as error:
        try:
            if comma != "\t":
                raise error
            rows = cells(page, comma, csv.QUOTE_NONE)
        except ValueError:
            raise ValueError(f"cannot read {path}: {error}") from None
    names = [name.strip() for name in rows[0][1]]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"cannot read {path}: its first line must name each column once, got {', '.join(names)}")
    if len(rows) == 1:
        raise ValueError(f"{path} is empty")
    columns = [[row[i].strip() and row[i] for _, row in rows[1:]] for i in range(len(names))]
    values = [converted(column) for column in columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def cells(page: str, comma: str, quoting: int) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, with their last lines; all of one length."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    found: list[tuple[int, list[str]]] = []
    try:
        reader = csv.reader(io.StringIO(page, newline=""), delimiter=comma, quoting=quoting, strict=True)  # type: ignore[arg-type]
        for row in reader:
            if row and not (len(row) == 1 and not row[0].strip()):
                found.append((reader.line_num, row))
                if len(row) != len(found[0][1]):
                    raise ValueError(
                        f"line {reader.line_num} has {len(row)} cells between {comma!r}, the first line "
                        f"{len(found[0][1])}"
                    )
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return found


def converted(column: list[str]) -> list[Any]:
    """With None for what is empty, and numbers where there is nothing else."""
    if all(not cell or NUMBER.fullmatch(cell) for cell in column):
        return [(float(cell) if "." in cell else int(cell)) if cell else None for cell in column]
    return [cell or None for cell in column]
