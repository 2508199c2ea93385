"""What goes in and out of each expert of a mixture, in the passes that a model makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..adapters.experts import routed

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


def by_expert(x: Tensor, g: Tensor, experts: Tensor, samples: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows (T, in) and (T, out) as (N, L, in) and (N, L, out) of each expert that has some: one of its samples each,
    filled up with zeros, which add nothing to a gradient.

    Args:
        experts, samples: (T,), of each row.
    """
    order = samples.argsort(stable=True)
    order = order[experts[order].argsort(stable=True)]
    pairs, lengths = torch.stack([experts, samples])[:, order].unique_consecutive(return_counts=True, dim=1)
    sizes = lengths.tolist()
    start = 0
    for expert, group in groupby(range(len(sizes)), pairs[0].tolist().__getitem__):
        own = [sizes[i] for i in group]
        rows = order[start : start + sum(own)]
        start += len(rows)
        some, of_some = (pad_sequence(part[rows].split(own), batch_first=True) for part in (x, g))
        yield expert, some, of_some
