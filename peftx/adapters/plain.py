"""Adapters in the form of PEFT's own LoRA: configs and tensors, for files that other programs read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import FrameType
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import Routed, target_key


def config_of(config: LoraConfig) -> LoraConfig:
    """The LoRA config of a config derived from it.

    Raises:
        NotImplementedError: PEFT has no such LoRA.
    """
    if config.use_dora and config.target_parameters:
        raise NotImplementedError(
            "PEFT's DoRA does not reach the experts of `target_parameters`, so a GradNormLoRP adapter on them has no "
            "exact export. Pass `rank=` (`--rank`) for a LoRA near to it, or merge it into the model."
        )
    return LoraConfig(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init and f.name != "peft_type"}
    )


def rescaled(state: dict[str, torch.Tensor], layers: dict[str, Any], adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors of `state` that hold what `scale_layer` or `set_scale` did, which no config can say. Layers by the
    beginnings of their keys."""
    found = {}
    for name, layer in layers.items():
        r = layer.r[adapter_name]
        ratio = layer.scaling[adapter_name] * (r**0.5 if layer.use_rslora[adapter_name] else r)
        ratio /= layer.lora_alpha[adapter_name]
        keys = (f"{name}.{part}" for part in ("lora_B.weight", "lora_B.bias", "lora_embedding_B"))
        found.update({key: ratio * state[key] for key in keys if key in state and abs(ratio - 1) > 1e-9})
    return found


def tensors_of(key: str, layer: Any, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    """The factors of a layer as PEFT's LoRA saves them, under keys that begin with `key`."""
    if isinstance(layer, Routed):  # as PEFT lays out the factors of a stack
        return {f"{key}.lora_A.weight": A.flatten(0, 1), f"{key}.lora_B.weight": B.permute(1, 2, 0).flatten(1)}
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B.reshape(*B.shape, *[1] * (A.ndim - 2))}


def describe(config: Any, ranks: dict[str, int], layers: list[BaseTunerLayer]) -> LoraConfig:
    """A LoRA config with scaling 1 for modules of these ranks."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != r}
    shared = ["task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules"]
    shared += ["target_parameters"]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        fan_in_fan_out=all(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=list(dict.fromkeys(config.modules_to_save or ())) or None,  # PEFT repeats them when it loads
        **{name: getattr(config, name) for name in shared},
    )


def as_lora(
    layers: dict[str, Any], config: Any, state: dict[str, torch.Tensor], adapter_name: str
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """An adapter on a network that PEFT does not wrap, as a LoRA.

    Args:
        layers: that have it, by their names.
        config: of the adapter.
        state: what PEFT would save of it.

    Raises:
        NotImplementedError: it has no exact LoRA form.
    """
    if isinstance(config, LoraConfig):
        found = {key.replace("magnitude_vector.weight", "magnitude_vector"): tensor for key, tensor in state.items()}
        return found | rescaled(found, layers, adapter_name), config_of(config)
    factors = {name: layer.lora_factors(adapter_name) for name, layer in layers.items()}
    prefix = f"{config.peft_type.value.lower()}_adapter."
    found = {key: tensor for key, tensor in state.items() if f".{prefix}" not in key and not key.startswith(prefix)}
    for name, (A, B) in factors.items():
        found |= tensors_of(name, layers[name], A.detach().contiguous(), B.detach().contiguous())
    ranks = {target_key(layers[name], name): B.shape[-1] for name, (_, B) in factors.items()}
    return found, describe(config, ranks, list(layers.values()))


def for_diffusers(
    tuner: Any,
    model: nn.Module,
    state: dict[str, torch.Tensor],
    frame: FrameType | None,
    config: Any,
    adapter_name: str,
    *_: Any,
    **__: Any,
) -> dict[str, torch.Tensor]:
    """What PEFT is to save of an adapter: `state`, or where `save_lora_adapter` of diffusers asks for it, whose loader
    knows LoRA's tensors and configs only, the same adapter as a LoRA.

    Args:
        tuner: class of the adapter's tuner.
        model: that has the adapter.
        state: what PEFT has found, with the adapter's name in the keys.
        frame: of the caller. The config that diffusers writes is one of its variables, and becomes that of the LoRA.
        config, adapter_name: of the adapter.

    Raises:
        NotImplementedError: the adapter has no exact LoRA form, or diffusers writes configs in another way.
    """
    saving = caller(frame, "save_lora_adapter")
    if saving is None:
        return state
    metadata = saving.f_locals.get("lora_adapter_metadata")
    layers: Any = {name: each for name, each in model.named_modules() if isinstance(each, tuner.tuner_layer_cls)}
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer._all_available_adapter_names()}
    try:
        if not isinstance(metadata, dict):
            raise NotImplementedError(f"{config.peft_type.value} cannot say to this version of diffusers what it is.")
        bare = {tuner._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in state.items()}
        found, exported = as_lora(layers, config, bare, adapter_name)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"diffusers' `save_lora_adapter` would write a file that its own loader refuses: {error} Adapt the network "
            "by `peft.get_peft_model(unet, config)`, save it by `save_pretrained`, and load it by "
            "`peft.PeftModel.from_pretrained(unet, folder)`, or merge it by `merge_and_unload`."
        ) from error
    metadata.clear()
    metadata.update(exported.to_dict())
    return found


def caller(frame: FrameType | None, name: str) -> FrameType | None:
    """The call of this name, if it is one of the few next ones up the stack."""
    for _ in range(5):
        if frame is None or frame.f_code.co_name == name:
            return frame
        frame = frame.f_back
    return None
