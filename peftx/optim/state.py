"""What a parameter's state holds: tensors and one int.

`step`, the steps it has made; `exp_avg` and `exp_avg_sq`, the moments, of the parameter's shape or, projected, of shape
(rank, long); if these are codes (uint8), `exp_avg_absmax` and `exp_avg_sq_absmax`, one fp32 number per block; if the
gradient is projected, `basis` (short, rank); for APOLLO `norm`, of the last update (0-dim).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from . import projection
from .blockwise import BLOCK, dequantize, quantize

MOMENTS = ("exp_avg", "exp_avg_sq")
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def is_projected(p: torch.Tensor, group: Mapping[str, Any]) -> bool:
    return group["rank"] is not None and p.dim() == 2 and p.numel() > 0


def layout(p: torch.Tensor, group: Mapping[str, Any]) -> Layout:
    """Shape and dtype of every tensor in a parameter's state."""
    shape, dtype = tuple(p.shape), working_dtype(p.dtype)
    found: Layout = {}
    if is_projected(p, group):
        shape = projection.projected_shape(p.shape, group["rank"])
        found["basis"] = ((min(p.shape), shape[0]), torch.bfloat16 if group["basis_bits"] == 16 else dtype)
        if group["update"] == "apollo":
            found["norm"] = ((), dtype)
    size = math.prod(shape)
    if group["optim_bits"] == 32 or size < max(1, group["min_8bit_size"]):
        return found | dict.fromkeys(MOMENTS, (shape, dtype))
    blocks = (math.ceil(size / BLOCK),)
    codes: Layout = dict.fromkeys(MOMENTS, (shape, torch.uint8))
    return found | codes | {f"{key}_absmax": (blocks, torch.float32) for key in MOMENTS}


def moments(state: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """(m, v), followed by their absmax if they are 8-bit."""
    return tuple(state[key] for key in (*MOMENTS, *(f"{key}_absmax" for key in MOMENTS)) if key in state)


def read_moment(state: Mapping[str, Any], key: str) -> torch.Tensor:
    """`"exp_avg"` or `"exp_avg_sq"` of a parameter's state in fp32 (fp64), whatever its width."""
    absmax = state.get(f"{key}_absmax")
    return state[key] if absmax is None else dequantize(state[key], absmax, signed=key == "exp_avg")


def write_moment(state: Mapping[str, Any], key: str, value: torch.Tensor) -> None:
    if f"{key}_absmax" in state:
        value, absmax = quantize(value, signed=key == "exp_avg")
        state[f"{key}_absmax"].copy_(absmax)
    state[key].copy_(value)
