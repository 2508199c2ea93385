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

from .decompose import by_outputs, exact_svd, is_large, pays, randomized_svd

# Method: what `collect` must gather for it.
NEEDS: dict[str, tuple[str, ...]] = {"fwsvd": ("fisher",), "svd": (), "asvd": ("abs",), "svd-llm": ("gram",)}
METHODS = tuple(NEEDS)
SIDES = ("in", "out", "both")

FLOOR = 1e-8  # smallest importance, where the mean is 1: an input without any still gets a finite factor
DAMPING = 1e-6  # smallest eigenvalue added to a Gram matrix, where the mean of its diagonal is 1


@dataclass(frozen=True)
class Weighting:
    """What a layer's error is measured with; None is the identity.

    Attributes:
        left: (out,), diagonal of L, mean square 1.
        right: (in,), diagonal of R, mean square 1; or R (in, in), lower triangular.
        gram: instead of R, of a wide weight, what R R^T is made of: see `by_outputs`.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    gram: Tensor | None = None

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
    factored: bool = True,
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
        factored: whether it is; else `Weighting.gram` has it.

    Raises:
        ValueError: the wrong length, not finite, negative, or zero everywhere.
    """
    left = _diagonal(importance_out, shape[0], "outputs")
    if gram is None:
        return Weighting(left, _diagonal(importance_in, shape[1], "inputs"))
    mean = gram_scale(gram, shape[1])
    if not factored:
        return Weighting(left, gram=gram)
    damping = DAMPING
    while True:
        damped = gram.to(device, torch.float64, copy=True).div_(mean)  # the one copy: it becomes the factor
        damped.diagonal().add_(damping)
        failed = torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))
        if not failed:
            return Weighting(left, damped.float() if is_large(damped.numel()) else damped)
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


def _diagonal(importance: Tensor | None, length: int, what: str) -> Tensor | None:
    """sqrt(importance / mean)."""
    if importance is None:
        return None
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
    return (importance / mean).clamp(min=FLOOR).sqrt()


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
    factored: bool = True,
) -> Weighting:
    """The weighting of `method` for a layer with these `LayerStatistics` (None will do for svd).

    Raises:
        ValueError: what the method needs was not collected, or is unusable.
    """
    found = parts_for(method, statistics, shape, side=side, alpha=alpha)
    return weighting(shape=shape, device=device, factored=factored, **found)


def scale_for(method: str, statistics: Any, shape: tuple[int, int], *, side: str = "in", alpha: float = 0.5) -> float:
    """What ||L (W - U V) R||^2 must be multiplied by to be comparable between layers.

    fwsvd: the mean squared gradient of an entry, so that errors are second-order changes of the loss with the Fisher
    information of entry (o, j) taken as s_j / out (`in`), t_o / in (`out`), or s_j t_o / sum(s) (`both`). svd-llm:
    squared errors of the outputs. asvd, svd: as their objective is.
    """
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
    weights = weighting(
        importance_in=importance_in,
        importance_out=importance_out,
        gram=gram,
        shape=shape,
        factored=gram is None or not needs_no_factor(shape, randomized),
    )
    return solve(weight, rank, weights, randomized=randomized)


def solve(weight: Tensor, rank: int, weights: Weighting, *, randomized: bool | None = False) -> Factors:
    """`factorize` under a weighting that is already made."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} for a weight of shape {tuple(weight.shape)}")
    if randomized is None:
        randomized = weights.gram is None and pays(rank, weight.shape[0], weight.shape[1])
    target = weights.apply(_precise(weight))
    if weights.gram is not None:
        p, s, q = by_outputs(target, weights.gram, DAMPING)
    else:
        p, s, q = randomized_svd(target, rank) if randomized else exact_svd(target)
    norm = torch.linalg.vector_norm(s if len(s) == min(target.shape) else target, dtype=torch.float64)
    energy = float(norm) ** 2
    values, root = s.double().cpu(), s[:rank].sqrt()
    up, down = weights.undo(p[:, :rank] * root, root[:, None] * q[:rank])
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    if not bool(up.isfinite().all() & down.isfinite().all()):
        raise ValueError(f"its factors do not fit into {weight.dtype}: convert the model to bfloat16 or float32 first")
    return Factors(up, down, error_at(values, energy, rank, min(weight.shape)), values, energy)


def needs_no_factor(shape: tuple[int, int], randomized: bool | None) -> bool:
    """Whether a large wide weight goes without a Cholesky factor of its inputs' Gram matrix, which is larger yet."""
    return shape[0] < shape[1] and is_large(shape[0] * shape[1]) and not randomized


def error_at(values: Tensor, energy: float, rank: int, full: int) -> float:
    """||L (W - U V) R|| / ||L W R|| of the first `rank` directions, of `full`."""
    if energy <= 0:
        return 0.0
    squares = values.square()
    lost = float(squares[rank:].sum()) if len(values) == full else energy - float(squares[:rank].sum())
    return math.sqrt(max(lost, 0.0) / energy)


def _precise(weight: Tensor) -> Tensor:
    weight = weight.detach()
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    if not bool(weight.isfinite().all()):
        raise ValueError("its weight has NaN or infinity")
    return weight.to(torch.float32 if is_large(weight.numel()) else torch.float64)
