"""bitsandbytes' fused 8-bit step, on states of the same format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .blockwise import code_book
from .moments import Rule, Segment, segments
from .rounding import write
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


def fused_step(
    p: torch.Tensor, state: Mapping[str, Any], rule: Rule, lr: float, weight_decay: float, seed: int | None
) -> None:
    """The kernel's step, rounded stochastically if there is a seed: it then moves fp32 copies, piece by piece."""
    books = [code_book(signed, p.device).values for signed in (True, False)]
    whole = Segment(p.grad.view(-1), tuple(x.view(-1) for x in moments(state)), p.detach().view(-1))  # type: ignore[union-attr]
    pieces = [whole] if seed is None else segments(*whole[:4], seed)
    for gradient, (m, v, *absmax), target, _, own in pieces:
        weight = target if own is None else target.float()
        bitsandbytes_update()(  # type: ignore[misc]
            "adam", gradient.to(weight.dtype), weight, m, v, rule.beta1, rule.beta2, 0.0, 0.0, rule.eps, rule.age, lr,
            *books, *absmax, weight_decay, 1.0, False,
        )  # fmt: skip
        if own is not None:
            write(target, weight, own)
