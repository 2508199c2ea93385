"""DP-SGD for a round of a client: a loss for every record, and Opacus attached to a model and gone without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ..losses import loss_type, shifts_labels
from ..utils import IGNORE, base_of
from .accounting import checked_history, quiet
from .privacy import DPSpec

LANGUAGE_MODELS = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")


class SampleLoss(nn.Module):
    """The loss of every record by itself, from a transformers model's logits and labels.

    A record's gradient may depend on that record alone, or clipping would not bound what the record does. The models'
    own losses are averages over all tokens of a batch; here each record is averaged over its own tokens first.
    Auxiliary losses of a model (a router's load balance, say) go over batches and are left out.

    Args:
        model: the model, adapted or not.

    Raises:
        ValueError: the model is not a classifier (of sequences or tokens) nor a language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reduction = "mean"  # Opacus' ghost mode asks for "none"
        base = base_of(model)
        self.config: Any = getattr(base, "config", None)
        self.head, self.shifted = loss_type(base) or "", shifts_labels(base)
        if not self.head.endswith("Classification") and self.head not in LANGUAGE_MODELS:
            raise ValueError(
                f"No per-record loss is known for {type(base).__name__}: with differential privacy the model must be "
                "transformers' classifier of sequences or tokens, or a language model."
            )

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses (batch,), or with `reduction` "mean" their mean, in fp32.

        Args:
            logits: (batch, labels), or (batch, tokens, labels).
            labels: (batch,), (batch, labels) for regression and several labels per record, or (batch, tokens); -100 is
                left out.
        """
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if self.head in (*LANGUAGE_MODELS, "ForTokenClassification"):
            if self.shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses = losses.sum(dim=1) / (labels != IGNORE).sum(dim=1).clamp(min=1)
        else:
            losses = self._sequence_losses(logits, labels)
        return losses if self.reduction == "none" else losses.mean()

    def _sequence_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kind = self.config.problem_type
        if kind == "regression" or (kind is None and logits.shape[-1] == 1):
            labels = labels.reshape(logits.shape).to(logits.dtype)
            return F.mse_loss(logits, labels, reduction="none").mean(dim=1)
        if kind == "multi_label_classification" or (kind is None and labels.is_floating_point()):
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=1)
        return F.cross_entropy(logits, labels.reshape(-1), reduction="none")


@dataclass
class PrivateSteps:
    """What DP-SGD needs during a round, made by `attached`."""

    layers: Mapping[str, nn.Module]  # by the names of the tensors they train
    optimizer: Any  # Opacus' DPOptimizer
    criterion: Any
    loss: SampleLoss  # the criterion, without what ghost mode wraps around it
    draws: Any  # Opacus' Poisson sampler: lists of indices, empty ones too
    accountant: Any

    def step(self, batches: Sequence[Callable[[], tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """One step of the optimizer, clipped, noised and counted.

        Args:
            batches: for each physical batch a function that returns its (logits, labels); none for an empty draw.

        Raises:
            ValueError: a layer took no part, or saw something else than one row per record.
        """
        if not batches:
            self._without_records()
        for number, forward in enumerate(batches, start=1):
            self.optimizer.signal_skip_step(number < len(batches))
            logits, labels = forward()
            self._check_records(len(labels))
            self.criterion(logits, labels).backward()
            self._drop_overflows()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _check_records(self, records: int) -> None:
        for name, layer in self.layers.items():
            inputs = getattr(layer, "activations", None)
            if not inputs:
                raise ValueError(f"`{name}` took no part in the forward pass: freeze what is not used.")
            seen = {len(tensors[0]) for tensors in inputs}
            if seen != {records}:  # tokens or windows would be clipped one by one, not their record
                raise ValueError(f"`{name}` saw {max(seen)} rows for {records} records: Opacus takes rows for records.")

    @torch.no_grad()
    def check_one(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Looks at a batch of one record, with labels, for what a larger one may hide.

        Raises:
            ValueError: a layer sees several rows of it (tokens, as many as there were records), or the model's own loss
                is not the criterion's, so that something else would be trained than without privacy.
        """
        seen: dict[str, int] = {}
        see = [
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: len(args[0])}))
            for name, layer in self.layers.items()
        ]
        try:
            outputs = model(**inputs)
        finally:
            for handle in see:
                handle.remove()
        for name, rows in seen.items():
            if rows != 1:
                raise ValueError(f"`{name}` saw {rows} rows for 1 record: Opacus takes rows for records.")
        own, labels = outputs.loss, inputs["labels"]
        if getattr(outputs, "aux_loss", None) is not None or own is None:
            return
        loss = self.loss(outputs.logits, labels)
        tolerance = 1e-3 if torch.finfo(outputs.logits.dtype).bits > 16 else 5e-2
        if torch.isfinite(own) and torch.isfinite(loss) and not torch.isclose(own.to(loss), loss, tolerance, tolerance):
            raise ValueError(
                f"The loss of {type(base_of(model)).__name__} is {own:.4g} for a record, and the cross-entropy of its "
                f"logits {loss:.4g}: no loss per record is known for it, which differential privacy needs."
            )

    def _drop_overflows(self) -> None:
        """Of a gradient that is not finite no share is left by clipping, but NaN, which tells of the record."""
        for name, parameter in zip(self.layers, self.optimizer.params, strict=True):
            samples = getattr(parameter, "grad_sample", None)
            if samples is not None:
                samples.nan_to_num_(0.0, 0.0, 0.0)
            elif parameter.grad is None:
                raise ValueError(f"`{name}` has no part in the loss: freeze what is not used.")
            elif not torch.isfinite(parameter.grad).all():
                raise ValueError('A gradient is not finite. Lower the learning rate, or use mode="hooks".')

    def _without_records(self) -> None:
        for parameter in self.optimizer.params:
            parameter.grad = torch.zeros_like(parameter)  # what ghost mode sums up
            parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # and hooks mode
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def history(self) -> list[list[float]]:
        """The accountant's, JSON-able."""
        return [list(entry) for entry in self.accountant.history]


@contextlib.contextmanager
def attached(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    spec: DPSpec,
    noise_multiplier: float,
    samples: int,
    batch_size: int,
    steps: int,
    seeds: tuple[int, int],
    history: Sequence[Sequence[float]] | None = None,
) -> Iterator[PrivateSteps]:
    """Opacus attached to a model in training mode, and gone without a trace afterwards, whatever happens.

    Args:
        model: passed by `check_private`.
        optimizer: over the trainable tensors.
        noise_multiplier: of this round.
        samples: size of the dataset.
        batch_size: expected size of a draw, at most.
        steps: draws to be made.
        seeds: of the draws and of the noise; secret.
        history: the accountant's state from before.
    """
    from opacus import PrivacyEngine

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draws = torch.Generator().manual_seed(seeds[0])
    noise = torch.Generator(next(iter(trained.values())).device).manual_seed(seeds[1])
    records = DataLoader(TensorDataset(torch.arange(samples)), batch_size=batch_size, generator=draws)
    loss = SampleLoss(model)
    with _without_trace(model), quiet():
        engine = PrivacyEngine(accountant=spec.accountant)
        engine.accountant.history = list(checked_history(history))
        hooks, dp_optimizer, *rest = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=loss,
            data_loader=records,
            noise_multiplier=noise_multiplier,
            max_grad_norm=spec.max_grad_norm,
            noise_generator=noise,
            grad_sample_mode=spec.mode,
            wrap_model=False,
        )
        try:
            *ghost_criterion, poisson = rest
            # Opacus rounds n q down, and 1 / 49 * 49 to 0
            dp_optimizer.expected_batch_size = samples / len(records)
            poisson.batch_sampler.steps = steps
            (criterion,) = ghost_criterion or (loss,)
            layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in trained}
            yield PrivateSteps(layers, dp_optimizer, criterion, loss, poisson.batch_sampler, engine.accountant)
        finally:
            hooks.cleanup()


@contextlib.contextmanager
def _without_trace(model: nn.Module) -> Iterator[None]:
    """Removes what Opacus leaves on the model and on its trainable tensors and their modules, also after an error."""
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    trained = [p for m in owners for p in m.parameters(recurse=False) if p.requires_grad]
    before: list[tuple[Any, set]] = [(thing, set(vars(thing))) for thing in (model, *owners, *trained)]
    full = {module: module._is_full_backward_hook for module in owners}
    try:
        yield
    finally:
        for handle in vars(model).get("autograd_grad_sample_hooks", ()):
            handle.remove()
        for thing, attributes in before:
            for name in vars(thing).keys() - attributes:
                delattr(thing, name)
        for module in owners:  # else a plain backward hook would be refused ever after
            module._is_full_backward_hook = full[module]
        for parameter in trained:
            parameter.grad = None
