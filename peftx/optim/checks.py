"""What is refused, before anything has changed."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import projection
from .fused import bitsandbytes_update
from .state import layout

LARGEST = 1e38  # numbers have to be finite in fp32, in which the arithmetic is
SMALLEST = 1e-30  # of eps: below it, an element that never had a gradient would become 0 / 0
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")
UPDATES = ("galore", "apollo", "frugal-sign", "frugal-sgd")
REFRESH_MOMENTS = ("keep", "rotate", "reset")


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError for the first hyperparameter of a group that is not of its type or out of its range."""
    for key in RULES:
        check_option(key, group[key])
    if group["fused"] and bitsandbytes_update() is None:
        raise ImportError("fused=True needs bitsandbytes: pip install bitsandbytes")


def check_option(key: str, value: Any) -> None:
    fine, wanted = RULES[key]
    if not fine(value):
        raise ValueError(f"{key} must be {wanted}, not {value!r}")


def number(low: float, high: float = LARGEST, strict: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a real number, no bool, of at least `low` (`strict`: above it) and below `high`."""

    def fine(value: Any) -> bool:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and (low < value if strict else low <= value) and value < high

    return fine


def whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= low


def one_of(*choices: Any) -> Callable[[Any], bool]:
    """Whether a value is one of `choices`, and of its type: True is not 1, and 8.0 is not 8."""
    return lambda value: any(is_kind(value, type(choice)) and value == choice for choice in choices)


def is_kind(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def is_rate(value: Any) -> bool:
    """A learning rate may be a tensor, which schedules of torch.compile change in place."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.dtype.is_floating_point and number(0)(value.item())
    return number(0)(value)


def is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(number(0, 1), value))


def is_rank(value: Any) -> bool:
    return value is None or whole(1)(value) or number(0, 1, strict=True)(value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (is_rate, "a finite number, at least 0"),
    "betas": (is_pair, "two numbers, at least 0, below 1"),
    "eps": (number(SMALLEST), f"a finite number, at least {SMALLEST:g}"),
    "weight_decay": (number(0), "a finite number, at least 0"),
    "rank": (is_rank, "None, a whole number, at least 1, or a share, above 0, below 1"),
    "update_proj_gap": (whole(1), "a whole number, at least 1"),
    "scale": (number(0), "a finite number, at least 0"),
    "proj_refresh": (one_of(*projection.REFRESH), "one of " + ", ".join(projection.REFRESH)),
    "refresh_moments": (one_of(*REFRESH_MOMENTS), "one of " + ", ".join(REFRESH_MOMENTS)),
    "update": (one_of(*UPDATES), "one of " + ", ".join(UPDATES)),
    "optim_bits": (one_of(8, 32), "8 or 32"),
    "min_8bit_size": (whole(0), "a whole number, at least 0"),
    "basis_bits": (one_of(16, 32), "16 or 32"),
    "fused": (one_of(None, True, False), "None, True or False"),
    "bf16_stochastic_round": (one_of(True, False), "True or False"),
    "skipped_steps": (whole(0), "a whole number, at least 0"),
    "rounded_steps": (whole(0), "a whole number, at least 0"),
}
OPTIONS = set(RULES)
LATER = ("bf16_stochastic_round", "rounded_steps")  # state dicts of peftx 0.1 do not know them


def check_schedule(group: Mapping[str, Any]) -> None:
    """The same, every step, for what schedules change."""
    for key in ("lr", "betas", "weight_decay"):
        check_option(key, group[key])


def as_python(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with all numbers, NumPy's or fractions, as Python's, which `torch.load(weights_only=True)` reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return value
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    return {key: plain(value) if key in OPTIONS else value for key, value in options.items()}


def check_parameter(p: Any) -> None:
    if not isinstance(p, torch.Tensor):
        raise TypeError(f"parameters must be tensors, not {type(p).__name__}")
    if not p.is_floating_point():
        raise ValueError(f"parameters must be real floating-point tensors, not {p.dtype}")
    if hasattr(p, "device_mesh"):
        raise NotImplementedError(
            "LowRankAdamW cannot train parameters sharded as DTensor (FSDP2): a projection needs the whole gradient, "
            "and states quantised in blocks of each shard could not be put together again. Use DDP, FSDP1 without a "
            "rank, or torch.optim.AdamW."
        )


def check_names(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if both groups know their parameters' names and these differ in more than wrappers."""
    for theirs, ours in zip(found.get("param_names", ()), wanted.get("param_names", ()), strict=False):
        if _bare(theirs) != _bare(ours):
            raise ValueError(f"the state dict has a state of {theirs!r} where the optimizer has {ours!r}")


def _bare(name: str) -> str:
    """A parameter's name in the model that torch.compile, DDP or FSDP wraps."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_state(state: Any, p: torch.Tensor, group: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless `state` is, in keys, shapes, dtypes and finiteness, one of `p` under `group`."""
    wanted = layout(p, group)
    if not isinstance(state, Mapping) or state.keys() != wanted.keys() | {"step"}:
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{where}: expected {sorted(wanted.keys() | {'step'})}, found {found}")
    if not whole(0)(state["step"]):
        raise ValueError(f"{where}: step must be a whole number, at least 0, not {state['step']!r}")
    for key, (shape, dtype) in wanted.items():
        value = state[key]
        if not isinstance(value, torch.Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{where}: {key} must be {shape} {dtype}, not {found}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{where}: {key} has values that are not finite")
