"""Batches whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def by_adapter(
    names: Sequence[str],
    adapt: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    result: torch.Tensor,
) -> torch.Tensor:
    """The outputs (rows, ...) of `adapt(name, x, result)` for the rows of each adapter, in the order of the rows.

    `names` has one for each row of `x` and `result`. Rows of one adapter that lie side by side are not copied.
    """
    if not names:
        return result
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    order = [row for group in rows.values() for row in group]
    index = None
    if order != list(range(len(order))):
        index = torch.tensor(order, device=x.device)
        x, result = x[index], result[index]
    sizes = [len(group) for group in rows.values()]
    parts = zip(rows, x.split(sizes), result.split(sizes), strict=True)
    joined = torch.cat([adapt(*part).to(result.dtype) for part in parts])
    return joined if index is None else result.index_copy(0, index, joined)
