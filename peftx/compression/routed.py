"""What goes in and out of each expert of a mixture, in the passes that a model makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..adapters.experts import routed
from .sums import FISHER, exact_zeros, square_sums

Observer = Callable[..., None]  # of a parameter's name, its rows, what it makes of them, their routing and their tokens


class Observers(list[Observer]):
    """Those of one experts module.

    Attributes:
        before: the `forward` that the instance had, if it had one of its own.
    """

    before: Any = None

    def __call__(self, *seen: Any) -> None:
        for observe in self:
            observe(*seen)


class Observed:
    """Lets an experts module tell what its stacks are given and what they give, until `remove`.

    Rows are sorted by expert for that, and the products grouped, as transformers' `grouped_mm` does, its default: of
    that the outputs are equal bit for bit, of its other ways to compute experts up to rounding.
    """

    def __init__(self, experts: nn.Module, observe: Observer) -> None:
        self.experts, self.observe = experts, observe
        own: Any = vars(experts)
        if "observe" not in own:
            own["observe"] = Observers()
            own["observe"].before = own.get("forward")
            own["forward"] = partial(routed, experts, {})
        own["observe"].append(observe)

    def remove(self) -> None:
        own: Any = vars(self.experts)
        own["observe"].remove(self.observe)
        if not own["observe"]:
            before = own.pop("observe").before
            del own["forward"]
            if before is not None:
                own["forward"] = before


def squares_by_expert(
    x: Tensor,
    g: Tensor,
    experts: Tensor,
    samples: Tensor,
    count: int,
    sides: Collection[str] = FISHER,
    block: int | None = None,
) -> dict[str, Tensor]:
    """`square_sums` of the rows of each expert.

    Args:
        x, g: (T, in_features) and (T, out_features), of the same dtype.
        experts, samples: (T,), of each row.
        count: E, the number of experts.

    Returns:
        Side to (E, in_features) or (E, out_features) in float64.
    """
    sizes = {"fisher_in": x.shape[1], "fisher_out": g.shape[1]}
    sums = {side: exact_zeros(sizes[side], x.device).repeat(count, 1) for side in sides}
    for expert, some, of_some in by_expert(x, g, experts, samples):
        for side, found in square_sums(some, of_some, sides, block=block).items():
            sums[side][expert] = found
    return sums


def by_expert(x: Tensor, g: Tensor, experts: Tensor, samples: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows (T, in) and (T, out) as (N, L, in) and (N, L, out) of each expert that has some: one of its samples each,
    filled up with zeros, which add nothing to a gradient."""
    if not len(x):
        return
    several = int(samples.max()) + 1
    keys = experts * several + samples
    if bool((keys.diff() < 0).any()):
        order = keys.argsort(stable=True)
        x, g, keys = x[order], g[order], keys[order]
    found, lengths = (part.tolist() for part in keys.unique_consecutive(return_counts=True))
    start = 0
    for expert, group in groupby(zip(found, lengths, strict=True), lambda pair: pair[0] // several):
        own = [length for _, length in group]
        parts = [part[start : start + sum(own)] for part in (x, g)]
        start += sum(own)
        some, of_some = (pad_sequence(part.split(own), True) if len(own) > 1 else part[None] for part in parts)
        yield expert, some, of_some
