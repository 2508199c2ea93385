"""Saved adapters, read from a folder or from the Hub."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel, PeftType, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from ..cards.adapter import labels_in, shapes_in
from ..saved import class_names, read_config
from ..utils import AUTO_CLASSES

NAME_IT = "name it by `base_model` (--base-model), or load the adapter on a model of your own and pass that"


def fetch_adapter(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of a saved adapter on this machine: `path` itself, or the cache's after a download.

    Args:
        path: folder, or id of a repository on the Hub.
        revision: branch, tag or commit of the repository; default: its main branch.
        subfolder: of the folder or the repository, where the adapter is.
        token: for the Hub; default: the one that `hf auth login` has stored.

    Raises:
        ValueError: there is no adapter, with the reason: no such repository, no such revision, no right to read it, no
            connection, no config or weights in it; or a revision of a folder is asked for.
    """
    local = Path(path)
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder here, which has no revision {revision!r}: leave `revision` out.")
        folder = local / (subfolder or "")
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):  # a pipe would be waited for
            if (folder / name).exists() and not (folder / name).is_file():
                raise ValueError(f"{folder} holds no adapter that can be read: no {name} in it that is a file.")
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} holds no adapter that can be read: no {CONFIG_NAME} in it.")
        if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise ValueError(f"{folder} holds no adapter that can be read: no {SAFETENSORS_WEIGHTS_NAME} in it.")
        return folder

    def download(name: str, revision: str | None) -> Path:
        try:
            return Path(hf_hub_download(str(path), name, subfolder=subfolder, revision=revision, token=token))
        except LocalEntryNotFoundError:  # also one of the next, but what is on the Hub is not known
            raise
        except EntryNotFoundError:
            if name == SAFETENSORS_WEIGHTS_NAME:
                return download(WEIGHTS_NAME, revision)
            raise

    try:
        config = download(CONFIG_NAME, revision)
        commit = config.parents[len(Path(subfolder or "").parts)].name
        return download(SAFETENSORS_WEIGHTS_NAME, commit).parent
    except Exception as error:  # of the Hub, of the connection, of the disk
        where = f"{path}/{subfolder}" if subfolder else path
        reason = _reason(error, revision)
        raise ValueError(f"{where} holds no adapter that can be read: {reason}.") from error


def _reason(error: BaseException, revision: str | None) -> str:
    """Why nothing came from the Hub, in a few words."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return _reason(error.__cause__, revision)
    reasons: list[tuple[type[BaseException], str]] = [
        (HFValidationError, "it is no folder here, and cannot be the name of a repository"),
        (GatedRepoError, "its owner grants access to it on its page, and yours is missing"),
        (
            RepositoryNotFoundError,
            "it is no folder here, and no repository on the Hub that you may read (a private one needs "
            "`hf auth login`, or HF_TOKEN)",
        ),
        (RevisionNotFoundError, f"it has no revision {revision!r}"),
        (LocalEntryNotFoundError, "it is no folder here, not in the cache, and the Hub cannot be reached"),
        (EntryNotFoundError, f"it lacks {CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME}"),
    ]
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the Hub refuses your token"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def read_adapter(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and tensors, on the CPU, of a saved adapter; no base model is needed.

    Args:
        path: folder, or id of a repository on the Hub.
        revision, subfolder, token: as for `fetch_adapter`.

    Raises:
        ValueError: there is no adapter, or its config or tensors cannot be read, or neither PEFT nor peftx knows its
            method.
    """
    folder = fetch_adapter(path, revision=revision, subfolder=subfolder, token=token)
    return read_config(folder, shown=path), read_tensors(folder, shown=path)


def read_tensors(folder: str | os.PathLike, shown: str | os.PathLike | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter in a folder, on the CPU; errors as for `read_adapter`."""
    try:
        return load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        text = str(error) or type(error).__name__
        raise ValueError(f"The tensors of the adapter {shown or folder} cannot be read: {text}") from error


def load_adapter(
    path: str | os.PathLike,
    base_model: Any = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> PeftModel:
    """A saved adapter on its base model.

    As `peft.AutoPeftModel`, but for every task in one function; the number of a classifier's labels is found in the
    adapter (and their names, where `peftx train` wrote it), and the base model can be given.

    Args:
        path: folder, or id of a repository on the Hub.
        base_model: a model, or where to find it; default: where the adapter's config says.
        revision, subfolder: of the adapter, as for `fetch_adapter`. The base model's revision is in the config.
        token: for the Hub, for adapter and base model.
        kwargs: for `from_pretrained` of the base model, e.g. `dtype`.

    Raises:
        ValueError: as for `read_adapter`, or the base model cannot be found, or the adapter does not fit it.
        NotImplementedError: the method cannot do what the config asks for.
    """
    folder = fetch_adapter(path, revision=revision, subfolder=subfolder, token=token)
    config = read_config(folder, shown=path)
    if not isinstance(base_model, nn.Module):
        if not {"num_labels", "id2label"} & kwargs.keys():
            kwargs |= classes_in(folder, config, read_tensors(folder, shown=path))
        base_model = load_base(config, base_model, **({} if token is None else {"token": token}), **kwargs)
    try:
        if config.peft_type == PeftType.LORA:  # whose integers PEFT would take, and say nothing
            dtypes = {key: dtype for key, (_, dtype) in shapes_in(Path(folder, SAFETENSORS_WEIGHTS_NAME)).items()}
            odd = [key for key in dtypes if ".lora_" in key and not dtypes[key].startswith(("F", "BF"))]
            if odd:
                raise ValueError(f"The adapter {path} cannot be put on its base model: {odd[0]} is of {dtypes[odd[0]]}")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # which would stay as they start
            return PeftModel.from_pretrained(base_model, str(folder), config=config)
    except (ValueError, NotImplementedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT makes of a config and of tensors that nobody has checked
        told = f"{type(error).__name__}: {' '.join(str(error).split())}".removeprefix("UserWarning: ")
        raise ValueError(f"The adapter {path} cannot be put on its base model: {told}") from error


def classes_in(folder: Path, config: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What `from_pretrained` of the base model has to know of the labels of a classifier whose head was saved.

    The base model may have a head for other labels, which the saved one replaces: see `check_replaced`.
    """
    count = labels_in(config, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()})
    if not count:
        return {}
    if len(names := class_names(folder)) == count:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    else:
        labels = {"num_labels": count}
    return {**labels, "ignore_mismatched_sizes": True}


def check_replaced(name: str, config: Any, report: Mapping[str, Any]) -> None:
    """Raises ValueError where weights of the base model that the adapter does not bring are of another size."""
    keys = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
    if left := [key for key in keys if {*key.split(".")}.isdisjoint(config.modules_to_save or ())]:
        raise ValueError(f"The base model {name} cannot be loaded: {left[0]} is of another size than its config says")


def load_base(config: Any, name: str | os.PathLike | None, **kwargs: Any) -> nn.Module:
    """The base model of an adapter; see `load_adapter`."""
    revision = config.revision if name is None else None
    name = str(name or config.base_model_name_or_path or "")
    if not name:
        raise ValueError(f"The adapter does not say what its base model is: {NAME_IT}.")
    mapped = (config.auto_mapping or {}).get("base_model_class")
    cls = getattr(transformers, AUTO_CLASSES.get(config.task_type, mapped or "AutoModel"), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ValueError(f"transformers has no {mapped}, the class of the adapter's base model: pass the model itself.")
    try:
        model, report = cls.from_pretrained(name, revision=revision, output_loading_info=True, **kwargs)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        where = "" if Path(name).exists() else ", which is not a folder here,"
        raise ValueError(f"The base model {name}{where} cannot be loaded: {' '.join(str(error).split())}") from error
    check_replaced(name, config, report)
    return model
