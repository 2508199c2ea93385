"""One run of a comparison, in a process of its own: its clock, and its memory."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from .run import train
from .settings import TrainSettings
from .stored import Run


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


def apart(function: Callable[[TrainSettings], Run], settings: TrainSettings) -> Run:
    """`function(settings)` in a fresh process, whose memory is its own. One process imports everything, and forks."""
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, context, end_with_parent) as pool:
            return pool.submit(function, settings).result()
    except BrokenProcessPool as error:
        raise RuntimeError("its process was killed, as a rule for want of memory") from error


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, killed say; it would train on, and write."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def measured(settings: TrainSettings) -> Run:
    """A run with the median of its step times, and the peak of its memory."""
    watch = Stopwatch()
    metrics = train(settings, [watch])
    return {**metrics, "step_seconds": statistics.median(watch.seconds or [0.0]), **watch.memory}


def choice(settings: TrainSettings) -> Run:
    """A run that helps to choose: of what is measured on the validation part, and no files."""
    with tempfile.TemporaryDirectory(prefix="peftx-") as folder:
        found = train(dataclasses.replace(settings, output=str(Path(folder, "run"))), choosing=True)
    names = ("method", "method_settings", "seed", "learning_rate", "steps", "samples", "train_loss", "train_seconds")
    return {**{name: found[name] for name in names}, "validation": found["validation"]}


def threaded(function: Callable[[TrainSettings], Run], threads: int, settings: TrainSettings) -> Run:
    """`function(settings)` with so many threads."""
    torch.set_num_threads(threads)
    return function(settings)


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
