"""What a node has spent of its privacy budget: in the node's state, and in a file that outlives runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from .accounting import checked_history, epsilon_spent, sample_rate
from .checkpoint import write_text
from .flower import ConfigRecord, Context
from .local import LocalSettings, plan_round
from .privacy import DPSpec

PRIVACY = "privacy"  # the record of `context.state` that holds a client's accountant
PATIENCE = 600.0  # seconds to wait for another run's look at the ledger, which takes a few

Entries = list[list[float]]


@contextlib.contextmanager
def spending(
    context: Context,
    ledger: Path | None,
    privacy: DPSpec,
    rows: int,
    settings: LocalSettings,
    total_steps: int | None,
) -> Iterator[Entries | None]:
    """A private round, whose cost is on record before it is trained.

    The history is read, compared with the budget and written under one lock of the ledger, so that runs that overlap
    spend from one budget, and a process that dies has spent. Where the round fails nothing has left the node: what it
    would have cost is taken off again.

    Yields:
        The history before the round, for `train_local`.

    Raises:
        BudgetExceeded: the round would spend more than `privacy.epsilon`; nothing is written.
        ValueError: the ledger holds something else than a history.
        TimeoutError: another process holds the ledger.
    """
    with _locked(ledger):
        before = load_history(context, ledger)
        sigma, epsilon = plan_round(privacy, rows, settings, before, total_steps)
        cost = (sigma, sample_rate(rows, settings.batch_size), settings.steps)
        keep_history(context, [*(before or ()), cost], epsilon, ledger)
    try:
        yield before
    except BaseException:
        with _locked(ledger):
            left = _without(load_history(context, ledger) or [], cost)
            keep_history(context, left, epsilon_spent(left, privacy.delta, privacy.accountant), ledger)
        raise


def load_history(context: Context, ledger: Path | None = None) -> Entries | None:
    """The accountant's history that this node kept, [[sigma, q, steps], ...]; None at the start.

    Raises:
        ValueError: what is kept is no well-formed history. That counts as nothing known, not as nothing spent.
    """
    if ledger is not None and ledger.exists():
        if not ledger.is_file():
            raise ValueError(f"the ledger {ledger} is no file")
        return _parse(ledger.read_bytes(), f"the ledger {ledger}")
    kept = context.state.config_records.get(PRIVACY)
    if kept is None:
        return None
    spent = {"epsilon": kept["epsilon"]} if "epsilon" in kept else {}
    return _checked({"history": json.loads(str(kept.get("history"))), **spent}, "the node's state")


def keep_history(
    context: Context, history: Sequence[Sequence[float]], epsilon: float, ledger: Path | None = None
) -> None:
    """Writes the accountant's history, and the epsilon spent so far, where the node finds them again."""
    entries = [list(entry) for entry in checked_history(history)]
    if ledger is not None:
        write_text(ledger, json.dumps({"history": entries, "epsilon": float(epsilon)}))
    context.state[PRIVACY] = ConfigRecord({"history": json.dumps(entries), "epsilon": float(epsilon)})


def _locked(ledger: Path | None) -> Any:
    """A lock over processes, in a file beside the ledger, which is itself replaced at each writing."""
    if ledger is None:
        return contextlib.nullcontext()
    if not ledger.parent.is_dir():  # not mounted, say: a new one would count as nothing spent
        raise ValueError(f"there is no folder {ledger.parent} for the ledger {ledger.name}")
    return FileLock(f"{ledger}.lock", timeout=PATIENCE)


def _parse(data: bytes, source: str) -> Entries:
    try:
        known = json.loads(data.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON: {error}") from error
    return _checked(known, source)


def _checked(known: Any, source: str) -> Entries:
    what = f"{source} is no record of a privacy budget (repair it, or remove it to count as nothing spent)"
    if not isinstance(known, dict) or not isinstance(known.get("history"), list):
        raise ValueError(f'{what}: it has no list "history"')
    if unknown := sorted(known.keys() - {"history", "epsilon"}):
        raise ValueError(f"{what}: it has fields of another version, {', '.join(map(repr, unknown))[:100]}")
    try:
        entries = [list(entry) for entry in checked_history(known["history"])]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    epsilon = known.get("epsilon", 0.0)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon >= 0:
        raise ValueError(f"{what}: its epsilon is {epsilon!r:.60}")
    if epsilon and not sum(steps for _, _, steps in entries):
        raise ValueError(f"{what}: its epsilon is {epsilon!r:.60} after no step")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field that is there twice")
    return found


def _without(history: Entries, cost: tuple[float, float, int]) -> Entries:
    """`history` less a round, which other runs may have added to since."""
    sigma, rate, steps = cost
    for place in reversed(range(len(history))):
        if history[place][:2] == [sigma, rate] and history[place][2] >= steps:
            left = [sigma, rate, history[place][2] - steps]
            return [*history[:place], *([left] if left[2] else []), *history[place + 1 :]]
    return history
