"""Preference pairs that TRL's `DPOTrainer` has tokenised, as samples: a prompt with its chosen answer."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..utils import IGNORE, columns_of

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def is_pair(sample: Any) -> bool:
    return isinstance(sample, Mapping) and all(name in sample for name in COLUMNS)


class Chosen:
    """A collator that keeps of a batch of pairs, as TRL's makes it (`input_ids`, `attention_mask` and
    `completion_mask`, all chosen answers before all rejected ones), the chosen half, whose answers are the `labels`:
    what supervised fine-tuning on the chosen answers would see. Other batches pass as they are."""

    def __init__(self, collator: Callable[[list], Any]) -> None:
        self.collator = collator

    def __call__(self, samples: list) -> Any:
        pairs = bool(samples) and all(map(is_pair, samples))
        batch = self.collator(samples)
        names = ("input_ids", "attention_mask", "completion_mask")
        if not pairs or not isinstance(batch, Mapping) or isinstance(batch.get("labels"), Tensor):
            return batch
        parts: list[Any] = [batch.get(name) for name in names]
        if not all(isinstance(part, Tensor) and part.ndim == 2 and len(part) == 2 * len(samples) for part in parts):
            return batch
        ids, real, answer = (part[: len(samples)] for part in parts)
        width = int(real.any(0).nonzero().max()) + 1 if real.any() else real.shape[1]  # rejected ones may be longer
        ids, real, answer = ids[:, :width], real[:, :width], answer[:, :width]
        return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(answer == 0, IGNORE)}


def samples_of(trainer: Any, dataset: Any) -> tuple[Any, Chosen]:
    """The data and the collator of a trainer, as samples can be scored."""
    data, collator = columns_of(trainer, dataset)
    return data, Chosen(collator)
