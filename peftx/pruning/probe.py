"""What one step of SGD on a sample would do to the output layer, in closed form.

DON and NOD are DONOD's (arXiv:2504.14810): how far the norm of the output layer falls, and how far the layer moves. The
paper says neither which optimizer nor which step its probe takes; here it is one step of plain SGD on the head alone.
Then both have a closed form in the head's input and the logits, and no backward pass is needed. (A first step of Adam
moves every entry by about the learning rate, whatever the sample, so its NOD says nothing.)
"""

import math
from typing import Literal

import torch
from torch import Tensor

METRICS = ("don", "nod", "loss", "el2n", "grand", "grand_full", "ifd", "random")
OF_HEAD = {"don", "nod", "grand"}
ETA = 1e-3
POSITIONS = 64
BLOCK = 2**20  # entries of a gradient that is built some rows at a time

Way = Literal["gram", "blocked"]


def gradient_way(length: int, outputs: int, width: int) -> Way:
    """The cheaper way to |G| for T = `length` positions, a head of V = `outputs` by D = `width`: T (V + D) < V D ?"""
    return "gram" if length * (outputs + width) < outputs * width else "blocked"


def gradient_square(d: Tensor, h: Tensor, way: Way | None = None) -> Tensor:
    """|G|_F^2 of G = d^T h, without ever holding G.

    Args:
        d: (..., T, V), gradient of the loss by the output of the head.
        h: (..., T, D), input of the head, same dtype.
        way: `"gram"`, the entrywise product of two T x T Gram matrices, 2 T^2 (V + D) operations; `"blocked"`, G some
            rows at a time, 2 T V D operations. Default: `gradient_way`.

    Returns:
        (...) in float64.
    """
    if (way or gradient_way(d.shape[-2], d.shape[-1], h.shape[-1])) == "gram":
        return ((d @ d.mT).double() * (h @ h.mT).double()).sum((-2, -1)).clamp(min=0)
    rows = max(1, BLOCK // (h.shape[-1] * math.prod(h.shape[:-2])))
    blocks = ((part.mT @ h).square().sum((-2, -1), dtype=torch.float64) for part in d.split(rows, -1))
    return torch.stack(list(blocks)).sum(0)


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - onehot(labels), (..., V), in float32 at least; precise for confident samples too."""
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at = labels.unsqueeze(-1)
    p.scatter_(-1, at, 0.0)
    return p.scatter_(-1, at, -p.sum(-1, keepdim=True))  # the label's own p - 1 would cancel


def head_statistics(
    h: Tensor,
    z: Tensor,
    labels: Tensor,
    *,
    logits: Tensor | None = None,
    slope: Tensor | float = 1.0,
    bias: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    way: Way | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """<W, G> and |G|^2 of each sample, for G the gradient of its cross-entropy by the weight W (V, D) of the head.

    Args:
        h: (B, T, D), input of the head at the T supervised positions of each of B samples.
        z: (B, T, V), its output, W h + b.
        labels: (B, T), none of them ignored.
        logits, slope: what the model makes of z, and its derivative. Default: z and 1.
        bias: (V,).
        reduction: of the loss over positions.
        way: see `gradient_square`.
        real: (B, T), which positions count, where samples have different numbers of them. The others must repeat a
            position that counts. Default: all.

    Returns:
        Two tensors (B,) in float64; softmax and products are in float32 at least, sums in float64.
    """
    d = residual(z if logits is None else logits, labels)
    d *= slope
    if real is not None:
        d.masked_fill_(~real.unsqueeze(-1), 0.0)
    if reduction == "mean":
        d /= labels.shape[-1] if real is None else real.sum(-1)[:, None, None]
    inner = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for some, of_some in zip(d.split(POSITIONS, -2), z.split(POSITIONS, -2), strict=True):  # no second (T, V) tensor
        without_bias = of_some.to(d) if bias is None else of_some.to(d) - bias.to(d)
        inner += (some * without_bias).sum((-2, -1), dtype=torch.float64)
    return inner, gradient_square(d, h.to(d), way)


def don_nod(inner: Tensor, square: Tensor, weight_square: float, eta: float = ETA) -> tuple[Tensor, Tensor]:
    """DON = |W| - |W'| and NOD = |W' - W| for W' = W - eta G, from <W, G>, |G|^2 and |W|^2; float64.

    DON is a quotient: the difference of the two norms loses every digit where eta is small.
    """
    fall = 2 * eta * inner - eta**2 * square  # |W|^2 - |W'|^2
    norms = math.sqrt(weight_square) + (weight_square - fall).clamp(min=0).sqrt()
    return torch.where(norms > 0, fall / norms, torch.where(fall.isnan(), fall, 0.0)), eta * square.sqrt()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(...), softmax in float32 at least, result in float64."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return -logits.log_softmax(-1, dtype=exact).gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
