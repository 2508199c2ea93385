"""GradNormLoRP: LoRA with normalised rows and magnitudes (DoRA), trained with projected gradients and 8-bit states."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from ..adapters import Number, register
from ..adapters.experts import Routed
from ..adapters.lora import Variant, VariantConfig, VariantModel, is_plain, weight_along, with_rules
from ..adapters.lora_layers import VariantLayer
from ..adapters.norms import Rescaled, RowNorms, cross_product, row_norms2, scale_rows
from ..adapters.products import aligned, at_least_fp32, autocasted, by_hand, kept, onloaded, uncast
from ..adapters.sites.experts import segments


@dataclass
class GradNormLoRPConfig(VariantConfig):
    """GradNormLoRP (arXiv:2412.19616): weight-normalised LoRA, whose gradients are projected to a lower rank.

    Each row of the weight is m (W + s B A) / ||W + s B A||, with a trained magnitude m; s = alpha / r. It starts as W.
    This is DoRA's parameterisation (arXiv:2402.09353), the adapter is saved as PEFT saves DoRA, and `peftx.export_lora`
    writes it as a stock DoRA adapter of equal outputs.

    The other half of the method is its optimizer, `peftx.optim.LowRankAdamW`: the gradients of A and B, not those of m,
    are projected, and the moments have 8 bits. `optimizer_options` hands it this config's settings:

        options = config.optimizer_options()
        trainer = Trainer(model, args, train_dataset=data, **peftx.optim.trainer_kwargs(args, **options))
        optimizer = peftx.optim.create_optimizer(model, args, **options)  # or: without Trainer

    Any other optimizer trains it as DoRA. What is saved is memory of the optimizer, not of weights and activations.

    The norms cost one product of W with A and one pass over W in each forward (and W is dequantised for it, if it is
    quantised); the output is kept for m's gradient, B A never built. Only a quantised layer keeps ||W||^2 and, in
    evaluation, that product, while A stays as it is. Of fused experts, few tokens need the norms of their own experts.
    With `lora_dropout` the change of the row's scale sees the dropped input too, as in PEFT's DoRA, which calls the
    base layer twice in training. Several active adapters act one after the other, each with the norms of its own
    W + s B A, as in PEFT's DoRA. A row of zeros has no direction: it stays as it is until B moves it.

    The body of the paper could not be read: the formulas follow its public summaries and its authors' code, which is
    stock DoRA under GaLore's AdamW. The summaries write a two-sided projection, the code has a one-sided one, as here.
    `r`, `lora_alpha` and `lora_dropout` default to PEFT's 8, 8 and 0; the authors run r = 8 with 16 and 0.1,
    with which one of five seeds did not learn SST-2 in a short training (MiniLM, a step of twice the time).

    Args:
        use_dora: always true; PEFT reads from it how the magnitudes are saved.
        norm_grad: `"detached"` takes the norm for a constant in the backward, as DoRA, PEFT and the authors' code do;
            the gradient of a row is then not orthogonal to it. `"full"` differentiates through the norm, at another
            product with W (a quantised one is dequantised again) in the backward.
        proj_rank: rank of the projected gradients of A and B, at least 1. Default: r // 2 of each module (ours: the
            authors run it at r or above, which projects nothing).
        update_proj_gap: steps between two updates of the projection; default 200, that of the authors' optimizer class
            (their command line has 50, their GLUE script passes 500).
        proj_scale: factor of the projected parameters' updates; default 1.0, as in the authors' code, which takes 4 at
            a learning rate of 3e-5 for GLUE.
        optim_bits: of the optimizer's moments, 8 or 32; default 8. All moments, also those of small tensors.

    Raises:
        ValueError: `use_dora=False`; a number that is too small.
    """

    inherent = ("use_dora",)

    use_dora: bool = field(
        default=True,
        metadata={"help": "Always true: the method is DoRA's parameterisation.", "is_lora_variant": True},
    )
    norm_grad: Literal["detached", "full"] = field(
        default="detached", metadata={"help": "Whether the norm is a constant in the backward, or differentiated."}
    )
    proj_rank: int | None = field(default=None, metadata={"help": "Rank of the projected gradients; r // 2 when None."})
    update_proj_gap: int = field(default=200, metadata={"help": "Steps between updates of the projection."})
    proj_scale: Number = field(default=1.0, metadata={"help": "Factor of the projected parameters' updates."})
    optim_bits: Literal[8, 32] = field(default=8, metadata={"help": "Bits of the optimizer's moments."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_dora:
            raise ValueError(
                "GRADNORMLORP is DoRA's parameterisation: `use_dora=False` is plain LoRA. Use `peft.LoraConfig`, with "
                "`peftx.optim.LowRankAdamW` for the projected gradients."
            )
        for name in ("proj_rank", "update_proj_gap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.proj_scale < 0:
            raise ValueError(f"`proj_scale` must be finite and at least 0, got {self.proj_scale}.")
        ranks = {self.r, *(self.rank_pattern or {}).values()}
        if rotated := sorted(r for r in ranks if r <= (self.proj_rank or 1)):
            reason = f"proj_rank={self.proj_rank} is not below r" if self.proj_rank else "rank 1 cannot be projected"
            warnings.warn(
                f"The gradients of A and B of modules of r={', '.join(map(str, rotated))} are rotated, not projected, "
                f"which saves no memory: {reason}.",
                stacklevel=2,
            )

    def optimizer_options(self) -> dict[str, Any]:
        """What `peftx.optim.trainer_kwargs` and `create_optimizer` need to train an adapter as this config says.

        These are arguments of `LowRankAdamW`, with `min_8bit_size=0`: LoRA's tensors are small.
        """
        return {
            "rank": 0.5 if self.proj_rank is None else self.proj_rank,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.proj_scale,
            "optim_bits": self.optim_bits,
            "min_8bit_size": 0,
        }


BLOCK = 2**22  # elements of a stack of experts whose norms are made at a time


def unmerged_weight(module: Any) -> torch.Tensor:
    """The base weight (out_features, in_features), dequantised if need be, without the adapters merged into it."""
    weight = module.site.laid_out(module.site.weight())
    for name in reversed(module.merged_adapters):
        rule = module.lora_variant.get(name)  # none: plain LoRA
        weight = rule.unmerge(module, name, weight) if rule else weight - module.get_delta_weight(name).to(weight.dtype)
    return module.site.laid_out(weight)


class GradNormLoRP(Variant):
    """W' = c (W + s B A) for one adapter in one linear layer, or in each expert of a stack; c = m / ||W + s B A||, a
    factor for each row."""

    _base: tuple[Any, torch.Tensor] | None = None  # of a quantised layer: what its weight was like, and ||W||^2
    _cross: tuple[torch.Tensor, torch.Tensor] | None = None  # and A and W A^T, in evaluation

    def __init__(self, config: GradNormLoRPConfig, name: str) -> None:
        super().__init__(config, name)
        # By expert (None: a linear layer): c, and the rows of the weight that it made zero.
        self._merged: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    # Norms

    def row_norms(self, module: Any, adapter_name: str, experts: slice | None = None) -> torch.Tensor:
        """||W + s B A|| of each row (out_features,), at least fp32; with gradients if they are wanted.

        Of a stack (E, out_features), or of some of its experts.
        """
        if isinstance(module, Routed) and experts is None:
            site, size = module.site, max(1, BLOCK // (module.site.in_features * module.site.out_features))
            chunks = [slice(start, min(start + size, site.experts)) for start in range(0, site.experts, size)]
            return torch.cat([self.row_norms(module, adapter_name, chunk) for chunk in chunks])
        factors = module.lora_A[adapter_name], module.lora_B[adapter_name]
        with onloaded(*factors):
            pair = [factor.weight for factor in factors]
            if experts is not None:
                pair = [factor[experts] for factor in module.stacked(*pair)]
            A, B = (aligned(at_least_fp32(factor)) for factor in pair)
        if self.config.norm_grad == "detached":
            A, B = A.detach(), B.detach()
        with uncast(A):
            base, cross, weight, again = self._products(module, A.detach(), experts)
            return RowNorms.apply(A, B, base, cross, module.scaling[adapter_name], weight, again)

    @torch.no_grad()
    def _products(self, module: Any, A: torch.Tensor, experts: slice | None) -> tuple[Any, ...]:
        """||W||^2 of each row (..., out_features), in A's dtype or a wider one, and W A^T (..., out_features, r); W, or
        how it is read again."""

        def read() -> torch.Tensor:
            weight = unmerged_weight(module) if experts is None else module.unmerged(experts)
            return weight.detach()

        # Whoever writes through `.data`, as PEFT's merge does, leaves no trace, and to look for one costs as much as
        # the norms: they are kept only where reading the weight is what costs.
        quantized = experts is None and module.quantization_backend is not None
        if not quantized or torch.compiler.is_compiling():
            weight = read()
            wide = weight.to(torch.promote_types(weight.dtype, A.dtype))
            again = read if quantized or wide is not weight else None
            return row_norms2(wide), cross_product(A, wide), None if again else weight, again
        base = self.quantized_norms2(module, A.dtype)
        if module.training or torch.is_grad_enabled():
            return base, cross_product(A, read()), None, read
        if self._cross is None or not torch.equal(self._cross[0], A):
            self._cross = A.clone(), cross_product(A, read())
        return base, self._cross[1], None, read

    def quantized_norms2(self, module: Any, dtype: torch.dtype) -> torch.Tensor:
        """||W||^2 of each row (out_features,) in `dtype`; kept, as an evaluation may lay W out anew, and round."""
        stored = module.get_base_layer().weight
        state = stored.dtype, stored.device, dtype
        if self._base is None or self._base[0] != state:
            norms2 = row_norms2(unmerged_weight(module).detach().to(dtype))
            self._base, self._cross = (state, norms2), None
        return self._base[1]

    def row_factor(self, module: Any, adapter_name: str, experts: slice | None = None) -> torch.Tensor:
        """c (out_features,), at least fp32; 1 for a row of zeros. Of a stack as `row_norms`."""
        if self.kept is not None and not torch.is_grad_enabled() and experts is not None:
            return self.row_factor(module, adapter_name)[experts]
        state = adapter_name, module.scaling[adapter_name]
        return kept(self, state, lambda: self._row_factor(module, adapter_name, experts))

    def _row_factor(self, module: Any, adapter_name: str, experts: slice | None) -> torch.Tensor:
        magnitude, norms = module.lora_magnitude_vector[adapter_name](), self.row_norms(module, adapter_name, experts)
        magnitude = magnitude if experts is None else magnitude[experts]
        zero = norms == 0
        # The norm is rounded as the magnitude once was, so that c is 1 at the start in any dtype.
        norms = norms.to(magnitude.dtype).masked_fill(zero, 1)
        return at_least_fp32(magnitude / norms).masked_fill(zero, 1)

    # Forward

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        dropout = module.lora_dropout[active_adapter]
        if not (isinstance(dropout, nn.Dropout) and module.training):
            return self._rescaled(module, active_adapter, x, result)
        x = dropout(x)
        dropped = module.base_layer(x.to(result.dtype))
        return result + (self._rescaled(module, active_adapter, x, dropped) - dropped)

    def _rescaled(self, module: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The output `result` of the base layer, as that of c (W + s B A)."""
        bias, lora_A, lora_B = module.site.bias(), module.lora_A[name], module.lora_B[name]
        if not (by_hand() and is_plain(lora_A, lora_B)):
            return scale_rows(self._add(module, name, x, result), self.row_factor(module, name), bias)
        norms, m, scale = self.row_norms(module, name), module.lora_magnitude_vector[name](), module.scaling[name]
        weight = weight_along(module, name, x, result)
        result, x = result if weight is None else result.detach(), autocasted(x)
        return Rescaled.apply(result, x, lora_A.weight, lora_B.weight, m, norms, scale, bias, weight)

    def over_experts(self, layer: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        site = layer.site
        if site.few(x) and not torch.compiler.is_compiling():  # the norms of the experts that have rows
            found = [(slice(e, e + 1), len(x[rows])) for e, rows in segments(site.routing.offsets)]
            parts = [self.row_factor(layer, adapter_name, one).expand(rows, -1) for one, rows in found]
            c = torch.cat(parts) if parts else result
        else:
            c = site.per_row(self.row_factor(layer, adapter_name))
        return scale_rows(super().over_experts(layer, adapter_name, x, result), c, site.row_bias())

    # Merging

    def delta_weight(self, module: Any, adapter_name: str) -> torch.Tensor:
        """W' - W, at least in fp32, in the layout of the base weight."""
        weight, c = at_least_fp32(unmerged_weight(module)), self.row_factor(module, adapter_name)[:, None]
        return module.site.laid_out((c - 1) * weight + c * self._low_rank(module, adapter_name))

    @staticmethod
    def _low_rank(module: Any, adapter_name: str) -> torch.Tensor:
        A, B = (at_least_fp32(w[adapter_name].weight) for w in (module.lora_A, module.lora_B))
        return module.scaling[adapter_name] * B @ A

    @torch.no_grad()
    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        weight, delta = at_least_fp32(module.site.laid_out(orig_weight)), self._low_rank(module, active_adapter)
        merged = self._merge(weight, delta, self.row_factor(module, active_adapter), None)
        return module.site.laid_out(merged).to(orig_weight.dtype)

    @torch.no_grad()
    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        weight, delta = at_least_fp32(module.site.laid_out(orig_weight)), self._low_rank(module, active_adapter)
        return module.site.laid_out(self._unmerge(weight, delta, None)).to(orig_weight.dtype)

    def change_expert(
        self, layer: Any, adapter_name: str, expert: int, weight: torch.Tensor, delta: torch.Tensor
    ) -> torch.Tensor:
        (c,) = self.row_factor(layer, adapter_name, slice(expert, expert + 1))
        return self._merge(weight, delta, c, expert)

    def restore_expert(
        self, layer: Any, adapter_name: str, expert: int, weight: torch.Tensor, delta: torch.Tensor
    ) -> torch.Tensor:
        return self._unmerge(weight, delta, expert)

    def _merge(self, weight: torch.Tensor, delta: torch.Tensor, c: torch.Tensor, expert: int | None) -> torch.Tensor:
        # Kept for `unmerge`: other norms come from the merged weight, and a row that c makes zero has no way back.
        self._merged[expert] = c, weight[c == 0]
        return weight + (c - 1)[:, None] * weight + c[:, None] * delta

    def _unmerge(self, weight: torch.Tensor, delta: torch.Tensor, expert: int | None) -> torch.Tensor:
        c, lost = (kept.to(weight) for kept in self._merged[expert])
        weight = weight / c[:, None] - delta
        weight[c == 0] = lost
        return weight


class Magnitude(nn.Module):
    """m (out_features,), where PEFT has its DoRA layer."""

    def __init__(self, weight: torch.Tensor, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)

    def forward(self) -> torch.Tensor:  # called, so that hooks see who uses the weight
        return self.weight


@register(
    "gradnormlorp",
    config=GradNormLoRPConfig,
    paper="arXiv:2412.19616",
    summary="DoRA's magnitudes and directions, trained with projected gradients and 8-bit optimizer states",
    lora_export="dora",
    exact_gradient=False,
    experts=True,
    learning_rate=2e-3,
    tiny={"r": 2},
    variants={"gradnormlorp": {}, "gradnormlorp-full": {"norm_grad": "full"}},
)
class GradNormLoRPModel(VariantModel):
    """LoRA whose layers have normalised rows and magnitudes; see `GradNormLoRPConfig`."""

    supported = "linear layers (also transformers' Conv1D and bitsandbytes' 8-bit and 4-bit ones)"

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any
    ) -> None:
        lora_config = copy.copy(lora_config)
        lora_config.use_dora = False  # or PEFT would make its own rule, by way of the dense B A
        super()._create_and_replace(lora_config, adapter_name, with_rules(target), *args, **kwargs)

    @classmethod
    def current_key(cls, key: str) -> str:
        # PEFT's DoRA and our earlier releases save the magnitude without `.weight`, which transformers' own
        # `load_adapter` does not find; PEFT's DoRA reads both.
        return f"{key}.weight" if key.endswith(".lora_magnitude_vector") else key

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        end = f".lora_magnitude_vector.{kwargs['adapter_name']}"  # PEFT has cut off `.weight`
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        return {f"{key}.weight" if key.endswith(end) else key: tensor for key, tensor in tensors.items()}

    def _follows_rule(self, layer: Any) -> bool:
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"the norms of its rows need the weight itself, which {backend.backend_name} layers cannot give. "
                "Use the unquantised model, or bitsandbytes' quantisation."
            )
        return isinstance(layer, VariantLayer)

    def _make_rule(self, config: Any, layer: Any, adapter_name: str, key: str) -> GradNormLoRP:
        rule = GradNormLoRP(config, key)
        A, over_experts = layer.lora_A[adapter_name].weight, isinstance(layer, Routed)
        empty = torch.empty(layer.site.shape[2:] + layer.site.shape[:1], device="meta")
        with torch.no_grad(), gather_params_ctx(layer.get_base_layer().parameters()):
            if not over_experts and layer.quantization_backend is not None:
                rule.quantized_norms2(layer, at_least_fp32(A).dtype)
            magnitude = empty if A.is_meta else rule.row_norms(layer, adapter_name)
        layer.lora_magnitude_vector[adapter_name] = Magnitude(magnitude, A.requires_grad)
        return rule

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in self._layers():
            if not autocast_adapter_dtype and adapter_name in layer.lora_magnitude_vector:
                layer.lora_magnitude_vector[adapter_name].to(layer.lora_A[adapter_name].weight.dtype)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ):
        """As in PEFT, for the factors; the magnitudes become such that the new weight change is their product B A.

        A combination by `"svd"` approximates the whole changes of the weight, the others ignore the magnitudes.
        """
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for _, layer in self._layers():
            if adapter_name in layer.lora_magnitude_vector:
                norms = layer.lora_variant[adapter_name].row_norms(layer, adapter_name).detach()
                layer.lora_magnitude_vector[adapter_name].weight.data.copy_(norms)
