"""The growth of ranks: who is scored, who grows, and what the tuner tells of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...adapters import AdapterLayer, AdapterModel
from ...adapters.experts import target_key
from ...adapters.sharding import refuse_shards
from .adapter import TriAdaptLoRA
from .config import TriAdaptLoRAConfig


class GrowingModel(AdapterModel):
    """The tuner, with what drives the growth and what reads it."""

    peft_config: dict[str, Any]
    _checked = False  # whether the parameters are whole
    _forwards: int | None = 0  # training passes before the first `update_and_grow`; None: not counted any more

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        # What every kind of PeftModel calls in each forward pass; `forward` only some of them do.
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if not self._checked:
                check_unsharded(self)
                self._checked = True
            if self._forwards is not None:
                self._remind()
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _remind(self) -> None:
        """Warns once, when the first growth should have been and nothing has called `update_and_grow`."""
        self._forwards = (self._forwards or 0) + 1
        name = next((n for n in self.active_adapters if n in self.peft_config), None)
        if name is None:
            return
        config = self.peft_config[name]
        first = config.warmup + config.interval if config.total_step else config.init_warmup or 0
        if self._forwards <= max(100, first):  # several passes may be accumulated for one optimizer step
            return
        self._forwards = None
        if any(adapter.rank < adapter.size for adapter in trained_adapters(self, name).values()):
            warnings.warn(
                f"The ranks of the TriAdaptLoRA adapter {name!r} do not grow, since nothing drives them: pass "
                "`callbacks=[peftx.TriAdaptCallback()]` to the Trainer, or call "
                "`model.base_model.update_and_grow(step)` after each optimizer step.",
                stacklevel=2,
            )

    def update_and_grow(self, step: int) -> list[str]:
        """`update_and_grow` for this model."""
        return update_and_grow(self, step)

    def orthogonality_loss(self) -> torch.Tensor:
        """`orthogonality_loss` for this model."""
        return orthogonality_loss(self)

    def _named(self, adapter_name: str | None) -> tuple[str, dict[str, TriAdaptLoRA]]:
        name = adapter_name or self.active_adapters[0]
        layers = ((target_key(layer, key), layer) for key, layer in self._layers())
        found = {key: layer.adapters[name] for key, layer in layers if name in layer.adapters}
        adapters = {key: adapter for key, adapter in found.items() if isinstance(adapter, TriAdaptLoRA)}
        if not adapters:
            raise ValueError(f"There is no TriAdaptLoRA adapter {name!r}; there are: {', '.join(self.peft_config)}.")
        return name, adapters

    def ranks(self, adapter_name: str | None = None) -> dict[str, int]:
        """Active rank of each module; default: of the active adapter."""
        _, adapters = self._named(adapter_name)
        return {key: adapter.rank for key, adapter in adapters.items()}

    def rank_history(self, adapter_name: str | None = None) -> list[dict[str, Any]]:
        """The ranks at the start (step 0) and after each growth, as `TriAdaptCallback` logs them; for `plot_ranks`.

        They are read from the saved tensors, and so are complete after a resume and for a loaded adapter. The steps
        are those that `update_and_grow` was given: an adapter that was trained twice has steps of both trainings.
        """
        name, adapters = self._named(adapter_name)
        since = {key: adapter.since.tolist() for key, adapter in adapters.items()}
        steps = sorted({0}.union(*since.values()) - {-1})
        return [
            entry(step, name, {key: sum(0 <= s <= step for s in values) for key, values in since.items()})
            for step in steps
        ]

    def get_nb_active_parameters(self, adapter_name: str | None = None) -> int:
        """Trained values of the active ranks, r (in + out) + r (r + 1) a module, where `print_trainable_parameters`
        counts what is allocated."""
        _, adapters = self._named(adapter_name)
        sizes = ((a.rank, a.site.in_features + a.site.out_features, a.A[..., 0, 0].numel()) for a in adapters.values())
        return sum(count * (r * widths + r * (r + 1)) for r, widths, count in sizes)

    def finalize(self, adapter_name: str | None = None) -> None:
        """Cuts an adapter (default: the active one) to its active ranks, for a small file; outputs stay the same.

        The parameters are replaced, so this comes after training. The ranks go into the config's `rank_pattern`, which
        says that they do not grow.
        """
        name, adapters = self._named(adapter_name)
        for adapter in adapters.values():
            adapter.trim()
        self.peft_config[name].rank_pattern = {f"^{re.escape(key)}": a.rank for key, a in adapters.items()}


def update_and_grow(model: nn.Module, step: int) -> list[str]:
    """Scores the modules and adds ranks if optimizer step `step` (counted from 1) calls for it; call it after each.

    The only change of state. Only active, trainable adapters grow. It needs weights, not gradients, and no
    communication: processes with the same weights take the same decisions. A second call at the same step does nothing.

    Args:
        model: a `PeftModel`, its tuner, or a transformers model with an adapter (`model.add_adapter`).

    Returns:
        The names of the modules that grew, in the order of the model.

    Raises:
        ValueError: `total_step` is not known, or `step` is not a positive integer.
        RuntimeError: the adapter is merged, or its parameters are sharded.
    """
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"`step` counts the optimizer steps from 1, got {step!r}.")
    tuner = tuner_of(model)
    check_unsharded(tuner)
    found_driver(tuner)
    grown: dict[str, None] = {}
    for adapter_name, config in tuner.peft_config.items():
        if isinstance(config, TriAdaptLoRAConfig) and (config.total_step is None or config.is_due(step)):
            adapters = trained_adapters(tuner, adapter_name)
            if not adapters:
                continue
            if config.total_step is None:
                raise ValueError(
                    f"The TriAdaptLoRA adapter {adapter_name!r} does not know how long it will be trained. Set "
                    "`total_step` in its config to the number of optimizer steps, or use `peftx.TriAdaptCallback`."
                )
            names = set(_grow(adapters, config, step))
            grown.update(dict.fromkeys(name for name in adapters if name in names))
    return list(grown)


def orthogonality_loss(model: nn.Module) -> torch.Tensor:
    """The penalty on the adapters in training, (), at least in fp32: a term for the loss of an optimizer step.

    For each adapter, orth_reg_weight times the mean over its A and B of ||A A^T - I||_F and ||B^T B - I||_F at the
    active rank. `TriAdaptCallback` adds its gradient once for each optimizer step, after clipping.
    """
    tuner = tuner_of(model)
    total = torch.zeros(())
    for name, config in tuner.peft_config.items():
        if isinstance(config, TriAdaptLoRAConfig) and config.orth_reg_weight:
            parts = [part for adapter in trained_adapters(tuner, name).values() for part in adapter.defects()]
            if parts:
                mean = torch.stack([part.to(parts[0].device) for part in parts]).mean()
                total = total.to(mean.device) + config.orth_reg_weight * mean
    return total


def add_orthogonality_gradient(model: nn.Module) -> None:
    """Adds the gradient of `orthogonality_loss` to what is there; no backward hook (DDP's) sees it."""
    loss = orthogonality_loss(model)
    if not loss.requires_grad:
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
        if grad is not None and parameter.grad is not None:
            parameter.grad.add_(grad)


def tuner_of(model: nn.Module) -> Any:
    """The tuner of a `PeftModel`, also of one that DDP wraps; a tuner or a transformers model is returned as it is. Of
    a model that holds one of them (sentence-transformers'), what it is of that one."""
    model = extract_model_from_parallel(model)
    inner: Any = getattr(model, "base_model", model)
    if isinstance(inner, BaseTuner) or hasattr(model, "peft_config"):
        return inner if isinstance(inner, BaseTuner) else model
    return next((tuner_of(module) for module in model.modules() if "peft_config" in vars(module)), model)


def found_driver(tuner: Any) -> None:
    if isinstance(tuner, GrowingModel):
        tuner._forwards = None


def trained_adapters(tuner: Any, adapter_name: str) -> dict[str, TriAdaptLoRA]:
    """Those of one name that are active and take gradients, by the names of their modules."""
    body = tuner.model if isinstance(tuner, BaseTuner) else tuner
    return {
        name: layer.adapters[adapter_name]
        for name, layer in body.named_modules()
        if isinstance(layer, AdapterLayer)
        and adapter_name in layer.present(layer.active_adapters)
        and isinstance(layer.adapters[adapter_name], TriAdaptLoRA)  # and no weighted sum of such
        and not layer.disable_adapters
        and layer.adapters[adapter_name].A.requires_grad
    }


def check_unsharded(tuner: Any) -> None:
    """Raises RuntimeError where an adapter that has room to grow is sharded."""
    for name in tuner.peft_config:
        if any(adapter.rank < adapter.size for adapter in trained_adapters(tuner, name).values()):
            refuse_shards(tuner, "TriAdaptLoRA", "ranks are written into factors that every process must hold whole")


@torch.no_grad()
def _grow(adapters: Mapping[str, TriAdaptLoRA], config: TriAdaptLoRAConfig, step: int) -> Iterator[str]:
    """One round; yields the names of the modules that grew."""
    for name, adapter in adapters.items():
        adapter.check_growable(name)
        adapter.refresh()  # DDP may have written the first process's at the start
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    budget = (config.target_total_rank or config.target_r * len(adapters)) - sum(ranks.values())
    if budget <= 0 or any(adapter.scored.item() == step for adapter in adapters.values()):
        return
    scores = {name: adapter.score(step) for name, adapter in adapters.items()}
    candidates = [name for name, adapter in adapters.items() if ranks[name] < adapter.size]
    candidates.sort(key=lambda name: -scores[name])  # stable: ties are in the order of the modules
    for name in candidates[: config.quota(step, budget)]:
        adapter = adapters[name]
        size = config.growth_size or max(1, config.target_r // 2)
        count = min(size, adapter.size - ranks[name], budget)
        if count:
            adapter.activate(count, step, key=f"{config.seed} {name} {ranks[name]}")
            if config.rebaseline_after_growth:
                adapter.norm.copy_(adapter.core_norm())
            budget -= count
            yield name


def entry(step: int, adapter_name: str, ranks: dict[str, int]) -> dict[str, Any]:
    """What is logged of the ranks after a step."""
    return {"step": step, "adapter": adapter_name, "triadaptlora_ranks": ranks}
