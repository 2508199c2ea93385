"""Block-wise dynamic 8-bit quantisation (arXiv:2110.02861), in bitsandbytes' format and in plain PyTorch.

A tensor is flattened and cut into blocks of 256 elements (the last may be shorter). A block keeps its largest absolute
value in fp32 and, for every element, the index of the entry of a fixed code book that is nearest to element / absmax.
`bitsandbytes.functional.dequantize_blockwise(codes, absmax=absmax, code=book, blocksize=256)` reads what `quantize`
writes, with no difference. The encoder differs from bitsandbytes' CPU kernel, on purpose: it finds the exactly nearest
entry, and zero stays zero (the kernel turns it into 2e-5 of the block's largest value).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

BLOCK = 256
FP32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch's defaults are
_CELLS = 1 << 16  # patterns of the upper half of an fp32 number: sign, exponent, seven bits of the mantissa


class CodeBook(NamedTuple):
    """The 256 values of a code (fp32, ascending) and what finds the nearest of them without a search.

    All fp32 numbers that share their upper 16 bits form a cell. No cell contains more than one limit between two
    entries, so the entry of the cell's smallest number (`first`, uint8, by the 16 bits) is either the nearest or, for
    numbers above that entry's upper limit (`limits`, fp32), one above it. `zero` is the code of 0.
    """

    values: torch.Tensor
    limits: torch.Tensor
    first: torch.Tensor
    zero: int


def dynamic_values(signed: bool) -> torch.Tensor:
    """The "dynamic tree" code: seven decades up to 1, each twice as finely divided as the one below it; 0; and 1.

    A decade [10^(k-7), 10^(k-6)], k = 0..6, holds the middles of 2^k equal parts (of 2^(k+1) without a sign).
    """
    values = [torch.tensor([0.0, 1.0], **FP32)]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (k if signed else k + 1) + 1, **FP32)
        middles = 10.0 ** (k - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@functools.cache
def code_book(signed: bool, device: torch.device) -> CodeBook:
    """The signed book (first moments) or the unsigned one (second moments). In the unsigned one nothing but 0 is
    rounded to 0: a second moment that vanishes beside a first moment that does not would make a step of m / eps."""
    values = dynamic_values(signed)
    limits = F.pad((values[:-1] + values[1:]) / 2, (0, 1), value=torch.inf)
    if not signed:
        limits[0] = 0.0
    low = torch.arange(_CELLS, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([low, low | 0xFFFF]).view(torch.float32).nan_to_num().amin(0)
    first = torch.bucketize(ends, limits).clamp_max(255).to(torch.uint8)
    return CodeBook(values.to(device), limits.to(device), first.to(device), zero=int((values < 0).sum()))


def encode(x: torch.Tensor, book: CodeBook) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n,) uint8 and absmax (n / 256,) of a flat, contiguous fp32 tensor of n elements, n a multiple of 256.

    A nearest entry whose neighbour is equally near is the lower one. x must be finite.
    """
    blocks = x.view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.masked_fill(absmax == 0, 1)[:, None]).view(-1)
    cells = (scaled.view(torch.int32) >> 16).bitwise_and_(_CELLS - 1)
    codes = book.first.index_select(0, cells)
    codes += scaled > book.limits.index_select(0, codes.int())
    return codes, absmax


def decode(codes: torch.Tensor, absmax: torch.Tensor, book: CodeBook) -> torch.Tensor:
    """fp32 values (n,) of flat codes (n,) uint8 and absmax (n / 256,), n a multiple of 256."""
    values = book.values.index_select(0, codes.int())
    values.view(-1, BLOCK).mul_(absmax[:, None])
    return values


def quantize(x: torch.Tensor, signed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (of x's shape, uint8) and absmax (ceil(numel / 256), fp32) of a finite tensor of any shape and dtype.

    `signed=False` is the code for non-negative numbers, whose smallest entry above 0 also stands for every smaller
    number but 0.
    """
    flat = F.pad(x.detach().float().flatten(), (0, -x.numel() % BLOCK))
    codes, absmax = encode(flat, code_book(signed, x.device))
    return codes[: x.numel()].view(x.shape), absmax


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, signed: bool = True) -> torch.Tensor:
    """The inverse of `quantize`: fp32, of the codes' shape."""
    flat = F.pad(codes.flatten(), (0, -codes.numel() % BLOCK))
    return decode(flat, absmax, code_book(signed, codes.device))[: codes.numel()].view(codes.shape)
