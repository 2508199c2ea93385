"""What is refused, before anything has changed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import projection
from .fused import bitsandbytes_update
from .state import layout

OPTIONS = {
    *("lr", "betas", "eps", "weight_decay", "rank", "update_proj_gap", "scale", "proj_refresh", "refresh_moments"),
    *("update", "optim_bits", "min_8bit_size", "basis_bits", "fused", "skipped_steps"),
}
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")
UPDATES = ("galore", "apollo", "frugal-sign", "frugal-sgd")


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError for the first hyperparameter of a group that is out of its range."""

    def number(value: Any, low: float, high: float = math.inf) -> bool:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) < high

    def whole(value: Any, low: int) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= low

    betas, rank = group["betas"], group["rank"]
    pair = isinstance(betas, Sequence) and len(betas) == 2
    lr = group["lr"].item() if isinstance(group["lr"], torch.Tensor) else group["lr"]
    rules = {
        "lr": (number(lr, 0), "at least 0"),
        "betas": (pair and all(number(beta, 0, 1) for beta in betas), "two numbers, at least 0, below 1"),
        "eps": (number(group["eps"], 0), "at least 0"),
        "weight_decay": (number(group["weight_decay"], 0), "at least 0"),
        "rank": (
            rank is None or whole(rank, 1) or (rank and number(rank, 0, 1)),
            "None, a whole number >= 1, or a share",
        ),
        "update_proj_gap": (whole(group["update_proj_gap"], 1), "a whole number, at least 1"),
        "scale": (number(group["scale"], 0), "at least 0"),
        "optim_bits": (group["optim_bits"] in (8, 32), "8 or 32"),
        "basis_bits": (group["basis_bits"] in (16, 32), "16 or 32"),
        "min_8bit_size": (whole(group["min_8bit_size"], 0), "a whole number, at least 0"),
        "fused": (group["fused"] in (None, True, False), "None, True or False"),
        "skipped_steps": (whole(group["skipped_steps"], 0), "a whole number, at least 0"),
    }
    choices = {
        "proj_refresh": projection.REFRESH,
        "refresh_moments": ("keep", "rotate", "reset"),
        "update": UPDATES,
    }
    rules |= {key: (group[key] in names, "one of " + ", ".join(names)) for key, names in choices.items()}
    for key, (fine, wanted) in rules.items():
        if not fine:
            raise ValueError(f"{key} must be {wanted}, not {group[key]!r}")
    if group["fused"] and bitsandbytes_update() is None:
        raise ImportError("fused=True needs bitsandbytes: pip install bitsandbytes")


def as_python(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with NumPy's numbers as Python's, which `torch.load(weights_only=True)` reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        return value.item() if isinstance(value, numbers.Real) and hasattr(value, "item") else value

    return {key: plain(value) if key in OPTIONS else value for key, value in options.items()}


def check_parameter(p: Any) -> None:
    if not isinstance(p, torch.Tensor):
        raise TypeError(f"parameters must be tensors, not {type(p).__name__}")
    if not p.is_floating_point():
        raise ValueError(f"parameters must be real floating-point tensors, not {p.dtype}")
    if hasattr(p, "device_mesh"):
        raise NotImplementedError("parameters sharded as DTensor (FSDP2) are not supported by LowRankAdamW")


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
    if not isinstance(state["step"], int) or state["step"] < 0:
        raise ValueError(f"{where}: step must be a whole number, at least 0, not {state['step']!r}")
    for key, (shape, dtype) in wanted.items():
        value = state[key]
        if not isinstance(value, torch.Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{where}: {key} must be {shape} {dtype}, not {found}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{where}: {key} has values that are not finite")
