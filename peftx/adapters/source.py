"""The file of an adapter that a config was read from: what is in it, before anything is made for it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass
class Source:
    """Where a config was read from; the adapter's weights lie beside it.

    Attributes:
        folder: here, or a repository on the Hub.
        options: `subfolder` and what else `hf_hub_download` needs.
    """

    folder: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> Path | None:
        """The folder, where it is one of this machine."""
        folder = Path(self.folder)
        return folder / (self.options.get("subfolder") or "") if folder.exists() else None

    def check(self) -> None:
        """Raises ValueError where the weights of a local folder are no whole file, whatever else they are."""
        if self.local is None:
            return
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            path = self.local / name
            if path.exists() and not path.is_file():  # opening a pipe would wait for ever
                raise ValueError(f"{path} is not a regular file. Save or download the adapter again.")
        weights = self.local / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            read_header(weights)

    def weights(self) -> Path | None:
        """The safetensors file; None where the adapter has another kind, or cannot be reached.

        Raises:
            ValueError: a local folder without weights.
        """
        if self.local is not None:
            path = self.local / SAFETENSORS_WEIGHTS_NAME
            if path.is_file():
                return path
            if (self.local / WEIGHTS_NAME).is_file():
                return None
            raise ValueError(
                f"{self.local} has a config but no weights ({SAFETENSORS_WEIGHTS_NAME}), nothing was loaded. Save or "
                "download the adapter again; to train a new one with this config, pass it to `get_peft_model`."
            )
        try:
            return Path(hf_hub_download(self.folder, SAFETENSORS_WEIGHTS_NAME, **self.options))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
            return None  # PEFT or transformers, which load it next, say why


def read_header(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, on the meta device: shapes and dtypes.

    Raises:
        ValueError: it is truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
                for key, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). Save or download the adapter again."
        ) from error


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
