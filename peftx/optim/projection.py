"""Low-rank projection of a gradient (GaLore, arXiv:2403.03507; one-sided, as GradNormLoRP's published code has it).

Everything here sees a matrix lying down: (short, long), rows of at least the height. `lay` turns the others. The
projected gradient is stored direction by direction, (rank, long): a block of 256 quantised elements then never mixes
directions, whose energies differ by orders of magnitude.
"""

from __future__ import annotations

import torch

from .blockwise import FP32

REFRESH = ("svd", "randomized", "random")
OVERSAMPLING = 8  # columns of the range finder beside those that are wanted


def lay(matrix: torch.Tensor) -> torch.Tensor:
    """(m, n) as (short, long): the transpose if m >= n. A view, and its own inverse on the way back."""
    return matrix.T if matrix.shape[0] >= matrix.shape[1] else matrix


def projected_shape(shape: torch.Size, rank: int | float) -> tuple[int, int]:
    """(rank, long) of a matrix. The rank is limited to the short side; below 1 it is a share of it, rounded down."""
    rows = max(1, int(rank * min(shape) + 1e-9)) if rank < 1 else int(rank)  # 0.29 * 100 is 28.999...
    return min(rows, *shape), max(shape)


def basis(gradient: torch.Tensor, rank: int, how: str, seed: int) -> torch.Tensor:
    """Orthonormal columns (short, rank), in the dtype of `gradient` (short, long).

    `how`: `"svd"`: the leading left singular vectors. `"randomized"`: nearly those, by a range finder with two power
    iterations on `rank` + 8 columns (arXiv:0909.4061), at a small fraction of the time for large matrices; where there
    are no more rows than that, exactly those. `"random"`: of a Gaussian matrix, whatever the gradient. Random numbers
    come from a private generator, `seed` and the shape decide them.
    """
    short, long = gradient.shape
    sketch = rank + OVERSAMPLING
    if how == "svd" or (how == "randomized" and sketch >= short):
        return torch.linalg.svd(gradient, full_matrices=False).U[:, :rank]
    generator = torch.Generator("cpu").manual_seed(seed)
    if how == "random":
        return _orthonormal(torch.randn(short, rank, generator=generator, **FP32).to(gradient))
    gradient = gradient / gradient.abs().max()  # powers of large numbers would overflow
    found = _orthonormal(gradient @ torch.randn(long, sketch, generator=generator, **FP32).to(gradient))
    for _ in range(2):
        found = _orthonormal(gradient @ _orthonormal(gradient.T @ found))
    core = torch.linalg.qr(gradient.T @ found, mode="r").R.T  # of the left singular vectors of found^T gradient
    return found @ torch.linalg.svd(core).U[:, :rank]


def align(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` with its columns' signs, which no decomposition defines, chosen so that none opposes its column in `old`.

    Moments that are kept over a refresh would otherwise be turned round at random.
    """
    return torch.where((new * old).sum(0) < 0, -new, new)


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix).Q
