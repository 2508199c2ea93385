"""Contenders that take turns in one process, within a time: what fails or comes too late is told and ends nothing."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from contenders import settle

BUILT = 0.5  # of the time, after which nobody enters any more
ROUNDS = 9
LATE = "skipped: no time left"


class Clock:
    """The time that a part has, in seconds since the epoch, which processes share."""

    def __init__(self, until: float) -> None:
        self.start, self.until = time.time(), until

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the part's time has passed."""
        return self.start + share * (self.until - self.start) - time.time()


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside, between two operations of Python's, when the time is over (not on Windows)."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Race:
    """Contenders of one process that take turns. Who fails or comes too late keeps a row that says so."""

    def __init__(self, clock: Clock, report: Callable[[list[dict[str, Any]]], None], dry: bool) -> None:
        self.clock, self.report, self.dry = clock, report, dry
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: dict[str, dict[str, Any]] = {}
        self.alive: dict[str, Any] = {}

    def note(self, name: str, text: str) -> None:
        row = self.rows.setdefault(name, {"contender": name})
        row["note"] = "; ".join(filter(None, [row.get("note"), text]))

    def guarded(self, name: str, seconds: float, act: Callable[[], Any]) -> Any:
        """What `act` returns; None, and the contender is out, if it raises or takes too long."""
        self.rows.setdefault(name, {"contender": name})
        try:
            with limit(seconds):
                return act()
        except Exception as error:
            self.alive.pop(name, None)
            kind = "refused" if isinstance(error, NotImplementedError) else f"failed: {type(error).__name__}"
            self.note(name, f"{kind}: {first_line(str(error))}")
        settle(self.device)  # now that the exception is gone, whose frames held tensors
        return None

    def enter(self, name: str, make: Callable[[], Any], share: float = BUILT, most: float = 1 / 3) -> None:
        """Makes a contender, before `share` of the time is over and in `most` of what is left of it.

        The first one, a yardstick, may take as long as there is time.
        """
        left = self.clock.left(share)
        if self.rows and left <= 0:
            self.note(name, LATE)
        else:
            found = self.guarded(name, most * left if self.rows else self.clock.left(), make)
            if found is not None:
                self.alive[name] = found
        self.report(list(self.rows.values()))

    def run(self, key: str, act: Callable[[Any], float], yardstick: str, share: float = 1.0) -> None:
        """Rounds of `act`, which returns seconds, after one that does not count; ratios go into `key` of the rows."""
        if self.late(key):
            return
        for name in list(self.alive):
            self.guarded(name, self.clock.left(), lambda name=name: act(self.alive[name]))
        times: dict[str, list[float]] = {name: [] for name in self.alive}
        longest, order = 0.0, list(self.alive)
        for done in range(2 if self.dry else ROUNDS):
            begin = time.time()
            if done and self.clock.left(share) < 1.2 * longest:
                break
            random.Random(done).shuffle(order)
            for name in [name for name in order if name in self.alive]:
                spent = self.guarded(name, self.clock.left(), lambda name=name: act(self.alive[name]))
                times[name] += [] if spent is None else [spent]
            longest = max(longest, time.time() - begin)
        for name in self.alive:
            self.rows[name] |= {f"{key} ms": 1e3 * median(times[name]), f"{key} rounds": len(times[name])}
            if yardstick in self.alive:
                pairs = zip(times[name], times[yardstick], strict=True)
                self.rows[name][key] = median(ours / max(theirs, 1e-9) for ours, theirs in pairs)
        self.report(list(self.rows.values()))

    def late(self, key: str) -> bool:
        """Whether it is too late to begin with `key`, which the rows say then."""
        over = self.clock.left() <= 0
        for name in self.alive if over else ():
            self.note(name, f"{key}: no time left")
        return over

    def compare(self, key: str, amount: Callable[[Any], int], yardstick: str) -> None:
        """The same for bytes, which need no rounds."""
        if self.late(key):
            return
        for name in list(self.alive):
            if (found := self.guarded(name, self.clock.left(), lambda name=name: amount(self.alive[name]))) is not None:
                self.rows[name][f"{key} MiB"] = found / 2**20
        for name in self.alive:
            if theirs := self.rows[yardstick].get(f"{key} MiB"):
                self.rows[name][key] = self.rows[name][f"{key} MiB"] / theirs
        self.report(list(self.rows.values()))


def first_line(text: str) -> str:
    return (text.strip() or "no message").splitlines()[0][:140].replace("|", "/")
