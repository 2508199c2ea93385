"""A forward pass that is collected on: its samples, its tokens, and the scale of its loss."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils import IGNORE, base_of, is_packed


@dataclass(eq=False)
class Batch:
    """A forward pass, and what its backward pass has given so far."""

    rows: int
    lengths: set[int]  # of the sequences in it, padded
    segments: Tensor | None  # (B, T): the sample of each position, where rows hold several
    masks: dict[str, Tensor | None]  # of the encoder (or only) and the decoder, (B, T): what is not padding
    labels: Tensor | None
    items: Tensor | int | None  # what the Trainer asks the model to divide its loss by
    shifted: bool  # labels are those of the next position
    divisor: Any = None  # the loss is a sum over samples, divided by this
    scale: Tensor | None = None  # from gradients of what was backpropagated to gradients of that sum
    encoded: Tensor | None = None  # what an encoder gives its decoder
    calls: Counter[str] = field(default_factory=Counter)
    parts: dict[str, list[Any]] = field(default_factory=dict)  # of layers that are called several times
    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    directions: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], shifted: bool) -> "Batch":
        tensors = {key: part for key, part in inputs.items() if isinstance(part, Tensor) and part.ndim}
        if not tensors:
            raise ValueError(
                "the model was called without tensors by name, so nothing tells how many samples there are"
            )
        first = next((tensors[key] for key in ("input_ids", "inputs_embeds") if key in tensors), None)
        first = next(iter(tensors.values())) if first is None else first
        labels = tensors.get("shift_labels", tensors.get("labels"))
        mask, target = tensors.get("attention_mask"), tensors.get("decoder_attention_mask")
        segments = segments_of(inputs, first)
        if mask is None or mask.ndim != 2:
            mask = None if "input_ids" not in tensors else torch.ones_like(first)
        if target is None and labels is not None and labels.ndim == 2 and not labels.is_floating_point():
            target = labels != IGNORE
        return cls(
            rows=len(first),
            lengths={part.shape[1] for part in tensors.values() if part.ndim > 1},
            segments=segments,
            masks={"encoder": None if mask is None else mask != 0, "decoder": None if target is None else target != 0},
            labels=labels,
            items=inputs.get("num_items_in_batch"),
            shifted=shifted and "shift_labels" not in tensors,
        )

    @property
    def supervised(self) -> Tensor | None:
        """Which entries of the labels are looked at; None where that is no question of entries."""
        if self.labels is None or self.labels.is_floating_point():
            return None
        return (self.labels[..., 1:] if self.shifted else self.labels) != IGNORE

    @property
    def sequences(self) -> int:
        """Rows, or the sequences in them."""
        return self.rows if self.segments is None else int(self.segments.max()) + 1

    @property
    def samples(self) -> int:
        """Rows, or the sequences in them, with at least one label."""
        chosen = self.supervised
        if self.segments is not None:
            if chosen is None or self.labels is None or self.segments.shape != self.labels.shape:
                return self.sequences
            return len((self.segments[..., :-1] if self.shifted else self.segments)[chosen].unique())
        return self.rows if chosen is None else int(chosen.reshape(len(chosen), -1).any(1).sum())

    @property
    def tokens(self) -> int:
        mask = self.masks["encoder"]
        return self.rows if mask is None else int(mask.sum())

    def split(self, part: Tensor, name: str) -> Sequence[Tensor]:
        """(B, T, features) of one sample a row, from an activation however it is shaped; or one tensor a sample."""
        if self.segments is not None and part.numel() // part.shape[-1] == self.segments.numel():
            return part.reshape(1, -1, part.shape[-1]).split(self._spans, 1)
        if self.segments is None:
            if self.rows == 1 or (part.ndim >= 3 and len(part) == self.rows):
                return [part.reshape(self.rows, -1, part.shape[-1])]
            if part.ndim == 2 and len(part) in {self.rows * length for length in (1, *self.lengths)}:
                return [part.reshape(self.rows, -1, part.shape[-1])]
        raise self._mixed(name, part.shape)

    def samples_of(self, tokens: Tensor, name: str) -> Tensor:
        """The sample of each of these tokens, counted through the batch; all of its tokens are among them."""
        count = int(tokens.max()) + 1 if len(tokens) else 0
        if self.segments is not None and count == self.segments.numel():
            return self.segments.reshape(-1).to(tokens.device)[tokens]
        length, rest = divmod(count, self.rows)
        if self.segments is None and not rest and (self.rows == 1 or length in {0, 1, *self.lengths}):
            return tokens // max(1, length)
        raise self._mixed(name, (count,))

    def _mixed(self, name: str, shape: Sequence[int]) -> ValueError:
        return ValueError(
            f"{name} takes activations {tuple(shape)} in a batch of {self.sequences} samples, and nothing tells "
            "which belong to which: use estimator='per_batch', or batches of 1, or leave it out with exclude_modules"
        )

    @cached_property
    def _spans(self) -> list[int]:
        """Lengths of the packed samples, one after the other."""
        assert self.segments is not None
        return torch.bincount(self.segments.reshape(-1)).tolist()


def segments_of(inputs: Mapping[str, Any], first: Tensor) -> Tensor | None:
    """(B, T), int64, counting up: the sample of each position, where a row holds several; None where rows are samples.

    From `position_ids` that start again inside a row, or the bounds that flash attention is given.
    """
    shape = first.shape[:2]
    if len(shape) < 2:
        return None
    starts = torch.zeros(shape, dtype=torch.bool, device=first.device)
    starts[:, 0] = True
    ends, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if isinstance(positions, Tensor) and is_packed(inputs) and positions.shape[-1] == shape[1]:
        starts[:, 1:] = (positions.diff(dim=1) != 1).to(first.device)
    elif isinstance(ends, Tensor) and ends.ndim == 1 and len(ends) > 2 and int(ends[-1]) == starts.numel():
        starts.view(-1)[ends[:-1].long()] = True
    else:
        return None
    return starts.view(-1).cumsum(0).view(shape) - 1


def check_packed(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: nothing keeps the attention of transformers from going across the samples of a row.
    """
    config: Any = getattr(base_of(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cached = inputs.get("use_cache")
    cached = getattr(text, "use_cache", True) if cached is None else cached
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    if inputs.get("attention_mask") is not None or (cached and not flash):
        raise ValueError(
            "the rows of the batch are not the samples (packing, or padding_free), and attend to one another: "
            "pass use_cache=False and no attention_mask, or use estimator='per_batch'"
        )


class Keep(torch.autograd.Function):
    """Saves a tensor as autograd saves its own: gradient checkpointing drops it and makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return switch.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


def divisor_of(batch: Batch, outputs: Any, loss: Tensor, honours: bool | None) -> tuple[Any, bool | None]:
    """What the model has divided the sum of its samples' losses by, and whether it is what the Trainer asked for."""
    chosen = batch.supervised
    mean = batch.rows if chosen is None else chosen.sum()
    if batch.items is None or chosen is None:
        return mean, honours
    if honours is None:
        if int(mean) == int(batch.items):
            return mean, None
        honours = divides_by(batch.items, mean, total_loss(batch, outputs), loss)
    return (batch.items if honours else mean), honours


def total_loss(batch: Batch, outputs: Any) -> float | None:
    """Cross-entropy summed over the batch, from the logits; None where they are not in line with the labels."""
    logits, labels = getattr(outputs, "logits", None), batch.labels
    if logits is None or labels is None or logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        return None
    total = 0.0
    with torch.no_grad():
        for row, wanted in zip(logits.detach(), labels, strict=True):
            if batch.shifted:
                row, wanted = row[:-1], wanted[1:]
            row = row.reshape(-1, row.shape[-1]).float()
            total += float(F.cross_entropy(row, wanted.reshape(-1), ignore_index=IGNORE, reduction="sum"))
    return total


def divides_by(items: Any, mean: Any, total: float | None, loss: Tensor) -> bool:
    """Whether a loss is `total / items`, as the Trainer asks, or still `total / mean`, as that of BERT classifiers."""
    value = float(loss.detach())
    if total is None or not (total > 0 and value > 0 and math.isfinite(total) and math.isfinite(value)):
        return True
    divisor = math.log(total / value)
    return abs(divisor - math.log(float(items))) < abs(divisor - math.log(float(mean)))


def scale_of(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """From gradients of what was backpropagated to those of -sum(log_probs), by the gradient of `log_probs`.

    TRL's trainers let the model give the log-probability of each label and make the loss of them themselves.

    Raises:
        ValueError: tokens count differently, so that it is another loss.
    """
    weights = -(gradient if mask is None else gradient[mask])
    weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    if not weights.numel():  # nothing to learn
        return weights.new_zeros(())
    low, high = weights.aminmax()
    if bool(high - low > 1e-5 * high.abs()):
        raise ValueError(
            "the trainer's loss does not weigh all tokens alike, so it is not the model's own (TRL's loss_type='dft', "
            "or a reward): collect on the trained model, with peftx.compression.collect"
        )
    return 1 / low
