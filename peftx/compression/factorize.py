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

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
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
POWERS = 2  # passes over the matrix, in a randomised decomposition


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
    """`up` (out, r) and `down` (r, in), in the dtype of the weight; `error`: ||L (W - up down) R|| / ||L W R||."""

    up: Tensor
    down: Tensor
    error: float


def rank_for(keep: float, out_features: int, in_features: int) -> int:
    """The rank whose factors hold the share `keep` of the weight's entries, rounded down, at least 1."""
    return max(1, int(keep * out_features * in_features / (out_features + in_features) + 1e-9))


def saves(rank: int, out_features: int, in_features: int) -> bool:
    """Whether factors of that rank are smaller than the weight."""
    return rank * (out_features + in_features) < out_features * in_features


def weighting(
    *,
    importance_in: Tensor | None = None,
    importance_out: Tensor | None = None,
    gram: Tensor | None = None,
    shape: tuple[int, int],
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

    Raises:
        ValueError: the wrong length, not finite, negative, or zero everywhere.
    """
    left, left_scale = _diagonal(importance_out, shape[0], "outputs")
    if gram is None:
        right, right_scale = _diagonal(importance_in, shape[1], "inputs")
        return Weighting(left, right, left_scale * right_scale)
    if gram.shape != (shape[1], shape[1]):
        raise ValueError(f"a Gram matrix of shape {tuple(gram.shape)} for {shape[1]} inputs")
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    if not bool(gram.isfinite().all()):
        raise ValueError("the Gram matrix of its inputs has NaN or infinity")
    if mean <= 0:
        raise ValueError("the Gram matrix of its inputs is all zero")
    damping = DAMPING
    while True:
        damped = gram / mean
        damped.diagonal().add_(damping)
        right, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return Weighting(left, right, left_scale * mean)
        damping *= 10
        if damping > 1:
            raise ValueError("the Gram matrix of its inputs is far from positive semi-definite")


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


def weighting_for(
    method: str, statistics: Any, shape: tuple[int, int], *, side: str = "in", alpha: float = 0.5
) -> Weighting:
    """The weighting of `method` for a layer with these `LayerStatistics` (None will do for svd).

    Its scale makes layers comparable. fwsvd: the mean squared gradient of an entry, so that errors are second-order
    changes of the loss with the Fisher information of entry (o, j) taken as s_j / out (`in`), t_o / in (`out`), or
    s_j t_o / sum(s) (`both`). svd-llm: squared errors of the outputs. asvd, svd: as their objective is.

    Raises:
        ValueError: what the method needs was not collected, or is unusable.
    """

    def needed(field: str) -> Tensor:
        value = None if statistics is None else getattr(statistics, field)
        if value is None:
            raise ValueError(f"no {field} was collected, which {method} needs")
        return value

    if method == "svd":
        return Weighting()
    if method == "svd-llm":
        return weighting(gram=needed("gram"), shape=shape)
    if method == "asvd":
        return weighting(importance_in=needed("abs_mean").double().abs().pow(2 * alpha), shape=shape)
    found = weighting(
        importance_in=needed("fisher_in") if side in ("in", "both") else None,
        importance_out=needed("fisher_out") if side in ("out", "both") else None,
        shape=shape,
    )
    total = float(needed("fisher_out" if side == "out" else "fisher_in").double().sum())
    return Weighting(found.left, found.right, total / (shape[0] * shape[1]))


def factorize(
    weight: Tensor,
    rank: int,
    *,
    importance_in: Tensor | None = None,
    importance_out: Tensor | None = None,
    gram: Tensor | None = None,
    randomized: bool = False,
) -> Factors:
    """The factors of `rank` that minimise ||L (W - up down) R||_F, see `weighting` for what makes L and R.

    Args:
        weight: (out, in), of any floating dtype. Decomposed in float64 up to 2^22 entries (2048 x 2048), else in
            float32.
        rank: 1 to min(out, in).
        randomized: by random projections (arXiv:0909.4061), many times faster for large weights of small rank. The
            error stays below sqrt(1 + rank / 15) times the smallest one in the mean, even with no pass of power
            iteration; with the two that are made, a few per cent above it. `Factors.error` is measured, not estimated.
            Draws from a generator of its own, so that the same weight gives the same factors.

    Raises:
        ValueError: importances that cannot be used, a weight with NaN or infinity, a rank out of range.
    """
    shape = (weight.shape[0], weight.shape[1])
    weights = weighting(importance_in=importance_in, importance_out=importance_out, gram=gram, shape=shape)
    return solve(weight, rank, weights, randomized=randomized)


def solve(weight: Tensor, rank: int, weights: Weighting, *, randomized: bool = False) -> Factors:
    """`factorize` under a weighting that is already made."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} for a weight of shape {tuple(weight.shape)}")
    target = weights.apply(_precise(weight))
    p, s, q = randomized_svd(target, rank) if randomized else torch.linalg.svd(target, full_matrices=False)
    energy = target.double().square().sum()
    lost = energy - s[:rank].double().square().sum() if randomized else s[rank:].double().square().sum()
    error = float((lost.clamp(min=0) / energy).sqrt()) if energy > 0 else 0.0
    root = s[:rank].sqrt()
    up, down = weights.undo(p[:, :rank] * root, root[:, None] * q[:rank])
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    if not bool(up.isfinite().all() & down.isfinite().all()):
        raise ValueError(f"its factors do not fit into {weight.dtype}: convert the model to bfloat16 or float32 first")
    return Factors(up, down, error)


def spectrum(weight: Tensor, weights: Weighting) -> Tensor:
    """What each direction is worth: the squared singular values of L W R, comparable between layers, falling."""
    return torch.linalg.svdvals(weights.apply(_precise(weight))).double().square() * weights.scale


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
    p, s, q = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ p[:, :rank], s[:rank], q[:rank]


def _precise(weight: Tensor) -> Tensor:
    weight = weight.detach()
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    if not bool(weight.isfinite().all()):
        raise ValueError("its weight has NaN or infinity")
    return weight.to(torch.float64 if weight.numel() <= DOUBLE else torch.float32)


def allocate(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int | None]:
    """Ranks for all layers together: the directions worth most for each parameter that they cost, within `budget`.

    A direction of a layer costs out + in parameters and is worth its squared weighted singular value. A layer may also
    stay dense (None), which costs out * in and is worth all of them; it does where that is the better bargain and
    fits. Every layer gets at least rank 1.

    Args:
        spectra: squared weighted singular values of each layer, falling, in units that layers share.
        shapes: (out, in) of each.
        budget: parameters of all these layers afterwards, at most.

    Raises:
        ValueError: the budget does not pay for rank 1 everywhere.
    """
    left = budget - sum(sum(shapes[name]) for name in spectra)
    if left < 0:
        raise ValueError(f"{budget} parameters do not pay for rank 1 in each of {len(spectra)} layers")
    ranks: dict[str, int | None] = dict.fromkeys(spectra, 1)
    offers: list[tuple[float, int, str]] = []  # (-worth of a parameter, rank or 0 for dense, layer)
    for name, squares in spectra.items():
        (out_features, in_features), values = shapes[name], squares.tolist()
        price, whole = out_features + in_features, out_features * in_features
        remaining = sum(values)
        for rank, held in enumerate(accumulate(values), 1):
            if not saves(rank, out_features, in_features):
                break
            following = values[rank] / price if saves(rank + 1, out_features, in_features) else 0.0
            dense = (remaining - held) / (whole - rank * price)
            if dense >= following:  # from here on the rest together is the better bargain
                offers.append((-dense, 0, name))
                break
        offers += [
            (-value / price, rank, name)
            for rank, value in enumerate(values, 1)
            if rank > 1 and saves(rank, out_features, in_features)
        ]
    heapq.heapify(offers)
    while offers:
        _, rank, name = heapq.heappop(offers)
        out_features, in_features = shapes[name]
        now = ranks[name]
        if now is None or rank not in (0, now + 1):
            continue
        cost = out_features + in_features if rank else out_features * in_features - now * (out_features + in_features)
        if cost <= left:
            left -= cost
            ranks[name] = rank or None
    return ranks
