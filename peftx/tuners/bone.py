"""Bone (Block Affine), arXiv:2409.15371, as in PEFT 0.14 to 0.18, whose files load unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import Adapter, AdapterConfig, ExpertsSite, Site, register
from ..adapters.products import at_least_fp32

BLOCK = 2**17, 2**24  # numbers of `bat_output` that exist at a time, on a CPU and elsewhere


@dataclass
class BoneConfig(AdapterConfig):
    """Block-affine adaptation: one r x out_features block, repeated along the input axis of the weight.

    Default mode: delta[o, j] = D[j mod r, o], D of shape (r, out_features), zero at the start. Mode `"bat"`: with the
    weight cut into r x r tiles, delta[a, b] = (W[a, b] + I) B[a], B of shape (out_features / r, r, r), zero at the
    start; it needs r to divide both widths, and adapters that are stacked or merged compose in their order. Either mode
    trains r * out_features values a module. There is no scaling factor and no dropout.

    Args:
        r: block size; default 64 (the paper's). In the default mode any positive number.
        init_weights: `True` (default mode), `"bat"`, or `False` (default mode with a random start, for tests).
        rank_pattern: `{name or regex: r}` for modules that deviate from `r`. An addition to PEFT 0.18's fields.
        bias: `"none"`, `"all"` or `"bone_only"`. Unlike in PEFT 0.18, trained biases are saved.

    The other arguments and the errors raised are those of `peftx.AdapterConfig`.
    """

    r: int = field(default=64, metadata={"help": "Block size; the adapter trains r * out_features values a module."})
    init_weights: bool | Literal["bat"] = field(  # type: ignore[assignment]
        default=True,
        metadata={"help": "True: default mode. 'bat': weight-dependent blocks. False: random start (tests)."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Block size of modules (name or regex) that deviate from `r`."}
    )


def fold(x: torch.Tensor, r: int) -> torch.Tensor:
    """Sums the entries of the last axis whose index is equal modulo r: (..., n) -> (..., r)."""
    if x.shape[-1] % r:
        x = F.pad(x, (0, -x.shape[-1] % r))
    return x.unflatten(-1, (-1, r)).sum(-2)


def tile(block: torch.Tensor, in_features: int) -> torch.Tensor:
    """Delta of the default mode: block (r, out) -> (out, in_features), periodic along the input axis."""
    r = block.shape[0]
    return block.T.repeat(1, math.ceil(in_features / r))[:, :in_features]


def bat_delta(weight: torch.Tensor, block: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """Delta of the bat mode, (W[a, b] + I) B[a] for each r x r tile, added to `onto` if given.

    Shapes: weight and onto (out, in), block (out / r, r, r).
    """
    r = block.shape[-1]
    tiles = weight.reshape(len(block), -1, r)
    product = torch.bmm(tiles, block) if onto is None else torch.baddbmm(onto.reshape(tiles.shape), tiles, block)
    return (product.view(len(block), r, -1, r) + block[:, :, None, :]).view(weight.shape)


def bat_output(x: torch.Tensor, block: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bat_delta(weight, block)^T without the delta, for several blocks at once.

    The products B[a] x[b] are out in / r numbers for each token; what exists of them at a time stays in a CPU's cache.

    Shapes: x (G, T, in), block (G, out / r, r, r), weight (out, in); returns (G, T, out).
    """
    (groups, tokens, width), (_, count, r, _) = x.shape, block.shape
    parts, tiles = x.unflatten(-1, (-1, r)), weight.unflatten(0, (count, r)).mT
    inputs, size = parts.flatten(1, 2), max(1, BLOCK[x.device.type != "cpu"] // max(groups * tokens * width, 1))
    outputs = []
    for start in range(0, count, size):
        some = block[:, start : start + size]
        inner = torch.bmm(inputs, some.flatten(1, 2).mT).view(groups * tokens, width // r, some.shape[1], r)
        inner = inner.permute(2, 0, 1, 3).reshape(some.shape[1], groups * tokens, width)
        outputs.append(torch.bmm(inner, tiles[start : start + size]))
    outer = torch.cat(outputs).transpose(0, 1).reshape(groups, tokens, count * r)
    return torch.baddbmm(outer, parts.sum(dim=-2), block.flatten(1, 2).mT)


def bat_invert(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The W for which `W + bat_delta(W, block)` is `weight`: (W'[a, b] - B[a]) (I + B[a])^-1."""
    r = block.shape[-1]
    tiles = (weight.reshape(len(block), r, -1, r) - block[:, :, None, :]).reshape(len(block), -1, r)
    return torch.linalg.solve(torch.eye(r, dtype=block.dtype, device=block.device) + block, tiles, left=False).reshape(
        weight.shape
    )


@register(
    "bone",
    config=BoneConfig,
    paper="arXiv:2409.15371",
    lora_export="exact",
    svd_settings={"init_weights": "bat"},
    tiny={"r": 2},
    learning_rate=3e-4,
    variants={"bone": {}, "bone-bat": {"init_weights": "bat"}},
)
class Bone(Adapter):
    grouped = True
    block: nn.Parameter

    def __init__(self, site: Site, config: BoneConfig) -> None:
        super().__init__(site, config)
        r = config.r
        if config.init_weights == "bat":
            if site.in_features % r or site.out_features % r:
                raise ValueError(
                    f"init_weights='bat' cuts the weight into r x r tiles, but r={r} does not divide both "
                    f"in_features={site.in_features} and out_features={site.out_features}."
                )
            if site.backend is not None and not site.backend.supports_merge:
                raise TypeError(
                    f"init_weights='bat' needs the weight itself, which {site.backend.backend_name} layers cannot "
                    "give. Use the default mode, init_weights=True."
                )
        block = torch.zeros(self._bat_shape if config.init_weights == "bat" else (r, site.out_features))
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.block = nn.Parameter(block)

    @classmethod
    def over_experts(cls, site: ExpertsSite, config: BoneConfig) -> Adapter:
        if config.init_weights == "bat":
            raise NotImplementedError(
                "init_weights='bat' builds the dense weight of every expert in every step. Use the default mode, True."
            )
        return super().over_experts(site, config)

    @property
    def _bat_shape(self) -> tuple[int, int, int]:
        return self.site.out_features // self.config.r, self.config.r, self.config.r

    @property
    def is_bat(self) -> bool:
        return self.block.ndim == 3 and not isinstance(self.site, ExpertsSite)

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if self.is_bat:
            return self.add_rows([self], x[None], result[None])[0]
        return self.site.accumulate(result, fold(x, self.block.shape[-2]), self.block.mT, self.scale)

    @property
    def composes(self) -> bool:
        return self.is_bat

    def prefers_dense(self, tokens: int) -> bool:
        return self.is_bat and (self.kept is not None or tokens > self._few)

    @property
    def _few(self) -> int:
        """How many tokens cost less than a dense weight, which takes r products for each of its numbers."""
        return 6 + self.block.shape[-1] // 4

    def shares(self, tokens: int) -> Any:
        # A dense weight that is kept is quicker still, as long as each has tokens enough to be worth its reading.
        few = self._few if self.kept is None else 2
        return self.block.shape if self.is_bat and tokens <= few else None

    @classmethod
    def add_rows(cls, adapters: Sequence[Any], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        first, dtype = adapters[0], result.dtype
        scaled = [adapter.block if adapter.scale == 1 else adapter.scale * adapter.block for adapter in adapters]
        block = torch.stack(scaled).to(dtype)
        flat = x.to(dtype).reshape(len(adapters), -1, x.shape[-1])
        return result + bat_output(flat, block, first.site.weight().to(dtype)).view(result.shape).to(dtype)

    def delta_weight(self) -> torch.Tensor:
        block = at_least_fp32(self.block)
        if self.is_bat:
            weight = self.site.unmerged_weight()
            return bat_delta(weight, block.to(weight.dtype))
        return tile(block, self.site.in_features)

    def apply_delta(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.is_bat:
            return super().apply_delta(weight)
        return bat_delta(weight, self.scale * self.block.to(weight.dtype), onto=weight)

    def remove_delta(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.is_bat:
            return super().remove_delta(weight)
        return bat_invert(weight, self.scale * self.block.to(weight.dtype))

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_bat:
            return super().lora_factors()
        block = self.scale * self.block.detach()
        return tile(torch.eye(len(block), dtype=block.dtype, device=block.device), self.site.in_features), block.T

    def prepare_load(self, tensors: dict[str, torch.Tensor]) -> None:
        # Files of PEFT's main branch of November 2024 hold bat blocks but say init_weights=true.
        found = tensors.get("block")
        if found is not None and found.shape == self._bat_shape and not self.is_bat:
            self.block = nn.Parameter(self.block.new_zeros(found.shape), requires_grad=self.block.requires_grad)
