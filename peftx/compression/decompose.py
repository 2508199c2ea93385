"""Singular value decompositions of one weight: exact, of large ones by a Gram matrix, or by random projections."""

from __future__ import annotations

import torch
from torch import Tensor

DOUBLE = 2**22  # entries up to which a weight is decomposed in float64; for more, float32 is precise enough
OVERSAMPLE = 16  # directions more than the rank, and
POWERS = 4  # passes over the matrix, in a randomised decomposition: an error about one per cent above the least one
GAIN = 2.0  # how many times as fast it must be, to be the default


def is_large(count: int) -> bool:
    """Whether a weight of so many entries is decomposed in float32."""
    return count > DOUBLE


def pays(rank: int, out_features: int, in_features: int) -> bool:
    """Whether random projections are the default: for many entries and less than half the operations, as measured."""
    small, large = sorted((out_features, in_features))
    width = rank + OVERSAMPLE
    products = (2 + 4 * POWERS) * small * large * width
    bases = 4 * width**2 * ((POWERS + 1) * small + POWERS * large)
    exact = 4 * small**2 * large + 18 * small**3  # float64, at half the speed
    return is_large(small * large) and GAIN * (products + bases) < exact


def exact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P (out, n), S (n,), Q^T (n, in), n the smaller side; of many entries from the eigenvectors of a Gram matrix.

    In float64 that loses singular values below 1e-8 of the greatest, which float32 does not have anyway.
    """
    if not is_large(matrix.numel()) or matrix.dtype == torch.float64:
        p, s, q = torch.linalg.svd(matrix, full_matrices=False)
        return p, s, q
    if matrix.shape[0] > matrix.shape[1]:
        q, s, p = exact_svd(matrix.mT)
        return p.mT, s, q.mT
    s, p = _eigen(matrix)
    return p, s, _divided(p.mT @ matrix, s)


def randomized_svd(
    matrix: Tensor, rank: int, *, oversample: int = OVERSAMPLE, powers: int = POWERS, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of the best `rank` directions found by projections: P (out, r), S (r,), Q^T (r, in).

    arXiv:0909.4061, algorithms 4.4 and 5.1: an orthonormal basis of (A A^T)^powers A G with G Gaussian, and the exact
    decomposition of A inside it.
    """
    width = min(rank + oversample, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that every device draws the same
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(basis).Q
    for _ in range(powers):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    inside = basis.mT @ matrix
    s, p = _eigen(inside)
    s, p = s[:rank], p[:, :rank]
    return basis @ p, s, _divided(p.mT @ inside, s)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, falling, and left vectors of a wide matrix, by A A^T in float64, some columns at a time."""
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(1024, 1):
        wide = columns.double()
        gram.addmm_(wide, wide.mT)
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0).sqrt().flip(0).to(matrix.dtype), vectors.flip(1).to(matrix.dtype)


def by_outputs(weight: Tensor, gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """P (out, n), S (n,) and Q^T R^-1 (n, in) of the wide matrix W R = P S Q^T for R R^T = gram / mean + damping I.

    P and S^2 are the eigenvectors and eigenvalues of W R R^T W^T (out, out), and Q^T R^-1 = S^-1 P^T W, so that R, as
    large as the square of the inputs, is needed nowhere.

    Raises:
        ValueError: `gram` is no Gram matrix.
    """
    mean = gram.diagonal().double().mean().item()
    square = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], 1024):
        columns = weight[:, start : start + 1024]
        weighted = weight @ (gram[:, start : start + 1024].to(weight) / mean) + damping * columns
        square.addmm_(weighted.double(), columns.mT.double())
    values, vectors = torch.linalg.eigh(square.add_(square.mT.clone()).div_(2))
    if values[0] < -1e-3 * values[-1]:
        raise ValueError("the Gram matrix of its inputs is far from positive semi-definite")
    s = values.clamp(min=0).sqrt().flip(0).to(weight.dtype)
    p = vectors.flip(1).to(weight.dtype)
    return p, s, _divided(p.mT @ weight, s)


def _divided(rows: Tensor, s: Tensor) -> Tensor:
    """Rows of length s as rows of length 1; of length 0 where there is nothing but rounding."""
    least = s[:1] * torch.finfo(s.dtype).eps
    return rows.mul_(torch.where(s > least, 1 / s, 0)[:, None])
