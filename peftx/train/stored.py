"""What a comparison keeps: `results.json`, which grows with each run, and where it lies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.records import Records
from ..files import DRAFT, LIST, NEW, claim, is_by, note, reached, written
from .folder import as_dict, inputs
from .methods import find, key
from .picture import plot
from .report import FILES, Row, Runs, markdown, quality_of, write_csv
from .settings import CompareSettings

BY = "compare"
RESULTS = "results.json"
COMMON: dict[str, Any] = {"method": str, "method_settings": dict, "seed": int, "learning_rate": int | float}
# what a run in this file must have for the report
RUN: dict[str, Any] = {
    **COMMON,
    "steps": int,
    "samples": dict,
    "trained_values": dict,
    "eval": dict,
    "step_seconds": int | float,
    "peak_memory": int | float,
    "memory_of": str,
    "bytes": int,
}
# of a run that only helps to choose
CHOICE: dict[str, Any] = {**COMMON, "steps": int, "samples": dict, "validation": dict}
Run = dict[str, Any]
PIECES, PIECE = 256, 4096  # of each file of weights, and their bytes


@dataclasses.dataclass(frozen=True)
class Kept:
    """The runs that are reported, and those by which learning rates are chosen."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    choices: list[Run] = dataclasses.field(default_factory=list)
    samples: str | None = None  # a digest of all samples; None in a file of an earlier version
    weights: str | None = None  # see `weights_of`; None in a file of an earlier version, too

    def of(self, samples: Records, held: Records, model: str, where: Path) -> Kept:
        """Kept runs of these samples on this model.

        Raises:
            ValueError: the runs had others.
        """
        weights = weights_of(model)
        if self.weights not in (None, weights):
            raise ValueError(
                f"the weights in {model} are others than those of the comparison in {where}: name another folder, or "
                "say overwrite"
            )
        digest = hashlib.sha256()
        for sample in (*samples, *held):
            digest.update(json.dumps(sample).encode())
        digest.update(str(len(samples)).encode())
        if self.samples is None:
            same = all(counts_of(run) == (len(samples), len(held)) for run in self.runs)
        else:
            same = self.samples == digest.hexdigest()
        if not same:
            raise ValueError(
                f"the samples are others than those of the comparison in {where} (data, tokenizer or lengths have "
                "changed since): name another folder, or say overwrite"
            )
        return dataclasses.replace(self, samples=digest.hexdigest(), weights=weights)


def weights_of(model: str) -> str | None:
    """A digest of a folder's weights, by names, sizes and pieces of their files; None of a name on the Hub."""
    digest = hashlib.sha256()
    files = sorted(path for path in Path(model).glob("*") if path.suffix in (".safetensors", ".bin"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(PIECES):
                file.seek(size * part // PIECES)
                digest.update(file.read(PIECE))
    return digest.hexdigest() if files else None


def counts_of(run: Run) -> tuple[int, int]:
    """Samples to train on, those of the validation part among them, and held-out ones."""
    return sum(counted(run["samples"])), run["samples"]["eval"]


def counted(samples: Mapping[str, int]) -> list[int]:
    return [samples.get(part, 0) for part in ("train", "validation")]


def shared(settings: CompareSettings) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    own = ("methods", "equal", "rank", "seeds", "overwrite", "output", "learning_rates", "jobs", "validation_share")
    found = {name: value for name, value in as_dict(settings).items() if name not in own}
    return found | ({"validation_share": settings.validation} if settings.validation else {})


def find_folder(settings: CompareSettings) -> tuple[Path, Path]:
    """The output folder, and where the comparison is written: there, or in a folder in it, where an earlier one is to
    be replaced, which stays until the new one is whole.

    Raises:
        ValueError: the output is or holds what is read, is a file, or holds something else than a comparison.
    """
    folder = Path(settings.output)
    if settings.overwrite:
        claim(folder, BY, inputs(settings), overwrite=True)
        return folder, folder / NEW if is_by(folder, BY) else folder
    reached(folder, inputs(settings))
    where = folder / NEW if (folder / NEW / RESULTS).is_file() else folder
    if not (where / RESULTS).is_file() and folder.exists() and {p.name for p in folder.iterdir()} - {DRAFT, LIST}:
        raise ValueError(f"output {folder} is not empty, and holds no comparison: name another folder")
    return folder, where


def earlier(settings: CompareSettings, folder: Path) -> Kept:
    """The runs that are there already.

    Raises:
        ValueError: what is there is no comparison, or one with other settings.
    """
    path = folder / RESULTS
    if not path.is_file():
        return Kept()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        optional = (found.get("samples"), found.get("weights"))
        before, kept = found["settings"], Kept(found["runs"], found.get("choices", []), *optional)
        if not isinstance(before, dict):
            raise TypeError(f"its settings are a {type(before).__name__}")
        for run in kept.runs:
            check_run(run)
        for run in kept.choices:
            check_kinds(run, CHOICE)
            check_numbers(run["validation"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not what compare writes ({reason}): move it away, or name another folder"
        ) from None
    now = json.loads(json.dumps(shared(settings), default=str))
    headless = bool(kept.runs) and not any(run["trained_values"]["whole_modules"] for run in kept.runs)
    for name in {**before, **now}:
        if before.get(name) != now.get(name) and not (name == "head_learning_rate" and headless):
            head = "; where learning rates are chosen it is the first method's" if name == "head_learning_rate" else ""
            raise ValueError(
                f"{name} is {now.get(name, 'not given')!r}, but the comparison in {folder} has "
                f"{before.get(name, 'none')!r}: say that, name another folder, or say overwrite{head}"
            )
    return kept


def check_run(run: Any) -> None:
    """Raises KeyError, TypeError or ValueError unless a run from a file has all that the report needs."""
    check_kinds(run, RUN)
    ranks = run.get("lower_ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise TypeError(f"lower_ranks of a run is {ranks!r}")
    numbers = [run["eval"][quality_of([run])[0]], *run["eval"].values()]
    numbers += [
        run["samples"]["eval"],
        *counted(run["samples"]),
        *(run["trained_values"][key] for key in ("adapter", "whole_modules")),
    ]
    check_numbers(numbers)


def check_kinds(run: Any, kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        value = run[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} of a run is {value!r}")
    find(run["method"])


def check_numbers(values: Iterable[Any]) -> None:
    found = list(values)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in found):
        raise TypeError(f"a run has no numbers: {found}")


def store(settings: CompareSettings, folder: Path, kept: Kept, rows: Sequence[Row] = ()) -> None:
    """Replaces `results.json` in one step, so that an interruption leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"settings": shared(settings), "samples": kept.samples, "weights": kept.weights}
    found["runs"] = kept.runs
    if kept.choices:
        found["choices"] = kept.choices
    if rows:
        found["table"] = [dataclasses.asdict(row) for row in rows]
    page = json.dumps(found, indent=1, default=str)
    note(folder, [f"{key(run['method'])}/seed-{run['seed']}/{LIST}" for run in kept.runs], BY)
    with written(folder / RESULTS, BY) as draft:
        draft.write_text(page + "\n", encoding="utf-8")


def write(kept: Kept, runs: Runs, folder: Path, remarks: Sequence[str], failures: Mapping[str, str]) -> list[Path]:
    """results.md and results.csv, and pareto.png where matplotlib is installed, of the runs that are shown; their
    paths."""
    page, sheet, picture = (folder / name for name in FILES)
    with written(page, BY) as draft:
        draft.write_text(markdown(runs, remarks, failures), encoding="utf-8")
    with written(sheet, BY) as draft:
        write_csv(runs, draft)
    try:
        with written(picture, BY) as draft:
            plot(runs, kept.choices, draft)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [page, sheet]
    return [page, sheet, picture]
