"""Scores of the samples in a batch, from one forward pass."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils import IGNORE, base_of, is_packed
from .head import Head, calls_of, check_head, find_head
from .pairs import is_pair
from .probe import OF_HEAD, cross_entropy, don_nod, head_statistics, residual

ENTRIES = 2**22  # logits that are held in float32 at a time
PAIRS = ("chosen", "rejected")


def facts(task: str) -> tuple[str, ...]:
    """What `score_dataset` returns beside the metrics."""
    return ("label", "tokens") if task == "SEQ_CLS" else ("tokens",)


def check_samples(samples: Sequence[Any]) -> None:
    """Raises BatchError for samples that are several in one, or pairs of answers that no `DPOTrainer` has prepared."""
    first = samples[0] if samples and isinstance(samples[0], Mapping) else {}
    if all(any(str(name).startswith(side) for name in first) for side in PAIRS) and not is_pair(first):
        raise BatchError(
            "these are preference pairs (chosen and rejected), which have no score of their own unless TRL's "
            "DPOTrainer has tokenised them. Make a data set of prompts and chosen answers, score that with "
            "peftx.pruning.score_dataset or `peftx prune`, and train on dataset.select(indices) of the pairs"
        )
    if "seq_lengths" in first and any(len(sample["seq_lengths"]) > 1 for sample in samples):  # TRL's packing
        raise BatchError("a row holds several samples (seq_lengths): score and select before packing")


class BatchError(ValueError):
    """What is wrong with a batch; the caller says which samples it holds."""


def check_batch(batch: Any) -> Mapping[str, Any]:
    """Raises BatchError unless a collator made a mapping with labels."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        made = f"only {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"but a {type(batch).__name__}"
        raise BatchError(
            f"the collator made no tensor 'labels', {made}. Scores are of samples with labels: score a data set of "
            "prompts and answers with peftx.pruning.score_dataset, and train on dataset.select(indices)"
        )
    return batch


class Scorer:
    """Scores batches; the head is looked at once, in the first batch that has a supervised token."""

    def __init__(
        self, model: nn.Module, task: str, metrics: Sequence[str], eta: float, reduction: Any, head: str | None
    ) -> None:
        self.model, self.task, self.metrics, self.eta, self.reduction = model, task, set(metrics), eta, reduction
        self.module = find_head(model, task, head) if OF_HEAD & self.metrics else None
        self.head: Head | None = None
        self.device = next(model.parameters()).device
        self.columns = (*(name for name in metrics if name != "random"), *facts(task))

    def __call__(self, batch: dict[str, Any], size: int) -> dict[str, Tensor]:
        """Each score of the `size` samples in the batch, and their facts; (size,)."""
        labels = self.labels(batch, size)
        supervised = labels != IGNORE
        scores = {"tokens": supervised.sum(1), "label": labels[:, 0]}
        if not supervised.any() or not self.metrics - {"random"}:
            return {name: scores[name] for name in facts(self.task)}
        with torch.no_grad():
            h, z, logits = self.forward(batch, self.module)
            check_labels(labels[supervised], logits.shape[-1])
            if self.module is not None and self.head is None:
                assert h is not None and z is not None
                # One position of each sample, not a copy of all logits.
                rows = supervised.any(1).nonzero()[:, 0]
                at = (rows, supervised.int().argmax(1)[rows])
                parts = (part[at] for part in (h, z, logits))
                self.head = check_head(self.model, self.module, *parts)
            with torch.autocast(logits.device.type, enabled=False):
                scores |= self.losses(h, z, logits, labels, supervised)
            if "ifd" in self.metrics:
                scores["ifd"] = scores["loss"].cpu() / self.loss_alone(batch, supervised)
        if "grand_full" in self.metrics:
            scores["grand_full"] = self.full_gradients(batch, labels)
        return {name: scores[name] for name in (*self.metrics, *facts(self.task)) if name in scores}

    def labels(self, batch: Mapping[str, Any], size: int) -> Tensor:
        """(size, T), in line with the logits."""
        labels = check_batch(batch)["labels"]
        if not labels.ndim or len(labels) != size or is_packed(batch):
            raise BatchError(
                "the rows of the batch are not the samples: data that is packed (or flattened, padding_free) mixes "
                "samples in a row, or the collator drops or repeats some. Score and select before packing; for a "
                "flattening collator, batch_size=1."
            )
        if labels.is_floating_point() or labels.ndim != (1 if self.task == "SEQ_CLS" else 2):
            raise BatchError(f"labels of {self.task} must be integers, got {tuple(labels.shape)} of {labels.dtype}")
        labels = with_float64(labels)
        if self.task == "SEQ_CLS":
            return labels[:, None]
        return labels[:, 1:] if self.task == "CAUSAL_LM" else labels

    def forward(
        self, batch: Mapping[str, Any], module: nn.Module | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Input of the head (B, T, D), its output and the logits (B, T, V), in line with `labels`."""
        # An encoder-decoder makes the decoder's input from the labels.
        keep_labels = self.task == "SEQ_2_SEQ_LM" and "decoder_input_ids" not in batch
        inputs = {key: part for key, part in batch.items() if key != "labels" or keep_labels}
        if module is None:
            return None, None, self.align(self.model(**inputs).logits, batch)
        with calls_of(module) as calls:
            logits = self.model(**inputs).logits
        if len(calls) != 1:
            raise ValueError(f"the model called its head {len(calls)} times in a forward pass instead of once")
        h, z = calls[0]
        if self.task == "SEQ_CLS" and z.ndim == 3:  # decoders classify every position, and pick one
            at = (torch.arange(len(z), device=z.device), picked(z, logits, batch.get("attention_mask")))
            h, z = h[at], z[at]
        return self.align(h, batch), self.align(z, batch), self.align(logits, batch)

    def align(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(B, T, ...), in line with `labels`. Virtual tokens of prompt tuning come first, and are left out."""
        outputs = with_float64(outputs)
        if self.task == "SEQ_CLS":
            return outputs[:, None]
        outputs = outputs[:, -batch["labels"].shape[1] :]
        return outputs[:, :-1] if self.task == "CAUSAL_LM" else outputs

    def losses(
        self, h: Tensor | None, z: Tensor | None, logits: Tensor, labels: Tensor, supervised: Tensor
    ) -> dict[str, Tensor]:
        """What the forward pass alone gives: (B,) of each."""
        names = ("loss", "el2n", "don", "nod", "grand")
        nothing = labels.new_full(labels.shape[:1], math.nan, dtype=torch.float64)
        scores = {name: nothing.clone() for name in names}
        width = max(logits.shape[-1], 0 if h is None else h.shape[-1])
        for at, real in groups(supervised, width):
            rows = at[0][:, 0]
            x, y = logits[at], labels[at]
            if {"loss", "ifd"} & self.metrics:
                scores["loss"][rows] = mean(cross_entropy(x, y), real)
            if "el2n" in self.metrics:
                scores["el2n"][rows] = mean(residual(x, y).norm(dim=-1).double(), real)
            if self.head is not None and h is not None and z is not None:
                slope, bias = self.head.slope(x), self.head.bias
                settings: dict[str, Any] = {"slope": slope, "bias": bias, "reduction": self.reduction, "real": real}
                inner, square = head_statistics(h[at], z[at], y, logits=x, **settings)
                don, nod = don_nod(inner, square, self.head.square, self.eta)
                for name, part in (("don", don), ("nod", nod), ("grand", square.sqrt())):
                    scores[name][rows] = part
        return scores

    def loss_alone(self, batch: Mapping[str, Any], supervised: Tensor) -> Tensor:
        """Mean loss (B,) of each answer without its prompt; NaN where there is no prompt or nothing to predict."""
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(tokens))
        bos = getattr(base_of(self.model).config, "bos_token_id", None)
        first = tokens[torch.arange(len(tokens)), mask.argmax(1)]
        answers = []
        for row, answered in enumerate(supervised):
            start = first[row : row + 1] if bos is not None and first[row] == bos else tokens[row, :0]
            prompted = mask[row].sum() - 1 > answered.sum()
            answer = tokens[row, 1:][answered]
            answers.append(torch.cat([start, answer]) if prompted else answer[:0])
        pad = nn.utils.rnn.pad_sequence
        ids = pad(answers, batch_first=True)
        attended = pad([torch.ones_like(answer) for answer in answers], batch_first=True)
        alone = torch.full((len(ids),), math.nan, dtype=torch.float64)
        if ids.shape[1] < 2:
            return alone
        labels = ids.masked_fill(attended == 0, IGNORE)
        _, _, logits = self.forward({"input_ids": ids, "attention_mask": attended, "labels": labels}, None)
        labels = with_float64(labels)[:, 1:]
        for at, real in groups(labels != IGNORE, logits.shape[-1]):
            alone[at[0][:, 0].cpu()] = mean(cross_entropy(logits[at], labels[at]), real).cpu()
        return alone

    def full_gradients(self, batch: Mapping[str, Any], labels: Tensor) -> Tensor:
        """|gradient| (B,) of all parameters that train; rows go through the model one by one."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norms = torch.full((len(labels),), math.nan, dtype=torch.float64)
        for row, wanted in enumerate(labels):
            if (wanted == IGNORE).all():
                continue
            sample = {
                key: part[row : row + 1] if isinstance(part, Tensor) and len(part) == len(labels) else part
                for key, part in batch.items()
            }
            with torch.enable_grad():
                _, _, logits = self.forward(sample, None)
                loss = nn.functional.cross_entropy(logits[0].float(), wanted, ignore_index=IGNORE)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            square = sum(float(part.cpu().square().sum(dtype=torch.float64)) for part in gradients if part is not None)
            norms[row] = math.sqrt(square)
        return norms


def with_float64(tensor: Tensor) -> Tensor:
    """On a device that has float64: Apple's has not."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def groups(supervised: Tensor, width: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor | None]]:
    """The supervised positions of a (B, T) mask, some rows at a time: indices (rows (b, 1), positions (b, t)), and
    which of them count (b, t), or None for all. Rows with few positions repeat their first one; they stand beside rows
    with at most twice as many, and no more together than have `ENTRIES` logits of that `width`, or one sample has."""
    counts = supervised.sum(1)
    rows = counts.argsort(descending=True, stable=True)
    places = supervised.byte().argsort(dim=1, descending=True, stable=True)  # the supervised ones first
    sizes = counts[rows].tolist()
    start = 0
    while start < len(sizes) and (most := sizes[start]):
        stop = start + max(1, ENTRIES // (most * width))
        stop = next((i for i in range(start + 1, min(stop, len(sizes))) if 2 * sizes[i] < most), min(stop, len(sizes)))
        some = rows[start:stop, None]
        positions = places[some[:, 0], :most]
        real = torch.arange(most, device=some.device) < counts[some]
        equal = sizes[stop - 1] == most
        yield (some, positions if equal else positions.where(real, positions[:, :1])), None if equal else real
        start = stop


def mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean (b,) of the (b, t) values that count."""
    return values.mean(1) if real is None else values.where(real, 0.0).sum(1) / real.sum(1)


def picked(z: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The position (B,) of z (B, T, V) that a decoder's classifier took its logits (B, V) from: the last equal one, and
    not of padding. Virtual tokens come first, and have no mask."""
    equal = z.to(logits.dtype).isclose(logits[:, None], rtol=0, atol=0, equal_nan=True).all(-1)
    if mask is not None:
        equal[:, -mask.shape[1] :] &= mask.bool()
    if not equal.any(1).all():
        raise ValueError("cannot tell which position the classifier's logits come from: they equal none of the head's")
    return equal.shape[1] - 1 - equal.flip(1).to(torch.int8).argmax(1)


def check_labels(labels: Tensor, outputs: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        raise BatchError(f"label {low if low < 0 else high} is outside the model's {outputs} outputs")
