"""The base model with an adapter merged into it, as files; and where an export may go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import AutoTokenizer

from ..cards import exported as cards
from ..cards.labels import labels_on, named_labels
from ..files import check_apart, check_free, drafted
from ..saved import read_config
from .loading import fetch_adapter, load_adapter

BY = "export"
MODEL = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")


def check_place(
    path: str | os.PathLike, names: tuple[str, ...], config: Any, base_model: Any = None, source: Any = None
) -> None:
    """Raises ValueError where an export would write over what it reads, or over what is not an export's."""
    for base in (base_model, getattr(config, "base_model_name_or_path", None)):
        check_apart(path, {"adapter": source, "base_model": base}, "the output")
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{path} is a file: name a folder to write to.")
    check_free(Path(path), names, BY)


def export_merged(
    adapter: str | os.PathLike,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    base_model: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Writes the base model with a saved adapter merged into it: any tool loads it, no PEFT needed.

    Where the adapter changes one of two tied weights (a head that is the input embeddings too), they are untied.

    Args:
        adapter: folder, or id of a repository on the Hub.
        path: folder for the model and, where there is one, its tokenizer; made if missing.
        dtype: of the written weights; default: the base model's. Deltas are added in fp32 at least, and cast once.
        base_model: a model, which is merged into, or where to find it; default: where the adapter's config says.
        revision, subfolder, token: of the adapter, as for `export_lora`.

    Returns:
        The merged model.

    Raises:
        ValueError: the adapter or its base model cannot be read, or the merged weights are not finite in `dtype`; the
            base model is quantised and `dtype` is given; `path` is a file, or what is read, or has files in the way; or
            there is an adapter in it, which transformers would put on the merged model again. Nothing is written then.
        NotImplementedError: the adapter is no weight delta (Compacter).
    """
    if Path(path, CONFIG_NAME).exists():
        raise ValueError(
            f"{path} holds an adapter, which transformers would put on the merged model again: name another folder."
        )
    check_place(path, (), None, base_model, Path(adapter, subfolder or ""))
    hub: dict[str, Any] = {"revision": revision, "token": token}
    config = read_config(fetch_adapter(adapter, subfolder=subfolder, **hub), shown=adapter)
    check_place(path, MODEL, config)
    model: Any = load_adapter(adapter, base_model, subfolder=subfolder, **hub)
    base = model.get_base_model()
    check_place(path, MODEL, model.active_peft_config, str(getattr(base.config, "_name_or_path", "")))
    if dtype is not None and dtype != base.dtype:
        if getattr(base, "is_quantized", False):
            raise ValueError(f"The base model is quantised: its weights have no {dtype}. Name a dense `base_model`.")
        model = model.to(torch.float32)  # so that the sums are rounded once
    _untie(model)
    merged = model.merge_and_unload(safe_merge=True)
    if dtype is not None:
        merged = merged.to(dtype)
        bad = next((name for name, weight in merged.named_parameters() if not torch.isfinite(weight).all()), None)
        if bad is not None:
            raise ValueError(f"{bad} has values that {dtype} cannot hold: name another `dtype`.")
    labels = named_labels(merged.config.to_dict()) or labels_on(cards.card_of(Path(adapter, subfolder or "")))
    if labels and len(labels) == merged.config.num_labels:  # of which its base knows the number alone
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {name: number for number, name in enumerate(labels)}
    of_adapter = hub | {"subfolder": subfolder or ""}
    with drafted(path, BY) as folder:
        merged.save_pretrained(str(folder))
        for source, options in ((adapter, of_adapter), (merged.config._name_or_path, {"token": token})):
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
            except (OSError, ValueError):
                continue
            tokenizer.save_pretrained(str(folder))
            break
        cards.put(folder, path, BY, "merged", config, source=adapter, base_model=base_model, labels=labels)
    return merged


def _untie(model: PeftModel) -> None:
    """Gives all places of tied weights one each, if one is adapted: merging into it would change the others too."""
    base: Any = model.get_base_model()
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in base.modules():
        for name, weight in module.named_parameters(recurse=False):
            places.setdefault(id(weight), []).append((module, name))
    layers = [layer.get_base_layer() for layer in base.modules() if isinstance(layer, BaseTunerLayer)]
    if all(len(places.get(id(getattr(layer, "weight", None)), ())) < 2 for layer in layers):
        return
    base.config.tie_word_embeddings = False  # which is said of all of them
    for users in places.values():
        for module, name in users[1:]:
            weight = getattr(module, name)
            setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
