"""What the two sides write to each other, in Flower's records."""

from collections.abc import Mapping

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
    node = message.metadata.src_node_id
    if message.has_error():
        return Reply(node, error=message.error.reason or f"error {message.error.code}")
    arrays, metrics = message.content.array_records, message.content.metric_records
    if set(arrays) != {ARRAYS} or len(metrics) > 1:
        return Reply(node, error=f"expected one record {ARRAYS!r} and at most one of metrics in the reply")
    return Reply(node, arrays[ARRAYS], next(iter(metrics.values()), {}))


def to_metrics(message: Message) -> Reply:
    """The same of a message that holds metrics only."""
    node = message.metadata.src_node_id
    if message.has_error():
        return Reply(node, error=message.error.reason or f"error {message.error.code}")
    return Reply(node, metrics=next(iter(message.content.metric_records.values()), {}))
