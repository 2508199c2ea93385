"""nn.Embedding: a linear layer that reads one-hot vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn import functional as F

from .site import Site


class EmbeddingSite(Site):
    layer_types = (nn.Embedding,)
    shown = "nn.Embedding"
    transposed = True

    def __init__(self, base: nn.Module, backend: QuantizationBackend | None = None) -> None:
        super().__init__(base, backend)
        if self.base.max_norm is not None:
            raise TypeError("an nn.Embedding with max_norm is not supported: it rescales its rows as they are read.")

    @property
    def padding_idx(self) -> int | None:
        """The row that stays that of the base model."""
        return self.base.padding_idx

    def tokens(self, x: torch.Tensor) -> int:
        return x.numel()

    def reduces_first(self, ranks: Sequence[int]) -> bool:
        return True

    def reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Rows (r) of `factor` (r, in_features) for the indices `x`, scaled as the layer scales its own (Gemma)."""
        rows = F.embedding(x, factor.T, self.padding_idx)
        scale = getattr(self.base, "embed_scale", None)
        if scale is None:
            return rows
        return rows * torch.as_tensor(scale, dtype=self.base.weight.dtype, device=rows.device).to(rows.dtype)

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.to(x.dtype))
