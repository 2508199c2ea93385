"""Norms of the rows of weights, without building what is added to them."""

from __future__ import annotations

import torch


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
    gram = A @ A.mT
    if not isinstance(cross, torch.Tensor):
        inner = scale * (B @ gram)
    elif B.ndim == 2:
        inner = torch.addmm(cross, B, gram, beta=2, alpha=scale)
    else:
        inner = torch.baddbmm(cross, B, gram, beta=2, alpha=scale)
    return torch.add(base, (B * inner).sum(dim=-1), alpha=scale).clamp(min=0)
