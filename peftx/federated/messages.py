"""What the two sides write to each other, in Flower's records."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .checks import Reply
from .flower import Array, ArrayRecord, Message

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"  # names of the records in every message


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Flower's form of a state: fp32, contiguous, npy without pickle."""
    return ArrayRecord(
        {name: Array(value.detach().float().contiguous().cpu().numpy()) for name, value in state.items()}
    )


def to_reply(message: Message) -> Reply:
    """Flower's message as plain data. What is not as agreed in its records becomes an error."""
    found = to_metrics(message)
    if found.error is not None:
        return found
    arrays = message.content.array_records
    if set(arrays) != {ARRAYS} or len(message.content.metric_records) > 1:
        return Reply(found.node, error=f"expected one record {ARRAYS!r} and at most one of metrics in the reply")
    return replace(found, arrays=arrays[ARRAYS])


def to_metrics(message: Message) -> Reply:
    """The same of a message that holds metrics only."""
    node = message.metadata.src_node_id
    if message.has_error():
        return Reply(node, error=message.error.reason or f"error {message.error.code}")
    return Reply(node, metrics=next(iter(message.content.metric_records.values()), {}))
