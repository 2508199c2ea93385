"""The training rule of one adapter in one linear layer, and the layer that puts the noise into its one product."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...adapters.lora import Variant, is_plain, low_rank
from ...adapters.lora_layers import VariantLinear
from ...adapters.products import accumulate, autocasted, unobserved
from .config import LoRAGGPOConfig
from .noise import NoisyLinear, NoisyOutput, noise_seed
from .schedule import Schedule
from .statistics import measure, stacked


class GGPO(Variant):
    """Training rule of one adapter in one linear layer: which perturbation it sees, and what that is made from."""

    statistics = ("tau", "grad_norms2", "mean_norm")
    tau: torch.Tensor | None = None  # (out_features,) deviation of the noise in each row
    grad_norms2: torch.Tensor | None = None  # (out_features,)
    mean_norm: torch.Tensor | None = None  # () running mean of the gradient's norm
    base_norms2: torch.Tensor | None = None  # (out_features,)
    pending: torch.Tensor | None = None  # gradient norms that the hooks saw
    _hooked: Any = None

    def __init__(self, config: LoRAGGPOConfig, name: str, schedule: Schedule, layer: Any) -> None:
        super().__init__(config, name)
        self.schedule = schedule
        self.layer = layer  # in nn.DataParallel, not the copy that runs

    # Statistics

    @property
    def known(self) -> bool:
        """Whether it has the statistics of a step."""
        needed = ("mean_norm",) if self.config.mode == "mgpo" else ("tau", "grad_norms2")
        return all(getattr(self, key) is not None for key in needed)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: tensor.clone() for key in self.statistics if (tensor := getattr(self, key)) is not None}
        return {**self.__dict__, **own}  # not parts of the stacks of all layers

    def listen(self, module: Any, adapter_name: str) -> None:
        """Hooks on A and B, which leave the gradient's norms in `pending` while nobody else takes them."""
        weight = module.lora_B[adapter_name].weight
        if self._hooked is weight or not (weight.requires_grad and weight.is_leaf):
            return
        self._hooked = weight
        for parameter in (module.lora_A[adapter_name].weight, weight):
            if parameter.requires_grad:
                # Python cannot see through the parameter what its hooks hold: not the layer, or none is ever freed.
                hook = partial(_hear, weakref.ref(self), weakref.ref(module), adapter_name)
                parameter.register_post_accumulate_grad_hook(hook)

    # Perturbations

    def noise(self, module: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """tau (out_features,) and the seed () of the noise that the weight is to see, or None."""
        config, schedule = self.config, self.schedule
        trained = module.training and module.lora_B[adapter_name].weight.requires_grad
        if not trained or config.mode != "ggpo" or not schedule.perturbs or self.tau is None or schedule.waiting:
            return None
        if config.ggpo_sigma == 0 and config.combine == "quadrature":
            return None
        name = f"{config.seed}/{self.name}/{adapter_name}"
        return schedule.grown(self.tau), noise_seed(schedule.clock, name, config.noise_per == "micro")

    @torch.no_grad()
    def direction(self, module: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U (out_features, 2r) and V (2r, in_features; A first) of the MGPO perturbation eps = U V, or None.

        eps = -rho f d / ||d|| with d = scale (M_B A + B M_A), M the first moments, and f = 1 / mean gradient norm.
        """
        config, schedule = self.config, self.schedule
        if not config.mgpo_rho or schedule.waiting or module.scaling[adapter_name] == 0:
            return None
        factors = [w[adapter_name].weight for w in (self.layer.lora_A, self.layer.lora_B)]
        moments = [schedule.moment(weight) for weight in factors]
        if any(moment is None for moment in moments):
            return None
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        M_A, M_B = (moment.to(A.device) for moment in moments if moment is not None)
        (A, B), (M_A, M_B) = stacked(module, A, B), stacked(module, M_A, M_B)
        U, V = torch.cat([M_B, B], dim=-1), torch.cat([A, M_A], dim=-2)
        # of a stack of experts as a whole
        length2 = torch.dot((U.mT @ U).flatten(), (V @ V.mT).flatten())  # (||d|| / scale)^2
        factor = -config.mgpo_rho * length2.clamp(min=torch.finfo(length2.dtype).tiny).rsqrt()
        if self.mean_norm is None:
            return min(1.0, config.mgpo_max_scale) * factor * U, V
        least = max(1 / config.mgpo_max_scale, 1e-12)
        return factor / self.mean_norm.to(factor).clamp(min=least) * U, V

    def _steps_aside(self, module: Any, adapter_name: str) -> bool:
        """Whether the weight is to see MGPO's perturbation."""
        active = module.training and self.config.mode == "mgpo" and self.schedule.optimizer is not None
        return active and module.lora_B[adapter_name].weight.requires_grad and self.schedule.perturbs

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        noise = self.noise(module, active_adapter)
        if noise is not None:
            result = NoisyOutput.apply(result, autocasted(x), *noise)
        return self.add(module, active_adapter, x, result)

    def add(self, module: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` with the adapter's contribution and, in mode `"mgpo"`, the perturbation."""
        factors = self.direction(module, adapter_name) if self._steps_aside(module, adapter_name) else None
        if factors is None:
            return super().forward(module, adapter_name, x, result)
        U, V = factors
        lora_A, lora_B = module.lora_A[adapter_name], module.lora_B[adapter_name]
        if is_plain(lora_A, lora_B) and isinstance(module.lora_dropout[adapter_name], nn.Identity):
            A, B, scale = lora_A.weight, lora_B.weight, module.scaling[adapter_name]
            rule = scale * B.detach()
            U[:, : len(A)] += rule
            return low_rank(result, x, A, B, scale, U=U, V=V, rule=rule)
        return super().forward(module, adapter_name, x, accumulate(result, F.linear(x, V.to(x.dtype)), U.T))

    def over_experts(self, layer: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        factors = self.direction(layer, adapter_name) if self._steps_aside(layer, adapter_name) else None
        if factors is None:
            return super().over_experts(layer, adapter_name, x, result)
        (A, B), site, scale = layer.factors(adapter_name), layer.site, layer.scaling[adapter_name]
        U, V = factors
        result = site.accumulate(result, site.reduce(x, A), B, scale)
        return site.accumulate(result, site.reduce(x, V), U)


def _hear(rule_of: Any, module_of: Any, adapter_name: str, parameter: torch.Tensor) -> None:
    rule, module = rule_of(), module_of()
    if rule is not None and module is not None and not rule.schedule.driven:
        (rule.pending,) = measure([(rule, module, adapter_name)])
        rule.schedule.heard = True


class GGPOLinear(VariantLinear):
    """PEFT's LoRA layer; over a plain linear layer, noise goes into the weight before its one product."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = not (self.disable_adapters or self.merged or args or kwargs) and self.training
        base = self.base_layer
        noisy = any(getattr(self.lora_variant.get(name), "tau", None) is not None for name in self.active_adapters)
        if not (plain and noisy) or type(base) is not nn.Linear or not unobserved(base) or base.weight.requires_grad:
            return super().forward(x, *args, **kwargs)
        return self._perturbed_forward(x)

    def _perturbed_forward(self, x: torch.Tensor) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        rules: dict[str, Any] = {name: self.lora_variant[name] for name in names}
        noises = {name: rule.noise(self, name) for name, rule in rules.items()}
        first = next((name for name, noise in noises.items() if noise is not None), None)
        if first is None:
            return super().forward(x)
        base = self.base_layer
        inner = autocasted(x)
        bias = None if base.bias is None else base.bias.to(inner.dtype)
        result = NoisyLinear.apply(inner, base.weight, bias, *noises[first])
        dtype = result.dtype
        for name in names:
            lora_A: Any = self.lora_A[name]
            x = self._cast_input_dtype(x, lora_A.weight.dtype)
            noise = noises[name]
            if noise is not None and name != first:
                result = NoisyOutput.apply(result, autocasted(x), *noise)
            result = rules[name].add(self, name, x, result)
        return result.to(dtype)
