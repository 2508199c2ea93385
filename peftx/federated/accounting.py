"""What differential privacy costs: the history of a client's steps, its epsilon, and the noise that a target allows."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

ACCOUNTANTS = ("prv", "rdp")  # Opacus' "gdp" can say less than was spent
MOST_STEPS = 10**9  # of one entry of a history: more is no count of anything

# Said on the happy path: we document the generator; A is frozen, so the first layer's inputs need no gradient; the
# bound of the RDP accountant holds at any order.
HARMLESS = ("Secure RNG turned off", "Full backward hook is firing", "Optimal order is the")

History = tuple[tuple[float, float, int], ...]


class BudgetExceeded(ValueError):
    """The next round would spend more than the target epsilon. Nothing was trained and nothing has changed."""


def epsilon_spent(history: Sequence[Sequence[float]], delta: float, accountant: str = "prv") -> float:
    """The epsilon, at `delta`, of all steps in a history.

    Args:
        history: entries [noise multiplier, sample rate, steps], as in `LocalResult.history`.
        delta: in (0, 1).
        accountant: "prv" or "rdp".

    Returns:
        An upper bound; 0.0 for no steps, infinite if some were taken without noise. The PRV accountant takes a second,
        but a minute where there is next to no privacy (epsilons in the hundreds).

    Raises:
        ValueError: an entry, `delta` or `accountant` is not what it should be.
    """
    if not within(delta, 0, 1):
        raise ValueError(f"`delta` must lie strictly between 0 and 1, not {delta!r}.")
    check_accountant(accountant)
    return _spent(checked_history(history), float(delta), accountant)


def checked_history(history: Sequence[Sequence[float]] | None) -> History:
    """`history` as Opacus' accountants keep it, equal neighbours joined; None is that of a client that took no step.

    Raises:
        ValueError: anything but a list of [noise multiplier, sample rate, steps]; it may come from a file.
    """
    if history is None:
        return ()
    if not isinstance(history, list | tuple):
        raise ValueError(f"The history must be a list of [noise multiplier, rate, steps], not {_short(history)}.")
    entries: list[tuple[float, float, int]] = []
    for entry in history:
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ValueError(f"An entry of the history must be [noise multiplier, rate, steps], not {_short(entry)}.")
        sigma, rate, steps = entry
        check_entry(sigma, rate, steps)
        if entries and entries[-1][:2] == (sigma, rate):
            steps += entries.pop()[2]
        entries.append((float(sigma), float(rate), int(steps)))
    return tuple(entries)


def sample_rate(samples: int, batch_size: int) -> float:
    """The probability q with which a step draws each record, 1 / ceil(samples / batch_size), as Opacus has it."""
    return 1 / math.ceil(samples / batch_size)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Opacus' warnings on the happy path."""
    with warnings.catch_warnings():
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        # the PRV accountant's logarithms of 0, which it discards; they are there at q = 1
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"opacus\.accountants\.analysis")
        yield


@functools.lru_cache(maxsize=256)
def _spent(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    from opacus.accountants import create_accountant

    if not sum(steps for _, _, steps in history):
        return 0.0
    if any(sigma == 0 for sigma, _, steps in history if steps):
        return math.inf
    counter = create_accountant(mechanism=accountant)
    counter.history = [entry for entry in history if entry[2]]
    with quiet():
        spent = float(counter.get_epsilon(delta=delta))
    return math.inf if math.isnan(spent) else spent


@functools.lru_cache(maxsize=256)
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    """The noise multiplier that brings `steps` steps at sample rate `rate` to `epsilon`; solved once, then kept."""
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with quiet():
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant
                )
            )
    except ValueError as error:
        raise ValueError(
            f"No noise multiplier brings {steps} steps at sample rate {rate:.3g} to epsilon {epsilon} at delta {delta} "
            f"({accountant} accountant): {error}"
        ) from error


def within(value: Any, low: float, high: float) -> bool:
    """Whether `value` is a number (no bool) that a float can hold, between the two, neither of them included."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < min(high, 1e308)


def check_accountant(name: str) -> None:
    if name not in ACCOUNTANTS:
        raise ValueError(f"`accountant` must be one of {', '.join(ACCOUNTANTS)}, not {name!r}.")


def check_entry(sigma: Any, rate: Any, steps: Any) -> None:
    if isinstance(sigma, bool) or (sigma != 0 and not within(sigma, 0, math.inf)):
        raise ValueError(f"A noise multiplier must be a finite number >= 0, not {_short(sigma)}.")
    if isinstance(rate, bool) or (rate != 1 and not within(rate, 0, 1)):
        raise ValueError(f"A sample rate must be in (0, 1], not {_short(rate)}: no step draws a record more than once.")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= MOST_STEPS:
        raise ValueError(f"A number of steps must be an integer from 0 to {MOST_STEPS:,}, not {_short(steps)}.")


def _short(value: Any) -> str:
    if type(value) is int and value.bit_length() > 100:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.60}"
