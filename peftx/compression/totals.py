"""Sums over batches, by layer, and the means that they give."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .layers import describe, shape_of, signature
from .stacks import Layer
from .statistics import LayerStatistics, Statistics
from .sums import FISHER

logger = logging.get_logger(__name__)

Group = tuple[str, ...]  # of layers that were given the same input, in the same calls


class Totals:
    """What was collected so far.

    Sums over inputs are held once for all layers that were given the same, as query, key and value are: by the group
    of layers that each input went to. A layer that now and then stands alone is in several groups, which add up to its
    sum; so nothing needs to be known of the model.

    Args:
        layers: by name.
        fields: of `LayerStatistics`, what is collected.
    """

    def __init__(self, layers: Mapping[str, Layer], fields: tuple[str, ...]) -> None:
        self.layers, self.fields = dict(layers), fields
        self.sums: dict[tuple[Group, str], Tensor] = {}
        self.samples = self.tokens = self.dropped = 0
        self.positions: Counter[str] = Counter()  # that a layer has seen, for the means over tokens

    def add(self, group: Group, part: str, found: Tensor) -> None:
        if (group, part) in self.sums:
            self.sums[group, part] += found.to(self.sums[group, part])
        else:
            self.sums[group, part] = found  # which nobody else holds

    def add_expert(self, name: str, part: str, expert: int, found: Tensor) -> None:
        """Adds to the sums of one expert of a stack."""
        key = (name,), part
        if key not in self.sums:
            self.sums[key] = found.new_zeros(shape_of(self.layers[name])[0], *found.shape)
        self.sums[key][expert] += found

    def groups(self, name: str, part: str) -> tuple[Group, ...]:
        """Those whose sums are the layer's."""
        return tuple(group for group, other in self.sums if other == part and name in group)

    def reduce(self, total: Any, device: torch.device | str = "cpu") -> None:
        """Adds up over processes: every one of them calls it, with `total` the sum of a tensor over them."""
        names = list(self.layers)
        counts = [self.samples, self.tokens, self.dropped, *(self.positions[name] for name in names)]
        found = total(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()
        self.samples, self.tokens, self.dropped = found[:3]
        self.positions = Counter(dict(zip(names, found[3:], strict=True)))
        keys = list(self._common(total, device))
        mine = [self.sums.get(key) for key in keys]
        kinds = [[part is not None, part is not None and part.dtype == torch.float64] for part in mine]
        for key, part, (there, wide) in zip(
            keys, mine, total(torch.tensor(kinds, dtype=torch.int64, device=device)).tolist(), strict=True
        ):
            if there:
                part = torch.zeros(self._size(key[0][0], key[1])) if part is None else part
                self.sums[key] = total(part.to(device, torch.float64 if wide else torch.float32))

    def _common(self, total: Any, device: torch.device | str) -> Iterator[tuple[Group, str]]:
        """The keys that all processes have, or will have; where they group layers differently, each layer is alone."""
        names = list(self.layers)
        place = {name: i for i, name in enumerate(names)}
        for part in self.fields:
            owners = [self.groups(name, part) for name in names]
            first = torch.tensor([place[own[0][0]] if len(own) == 1 else -1 for own in owners], device=device)
            count, once, squared = total(torch.stack([torch.ones_like(first), first, first.square()]))
            if bool((count * squared == once.square()).all()) and bool((once >= 0).all()):  # Cauchy and Schwarz: equal
                yield from ((group, part) for group in dict.fromkeys(own[0] for own in owners))
            else:
                parts = [[self.sums[group, part] for group in own] for own in owners]
                self.sums = {key: found for key, found in self.sums.items() if key[1] != part}
                for name, own in zip(names, parts, strict=True):
                    if own:
                        self.sums[(name,), part] = sum(own[1:], own[0].clone())
                yield from (((name,), part) for name in names)

    def _size(self, name: str, part: str) -> tuple[int, ...]:
        *stack, out, into = shape_of(self.layers[name])
        return (*stack, *{"fisher_out": (out,), "gram": (into, into)}.get(part, (into,)))

    def statistics(self, model: nn.Module, estimator: str) -> Statistics:
        """The means, without layers that took no part, of which a warning tells. Layers of one input share a tensor.

        Raises:
            ValueError: there were no samples, no layer took part, or sums are not finite.
        """
        if not self.samples:
            lost = f" ({self.dropped} batches had gradients that are not finite)" if self.dropped else ""
            raise ValueError(f"no sample with a label was collected{lost}")
        used = [name for name in self.layers if all(self.groups(name, part) for part in self.fields)]
        if unused := [name for name in self.layers if name not in used]:
            said = f"{len(unused)} of {len(self.layers)} layers took part in no forward or backward pass"
            if not used:
                raise ValueError(f"{said}: is it this model that is called?")
            logger.warning(f"{said}, so there are no statistics of them: {', '.join(unused)}")
        means: dict[tuple[tuple[Group, ...], str], Tensor] = {}
        layers = {}
        for name in used:
            found: dict[str, Any] = dict.fromkeys((*FISHER, "abs_mean", "gram"))
            for part in self.fields:
                key = self.groups(name, part), part
                if key not in means:
                    means[key] = self._mean(name, *key)
                found[part] = means[key]
            layer = self.layers[name]
            layers[name] = LayerStatistics(**found, shape=shape_of(layer), signature=signature(layer))
        return Statistics(layers, samples=self.samples, tokens=self.tokens, estimator=estimator, model=describe(model))

    def _mean(self, name: str, groups: tuple[Group, ...], part: str) -> Tensor:
        count = self.samples if part in FISHER else self.positions[name]
        parts = [self.sums[group, part] for group in groups]
        mean = (sum(parts[1:], parts[0]) / count).cpu()
        if not mean.isfinite().all():
            raise ValueError(f"{part} of {name} is not finite: look for NaN and infinity in the activations")
        return (mean + mean.mT).div_(2) if part == "gram" else mean.double()
