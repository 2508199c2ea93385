"""Batches whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch


def by_adapter(keys: Sequence[Hashable], adapt: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """The outputs (rows, ...) of `adapt(key, *rows)` for the rows of each key, in the order of the rows.

    `keys` has one for each row of the `tensors`. Rows of one key that lie side by side are not copied.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    if len(rows) < 2:
        return adapt(next(iter(rows), None), *tensors)
    order = [row for group in rows.values() for row in group]
    index = None
    if order != list(range(len(order))):
        index = torch.tensor(order, device=tensors[0].device)
        tensors = tuple(tensor[index] for tensor in tensors)
    parts = zip(*(tensor.split([len(group) for group in rows.values()]) for tensor in tensors), strict=True)
    joined = torch.cat([adapt(key, *part) for key, part in zip(rows, parts, strict=True)])
    return joined if index is None else torch.empty_like(joined).index_copy(0, index, joined)
