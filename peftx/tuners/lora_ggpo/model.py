"""The tuner, with the calls of a loop without Trainer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, _ConvNd
from torch import nn

from ...adapters import register
from ...adapters.lora import VariantModel
from ...utils import innermost
from .callback import GGPOCallback
from .config import LoRAGGPOConfig
from .rule import GGPO, GGPOLinear
from .schedule import Schedule, all_schedules, schedules, update_ggpo_stats


@register(
    "loraggpo",
    config=LoRAGGPOConfig,
    paper="arXiv:2502.14538",
    summary="LoRA under noise shaped by weights and gradients (GGPO), or a step against the momentum (MGPO)",
    lora_export="exact",
    callback=GGPOCallback,
    experts=True,
    learning_rate=2e-3,
    tiny={"r": 2, "lora_alpha": 2},
    variants={"lora-ggpo": {"auto_update": False}, "lora-mgpo": {"mode": "mgpo", "auto_update": False}},
)
class LoRAGGPOModel(VariantModel):
    """LoRA with the training rules of `LoRAGGPOConfig`."""

    supported = "linear layers (also transformers' Conv1D and quantised ones)"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        self._schedule = Schedule(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._schedule.handle = model.register_forward_pre_hook(self._schedule.before_forward)

    def delete_adapter(self, adapter_name: str) -> None:
        before = all_schedules(self.model)
        super().delete_adapter(adapter_name)
        for schedule in set(before) - set(all_schedules(self.model)):
            schedule.handle.remove()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        found = all_schedules(self.model)
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        for schedule in found:
            schedule.handle.remove()
        return base

    def _make_rule(self, config: LoRAGGPOConfig, layer: Any, adapter_name: str, key: str) -> GGPO:
        rule = GGPO(config, key, self._schedule, layer)
        self._schedule.rules.append((rule, layer, adapter_name))
        return rule

    def _follows_rule(self, layer: Any) -> bool:
        return super()._follows_rule(layer) and not isinstance(layer, (Embedding, _ConvNd))

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = innermost(target)
        if type(base) is nn.Linear and type(base.weight) is nn.Parameter and not lora_config.fan_in_fan_out:
            kwargs.pop("parameter_name", None)
            return GGPOLinear(target, adapter_name, config=lora_config, **kwargs)
        return VariantModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def update_ggpo_stats(self, step: int | None = None) -> None:
        """Takes the gradients of an optimizer step as the statistics of the next one's perturbations.

        To be called once for each optimizer step: after `backward()`, clipping and `GradScaler.unscale_`, before
        `optimizer.step()` and `zero_grad()`. `GGPOCallback` does so in `Trainer`.

        Args:
            step: the number of this optimizer step, from 1; a second call for it does nothing. Default: counted here.

        Raises:
            RuntimeError: no weight has a gradient.
        """
        update_ggpo_stats(self.model, step)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Says whose first moments mode `"mgpo"` follows: an optimizer with `exp_avg` or `momentum_buffer` states.

        Raises:
            TypeError: it is no optimizer.
            ValueError: it is not one of this adapter's parameters, or no LoRA-GGPO adapter is being trained.
            RuntimeError: the parameters are sharded.
        """
        found = schedules(self.model)
        if not found:
            raise ValueError("attach_optimizer: the model trains no LORAGGPO adapter, whose moments could be followed.")
        for schedule in found:
            schedule.refuse_shards(self.model)
            schedule.check_optimizer(optimizer)
        for schedule in found:
            schedule.attach(optimizer)
