"""TriAdaptLoRA, arXiv:2501.08008: LoRA with a triangular core, whose rank grows during training."""

from __future__ import annotations

import copy
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn import functional as F
from transformers.trainer_callback import TrainerCallback

from ..adapters.config import AdapterConfig, Number
from ..adapters.layer import AdapterLayer, FrozenDict, accumulate, at_least_fp32
from ..adapters.tuner import AdapterModel
from ..registry import register

STD = 0.02  # of every Gaussian start, from the author's code


@dataclass
class TriAdaptLoRAConfig(AdapterConfig):
    """LoRA with an r x r core between its factors, and ranks that go where the core grows fastest.

    With A (r, in_features), B (out_features, r) and cores L, U (r, r), lower and upper triangular, both with diagonal:

        W' = W + s B (L + U) A,    s = lora_alpha / target_r

    One rank more is one row of L, one column of U, a row of A and a column of B; nothing that was there changes. Every
    `growth_interval` optimizer steps after `init_warmup`, each module l is scored by how much its normalised Frobenius
    norm F_l = ||L + U||_F / r changed since the last time, and the q modules with the highest scores get `growth_size`
    ranks each, until the ranks add up to the budget. With x the fraction of the steps after the warm-up that is done
    and R what is left of the budget, q is R x (`"linear"`) or R^x (`"exponential"`), at least 1.

    Something has to call it: `peftx.TriAdaptCallback()` in the Trainer, or in a loop of your own, after each optimizer
    step (steps count from 1),

        model.base_model.update_and_grow(step)

    Without it the adapter trains at `init_r`. All factors are allocated at `max_rank` once, and a growth only writes
    into them: the optimizer, its scheduler and DDP keep their parameters, and a checkpoint of any step resumes. What
    decides the next growth is in the saved tensors. `model.base_model.finalize()` cuts an adapter to its active ranks.
    Adam shares one step counter among all entries of a tensor, so that the first update of a new rank is up to twice
    the learning rate. Sharded parameters (FSDP, ZeRO-3) cannot grow.

    The paper's text could not be read: parameterisation, score and schedule are those of its first author's code. Ours
    are: shells of single ranks whatever `growth_size`; the constant s, so that a growth changes no output (the code
    has a constant 2 or, earlier, lora_alpha / r: `scale_by_current_rank`); new ranks that start as the first did; a
    budget that is never exceeded; ties broken by the order of the modules; the defaults of `init_warmup` and
    `growth_interval`, which are the 100 steps of IncreLoRA's code for small tasks, at 3000 steps.

    Args:
        init_r: rank at the start; default 1.
        target_r: average rank at the end; default 8.
        target_total_rank: the budget, sum of all ranks; default `None`: target_r times the number of modules.
        max_rank: largest rank of a module, for which memory is allocated; default `None`: 2 target_r, or the smaller
            width of the module.
        growth: `"linear"` (default; the best in the paper's abstract) or `"exponential"`.
        growth_size: ranks that a module gains at once; default `None`: target_r // 2, at least 1.
        growth_interval: optimizer steps between growths; default `None`: total_step // 30, at least 1.
        init_warmup: optimizer steps before the first growth can happen; default `None`: total_step // 30.
        growth_end: fraction of total_step after which no rank is added; default 1.
        total_step: optimizer steps of the training; `None` (default) leaves it to the callback.
        init: `"identity"` (default): L = I, U = 0, A Gaussian, B = 0; `"zero_core"`: L = U = 0, A and B Gaussian. The
            standard deviation is 0.02.
        lora_alpha: s is lora_alpha / target_r; default 16.
        lora_dropout: on the adapter's input, in training; default 0.
        scale_by_current_rank: s is lora_alpha / r; a growth from r to r' then shrinks the delta by r / r'.
        rebaseline_after_growth: whether the norm that the next score is compared with is taken after a growth, and
            not before. Before (default), a module that has just grown scores low, since r divides its norm.
        rank_pattern: `{name or regex: rank}` for modules that have a rank of their own, which does not grow.
        seed: of the Gaussian entries of new ranks.
        init_weights: `True` as `init` says; `False` with a random delta (tests).

    The other arguments and the errors raised are those of `peftx.AdapterConfig`.
    """

    init_r: int = field(default=1, metadata={"help": "Rank at the start."})
    target_r: int = field(default=8, metadata={"help": "Average rank at the end."})
    target_total_rank: int | None = field(
        default=None, metadata={"help": "Sum of all ranks at the end; None: target_r times the number of modules."}
    )
    max_rank: int | None = field(
        default=None, metadata={"help": "Largest rank of a module; None: 2 target_r or the module's smaller width."}
    )
    growth: Literal["linear", "exponential"] = field(
        default="linear", metadata={"help": "How the number of modules that grow at once follows the budget and time."}
    )
    growth_size: int | None = field(
        default=None, metadata={"help": "Ranks that a module gains at once; None: target_r // 2."}
    )
    growth_interval: int | None = field(
        default=None, metadata={"help": "Optimizer steps between growths; None: total_step // 30."}
    )
    init_warmup: int | None = field(
        default=None, metadata={"help": "Optimizer steps before the first growth; None: total_step // 30."}
    )
    growth_end: Number = field(default=1.0, metadata={"help": "Fraction of total_step after which nothing grows."})
    total_step: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the training; filled in by TriAdaptCallback."}
    )
    init: Literal["identity", "zero_core"] = field(
        default="identity", metadata={"help": "What starts at zero: B ('identity') or the core ('zero_core')."}
    )
    lora_alpha: Number = field(default=16, metadata={"help": "The delta is scaled by lora_alpha / target_r."})
    lora_dropout: Number = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in training only."})
    scale_by_current_rank: bool = field(default=False, metadata={"help": "Scale by lora_alpha / r instead."})
    rebaseline_after_growth: bool = field(
        default=False, metadata={"help": "Compare the next score with the norm after a growth, not before it."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of modules (name or regex) that do not grow."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the Gaussian entries of new ranks."})

    pattern_fields: ClassVar[dict[str, str]] = {}  # `for_module` resolves rank_pattern

    def __post_init__(self) -> None:
        super().__post_init__()
        optional = ("target_total_rank", "max_rank", "growth_size", "growth_interval", "total_step")
        for name in ("init_r", "target_r", "lora_alpha", *optional):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.init_warmup is not None and self.init_warmup < 0:
            raise ValueError(f"`init_warmup` must not be negative, got {self.init_warmup}.")
        if self.init_r > self.target_r:
            raise ValueError(f"init_r={self.init_r} is larger than target_r={self.target_r}: ranks only grow.")
        if self.max_rank is not None and self.max_rank < self.target_r:
            raise ValueError(f"max_rank={self.max_rank} is smaller than target_r={self.target_r}, the average rank.")
        if not 0 < self.growth_end <= 1:
            raise ValueError(f"`growth_end` must be in (0, 1], got {self.growth_end}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        if bad := {name: rank for name, rank in self.rank_pattern.items() if rank <= 0}:
            raise ValueError(f"The ranks in `rank_pattern` must be positive, got {bad}.")
        if self.total_step is not None:
            self.check_total_step(self.total_step)

    def check_total_step(self, total_step: int) -> None:
        if self.init_warmup is not None and total_step <= self.init_warmup:
            raise ValueError(
                f"init_warmup={self.init_warmup} leaves none of the total_step={total_step} optimizer steps for "
                "growth. Lower `init_warmup` (and `growth_interval`), or train for longer."
            )

    def for_module(self, key: str) -> TriAdaptLoRAConfig:
        config = super().for_module(key)
        match = get_pattern_key(list(self.rank_pattern), key)
        if match in self.rank_pattern:
            config = _fixed(config, self.rank_pattern[match])
        return config  # type: ignore[return-value]

    # The schedule. All of it needs `total_step`.

    @property
    def warmup(self) -> int:
        return self.init_warmup if self.init_warmup is not None else self.total_step // 30  # type: ignore[operator]

    @property
    def interval(self) -> int:
        return self.growth_interval or max(1, self.total_step // 30)  # type: ignore[operator]

    def is_due(self, step: int) -> bool:
        """Whether a growth may happen after optimizer step `step`."""
        last = self.growth_end * self.total_step  # type: ignore[operator]
        return self.warmup < step <= last and step % self.interval == 0

    def quota(self, step: int, budget: int) -> int:
        """q, how many modules grow after optimizer step `step` while `budget` ranks are left."""
        total = self.total_step - self.warmup  # type: ignore[operator]
        done = min(step - self.warmup, total)
        if self.growth == "linear":
            return max(1, budget * done // total)
        return max(1, int(budget ** (done / total) + 1e-9))


def _fixed(config: Any, rank: int) -> Any:
    """A copy of `config` for a module whose rank is `rank` and stays. (The average that checks refer to is another.)"""
    config = copy.copy(config)
    config.init_r = config.max_rank = rank
    return config


class Activation(FrozenDict):
    """For each adapter the optimizer step at which each of its ranks became active, or -1: int64 (max_rank,).

    `ranks` holds how many are active as Python ints, so that a forward pass never waits for the device. It follows
    every way by which a tensor gets here: assignment, `load_state_dict`, and the `setattr` of transformers' loading.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ranks: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def refresh(self, adapter_name: str) -> None:
        if not self[adapter_name].is_meta:
            self.ranks[adapter_name] = int((self[adapter_name] >= 0).sum())

    def set(self, adapter_name: str, tensor: torch.Tensor, persistent: bool) -> None:
        super().set(adapter_name, tensor, persistent)
        self.refresh(adapter_name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self.refresh(name)

    def __delitem__(self, adapter_name: str) -> None:
        super().__delitem__(adapter_name)
        self.ranks.pop(adapter_name, None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for adapter_name in self:
            self.refresh(adapter_name)


class GrowingModel(AdapterModel):
    """The tuner, with what drives the growth and what reads it."""

    peft_config: dict[str, Any]
    _forwards: int | None = 0  # training passes before the first `update_and_grow`; None: not counted any more

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        # What every kind of PeftModel calls in each forward pass; `forward` only some of them do.
        counts = not torch.compiler.is_compiling() and self._forwards is not None
        if counts and self.training and torch.is_grad_enabled():
            self._remind()
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _remind(self) -> None:
        """Warns once, when the first growth should have been and nothing has called `update_and_grow`."""
        self._forwards = (self._forwards or 0) + 1
        name = next((n for n in self.active_adapters if n in self.peft_config), None)
        if name is None:
            return
        config = self.peft_config[name]
        first = config.warmup + config.interval if config.total_step else config.init_warmup or 0
        if self._forwards <= max(100, first):  # several passes may be accumulated for one optimizer step
            return
        self._forwards = None
        if any(layer.rank(name) < layer.size(name) for layer in _trained_layers(self, name).values()):
            warnings.warn(
                f"The ranks of the TriAdaptLoRA adapter {name!r} do not grow, since nothing drives them: pass "
                "`callbacks=[peftx.TriAdaptCallback()]` to the Trainer, or call "
                "`model.base_model.update_and_grow(step)` after each optimizer step.",
                stacklevel=2,
            )

    def update_and_grow(self, step: int) -> list[str]:
        """`update_and_grow` for this model."""
        return update_and_grow(self, step)

    def _named(self, adapter_name: str | None) -> tuple[str, dict[str, TriAdaptLoRALinear]]:
        name = adapter_name or self.active_adapters[0]
        layers: dict[str, Any] = {key: layer for key, layer in self._layers() if name in layer.adapter_config}
        if not layers:
            raise ValueError(f"There is no TriAdaptLoRA adapter {name!r}; there are: {', '.join(self.peft_config)}.")
        return name, layers

    def ranks(self, adapter_name: str | None = None) -> dict[str, int]:
        """Active rank of each module; default: of the active adapter."""
        name, layers = self._named(adapter_name)
        return {key: layer.rank(name) for key, layer in layers.items()}

    def rank_history(self, adapter_name: str | None = None) -> list[dict[str, Any]]:
        """The ranks at the start (step 0) and after each growth, as `TriAdaptCallback` logs them; for `plot_ranks`.

        They are read from the saved tensors, and so are complete after a resume and for a loaded adapter. The steps
        are those that `update_and_grow` was given: an adapter that was trained twice has steps of both trainings.
        """
        name, layers = self._named(adapter_name)
        since = {key: layer.triadaptlora_since[name].tolist() for key, layer in layers.items()}
        steps = sorted({0}.union(*since.values()) - {-1})
        return [
            entry(step, name, {key: sum(0 <= s <= step for s in values) for key, values in since.items()})
            for step in steps
        ]

    def get_nb_active_parameters(self, adapter_name: str | None = None) -> int:
        """Trained values of the active ranks, r (in + out) + r (r + 1) a module, where `print_trainable_parameters`
        counts what is allocated."""
        name, layers = self._named(adapter_name)
        ranks = ((layer.rank(name), layer.in_features + layer.out_features) for layer in layers.values())
        return sum(r * widths + r * (r + 1) for r, widths in ranks)

    def finalize(self, adapter_name: str | None = None) -> None:
        """Cuts an adapter (default: the active one) to its active ranks, for a small file; outputs stay the same.

        The parameters are replaced, so this comes after training. The ranks go into the config's `rank_pattern`, which
        says that they do not grow.
        """
        name, layers = self._named(adapter_name)
        for layer in layers.values():
            layer.trim(name)
        self.peft_config[name].rank_pattern = {f"^{re.escape(key)}": layer.rank(name) for key, layer in layers.items()}


def update_and_grow(model: nn.Module, step: int) -> list[str]:
    """Scores the modules and adds ranks if optimizer step `step` (counted from 1) calls for it; call it after each.

    The only change of state. Only active, trainable adapters grow. It needs weights, not gradients, and no
    communication: processes with the same weights take the same decisions. A second call at the same step does nothing.

    Args:
        model: a `PeftModel`, its tuner, or a transformers model with an adapter (`model.add_adapter`).

    Returns:
        The names of the modules that grew, in the order of the model.

    Raises:
        ValueError: `total_step` is not known, or `step` is not a positive integer.
        RuntimeError: the adapter is merged, or its parameters are sharded.
    """
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"`step` counts the optimizer steps from 1, got {step!r}.")
    tuner = _tuner(model)
    _found_driver(tuner)
    grown: dict[str, None] = {}
    for adapter_name, config in tuner.peft_config.items():
        if isinstance(config, TriAdaptLoRAConfig) and (config.total_step is None or config.is_due(step)):
            layers = _trained_layers(tuner, adapter_name)
            if not layers:
                continue
            if config.total_step is None:
                raise ValueError(
                    f"The TriAdaptLoRA adapter {adapter_name!r} does not know how long it will be trained. Set "
                    "`total_step` in its config to the number of optimizer steps, or use `peftx.TriAdaptCallback`."
                )
            names = set(_grow(layers, adapter_name, config, step))
            grown.update(dict.fromkeys(name for name in layers if name in names))
    return list(grown)


def _tuner(model: nn.Module) -> Any:
    """The tuner of a `PeftModel`, also of one that DDP wraps; a tuner or a transformers model is returned as it is."""
    model = extract_model_from_parallel(model)
    inner: Any = getattr(model, "base_model", model)
    return inner if isinstance(inner, BaseTuner) else model


def _found_driver(tuner: Any) -> None:
    if isinstance(tuner, GrowingModel):
        tuner._forwards = None


def _trained_layers(tuner: Any, adapter_name: str) -> dict[str, TriAdaptLoRALinear]:
    body = tuner.model if isinstance(tuner, BaseTuner) else tuner
    return {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, TriAdaptLoRALinear) and module.is_trained(adapter_name)
    }


@torch.no_grad()
def _grow(
    layers: Mapping[str, TriAdaptLoRALinear], adapter_name: str, config: TriAdaptLoRAConfig, step: int
) -> Iterator[str]:
    """One round; yields the names of the modules that grew."""
    for name, layer in layers.items():
        layer.check_growable(adapter_name, name)
        layer.triadaptlora_since.refresh(adapter_name)  # DDP may have written the first process's at the start
    ranks = {name: layer.rank(adapter_name) for name, layer in layers.items()}
    budget = (config.target_total_rank or config.target_r * len(layers)) - sum(ranks.values())
    if budget <= 0 or any(layer.triadaptlora_scored[adapter_name].item() == step for layer in layers.values()):
        return
    scores = {name: layer.score(adapter_name, step) for name, layer in layers.items()}
    candidates = [name for name, layer in layers.items() if ranks[name] < layer.size(adapter_name)]
    candidates.sort(key=lambda name: -scores[name])  # stable: ties are in the order of the modules
    for name in candidates[: config.quota(step, budget)]:
        layer = layers[name]
        size = config.growth_size or max(1, config.target_r // 2)
        count = min(size, layer.size(adapter_name) - ranks[name], budget)
        if count:
            layer.activate(adapter_name, count, step, key=f"{config.seed} {name} {ranks[name]}")
            if config.rebaseline_after_growth:
                layer.triadaptlora_norm[adapter_name].copy_(layer.core_norm(adapter_name))
            budget -= count
            yield name


def entry(step: int, adapter_name: str, ranks: dict[str, int]) -> dict[str, Any]:
    """What is logged of the ranks after a step."""
    return {"step": step, "adapter": adapter_name, "triadaptlora_ranks": ranks}


class TriAdaptCallback(TrainerCallback):
    """Lets the ranks of TriAdaptLoRA adapters grow in the transformers Trainer.

    It sets the config's `total_step`, where that is `None`, to the optimizer steps of this training, calls
    `update_and_grow` after each of them, and writes the ranks at the start and after each growth to
    `trainer.state.log_history`, which is in every checkpoint and which `plot_ranks` takes.

    Raises:
        ValueError: at the start of the training, if the model has no TriAdaptLoRA adapter, or one whose warm-up is
            longer than the training.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuner = _tuner(model)
        configs = {
            name: config
            for name, config in getattr(tuner, "peft_config", {}).items()
            if isinstance(config, TriAdaptLoRAConfig) and _trained_layers(tuner, name)
        }
        if not configs:
            raise ValueError("TriAdaptCallback: the model trains no TriAdaptLoRA adapter. Leave the callback out.")
        for name, config in configs.items():
            if config.total_step is None:
                config.check_total_step(state.max_steps)
            elif config.total_step != state.max_steps:
                warnings.warn(
                    f"The TriAdaptLoRA adapter {name!r} grows as planned for total_step={config.total_step}, but this "
                    f"training has {state.max_steps} optimizer steps. Set `total_step=None` to plan anew.",
                    stacklevel=2,
                )
        self._planned = [config for config in configs.values() if config.total_step is None]
        for config in self._planned:
            config.total_step = state.max_steps
        _found_driver(tuner)
        if state.global_step == 0:
            self._log(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for config in self._planned:  # the next training may have another length
            config.total_step = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if update_and_grow(model, state.global_step):
            self._log(state, model)

    def _log(self, state: Any, model: Any) -> None:
        tuner = _tuner(model)
        for adapter_name in tuner.peft_config:
            ranks = {name: layer.rank(adapter_name) for name, layer in _trained_layers(tuner, adapter_name).items()}
            if ranks:
                epoch = {} if state.epoch is None else {"epoch": round(state.epoch, 4)}
                state.log_history.append({**entry(state.global_step, adapter_name, ranks), **epoch})


def core(L: torch.Tensor, U: torch.Tensor, r: int) -> torch.Tensor:
    """L + U at rank r, (r, r): of L the lower and of U the upper triangle, both with the diagonal."""
    return L[:r, :r].tril() + U[:r, :r].triu()


def norm(core: torch.Tensor) -> torch.Tensor:
    """The normalised Frobenius norm F = ||L + U||_F / r of a core, (1,), in fp32."""
    return torch.linalg.matrix_norm(core.float())[None] / len(core)


@register(
    "triadaptlora",
    config=TriAdaptLoRAConfig,
    paper="arXiv:2501.08008",
    lora_export="exact",
    callback=TriAdaptCallback,
    rank_fields=("init_r", "target_r"),
    tiny={"init_r": 2, "target_r": 4, "growth_size": 1},
    variants={"triadaptlora": {}, "triadaptlora-zero-core": {"init": "zero_core"}},
)
class TriAdaptLoRALinear(AdapterLayer):
    model_cls = GrowingModel
    adapter_layer_names = ("triadaptlora_A", "triadaptlora_B", "triadaptlora_lower", "triadaptlora_upper")
    frozen_names = ("triadaptlora_since", "triadaptlora_norm", "triadaptlora_scored")
    triadaptlora_A: nn.ParameterDict  # (max_rank, in)
    triadaptlora_B: nn.ParameterDict  # (out, max_rank)
    triadaptlora_lower: nn.ParameterDict  # L (max_rank, max_rank); what is above the diagonal is never read
    triadaptlora_upper: nn.ParameterDict  # U (max_rank, max_rank); what is below the diagonal is never read
    triadaptlora_since: Activation
    triadaptlora_norm: FrozenDict  # (1,) F at the last round
    triadaptlora_scored: FrozenDict  # (1,) int64, step of the last round

    def create(self, adapter_name: str, config: TriAdaptLoRAConfig) -> None:
        if not isinstance(self.triadaptlora_since, Activation):
            self.triadaptlora_since = Activation(persistent=True)
        r, widths = config.init_r, (self.in_features, self.out_features)
        size = config.max_rank or max(r, min(2 * config.target_r, *widths))
        A, B = STD * torch.randn(size, self.in_features), torch.zeros(self.out_features, size)
        L, U = torch.eye(size), torch.zeros(size, size)
        if config.init == "zero_core":
            B, L = STD * torch.randn_like(B), torch.zeros_like(L)
        if not config.init_weights:
            A, B = (torch.randn_like(factor) / factor.shape[1] ** 0.5 for factor in (A, B))
            L, U = torch.eye(size) + STD * torch.randn_like(L), STD * torch.randn_like(U)
        for name, tensor in zip(self.adapter_layer_names, (A, B, L, U), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        since = torch.full((size,), -1)
        since[:r] = 0
        self.triadaptlora_since[adapter_name] = since
        self.triadaptlora_since.ranks[adapter_name] = r  # also where a tensor on the meta device cannot say it
        self.triadaptlora_norm[adapter_name] = norm(core(L, U, r))
        self.triadaptlora_scored[adapter_name] = torch.zeros(1, dtype=torch.int64)

    def rank(self, adapter_name: str) -> int:
        """The active rank r."""
        return self.triadaptlora_since.ranks[adapter_name]

    def size(self, adapter_name: str) -> int:
        """The largest rank there is room for."""
        return len(self.triadaptlora_since[adapter_name])

    def core(self, adapter_name: str) -> torch.Tensor:
        """L + U at the active rank, (r, r)."""
        L, U = self.triadaptlora_lower[adapter_name], self.triadaptlora_upper[adapter_name]
        return core(L, U, self.rank(adapter_name))

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and the transpose of B (L + U), (r, out), at the active rank."""
        r = self.rank(adapter_name)
        B = self.triadaptlora_B[adapter_name][:, :r]
        return self.triadaptlora_A[adapter_name][:r], self.core(adapter_name).T @ B.T

    def scale(self, adapter_name: str) -> float:
        """The factor s of the delta."""
        config = self.adapter_config[adapter_name]
        return config.lora_alpha / (self.rank(adapter_name) if config.scale_by_current_rank else config.target_r)

    def add_delta(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        A, CB = self.factors(adapter_name)
        dropout = self.adapter_config[adapter_name].lora_dropout
        if self.training and dropout:
            x = F.dropout(x, dropout)
        h = F.linear(x, A.to(x.dtype))
        return accumulate(result, h, CB, self.scaling[adapter_name] * self.scale(adapter_name))

    def delta_weight(self, adapter_name: str) -> torch.Tensor:
        A, CB = self.factors(adapter_name)
        return self.scale(adapter_name) * at_least_fp32(CB).T @ at_least_fp32(A)

    def lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        A, CB = (factor.detach() for factor in self.factors(adapter_name))
        return A, self.scaling[adapter_name] * self.scale(adapter_name) * CB.T

    # Growth

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the adapter is active in this layer and takes gradients."""
        present = adapter_name in self._present(self.active_adapters) and not self.disable_adapters
        return present and self.triadaptlora_A[adapter_name].requires_grad

    def check_growable(self, adapter_name: str, name: str) -> None:
        if self.merged:
            raise RuntimeError(
                f"{name}: {', '.join(self.merged_adapters)} is merged into the base weight, and would grow into "
                "something else than what was merged. Call `unmerge_adapter` before `update_and_grow`."
            )
        size = self.size(adapter_name)
        if self.triadaptlora_A[adapter_name].shape != (size, self.in_features):
            raise RuntimeError(f"{name}: sharded parameters cannot grow. Train with DDP, or with full parameters.")

    def core_norm(self, adapter_name: str) -> torch.Tensor:
        """F, on the CPU, so that every process gets the same bits."""
        return norm(self.core(adapter_name).detach().cpu())

    def score(self, adapter_name: str, step: int) -> float:
        """By how much F has changed since the last call of this, which it remembers."""
        current, previous = self.core_norm(adapter_name), self.triadaptlora_norm[adapter_name]
        # In the dtype of what is remembered: `model.bfloat16()` rounds that, and an untouched core has to score zero.
        change = float(current.to(previous.dtype)) - float(previous)
        previous.copy_(current)
        self.triadaptlora_scored[adapter_name].fill_(step)
        return change

    @torch.no_grad()
    def activate(self, adapter_name: str, count: int, step: int, key: str) -> None:
        """Adds `count` ranks to the active ones, in place. They start anew, as AdamW's weight decay may have changed
        them: `key` seeds the private generator of their Gaussian entries."""
        A, B, L, U = (getattr(self, name)[adapter_name] for name in self.adapter_layer_names)
        r, size = self.rank(adapter_name), self.size(adapter_name)
        new, identity = slice(r, r + count), self.adapter_config[adapter_name].init == "identity"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        A[new] = STD * torch.randn(count, self.in_features, generator=generator).to(A)
        B[:, new] = 0 if identity else STD * torch.randn(self.out_features, count, generator=generator).to(B)
        L[new] = torch.eye(size)[new].to(L) if identity else 0
        U[:, new] = 0
        self.triadaptlora_since[adapter_name][new] = step
        self.triadaptlora_since.ranks[adapter_name] = r + count

    # Files

    def trim(self, adapter_name: str) -> None:
        """Drops the inactive ranks; the parameters are replaced."""
        r = self.rank(adapter_name)
        A, B, L, U = (getattr(self, name)[adapter_name] for name in self.adapter_layer_names)
        trimmed = (A[:r], B[:, :r], L[:r, :r], U[:r, :r])
        for name, old, tensor in zip(self.adapter_layer_names, (A, B, L, U), trimmed, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad)
        self.triadaptlora_since[adapter_name] = self.triadaptlora_since[adapter_name][:r].clone()
        self.adapter_config[adapter_name] = _fixed(self.adapter_config[adapter_name], r)

    def prepare_load(self, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Fits the tensors of a file that was allocated for another max_rank, where its active rank has room."""
        since = tensors.get("triadaptlora_since")
        if since is None or since.is_meta:
            return
        found, size = len(since) if since.ndim == 1 else 0, self.size(adapter_name)
        active = since >= 0
        r = int(active.sum())
        if not r or not active.reshape(-1)[:r].all():
            raise ValueError(f"triadaptlora_since: found {since.tolist()}, expected active ranks before inactive ones")
        if found == size or r > size:
            return
        for name, tensor in tensors.items():
            wanted = getattr(self, name)[adapter_name]
            pairs = list(zip(tensor.shape, wanted.shape, strict=False))
            if tensor.ndim == wanted.ndim and all(have in (want, found) for have, want in pairs):
                common = tuple(slice(min(pair)) for pair in pairs)
                fitted = tensor.new_full(wanted.shape, -1 if name == "triadaptlora_since" else 0)
                fitted[common] = tensor[common]
                tensors[name] = fitted


def plot_ranks(
    history: Sequence[Mapping[str, Any]], path: str | Path, adapter_name: str | None = None, dpi: int = 150
) -> None:
    """Writes a picture (PNG, or what the suffix of `path` says) of how the rank of each module grew over the steps.

    Args:
        history: `model.base_model.rank_history()`, or a Trainer's `state.log_history`; other entries are ignored.
        path: the file to write.
        adapter_name: which adapter; default: that of the first entry.

    Raises:
        ValueError: `history` says nothing about ranks.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = [e for e in history if "triadaptlora_ranks" in e and e["adapter"] == (adapter_name or e["adapter"])]
    entries = [e for e in entries if e["adapter"] == entries[0]["adapter"]]
    if not entries:
        raise ValueError(
            "The history has no ranks of a TriAdaptLoRA adapter. Pass `model.base_model.rank_history()`, or "
            "`trainer.state.log_history` of a training with `TriAdaptCallback`."
        )
    steps = [e["step"] for e in entries]
    names = list(entries[0]["triadaptlora_ranks"])
    ranks = [[e["triadaptlora_ranks"][name] for e in entries] for name in names]
    end = max([e["step"] for e in history if "step" in e])
    edges = [*steps, max(end, steps[-1] + max(1, steps[-1] // len(steps)))]
    figure = Figure(figsize=(8, 1.5 + 0.2 * len(names)), layout="constrained")
    axes = figure.add_subplot(title="Active rank", xlabel="optimizer step", yticks=[i + 0.5 for i in range(len(names))])
    axes.set_yticklabels(names, fontsize=7)
    mesh = axes.pcolormesh(edges, list(range(len(names) + 1)), ranks, cmap="viridis", vmin=0)
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    figure.savefig(path, dpi=dpi)
