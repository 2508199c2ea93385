"""An adapter in the place of another one, in a model that may be compiled."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections import Counter
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.utils import AuxiliaryTrainingWrapper, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import get_pattern_key
from torch import nn

from ..adapters.files import PREFIX, file_keys
from ..registry import info_of, methods
from .loading import fetch_adapter, read_adapter

BESIDE = "Load it beside the other one instead, by `load_adapter`, and activate it by `set_adapter`."


def hotswap(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Writes a saved adapter over one of the same method, in place: a compiled model is not compiled again.

    As `peft.utils.hotswap.hotswap_adapter`, which knows LoRA only (and is called for it), for every method. Shapes must
    be those of the adapter that is replaced; of methods that are LoRA with another training rule ranks may be lower,
    and settings such as `lora_alpha` others, which PEFT's `prepare_model_for_compiled_hotswap`, called before
    `torch.compile`, makes tensors. A setting of another method that its forward reads (FLoRA's `scale`, Compacter's
    `non_linearity`) is taken too, and costs one compilation where it differs. The model's config of the adapter
    becomes the file's.

    Args:
        model: `PeftModel` or transformers model with adapters, as it is or from `torch.compile`.
        path: folder of the adapter, or its id on the Hub.
        adapter_name: of the adapter that is replaced.
        revision, subfolder, token: as for `peftx.hub.load_adapter`.

    Raises:
        ValueError: there is no such adapter, here or there; the adapter here is merged; the methods or the shapes
            differ, or which biases are trained; the file does not fit. The model is as it was then.
    """
    model = getattr(model, "_orig_mod", model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r} to replace; there are: {', '.join(configs) or 'none'}.")
    old = configs[adapter_name]
    if old.peft_type == PeftType.LORA:
        folder = fetch_adapter(path, revision=revision, subfolder=subfolder, token=token)
        return hotswap_adapter(model, str(folder), adapter_name)
    config, state = read_adapter(path, revision=revision, subfolder=subfolder, token=token)
    if config.peft_type != old.peft_type:
        types = f"{old.peft_type.value} by one of {config.peft_type.value}"
        raise ValueError(f"Cannot replace an adapter of {types}. {BESIDE}")
    if not any(isinstance(old, info.config) for info in methods()):
        raise ValueError(f"hotswap knows LoRA and peftx's methods, not {old.peft_type.value}.")
    if config.bias != old.bias:
        raise ValueError(f"Cannot replace an adapter of bias={old.bias!r} by one of bias={config.bias!r}. {BESIDE}")
    if any(other is old for name, other in configs.items() if name != adapter_name):
        raise ValueError(f"The config of {adapter_name!r} is that of another adapter too, which would change. {BESIDE}")
    config.inference_mode = old.inference_mode
    tuner: Any = info_of(type(old)).model
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, tuner.tuner_layer_cls) and adapter_name in layer._all_available_adapter_names()
    }
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the base weights: call `unmerge_adapter` first.")
    _check_heads(model, adapter_name, state)
    swap = _Lora if isinstance(old, LoraConfig) else _Own
    swap(tuner, layers, adapter_name, old, config).take(model, state)
    return None


def _check_heads(model: nn.Module, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError for a head or rows that the file lacks, where PEFT would end in a KeyError."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in module.adapter_state_dict_load_map(adapter_name):
                if f"{name}.{key}" not in state:
                    raise ValueError(f"The adapter does not fit the model: {name}.{key} is missing. {BESIDE}")


class _Swap:
    """The swap of one adapter.

    Args:
        tuner: class of the adapters' tuner.
        layers: with the adapter, by name.
        name: the adapter's.
        old, config: its config, which becomes a copy of the new one.
    """

    def __init__(self, tuner: Any, layers: dict[str, Any], name: str, old: Any, config: Any) -> None:
        self.tuner, self.layers, self.name, self.old, self.config = tuner, layers, name, old, config

    def keys(self) -> dict[str, Any]:
        """The layers by their names in the base model."""
        return {name.removeprefix(PREFIX): layer for name, layer in self.layers.items()}

    def take(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        state = self.fitted(state)
        undo = self.settle()
        try:
            set_peft_model_state_dict(model, state, self.name)
        except BaseException:
            for owner, attributes in undo:
                vars(owner).update(attributes)
            raise
        self.finish(undo)

    def fitted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The file's tensors in the shapes of the adapter's; ValueError where they cannot be."""
        raise NotImplementedError

    def settle(self) -> list[tuple[Any, dict[str, Any]]]:
        """Takes the config's settings; returns the objects that it changed, with the attributes that they had."""
        before = {**vars(self.old)}
        vars(self.old).update(vars(self.config))  # rules and compiled code know the object
        return [(self.old, before)]

    def finish(self, undo: list[tuple[Any, dict[str, Any]]]) -> None:
        """Called when the tensors are loaded."""


KEPT = ("site", "scale", "training")  # what an adapter has of its layer, and from calls


class _Own(_Swap):
    trials: dict[Any, Any]  # an adapter of the new config, without memory, for each

    def fitted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.trials = {}
        for key, layer in self.keys().items():
            adapter = layer.adapters[self.name]
            with torch.device("meta"):
                trial = layer.make_adapter(layer.site, self.config.for_module(key))
            wanted, found = ({n: tuple(t.shape) for n, t in a.state_dict().items()} for a in (adapter, trial))
            if type(trial) is not type(adapter) or wanted != found:
                raise ValueError(f"{key}: the new adapter has {found}, the old one {wanted}. {BESIDE}")
            self.trials[adapter] = trial
        return state

    def settle(self) -> list[tuple[Any, dict[str, Any]]]:
        undo = super().settle()
        for adapter, trial in self.trials.items():
            before = vars(adapter)
            changes = {name: value for name, value in vars(trial).items() if name[0] != "_" and name not in KEPT}
            if trial.config is self.config:
                changes["config"] = self.old
            undo.append((adapter, {**{name: before[name] for name in changes}, "_buffers": {**adapter._buffers}}))
            before.update(changes)
        return undo

    def finish(self, undo: list[tuple[Any, dict[str, Any]]]) -> None:
        for adapter, before in undo[
            1:
        ]:  # what `prepare_load` made anew (LoLDU's factors) goes where the old values were
            for name, old in before["_buffers"].items():
                new = adapter._buffers[name]
                if new is not old and new.shape == old.shape:
                    adapter._buffers[name] = old.copy_(new)


class _Lora(_Swap):
    scalings: dict[str, float]

    def fitted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {self.tuner.current_key(key): tensor for key, tensor in state.items()}
        self.scalings, ranks, padded = {}, {}, False
        for key, layer in self.keys().items():
            r = _by_pattern(self.config.rank_pattern, key, self.config.r)
            alpha = _by_pattern(self.config.alpha_pattern, key, self.config.lora_alpha)
            self.scalings[key] = alpha / (math.sqrt(r) if self.config.use_rslora else r)
            for part, file_key in file_keys(self.tuner, layer, key, self.name).items():
                axis = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(part)
                if axis is None or self.config.target_parameters:
                    continue
                size = _own_tensor(layer, part, self.name).shape[axis]
                ranks[key] = size
                if file_key in state and state[file_key].ndim > axis and state[file_key].shape[axis] < size:
                    state[file_key] = _padded(state[file_key], axis, size)
                    padded = True
        if padded:
            self.config = _described(self.config, ranks, self.scalings)
        return state

    def settle(self) -> list[tuple[Any, dict[str, Any]]]:
        undo = super().settle()
        for key, layer in self.keys().items():
            old, rule = layer.scaling[self.name], layer.lora_variant.get(self.name)
            undo.append((layer, {"scaling": {**layer.scaling}}))
            if rule is not None and rule.config is not self.old:  # a copy without what the rule does itself
                undo.append((rule, {"config": rule.config}))
                use_dora, rule.config = rule.config.use_dora, copy.copy(self.old)
                rule.config.use_dora = use_dora
            if isinstance(old, torch.Tensor):
                layer.scaling[self.name] = torch.full_like(old, self.scalings[key])
            elif old != self.scalings[key]:
                layer.scaling[self.name] = self.scalings[key]
        return undo

    def finish(self, undo: list[tuple[Any, dict[str, Any]]]) -> None:
        for owner, before in undo[1:]:  # tensors keep their place, which a compiled model knows
            old = before.get("scaling", {}).get(self.name)
            if isinstance(old, torch.Tensor):
                owner.scaling[self.name] = old.copy_(owner.scaling[self.name])


def _by_pattern(patterns: dict[str, Any], key: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(list(patterns), key), default)


def _own_tensor(layer: Any, part: str, name: str) -> torch.Tensor:
    module = getattr(layer, part)[name]
    return getattr(module, "weight", module)


def _padded(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """`tensor` with zeros behind it along an axis."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _described(config: Any, ranks: dict[str, int], scalings: dict[str, float]) -> Any:
    """The config of an adapter that was padded: of the same function, with the ranks that it has now."""
    alphas = {key: scalings[key] * rank for key, rank in ranks.items()}
    alphas = {key: int(alpha) if float(alpha).is_integer() else alpha for key, alpha in alphas.items()}
    (r, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    return dataclasses.replace(
        config,
        r=r,
        lora_alpha=alpha,
        use_rslora=False,
        rank_pattern={key: rank for key, rank in ranks.items() if rank != r},
        alpha_pattern={key: value for key, value in alphas.items() if value != alpha},
    )
