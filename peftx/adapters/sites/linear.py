"""Linear layers: nn.Linear, transformers' Conv1D, and quantised ones."""

from __future__ import annotations

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .site import Site


class LinearSite(Site):
    layer_types = (nn.Linear, Conv1D)
    shown = "nn.Linear, transformers' Conv1D and quantised linear layers"
    linear = True

    @classmethod
    def takes(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        return super().takes(base, backend) or (backend is not None and backend.layer_type == "linear")

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        return isinstance(self.base, Conv1D)

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.transposed and bias is not None:  # as Conv1D does it, or a fresh adapter would round otherwise
            flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T.contiguous())
            return flat.view(*x.shape[:-1], len(weight))
        return F.linear(x, weight, bias)

    def tokens(self, x: torch.Tensor) -> int:
        return x.numel() // max(x.shape[-1], 1)

    def reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return F.linear(x, factor.to(x.dtype))

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.to(x.dtype))
