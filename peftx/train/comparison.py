"""Several methods on the same data, with the same number of steps: which is worth its parameters, memory and time?"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import get_peft_model
from transformers import TrainerCallback

from ..utils import AUTO_CLASSES, quiet
from .methods import Method, check_settings, find, first_variants, key, peft_config, trainable
from .report import write
from .run import (
    DoesNotFitError,
    Plan,
    as_dict,
    extra_callbacks,
    optimizer_options,
    plain,
    prepared,
    skeleton,
    train,
    training_arguments,
)
from .settings import CompareSettings, Section, Settings, TrainSettings

RESULTS = "results.json"
RANK = 8
LARGEST = 14  # power of 2, above which no rank is tried
Count = Callable[[Method, Section], int | None]
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
    folder = Path(settings.output)
    runs = earlier(settings, folder)
    with quiet():
        plan, *_ = prepared(settings)  # what every run would find of model and data is found before the first one
        entries, sizes = sized(settings, entries, plan)
    queue = [(name, chosen, seed) for seed in range(settings.seeds) for name, chosen in entries.items()]
    failures: dict[str, str] = {}
    left_out: dict[str, str] = {}
    asked = set(contestants(without_all(settings.methods)))
    for number, (name, chosen, seed) in enumerate(queue, 1):
        watch(name, number, len(queue))
        if name in failures or name in left_out or any(same(run, name, chosen, seed) for run in runs):
            continue
        try:
            found = apart(measured, run_settings(settings, name, chosen, seed))
        except (ValueError, NotImplementedError, RuntimeError) as error:
            unasked = isinstance(error, DoesNotFitError) and name not in asked
            (left_out if unasked else failures)[name] = " ".join(str(error).split())
            continue
        runs.append(found)
        store(settings, folder, runs)
    shown = [
        run
        for name, chosen in entries.items()
        for run in runs
        for s in range(settings.seeds)
        if same(run, name, chosen, s)
    ]
    trained = {run["method"] for run in shown}
    notes = [note for name, note in sizes.items() if name in trained]
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    paths = write(shown, folder, notes, failures) if shown else []
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
        run = run_settings(settings, name, chosen, 0)
        training_arguments(run, find(name))
        extra_callbacks(run)
        optimizer_options(run)
    if settings.eval_share == 0 and settings.eval_data is None and settings.eval_split is None:
        raise ValueError("compare needs held-out samples: name eval_data, or an eval_share above 0")


def run_settings(settings: CompareSettings, name: str, chosen: Section, seed: int) -> TrainSettings:
    common = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
    common |= {
        "output": str(Path(settings.output, key(name), f"seed-{seed}")),
        "training": {"save_strategy": "no", **settings.training, "seed": seed},
        "overwrite": True,
    }
    return TrainSettings(**common, method=name, method_settings=chosen)


def same(run: Mapping[str, Any], name: str, chosen: Section, seed: int) -> bool:
    settings = plain(check_settings(find(name), chosen))
    return key(run["method"]) == key(name) and run["method_settings"] == settings and run["seed"] == seed


def shared(settings: CompareSettings) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    own = ("methods", "equal", "rank", "seeds", "overwrite", "output")
    return {name: value for name, value in as_dict(settings).items() if name not in own}


def earlier(settings: CompareSettings, folder: Path) -> list[dict[str, Any]]:
    """The runs that are there already.

    Raises:
        ValueError: the folder holds something else, or runs with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file, not a folder")
    path = folder / RESULTS
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()) and not settings.overwrite:
            raise ValueError(f"output {folder} is not empty, and holds no comparison: name another folder")
        return []
    if settings.overwrite:
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, runs = found["settings"], found["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what compare writes ({error}): say overwrite to start anew") from None
    now = json.loads(json.dumps(shared(settings)))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name} is {now.get(name, 'not given')!r}, but the comparison in {folder} has "
                f"{before.get(name, 'none')!r}: say that, name another folder, or say overwrite"
            )
    return runs


def store(settings: CompareSettings, folder: Path, runs: list[dict[str, Any]]) -> None:
    """Replaces `results.json` in one step, so that an interruption leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    page = json.dumps({"settings": shared(settings), "runs": runs}, indent=1, default=str)
    draft = folder / f"{RESULTS}.part"
    draft.write_text(page + "\n", encoding="utf-8")
    draft.replace(folder / RESULTS)


def sized(
    settings: CompareSettings, entries: dict[str, Section], plan: Plan
) -> tuple[dict[str, Section], dict[str, str]]:
    """The entries with ranks as `settings.equal` says, and notes on those that cannot be made equal, by name."""
    if settings.equal == "none":
        return entries, {}
    notes = {name: f"{name} has no rank: it has its own size" for name in entries if find(name).rank_field is None}
    if settings.equal == "rank":
        rank = settings.rank or RANK
        return {name: with_rank(find(name), chosen, rank) for name, chosen in entries.items()}, notes
    names = list(entries)
    first = with_rank(find(names[0]), entries[names[0]], settings.rank) if settings.rank else entries[names[0]]
    result = {**entries, names[0]: first}
    count = counter(settings, plan)
    budget = count(find(names[0]), first)
    if budget is None:
        raise ValueError(f"method {names[0]} does not fit the model, so there is no budget: name another first")
    for name in names[1:]:
        method = find(name)
        if method.rank_field is None:
            continue
        rank, found = closest_rank(partial(values, count, method, entries[name]), budget)
        if rank:  # else the method does not fit, which its run will say
            result[name] = with_rank(method, entries[name], rank)
            if abs(found - budget) > 0.1 * budget:
                notes[name] = f"{name} comes no nearer to the budget of {budget:,} values than {found:,}"
    return result, notes


def values(count: Count, method: Method, settings: Section, rank: int) -> int | None:
    return count(method, with_rank(method, settings, rank))


def with_rank(method: Method, settings: Section, rank: int) -> Section:
    """The settings with this rank; LoRA's alpha, unless it is named, keeps its default ratio to the rank."""
    if method.rank_field is None:
        return settings
    defaults = {f.name: f.default for f in dataclasses.fields(method.config)}  # type: ignore[arg-type]
    defaults |= dict(method.settings)
    chosen = {**settings, method.rank_field: rank}
    alpha, r = defaults.get("lora_alpha"), defaults.get(method.rank_field)
    if "lora_alpha" not in settings and isinstance(alpha, int) and isinstance(r, int):
        chosen["lora_alpha"] = max(1, round(alpha * rank / r))
    return chosen


def closest_rank(count: Callable[[int], int | None], budget: int) -> tuple[int, int]:
    """The rank with the number of values nearest to the budget, and this number; zeros where no rank works.

    `count` grows with the rank, and is None for one that the method refuses: then smaller ones are tried.
    """
    counts: dict[int, int | None] = {}
    for rank in (2**power for power in range(LARGEST + 1)):
        found = counts[rank] = count(rank)
        if (found or 0) >= budget or (rank > 64 and found is None):
            break
    low = max((r for r, c in counts.items() if c is not None and c <= budget), default=0)
    high = min((r for r in counts if r > low), default=low)
    while high - low > 1:
        middle = (low + high) // 2
        counts[middle] = found = count(middle)
        if found is not None and found <= budget:
            low = middle
        else:
            high = middle
    valid = [(abs(c - budget), r, c) for r, c in counts.items() if c is not None]
    return min(valid, default=(0, 0, 0))[1:]


def counter(settings: CompareSettings, plan: Plan) -> Count:
    """What counts the values that a method trains on the model, without a new classifier; None if it does not fit.

    The model is on the meta device, without its weights. A method that needs weights to start (LoLDU) gets random ones.
    """
    network, new_modules = skeleton(settings, plan)
    cls = getattr(transformers, AUTO_CLASSES[plan.task])

    def count(method: Method, chosen: Section) -> int | None:
        if method.config is None:
            return sum(p.numel() for p in network.parameters())
        for device in ("meta", "cpu"):
            with torch.random.fork_rng(devices=[]), torch.device(device):
                base = cls.from_config(network.config)
            adapter = peft_config(method, check_settings(method, chosen), plan.task, new_modules)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return trainable(get_peft_model(base, adapter))[0]
            except Exception as error:
                if "meta" not in str(error) and not isinstance(error, NotImplementedError):
                    return None
        return None

    return count


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
