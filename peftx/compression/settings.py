"""What can be collected, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .checks import check_choice, check_count, shown
from .statistics import ESTIMATORS
from .sums import FISHER

WHAT: dict[str, tuple[str, ...]] = {"fisher": FISHER, "abs": ("abs_mean",), "gram": ("gram",)}


def check_settings(what: Iterable[str], estimator: str, directions: int | None = None) -> tuple[str, ...]:
    """The fields of `LayerStatistics` that `what` asks for.

    Raises:
        ValueError: unknown, or nothing.
    """
    known = WHAT | {side: (side,) for side in FISHER}
    if not isinstance(what, str | Iterable) or isinstance(what, bytes | Mapping):
        raise ValueError(f"what must be some of {', '.join(known)}, got {shown(what)}")
    asked = [what] if isinstance(what, str) else list(what)
    if unknown := [name for name in asked if not isinstance(name, str) or name not in known]:
        raise ValueError(f"what={shown(unknown[0])} cannot be collected: one of {', '.join(known)}")
    if not asked:
        raise ValueError(f"what= says what to collect: some of {', '.join(known)}")
    check_choice("estimator", estimator, ESTIMATORS)
    check_count("directions", directions, none=True)
    return tuple(dict.fromkeys(part for name in asked for part in known[name]))
