"""Differential privacy for a client's training: Opacus' DP-SGD on the trained factors, its accountant, its refusals.

What is protected is one record of one client against everyone who ever sees that client's factors (record-level DP, one
row of the dataset being one record), not the client as a whole. See `DPSpec`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from ..utils import IGNORE

ACCOUNTANTS = ("prv", "rdp")  # Opacus' "gdp" can say less than was spent
MODES = ("hooks", "ghost")

# Said on the happy path: we document the generator; A is frozen, so the first layer's inputs need no gradient; the
# bound of the RDP accountant holds at any order.
HARMLESS = ("Secure RNG turned off", "Full backward hook is firing", "Optimal order is the")


class BudgetExceeded(ValueError):
    """The next round would spend more than the target epsilon. Nothing was trained and nothing has changed."""


@dataclass(frozen=True)
class DPSpec:
    """Differential privacy of one client: DP-SGD (arXiv 1607.00133) by Opacus on the `lora_B` weights only.

    Each step draws every record with probability q = 1 / ceil(n / batch_size) (Poisson sampling), clips every record's
    gradient, over all trained tensors together, to `max_grad_norm` and adds noise to their sum; a step that draws no
    record is noised and counted like any other. What comes after, the server's averaging and refactorisation included,
    is post-processing and costs nothing.

    Protected is one record of one client against everyone who sees its factors. Not protected: the client as a whole,
    and whatever else it sends, since dataset sizes, losses and metrics carry no noise; `train_local` therefore
    withholds the loss and reports one sample, so that an average weighted by samples is a uniform one. The epsilon and
    the history depend on the size of the dataset too and should stay with the client, or be shared knowingly. The size
    itself is no secret all the same, as usual with DP-SGD: the noise on the factors, the time a round takes and when a
    client refuses depend on it.

    A value of a record's gradient that is not finite counts as zero with "hooks"; with "ghost" the round fails.

    Noise and draws come from PyTorch's generators, which are not cryptographic: on the CPU they have 2^32 seeds.
    Opacus' `secure_mode` needs a package that no longer follows PyTorch, and attacks on the rounding of the noise are
    not countered.

    Args:
        epsilon: target over all rounds, > 0; the noise multiplier is solved from it. Either this or the next.
        noise_multiplier: noise standard deviation / `max_grad_norm`, >= 0 (0: no privacy, epsilon is infinite). There
            is then no budget to exceed.
        delta: probability in (0, 1) with which the guarantee may fail; at most 1 / n.
        max_grad_norm: Euclidean norm to which a record's gradient is clipped; default 2.0 as in FedSVD (arXiv
            2505.12805).
        accountant: "prv" (arXiv 2106.02848, the tighter) or "rdp" (arXiv 1908.10530); their epsilons differ, so name it
            with every epsilon.
        mode: "hooks" holds every record's gradients, batch x out_features x r per layer; "ghost" (arXiv 2110.05679)
            only their norms, for a second backward pass. The result is the same.
        also_train: names (of tensors or of modules on the way to them) that may train besides `lora_B`, for example
            ("classifier",) or ("lora_A",). They are clipped and noised with the rest.
        noise_seed: makes noise, draws and dropout repeatable, with `LocalSettings.seed`, the round and the node mixed
            in. For studies and tests: whoever knows the seed can subtract the noise. Default: the operating system's
            entropy, new each time.

    Raises:
        ImportError: Opacus is missing.
        ValueError: a value out of its range, or both or none of `epsilon` and `noise_multiplier`.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    max_grad_norm: float = 2.0
    accountant: str = "prv"
    mode: str = "hooks"
    also_train: tuple[str, ...] = ()
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("opacus") is None:
            raise ImportError("Differential privacy needs opacus: pip install 'peftx[federated]'")
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "DPSpec needs either `epsilon`, the target over all rounds, or `noise_multiplier`; "
                f"got epsilon={self.epsilon!r}, noise_multiplier={self.noise_multiplier!r}."
            )
        if self.epsilon is not None and not _within(self.epsilon, 0, math.inf):
            raise ValueError(f"`epsilon` must be a positive finite number, not {self.epsilon!r}.")
        if self.noise_multiplier not in (None, 0) and not _within(self.noise_multiplier, 0, math.inf):
            raise ValueError(f"`noise_multiplier` must be a finite number >= 0, not {self.noise_multiplier!r}.")
        if not _within(self.delta, 0, 1):
            raise ValueError(f"`delta` must lie strictly between 0 and 1, not {self.delta!r}.")
        if not _within(self.max_grad_norm, 0, math.inf):
            raise ValueError(f"`max_grad_norm` must be a positive finite number, not {self.max_grad_norm!r}.")
        _check_accountant(self.accountant)
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, not {self.mode!r}.")
        if isinstance(self.also_train, str):
            raise ValueError(f"`also_train` must be a tuple of names: ({self.also_train!r},).")

    def solve(self, sample_rate: float, steps: int) -> float:
        """The noise multiplier with which `steps` steps at `sample_rate` stay within `epsilon`; solved once, then kept.

        Takes 1 to 4 s with the PRV accountant. The epsilon it leads to is at most 0.01 below the target.

        Args:
            sample_rate: q in (0, 1].
            steps: steps over all rounds, those of the empty draws included.

        Returns:
            The noise multiplier; `noise_multiplier` itself where it is given.

        Raises:
            ValueError: the rate or the steps are out of range, or no noise is enough for the target.
        """
        _check_entry(1.0, sample_rate, steps)
        if self.noise_multiplier is not None:
            return float(self.noise_multiplier)
        return _solve(self.epsilon, self.delta, float(sample_rate), int(steps), self.accountant)


def epsilon_spent(history: Sequence[Sequence[float]], delta: float, accountant: str = "prv") -> float:
    """The epsilon, at `delta`, of all steps in a history.

    Args:
        history: entries [noise multiplier, sample rate, steps], as in `LocalResult.history`.
        delta: in (0, 1).
        accountant: "prv" or "rdp".

    Returns:
        An upper bound; 0.0 for no steps, infinite if some were taken without noise. The PRV accountant takes a second,
        but a minute where there is next to no privacy (epsilons in the hundreds).

    Raises:
        ValueError: an entry, `delta` or `accountant` is not what it should be.
    """
    if not _within(delta, 0, 1):
        raise ValueError(f"`delta` must lie strictly between 0 and 1, not {delta!r}.")
    _check_accountant(accountant)
    return _spent(checked_history(history), float(delta), accountant)


def checked_history(history: Sequence[Sequence[float]] | None) -> tuple[tuple[float, float, int], ...]:
    """`history` as Opacus' accountants keep it, equal neighbours joined; it may come from a JSON file."""
    entries: list[tuple[float, float, int]] = []
    for entry in history or ():
        try:
            sigma, rate, steps = entry
        except (TypeError, ValueError):
            raise ValueError(
                f"An entry of the history must be [noise multiplier, rate, steps], not {entry!r}."
            ) from None
        _check_entry(sigma, rate, steps)
        if entries and entries[-1][:2] == (sigma, rate):
            steps += entries.pop()[2]
        entries.append((float(sigma), float(rate), int(steps)))
    return tuple(entries)


def sample_rate(samples: int, batch_size: int) -> float:
    """The probability q with which a step draws each record, 1 / ceil(samples / batch_size), as Opacus has it."""
    return 1 / math.ceil(samples / batch_size)


def check_private(model: nn.Module, spec: DPSpec) -> dict[str, nn.Parameter]:
    """The tensors that will train, by name, of a model that DP-SGD can train; `model` is not touched.

    Raises:
        ValueError: something else than `lora_B` (and `spec.also_train`) is trainable, or nothing is; trainable tensors
            are shared, or held by a module without per-sample gradients; BatchNorm or gradient checkpointing, which mix
            or repeat records; gradients or Opacus' hooks of the caller are still there.
    """
    from opacus.grad_sample import GradSampleHooks

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(f"`{name}` is a BatchNorm layer: it mixes the records of a batch. Use GroupNorm instead.")
        if vars(module).get("autograd_grad_sample_hooks"):
            raise ValueError("Opacus is attached to the model already. Call `cleanup()` of its hooks first.")
        if getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                "Gradient checkpointing runs layers twice, which Opacus' per-sample gradients do not allow. Call "
                "`gradient_checkpointing_disable()` and lower `max_physical_batch` instead."
            )
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not trained:
        raise ValueError("No tensor of the model is trainable.")
    unused = [name for name in spec.also_train if not any(_listed(full, (name,)) for full in trained)]
    if unused:
        raise ValueError(f"`also_train` names nothing that is trainable: {', '.join(unused)}.")
    others = [name for name in trained if not re.search(r"\.lora_B\.[^.]+\.weight$", name)]
    others = [name for name in others if not _listed(name, spec.also_train)]
    if others:
        raise ValueError(
            f"With differential privacy only the lora_B weights train, but {_some(others)} would too. Freeze them "
            "(`requires_grad_(False)`; no `modules_to_save`) or list them in `DPSpec.also_train`."
        )
    counts = Counter(p.data_ptr() for p in trained.values())
    shared = [name for name, p in trained.items() if counts[p.data_ptr()] > 1]
    if shared:
        raise ValueError(f"Trainable tensors must not be shared (tied), but {_some(shared)} are.")
    for name, parameter in trained.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if type(owner) not in GradSampleHooks.GRAD_SAMPLERS:
            raise ValueError(f"Opacus has no per-sample gradients for `{name}`, held by a {type(owner).__name__}.")
        if parameter.grad is not None:
            raise ValueError(
                f"`{name}` still holds a gradient: DP-SGD cannot add to gradients accumulated by the caller. "
                "Call `model.zero_grad()` first."
            )
    return trained


def base_of(model: Any) -> Any:
    """The transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(base: Any) -> tuple[str, bool]:
    """Transformers' name for the loss of a model, and whether that loss compares a token with the label of the next."""
    head = str(getattr(base, "loss_type", None)).replace("ForConditionalGeneration", "ForCausalLM")
    return head, head == "ForCausalLM" and not base.config.is_encoder_decoder


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
        self.head, self.shifted = head_of(base)
        if not self.head.endswith("Classification") and self.head not in ("ForCausalLM", "ForMaskedLM"):
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
        if self.head in ("ForCausalLM", "ForMaskedLM", "ForTokenClassification"):
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

    def _drop_overflows(self) -> None:
        """Of a gradient that is not finite no share is left by clipping, but NaN, which tells of the record."""
        for parameter in self.optimizer.params:
            samples = getattr(parameter, "grad_sample", None)
            if samples is not None:
                samples.nan_to_num_(0.0, 0.0, 0.0)
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
    criterion: Any = SampleLoss(model)
    with _without_trace(model), _quiet():
        engine = PrivacyEngine(accountant=spec.accountant)
        engine.accountant.history = list(checked_history(history))
        hooks, dp_optimizer, *rest = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
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
            (criterion,) = ghost_criterion or (criterion,)
            layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in trained}
            yield PrivateSteps(layers, dp_optimizer, criterion, poisson.batch_sampler, engine.accountant)
        finally:
            hooks.cleanup()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        # the PRV accountant's logarithms of 0, which it discards; they are there at q = 1
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"opacus\.accountants\.analysis")
        yield


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


@functools.lru_cache(maxsize=256)
def _spent(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    from opacus.accountants import create_accountant

    if not sum(steps for _, _, steps in history):
        return 0.0
    if any(sigma == 0 for sigma, _, steps in history if steps):
        return math.inf
    counter = create_accountant(mechanism=accountant)
    counter.history = [entry for entry in history if entry[2]]
    with _quiet():
        spent = float(counter.get_epsilon(delta=delta))
    return math.inf if math.isnan(spent) else spent


@functools.lru_cache(maxsize=256)
def _solve(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet():
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant
                )
            )
    except ValueError as error:
        raise ValueError(
            f"No noise multiplier brings {steps} steps at sample rate {rate:.3g} to epsilon {epsilon} at delta {delta} "
            f"({accountant} accountant): {error}"
        ) from error


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < high


def _check_accountant(name: str) -> None:
    if name not in ACCOUNTANTS:
        raise ValueError(f"`accountant` must be one of {', '.join(ACCOUNTANTS)}, not {name!r}.")


def _check_entry(sigma: Any, rate: Any, steps: Any) -> None:
    if sigma != 0 and not _within(sigma, 0, math.inf):
        raise ValueError(f"A noise multiplier must be a finite number >= 0, not {sigma!r}.")
    if rate != 1 and not _within(rate, 0, 1):
        raise ValueError(f"A sample rate must be in (0, 1], not {rate!r}: no step draws a record more than once.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"A number of steps must be an integer >= 0, not {steps!r}.")


def _listed(name: str, listed: Sequence[str]) -> bool:
    return any(f".{entry}." in f".{name}." for entry in listed)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
