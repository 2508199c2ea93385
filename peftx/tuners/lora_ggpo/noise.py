"""The noise on a weight, made again from its seed in the backward pass, and the norms that shape it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...adapters.products import at_least_fp32, autocasted

BLOCK = 2**22  # elements of the noise that exist at a time


def gradient_row_norms2(
    A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, scale: float
) -> torch.Tensor:
    """||scale (B grad_A + grad_B A)||^2 of each row, (..., out_features): what LoRA's gradients show of a weight's."""
    U, V = torch.cat([B, grad_B], dim=-1), torch.cat([grad_A, A], dim=-2)
    return (scale**2 * ((U @ (V @ V.mT)) * U).sum(dim=-1)).clamp(min=0)


def draw(seed: int, rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Standard normal numbers (rows, columns), fp32, in blocks of rows; the same for the same seed and device type."""
    generator = torch.Generator(device).manual_seed(seed)
    size = max(1, BLOCK // columns)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        yield block, torch.empty(block.stop - start, columns, device=device).normal_(generator=generator)


class NoisyOutput(torch.autograd.Function):
    """`result` + x eps^T for a base layer whose weight cannot be read cheaply; eps = diag(tau) draw(seed)."""

    @staticmethod
    def forward(ctx, result, x, tau, seed):
        ctx.seed, ctx.columns, ctx.dtype = seed, x.shape[-1], x.dtype
        ctx.save_for_backward(tau)
        result = result.clone()
        for rows, noise in draw(seed, len(tau), x.shape[-1], x.device):
            result[..., rows] += (F.linear(x, noise.to(x.dtype)) * tau[rows].to(x.dtype)).to(result.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (tau,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return g, None, None, None
        scaled, grad_x = g.to(ctx.dtype) * tau.to(ctx.dtype), 0
        with torch.autocast(g.device.type, enabled=False):
            for rows, noise in draw(ctx.seed, len(tau), ctx.columns, g.device):
                grad_x = grad_x + scaled[..., rows] @ noise.to(ctx.dtype)
        return g, grad_x, None, None


class NoisyLinear(torch.autograd.Function):
    """x (W + eps)^T + bias with a frozen W; eps = diag(tau) draw(seed). One product, where x eps^T were a second."""

    @staticmethod
    def forward(ctx, x, weight, bias, tau, seed):
        ctx.seed, ctx.dtype = seed, x.dtype
        ctx.save_for_backward(weight, tau)
        parts = [
            F.linear(x, noisy, None if bias is None else bias[rows]) for rows, noisy in _perturbed(ctx, weight, tau)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_x = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                parts = (g[..., rows] @ noisy for rows, noisy in _perturbed(ctx, *ctx.saved_tensors))
                grad_x = next(parts)
                for part in parts:
                    grad_x += part
            if ctx.needs_input_grad[2]:
                grad_bias = g.reshape(-1, g.shape[-1]).sum(dim=0)
        return grad_x, None, grad_bias, None, None


def _perturbed(ctx: Any, weight: torch.Tensor, tau: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows, noise in draw(ctx.seed, weight.shape[0], weight.shape[1], weight.device):
        part = at_least_fp32(weight[rows])
        yield rows, torch.addcmul(part, noise.to(part.dtype), tau[rows, None].to(part.dtype)).to(ctx.dtype)


@torch.compiler.disable
def noisy_output(result: torch.Tensor, x: torch.Tensor, tau: torch.Tensor, seed: int) -> torch.Tensor:
    return NoisyOutput.apply(result, autocasted(x), tau, seed)
