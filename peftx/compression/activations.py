"""Sums over what goes into layers, for methods that look at activations."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.sites.experts import Routing
from .batch import Batch
from .sums import widest
from .totals import Totals


@dataclass
class Seen:
    """An input of a layer, or of several that stand side by side, and the sums over it."""

    x: Tensor
    version: int
    side: str
    count: int
    sums: dict[str, Tensor]
    names: list[str]

    def gave(self, x: Tensor, side: str) -> bool:
        """Whether `x` is this input, unchanged."""
        same = self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape and self.x.stride() == x.stride()
        return same and self.x.dtype == x.dtype and self.version == x._version and self.side == side


class Activations:
    """Adds up the inputs of layers in the order in which they are called.

    Args:
        totals: where the sums go.
        decoding: layers whose inputs are the decoder's, unless they are what the encoder gave it.
    """

    def __init__(self, totals: Totals, decoding: Collection[str]) -> None:
        self.totals, self.decoding = totals, decoding
        self._seen: Seen | None = None

    @torch.no_grad()
    def add_routed(self, name: str, x: Tensor, routing: Routing, tokens: Tensor, batch: Batch) -> None:
        """Counts the rows x (T, in) of a stack of experts, each with the token that it is of."""
        mask = batch.masks["decoder" if name in self.decoding else "encoder"]
        count = int(tokens.max()) + 1 if len(tokens) else 0
        chosen = None
        if mask is not None and mask.numel() == count and not mask.all():
            chosen, count = mask.reshape(-1).to(tokens.device)[tokens], int(mask.sum())
        start = 0
        for expert, end in enumerate(routing.offsets.tolist()):
            rows = x[start:end] if chosen is None else x[start:end][chosen[start:end]]
            start = end
            for part, found in self._sums(rows).items():
                self.totals.add_expert(name, part, expert, found)
        self.totals.positions[name] += count

    def _sums(self, rows: Tensor) -> dict[str, Tensor]:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sums = {}
        if "abs_mean" in self.totals.fields:
            sums["abs_mean"] = rows.abs().sum(0, dtype=widest(rows.device))
        if "gram" in self.totals.fields:
            with torch.autocast(rows.device.type, enabled=False):
                sums["gram"] = rows.T @ rows
        return sums

    @torch.no_grad()
    def add(self, name: str, x: Tensor, batch: Batch) -> None:
        crossed = batch.encoded is not None and x.data_ptr() == batch.encoded.data_ptr()
        side = "decoder" if name in self.decoding and not crossed else "encoder"
        if self._seen is not None and self._seen.gave(x, side) and name not in self._seen.names:
            self._seen.names.append(name)
            return
        self.settle()
        rows = x.reshape(-1, x.shape[-1])
        mask = batch.masks[side]
        if mask is not None and mask.numel() == len(rows) and not mask.all():
            rows = rows[mask.reshape(-1)]
        self._seen = Seen(x, x._version, side, len(rows), self._sums(rows), [name])

    def settle(self) -> None:
        """Counts the last input, when it is known which layers were given it."""
        seen, self._seen = self._seen, None
        if seen is not None:
            for part, found in seen.sums.items():
                self.totals.add(tuple(seen.names), part, found)
            for name in seen.names:
                self.totals.positions[name] += seen.count

    def drop(self) -> None:
        """Forgets an input that is not counted yet."""
        self._seen = None
