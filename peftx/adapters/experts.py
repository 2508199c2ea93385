"""Adapters on the fused experts of a mixture, factored over the tokens that each expert gets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from .adapter import Adapter
from .products import at_least_fp32, onloaded
from .sites.experts import ExpertsSite, Routing, grouped, is_experts, segments

SUPPORTED = (
    "`target_parameters` names stacked parameters (3-D) of experts that transformers decorates by "
    "`use_experts_implementation`, such as 'mlp.experts.gate_up_proj'"
)


def check_experts(base: nn.Module, name: str) -> None:
    """Raises TypeError where a parameter is no stack of experts that can be adapted."""
    parameter, kind = getattr(base, name), type(base).__name__
    if not is_experts(base):
        raise TypeError(f"{name} of a {kind} is no parameter of fused experts: {SUPPORTED}.")
    if parameter.ndim != 3:
        raise TypeError(f"{name} of a {kind} has {parameter.ndim} axes: {SUPPORTED}.")
    if not parameter.is_floating_point():
        raise TypeError(f"{name} of a {kind} is packed as {parameter.dtype}. Load the experts in 16 or 32 bits.")
    if getattr(base, "_is_expert_parallel", False):
        raise TypeError(f"{name} of a {kind} is split over devices by expert parallelism. Load the model without.")


def experts_named(model: nn.Module, config: Any) -> tuple[Any, Any] | None:
    """Modules and parameters that PEFT's LoRA finds under the names of the targets, where some are fused experts."""
    lora = LoraConfig(target_modules=config.target_modules, target_parameters=config.target_parameters)
    return (lora.target_modules, lora.target_parameters) if convert_to_experts(model, lora) else None


def convert_to_experts(model: nn.Module, config: LoraConfig) -> bool:
    """Whether targets of the config are names of fused experts to PEFT, which it is then changed to say.

    `"all-linear"` stays what it says; PEFT reads routers into it.
    """
    before = {*(config.target_parameters or ())}
    if config.target_modules not in (None, "all-linear") and hasattr(getattr(model, "config", None), "model_type"):
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    return bool({*(config.target_parameters or ())} - before)


def check_same_parameters(configs: Mapping[str, Any], config: Any) -> None:
    """Raises ValueError where the config has other `target_parameters` than those that are there."""
    wanted = {*(config.target_parameters or ())}
    for name, other in configs.items():
        others = {*(getattr(other, "target_parameters", None) or ())}
        if other is not config and wanted and others and wanted != others:
            raise ValueError(
                "All adapters with `target_parameters` must have the same ones, which their files count on: the new "
                f"one has {sorted(wanted)}, {name!r} has {sorted(others)}."
            )


@contextmanager
def patterns_of_parameters(tuner: Any, config: Any) -> Iterator[None]:
    """While an adapter with `target_parameters` is made, PEFT, which looks for patterns among the modules alone, warns
    of none; afterwards of those that match neither modules nor parameters."""
    if not getattr(config, "target_parameters", None):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
        yield
    targets = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field, None) or {}
        lost = sorted(key for key in keys if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets))
        if lost:
            warnings.warn(f"The {field} keys {lost} match no target, and are ignored.", stacklevel=4)


def check_matched(tuner: Any, model: nn.Module, config: Any) -> None:
    """Raises ValueError where some of the `target_parameters` match nothing; where none does, PEFT has said so."""
    found = [f".{name}" for name in tuner.targeted_parameter_names]
    asked = getattr(config, "target_parameters", None) or ()
    if lost := sorted(name for name in asked if not any(one.endswith(f".{name}") for one in found)):
        known = sorted({name.replace(".base_layer", "") for name in fused_experts(model)})
        raise ValueError(f"target_parameters {lost} match no parameter of the model, whose fused experts are {known}.")


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the stacked weights of all fused experts in a model, as `target_parameters` takes them."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    found[re.sub(r"^.*\.\d+\.", "", f"{name}.{key}".lstrip("."))] = None
    return list(found)


def tell_of_experts(model: nn.Module, config: Any) -> None:
    """Says where `"all-linear"` leaves out the fused experts of a model, and what would reach them."""
    if config.target_modules == "all-linear" and not config.target_parameters and (names := fused_experts(model)):
        warnings.warn(
            f"target_modules='all-linear' leaves out the experts of this model, which are stacked parameters: "
            f"target_parameters={names} adds them, where the method has a form for them.",
            stacklevel=6,
        )


def nested_keys(key: str, base: nn.Module) -> list[str]:
    """The names that the layer over a parameter called `key` may have in a file, as layers of one module are nested."""
    return [key.rpartition(".")[0] + depth * ".base_layer" for depth in range(len([*base.parameters()]))]


Contribution = Callable[[torch.Tensor, torch.Tensor, Routing], torch.Tensor]


class Routed:
    """Mixin of a tuner layer over one stacked parameter of an experts module. Two parameters of one module have nested
    layers, as in PEFT, which knows such a layer by its class's name, `ParamWrapper`; the outermost does the forward.
    """

    base_layer: Any
    site: Any  # an `ExpertsSite`
    parameter_name: Any
    merged_adapters: list[str]
    active_adapters: Any
    get_base_layer: Callable[[], Any]
    present: Callable[[Sequence[str]], list[str]]

    def nested(self) -> Iterator[Any]:
        """This layer and those under it."""
        layer: Any = self
        while isinstance(layer, Routed):
            yield layer
            layer = layer.base_layer

    def contribution(self, adapter_name: str) -> Contribution | None:
        """What the adapter does with rows x (T, in) that are sorted by expert, and the layer's output (T, out)."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapter_names: list[str] | None = None,
    ) -> torch.Tensor:
        """Shapes: hidden_states (T, hidden), top_k_index and top_k_weights (T, k); (T, hidden)."""
        found: dict[str, list[tuple[str, Contribution]]] = {}
        for layer in self.nested():
            if layer.disable_adapters:
                if layer.merged:
                    layer.unmerge()
            elif layer.merged and adapter_names is not None:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            elif not layer.merged:
                names = layer.active_adapters if adapter_names is None else list(dict.fromkeys(adapter_names))
                pairs = [(name, layer.contribution(name)) for name in names]
                found[layer.parameter_name] = [(name, added) for name, added in pairs if added is not None]
        base = self.get_base_layer()
        if not any(found.values()):
            return base(hidden_states, top_k_index, top_k_weights)
        rows = None
        if adapter_names is not None:
            repeats, rest = divmod(len(hidden_states), len(adapter_names))
            if rest:
                raise ValueError(f"{len(hidden_states)} tokens are not of the {len(adapter_names)} samples named.")
            rows = [name for name in adapter_names for _ in range(repeats)]
        with onloaded(base):
            return routed(base, found, hidden_states, top_k_index, top_k_weights, rows)

    # Merging

    def changed(self, adapter_name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out_features, in_features) of one expert, at least in fp32, with an adapter merged in."""
        raise NotImplementedError

    def restored(self, adapter_name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        """Inverse of `changed`."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As for every layer, one expert after the other."""
        names = self.present(check_adapters_to_merge(self, adapter_names))  # type: ignore[arg-type]
        if safe_merge:
            self.check_finite(names)
        for expert in range(self.site.experts if names else 0):
            self._write_expert(expert, self._merged(expert, names))
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """As for every layer, one expert after the other."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for expert in range(self.site.experts if self.merged_adapters else 0):
            self._write_expert(expert, self.unmerged(slice(expert, expert + 1))[0])
        self.merged_adapters.clear()

    def unmerged(self, experts: slice) -> torch.Tensor:
        """The weights (n, out_features, in_features) of some experts without the adapters merged into them, as stored
        or, if there are such, at least in fp32."""
        stack = self.site.weight()[experts]
        if not self.merged_adapters:
            return stack
        ones = []
        for expert, weight in zip(range(experts.start, experts.stop), at_least_fp32(stack), strict=True):
            for name in reversed(self.merged_adapters):
                weight = self.restored(name, expert, weight)
            ones.append(weight)
        return torch.stack(ones)

    @torch.no_grad()
    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Raises ValueError where merging these adapters would give NaNs or infinities."""
        for expert in range(self.site.experts if adapter_names else 0):
            if not torch.isfinite(self._merged(expert, adapter_names).to(self.site.dtype)).all():
                shown = ", ".join(adapter_names)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {shown} seems to be broken")

    @torch.no_grad()
    def dense_delta(self, adapter_name: str, expert: int) -> torch.Tensor:
        """W' - W (out_features, in_features) of one expert, at least in fp32."""
        (weight,) = at_least_fp32(self.unmerged(slice(expert, expert + 1)))
        return self.changed(adapter_name, expert, weight) - weight

    def _merged(self, expert: int, adapter_names: Sequence[str]) -> torch.Tensor:
        weight = at_least_fp32(self.site.at(expert).weight())
        for name in adapter_names:
            weight = self.changed(name, expert, weight)
        return weight

    def _write_expert(self, expert: int, weight: torch.Tensor) -> None:
        stored = self.site.weight()
        stored[expert] = weight.to(stored.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Asked by PEFT: the experts, with all nested adapters merged or without."""
        for layer in self.nested() if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()


def target_key(layer: nn.Module, name: str) -> str:
    """What the patterns of a config know a layer by, which is the module `name` of the model: over experts, the
    parameter's name."""
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, Routed) else name


class OverExperts(Routed):
    """Mixin of `AdapterLayer`, whose further argument is `parameter_name`."""

    @classmethod
    def site_for(cls, base_layer: nn.Module, parameter_name: str) -> ExpertsSite:
        return ExpertsSite(base_layer, parameter_name)

    @property
    def parameter_name(self) -> str:
        return self.site.name

    @classmethod
    def make_adapter(cls, site: ExpertsSite, config: Any) -> Adapter:
        return cls.adapter_cls.over_experts(site, config)  # type: ignore[attr-defined]

    def contribution(self, adapter_name: str) -> Contribution | None:
        adapters = self.adapters  # type: ignore[attr-defined]
        return partial(self._contribute, adapters[adapter_name]) if adapter_name in adapters else None

    def _contribute(self, adapter: Adapter, x: torch.Tensor, result: torch.Tensor, routing: Routing) -> torch.Tensor:
        if adapter.grouped:
            with self.site.routed(routing):
                return adapter(x, result)
        with onloaded(adapter):  # its formula takes no stack of factors
            parts = [adapter.at(expert)(x[rows], result[rows]) for expert, rows in segments(routing.offsets)]
        return torch.cat(parts) if parts else result

    # Merging

    def changed(self, adapter_name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        return self._one(adapter_name, expert).apply_delta(weight)

    def restored(self, adapter_name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        return self._one(adapter_name, expert).remove_delta(weight)

    def _one(self, adapter_name: str, expert: int) -> Adapter:
        adapter = self.adapters[adapter_name]  # type: ignore[attr-defined]
        with onloaded(adapter):
            return adapter.at(expert)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.check_mergeable()  # type: ignore[attr-defined]
        super().merge(*args, **kwargs)
        self._note_merged()

    def unmerge(self) -> None:
        super().unmerge()
        self._note_merged()

    def _note_merged(self) -> None:
        self.site.merged[:] = [self.adapters[name] for name in self.merged_adapters]  # type: ignore[attr-defined]

    def lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (E, r, in_features) and B (E, out_features, r) of an adapter; errors as for every layer."""
        self.check_delta()  # type: ignore[attr-defined]
        pairs = [self._one(adapter_name, expert).lora_factors() for expert in range(self.site.experts)]
        A, B = (torch.stack(factors) for factors in zip(*pairs, strict=True))
        return A, B

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The deltas of all experts in the layout of the parameter, at least in fp32."""
        self.check_delta()  # type: ignore[attr-defined]
        ones = (self._one(adapter_name, expert) for expert in range(self.site.experts))
        return self.site.laid_out(torch.stack([one.scale * at_least_fp32(one.delta_weight()) for one in ones]))


def routed(
    experts: Any,
    contributions: dict[str, list[tuple[str, Contribution]]],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    names: list[str] | None = None,
) -> torch.Tensor:
    """What the experts give, with adapters on their parameters: grouped products over the rows sorted by expert.

    Args:
        experts: the module, with transformers' flags of layout. Where it has a method `product` of a parameter's
            name, rows and their routing, that makes the product without bias, instead of the stack of that name. Where
            it has an attribute `observe`, that is called with the parameter's name, its rows, what the adapted stack
            makes of them, their routing, and their tokens.
        contributions: by the parameter's name: those of adapters, with their names.
        hidden_states: (T, hidden).
        top_k_index, top_k_weights: (T, k).
        names: of the adapter of each token, in a batch of several adapters.
    """
    k = top_k_index.shape[-1]
    chosen, order = top_k_index.flatten().sort()
    routing = Routing.of(chosen, experts.num_experts)
    product, observe = getattr(experts, "product", None), getattr(experts, "observe", None)
    rows: dict[str, torch.Tensor] = {}
    if names is not None:
        tokens = (order // k).tolist()
        for name in dict.fromkeys(names):
            own = [i for i, token in enumerate(tokens) if names[token] == name]
            rows[name] = torch.tensor(own, device=order.device, dtype=torch.long)

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = getattr(experts, f"{name}_bias")[chosen] if experts.has_bias else None
        if product is None:
            result = grouped(x, getattr(experts, name), routing.offsets, bias, experts.is_transposed)
        else:
            result = product(name, x, routing)
            result = result if bias is None else result + bias
        x = x.to(result.dtype)
        for adapter_name, contribution in contributions.get(name, ()):
            if names is None:
                result = contribution(x, result, routing)
            elif len(own := rows[adapter_name]):
                part = Routing.of(chosen[own], experts.num_experts)
                result = result.index_copy(0, own, contribution(x[own], result[own], part))
        if observe is not None:
            observe(name, x, result, routing, order // k)
        return result

    gated = getattr(experts, "has_gate", True)  # older transformers have no other experts, and no flags for them
    h = project("gate_up_proj" if gated else "up_proj", hidden_states[order // k])
    h = experts._apply_gate(h) if gated else experts.act_fn(h)
    y = project("down_proj", h)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = y * top_k_weights.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[back].unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype)
