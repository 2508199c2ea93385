"""FLoRA (low-rank core space for N dimensions), arXiv:2405.14739: Tucker-form deltas that keep the axes of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters.config import AdapterConfig, Number
from ..adapters.layer import AdapterLayer, accumulate, at_least_fp32
from ..registry import register

InitScheme = Literal["paper", "lora_like", "gaussian"]
Ranks = int | list[int]


@dataclass
class FloraConfig(AdapterConfig):
    """Adds a Tucker-form delta: a small core with one rank for each mode (axis) of the weight, and a factor for each.

    For a convolution with 2-d kernels,

        delta[o, i, p, q] = s sum_abcd G[a, b, c, d] A[i, a] B[o, b] K[p, c] L[q, d]

    with i over in_channels / groups; for a linear layer, delta = s B G^T A^T; an embedding is a linear layer that reads
    one-hot vectors. G starts at zero, so the first step moves G alone. Everything is trained, r1 in + r2 out + r3 kh +
    r4 kw + r1 r2 r3 r4 values a module (LoRA's and r^2 more for a linear layer).

    Args:
        r: ranks of the modes. An int is the rank of the input and the output; a list is (input, output), or has one
            entry for every mode of the weight, in the order (input, output, kernel axes). Default 8. A rank above the
            size of its mode is an error, but where groups or few image channels make the input mode of a convolution
            smaller, its rank is that size: with groups for every `r`, without them for an int.
        r_spatial: ranks of the kernel axes, where `r` does not list them. An int (default: 2) is an upper bound, since
            kernels of one model differ: an axis of size k has rank min(k, r_spatial). A list has an entry for each
            axis.
        scale: the constant s. Default: 4.0 for convolutions and 1.0 for other layers, the paper's.
        alpha: instead of `scale`, s = alpha / rank of the output mode, as in LoRA.
        init_scheme: the factors' start, for a mode of size n and rank r: `"paper"` N(0, 1 / (2 r)), whatever n
            (default); `"lora_like"` U(-1, 1) / sqrt(n) for A and U(-1, 1) / sqrt(r) for the others; `"gaussian"`
            N(0, 0.02^2).
        flora_dropout: probability of dropping an entry of the adapter's input in training (for an embedding, of the
            looked-up rows, after G). Default 0.
        rank_pattern: `{name or regex: r}` for modules that deviate from `r`.

    Of an embedding, the padding row stays that of the base model. The other arguments and the errors raised are those
    of `peftx.AdapterConfig`.
    """

    r: Ranks = field(default=8, metadata={"help": "Rank of input and output, or a list with one rank for each mode."})
    r_spatial: Ranks | None = field(
        default=None, metadata={"help": "Ranks of the kernel axes of a convolution; an int is an upper bound, None 2."}
    )
    scale: Number | None = field(
        default=None, metadata={"help": "Constant factor of the delta; None: 4 for convolutions, 1 for other layers."}
    )
    alpha: Number | None = field(default=None, metadata={"help": "Instead of `scale`: the factor is alpha / rank."})
    init_scheme: InitScheme = field(default="paper", metadata={"help": "How the factors start; the core starts at 0."})
    flora_dropout: Number = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in training only."})
    rank_pattern: dict[str, Ranks] = field(
        default_factory=dict, metadata={"help": "Ranks of modules (name or regex) that deviate from `r`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 2), ("r_spatial", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            ranks = value if isinstance(value, list) else [value] * least
            if len(ranks) < least or not all(rank > 0 for rank in ranks):
                raise ValueError(
                    f"`{name}` must be a positive integer or a list of at least {least}, one a mode, got {value}."
                )
        if isinstance(self.r, list) and len(self.r) > 2 and self.r_spatial is not None:
            raise ValueError(f"r={self.r} and r_spatial={self.r_spatial} both give the ranks of the kernel axes.")
        if self.scale is not None and self.alpha is not None:
            raise ValueError("`scale` and `alpha` both set the factor of the delta: give one of them.")
        if not 0 <= self.flora_dropout < 1:
            raise ValueError(f"`flora_dropout` must be in [0, 1), got {self.flora_dropout}.")


def mode_ranks(config: FloraConfig, modes: Sequence[int], groups: int = 1) -> tuple[int, ...]:
    """The rank of each mode of a weight with `modes` (input of one group, output, kernel axes).

    Raises:
        ValueError: too few or many ranks, or a rank above the size of its mode.
    """
    r, spatial = config.r, config.r_spatial or 2
    ranks = list(r) if isinstance(r, list) else [r, r]
    if len(ranks) == 2 < len(modes):
        ranks += spatial if isinstance(spatial, list) else [min(k, spatial) for k in modes[2:]]
    if groups > 1 or (isinstance(r, int) and len(modes) > 2):
        ranks[0] = min(ranks[0], modes[0])
    names = ("in", "out", *(f"kernel axis {axis}" for axis in range(len(modes) - 2)))
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, modes, strict=True))
    way_out = "Lower `r`, or set it for this module in `rank_pattern`."
    if len(ranks) != len(modes):
        raise ValueError(f"r={ranks} are {len(ranks)} ranks for a weight with {len(modes)} modes ({sizes}). {way_out}")
    if any(rank > size for rank, size in zip(ranks, modes, strict=True)):
        raise ValueError(f"r={ranks} is larger than the sizes of the modes ({sizes}). {way_out}")
    return tuple(ranks)


def start(size: int, rank: int, scheme: InitScheme, fan_in: int) -> torch.Tensor:
    """A factor (size, rank) before training."""
    if scheme == "lora_like":
        return (2 * torch.rand(size, rank) - 1) / math.sqrt(fan_in)
    return torch.randn(size, rank) * (1 / math.sqrt(2 * rank) if scheme == "paper" else 0.02)


def contract(core: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiplies each of the last axes of `core` by its factor (size, rank): (..., r3, r4) -> (..., kh, kw)."""
    for factor in factors:
        core = core.movedim(-len(factors), -1) @ factor.T
    return core


def lora_pair(
    G: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *kernel: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`down` (r, in, kernel axes) and `up` (out, r) with delta = sum_r up[:, r] down[r].

    r is the lower of G's output rank and the product of its other ranks, the largest rank such a delta can have.
    """
    others = (G.shape[0], *G.shape[2:])
    core = G.transpose(0, 1)
    if math.prod(others) < G.shape[1]:
        B = B @ core.flatten(1)
        core = torch.eye(math.prod(others), dtype=G.dtype, device=G.device).unflatten(1, others)
    return contract(core, (A, *kernel)), B


def pointwise(
    weight: torch.Tensor, x: torch.Tensor, axes: int, result: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """A convolution with 1 x 1 kernels in groups, added to `result` in the same product.

    Shapes: weight (groups, out / groups, in / groups), x (batch, in, *`axes` axes); out and in may be repeated.
    """
    out, channels = weight.shape[1:]
    flat = x.reshape(-1, channels, math.prod(x.shape[-axes:]))  # (batch * groups, channels, positions)
    weight = weight.expand(len(flat) // len(weight), -1, -1, -1).flatten(0, 1)
    shape = (*x.shape[: -axes - 1], x.shape[-axes - 1] // channels * out, *x.shape[-axes:])
    if result is None:
        return torch.bmm(weight, flat).view(shape)
    device = result.device.type
    if torch.is_autocast_enabled(device) and result.dtype != torch.get_autocast_dtype(device):
        return result + (scale * torch.bmm(weight, flat)).view(shape).to(result.dtype)
    base = result.reshape(len(flat), out, flat.shape[-1])
    return torch.baddbmm(base, weight.to(result.dtype), flat.to(result.dtype), alpha=scale).view(shape)


@register(
    "flora",
    config=FloraConfig,
    paper="arXiv:2405.14739",
    lora_export="exact",
    layer_types=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    tiny={"r": 2},
)
class FloraLinear(AdapterLayer):
    adapter_layer_names: tuple[str, ...] = ("flora_G", "flora_A", "flora_B")
    flora_G: nn.ParameterDict
    flora_A: nn.ParameterDict
    flora_B: nn.ParameterDict
    supported = (
        "nn.Linear, transformers' Conv1D, quantised linear layers, nn.Embedding, nn.Conv1d, nn.Conv2d and nn.Conv3d"
    )
    default_scale: ClassVar[float] = 1.0

    @classmethod
    def for_base_layer(cls, base_layer: nn.Module) -> type[AdapterLayer]:
        return next((c for c in (FloraConv, FloraEmbedding) if isinstance(base_layer, c.layer_types)), FloraLinear)

    @property
    def groups(self) -> int:
        return 1

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes of the weight's axes: input (of one group), output, kernel axes."""
        return self.in_features, self.out_features

    def create(self, adapter_name: str, config: FloraConfig) -> None:
        ranks = mode_ranks(config, self.modes, self.groups)
        core = torch.zeros(ranks) if config.init_weights else torch.randn(ranks)
        self.flora_G[adapter_name] = nn.Parameter(core)
        for i, (size, rank) in enumerate(zip(self.modes, ranks, strict=True)):
            factor = start(size, rank, config.init_scheme, fan_in=rank if i else size)
            getattr(self, self.adapter_layer_names[i + 1])[adapter_name] = nn.Parameter(factor)

    def tensors(self, adapter_name: str) -> list[torch.Tensor]:
        """G, A, B and the factors of the kernel axes, at least in fp32."""
        dicts = (getattr(self, name) for name in self.adapter_layer_names)
        return [at_least_fp32(tensors[adapter_name]) for tensors in dicts if adapter_name in tensors]

    def constant(self, adapter_name: str) -> float:
        """The factor s of the delta."""
        config = self.adapter_config[adapter_name]
        if config.alpha is not None:
            return config.alpha / (config.r[1] if isinstance(config.r, list) else config.r)
        return self.default_scale if config.scale is None else config.scale

    def dropout(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.adapter_config[adapter_name].flora_dropout) if self._drops(adapter_name) else x

    def _drops(self, adapter_name: str) -> bool:
        return self.training and self.adapter_config[adapter_name].flora_dropout > 0

    def add_delta(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        down, up = lora_pair(*self.tensors(adapter_name))
        h = F.linear(self.dropout(adapter_name, x), down.to(x.dtype))
        return accumulate(result, h, up.T, self.scaling[adapter_name] * self.constant(adapter_name))

    def delta_weight(self, adapter_name: str) -> torch.Tensor:
        G, A, B, *kernel = self.tensors(adapter_name)
        return contract(self.constant(adapter_name) * G.transpose(0, 1), (B, A, *kernel))

    def lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = lora_pair(*(tensor.detach() for tensor in self.tensors(adapter_name)))
        return down, self.scaling[adapter_name] * self.constant(adapter_name) * up

    def cost(self, adapter_name: str) -> int:
        """Multiply-adds of `add_delta` for one token (one output position of a convolution)."""
        return min(self.flora_G[adapter_name].shape) * sum(self.modes)

    def prefers_dense(self, adapter_name: str, tokens: int) -> bool:
        # Multiply-adds of a training step: each factored product and the two products of its gradient; when dense,
        # the gradient of the weight, and to build the delta and contract its gradient.
        size, r = math.prod(self.modes), self.flora_B[adapter_name].shape[1]
        return self.quantization_backend is None and 3 * tokens * self.cost(adapter_name) > size * (tokens + 3 * r)

    def _dense(self, names: Sequence[str], x: torch.Tensor) -> bool:
        return not any(map(self._drops, names)) and super()._dense(names, x)


class FloraConv(FloraLinear):
    adapter_layer_names = (*FloraLinear.adapter_layer_names, "flora_K", "flora_L", "flora_M")
    layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    default_scale = 4.0

    @property
    def conv(self) -> nn.Conv2d:  # or 1d or 3d
        return self.get_base_layer()  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        return self.conv.groups

    @property
    def modes(self) -> tuple[int, ...]:
        return self.in_features // self.groups, self.out_features, *self.conv.kernel_size

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv._conv_forward(x, weight, bias)  # stride, padding of every mode, dilation, groups

    def add_dense(self, delta: torch.Tensor, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result + self.project(x, delta.to(x.dtype)).to(result.dtype)

    def _tokens(self, x: torch.Tensor) -> int:
        return x.numel() // (self.in_features * math.prod(self.conv.stride))

    def add_delta(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        G, A, B, *kernel = self.tensors(adapter_name)
        x, axes = self.dropout(adapter_name, x), len(kernel)
        reduced, direct = self._costs(adapter_name)
        if reduced < direct:
            x = pointwise(A.T.to(x.dtype).expand(self.groups, -1, -1), x, axes)
            down, up = contract(G.transpose(0, 1), kernel), B
        else:
            down, up = lora_pair(G, A, B, *kernel)
        h = self.project(x, torch.cat([down.to(x.dtype)] * self.groups))
        scale = self.scaling[adapter_name] * self.constant(adapter_name)
        return pointwise(up.to(h.dtype).unflatten(0, (self.groups, -1)), h, axes, result, scale)

    def _costs(self, adapter_name: str) -> tuple[int, int]:
        """Multiply-adds for one output position: reducing the channels before the convolution, or by it."""
        r1, r2, *spatial = self.flora_G[adapter_name].shape
        kernel, r = math.prod(self.conv.kernel_size), min(r2, r1 * math.prod(spatial))
        reduced = self.in_features * math.prod(self.conv.stride) * r1 + self.groups * kernel * r1 * r2
        return reduced + r2 * self.out_features, self.in_features * kernel * r + r * self.out_features

    def cost(self, adapter_name: str) -> int:
        return min(self._costs(adapter_name))

    def lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in_channels, kernel axes) and B (out_channels, r), the weights of PEFT's conv LoRA (its B is 1 x 1)."""
        groups, dilation, padding = self.groups, self.conv.dilation, self.conv.padding_mode
        reasons = {
            "connects every input channel to every group and cannot be merged": groups > 1,
            "ignores the dilation of the base layer": max(dilation) > 1,
            "ignores the padding_mode of the base layer": padding != "zeros",
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            raise NotImplementedError(
                f"FLORA has no exact LoRA form for a {type(self.conv).__name__} with groups={groups}, "
                f"dilation={dilation} and padding_mode={padding!r}: PEFT's LoRA for convolutions {reason}. "
                "Keep the FLORA adapter, or merge it into the base model by `merge_and_unload`."
            )
        return super().lora_factors(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT's conversion takes the SVD of a matrix


class FloraEmbedding(FloraLinear):
    layer_types = (nn.Embedding,)

    @property
    def embedding(self) -> nn.Embedding:
        return self.get_base_layer()  # type: ignore[return-value]

    def check_base_layer(self, base_layer: nn.Module) -> None:
        super().check_base_layer(base_layer)
        if self.embedding.max_norm is not None:
            raise TypeError("an nn.Embedding with max_norm is not supported: it rescales its rows as they are read.")

    def create(self, adapter_name: str, config: FloraConfig) -> None:
        super().create(adapter_name, config)
        if self.embedding.padding_idx is not None:
            self.flora_A[adapter_name].data[self.embedding.padding_idx] = 0  # and no gradient reaches it

    def add_delta(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        G, A, B = self.tensors(adapter_name)
        h = F.embedding(x, A, self.embedding.padding_idx) @ G
        if (embed_scale := self._get_embed_scale()) is not None:  # Gemma's
            h = h * embed_scale.to(h.dtype)
        scale = self.scaling[adapter_name] * self.constant(adapter_name)
        return accumulate(result, self.dropout(adapter_name, h), B.T, scale)

    def prefers_dense(self, adapter_name: str, tokens: int) -> bool:
        return False

    def _tokens(self, x: torch.Tensor) -> int:
        return x.numel()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
