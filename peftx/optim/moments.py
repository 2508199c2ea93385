"""One Adam step on many stored moments at once, whatever their width in bits.

Launching a dozen operations costs more than running them on a LoRA factor, and a temporary the size of a dense weight
falls out of every cache. Tensors are therefore cut into segments, at the blocks' borders, and segments are worked off
in batches of about `SPAN` elements: small tensors together, large ones piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .blockwise import BLOCK, code_book, decode, encode
from .rounding import seed_of

SPAN = {"cpu": 1 << 16, "cuda": 1 << 24}  # a few temporaries of a span fit the cache; a GPU wants long ones


class Rule(NamedTuple):
    """Adam's numbers for a step. `age` counts the steps that the moments have seen, this one included."""

    beta1: float
    beta2: float
    eps: float
    age: int


class Segment(NamedTuple):
    """A piece of a tensor on its way through a step; every tensor is flat.

    `moments` is (m, v), or the codes and absmax (m, v, absmax of m, absmax of v) of quantised ones. `target` is
    where the Adam direction of `gradient` belongs. `finish` is what remains when the last piece of a tensor is done.
    `seed` is that of the target's stochastic rounding, if it is rounded so.
    """

    gradient: torch.Tensor
    moments: tuple[torch.Tensor, ...]
    target: torch.Tensor
    finish: Any = None
    seed: int | None = None


def segments(
    gradient: torch.Tensor, moments: Sequence[torch.Tensor], target: torch.Tensor, finish: Any, seed: int | None
) -> Iterator[Segment]:
    """The pieces of one tensor; each argument as in `Segment`, but of the whole tensor and of any contiguous shape."""
    gradient, target, moments = gradient.view(-1), target.view(-1), tuple(moment.view(-1) for moment in moments)
    span = span_of(gradient)
    if gradient.numel() <= span:
        yield Segment(gradient, moments, target, finish, seed)
        return
    pieces = [gradient.split(span), target.split(span), *(moment.split(span) for moment in moments[:2])]
    pieces += [absmax.split(span // BLOCK) for absmax in moments[2:]]
    last = len(pieces[0]) - 1
    for i, (part, onto, *state) in enumerate(zip(*pieces, strict=True)):
        own = None if seed is None else seed_of(seed, i)
        yield Segment(part, tuple(state), onto, finish if i == last else None, own)


def span_of(tensor: torch.Tensor) -> int:
    return SPAN.get(tensor.device.type, SPAN["cuda"])


def directions(batch: Sequence[Segment], rule: Rule) -> list[torch.Tensor]:
    """Advances the moments of a batch by one step and returns each segment's direction m_hat / (sqrt(v_hat) + eps).

    The segments agree in device, dtypes and kind of moments. Arithmetic is in fp32 (fp64 where the moments are).
    Gradients are cut off where their squares would overflow, at about 9e18 in fp32; the direction stays bounded.
    """
    quantized = len(batch[0].moments) == 4
    sizes = [segment.gradient.numel() for segment in batch]
    pads = [-size % BLOCK if quantized else 0 for size in sizes]
    first, second, *scales = zip(*(segment.moments for segment in batch), strict=True)
    if quantized:
        books = [code_book(signed, first[0].device) for signed in (True, False)]
        m, v = (
            decode(_join(codes, pads, book.zero), _join(absmax), book)
            for codes, absmax, book in zip((first, second), scales, books, strict=True)
        )
    else:
        m, v = _join(first), _join(second)
    limit = math.sqrt(torch.finfo(m.dtype).max) / 2
    gradient = _join([segment.gradient for segment in batch], pads).to(m.dtype).clamp(-limit, limit)
    m.lerp_(gradient, 1 - rule.beta1)
    v.mul_(rule.beta2).addcmul_(gradient, gradient, value=1 - rule.beta2)
    correction = 1 - rule.beta1**rule.age
    denominator = v.sqrt().mul_(correction / math.sqrt(1 - rule.beta2**rule.age)).add_(rule.eps * correction)
    direction = m / denominator
    if quantized:
        for x, codes, absmax, book in zip((m, v), (first, second), scales, books, strict=True):
            new_codes, new_absmax = encode(x, book)
            _scatter(new_codes, codes, sizes, pads)
            _scatter(new_absmax, absmax, [scale.numel() for scale in absmax])
    elif len(batch) > 1:  # of a single segment, m and v are the stored tensors themselves
        _scatter(m, first, sizes)
        _scatter(v, second, sizes)
    return _split(direction, sizes, pads)


def _join(parts: Sequence[torch.Tensor], pads: Sequence[int] = (), fill: int = 0) -> torch.Tensor:
    """One flat tensor of all parts, each followed by its number of `fill`. A part that stays alone is not copied."""
    if any(pads):
        parts = [x for part, pad in zip(parts, pads, strict=True) for x in (part, part.new_full((pad,), fill))]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(joined: torch.Tensor, sizes: Sequence[int], pads: Sequence[int] = ()) -> list[torch.Tensor]:
    """Views of the parts that `_join` joined."""
    if any(pads):
        return list(joined.split([n for pair in zip(sizes, pads, strict=True) for n in pair])[::2])
    return list(joined.split(list(sizes)))


def _scatter(
    joined: torch.Tensor, parts: Sequence[torch.Tensor], sizes: Sequence[int], pads: Sequence[int] = ()
) -> None:
    torch._foreach_copy_(list(parts), _split(joined, sizes, pads))
