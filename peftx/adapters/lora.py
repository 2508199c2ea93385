"""What ALLoRA, LoRA-GGPO, FedSVD and GradNormLoRP share on top of PEFT's own LoRA: the methods that are LoRA with
another training rule. PEFT's LoRA layers ask a `LoraVariant` for an adapter's forward; a method here is one."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, LoraVariant, ParamWrapper
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..utils import innermost
from . import files
from .config import FileConfig, Names, Number
from .experts import Routed, check_experts, convert_to_experts, nested_keys
from .lora_experts import FactoredParamWrapper, add_low_rank
from .lora_layers import VariantEmbedding, VariantLinear
from .products import accumulate, autocasted, base_weight, input_gradient, onloaded, times, uncast, unobserved
from .sites import ConvSite, EmbeddingSite, LinearSite, site_of
from .sites.site import unsupported
from .tuner import CheckedTuner, errors_naming


@dataclasses.dataclass
class VariantConfig(FileConfig, LoraConfig):
    """Base of the configs of the methods that are LoRA with another training rule; all fields of `LoraConfig` are here.

    Their backward is written by hand: no second derivative, no `torch.func` transforms of the adapter's weights.

    Raises:
        ValueError: an option that changes what LoRA computes: DoRA and the other variants of PEFT, `lora_bias`; or
            `target_parameters`, where the rule has no form for fused experts.
        TypeError: a field of the method has the wrong type.
    """

    inherited: ClassVar[dict[str, Any]] = {
        "r": int,
        "target_modules": Names | None,
        "exclude_modules": Names | None,
        "lora_alpha": Number,
        "lora_dropout": Number,
        "bias": str,
        "use_rslora": bool,
        "modules_to_save": list[str] | set[str] | tuple[str, ...] | None,
        "init_lora_weights": bool | str,
        "layers_to_transform": list[int] | int | None,
        "layers_pattern": list[str] | str | None,
        "rank_pattern": dict[str, int],
        "alpha_pattern": dict[str, Number],
        "trainable_token_indices": list[int] | dict[str, list[int]] | None,
        "layer_replication": list[tuple[int, int] | list[int]] | None,
        "ensure_weight_tying": bool,
        "qalora_group_size": int,
    }

    # options of LoRA that the method cannot be combined with
    excluded: ClassVar[tuple[str, ...]] = ("lora_bias",)
    # variants of PEFT's that are part of the method
    inherent: ClassVar[tuple[str, ...]] = ()

    @property
    def reaches_experts(self) -> bool:
        """Whether `target_parameters` may name fused experts."""
        return "target_parameters" not in self.excluded

    def __post_init__(self) -> None:
        super().__post_init__()
        method: Any = self.peft_type
        fields = dataclasses.fields(LoraConfig)
        excluded = {*self.excluded, *(f.name for f in fields if f.metadata.get("is_lora_variant"))}
        for name in sorted(excluded.difference(self.inherent)):
            if getattr(self, name):
                raise ValueError(
                    f"{method.value} is a training rule for plain LoRA: `{name}={getattr(self, name)!r}` "
                    "cannot be combined with it."
                )
        (init,) = (f for f in fields if f.name == "init_lora_weights")
        if self.init_lora_weights in init.metadata.get("lora_variants", ()):
            raise ValueError(
                f"{method.value} is a training rule for plain LoRA: "
                f"`init_lora_weights={self.init_lora_weights!r}` cannot be combined with it."
            )


SITES = (ConvSite, EmbeddingSite, LinearSite)  # what PEFT's LoRA can be put on


class Variant(LoraVariant):
    """The training rule of one adapter in one LoRA layer. As it stands it is plain LoRA, by the faster product.

    Args:
        config: the adapter's config.
        name: name of the layer in the model.
    """

    config: Any
    kept: dict[Any, Any] | None = None  # what is made of the weights, within `peftx.inference`

    def __init__(self, config: VariantConfig, name: str) -> None:
        self.config = config
        self.name = name

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The output with the adapter's contribution. Shapes: x (..., in_features), result (..., out_features)."""
        return self._add(module, active_adapter, module.lora_dropout[active_adapter](x), result)

    @staticmethod
    def _add(module: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` with s B A x."""
        lora_A, lora_B, scale = module.lora_A[adapter_name], module.lora_B[adapter_name], module.scaling[adapter_name]
        if is_plain(lora_A, lora_B):
            return low_rank(result, x, lora_A.weight, lora_B.weight, scale)
        return result + lora_B(lora_A(x)) * scale

    def over_experts(
        self, layer: FactoredParamWrapper, adapter_name: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """As `forward`, on rows x (T, in_features) and result (T, out_features) sorted by expert."""
        return add_low_rank(layer, adapter_name, x, result)

    def change_expert(
        self, layer: FactoredParamWrapper, adapter_name: str, expert: int, weight: torch.Tensor, delta: torch.Tensor
    ) -> torch.Tensor:
        """The weight (out_features, in_features) of one expert with the adapter, whose s B A is `delta`, merged in."""
        return weight + delta

    def restore_expert(
        self, layer: FactoredParamWrapper, adapter_name: str, expert: int, weight: torch.Tensor, delta: torch.Tensor
    ) -> torch.Tensor:
        """Inverse of `change_expert`."""
        return weight - delta

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:  # type: ignore[override]
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


class VariantModel(CheckedTuner, LoraModel):
    """PEFT's LoRA model, whose layers follow the training rule `variant`."""

    variant: ClassVar[type[Variant]] = Variant
    supported: ClassVar[str] = "linear layers (also transformers' Conv1D and quantised ones), embeddings, convolutions"

    def _find_experts(self, model: nn.Module, config: Any) -> None:
        if not config.reaches_experts:
            return super()._find_experts(model, config)
        # As PEFT's LoRA does it: the rank of a fused parameter is that of its parts together.
        names = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
        lora = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, **{name: getattr(config, name) for name in names})
        if convert_to_experts(model, lora):
            for name in names:
                setattr(config, name, getattr(lora, name))
        return None

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **kwargs,
    ) -> None:
        base_layer, parameter_name = innermost(target), kwargs.get("parameter_name")
        with errors_naming(lora_config, current_key):
            if parameter_name is not None:
                check_experts(base_layer, parameter_name)
            if isinstance(base_layer, nn.MultiheadAttention):  # PEFT would alter it before it can be refused
                raise unsupported(base_layer, self.supported)
            try:
                with self._place(lora_config, current_key, base_layer if parameter_name else None):
                    super()._create_and_replace(
                        lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
                    )
            except ValueError:
                if parameter_name or any(isinstance(base_layer, kind.layer_types) for kind in SITES):
                    raise
                raise unsupported(base_layer, self.supported) from None
            layer = getattr(parent, target_name)
            if parameter_name is not None:
                known = isinstance(target, Routed) and target.parameter_name == parameter_name
                layer = target if known else layer
                layer.lora_variant[adapter_name] = self._make_rule(lora_config, layer, adapter_name, current_key)
                return
            try:
                layer.site = site_of(base_layer, SITES, **get_quantization_kwargs(self))
            except TypeError:
                raise unsupported(base_layer, self.supported) from None
            layer.quantization_backend = layer.site.backend
            if not self._follows_rule(layer):
                raise unsupported(base_layer, self.supported)
            layer.site.check_dense_kernel()
            layer.lora_variant[adapter_name] = self._make_rule(lora_config, layer, adapter_name, current_key)

    def _place(self, config: Any, key: str, experts: Any = None) -> Any:
        """Where the tensors of an adapter are made: on the meta device, without memory, if its file does not fit."""
        if self._file is None:
            return nullcontext()
        pattern = get_pattern_key(list(config.rank_pattern), key)
        r = config.rank_pattern.get(pattern, config.r) * (experts.num_experts if experts else 1)
        keys, tensors = nested_keys(key, experts) if experts else [key], self._file.tensors
        names = [f"{files.PREFIX}{one}.lora_{end}" for one in keys for end in ("A.weight", "embedding_A")]
        return self._room(any(name in tensors and len(tensors[name]) == r for name in names))

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        # PEFT takes from the config how a weight is laid out, and warns, and from the model how it is quantised; the
        # layer itself says both.
        base_layer = innermost(target)
        if isinstance(base_layer, (nn.Linear, Conv1D)):
            lora_config = copy.copy(lora_config)
            lora_config.fan_in_fan_out = isinstance(base_layer, Conv1D)
        backend = resolve_quantization_backend(base_layer, **kwargs)
        kwargs["loaded_in_8bit"] = isinstance(backend, Bnb8bitBackend)
        kwargs["loaded_in_4bit"] = isinstance(backend, Bnb4bitBackend)
        return with_rules(LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))

    def _copy_adapter(self, layer: Any, source: str, target: str) -> None:
        if source in layer.scaling:
            layer.scaling[target] = layer.scaling[source]

    def _make_rule(self, config: Any, layer: Any, adapter_name: str, key: str) -> Variant:
        return self.variant(config, key)

    def _follows_rule(self, layer: Any) -> bool:
        # A layer whose forward does not ask for variants (AWQ, fused attention) would silently train as plain LoRA.
        forwards = (cls.__dict__["forward"] for cls in type(layer).__mro__ if "forward" in cls.__dict__)
        return any("lora_variant" in forward.__code__.co_names for forward in forwards if hasattr(forward, "__code__"))

    def _check_merge_allowed(self) -> None:
        for _, layer in self._layers():
            layer.site.check_writable()
            if layer.site.groups > 1:
                raise NotImplementedError(
                    f"Cannot merge into a {type(layer.site.base).__name__} with groups={layer.site.groups}: PEFT's "
                    "LoRA connects all its channels, which no weight of the layer does. Keep the adapter attached, or "
                    "use FLoRA, whose deltas have groups."
                )
        super()._check_merge_allowed()

    @torch.no_grad()
    def _check_merge_finite(self, adapter_names: list[str] | None) -> None:
        for _, layer in self._layers():
            if isinstance(layer, Routed):
                names = layer.active_adapters if adapter_names is None else adapter_names
                layer.check_finite([name for name in layer.present(names) if name not in layer.merged_adapters])
                continue
            with onloaded(*layer.modules()):
                weight = layer.get_base_weight()
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    if name in layer.lora_variant and name not in layer.merged_adapters:
                        weight = layer.lora_variant[name].merge_safe(layer, name, weight)
                        if not torch.isfinite(weight).all():
                            raise ValueError(
                                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                            )


def with_rules(layer: Any) -> Any:
    """`layer`, as one of our own layers if it is one of PEFT's over a linear layer or an embedding."""
    if type(layer) is Linear:
        layer.__class__ = VariantLinear
    elif type(layer) is Embedding:
        layer.__class__ = VariantEmbedding
    elif type(layer) is ParamWrapper:
        layer.__class__ = FactoredParamWrapper
    elif isinstance(layer, LoraLayer) and type(layer).__module__.endswith("lora.bnb"):
        from .lora_bnb import LAYERS  # needs bitsandbytes

        layer.__class__ = LAYERS.get(type(layer), type(layer))
    return layer


def is_plain(*modules: nn.Module) -> bool:
    """Whether the modules compute nothing but their products and nobody (Opacus, tensor parallelism) watches."""
    return all(type(module) is nn.Linear and unobserved(module) for module in modules)


def low_rank(
    result: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    V: torch.Tensor | None = None,
    U: torch.Tensor | None = None,
    rule: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`result + (x V^T) U^T`, with a rule of its own for the gradients to A and B.

    The output and the gradient to x are those of the weight delta U V, by default LoRA's, `scale` B A. With g the
    gradient of the output, A gets (g `rule`)^T x and B gets diag(`scale`) g^T (x A^T), by default LoRA's gradients. All
    products are skinny and laid out for speed: the wide sides are contiguous.

    Args:
        result: (..., out_features), the base layer's output; the sum has its dtype.
        x: (..., in_features), in the dtype in which the products are taken (under autocast: autocast's).
        A: (r, in_features).
        B: (out_features, r).
        scale: factor of B's gradient: a number or (out_features,).
        V: (k, in_features), A in its first r rows; default: A.
        U: (out_features, k); default: `scale` B.
        rule: (out_features, r); default: U.
        weight: the base layer's, where the gradient of `result` is to go on to x only (`weight_along`).
    """
    x = autocasted(x)
    if not torch.is_grad_enabled() and U is None and isinstance(scale, int | float):
        return accumulate(result, F.linear(x, (A if V is None else V).to(x.dtype)), B.T, scale)
    with torch.no_grad():
        V = (A.detach() if V is None else V).to(x.dtype)  # dynamo refuses the same tensor twice
        U = times(B, scale) if U is None else U
        wide = torch.cat([U.T] if rule is None else [U.T, rule.T]).to(result.dtype)
    if torch.is_grad_enabled():
        return _LowRank.apply(result if weight is None else result.detach(), x, A, B, scale, V, wide, weight)
    return accumulate(result, F.linear(x, V), wide[: len(V)])


def weight_along(module: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor | None:
    """`base_weight` of a layer, for the first of its active adapters; `result` is without what a rule adds."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    alone = active[:1] == [adapter_name] and active.count(adapter_name) == 1
    dropout = module.lora_dropout[adapter_name]
    passes = type(dropout) is nn.Identity or (isinstance(dropout, nn.Dropout) and not dropout.training)
    return base_weight(module.base_layer, x, result) if alone and passes and unobserved(dropout) else None


class Retrained(torch.autograd.Function):
    """The output `value`; what made `trained`, of about equal value, gets its gradient, scaled by `s` if given."""

    @staticmethod
    def forward(ctx, value, trained, s=None):
        ctx.save_for_backward(s)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        return g, g if s is None else g * s.to(g.dtype), None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, x, A, B, scale, V, wide, weight):
        h = F.linear(x, V)
        ctx.r, ctx.scale, ctx.dtypes, ctx.x = len(A), scale, (A.dtype, B.dtype), (x.dtype, x.shape)
        own = x if ctx.needs_input_grad[2] else None  # a frozen A needs no x
        ctx.save_for_backward(own, h[..., : ctx.r], V, wide, weight)
        return accumulate(result, h, wide[: len(V)])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, h, V, wide, weight = ctx.saved_tensors
        dtype, shape = ctx.x
        grad_x = grad_A = grad_B = None
        flat = g.reshape(-1, g.shape[-1])
        with uncast(g):
            if any(ctx.needs_input_grad[1:3]):
                inner = F.linear(flat, wide).to(dtype)
            if ctx.needs_input_grad[1]:
                grad_x = input_gradient(flat, inner[:, : len(V)], V, weight).view(shape)
            if ctx.needs_input_grad[2]:
                grad_A = (inner[:, -ctx.r :].T @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
            if ctx.needs_input_grad[3]:
                grad_B = h.reshape(-1, ctx.r).to(g.dtype).T @ flat
                grad_B = times(grad_B.to(ctx.dtypes[1]).T, ctx.scale)
        return g if weight is None else None, grad_x, grad_A, grad_B, None, None, None, None
