"""A client's round: a few optimizer steps on the tensors that train, with or without differential privacy."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import default_data_collator, get_scheduler

from ..losses import supervised
from ..utils import base_of
from .accounting import BudgetExceeded, checked_history, epsilon_spent
from .accounting import sample_rate as poisson_rate
from .checks import check_count, check_factor, check_number
from .dpsgd import attached
from .privacy import DPSpec, check_private

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in a round; the defaults are the reference's for RoBERTa (arXiv 2505.12805).

    The optimizer and the schedule start anew every round: they would speak of factors that the server has since
    re-expressed.

    Args:
        steps: optimizer steps a round (10).
        batch_size: records a step (128); with differential privacy the expected number, at most.
        learning_rate: 0.5, for "sgd"; "adamw" wants far less.
        optimizer: "sgd" (plain, no momentum) or "adamw".
        weight_decay: 0.
        max_grad_norm: Euclidean norm to which the gradient of a step is clipped (1.0; None: not at all). Without
            differential privacy only: with it, `DPSpec.max_grad_norm` clips every record's.
        max_physical_batch: records in one forward pass (64; None: all); more are accumulated, exactly.
        lr_scheduler_type: a name that `transformers.get_scheduler` knows ("constant"), over the steps of one round.
        seed: of the order of the records and of dropout; round and node are mixed in. With differential privacy it
            counts only where `DPSpec.noise_seed` is given. PyTorch's, NumPy's and Python's global generators are put
            back as they were.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 10
    batch_size: int = 128
    learning_rate: float = 0.5
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    max_physical_batch: int | None = 64
    lr_scheduler_type: str = "constant"
    seed: int = 42

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size)
        if self.max_physical_batch is not None:
            check_count("max_physical_batch", self.max_physical_batch)
        check_count("seed", self.seed, 0)
        check_number("learning_rate", self.learning_rate)
        check_factor("max_grad_norm", self.max_grad_norm)
        check_number("weight_decay", self.weight_decay, zero=True)
        if not isinstance(self.lr_scheduler_type, str):
            raise ValueError(f"lr_scheduler_type must be a name, not {self.lr_scheduler_type!r}.")
        if self.optimizer not in tuple(OPTIMIZERS):
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}.")


@dataclass
class LocalResult:
    """What a round gave, besides the trained tensors, which are in the model.

    Args:
        samples: weight of the client in the server's average: records in the dataset; with differential privacy 1.
        loss: mean loss of the round's steps; None with differential privacy, since it carries no noise.
        steps: optimizer steps taken.
        epsilon: spent over all rounds, by the accountant of the spec; None without differential privacy.
        history: [[noise multiplier, sample rate, steps], ...] of all rounds, the accountant's state: keep it with the
            client (JSON can hold it) and pass it to the next round. Empty without differential privacy.
    """

    samples: int
    loss: float | None
    steps: int
    epsilon: float | None = None
    history: list[list[float]] = field(default_factory=list)


def train_local(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list], Mapping[str, Any]] | None,
    settings: LocalSettings,
    *,
    privacy: DPSpec | None = None,
    history: Sequence[Sequence[float]] | None = None,
    total_steps: int | None = None,
    round: int = 0,
    node: int = 0,
    device: torch.device | str | None = None,
) -> LocalResult:
    """Trains, in place, the tensors of `model` that require gradients, for `settings.steps` optimizer steps.

    Without differential privacy records are shuffled and the loss is the model's own. With it, steps are DP-SGD's (see
    `DPSpec`) and the loss is `SampleLoss`. Either way the model keeps its modes, hooks and attributes, no file is
    written and, after an error, every trainable tensor is what it was.

    Args:
        model: a `PeftModel` (or any transformers model) whose trainable tensors are those to be trained.
        dataset: rows by index, with a length; one row is one record.
        collator: makes a batch with "labels" of a list of rows. Default (None): `transformers.default_data_collator`.
        settings: steps, batches, optimizer.
        privacy: differential privacy; default: none.
        history: accountant's state of the rounds before, from `LocalResult.history`.
        total_steps: steps planned over all rounds this client takes part in, for which the noise is solved where
            `privacy.epsilon` is set; default: those of this round.
        round: number of the round, and
        node: number of the client: both are mixed into the seeds.
        device: where to train; the model is moved there. Default: where its trainable tensors are.

    Raises:
        BudgetExceeded: the round would spend more than `privacy.epsilon`; nothing was trained.
        ValueError: no rows, no labels, nothing to train, or a model that `check_private` refuses; nothing has changed.
    """
    rows = len(dataset)
    if not rows:
        raise ValueError("The client's dataset is empty.")
    spent, sigma = None, 0.0
    if privacy is None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("No tensor of the model is trainable.")
    else:
        trained = check_private(model, privacy)
        sigma, spent = plan_round(privacy, rows, settings, history, total_steps)
    if device is not None:
        model.to(device)
    parameters = list(trained.values())
    where = parameters[0].device
    collator = collator or default_data_collator

    def batch(rows: Sequence[int]) -> dict[str, Any]:
        made = dict(collator([dataset[row] for row in rows]))
        if made.get("labels") is None:
            raise ValueError(f"The collator gave no `labels`, only {', '.join(map(repr, made)) or 'nothing'}.")
        return send_to_device(made, where)

    optimizer = OPTIMIZERS[settings.optimizer](
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, 0, settings.steps)
    seed, draws, noise = _seeds((settings.seed, round, node), privacy)
    with _undone_on_error(model, parameters), _seeded(seed, where):
        if privacy is None:
            losses = []
            for rows_of_step in _shuffled(rows, settings, seed):
                optimizer.zero_grad()
                loss = _accumulate(model, [batch(chunk) for chunk in _chunks(rows_of_step, settings)])
                if loss is not None:
                    losses.append(loss)
                if settings.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                scheduler.step()
            if not losses:
                raise ValueError(f"No record of {settings.steps} steps has a label to learn: all were -100.")
            return LocalResult(rows, float(torch.stack(losses).mean()), settings.steps)

        with attached(
            model,
            optimizer,
            privacy,
            sigma,
            samples=rows,
            batch_size=settings.batch_size,
            steps=settings.steps,
            seeds=(draws, noise),
            history=history,
        ) as private:
            checked = False
            for rows_of_step in private.draws:
                private.step([_forward(model, batch, chunk) for chunk in _chunks(rows_of_step, settings)])
                scheduler.step()
                if rows_of_step and not checked:  # one that turns out wrong is undone with the round
                    private.check_one(model, batch(rows_of_step[:1]))
                    checked = True
            return LocalResult(1, None, settings.steps, spent, private.history)


def plan_round(
    privacy: DPSpec,
    rows: int,
    settings: LocalSettings,
    history: Sequence[Sequence[float]] | None = None,
    total_steps: int | None = None,
) -> tuple[float, float]:
    """The noise multiplier of a private round over `rows` records, and the epsilon spent after it; see `train_local`.

    Raises:
        BudgetExceeded: the round would spend more than `privacy.epsilon`.
        ValueError: `privacy.delta` is above 1 / rows, or no noise is enough.
    """
    if rows < 1:
        raise ValueError("The client's dataset is empty.")
    if privacy.delta > 1 / rows:
        raise ValueError(
            f"`delta` {privacy.delta:g} is above 1 / {rows}, one over the number of records: publishing a whole record "
            "would satisfy it. Choose a smaller delta."
        )
    rate = poisson_rate(rows, settings.batch_size)
    sigma = privacy.solve(rate, settings.steps if total_steps is None else total_steps)
    spent = epsilon_spent([*checked_history(history), (sigma, rate, settings.steps)], privacy.delta, privacy.accountant)
    if privacy.epsilon is not None and spent > privacy.epsilon:
        raise BudgetExceeded(
            f"{settings.steps} more steps would spend epsilon {spent:.3f} ({privacy.accountant} accountant, delta "
            f"{privacy.delta:g}), above the target {privacy.epsilon:g}: this client has trained its share."
        )
    return sigma, spent


def _seeds(context: tuple[int, ...], privacy: DPSpec | None) -> tuple[int, ...]:
    """Of the global generators, of Poisson draws, of noise.

    Privacy needs all three to be secret. Dropout's too: a record more would shift the known masks of those after it.
    """
    entropy = context if privacy is None else None if privacy.noise_seed is None else (privacy.noise_seed, *context)
    return tuple(int(word) for word in np.random.SeedSequence(entropy).generate_state(3, np.uint64) >> 1)


def _forward(model: nn.Module, batch: Callable, rows: Sequence[int]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    needs_labels = base_of(model).config.is_encoder_decoder  # which makes the decoder's inputs of them

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = batch(rows)
        labels = inputs.pop("labels")
        if needs_labels and "decoder_input_ids" not in inputs:
            inputs["labels"] = labels
        logits = model(**inputs).logits
        _check_trains(logits)
        if not len(logits) == len(labels) == len(rows):
            raise ValueError(
                f"The collator made a batch of {len(labels)} from {len(rows)} rows: with differential privacy each row "
                "must stay a row of its own (no packing)."
            )
        return logits, labels

    return forward


def _accumulate(model: nn.Module, batches: Sequence[dict[str, Any]]) -> torch.Tensor | None:
    """Adds the gradients of the loss of all `batches` taken as one, and returns that loss; None if nothing has a label.

    A batch without a label, whose own mean would be NaN, has no share.
    """
    weights = [supervised(model, batch) for batch in batches]
    if not any(weights):
        return None
    total = torch.zeros(())
    for batch, weight in zip(batches, weights, strict=True):
        if not weight:
            continue
        loss = model(**batch).loss * (weight / sum(weights))
        _check_trains(loss)
        loss.backward()
        total += loss.detach().float().cpu()
    return total


def _check_trains(output: torch.Tensor) -> None:
    if not output.requires_grad:
        raise ValueError("The model's output depends on no trainable tensor: is the adapter merged or disabled?")


def _shuffled(rows: int, settings: LocalSettings, seed: int) -> Iterator[list[int]]:
    """Rows of each step: pass after pass over the dataset, each in a new order; the last of a pass may be fewer."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0
    while True:
        for chunk in torch.randperm(rows, generator=generator).split(settings.batch_size):
            if steps == settings.steps:
                return
            steps += 1
            yield chunk.tolist()


def _chunks(rows: Sequence[int], settings: LocalSettings) -> list[Sequence[int]]:
    size = settings.max_physical_batch or max(1, len(rows))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Training mode for the time being; gradients go, and after an error `parameters` are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        model.train()
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in parameters:
            parameter.grad = None


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators seeded, and afterwards as they were: dropout and collators know no others."""
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    indices = [] if accelerator is None else [accelerator.current_device() if device.index is None else device.index]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(indices, device_type="cuda" if accelerator is None else device.type):
            torch.default_generator.manual_seed(seed)
            if accelerator is not None:
                accelerator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
