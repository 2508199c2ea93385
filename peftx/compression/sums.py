"""Row sums of squared gradients of a weight, from its inputs and the gradients of its outputs.

The gradient of sample n by the weight of y = W x is G_n = sum_t g_nt x_nt^T, for g = dL/dy. Here are the sums over the
rows and columns of G_n^2.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

FISHER = ("fisher_in", "fisher_out")
BLOCK = {"cpu": 2**18, "cuda": 2**24}  # entries of a gradient that are held at a time

Way = Literal["gram", "blocked"]


def square_sums(
    x: Tensor, g: Tensor, sides: Collection[str] = FISHER, way: Way | None = None, block: int | None = None
) -> dict[str, Tensor]:
    """Row sums of sum_n G_n^2 for G_n = g_n^T x_n, without holding any G_n.

    Args:
        x: (N, T, in_features), what went into the layer.
        g: (N, T, out_features), gradient of the loss by what came out, same dtype.
        sides: `"fisher_in"`, sum over outputs, and `"fisher_out"`, sum over inputs.
        way: `"gram"`: sum_o G_oj^2 = sum_t x_tj (K x)_tj for K = g g^T, 2 T^2 (in + out) operations a side;
            `"blocked"`: some rows of G at a time, 2 T in out operations for both. Default: the cheaper one.
        block: entries held at a time. Default: 2^18 on a CPU, 2^24 else.

    Returns:
        Side to (in_features,) or (out_features,) in float64.
    """
    length, into, out = x.shape[1], x.shape[2], g.shape[2]
    block = block or BLOCK.get(x.device.type, BLOCK["cuda"])
    if way is None:
        way = "gram" if len(sides) * length * (into + out) < into * out else "blocked"
    if way == "gram":
        pairs = {"fisher_in": (x, g), "fisher_out": (g, x)}
        return {side: through_gram(*pairs[side], max(1, block // length**2)) for side in sides}
    sums = {"fisher_in": exact_zeros(into, x.device), "fisher_out": exact_zeros(out, x.device)}
    step = max(1, block // into)
    for x_n, g_n in zip(x, g, strict=True):
        for start in range(0, out, step):
            add_squares(sums, g_n[:, start : start + step].T @ x_n, start, sides)
    return {side: sums[side] for side in sides}


def through_gram(x: Tensor, g: Tensor, count: int) -> Tensor:
    """The input side, `count` samples at a time; with x and g exchanged, the output side."""
    total = exact_zeros(x.shape[2], x.device)
    for some, of_some in zip(x.split(count), g.split(count), strict=True):
        weighted = (of_some @ of_some.mT) @ some
        total += weighted.mul_(some).sum((0, 1))
    return total.clamp_(min=0)


def add_squares(sums: Mapping[str, Tensor], rows: Tensor, start: int, sides: Collection[str]) -> None:
    """Adds the squares of some rows of a gradient, which are overwritten."""
    rows.square_()
    if "fisher_in" in sides:
        sums["fisher_in"] += rows.sum(0)
    if "fisher_out" in sides:
        sums["fisher_out"][start : start + len(rows)] += rows.sum(1)


def weight_squares(gradient: Tensor, sides: Collection[str]) -> dict[str, Tensor]:
    """Sums of the squares of a gradient (out, in), some of its rows at a time."""
    sums = {
        "fisher_in": exact_zeros(gradient.shape[1], gradient.device),
        "fisher_out": exact_zeros(len(gradient), gradient.device),
    }
    step = max(1, BLOCK.get(gradient.device.type, BLOCK["cuda"]) // gradient.shape[1])
    exact = torch.promote_types(gradient.dtype, torch.float32)
    for start in range(0, len(gradient), step):
        add_squares(sums, gradient[start : start + step].to(exact, copy=True), start, sides)
    return sums


def exact_zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=widest(device), device=device)


def widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
