"""Adapters of peftx as plain LoRA adapters, for everything that knows PEFT but not peftx."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuners.layer import AdapterLayer


def export_lora(model: PeftModel, path: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Writes an adapter as a plain LoRA adapter of equal outputs: stock PEFT, vLLM or llama.cpp load it, without peftx.

    Methods that are LoRA with another training rule are written as they are. Others are written by the exact factors
    of their delta; modules whose ranks differ get a `rank_pattern`. Modules trained in full (`modules_to_save`, biases)
    go along. The training cannot be continued from the file as the method it was.

    Args:
        model: the `PeftModel`; it is not changed.
        path: folder for `adapter_config.json` and `adapter_model.safetensors`; made if missing.
        adapter_name: default: the active adapter.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: there is no such adapter, or more than one is active and none was named.
        NotImplementedError: the adapter is no weight delta (Compacter), or has no exact LoRA form (Bone's bat,
            some convolutions). Nothing is written then.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"export_lora needs a PeftModel, as `get_peft_model` returns it, got {type(model).__name__}.")
    adapter_name = _chosen(model, adapter_name)
    config = model.peft_config[adapter_name]
    tuner: Any = model.base_model
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if isinstance(config, LoraConfig):
        exported = _as_lora(config)
    else:
        layers = {
            name: layer
            for name, layer in tuner.model.named_modules()
            if isinstance(layer, AdapterLayer) and adapter_name in layer.adapter_config
        }
        factors = {name: layer.lora_factors(adapter_name) for name, layer in layers.items()}
        state = {key: tensor for key, tensor in state.items() if not _belongs_to(key, tuner.prefix)}
        for name, layer in layers.items():
            state |= _tensors(f"base_model.model.{name}", layer.get_base_layer(), *factors[name])
        exported = _describe(config, {name: len(A) for name, (A, _) in factors.items()}, list(layers.values()))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    exported.inference_mode = True
    exported.save_pretrained(str(folder))


def _chosen(model: PeftModel, adapter_name: str | None) -> str:
    if adapter_name is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(f"{len(active)} adapters are active ({', '.join(active)}): name one by `adapter_name`.")
        return active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}, only {', '.join(model.peft_config)}.")
    return adapter_name


def _as_lora(config: LoraConfig) -> LoraConfig:
    """The plain LoRA config of a config derived from it."""
    return LoraConfig(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init and f.name != "peft_type"}
    )


def _belongs_to(key: str, prefix: str) -> bool:
    return any(part.startswith(prefix) for part in key.split(".")[-2:])


def _tensors(key: str, base_layer: nn.Module, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(base_layer, nn.Embedding):
        return {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B.reshape(*B.shape, *[1] * (A.ndim - 2))}


def _describe(config: Any, ranks: dict[str, int], layers: list[AdapterLayer]) -> LoraConfig:
    """A LoRA config with scaling 1 for modules of these ranks."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != r}
    shared = ("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "modules_to_save")
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
        **{name: getattr(config, name) for name in shared},
    )
