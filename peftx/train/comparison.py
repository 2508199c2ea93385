"""Several methods on the same data, with the same number of steps: which is worth its parameters, memory and time?"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from ..files import LIST, NEW, check_free, claim, is_by, note, publish, reached, written
from ..utils import quiet
from .folder import as_dict, inputs, plain
from .methods import check_settings, find, first_variants, key
from .plan import DoesNotFitError, prepared
from .report import FILES, write
from .run import extra_callbacks, optimizer_options, train, training_arguments
from .settings import CompareSettings, Section, Settings, TrainSettings
from .sizes import sized

BY = "compare"
RESULTS = "results.json"
# what a run in this file must have for the report
RUN: dict[str, Any] = {
    "method": str,
    "method_settings": dict,
    "seed": int,
    "learning_rate": int | float,
    "steps": int,
    "samples": dict,
    "trained_values": dict,
    "eval": dict,
    "step_seconds": int | float,
    "peak_memory": int | float,
    "memory_of": str,
    "bytes": int,
}
Methods = str | list[str] | Mapping[str, Section | None]
Watch = Callable[[str, int, int], None]  # method, run, runs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a comparison came to: the results of all runs, the files, and what could not be run, with the reason.

    `left_out` are those of `all` that do not fit the model, `failures` all others that did not run.
    """

    runs: list[dict[str, Any]]
    paths: list[Path]
    notes: list[str]
    failures: dict[str, str]
    left_out: dict[str, str]


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step: of the GPU and all it waits for, or CPU time of the process without one.

    And the peak of the memory until the training ends, so that an evaluation after it, whose batches may be larger,
    does not count.
    """

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.seconds: list[float] = []
        self.memory: dict[str, Any] = {}
        self.started = 0.0

    def now(self) -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.started)

    def on_train_end(self, args, state, control, **kwargs):
        self.memory = peak_memory(self.before)


def compare(settings: CompareSettings, watch: Watch = lambda *_: None) -> Outcome:
    """Runs every method with every seed, each in a process of its own, and writes table and picture.

    `results.json` in the output folder grows with each run, and a comparison that starts again goes on from there: it
    may then have more methods or seeds, but must agree in all else. Adapters are in `<method>/seed-<n>`.

    Args:
        settings: what to do.
        watch: is told the method, the number of the run and of all runs, before each of them.

    Raises:
        ValueError: settings, data or model do not fit, or the folder holds another comparison.
        OSError: a file cannot be read or written.

    The processes import the main module anew, as `multiprocessing` does: a script calls this below
    `if __name__ == "__main__":`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("compare starts processes of its own: run it without accelerate launch or torchrun")
    entries = contestants(settings.methods)
    check(settings, entries)
    folder, where = find_folder(settings)
    runs = [] if settings.overwrite else earlier(settings, where)
    check_free(folder, (RESULTS, *FILES), BY)
    with quiet():
        plan, *_ = prepared(settings)  # what every run would find of model and data is found before the first one
        entries, sizes = sized(settings, entries, plan)
    if settings.overwrite and where != folder and where.exists():
        shutil.rmtree(where)
    queue = [(name, chosen, seed) for seed in range(settings.seeds) for name, chosen in entries.items()]
    known = {name: (key(name), plain(check_settings(find(name), chosen))) for name, chosen in entries.items()}

    def there(name: str, seed: int) -> list[dict[str, Any]]:
        wanted = (*known[name], seed)
        return [run for run in runs if (key(run["method"]), run["method_settings"], run["seed"]) == wanted]

    failures: dict[str, str] = {}
    left_out: dict[str, str] = {}
    asked = set(contestants(without_all(settings.methods)))
    for number, (name, chosen, seed) in enumerate(queue, 1):
        watch(name, number, len(queue))
        if name in failures or name in left_out or there(name, seed):
            continue
        try:
            found = apart(measured, run_settings(settings, name, chosen, seed, where))
        except (ValueError, NotImplementedError, RuntimeError) as error:
            unasked = isinstance(error, DoesNotFitError) and name not in asked
            (left_out if unasked else failures)[name] = " ".join(str(error).split())
            continue
        runs.append(found)
        store(settings, where, runs)
    shown = [run for name in entries for seed in range(settings.seeds) for run in there(name, seed)]
    trained = {run["method"] for run in shown}
    notes = [note for name, note in sizes.items() if name in trained]
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    paths = write(shown, where, notes, failures) if shown else []
    if shown and where != folder:
        publish(where, folder, BY)
        paths = [folder / path.name for path in paths]
    return Outcome(shown, paths, notes, failures, left_out)


def contestants(methods: Methods) -> dict[str, Section]:
    """Names, as `find` has them, with their settings.

    `all` stands for LoRA and the first variant of each method of peftx.

    Raises:
        ValueError: an unknown method, a setting its config does not have, or a method with two settings.
    """
    given = as_mapping(methods)
    entries: dict[str, Section] = {name: {} for name in first_variants()} if "all" in given else {}
    said: dict[str, Section] = {}
    for name, chosen in without_all(methods).items():
        method = find(name)
        check_settings(method, chosen or {})
        if said.setdefault(method.name, dict(chosen or {})) != (chosen or {}):
            raise ValueError(f"methods: {name} is named twice, with different settings")
    return {**entries, **said}


def as_mapping(methods: Methods) -> dict[str, Section | None]:
    if isinstance(methods, Mapping):
        return dict(methods)
    names = methods.split(",") if isinstance(methods, str) else methods
    return dict.fromkeys(name.strip() for name in names if name.strip())


def without_all(methods: Methods) -> dict[str, Section | None]:
    """Those that are named one by one."""
    return {name: chosen for name, chosen in as_mapping(methods).items() if name != "all"}


def check(settings: CompareSettings, entries: Mapping[str, Section]) -> None:
    """What every run would say of these settings is said before the first one.

    Raises:
        ValueError: see `train`.
    """
    if not entries:
        raise ValueError("methods: name at least one")
    if "seed" in settings.training:
        raise ValueError("training: seed is set by `seeds`: leave it out")
    for name, chosen in entries.items():
        run = run_settings(settings, name, chosen, 0, Path(settings.output))
        training_arguments(run, find(name))
        extra_callbacks(run)
        optimizer_options(run)
    if settings.eval_share == 0 and settings.eval_data is None and settings.eval_split is None:
        raise ValueError("compare needs held-out samples: name eval_data, or an eval_share above 0")


def run_settings(settings: CompareSettings, name: str, chosen: Section, seed: int, where: Path) -> TrainSettings:
    common = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
    common |= {
        "output": str(where / key(name) / f"seed-{seed}"),
        "training": {"save_strategy": "no", **settings.training, "seed": seed},
        "overwrite": True,
    }
    return TrainSettings(**common, method=name, method_settings=chosen)


def shared(settings: CompareSettings) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    own = ("methods", "equal", "rank", "seeds", "overwrite", "output")
    return {name: value for name, value in as_dict(settings).items() if name not in own}


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
    if not (where / RESULTS).is_file() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output {folder} is not empty, and holds no comparison: name another folder")
    return folder, where


def earlier(settings: CompareSettings, folder: Path) -> list[dict[str, Any]]:
    """The runs that are there already.

    Raises:
        ValueError: what is there is no comparison, or one with other settings.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, runs = found["settings"], found["runs"]
        if not isinstance(before, dict):
            raise TypeError(f"its settings are a {type(before).__name__}")
        for run in runs:
            check_run(run)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not what compare writes ({reason}): say overwrite to start anew") from None
    now = json.loads(json.dumps(shared(settings), default=str))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name} is {now.get(name, 'not given')!r}, but the comparison in {folder} has "
                f"{before.get(name, 'none')!r}: say that, name another folder, or say overwrite"
            )
    return runs


def check_run(run: Any) -> None:
    """Raises KeyError, TypeError or ValueError unless a run from a file has all that the report needs."""
    for name, kind in RUN.items():
        value = run[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} of a run is {value!r}")
    ranks = run.get("lower_ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise TypeError(f"lower_ranks of a run is {ranks!r}")
    quality = run["eval"].get("accuracy", run["eval"].get("loss"))
    numbers = [quality, run["samples"]["eval"], *(run["trained_values"][key] for key in ("adapter", "whole_modules"))]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        raise TypeError(f"a run has no numbers: {numbers}")
    find(run["method"])


def store(settings: CompareSettings, folder: Path, runs: list[dict[str, Any]]) -> None:
    """Replaces `results.json` in one step, so that an interruption leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    page = json.dumps({"settings": shared(settings), "runs": runs}, indent=1, default=str)
    note(folder, [f"{key(run['method'])}/seed-{run['seed']}/{LIST}" for run in runs], BY)
    with written(folder / RESULTS, BY) as draft:
        draft.write_text(page + "\n", encoding="utf-8")


def apart(function: Callable[[TrainSettings], dict[str, Any]], settings: TrainSettings) -> dict[str, Any]:
    """`function(settings)` in a fresh process, whose memory is its own. One process imports everything, and forks."""
    context: Any = get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, settings).result()
    except BrokenProcessPool as error:
        raise RuntimeError("its process was killed, as a rule for want of memory") from error


def measured(settings: TrainSettings) -> dict[str, Any]:
    """A run with the median of its step times, and the peak of its memory."""
    watch = Stopwatch()
    metrics = train(settings, [watch])
    return {**metrics, "step_seconds": statistics.median(watch.seconds or [0.0]), **watch.memory}


def peak_memory(before: int) -> dict[str, Any]:
    """Bytes, and of what: of tensors on the GPU, or of resident memory beyond what the process had at its start."""
    if torch.cuda.is_available():
        return {"peak_memory": torch.cuda.max_memory_allocated(), "memory_of": "CUDA tensors"}
    if sys.platform == "win32":
        peak = psutil.Process().memory_info().peak_wset
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_memory": max(0, peak - before), "memory_of": "the process, above its start"}
