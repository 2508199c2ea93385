"""ALLoRA: LoRA without scaling and dropout, whose gradients are scaled for each output row by the row's norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.lora import Embedding
from torch.func import functional_call

from ..adapters import Number, register
from ..adapters.lora import Retrained, Variant, VariantConfig, VariantModel, is_plain, low_rank, weight_along
from ..adapters.products import at_least_fp32


@dataclass
class ALLoRAConfig(VariantConfig):
    """ALLoRA (arXiv:2410.09692): LoRA whose gradients are scaled for each output row by the row's norm.

    The forward is W x + B A x: no factor alpha / r, so `lora_alpha` equals `r` and the saved file is a plain LoRA. The
    gradient of row i of P = B A is multiplied by s_i = (||P_i|| + eta^-2)^(-1/2) before it goes on to A and B; the
    gradient of the layer's input is untouched. A row starts with s_i = eta and slows down as it grows.

    With AdamW, which forgets any constant factor of a gradient, the effect on B passes with its moments; what stays is
    the weight of the rows in A's gradient. No call in the training loop is needed: each training forward computes s, in
    O(r^2 (in_features + out_features)).

    The body of the paper could not be read: the rule follows its abstract, its reviews, and an implementation that
    cites section 4.2. The paper's values of eta were not found. Its abstract says dropout-free, a review reads a
    dropout of 0.05 from its tables: `lora_dropout` is 0 by default, and allowed.

    Args:
        eta: greatest factor of a gradient, > 0; takes the place of alpha / r. Default 2, a usual alpha / r;
            1, 4 and 8 were not told apart from it on SST-2 (MiniLM, five seeds, each at its own learning rate).
        norm_of: `"ba"`: norms of the rows of B A, as in the paper. `"b"`: of the rows of B, cheaper, and blind to A.

    Raises:
        ValueError: `eta` is not positive and finite; `lora_alpha`, `alpha_pattern` or `use_rslora` ask for a scaling.
    """

    lora_alpha: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Equals `r`: ALLoRA has no scaling in its forward."}
    )
    lora_dropout: Number = field(default=0.0, metadata={"help": "Dropout of the adapter's input; 0 in the paper."})
    eta: Number = field(default=2.0, metadata={"help": "Greatest factor of a gradient, at a row of zeros."})
    norm_of: Literal["ba", "b"] = field(
        default="ba", metadata={"help": "Rows whose norms slow the gradient down: those of B A, or of B alone."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta <= 0:
            raise ValueError(f"`eta` must be positive, got {self.eta}.")
        patterns = dict(self.rank_pattern or {})
        if self.lora_alpha not in (None, self.r) or self.alpha_pattern not in ({}, patterns) or self.use_rslora:
            raise ValueError(
                "ALLoRA has no scaling in its forward, so `lora_alpha` equals `r`: leave out `lora_alpha`, "
                "`alpha_pattern` and `use_rslora`, and set `eta` instead."
            )
        self.lora_alpha, self.alpha_pattern = self.r, patterns


class ALLoRA(Variant):
    """Training rule of one ALLoRA adapter in one LoRA layer."""

    @staticmethod
    def _weights(module: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(module, Embedding):
            return module.lora_embedding_A[adapter_name], module.lora_embedding_B[adapter_name]
        return module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight

    # Not cached by the weights' version: bitsandbytes' optimizers write weights without a new one.
    @torch.no_grad()
    def gradient_scale(self, module: Any, adapter_name: str) -> torch.Tensor:
        """s (out_features,), at least fp32, for the weights as they stand; O(r^2 (in_features + out_features))."""
        A, B = (at_least_fp32(w).flatten(1) for w in self._weights(module, adapter_name))
        A = A.view(-1, B.shape[1], A.shape[1])  # a grouped convolution's row has the ranks of its group only
        return self._slowing(A, B.view(len(A), -1, B.shape[1]), module.scaling[adapter_name]).flatten()

    def _slowing(self, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
        """s (..., out_features) for A (..., r, in_features) and B (..., out_features, r)."""
        if self.config.norm_of == "b":
            norm = B.norm(dim=-1)
        else:  # ||B_i A||^2 = B_i (A A^T) B_i^T
            norm = torch.einsum("...r,...r->...", B @ (A @ A.mT), B).clamp(min=0).sqrt()
            norm = norm if scale == 1 else norm * abs(scale)
        return (norm + self.config.eta**-2).rsqrt()

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if isinstance(module, Embedding):
            s, trained = self.gradient_scale(module, active_adapter), self._embed(module, active_adapter, x)
            return result + Retrained.apply(trained.detach(), trained, s)
        if not torch.is_grad_enabled() or module.lora_A[active_adapter].weight.is_meta:  # offloaded: nothing trains
            return super().forward(module, active_adapter, x, result)
        scale, s = module.scaling[active_adapter], self.gradient_scale(module, active_adapter)
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        A, B, x = lora_A.weight, lora_B.weight, module.lora_dropout[active_adapter](x)
        if is_plain(lora_A, lora_B):
            U, s = (B.detach(), s) if scale == 1 else (scale * B.detach(), scale * s)
            weight = weight_along(module, active_adapter, x, result)
            return low_rank(result, x, A, B, s, U=U, rule=s[:, None] * B.detach(), weight=weight)
        # One pass gives x its gradient, another one of equal value gives A and B theirs.
        h = functional_call(lora_A, {"weight": A.detach()}, (x,))
        value = functional_call(lora_B, {"weight": B.detach()}, (h,))
        rows = s.view(-1, *[1] * (A.ndim - 2)) if A.ndim > 2 else s
        return result + Retrained.apply(value, lora_B(lora_A(x.detach())), rows) * scale

    def over_experts(self, layer: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().over_experts(layer, adapter_name, x, result)
        (A, B), site, scale = layer.factors(adapter_name), layer.site, layer.scaling[adapter_name]
        with torch.no_grad():
            s = self._slowing(at_least_fp32(A), at_least_fp32(B), scale)
            s = s[..., None].to(B.dtype)
        h = site.reduce(x, A.detach())
        silent = Retrained.apply(torch.zeros_like(h), site.reduce(x.detach(), A))  # for A's gradient alone
        slowed = torch.cat([Retrained.apply(B.detach(), B, s), s * B.detach()], dim=-1)
        return site.accumulate(result, torch.cat([h, silent], dim=-1), slowed, scale)

    @staticmethod
    def _embed(module: Any, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        hooks = {"input_fn": module.input_fns.get(adapter_name), "output_fn": module.output_fns.get(adapter_name)}
        h = module._embed(x, module.lora_embedding_A[adapter_name].T, **hooks)
        delta = h @ module.lora_embedding_B[adapter_name].T * module.scaling[adapter_name]
        embed_scale = module._get_embed_scale()
        return delta if embed_scale is None else delta * embed_scale.to(delta.dtype)


@register(
    "allora",
    config=ALLoRAConfig,
    paper="arXiv:2410.09692",
    summary="LoRA without scaling and dropout; rows that have grown learn more slowly",
    lora_export="exact",
    layer_types=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    exact_gradient=False,
    experts=True,
    learning_rate=2e-3,
    tiny={"r": 2},
    variants={"allora": {}, "allora-b": {"norm_of": "b"}},
)
class ALLoRAModel(VariantModel):
    variant = ALLoRA
