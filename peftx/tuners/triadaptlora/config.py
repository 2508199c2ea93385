"""The settings of TriAdaptLoRA, and the schedule of its growth."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.utils.other import get_pattern_key

from ...adapters import AdapterConfig, Number


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
    are: the start of the core, L = I and U = 0 (the code: L = U = I, a core of 2 I); F_l divided by the rank (the code:
    by the number of blocks that were added, which is the rank where they are single); no penalty on factors that are
    not orthonormal (the code: 0.5, see `orth_reg_weight`); shells of single ranks whatever `growth_size`; the constant
    s, so that a growth changes no output (the code has a constant 2 or, earlier, lora_alpha / r:
    `scale_by_current_rank`); new ranks that start as the first did; a budget that is never exceeded; ties broken by the
    order of the modules; the defaults of `init_warmup` and `growth_interval`, which are the 100 steps of IncreLoRA's
    code for small tasks, at 3000 steps.

    The backward of a linear layer is written by hand: it has no second derivative.

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
        orth_reg_weight: factor of the penalty that the callback adds, the mean over all A and B of ||A A^T - I||_F and
            ||B^T B - I||_F at their active ranks. Default 0, no penalty; the author's code has 0.5, which was not
            better on SST-2 (MiniLM, five seeds: lower mean, not told apart). Its gradient is added after clipping;
            sharded parameters are refused.
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
    orth_reg_weight: Number = field(
        default=0.0, metadata={"help": "Factor of the penalty on factors that are not orthonormal."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of modules (name or regex) that do not grow."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the Gaussian entries of new ranks."})

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
        if self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight` must not be negative, got {self.orth_reg_weight}.")
        if not 0 < self.growth_end <= 1:
            raise ValueError(f"`growth_end` must be in (0, 1], got {self.growth_end}.")
        if self.total_step is not None:
            self.check_total_step(self.total_step)

    def check_total_step(self, total_step: int) -> None:
        if self.init_warmup is not None and total_step <= self.init_warmup:
            raise ValueError(
                f"init_warmup={self.init_warmup} leaves none of the total_step={total_step} optimizer steps for "
                "growth. Lower `init_warmup` (and `growth_interval`), or train for longer."
            )
        planned = copy.copy(self)
        planned.total_step = total_step
        first = (planned.warmup // planned.interval + 1) * planned.interval
        if not planned.is_due(first):
            raise ValueError(
                f"No rank would ever grow: the first growth would come after optimizer step {first} "
                f"(growth_interval={planned.interval}, init_warmup={planned.warmup}), but growth ends at step "
                f"{self.growth_end * total_step:g} (total_step={total_step}, growth_end={self.growth_end}). Lower "
                "`growth_interval` or `init_warmup`, or train for longer."
            )

    def for_module(self, key: str) -> TriAdaptLoRAConfig:
        match = get_pattern_key(list(self.rank_pattern), key)
        return fixed(self, self.rank_pattern[match]) if match in self.rank_pattern else self

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


def fixed(config: Any, rank: int) -> Any:
    """A copy of `config` for a module whose rank is `rank` and stays. (The average that checks refer to is another.)"""
    config = copy.copy(config)
    config.init_r = config.max_rank = rank
    return config
