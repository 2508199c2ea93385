"""What the error of each layer is measured with, of a model's layers and of each expert of its stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .factorize import Weighting, needs_no_factor, parts_for, scale_for, weighting_for
from .statistics import FIELDS, LayerStatistics, Statistics


class Piece(NamedTuple):
    """What is decomposed at a time: a linear layer, or one expert of a stack."""

    layer: str
    expert: int | None = None

    @property
    def name(self) -> str:
        return self.layer if self.expert is None else f"{self.layer}.{self.expert}"


def pieces_of(layer: str, shape: tuple[int, ...]) -> list[Piece]:
    """Those of a layer of this shape."""
    return [Piece(layer, expert) for expert in range(shape[0])] if len(shape) > 2 else [Piece(layer)]


class Weightings:
    """The weighting of each piece, the last one kept: layers that stand side by side share a Gram matrix.

    An expert that no token of the statistics reached has no sums, but the rank of the others: it is weighted by the
    mean of the sums of those that have some.

    Args:
        shapes: of each layer, as `shape_of` has it.
        how: `side` and `alpha`.
    """

    def __init__(
        self,
        method: str,
        statistics: Statistics | None,
        shapes: Mapping[str, tuple[int, ...]],
        how: Mapping[str, Any],
    ) -> None:
        self.method, self.statistics, self.shapes, self.how = method, statistics, shapes, how
        self._last: tuple[Tensor | None, torch.device | None, Weighting] = (None, None, Weighting())
        self._stack: tuple[str, dict[str, tuple[Tensor, Tensor]]] = ("", {})

    def check(self, piece: Piece) -> dict[str, Tensor]:
        """What the piece's weighting is made of.

        Raises:
            ValueError: it is missing or unusable.
        """
        known = self._known(piece)
        if known is None and self.method != "svd":
            raise ValueError(
                f"{piece.layer}: no statistics for this layer; collect them with the same target_modules, or leave it "
                "out with exclude_modules"
            )
        with naming(piece.name):
            return parts_for(self.method, known, self._shape(piece), **self.how)

    def of(self, piece: Piece, device: torch.device, randomized: bool | None) -> Weighting:
        known, shape = self._known(piece), self._shape(piece)
        gram = None if known is None or self.method != "svd-llm" else known.gram
        if gram is not None and needs_no_factor(shape, randomized):
            with naming(piece.name):
                return weighting_for(self.method, known, shape, **self.how, factored=False)
        if gram is not None and self._last[0] is gram and self._last[1] == device:
            made = self._last[2]
        else:
            self._last = (None, None, Weighting())
            with naming(piece.name):
                made = weighting_for(self.method, known, shape, **self.how, device=device)
            if gram is not None:
                self._last = (gram, device, made)
        return made

    def scale(self, piece: Piece) -> float:
        """What squared singular values are multiplied by to be comparable; 0 of an expert that no token reached."""
        if piece.expert in self.unseen(piece.layer):
            return 0.0
        return scale_for(self.method, self._known(piece), self._shape(piece), **self.how)

    def unseen(self, layer: str) -> tuple[int, ...]:
        """Experts of a stack that have no sums of the kind that the method needs."""
        known = None if self.statistics is None else self.statistics.get(layer)
        if known is None or len(known.shape) == 2:
            return ()
        lacking: set[int] = set()
        for field in self._fields():
            if (part := getattr(known, field)) is not None:
                lacking.update(self._seen(layer, field, part)[0].logical_not().nonzero().flatten().tolist())
        return tuple(sorted(lacking))

    def _fields(self) -> list[str]:
        if self.method == "fwsvd":
            return [f"fisher_{way}" for way in ("in", "out") if self.how["side"] in (way, "both")]
        return {"asvd": ["abs_mean"], "svd-llm": ["gram"]}.get(self.method, [])

    def _shape(self, piece: Piece) -> tuple[int, int]:
        out, into = self.shapes[piece.layer][-2:]
        return out, into

    def _known(self, piece: Piece) -> LayerStatistics | None:
        known = None if self.statistics is None else self.statistics.get(piece.layer)
        if known is None or piece.expert is None:
            return known
        parts: dict[str, Any] = dict.fromkeys(FIELDS)
        for field in self._fields():
            if (part := getattr(known, field)) is not None:
                seen, mean = self._seen(piece.layer, field, part)
                parts[field] = part[piece.expert] if seen[piece.expert] else mean
        return LayerStatistics(**parts | {"shape": self._shape(piece), "signature": known.signature})

    def _seen(self, layer: str, field: str, part: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts have sums of a field, and the mean of theirs."""
        if self._stack[0] != layer:
            self._stack = (layer, {})
        if field not in self._stack[1]:
            sizes = part.diagonal(dim1=-2, dim2=-1) if field == "gram" else part
            seen = sizes.ne(0).any(-1)
            self._stack[1][field] = seen, part.sum(0) / seen.sum().clamp(min=1)
        return self._stack[1][field]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the name of a layer before an error about it."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{name}: {error}") from None
