"""One adapter of one layer: what a method defines."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .sites import ExpertsSite, LinearSite, Site


class Adapter(nn.Module):
    """One adapter of one layer, as a module of its own: parameters are trained, buffers are frozen.

    A method is a subclass, registered by `peftx.register`. Its constructor makes the tensors from the site and the
    config; with `config.init_weights=True` the adapted layer must then equal the base layer bit for bit. It defines

    - `delta_weight()`: the dense weight delta, at least in fp32;
    - `add_delta(x, result)`: the output with the adapter's contribution (default: by the dense delta);
    - `lora_factors()`: the delta as a LoRA, where it is exactly one;
    - `no_delta`: where an adapter is no change of the weight, the reason. It defines `add_delta` then, which may also
      read the layer's output, `result`; there is no `delta_weight`, and merging is refused with the reason.

    Everything else (several adapters, merging, quantised bases, mixed batches, dtypes, deletion, saving) is done for
    it. In files a tensor `block` of the method `bone` is called `<layer>.bone_adapter.block`.

    Args:
        site: the layer it sits on, with its shape, dtype and weight.
        config: the method's config, resolved for this layer.

    Attributes:
        scale: factor of the delta, set by `set_scale`, `scale_layer` and `peftx.rescale_adapter_scale`; 1 at the start.
        frozen: names of parameters that no call makes trainable.
    """

    sites: ClassVar[tuple[type[Site], ...]] = (LinearSite,)
    no_delta: ClassVar[str] = ""
    kept: dict[Any, Any] | None = None  # what is made of the tensors, within `peftx.inference`
    # Whether `add_delta` takes the base layer's weight too, where `result` is detached, and the gradient that x has
    # through the base layer is the adapter's to make.
    joins: ClassVar[bool] = False
    grouped: ClassVar[bool] = False  # whether `add_delta` takes tensors with a leading axis of experts too

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()
        self.site = site
        self.config = config
        self.scale = 1.0
        self.frozen: tuple[str, ...] = ()

    def forward(self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output `result` for `x` with the adapter's contribution. `weight` is given where `joins`."""
        return self.add_delta(x, result) if weight is None else self.add_delta(x, result, weight)  # type: ignore[call-arg]

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """As `forward`. Shapes for a linear layer: x (..., in_features), result (..., out_features)."""
        return self.site.add_dense(self.scale * self.delta_weight(), x, result)

    def delta_weight(self) -> torch.Tensor:
        """Dense weight delta (out_features, in_features, kernel axes), at least in fp32, without `self.scale`."""
        raise NotImplementedError

    def apply_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (as `delta_weight`) with the adapter merged in; a new tensor."""
        return weight + self.scale * self.delta_weight().to(weight.dtype)

    def remove_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Inverse of `apply_delta`."""
        return weight - self.scale * self.delta_weight().to(weight.dtype)

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in_features) and B (out_features, r) with B A equal to the scaled delta.

        Raises:
            NotImplementedError: the delta has no such factors.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no exact LoRA form here: give a rank, to which it is cut, or merge it."
        )

    def prefers_dense(self, tokens: int) -> bool:
        """Whether the adapted weight should be built for an input of `tokens` rows, instead of calling `add_delta`."""
        return False

    @property
    def composes(self) -> bool:
        """Whether its delta is made from the weight that it is added to, with what other adapters changed before."""
        return False

    def shares(self, tokens: int) -> Any:
        """What adapters have in common that `add_rows` takes together, of a mixed batch with `tokens` rows for each
        sample; None: they are called one by one."""
        return None

    @classmethod
    def add_rows(cls, adapters: Sequence[Any], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """As `add_delta`, with an adapter for each sample, all of one answer to `shares`."""
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """Whether it draws a dropout of its input now, so that no dense weight is what it does."""
        return False

    @classmethod
    def over_experts(cls, site: ExpertsSite, config: Any) -> Adapter:
        """The adapter of a stack of experts: one of each, their tensors stacked along a leading axis.

        Raises:
            NotImplementedError: the method has no such form, with the reason.
        """
        adapter, *others = (cls(site.at(expert), config) for expert in range(site.experts))
        if any(adapter.children()):
            raise NotImplementedError(f"{cls.__name__} keeps modules of its own, which have no stacked form.")
        for name, first in [*adapter._parameters.items(), *adapter._buffers.items()]:
            assert first is not None
            stack = torch.stack([first.data, *(getattr(other, name).data for other in others)])
            trained = isinstance(first, nn.Parameter)
            setattr(adapter, name, nn.Parameter(stack, requires_grad=first.requires_grad) if trained else stack)
        adapter.site = site
        return adapter

    def at(self, expert: int) -> Adapter:
        """Of the adapter of a stack, that of one expert, whose gradients go to the stack's tensors."""
        parameters, buffers = (
            {name: tensor[expert] for name, tensor in tensors.items() if tensor is not None}
            for tensors in (self._parameters, self._buffers)
        )
        return self.with_tensors(expert, parameters, buffers)

    def with_tensors(self, expert: int, parameters: dict[str, Any], buffers: dict[str, Any]) -> Adapter:
        """A copy for one expert of a stack, with these tensors."""
        one, site = copy.copy(self), self.site
        assert isinstance(site, ExpertsSite)
        one._parameters, one._buffers, one.site = parameters, buffers, site.at(expert)
        return one

    def prepare_all(self, tensors: dict[str, torch.Tensor]) -> None:
        """`prepare_load`, of a stack for one expert after the other."""
        count = getattr(self.site, "experts", None)
        if count is None or type(self).prepare_load is Adapter.prepare_load:
            return self.prepare_load(tensors)
        if any(tensor.shape[:1] != (count,) for tensor in tensors.values()):
            return None  # the comparison of shapes says so
        ones, parts = [], []
        for expert in range(count):
            ones.append(self.at(expert))
            parts.append({name: tensor[expert] for name, tensor in tensors.items()})
            ones[-1].prepare_load(parts[-1])
        tensors.clear()
        tensors.update({name: torch.stack([part[name] for part in parts]) for name in parts[0]})
        for name in self._buffers:
            self._buffers[name] = torch.stack([one._buffers[name] for one in ones])  # type: ignore[misc]
        return None

    def prepare_load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Called with an adapter's tensors from a file, by name, before they are loaded; may refuse them by a
        ValueError, or replace them in `tensors`."""

    def freeze(self, *names: str) -> None:
        """Keeps the named parameters frozen whatever becomes active."""
        self.frozen = (*self.frozen, *names)


def is_dense(adapters: Sequence[Adapter], tokens: int) -> bool:
    """Whether the adapters' weight should be built for an input of `tokens` rows."""
    composed = len(adapters) > 1 and any(adapter.composes for adapter in adapters)
    dense = composed or any(adapter.prefers_dense(tokens) for adapter in adapters)
    return dense and not any(adapter.drops for adapter in adapters)
