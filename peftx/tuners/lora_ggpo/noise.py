"""The noise on a weight, made again from its seed in the backward pass, and the norms that shape it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...adapters.products import at_least_fp32

BLOCK = 2**22  # elements of the noise that exist at a time


def gradient_row_norms2(
    A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, scale: float
) -> torch.Tensor:
    """||scale (B grad_A + grad_B A)||^2 of each row, (..., out_features): what LoRA's gradients show of a weight's."""
    U, V = torch.cat([B, grad_B], dim=-1), torch.cat([grad_A, A], dim=-2)
    return (scale**2 * ((U @ (V @ V.mT)) * U).sum(dim=-1)).clamp(min=0)


def opaque(like: Callable[..., torch.Tensor]) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Decorator: `torch.compile` takes the call as one node of its graph, whose output is as that of `like`.

    What draws numbers, or asks for the step, is seen by no compiler then, and does the same as without one.
    """

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        op = torch.library.custom_op(
            f"peftx::{function.__name__}", function, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
        )
        op.register_fake(like)

        @wraps(function)
        def call(*args: Any) -> torch.Tensor:
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return decorate


@opaque(lambda clock, name, per_micro: clock.new_empty(()))
def noise_seed(clock: torch.Tensor, name: str, per_micro: bool) -> torch.Tensor:
    """The seed () of a name's noise in this step and micro-batch (`clock`) and process, on the CPU."""
    step, micro = clock.tolist()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    text = f"{name}/{step}/{micro if per_micro else 0}/{rank}"
    return torch.tensor(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()), device="cpu")


@opaque(lambda tau, clock, total_step: torch.empty_like(tau))
def ramped(tau: torch.Tensor, clock: torch.Tensor, total_step: int) -> torch.Tensor:
    """`tau` times the cosine ramp's factor at this step."""
    return ramp(int(clock[0]), total_step) * tau


def ramp(step: int, total_step: int) -> float:
    return 0.5 * (1 - math.cos(math.pi * min(1.0, step / total_step)))


def draw(seed: torch.Tensor, rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Standard normal numbers (rows, columns), fp32, in blocks of rows; the same for the same seed and device type."""
    generator = torch.Generator(device).manual_seed(int(seed))
    size = max(1, BLOCK // columns)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        yield block, torch.empty(block.stop - start, columns, device=device).normal_(generator=generator)


@opaque(lambda x, tau, seed: x.new_empty(*x.shape[:-1], len(tau)))
def noise_forward(x: torch.Tensor, tau: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """x eps^T (..., out_features) for eps = diag(tau) draw(seed), in the dtype of x."""
    blocks = draw(seed, len(tau), x.shape[-1], x.device)
    return _joined([F.linear(x, noise.to(x.dtype)) * tau[rows].to(x.dtype) for rows, noise in blocks])


@opaque(lambda g, tau, seed, columns: g.new_empty(*g.shape[:-1], columns))
def noise_backward(g: torch.Tensor, tau: torch.Tensor, seed: torch.Tensor, columns: int) -> torch.Tensor:
    """g eps (..., columns)."""
    scaled = g * tau.to(g.dtype)
    return _summed(scaled[..., rows] @ noise.to(g.dtype) for rows, noise in draw(seed, len(tau), columns, g.device))


@opaque(lambda x, weight, bias, tau, seed: x.new_empty(*x.shape[:-1], len(tau)))
def noisy_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tau: torch.Tensor, seed: torch.Tensor
) -> torch.Tensor:
    """x (W + eps)^T + bias (..., out_features)."""
    parts = _perturbed(weight, tau, seed, x.dtype)
    return _joined([F.linear(x, noisy, None if bias is None else bias[rows]) for rows, noisy in parts])


@opaque(lambda g, weight, tau, seed: g.new_empty(*g.shape[:-1], weight.shape[1]))
def noisy_backward(g: torch.Tensor, weight: torch.Tensor, tau: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """g (W + eps) (..., in_features)."""
    return _summed(g[..., rows] @ noisy for rows, noisy in _perturbed(weight, tau, seed, g.dtype))


def _perturbed(
    weight: torch.Tensor, tau: torch.Tensor, seed: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows, noise in draw(seed, weight.shape[0], weight.shape[1], weight.device):
        part = at_least_fp32(weight[rows])
        yield rows, torch.addcmul(part, noise.to(part.dtype), tau[rows, None].to(part.dtype)).to(dtype)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _summed(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


class NoisyOutput(torch.autograd.Function):
    """`result` + x eps^T for a base layer whose weight cannot be read cheaply; eps = diag(tau) draw(seed)."""

    @staticmethod
    def forward(ctx, result, x, tau, seed):
        ctx.columns, ctx.dtype = x.shape[-1], x.dtype
        ctx.save_for_backward(tau, seed)
        return result + noise_forward(x, tau, seed).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if not ctx.needs_input_grad[1]:
            return g, None, None, None
        with torch.autocast(g.device.type, enabled=False):
            return g, noise_backward(g.to(ctx.dtype), *ctx.saved_tensors, ctx.columns), None, None


class NoisyLinear(torch.autograd.Function):
    """x (W + eps)^T + bias with a frozen W; eps = diag(tau) draw(seed). One product, where x eps^T were a second."""

    @staticmethod
    def forward(ctx, x, weight, bias, tau, seed):
        ctx.save_for_backward(weight, tau, seed)
        return noisy_forward(x, weight, bias, tau, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_x = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = noisy_backward(g, *ctx.saved_tensors)
            if ctx.needs_input_grad[2]:
                grad_bias = g.reshape(-1, g.shape[-1]).sum(dim=0)
        return grad_x, None, grad_bias, None, None
