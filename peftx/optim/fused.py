"""bitsandbytes' fused 8-bit step, on states of the same format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .blockwise import code_book
from .moments import Rule
from .state import is_projected, moments


@functools.cache
def bitsandbytes_update() -> Callable[..., None] | None:
    """bitsandbytes' fused 8-bit optimizer, None where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    return torch.ops.bitsandbytes.optimizer_update_8bit_blockwise


def fusable(p: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes' kernel, which checks nothing itself, can make this step."""
    wanted = p.is_cuda if group["fused"] is None else group["fused"]
    return (
        wanted
        and not is_projected(p, group)
        and state["exp_avg"].dtype == torch.uint8
        and p.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and p.grad.dtype == p.dtype  # type: ignore[union-attr]
        and p.is_contiguous()
        and p.grad.is_contiguous()  # type: ignore[union-attr]
        and p.numel() < 2**31
        and bitsandbytes_update() is not None
    )


def fused_step(p: torch.Tensor, state: Mapping[str, Any], rule: Rule, lr: float, weight_decay: float) -> None:
    m, v, *absmax = (moment.view(-1) for moment in moments(state))
    books = [code_book(signed, p.device).values for signed in (True, False)]
    bitsandbytes_update()(  # type: ignore[misc]
        "adam", p.grad.view(-1), p.view(-1), m, v, rule.beta1, rule.beta2, 0.0, 0.0, rule.eps, rule.age, lr,  # type: ignore[union-attr]
        *books, *absmax, weight_decay, 1.0, False,
    )  # fmt: skip
