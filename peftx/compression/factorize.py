"""Low-rank factors of one weight that are best where the loss, or the data, look: FWSVD and its kin, in closed form.

For a weight W (out, in) and rank r all of them minimise ||L (W - U V) R||_F over U (out, r) and V (r, in). With the
singular value decomposition L W R = P S Q^T the minimum is at

    U = L^-1 P_r S_r^(1/2),    V = S_r^(1/2) Q_r^T R^-1,

and its value is that of the singular values left out. Any split of S gives the same product; halves balance the two
factors for later training. What the methods choose is L and R:

    svd        I, I
    fwsvd      R = diag(sqrt(s)), s_j the Fisher information of input j: arXiv:2207.00112. L likewise for outputs.
    asvd       R = diag(mean |x_j|^alpha): arXiv:2312.05821
    svd-llm    R = C with C C^T = X^T X over calibration data, so that ||(W - U V) X^T||_F counts: arXiv:2403.07378
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Method: what `collect` must gather for it.
NEEDS: dict[str, tuple[str, ...]] = {"fwsvd": ("fisher",), "svd": (), "asvd": ("abs",), "svd-llm": ("gram",)}
METHODS = tuple(NEEDS)
SIDES = ("in", "out", "both")

FLOOR = 1e-8  # smallest importance, where the mean is 1: an input without any still gets a finite factor
DAMPING = 1e-6  # smallest eigenvalue added to a Gram matrix, where the mean of its diagonal is 1
DOUBLE = 2**22  # entries up to which a weight is decomposed in float64; for more, float32 is precise enough
OVERSAMPLE = 16  # directions more than the rank, and
POWERS = 4  # passes over the matrix, in a randomised decomposition: an error about one per cent above the least one
GAIN = 2.0  # how many times as fast it must be, to be the default


@dataclass(frozen=True)
class Weighting:
    """What a layer's error is measured with; None is the identity.

    Attributes:
        left: (out,), diagonal of L, mean square 1.
        right: (in,), diagonal of R, mean square 1; or R (in, in), lower triangular.
        scale: what ||L (W - U V) R||^2 must be multiplied by to be comparable between layers.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 1.0

    def apply(self, weight: Tensor) -> Tensor:
        """L W R."""
        if self.left is not None:
            weight = self.left.to(weight)[:, None] * weight
        if self.right is None:
            return weight
        right = self.right.to(weight)
        return weight * right if right.ndim == 1 else weight @ right

    def undo(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """L^-1 U and V R^-1."""
        if self.left is not None:
            up = up / self.left.to(up)[:, None]
        if self.right is not None:
            right = self.right.to(down)
            if right.ndim == 1:
                down = down / right
            else:
                down = torch.linalg.solve_triangular(right, down, upper=False, left=False)
        return up, down


@dataclass(frozen=True)
class Factors:
    """`up` (out, r) and `down` (r, in), in the dtype of the weight; `error`: ||L (W - up down) R|| / ||L W R||.

    `values`: singular values of L W R in float64, falling: all, or of a randomised decomposition the r that were found.
    `energy`: ||L W R||^2. The first q columns of `up` and rows of `down` are the factors of the lower rank q.
    """

    up: Tensor
    down: Tensor
    error: float
    values: Tensor
    energy: float

    def at(self, rank: int) -> Factors:
        """The factors of a lower rank."""
        error = error_at(self.values, self.energy, rank, min(self.up.shape[0], self.down.shape[1]))
        return Factors(self.up[:, :rank], self.down[:rank], error, self.values, self.energy)


def weighting(
    *,
    importance_in: Tensor | None = None,
    importance_out: Tensor | None = None,
    gram: Tensor | None = None,
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Weighting:
    """The weighting by importances, or by a Gram matrix.

    Args:
        importance_in: (in,), of each input, >= 0: sqrt(importance_in) is the diagonal of R. It is divided by its mean
            and then at least 1e-8, so that any common factor is harmless and zeros do not divide.
        importance_out: (out,), of each output, likewise for L.
        gram: X^T X (in, in), instead of `importance_in`. R is the Cholesky factor of gram / m + eps I with m the mean
            of its diagonal and eps 1e-6, ten times as much as often as it is not positive definite: fewer tokens than
            inputs, or inputs that are always zero, are no obstacle.
        shape: of the weight, (out, in).
        device: where a Gram matrix is decomposed.

    Raises:
        ValueError: the wrong length, not finite, negative, or zero everywhere.
    """
    left, left_scale = _diagonal(importance_out, shape[0], "outputs")
    if gram is None:
        right, right_scale = _diagonal(importance_in, shape[1], "inputs")
        return Weighting(left, right, left_scale * right_scale)
    mean = gram_scale(gram, shape[1])
    damping = DAMPING
    while True:
        damped = gram.to(device, torch.float64, copy=True).div_(mean)  # the one copy: it becomes the factor
        damped.diagonal().add_(damping)
        failed = torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))
        if not failed:
            right = damped if damped.numel() <= DOUBLE else damped.float()
            return Weighting(left, right, left_scale * mean)
        damping *= 10
        if damping > 1:
            raise ValueError("the Gram matrix of its inputs is far from positive semi-definite")


def gram_scale(gram: Tensor, inputs: int) -> float:
    """The mean of its diagonal.

    Raises:
        ValueError: it is not of that many inputs, not finite, or zero.
    """
    if gram.shape != (inputs, inputs):
        raise ValueError(f"a Gram matrix of shape {tuple(gram.shape)} for {inputs} inputs")
    if not bool(gram.isfinite().all()):
        raise ValueError("the Gram matrix of its inputs has NaN or infinity")
    if (mean := float(gram.diagonal().double().mean())) <= 0:
        raise ValueError("the Gram matrix of its inputs is all zero")
    return mean


def _diagonal(importance: Tensor | None, length: int, what: str) -> tuple[Tensor | None, float]:
    """sqrt(importance / mean), and the mean."""
    if importance is None:
        return None, 1.0
    if importance.shape != (length,):
        raise ValueError(f"{importance.numel()} importances for {length} {what}")
    importance = importance.double()
    if not bool(importance.isfinite().all()):
        raise ValueError(f"the importances of its {what} have NaN or infinity")
    if bool((importance < 0).any()):
        raise ValueError(f"the importances of its {what} have negative values")
    mean = float(importance.mean())
    if mean == 0:
        raise ValueError(f"the importances of its {what} are all zero")
    return (importance / mean).clamp(min=FLOOR).sqrt(), mean


def parts_for(
    method: str, statistics: Any, shape: tuple[int, int], *, side: str = "in", alpha: float = 0.5
) -> dict[str, Tensor]:
    """The arguments of `weighting` for `method`, for a layer with these `LayerStatistics` (None will do for svd).

    Raises:
        ValueError: what the method needs was not collected, or is unusable, so far as that is seen without work.
    """

    def needed(field: str) -> Tensor:
        value = None if statistics is None else getattr(statistics, field)
        if value is None:
            raise ValueError(f"no {field} was collected, which {method} needs")
        return value

    if method == "svd":
        return {}
    if method == "svd-llm":
        gram_scale(needed("gram"), shape[1])
        return {"gram": needed("gram")}
    if method == "asvd":
        found = {"importance_in": needed("abs_mean").double().abs().pow(2 * alpha)}
    else:
        found = {f"importance_{way}": needed(f"fisher_{way}") for way in ("in", "out") if side in (way, "both")}
    _diagonal(found.get("importance_in"), shape[1], "inputs")
    _diagonal(found.get("importance_out"), shape[0], "outputs")
    return found


def weighting_for(
    method: str,
    statistics: Any,
    shape: tuple[int, int],
    *,
    side: str = "in",
    alpha: float = 0.5,
    device: torch.device | str = "cpu",
) -> Weighting:
    """The weighting of `method` for a layer with these `LayerStatistics` (None will do for svd).

    Its scale makes layers comparable. fwsvd: the mean squared gradient of an entry, so that errors are second-order
    changes of the loss with the Fisher information of entry (o, j) taken as s_j / out (`in`), t_o / in (`out`), or
    s_j t_o / sum(s) (`both`). svd-llm: squared errors of the outputs. asvd, svd: as their objective is.

    Raises:
        ValueError: what the method needs was not collected, or is unusable.
    """
    found = parts_for(method, statistics, shape, side=side, alpha=alpha)
    if not found:
        return Weighting()
    weights = weighting(shape=shape, device=device, **found)
    return Weighting(weights.left, weights.right, scale_for(method, statistics, shape, side=side, alpha=alpha))


def scale_for(method: str, statistics: Any, shape: tuple[int, int], *, side: str = "in", alpha: float = 0.5) -> float:
    """`Weighting.scale` alone."""
    found = parts_for(method, statistics, shape, side=side, alpha=alpha)
    if method == "svd-llm":
        return gram_scale(found["gram"], shape[1])
    if method == "fwsvd":
        return float(found["importance_out" if side == "out" else "importance_in"].double().sum()) / math.prod(shape)
    return float(found["importance_in"].mean()) if found else 1.0


def factorize(
    weight: Tensor,
    rank: int,
    *,
    importance_in: Tensor | None = None,
    importance_out: Tensor | None = None,
    gram: Tensor | None = None,
    randomized: bool | None = False,
) -> Factors:
    """The factors of `rank` that minimise ||L (W - up down) R||_F, see `weighting` for what makes L and R.

    Args:
        weight: (out, in), of any floating dtype. Decomposed in float64 up to 2^22 entries (2048 x 2048), by the
            singular value decomposition; of more, in float32, by the eigenvectors of the smaller of A A^T and A^T A in
            float64, which is as exact as float32 is, and up to 2.6 times as fast.
        rank: 1 to min(out, in).
        randomized: by random projections (arXiv:0909.4061), faster for large weights of small rank. The error stays
            below sqrt(1 + rank / 15) times the smallest one in the mean, even with no pass of power iteration; with the
            four that are made it was 0.2 to 1.1 % above it (benchmarks/results/compression-large.md). `Factors.error`
            is measured, not estimated. Draws from a generator of its own, so that the same weight gives the same
            factors. None: where there are more than 2^22 entries and it needs less than half the operations.

    Raises:
        ValueError: importances that cannot be used, a weight with NaN or infinity, a rank out of range.
    """
    shape = (weight.shape[0], weight.shape[1])
    weights = weighting(importance_in=importance_in, importance_out=importance_out, gram=gram, shape=shape)
    return solve(weight, rank, weights, randomized=randomized)


def solve(weight: Tensor, rank: int, weights: Weighting, *, randomized: bool | None = False) -> Factors:
    """`factorize` under a weighting that is already made."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} for a weight of shape {tuple(weight.shape)}")
    if randomized is None:
        randomized = pays(rank, weight.shape[0], weight.shape[1])
    target = weights.apply(_precise(weight))
    p, s, q = randomized_svd(target, rank) if randomized else exact_svd(target)
    energy = (
        float(torch.linalg.vector_norm(target, dtype=torch.float64)) ** 2
        if randomized
        else float(s.double().square().sum())
    )
    values, root = s.double().cpu(), s[:rank].sqrt()
    up, down = weights.undo(p[:, :rank] * root, root[:, None] * q[:rank])
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    if not bool(up.isfinite().all() & down.isfinite().all()):
        raise ValueError(f"its factors do not fit into {weight.dtype}: convert the model to bfloat16 or float32 first")
    return Factors(up, down, error_at(values, energy, rank, min(weight.shape)), values, energy)


def error_at(values: Tensor, energy: float, rank: int, full: int) -> float:
    """||L (W - U V) R|| / ||L W R|| of the first `rank` directions, of `full`."""
    if energy <= 0:
        return 0.0
    squares = values.square()
    lost = float(squares[rank:].sum()) if len(values) == full else energy - float(squares[:rank].sum())
    return math.sqrt(max(lost, 0.0) / energy)


def pays(rank: int, out_features: int, in_features: int) -> bool:
    """Whether random projections are the default: for many entries and less than half the operations, as measured."""
    small, large = sorted((out_features, in_features))
    width = rank + OVERSAMPLE
    products = (2 + 4 * POWERS) * small * large * width
    bases = 4 * width**2 * ((POWERS + 1) * small + POWERS * large)
    exact = 4 * small**2 * large + 18 * small**3  # float64, at half the speed
    return small * large > DOUBLE and GAIN * (products + bases) < exact


def exact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P (out, n), S (n,), Q^T (n, in), n the smaller side; of many entries from the eigenvectors of a Gram matrix.

    In float64 that loses singular values below 1e-8 of the greatest, which float32 does not have anyway.
    """
    if matrix.numel() <= DOUBLE or matrix.dtype == torch.float64:
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


def _divided(rows: Tensor, s: Tensor) -> Tensor:
    """Rows of length s as rows of length 1; of length 0 where there is nothing but rounding."""
    least = s[:1] * torch.finfo(s.dtype).eps
    return rows.mul_(torch.where(s > least, 1 / s, 0)[:, None])


def _precise(weight: Tensor) -> Tensor:
    weight = weight.detach()
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    if not bool(weight.isfinite().all()):
        raise ValueError("its weight has NaN or infinity")
    return weight.to(torch.float64 if weight.numel() <= DOUBLE else torch.float32)
