"""The mean of what clients measured; their words are as untrusted as their updates."""

from collections import defaultdict
from collections.abc import Collection, Iterable

from .checks import (
    LARGEST_LOSS,
    WEIGHT_CAP,
    AuditEntry,
    Limits,
    Rejected,
    Reply,
    capped,
    check_sender,
    read_examples,
)


def average_metrics(
    replies: Iterable[Reply],
    *,
    asked: Collection[int],
    round: int,
    limits: Limits,
    weight_cap: float | None = WEIGHT_CAP,
) -> tuple[dict[str, float], list[AuditEntry]]:
    """The mean of each metric, weighted by "num-examples" as updates are, and an entry for each reply not taken so.

    A metric that is no number below 1e30 is left out. Arguments as `checks.admit`.
    """
    taken: dict[int, tuple[int, Reply]] = {}
    heard: set[int] = set()
    entries: list[AuditEntry] = []
    for reply in replies:
        try:
            check_sender(reply, asked, heard, limits)
            taken[reply.node] = read_examples(reply.metrics, limits), reply
        except Rejected as error:
            entries.append(AuditEntry(round, reply.node, f"evaluation: {error}"))
    counts = capped([n for n, _ in taken.values()], weight_cap)
    sums, weights = defaultdict[str, float](float), defaultdict[str, int](int)
    for (n, reply), count in zip(taken.values(), counts, strict=True):
        if count < n:
            entries.append(AuditEntry(round, reply.node, f"evaluation: {n} examples count as {count}", "capped"))
        for name, value in reply.metrics.items():
            if name != "num-examples" and isinstance(value, int | float) and abs(value) < LARGEST_LOSS:
                sums[name] += count * value
                weights[name] += count
    return {name: total / weights[name] for name, total in sums.items()}, entries
