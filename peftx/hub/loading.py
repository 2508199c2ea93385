"""Saved adapters, read from a folder or from the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, load_peft_weights
from torch import nn

from ..tuners.card import labels_in

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def read_adapter(path: str | os.PathLike) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and tensors, on the CPU, of a saved adapter; no base model is needed.

    Args:
        path: folder, or id of a repository on the Hub.

    Raises:
        ValueError: there is no adapter, or its config or tensors cannot be read, or neither PEFT nor peftx knows its
            method.
    """
    config = read_config(path)
    try:
        return config, load_peft_weights(str(path), device="cpu")
    except Exception as error:
        raise ValueError(f"The tensors of the adapter {path} cannot be read: {error}") from error


def read_config(path: str | os.PathLike) -> Any:
    """The config of a saved adapter; arguments and errors as for `read_adapter`."""
    try:
        return PeftConfig.from_pretrained(str(path))
    except KeyError as error:
        raise ValueError(
            f"The adapter {path} is of the type {error}, which neither PEFT {peft.__version__} nor peftx knows."
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no adapter that can be read: {error}") from error


def load_adapter(path: str | os.PathLike, base_model: Any = None, **kwargs: Any) -> PeftModel:
    """A saved adapter on its base model.

    As `peft.AutoPeftModel`, but for every task in one function; the number of a classifier's labels is found in the
    adapter, and the base model can be given.

    Args:
        path: folder, or id of a repository on the Hub.
        base_model: a model, or where to find it; default: where the adapter's config says.
        kwargs: for `from_pretrained` of the base model, e.g. `dtype`.

    Raises:
        ValueError: as for `read_adapter`, or the base model cannot be found.
    """
    config, state = read_adapter(path)
    if not isinstance(base_model, nn.Module):
        base_model = load_base(config, state, base_model, **kwargs)
    return PeftModel.from_pretrained(base_model, str(path), config=config)


def load_base(config: Any, state: dict[str, torch.Tensor], name: str | os.PathLike | None, **kwargs: Any) -> nn.Module:
    """The base model of an adapter; see `load_adapter`."""
    revision = config.revision if name is None else None
    name = str(name or config.base_model_name_or_path or "")
    if not name:
        raise ValueError("The adapter does not say what its base model is: name it by `base_model`.")
    mapped = (config.auto_mapping or {}).get("base_model_class")
    cls = getattr(transformers, CLASSES.get(config.task_type, mapped or "AutoModel"), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ValueError(f"transformers has no {mapped}, the class of the adapter's base model: pass the model itself.")
    if labels := labels_in(config, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}):
        kwargs = {"num_labels": labels, **kwargs}
    try:
        return cls.from_pretrained(name, revision=revision, **kwargs)
    except (OSError, ValueError) as error:
        where = "" if Path(name).exists() else ", which is not a folder here,"
        raise ValueError(f"The base model {name}{where} cannot be loaded: {' '.join(str(error).split())}") from error
