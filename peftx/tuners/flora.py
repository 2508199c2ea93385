"""FLoRA (low-rank core space for N dimensions), arXiv:2405.14739: Tucker-form deltas that keep the axes of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import (
    Adapter,
    AdapterConfig,
    ConvSite,
    EmbeddingSite,
    ExpertsSite,
    LinearSite,
    Number,
    Site,
    register,
)
from ..adapters.products import at_least_fp32

InitScheme = Literal["paper", "lora_like", "gaussian"]
Ranks = int | list[int]
FACTORS = ("A", "B", "K", "L", "M")  # of input, output and up to three kernel axes


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
        scale: the constant s. Default: 4.0 for convolutions, from the example configuration of the authors' code, which
            has no default, and 1.0 for other layers, ours. The paper's value is not known.
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


def mode_ranks(config: FloraConfig, modes: Sequence[int], groups: int = 1, spatial: int = 2) -> tuple[int, ...]:
    """The rank of each mode of a weight with `modes` (input of one group, output, kernel axes).

    Args:
        spatial: upper bound of the ranks of the kernel axes where the config has none.

    Raises:
        ValueError: too few or many ranks, or a rank above the size of its mode.
    """
    r, spatial = config.r, config.r_spatial or spatial  # type: ignore[assignment]
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


@register(
    "flora",
    config=FloraConfig,
    paper="arXiv:2405.14739",
    lora_export="exact",
    layer_types=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    tiny={"r": 2},
)
class Flora(Adapter):
    grouped = True
    sites = (ConvSite, EmbeddingSite, LinearSite)
    G: nn.Parameter  # (r1, r2, kernel ranks), the core
    A: nn.Parameter  # (in / groups, r1)
    B: nn.Parameter  # (out, r2)

    def __init__(self, site: Site, config: FloraConfig) -> None:
        super().__init__(site, config)
        most = config.r if isinstance(config.r, int) else config.r[1]
        ranks = mode_ranks(config, site.modes, site.groups, most if isinstance(site, ExpertsSite) else 2)
        self.G = nn.Parameter(torch.zeros(ranks) if config.init_weights else torch.randn(ranks))
        for i, (name, size, rank) in enumerate(zip(FACTORS, site.modes, ranks, strict=False)):
            factor = start(size, rank, config.init_scheme, fan_in=rank if i else size)
            self.register_parameter(name, nn.Parameter(factor))
        if isinstance(site, EmbeddingSite) and site.padding_idx is not None:
            self.A.data[site.padding_idx] = 0  # and no gradient reaches it
        if config.alpha is not None:
            self.constant = config.alpha / (config.r[1] if isinstance(config.r, list) else config.r)
        else:
            default = 4.0 if isinstance(site, ConvSite) else 1.0
            self.constant = default if config.scale is None else config.scale
        self._dense_from = self._most_factored()

    @classmethod
    def over_experts(cls, site: ExpertsSite, config: FloraConfig) -> Flora:
        return cls(site, config)  # the experts are an axis of the weight, whose factor is K

    def at(self, expert: int) -> Adapter:
        G, A, B, K = self.tensors()
        return self.with_tensors(expert, {"G": G @ K[expert], "A": A, "B": B}, {})

    def tensors(self) -> list[torch.Tensor]:
        """G, A, B and the factors of the kernel axes, at least in fp32."""
        return [at_least_fp32(getattr(self, name)) for name in ("G", *FACTORS[: self.G.ndim])]

    @property
    def drops(self) -> bool:
        return self.training and self.config.flora_dropout > 0

    def dropout(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.flora_dropout) if self.drops else x

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        G, A, B, *kernel = self.tensors()
        indices = isinstance(self.site, EmbeddingSite)
        x = x if indices else self.dropout(x)
        if self.site.reduces_first(self.G.shape):
            x, down, up = self.site.reduce(x, A.T), contract(G.transpose(0, 1), kernel), B
        else:
            down, up = lora_pair(G, A, B, *kernel)
        h = self.site.apply(x, down)
        return self.site.accumulate(result, self.dropout(h) if indices else h, up, self.scale * self.constant)

    def delta_weight(self) -> torch.Tensor:
        G, A, B, *kernel = self.tensors()
        return contract(self.constant * G.transpose(0, 1), (B, A, *kernel))

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in_channels, kernel axes) and B (out_channels, r): of a convolution the weights of PEFT's conv LoRA,
        whose B is 1 x 1."""
        down, up = lora_pair(*(tensor.detach() for tensor in self.tensors()))
        return down, self.scale * self.constant * up

    def prefers_dense(self, tokens: int) -> bool:
        # Multiply-adds of a training step: each factored product and the two products of its gradient; when dense,
        # the gradient of the weight, and to build the delta and contract its gradient.
        return tokens > self._dense_from

    def _most_factored(self) -> float:
        """The number of tokens up to which the factored product is the cheaper one."""
        if self.site.backend is not None or isinstance(self.site, EmbeddingSite):
            return math.inf
        size = math.prod(self.site.modes)
        gain = 3 * self.site.cost(self.G.shape) - size  # for each token
        return 3 * self.B.shape[1] * size / gain if gain > 0 else math.inf
