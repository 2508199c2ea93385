"""Several methods on the same data, with the same number of steps: which is worth its parameters, memory and time?"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files import check_free, publish
from ..utils import quiet
from .apart import apart, choice, measured, threaded
from .folder import plain
from .measures import OWN, measures_of, scored
from .methods import check_settings, find, first_variants, key
from .metrics import MetricError
from .plan import DoesNotFitError, prepared, without_validation
from .rates import SEED, further, grid, parse_rates, settled_rate, summary
from .report import FILES, rows
from .run import extra_callbacks, optimizer_options, training_arguments
from .settings import CompareSettings, Section, Settings, TrainSettings
from .sizes import sized
from .stored import BY, RESULTS, Kept, Run, earlier, find_folder, store, write

Methods = str | list[str] | Mapping[str, Section | None]
Watch = Callable[[str, int, int], None]  # method, run, runs
AT_THIS_RATE = (RuntimeError, MetricError)  # what a method need not raise at another one


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


def compare(settings: CompareSettings, watch: Watch = lambda *_: None) -> Outcome:
    """Runs every method with every seed, each in a process of its own, and writes table and picture.

    Where `learning_rates` are given, a run of each with a seed of its own (`rates.SEED`) is measured on the validation
    part first, and one is taken (`rates.settled_rate`); the held-out samples are read by the later runs alone. A new
    classifier learns at the first method's own rate in all of them, unless `head_learning_rate` says otherwise. `auto`
    tries five rates (`auto:3`: three) by factors of three around the method's own, more while the best is at an end.

    `results.json` in the output folder grows with each run, and a comparison that starts again goes on from there: it
    may then have more methods or seeds, but must agree in all else. Adapters are in `<method>/seed-<n>`.

    Args:
        settings: what to do.
        watch: is told the method, the number of the run and of all runs, before each that is to be done.

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
    if settings.learning_rates is not None and settings.head_learning_rate is None:  # the same whatever is tried
        settings = dataclasses.replace(settings, head_learning_rate=find(next(iter(entries))).learning_rate)
    folder, where = find_folder(settings)
    kept = Kept() if settings.overwrite else earlier(settings, where)
    check_free(folder, (RESULTS, *FILES), BY)
    with quiet():
        plan, samples, held = prepared(settings)  # what every run would find of all is found before the first one
        _, validation = without_validation(settings, samples)
        measures = measures_of(settings, plan, {"validation": validation, "held-out": held})
        entries, sizes = sized(settings, entries, plan)
    kept = kept.of(samples, held, settings.model, where)
    if settings.overwrite and where != folder and where.exists():
        shutil.rmtree(where)
    store(settings, where, kept)  # so that a run that is cut off is known as a comparison's
    work = Work(settings, entries, where, kept, watch)
    quality = measures.best or ("accuracy" if "accuracy" in OWN[plan.task] else "loss")
    chosen: dict[str, float] = {}
    measured_at: dict[str, dict[float, Any]] = {}
    if settings.learning_rates is not None:
        chosen, measured_at = work.choose(quality, scored(validation, plan.task))
    shown = work.run(chosen)
    trained = {run["method"] for run in shown}
    notes = [note for name, note in sizes.items() if name in trained]
    notes += [f"{name} is left out: {why}" for name, why in work.left_out.items()]
    notes += summary(chosen, measured_at, quality, len(validation), work.reasons)
    if settings.best_metric and not settings.validation:
        notes.append("checkpoints were chosen on the held-out samples themselves, which flatters the numbers")
    if shown and (head := shown[0].get("head_learning_rate")) is not None:
        notes.append(f"the new classifier learns at {head:g} in every run")
    if settings.jobs > 1:
        notes.append(f"step and memory: with {settings.jobs} runs at a time")
    paths: list[Path] = []
    if shown:
        paths = write(kept, shown, where, notes, work.failures)
        store(settings, where, kept, rows(shown))
    if shown and where != folder:
        publish(where, folder, BY)
        paths = [folder / path.name for path in paths]
    return Outcome(shown, paths, notes, work.failures, work.left_out)


@dataclasses.dataclass(frozen=True)
class Task:
    """A run that is to be done: `rate` None stands for the settings'."""

    name: str
    seed: int
    rate: float | None = None
    choosing: bool = False

    def __str__(self) -> str:
        return f"{self.name}, learning rate {self.rate:g}" if self.choosing else self.name


class Work:
    """The runs of a comparison: which are to be done, and what came of them.

    Attributes:
        failures: methods that do not run, with the reason.
        left_out: those of them that only `all` named.
        reasons: by method and learning rate, why a run that was to choose failed.
    """

    def __init__(
        self, settings: CompareSettings, entries: Mapping[str, Section], where: Path, kept: Kept, watch: Watch
    ) -> None:
        self.settings, self.entries, self.where, self.kept, self.watch = settings, entries, where, kept, watch
        self.asked = set(contestants(without_all(settings.methods)))
        self.known = {name: (key(name), plain(check_settings(find(name), own))) for name, own in entries.items()}
        self.failures: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.reasons: dict[tuple[str, float], str] = {}
        self.number = self.count = 0
        self.lock = threading.Lock()

    def run(self, rates: Mapping[str, float]) -> list[Run]:
        """Every method with every seed, at these rates or at the settings' own; the runs by method and seed."""
        names = [name for name in self.entries if name in rates or self.settings.learning_rates is None]
        tasks = [Task(name, seed, rates.get(name)) for seed in range(self.settings.seeds) for name in names]
        for _ in self.done(tasks):
            pass
        found = [self.there(task) for task in sorted(tasks, key=lambda task: names.index(task.name))]
        return [run for run in found if run is not None]

    def choose(self, quality: str, count: int) -> tuple[dict[str, float], dict[str, dict[float, Any]]]:
        """The rate of each method, and what each of its rates came to: None where it did not run."""
        said = parse_rates(self.settings.learning_rates or ())
        own = {name: find(name).learning_rate for name in self.entries}
        wanted = {name: said if isinstance(said, list) else grid(own[name], said) for name in self.entries}
        measured_at: dict[str, dict[float, Any]] = {name: {} for name in self.entries}
        while tasks := [Task(name, SEED, rate, True) for name, rates in wanted.items() for rate in rates]:
            for task, found, reason in self.done(tasks):
                assert task.rate is not None
                measured_at[task.name][task.rate] = found and found["validation"]
                self.reasons |= {(task.name, task.rate): reason} if reason else {}
            gone = {*self.failures, *self.left_out}
            new = {name: further(own[name], measured_at[name], quality) for name in wanted if name not in gone}
            wanted = {name: [rate] for name, rate in new.items() if rate is not None and isinstance(said, int)}
        chosen = {}
        for name, rates in measured_at.items():
            if name in self.failures or name in self.left_out:
                continue
            if (best := settled_rate(own[name], rates, quality, count)) is None:
                last = [reason for (method, _), reason in self.reasons.items() if method == name][-1:]
                self.failures[name] = last[0] if last else f"no learning rate has a finite {quality}"
            else:
                chosen[name] = best
        return chosen, {name: dict(sorted(measured_at[name].items())) for name in chosen}

    def done(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Run | None, str]]:
        """Each task that the method's failure does not spare us, with its run, kept before; None and why, where a run
        that chooses failed."""
        self.count += len(tasks)
        with ExitStack() as stack:
            results: Iterable[tuple[Task, Run | Exception | None]] = ((task, self.attempt(task)) for task in tasks)
            if self.settings.jobs > 1:
                pool = stack.enter_context(ThreadPoolExecutor(self.settings.jobs))
                stack.callback(pool.shutdown, cancel_futures=True)  # whatever ends this
                futures = {pool.submit(self.attempt, task): task for task in tasks}
                results = ((futures[future], future.result()) for future in as_completed(futures))
            for task, found in results:
                if isinstance(found, dict):
                    self.keep(found, tasks, task)
                elif task.choosing and type(found) is not NotImplementedError and isinstance(found, AT_THIS_RATE):
                    yield task, None, " ".join(str(found).split())
                    continue
                elif found is not None:
                    unasked = isinstance(found, DoesNotFitError) and task.name not in self.asked
                    reasons = self.left_out if unasked else self.failures
                    reasons.setdefault(task.name, " ".join(str(found).split()))
                if (run := self.there(task)) is not None:
                    yield task, run, ""

    def attempt(self, task: Task) -> Run | Exception | None:
        """The run, or what came instead; None where there is nothing to do."""
        with self.lock:
            self.number += 1
            if task.name in self.failures or task.name in self.left_out or self.there(task) is not None:
                return None
            self.watch(str(task), self.number, self.count)
        one = run_settings(self.settings, task.name, self.entries[task.name], task.seed, self.where, task.rate)
        function: Callable[[TrainSettings], Run] = choice if task.choosing else measured
        if self.settings.jobs > 1:
            function = partial(threaded, function, max(1, torch.get_num_threads() // self.settings.jobs))
        try:
            return apart(function, one)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            return error
        except ArithmeticError as error:
            return RuntimeError(f"{type(error).__name__}: {error}")
        except OSError:  # no place left, say: that is not the method's
            raise
        except Exception as error:
            return ValueError(f"{type(error).__name__}: {error}")

    def there(self, task: Task) -> Run | None:
        """The run of a task, where it is kept: of the same method, settings, seed and rate."""
        rate = task.rate or rate_of(self.settings, task.name)
        wanted = (*self.known[task.name], task.seed, rate)
        for run in self.kept.choices if task.choosing else self.kept.runs:
            if (key(run["method"]), run["method_settings"], run["seed"], run["learning_rate"]) == wanted:
                return run
        return None

    def keep(self, run: Run, tasks: Sequence[Task], task: Task) -> None:
        """Adds a run, in the order of the tasks whichever is done first, in place of one at another rate."""
        kept = self.kept.choices if task.choosing else self.kept.runs
        with self.lock:  # others look for theirs
            if not task.choosing:
                same = (*self.known[task.name], task.seed)
                kept[:] = [old for old in kept if (key(old["method"]), old["method_settings"], old["seed"]) != same]
            kept.append(run)
            places = {id(self.there(other)): i for i, other in enumerate(tasks)}
            kept[:] = sorted(kept, key=lambda one: places.get(id(one), -1))
        store(self.settings, self.where, self.kept)


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
    if (rates := settings.learning_rates) is not None and parse_rates(rates) and "learning_rate" in settings.training:
        raise ValueError("training: learning_rate is chosen from `learning_rates`: leave it out")
    if settings.jobs > 1 and torch.cuda.is_available() and not settings.training.get("use_cpu"):
        raise ValueError("jobs: runs on a GPU would share its memory and its clock: leave it out, or say use_cpu")
    for name, chosen in entries.items():
        run = run_settings(settings, name, chosen, 0, Path(settings.output))
        training_arguments(run, find(name))
        extra_callbacks(run)
        optimizer_options(run)
    if settings.eval_share == 0 and settings.eval_data is None and settings.eval_split is None:
        raise ValueError("compare needs held-out samples: name eval_data, or an eval_share above 0")


def run_settings(
    settings: CompareSettings, name: str, chosen: Section, seed: int, where: Path, rate: float | None = None
) -> TrainSettings:
    common = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
    common |= {
        "output": str(where / key(name) / f"seed-{seed}"),
        "training": {
            **({} if settings.best_metric else {"save_strategy": "no"}),
            **settings.training,
            **({} if rate is None else {"learning_rate": rate}),
            "seed": seed,
        },
        "overwrite": True,
        "validation_share": settings.validation or settings.validation_share,
    }
    return TrainSettings(**common, method=name, method_settings=chosen)


def rate_of(settings: CompareSettings, name: str) -> float:
    """At which a method is trained where no rates are given."""
    return float(settings.training.get("learning_rate", find(name).learning_rate))
