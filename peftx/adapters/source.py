"""What an adapter is being made for: the file, or the tensors, that a loader is about to put into it."""

from __future__ import annotations

import inspect
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_utils import str_to_torch_dtype

PREFIX = "base_model.model."  # of the names of a `PeftModel`'s layers, in files always
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


@dataclass
class Source:
    """Where a loader takes an adapter's tensors from.

    Attributes:
        folder: here, or a repository on the Hub.
        options: `subfolder` and what else `hf_hub_download` needs.
        names: of the files, in the order in which the loader looks for them.
        given: the tensors themselves, where there is no file.
        native: whether transformers loads it, which calls nothing of ours once an adapter is made.
        rename: what the loader makes of a key, without the prefix of PEFT's models.
    """

    folder: str
    options: dict[str, Any]
    names: tuple[str, ...] = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    given: Mapping[str, torch.Tensor] | None = None
    native: bool = False
    rename: Callable[[str], str] = str
    _path: Path | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        """The file, downloaded if need be.

        Raises:
            ValueError: there is none, or it is no regular file.
        """
        if self._path is None:
            self._path = self._find()
        return self._path

    def _find(self) -> Path:
        local = Path(self.folder, self.options.get("subfolder") or "")
        names = self.names
        missing: Exception | None = None
        if Path(self.folder).exists():
            names = names[:1] if self.native else names  # transformers looks for the other one on the Hub only
            for path in (local / name for name in names):
                if path.is_file():
                    return path
                if path.exists():  # opening a pipe would wait for ever
                    raise ValueError(f"{path} is not a regular file. Save or download the adapter again.")
        else:
            for name in names:
                try:
                    return Path(hf_hub_download(self.folder, name, **self.options))
                except EntryNotFoundError as error:
                    missing = error
        raise ValueError(
            f"{local} has a config but no weights ({names[0]}), nothing was loaded. Save or download the adapter "
            "again; to train a new one with this config, pass it to `get_peft_model`."
        ) from missing

    def header(self) -> dict[str, torch.Tensor]:
        """The tensors on the meta device: shapes and dtypes; errors as for `path`, or those of a broken file."""
        if self.given is not None:
            return self._named({key: tensor.to("meta") for key, tensor in checked(self.given).items()})
        read = read_header if self.path.suffix == ".safetensors" else read_pickle
        return self._named(read(self.path))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors with their values; errors as for `header`."""
        if self.given is not None:
            return self._named(self.given)
        return self._named(
            load_file(self.path) if self.path.suffix == ".safetensors" else read_pickle(self.path, "cpu")
        )

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # transformers may leave the prefix out; what the layers share is the tuner's own, without it
        own = {key for key in tensors if key.startswith("base_model.") and not key.startswith(PREFIX)}
        return {
            key if key in own else PREFIX + self.rename(key.removeprefix(PREFIX)): tensor
            for key, tensor in tensors.items()
        }


def loading(frame: FrameType | None, adapter_name: str) -> Source | None:
    """What a loader at work up the stack is about to put into the adapter; None where it is made to be trained."""
    while frame is not None:
        reader = LOADERS.get(frame.f_code)
        if reader is not None and frame.f_locals["adapter_name"] == adapter_name:
            return reader(frame.f_locals)
        frame = frame.f_back
    return None


def _of_peft(found: Mapping[str, Any]) -> Source:
    mapping = found["key_mapping"] or {}

    def rename(key: str) -> str:
        changed = (re.subn(pattern, replacement, key) for pattern, replacement in mapping.items())
        return next((new for new, count in changed if count), key)

    options = found.get("hf_hub_download_kwargs", found["kwargs"])
    return Source(str(found["model_id"]), _hub_options(options), rename=rename)


def _of_transformers(found: Mapping[str, Any]) -> Source:
    load, renamings = found["load_config"], [c for c in found["weight_conversions"] if isinstance(c, WeightRenaming)]
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    return Source(
        str(found["peft_model_id"]),
        _hub_options(load.download_kwargs),
        names=names[::-1] if load.use_safetensors is False else names,
        given=found["adapter_state_dict"],
        native=True,
        rename=lambda key: rename_source_key(key, renamings, [])[0],
    )


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}


# The loaders, by their code: no argument of theirs says to a tuner that what it makes will be overwritten.
LOADERS: dict[Any, Callable[[Mapping[str, Any]], Source]] = {
    inspect.unwrap(PeftModel.from_pretrained).__code__: _of_peft,
    inspect.unwrap(PeftModel.load_adapter).__code__: _of_peft,
    inspect.unwrap(PeftAdapterMixin.load_adapter).__code__: _of_transformers,
}


def read_header(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, on the meta device: shapes and dtypes.

    Raises:
        ValueError: it is truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: _like(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). Save or download the adapter again."
        ) from error


def _like(part: Any) -> torch.Tensor:
    dtype = str_to_torch_dtype.get(part.get_dtype(), torch.uint8)
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def read_pickle(path: Path, device: str = "meta") -> dict[str, torch.Tensor]:
    """The tensors of a file of `torch.save` by name; nothing in it is run.

    Raises:
        ValueError: it is truncated, or holds something else.
    """
    try:
        return checked(torch.load(path, map_location=device, weights_only=True))
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is no complete file of tensors by name ({str(error).partition(chr(10))[0]}). Save or download the "
            "adapter again."
        ) from error


def checked(tensors: Any) -> dict[str, torch.Tensor]:
    """`tensors`, or ValueError where it is something else than tensors by name."""
    if not isinstance(tensors, Mapping):
        raise ValueError(f"found {type(tensors).__name__}, expected tensors by name")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{key}: found {type(tensor).__name__}, expected a tensor")
    return dict(tensors)


def problems(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    known: Collection[str] = (),
) -> list[str]:
    """What is wrong with the tensors of a file, a line each.

    Args:
        expected: the model's, by their names in the file.
        found: the file's; on the meta device only shapes and dtypes are compared.
        known: further names that may be there.
    """
    lines = []
    for key, wanted in expected.items():
        tensor = found.get(key)
        if tensor is None:
            lines.append(f"{key}: missing, expected shape {tuple(wanted.shape)}")
        elif wanted.numel() and tensor.shape != wanted.shape:  # sharded tensors (ZeRO-3) have no elements here
            lines.append(f"{key}: found shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        elif tensor.is_floating_point() != wanted.is_floating_point():
            lines.append(f"{key}: found dtype {tensor.dtype}, expected {wanted.dtype}")
        elif tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            lines.append(f"{key}: found values that are not finite (NaN or infinite)")
    for key in found:
        if key not in expected and key not in known:
            lines.append(f"{key}: unexpected, the adapter has no such tensor")
    return lines


def refuse(peft_type: str, lines: list[str]) -> None:
    """Raises ValueError with the first of the problems, if there are any."""
    if lines:
        more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise ValueError(
            f"The {peft_type} adapter does not fit the model, nothing was loaded:\n  " + "\n  ".join(lines[:10]) + more
        )
