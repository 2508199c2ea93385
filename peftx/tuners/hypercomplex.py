"""Products with parameterised hypercomplex matrices H = sum_i kron(rule[i], s[i] @ t[i]) of shape (p, q).

H is never built: the rule is folded into the factor of the narrow side, n^2 k values for each of its columns. Shapes:
rule (n, n, n), s (n, p/n, k), t (n, k, q/n).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..adapters.products import product, transformed


def down_factors(rule: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where p is the wide side: `wide` (n k, p/n) and `narrow` (q, n n k), with which x H is, for the n parts of x,
    `wide` times each, and `narrow` times all of these."""
    wide = s.transpose(1, 2).flatten(0, 1)  # row-major: three times as fast as its transpose
    return wide, _folded(rule.permute(2, 1, 0), t.permute(2, 0, 1))


def up_factor(rule: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Where q is the wide side: `narrow` (p, n n k), with which x H is the n parts of `x @ narrow`, each times
    t.flatten(0, 1), side by side."""
    return _folded(rule.permute(1, 2, 0), s.transpose(0, 1))


def _folded(rule: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The products (a u, b n k) of a rule (a, b, n) and a factor (u, n, k)."""
    rule, factor = rule[:, None, :, :, None], factor[None, :, None]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        found = rule * factor
    else:  # laid out so that nothing has to be copied below
        found = rule.new_empty(torch.broadcast_shapes(rule.shape, factor.shape))
        found = torch.mul(rule, factor, out=found)
    return found.flatten(2).flatten(0, 1)


def _unfolded(
    g: torch.Tensor, order: tuple[int, ...], rule: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `rule` and `factor`, whose products have the gradient `g`, of five axes here; in this `order`
    these are those of `rule` and the last ones of `factor`."""
    n = len(rule)
    g = g.permute(order).reshape(n, n * n, -1)
    return torch.bmm(g, factor.reshape(n, -1, 1)).view(rule.shape), torch.bmm(rule.reshape(n, 1, -1), g).view(
        factor.shape
    )


class Down(torch.autograd.Function):
    """`x` itself, and x H + bias for the wide x (..., p), (..., q), in the dtype of the factors."""

    @staticmethod
    def forward(ctx, x, rule, s, t, bias):
        wide, narrow = down_factors(rule, s, t)
        wide = wide.to(x.dtype)
        z = F.linear(x.unflatten(-1, (len(rule), -1)), wide).flatten(-2).to(narrow.dtype)
        ctx.save_for_backward(x, z, wide, narrow, rule, t)
        ctx.k = s.shape[-1]
        return x.view_as(x), F.linear(z, narrow, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_out):
        x, z, wide, narrow, rule, t = ctx.saved_tensors
        to_x, to_rule, to_s, to_t, to_bias = ctx.needs_input_grad
        n, k, parts = len(rule), ctx.k, wide.shape[-1]
        grad_rule = grad_s = grad_t = None
        flat, rows = g_out.reshape(-1, g_out.shape[-1]), x.reshape(-1, parts)
        if to_x or to_s:
            inner = (flat @ narrow).to(x.dtype).view(-1, n * k)
        if to_x:
            g = torch.addmm(g.reshape(-1, parts), inner, wide).view(x.shape)
        if to_s:
            grad_s = (inner.T @ rows).to(narrow.dtype).view(n, k, parts).transpose(1, 2)
        if to_rule or to_t:
            folded = (flat.T @ z.reshape(-1, z.shape[-1])).view(n, -1, n, n, k)
            grad_rule, grad_t = _unfolded(folded, (3, 2, 0, 4, 1), rule, t)
        return g, grad_rule, grad_s, grad_t if to_t else None, flat.sum(0) if to_bias else None


class Up(torch.autograd.Function):
    """`result` + scale (x H + bias) for the narrow x (..., p), in the dtype of the wide `result` (..., q)."""

    @staticmethod
    def forward(ctx, result, x, rule, s, t, bias, scale: float):
        narrow, wide = up_factor(rule, s), t.flatten(0, 1).to(result.dtype)
        z = (x @ narrow).to(result.dtype).view(-1, len(wide))
        ctx.scale = scale
        ctx.save_for_backward(x, z, wide, narrow, rule, s)
        if bias is None:
            y = torch.addmm(result.reshape(-1, wide.shape[-1]), z, wide, alpha=scale)
            return torch.ops.aten._unsafe_view(y, result.shape)  # no view: see `accumulate`
        flat = result.reshape(-1, len(bias)).contiguous()
        y = torch.add(flat, bias.to(flat.dtype), alpha=scale)
        y.view(-1, wide.shape[-1]).addmm_(z, wide, alpha=scale)
        return torch.ops.aten._unsafe_view(y, result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, z, wide, narrow, rule, s = ctx.saved_tensors
        _, to_x, to_rule, to_s, to_t, to_bias, _ = ctx.needs_input_grad
        n, parts = len(rule), wide.shape[-1]
        grad_x = grad_rule = grad_s = grad_t = grad_bias = None
        rows, own = g.reshape(-1, parts), x.reshape(-1, x.shape[-1])
        inner = product(rows, wide.T, ctx.scale).to(narrow.dtype).view(-1, narrow.shape[-1])
        if to_x:
            grad_x = (inner @ narrow.T).view(x.shape)
        if to_rule or to_s:
            folded = (own.T @ inner).view(n, -1, n, n, s.shape[-1])
            grad_rule, grad_s = _unfolded(folded, (3, 0, 2, 1, 4), rule, s)
        if to_t:
            grad_t = product(z.T, rows, ctx.scale).to(narrow.dtype).view(n, -1, parts)
        if to_bias:
            grad_bias = g.reshape(-1, g.shape[-1]).sum(0).to(narrow.dtype)
            grad_bias = grad_bias if ctx.scale == 1 else grad_bias * ctx.scale
        return g, grad_x, grad_rule, grad_s if to_s else None, grad_t, grad_bias, None
