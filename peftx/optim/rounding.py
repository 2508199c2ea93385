"""Stochastic rounding to bfloat16 (arXiv:2010.06192): right in the mean, where the nearest number hides small steps.

A bf16 number is the upper half of an fp32 number. Added to an fp32 number, a uniform one of 16 bits carries into the
upper half with exactly the probability of the lower half / 2^16; then the lower half is cut off.
"""

from __future__ import annotations

import torch

LOWER = 1 << 16
LARGEST = torch.finfo(torch.bfloat16).max
_WORD = (1 << 64) - 1


def seed_of(*numbers: int) -> int:
    """A seed that depends on every one of `numbers`, at least 0, in their order: SplitMix64's mixer, word by word.

    PyTorch's CPU generator uses the lower 32 bits of a seed alone, so these depend on all of them too.
    """
    seed = 0
    for number in numbers:
        seed = (seed + number + 0x9E3779B97F4A7C15) & _WORD
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _WORD
        seed ^= seed >> 31
    return seed


def write(onto: torch.Tensor, value: torch.Tensor, seed: int | None) -> None:
    """onto = value (fp32 or fp64), of one shape; rounded to the nearest, or, with a seed, bf16 stochastically.

    Every element becomes its lower or its upper neighbour, the upper one with the probability of its distance from the
    lower one in units of theirs: so the mean is the value, and a bf16 number stays itself. What is not finite, or
    beyond the largest bf16 number, is rounded to the nearest. Random bits come from a private generator.
    """
    if seed is None or onto.dtype != torch.bfloat16:
        onto.copy_(value)
        return
    generator = torch.Generator(value.device).manual_seed(seed)
    words = torch.empty(-(-value.numel() // 4), dtype=torch.int64, device=value.device)
    words.random_(-(1 << 63), None, generator=generator)  # four elements' bits in one draw
    bits = words.view(torch.int16)[: value.numel()].view(value.shape).int().add_(LOWER // 2)
    rounded = bits.add_(value.view(torch.int32)).bitwise_and_(-LOWER).view(torch.float32)
    onto.copy_(torch.where(value.abs() <= LARGEST, rounded, value))
