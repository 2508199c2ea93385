"""Differential privacy for a client's training: what is promised, and the models that can keep it.

What is protected is one record of one client against everyone who ever sees that client's factors (record-level DP, one
row of the dataset being one record), not the client as a whole. See `DPSpec`.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .accounting import check_accountant, check_entry, noise_multiplier, within

MODES = ("hooks", "ghost")


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
        if self.epsilon is not None and not within(self.epsilon, 0, math.inf):
            raise ValueError(f"`epsilon` must be a positive finite number, not {self.epsilon!r}.")
        if self.noise_multiplier is not None and not within(self.noise_multiplier, -math.ulp(0.0), math.inf):
            raise ValueError(f"`noise_multiplier` must be a finite number >= 0, not {self.noise_multiplier!r}.")
        if not within(self.delta, 0, 1):
            raise ValueError(f"`delta` must lie strictly between 0 and 1, not {self.delta!r}.")
        if not within(self.max_grad_norm, 0, math.inf):
            raise ValueError(f"`max_grad_norm` must be a positive finite number, not {self.max_grad_norm!r}.")
        check_accountant(self.accountant)
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, not {self.mode!r}.")
        if isinstance(self.also_train, str):
            raise ValueError(f"`also_train` must be a tuple of names: ({self.also_train!r},).")
        if not isinstance(self.also_train, tuple | list) or not all(isinstance(name, str) for name in self.also_train):
            raise ValueError(f"`also_train` must be a tuple of names, not {self.also_train!r}.")
        seed = self.noise_seed
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise ValueError(f"`noise_seed` must be an integer >= 0 or None, not {seed!r}.")

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
        check_entry(1.0, sample_rate, steps)
        if not steps:
            raise ValueError("Noise is solved for at least one step.")
        if self.noise_multiplier is not None:
            return float(self.noise_multiplier)
        assert self.epsilon is not None
        return noise_multiplier(self.epsilon, self.delta, float(sample_rate), int(steps), self.accountant)


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


def _listed(name: str, listed: Sequence[str]) -> bool:
    return any(f".{entry}." in f".{name}." for entry in listed)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
