"""Sums over the squared gradients of weights that may be frozen, from what goes in and out of their layers.

The gradient of sample n by the weight of y = W x is G_n = sum_t g_nt x_nt^T, for g = dL/dy. Both are there in every
backward pass, whether or not W trains, so the row sums of G_n^2 need neither `.grad` nor a pass of their own.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..losses import shifts_labels
from ..utils import IGNORE, is_packed
from .statistics import ESTIMATORS, LayerStatistics, Statistics, base_layer, base_model, describe, shape_of, signature
from .sums import BLOCK, FISHER, add_squares, exact_zeros, square_sums, widest

logger = logging.get_logger(__name__)

WHAT = {"fisher": FISHER, "abs": ("abs_mean",), "gram": ("gram",)}


@dataclass(eq=False)
class Batch:
    """A forward pass, and what its backward pass has given so far."""

    rows: int
    lengths: set[int]  # of the sequences in it, padded
    packed: bool
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
        if mask is None or mask.ndim != 2:
            mask = None if "input_ids" not in tensors else torch.ones_like(first)
        if target is None and labels is not None and labels.ndim == 2 and not labels.is_floating_point():
            target = labels != IGNORE
        return cls(
            rows=len(first),
            lengths={part.shape[1] for part in tensors.values() if part.ndim > 1},
            packed=is_packed(inputs),
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
    def samples(self) -> int:
        """Rows with at least one label."""
        chosen = self.supervised
        return self.rows if chosen is None else int(chosen.reshape(len(chosen), -1).any(1).sum())

    @property
    def tokens(self) -> int:
        mask = self.masks["encoder"]
        return self.rows if mask is None else int(mask.sum())

    def split(self, part: Tensor, name: str) -> Tensor:
        """(B, T, features) of one sample a row, from an activation however it is shaped."""
        if self.rows == 1 or (part.ndim >= 3 and len(part) == self.rows):
            return part.reshape(self.rows, -1, part.shape[-1])
        if part.ndim == 2 and len(part) in {self.rows * length for length in (1, *self.lengths)}:
            return part.reshape(self.rows, -1, part.shape[-1])
        raise ValueError(
            f"{name} takes activations {tuple(part.shape)} in a batch of {self.rows} samples, and nothing tells which "
            "belong to which: use estimator='per_batch', or batches of 1, or leave it out with exclude_modules"
        )


class _Keep(torch.autograd.Function):
    """Saves a tensor as autograd saves its own: gradient checkpointing drops it and makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return switch.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


class Collector:
    """Collects while the model does its usual forward and backward passes; values and gradients stay what they were.

        with Collector(model, target_layers(model)) as collector:
            for batch in loader:
                model(**batch).loss.backward()
        statistics = collector.statistics()

    Scales are undone: a mean over tokens or samples, gradient accumulation, loss scaling of fp16, DDP. For that the
    loss must be the model's own, `outputs.loss`, and inputs must be passed by name. With `"fisher"` a forward pass
    without gradients does not count. Gradient checkpointing of both kinds, autocast and layers that a forward pass
    calls several times are exact.

    Args:
        model: plain, not wrapped by DDP; the one that is called.
        layers: of `target_layers`.
        what: of `"fisher"` (both sides; `"fisher_in"` or `"fisher_out"` for one), `"abs"` and `"gram"`.
        estimator: `"per_sample"` squares the gradient of each sample, which is the definition; `"per_batch"` that of
            the whole batch, whose expectation is the same where the mean gradient is 0.
        directions: estimate each sum of squares from that many random combinations of the other side (Rademacher
            signs, new ones in every batch): unbiased, with relative variance of at most 2 / directions a batch.
            Default: exact.
        seed: of the directions.
        strict: whether gradients that are not finite raise an error; else their batch does not count.

    Raises:
        ValueError: for unknown settings.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        what: Sequence[str] = ("fisher",),
        estimator: str = "per_sample",
        directions: int | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        self.fields = check_settings(what, estimator, directions)
        self.model, self.layers, self.estimator = model, dict(layers), estimator
        self.directions, self.strict = directions, strict
        self.sides = tuple(side for side in FISHER if side in self.fields)
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.samples = self.tokens = self.dropped = 0
        self.positions: Counter[str] = Counter()  # that a layer has seen, for the means over tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._open: list[Batch] = []  # went forward, and perhaps backward
        self._current: Batch | None = None
        self._forwarding = False
        self._last: tuple[Tensor, int, str, int, dict[str, Tensor]] | None = None  # an input, and the sums over it
        base = base_model(model)
        config = getattr(base, "config", None)
        paired = getattr(config, "is_encoder_decoder", False)
        self._shifts = shifts_labels(model)
        self._decoder = base.get_decoder() if paired and hasattr(base, "get_decoder") else None
        inside = set(self._decoder.modules()) if self._decoder is not None else set()
        self._decoding = {name for name, layer in self.layers.items() if layer in inside}
        self._honours: bool | None = None  # whether the model divides its loss by `num_items_in_batch`

    # Hooks

    def attach(self) -> "Collector":
        """Puts the hooks on. Nothing happens if they are."""
        if self._handles:
            return self
        by_name = {"with_kwargs": True}
        self._handles = [
            self.model.register_forward_pre_hook(self._before, **by_name),
            self.model.register_forward_hook(self._after, **by_name),
        ]
        if self._decoder is not None:
            self._handles.append(self._decoder.register_forward_pre_hook(self._encoded, **by_name))
        for name, layer in self.layers.items():
            weight: Any = getattr(layer, "weight", None)
            # A weight that trains gets the gradient of the batch anyway.
            if self.sides and self.estimator == "per_batch" and layer is base_layer(layer) and weight.requires_grad:
                self._handles.append(weight.register_hook(partial(self._weight_gradient, name)))
                tapped = False
            else:
                tapped = bool(self.sides)
            if tapped and not any(parameter.requires_grad for parameter in layer.parameters()):
                self._handles.append(layer.register_forward_pre_hook(self._require_gradient, **by_name))
            self._handles.append(layer.register_forward_hook(partial(self._forward, name, tapped), **by_name))
        return self

    def detach(self) -> None:
        """Takes the hooks off; what went backward is counted."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        try:
            self.flush()
        finally:
            self._open, self._current, self._forwarding, self._last = [], None, False, None

    def close(self) -> None:
        """Takes the hooks off; what was not counted yet is dropped."""
        self._open = []
        self.detach()

    def __enter__(self) -> "Collector":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach() if kind is None else self.close()

    def _before(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        self.flush()
        counts = torch.is_grad_enabled() or not self.sides
        self._current = Batch.of(inputs, self._shifts) if counts else None
        self._forwarding = counts
        if counts and self._current.packed and self.estimator == "per_sample" and self.sides:  # type: ignore[union-attr]
            raise ValueError(
                "the rows of the batch are not the samples (packing, or padding_free): use estimator='per_batch'"
            )

    def _after(self, model: nn.Module, args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
        self._forwarding, self._last, batch = False, None, self._current
        if batch is None:
            return
        self._open.append(batch)
        if not self.sides:
            return
        loss = getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, tuple) and batch.labels is not None:
            loss = outputs[0]
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{describe(self.model)} gives no loss, whose gradient 'fisher' is about: put labels into the batch, "
                "and let the model compute the loss (no label smoothing, no compute_loss_func)"
            )
        if not loss.requires_grad:
            raise ValueError("the loss depends on none of the layers that are collected on")
        batch.divisor = self._divisor(batch, outputs, loss)
        loss.register_hook(partial(self._backward, batch))

    def _encoded(self, decoder: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if self._forwarding and self._current is not None:
            self._current.encoded = inputs.get("encoder_hidden_states")

    def _require_gradient(self, layer: nn.Module, args: tuple, inputs: dict[str, Any]) -> Any:
        """A frozen layer below everything that trains gets a gradient too."""
        if self._current is None or not torch.is_grad_enabled():
            return None
        x = input_of(args, inputs)
        if x.requires_grad:
            return None
        x = x.detach().requires_grad_()
        return ((x, *args[1:]), inputs) if args else (args, {**inputs, next(iter(inputs)): x})

    def _forward(
        self, name: str, tapped: bool, layer: nn.Module, args: tuple, inputs: dict[str, Any], out: Tensor
    ) -> None:
        batch = self._current
        if batch is None:
            return
        x = input_of(args, inputs).detach()
        if self._forwarding:  # not when checkpointing does it again
            batch.calls[name] += 1
            if "abs_mean" in self.fields or "gram" in self.fields:
                self._activations(name, x, batch)
        if tapped and out.requires_grad:
            # The reason for `_Keep`: a closure would hold x against checkpointing's will.
            kept = [_Keep.apply(x, torch.zeros((), device=x.device, requires_grad=True))]
            out.register_hook(partial(self._gradient, name, batch, kept))

    # Backward

    @torch.no_grad()
    def _backward(self, batch: Batch, gradient: Tensor) -> None:
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        batch.scale, self._current = batch.divisor / gradient, batch

    @torch.no_grad()
    def _gradient(self, name: str, batch: Batch, kept: list[Tensor], g: Tensor) -> None:
        if not kept:
            return  # the graph was kept, and goes backward again
        x = kept.pop().grad_fn.saved_tensors[0]  # type: ignore[union-attr]
        if batch.calls[name] == 1:
            self._square(name, batch, [(x, g)])
        else:
            parts = batch.parts.setdefault(name, [])
            parts.append((x, g))
            if len(parts) == batch.calls[name]:
                self._square(name, batch, batch.parts.pop(name))

    @torch.no_grad()
    def _weight_gradient(self, name: str, gradient: Tensor) -> None:
        batch = self._current
        if batch is None:
            return
        if batch.calls[name] == 1:
            self._square_weight(name, batch, [gradient])
        else:  # re-entrant checkpointing gives the calls one by one
            batch.parts[name] = [sum(batch.parts.get(name, ())) + gradient]

    def _square(self, name: str, batch: Batch, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Squares what the calls of a layer add up to: gradients of one sample are summed before."""
        with torch.autocast(parts[0][0].device.type, enabled=False):
            rows = []
            for part in parts:
                exact = torch.promote_types(torch.promote_types(part[0].dtype, part[1].dtype), torch.float32)
                some = (tensor.to(exact) for tensor in part)
                if self.estimator == "per_sample":
                    rows.append([batch.split(tensor, name) for tensor in some])
                else:
                    rows.append([tensor.reshape(1, -1, tensor.shape[-1]) for tensor in some])
            x, g = (torch.cat(side, 1) if len(rows) > 1 else side[0] for side in zip(*rows, strict=True))
            if self.directions is None:
                sums = square_sums(x, g, self.sides)
            else:
                sums = {}
                for side, (here, other) in {"fisher_in": (x, g), "fisher_out": (g, x)}.items():
                    if side in self.sides:
                        mixed = other @ self._signs(batch, other)
                        sums |= {side: square_sums(here, mixed, ["fisher_in"], block=2**20)["fisher_in"]}
        self._store(name, batch, sums)

    def _square_weight(self, name: str, batch: Batch, parts: Sequence[Tensor]) -> None:
        (gradient,) = parts
        rows = gradient.T if isinstance(base_layer(self.layers[name]), Conv1D) else gradient
        sums = {"fisher_in": exact_zeros(rows.shape[1], rows.device), "fisher_out": exact_zeros(len(rows), rows.device)}
        step = max(1, BLOCK.get(rows.device.type, BLOCK["cuda"]) // rows.shape[1])
        exact = torch.promote_types(rows.dtype, torch.float32)
        for start in range(0, len(rows), step):
            add_squares(sums, rows[start : start + step].to(exact, copy=True), start, self.sides)
        self._store(name, batch, sums)

    def _store(self, name: str, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        if batch.scale is None:
            raise ValueError(
                "a gradient arrived that does not come from the model's own loss, outputs.loss, so its scale is "
                "unknown: let the model compute the loss, or collect in a pass of its own (when='calibration')"
            )
        for side in self.sides:
            found = sums[side] * batch.scale.to(sums[side]).square()
            before = batch.sums.get((name, side))
            batch.sums[name, side] = found if before is None else before + found

    def _signs(self, batch: Batch, like: Tensor) -> Tensor:
        """(features, directions), +-1 / sqrt(directions)."""
        assert self.directions is not None
        size = like.shape[-1]
        if size not in batch.directions:
            signs = torch.randint(0, 2, (size, self.directions), generator=self._generator, dtype=torch.int8)
            batch.directions[size] = (signs.to(like) * 2 - 1) / math.sqrt(self.directions)
        return batch.directions[size]

    # Scales

    def _divisor(self, batch: Batch, outputs: Any, loss: Tensor) -> Any:
        """What the model has divided the sum of its samples' losses by."""
        chosen = batch.supervised
        mean = batch.rows if chosen is None else chosen.sum()
        if batch.items is None or chosen is None:
            return mean
        if self._honours is None:
            if int(mean) == int(batch.items):
                return mean
            self._honours = divides_by(batch.items, mean, total_loss(batch, outputs), loss)
        return batch.items if self._honours else mean

    # Activations

    @torch.no_grad()
    def _activations(self, name: str, x: Tensor, batch: Batch) -> None:
        crossed = batch.encoded is not None and x.data_ptr() == batch.encoded.data_ptr()
        side = "decoder" if name in self._decoding and not crossed else "encoder"
        if not self._is_last(x, side):
            rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
            mask = batch.masks[side]
            if mask is not None and mask.numel() == len(rows) and not mask.all():
                rows = rows[mask.reshape(-1)]
            sums = {}
            if "abs_mean" in self.fields:
                sums["abs_mean"] = rows.abs().sum(0, dtype=widest(x.device))
            if "gram" in self.fields:
                with torch.autocast(x.device.type, enabled=False):
                    sums["gram"] = rows.T @ rows
            self._last = (x, x._version, side, len(rows), sums)
        assert self._last is not None
        self.positions[name] += self._last[3]
        for part, found in self._last[4].items():
            self._add((name, part), found)

    def _is_last(self, x: Tensor, side: str) -> bool:
        """Layers that stand side by side, as query, key and value do, share the sums over what they are given."""
        if self._last is None:
            return False
        last, version, where, *_ = self._last
        same = last.data_ptr() == x.data_ptr() and last.shape == x.shape and last.stride() == x.stride()
        return same and last.dtype == x.dtype and version == x._version and where == side

    def _add(self, key: tuple[str, str], found: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += found.to(self.sums[key])
        else:
            self.sums[key] = found.clone()

    # Results

    def flush(self) -> None:
        """Counts the batches that went backward since.

        Raises:
            ValueError: `strict`, and a gradient is not finite.
        """
        waiting: list[Batch] = []
        batches, self._open = self._open, waiting
        for batch in batches:
            if self.sides and batch.scale is None:
                waiting.append(batch)
                continue
            with torch.no_grad():
                for name, parts in batch.parts.items():  # of calls whose outputs were not all used
                    (self._square if isinstance(parts[0], tuple) else self._square_weight)(name, batch, parts)
            batch.parts.clear()
            self._count(batch)

    def _count(self, batch: Batch) -> None:
        samples = batch.samples if self.sides else batch.rows
        if not samples:
            return
        device = next((part.device for part in batch.sums.values()), None)  # layers may be on several
        if batch.sums and not torch.stack([part.sum().to(device) for part in batch.sums.values()]).sum().isfinite():
            if self.strict:
                name = next(name for (name, _), part in batch.sums.items() if not part.isfinite().all())
                raise ValueError(
                    f"the gradients of {name} are not finite: look for NaN in the weights and the data, or collect in "
                    "a dtype with a wider range than the model's"
                )
            self.dropped += 1
            return
        for key, part in batch.sums.items():
            self._add(key, part)
        self.samples += samples
        self.tokens += batch.tokens

    def reduce(self, total: Any, device: torch.device | str = "cpu") -> None:
        """Adds up over processes: every one of them calls it, with `total` the sum of a tensor over them."""
        names, keys = list(self.layers), [(name, part) for name in self.layers for part in self.fields]
        counts = [self.samples, self.tokens, self.dropped, *(self.positions[name] for name in names)]
        found = total(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()
        self.samples, self.tokens, self.dropped = found[:3]
        self.positions = Counter(dict(zip(names, found[3:], strict=True)))
        mine = [self.sums.get(key) for key in keys]
        kinds = [[part is not None, part is not None and part.dtype == torch.float64] for part in mine]
        for key, part, (there, wide) in zip(
            keys, mine, total(torch.tensor(kinds, dtype=torch.int64, device=device)).tolist(), strict=True
        ):
            if there:
                part = torch.zeros(self._size(*key)) if part is None else part
                self.sums[key] = total(part.to(device, torch.float64 if wide else torch.float32))

    def _size(self, name: str, part: str) -> tuple[int, ...]:
        out, into = shape_of(self.layers[name])
        return {"fisher_out": (out,), "gram": (into, into)}.get(part, (into,))

    def statistics(self) -> Statistics:
        """What was collected, without layers that took no part, of which a warning tells.

        Raises:
            ValueError: there were no samples, no layer took part, or sums are not finite.
        """
        if not self.samples:
            lost = f" ({self.dropped} batches had gradients that are not finite)" if self.dropped else ""
            raise ValueError(f"no sample with a label was collected{lost}")
        used = {
            name: layer for name, layer in self.layers.items() if all((name, part) in self.sums for part in self.fields)
        }
        if unused := [name for name in self.layers if name not in used]:
            said = f"{len(unused)} of {len(self.layers)} layers took part in no forward or backward pass"
            if not used:
                raise ValueError(f"{said}: is it this model that is called?")
            logger.warning(f"{said}, so there are no statistics of them: {', '.join(unused)}")
        layers = {}
        for name, layer in used.items():
            found: dict[str, Any] = dict.fromkeys((*FISHER, "abs_mean", "gram"))
            for part in self.fields:
                count = self.samples if part in FISHER else self.positions[name]
                mean = (self.sums[name, part] / count).cpu()
                if not mean.isfinite().all():
                    raise ValueError(f"{part} of {name} is not finite: look for NaN and infinity in the activations")
                found[part] = (mean + mean.T) / 2 if part == "gram" else mean.double()
            layers[name] = LayerStatistics(**found, shape=shape_of(layer), signature=signature(layer))
        return Statistics(
            layers, samples=self.samples, tokens=self.tokens, estimator=self.estimator, model=describe(self.model)
        )


def check_settings(what: Iterable[str], estimator: str, directions: int | None = None) -> tuple[str, ...]:
    """The fields of `LayerStatistics` that `what` asks for.

    Raises:
        ValueError: unknown, or nothing.
    """
    asked = [what] if isinstance(what, str) else list(what)
    known = WHAT | {side: (side,) for side in FISHER}
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"what={unknown[0]!r} cannot be collected: one of {', '.join(known)}")
    if not asked:
        raise ValueError(f"what= says what to collect: some of {', '.join(known)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if directions is not None and directions < 1:
        raise ValueError(f"directions must be a positive number or None, got {directions!r}")
    return tuple(dict.fromkeys(part for name in asked for part in known[name]))


def input_of(args: tuple, inputs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(inputs.values()))


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
