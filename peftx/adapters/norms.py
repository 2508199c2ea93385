"""Norms of the rows of weights, without building what is added to them, and layers whose rows have given norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .products import accumulate, at_least_fp32, input_gradient, times, uncast


def row_norms2(weight: torch.Tensor) -> torch.Tensor:
    """||W||^2 of each row (..., out_features)."""
    # The sum is five times slower where rows lie in memory one after the other, the norm ten times where columns do.
    if weight.stride(-1) == 1:
        return torch.linalg.vector_norm(weight, dim=-1).square()
    return weight.square().sum(dim=-1)


def weight_row_norms2(
    base: torch.Tensor, cross: torch.Tensor | float, A: torch.Tensor, B: torch.Tensor, scale: float
) -> torch.Tensor:
    """||W + scale B A||^2 of each row (..., out_features), from ||W||^2 and W A^T (..., out_features, r) or 0."""
    return _with_delta(base, _inner(cross, A, B, scale), B, scale).clamp(min=0)


def _inner(cross: torch.Tensor | float, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """(2 W + scale B A) A^T, (..., out_features, r)."""
    gram = A @ A.mT
    return _plus(cross, B, gram, 2, scale) if isinstance(cross, torch.Tensor) else scale * (B @ gram)


def _with_delta(base: torch.Tensor, inner: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    rows, r = base.reshape(-1, 1, 1), B.shape[-1]
    return torch.baddbmm(rows, B.reshape(-1, 1, r), inner.reshape(-1, r, 1), alpha=scale).view(base.shape)


def _plus(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """`beta c + alpha a b`, of matrices or of stacks of them."""
    return (torch.addmm if a.ndim == 2 else torch.baddbmm)(c, a, b, beta=beta, alpha=alpha)


def cross_product(A: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """W A^T, (..., out_features, r), in A's dtype."""
    return (A @ weight.to(A.dtype).mT).mT  # a third faster than the other way round


class RowNorms(torch.autograd.Function):
    """||W + scale B A|| of each row (..., out_features), from ||W||^2 and W A^T, with the gradients of A and B.

    Where W and scale B A cancel, what is left is rounding: no norm is below the root of eps times that of W's row, and
    there it has no gradient. W is read `again` for the backward, if that is given, and otherwise kept.
    """

    @staticmethod
    def forward(ctx, A, B, base, cross, scale: float, weight, again: Callable[[], torch.Tensor] | None):
        inner = _inner(cross, A, B, scale)
        norms2, least = _with_delta(base, inner, B, scale), torch.finfo(base.dtype).eps * base
        norms = torch.maximum(norms2, least).sqrt_()
        ctx.scale, ctx.again = scale, again
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(A, B, inner, cross, norms, norms2 <= least, None if again else weight)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        A, B, inner, cross, norms, stuck, weight = ctx.saved_tensors
        g = (g * ctx.scale / norms).masked_fill_(stuck, 0)[..., None]
        grad_A = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_B = g * (inner - cross)
        if ctx.needs_input_grad[0]:
            weight, rows = ctx.again() if ctx.again else weight, (g * B).mT
            grad_A = _plus(rows @ weight.to(A.dtype), rows @ B, A, 1, ctx.scale)
        return grad_A, grad_B, None, None, None, None, None


class Rescaled(torch.autograd.Function):
    """diag(m / norms) (W + scale B A) x + bias, from `result` = W x + bias; rows of norm 0 are not rescaled.

    Shapes: result (..., out_features), x (..., in_features), m, norms and bias (out_features,). `weight` is as for
    `low_rank`.
    """

    @staticmethod
    def forward(ctx, result, x, A, B, m, norms, scale: float, bias, weight):
        zero, divisor = norms == 0, norms.to(m.dtype)  # rounded as m once was, so that c is 1 at the start
        c = at_least_fp32(m / divisor).masked_fill_(zero, 1)
        down, up = A.to(x.dtype), torch.mul(B.T, scale, out=B.new_empty(B.shape[::-1])).to(result.dtype)
        h = F.linear(x, down)
        y = accumulate(result, h, up)
        ctx.scale, ctx.dtypes = scale, (A.dtype, B.dtype)
        found = (y, divisor, zero, bias) if any(ctx.needs_input_grad[4:6]) else (None, None, None, None)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, down, up, c, weight, *found)
        return scale_rows(y, c, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, h, down, up, c, weight, y, divisor, zero, bias = ctx.saved_tensors
        _, to_x, to_A, to_B, to_m, to_norms, _, to_bias, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_m = grad_norms = grad_bias = None
        flat = g.reshape(-1, g.shape[-1])
        with uncast(g):
            if to_m or to_norms or to_bias:
                wide = flat.to(c.dtype)
                total = wide.sum(0) if bias is not None else None
            if to_m or to_norms:
                along = (wide * y.reshape(flat.shape)).sum(0)
                if total is not None:
                    along = torch.addcmul(along, total, bias.to(c.dtype), value=-1)
                grad_m = (along / divisor).masked_fill_(zero, 0)
                grad_norms = -grad_m * c if to_norms else None
            if to_bias:
                grad_bias = (1 - c) * total
            scaled = torch.mul(flat, c, out=torch.empty_like(flat))
            if to_x or to_A:
                inner = F.linear(scaled, up).to(h.dtype)
            if to_x:
                grad_x = input_gradient(scaled, inner, down, weight).view(*g.shape[:-1], down.shape[1])
            if to_A:
                grad_A = (inner.T @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
            if to_B:
                grad_B = h.reshape(-1, len(down)).to(flat.dtype).T @ scaled
                grad_B = times(grad_B.to(ctx.dtypes[1]).T, ctx.scale)
        grad_result = None if weight is not None else scaled.view(g.shape)
        return grad_result, grad_x, grad_A, grad_B, grad_m, grad_norms, None, grad_bias, None


def scale_rows(result: torch.Tensor, c: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The output `result` = W x + bias, (..., out_features), as that of diag(c) W with the same bias."""
    scaled = result * c if bias is None else torch.addcmul((1 - c) * bias, result, c)
    return scaled.to(result.dtype)
