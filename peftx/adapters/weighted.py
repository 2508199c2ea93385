"""Weighted sums of adapters of one method, as LoRA factors in the method's own layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import nn

from .adapter import Adapter
from .products import at_least_fp32, onloaded
from .sites import EmbeddingSite, ExpertsSite, Site

CombinationType = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


class LowRank(Adapter):
    """A LoRA where its layer's other adapters are of another method: B A, trained or not as they are.

    Args:
        config: its `combined_rank` is r.
    """

    lora_A: nn.Parameter  # (r, in_features, kernel axes)
    lora_B: nn.Parameter  # (out_features, r)

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        if isinstance(site, ExpertsSite):
            raise NotImplementedError("Weighted sums of adapters on fused experts have no form.")
        out, *rest = site.shape
        self.lora_A = nn.Parameter(torch.zeros(config.combined_rank, *rest))
        self.lora_B = nn.Parameter(torch.zeros(out, config.combined_rank))

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        down = self.site.reduce if isinstance(self.site, EmbeddingSite) else self.site.apply
        return self.site.accumulate(result, down(x, self.lora_A), self.lora_B, self.scale)

    def delta_weight(self) -> torch.Tensor:
        A, B = at_least_fp32(self.lora_A), at_least_fp32(self.lora_B)
        return (B @ A.flatten(1)).unflatten(1, A.shape[1:])

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A.detach(), self.scale * self.lora_B.detach()


def check_weighted(
    tuner: Any,
    adapters: Any,
    weights: Any,
    combination_type: Any = "svd",
    svd_rank: Any = None,
    density: Any = None,
    majority_sign_method: Any = "total",
) -> None:
    """Raises ValueError for arguments of `add_weighted_adapter` that PEFT would stumble over, or take as others."""
    if unknown := [name for name in adapters if name not in tuner.peft_config]:
        raise ValueError(f"Adapter {unknown[0]} does not exist; there are: {', '.join(tuner.peft_config)}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"add_weighted_adapter needs a weight for each adapter, got {adapters} and {weights}.")
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise ValueError(f"The weights of adapters must be finite numbers, got {weights}.")
    if combination_type not in get_args(CombinationType):
        known = ", ".join(get_args(CombinationType))
        raise ValueError(f"Invalid combination_type: {combination_type!r}. Known are {known}.")
    prunes = len(adapters) > 1 and combination_type not in ("svd", "linear", "cat")
    if prunes and not (isinstance(density, int | float) and 0 < density <= 1):
        raise ValueError(f"{combination_type!r} keeps a share `density` in (0, 1] of all values, got {density!r}.")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"`majority_sign_method` must be 'total' or 'frequency', got {majority_sign_method!r}.")
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1):
        raise ValueError(f"`svd_rank` must be a positive integer or None, got {svd_rank!r}.")
    wrappers = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if any(len({*adapters} & {*wrapper._adapters}) > 1 for wrapper in wrappers):
        raise ValueError(
            "Cannot add weighted adapters if they train the same module (`modules_to_save`) or rows of one "
            "(`trainable_token_indices`): no sum of such is taken."
        )


@torch.no_grad()
def add_weighted(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: CombinationType,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: Literal["total", "frequency"],
) -> None:
    """See `AdapterModel.add_weighted_adapter`; the arguments are checked."""
    method = tuner.peft_config[adapters[0]].peft_type.value
    if reason := tuner.tuner_layer_cls.adapter_cls.no_delta:
        raise NotImplementedError(
            f"{method} adapters have no weighted sum: {reason}. Activate them together "
            "(`model.base_model.set_adapter([...])`)."
        )
    if any(tuner.peft_config[name].target_parameters for name in adapters):
        raise NotImplementedError(
            f"add_weighted_adapter has no form for fused experts, as PEFT's LoRA has none. Activate the {method} "
            "adapters together (`model.base_model.set_adapter([...])`), or merge them in turn."
        )
    combine = _Combination(
        "linear" if len(adapters) == 1 else combination_type, svd_rank, svd_clamp, svd_driver, density,
        majority_sign_method,
    )  # fmt: skip
    factors = {}
    for key, layer in tuner._layers():
        chosen = [(layer.adapters[n], w) for n, w in zip(adapters, weights, strict=True) if n in layer.adapters]
        if chosen:
            with onloaded(layer, *(adapter for adapter, _ in chosen)):
                factors[key] = combine([adapter for adapter, _ in chosen], [weight for _, weight in chosen], key)
    config = _config_of(tuner, adapters, factors)
    replication, config.layer_replication = config.layer_replication, None  # the layers are there
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    config.layer_replication = replication
    layers = dict(tuner._layers())
    for key, (A, B) in factors.items():
        held = layers[key].adapters
        new, source = held[adapter_name], next(held[next(name for name in adapters if name in held)].parameters())
        for name, factor, axis in (("lora_A", A, 0), ("lora_B", B, 1)):
            parameter = new.get_parameter(name)
            parameter.data = parameter.data.to(source.dtype)
            parameter.data.narrow(axis, 0, factor.shape[axis]).copy_(factor)
    _copy_trained_modules(tuner, adapters, adapter_name)


def _config_of(tuner: Any, adapters: Sequence[str], factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """The config of the sum: the first adapter's, on the modules that any of them adapts."""
    configs = [tuner.peft_config[name] for name in adapters]
    known = {field.name for field in dataclasses.fields(configs[0])}
    heads = {head for config in configs for head in config.modules_to_save or ()}
    changes: dict[str, Any] = {
        "combined_rank": max(len(A) for A, _ in factors.values()),
        "target_modules": {key.replace(".base_layer", "") for key in factors},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
        "modules_to_save": sorted(heads) or None,
        "trainable_token_indices": next(
            (c.trainable_token_indices for c in configs if c.trainable_token_indices), None
        ),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return dataclasses.replace(configs[0], **{name: value for name, value in changes.items() if name in known})


def _copy_trained_modules(tuner: Any, adapters: Sequence[str], adapter_name: str) -> None:
    """Gives the sum the heads and rows that the one of the adapters that trains them has."""
    for wrapper in tuner.modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in wrapper._adapters:
            state = wrapper.state_dict(keep_vars=True)
            new = wrapper.adapter_state_dict_load_map(adapter_name)
            for source in (name for name in adapters if name in wrapper._adapters):
                for key, old in wrapper.adapter_state_dict_load_map(source).items():
                    state[new[key]].data.copy_(state[old])


@dataclasses.dataclass(frozen=True)
class _Combination:
    """What PEFT makes of LoRA adapters, from the factors or deltas of any."""

    kind: str
    rank: int | None
    clamp: float | None
    driver: str | None
    density: Any
    sign: Literal["total", "frequency"]

    def __call__(
        self, adapters: Sequence[Adapter], weights: Sequence[float], key: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in_features, kernel axes) and B (out_features, r) of the sum, at least in fp32."""
        if self.kind.endswith("svd"):
            return self._truncated(adapters, weights)
        try:
            pairs = [tuple(map(at_least_fp32, adapter.lora_factors())) for adapter in adapters]
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{key}: {error} A combination by {self.kind!r} is one of LoRA factors: take one of those that end in "
                "'svd', which approximate the deltas themselves."
            ) from None
        if self.kind == "cat":
            return (
                torch.cat([weight * A for (A, _), weight in zip(pairs, weights, strict=True)]),
                torch.cat([B for _, B in pairs], dim=1),
            )
        if len(ranks := {len(A) for A, _ in pairs}) > 1:
            raise ValueError(
                f"{key}: all adapters must have the same rank for {self.kind!r}, they have {sorted(ranks)}. Take 'cat' "
                "or 'svd'."
            )
        # As in PEFT: the sign of a weight goes to one factor, the root of its size to both.
        roots = [math.sqrt(abs(weight)) for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        A = self._sum([A for A, _ in pairs], signed)
        return A, self._sum([B for _, B in pairs], roots)

    def _sum(self, tensors: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        w = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        match self.kind.removesuffix("_svd"):
            case "ties":
                return ties(tensors, w, self.density, self.sign)
            case "dare_linear":
                return dare_linear(tensors, w, self.density)
            case "dare_ties":
                return dare_ties(tensors, w, self.density, self.sign)
            case "magnitude_prune":
                return magnitude_prune(tensors, w, self.density)
            case _:
                return task_arithmetic(tensors, w)

    def _truncated(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        deltas = [adapter.scale * at_least_fp32(adapter.delta_weight()) for adapter in adapters]
        delta = self._sum(deltas, weights)
        U, S, Vh = torch.linalg.svd(delta.flatten(1), full_matrices=False, driver=self.driver)
        rank = self.rank or max(map(_rank, adapters))
        B, A = U[:, :rank] * S[:rank], Vh[:rank]
        if self.clamp is not None:
            high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), self.clamp)
            B, A = B.clamp(-high, high), A.clamp(-high, high)
        return A.unflatten(1, delta.shape[1:]), B


def _rank(adapter: Adapter) -> int:
    """Of the delta's exact factors; without any, its shorter side, which cuts nothing off."""
    try:
        return len(adapter.lora_factors()[0])
    except NotImplementedError:
        out, *rest = adapter.site.shape
        return min(out, math.prod(rest))
