"""Sums over the squared gradients of weights that may be frozen, from what goes in and out of their layers.

The gradient of sample n by the weight of y = W x is G_n = sum_t g_nt x_nt^T, for g = dL/dy. Both are there in every
backward pass, whether or not W trains, so the row sums of G_n^2 need neither `.grad` nor a pass of their own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.sites.experts import Routing
from ..losses import shifts_labels
from ..utils import base_of, innermost
from .activations import Activations
from .batch import Batch, Keep, check_packed, divisor_of, scale_of
from .layers import describe
from .routed import Observed, squares_by_expert
from .settings import check_settings
from .stacks import Layer, Stack, called
from .statistics import Statistics
from .sums import FISHER, square_sums, weight_squares
from .totals import Totals


class Collector:
    """Collects while the model does its usual forward and backward passes; values and gradients stay what they were.

        with Collector(model, target_layers(model)) as collector:
            for batch in loader:
                model(**batch).loss.backward()
        statistics = collector.statistics()

    Scales are undone: a mean over tokens or samples, gradient accumulation, loss scaling of fp16, DDP. For that the
    loss must be the model's own, `outputs.loss`, and inputs must be passed by name. With `"fisher"` a forward pass
    without gradients does not count. Gradient checkpointing of both kinds, autocast and layers that a forward pass
    calls several times are exact. Of a stack of experts each expert is a layer, of the tokens that are routed to it;
    while the hooks are on, its products are grouped as transformers' `grouped_mm` does (see `Observed`).

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
        layers: Mapping[str, Layer],
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
        self._looks = not {"abs_mean", "gram"}.isdisjoint(self.fields)
        self.totals = Totals(self.layers, self.fields)
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._open: list[Batch] = []  # went forward, and perhaps backward
        self._current: Batch | None = None
        self._forwarding = False
        base = base_of(model)
        config = getattr(base, "config", None)
        paired = getattr(config, "is_encoder_decoder", False)
        self._shifts = shifts_labels(model)
        self._decoder = base.get_decoder() if paired and hasattr(base, "get_decoder") else None
        inside = set(self._decoder.modules()) if self._decoder is not None else set()
        decoding = {name for name, layer in self.layers.items() if called(layer) in inside}
        self._activations = Activations(self.totals, decoding)
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
            module = called(layer)
            weight: Any = layer.parameter if isinstance(layer, Stack) else getattr(layer, "weight", None)
            # A weight that trains gets the gradient of the batch anyway.
            if self.sides and self.estimator == "per_batch" and module is innermost(module) and weight.requires_grad:
                self._handles.append(weight.register_hook(partial(self._weight_gradient, name)))
                tapped = False
            else:
                tapped = bool(self.sides)
            if tapped and not any(parameter.requires_grad for parameter in module.parameters()):
                self._handles.append(module.register_forward_pre_hook(self._require_gradient, **by_name))
            if not isinstance(layer, Stack):
                self._handles.append(module.register_forward_hook(partial(self._forward, name, tapped), **by_name))
            elif tapped or self._looks:
                self._handles.append(Observed(layer.base, partial(self._routed, name, layer.name, tapped)))
            else:
                self._handles.append(module.register_forward_hook(partial(self._count_call, name)))
        return self

    def detach(self) -> None:
        """Takes the hooks off; what went backward is counted."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        try:
            self.flush()
        finally:
            self._open, self._current, self._forwarding = [], None, False
            self._activations.drop()

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
        batch = self._current
        if batch and batch.segments is not None and self.estimator == "per_sample" and self.sides:
            check_packed(self.model, inputs)

    def _after(self, model: nn.Module, args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
        self._forwarding, batch = False, self._current
        self._activations.settle()
        if batch is None:
            return
        self._open.append(batch)
        if not self.sides:
            return
        fused = getattr(outputs, "log_probs", None)
        if isinstance(fused, Tensor) and fused.requires_grad:  # what TRL makes the loss of
            fused.register_hook(partial(self._fused, batch, getattr(outputs, "label_mask", None)))
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
        batch.divisor, self._honours = divisor_of(batch, outputs, loss, self._honours)
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
            if self._looks:
                self._activations.add(name, x, batch)
        if tapped and out.requires_grad:
            self._tap(name, batch, x, out)

    def _count_call(self, name: str, *_: Any) -> None:
        if self._current is not None and self._forwarding:
            self._current.calls[name] += 1

    def _routed(
        self, name: str, key: str, tapped: bool, which: str, x: Tensor, out: Tensor, routing: Routing, tokens: Tensor
    ) -> None:
        """Sees what each stack of some experts is given and gives, of which the stack `key` counts here."""
        batch = self._current
        if batch is None or which != key:
            return
        x = x.detach()
        if self._forwarding:
            batch.calls[name] += 1
            if self._looks:
                self._activations.add_routed(name, x, routing, tokens, batch)
        if tapped and out.requires_grad:
            apart = self.estimator == "per_sample"
            samples = batch.samples_of(tokens, name) if apart else torch.zeros_like(tokens)
            self._tap(name, batch, x, out, routing.experts, samples)

    def _tap(self, name: str, batch: Batch, x: Tensor, out: Tensor, *where: Tensor) -> None:
        # The reason for `Keep`: a closure would hold x against checkpointing's will.
        kept = [Keep.apply(x, torch.zeros((), device=x.device, requires_grad=True))]
        out.register_hook(partial(self._gradient, name, batch, kept, where))

    # Backward

    @torch.no_grad()
    def _backward(self, batch: Batch, gradient: Tensor) -> None:
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        batch.scale, self._current = batch.divisor / gradient, batch

    @torch.no_grad()
    def _fused(self, batch: Batch, mask: Tensor | None, gradient: Tensor) -> None:
        batch.scale, self._current = scale_of(gradient, mask), batch

    @torch.no_grad()
    def _gradient(self, name: str, batch: Batch, kept: list[Tensor], where: tuple[Tensor, ...], g: Tensor) -> None:
        if not kept:
            return  # the graph was kept, and goes backward again
        x = kept.pop().grad_fn.saved_tensors[0]  # type: ignore[union-attr]
        if batch.calls[name] == 1:
            self._square(name, batch, [(x, g, *where)])
        else:
            parts = batch.parts.setdefault(name, [])
            parts.append((x, g, *where))
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

    def _square(self, name: str, batch: Batch, parts: Sequence[tuple[Tensor, ...]]) -> None:
        """Squares what the calls of a layer add up to: gradients of one sample are summed before."""
        with torch.autocast(parts[0][0].device.type, enabled=False):
            if isinstance(stack := self.layers[name], Stack):
                self._store(name, batch, self._squares_of_experts(stack, batch, parts))
                return
            sides = []
            for part in parts:
                exact = torch.promote_types(torch.promote_types(part[0].dtype, part[1].dtype), torch.float32)
                some = (tensor.to(exact) for tensor in part)
                if self.estimator == "per_sample":
                    sides.append([batch.split(tensor, name) for tensor in some])
                else:
                    sides.append([[tensor.reshape(1, -1, tensor.shape[-1])] for tensor in some])
            sums: dict[str, Tensor] = {}
            for pairs in zip(*(zip(x, g, strict=True) for x, g in sides), strict=True):  # of the calls, for each piece
                x, g = (torch.cat(side, 1) if len(side) > 1 else side[0] for side in zip(*pairs, strict=True))
                for side, found in self._squares(batch, x, g).items():
                    sums[side] = sums[side] + found if side in sums else found
        self._store(name, batch, sums)

    def _squares_of_experts(self, stack: Stack, batch: Batch, parts: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        x, g, experts, samples = (torch.cat(side) if len(parts) > 1 else side[0] for side in zip(*parts, strict=True))
        exact = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
        x, g, where = x.to(exact), g.to(exact), (experts, samples, stack.experts)
        if self.directions is None:
            return squares_by_expert(x, g, *where, self.sides)
        return {
            side: squares_by_expert(here, mixed, *where, ("fisher_in",), 2**20)["fisher_in"]
            for side, here, mixed in self._mixed(batch, x, g)
        }

    def _squares(self, batch: Batch, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        if self.directions is None:
            return square_sums(x, g, self.sides)
        return {
            side: square_sums(here, mixed, ("fisher_in",), block=2**20)["fisher_in"]
            for side, here, mixed in self._mixed(batch, x, g)
        }

    def _mixed(self, batch: Batch, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each side, and random combinations of the other one."""
        for side, (here, other) in {"fisher_in": (x, g), "fisher_out": (g, x)}.items():
            if side in self.sides:
                yield side, here, other @ self._signs(batch, other)

    def _square_weight(self, name: str, batch: Batch, parts: Sequence[Tensor]) -> None:
        (gradient,) = parts
        layer = self.layers[name]
        if isinstance(layer, Stack):
            found = [weight_squares(one, self.sides) for one in layer.laid_out(gradient)]
            sums = {side: torch.stack([one[side] for one in found]) for side in self.sides}
        else:
            sums = weight_squares(gradient.T if isinstance(innermost(layer), Conv1D) else gradient, self.sides)
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
        samples = batch.samples if self.sides else batch.sequences
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
            self.totals.dropped += 1
            return
        for (name, side), part in batch.sums.items():
            self.totals.add((name,), side, part)
        self.totals.samples += samples
        self.totals.tokens += batch.tokens

    def statistics(self) -> Statistics:
        """See `Totals.statistics`."""
        return self.totals.statistics(self.model, self.estimator)


def input_of(args: tuple, inputs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(inputs.values()))
