"""Finished layers as files, so that factors need no memory beside the model, and an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from .factorize import Factors
from .statistics import write

logger = logging.get_logger(__name__)

FORMAT = "peftx.factors.1"
STEP = 2**22  # entries that are read at a time


class Shelf:
    """Factors of layers in a folder, one safetensors file each, which says what they were made of.

    Args:
        folder: where they are; made if need be.
        kept: whether they outlive this run, so that it matters what they were made of.
    """

    def __init__(self, folder: Path, kept: bool) -> None:
        self.folder, self.kept = folder, kept
        self._digests: dict[int, tuple[Tensor, bytes]] = {}  # of tensors that layers share

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def made_of(self, weight: Tensor, settings: Mapping[str, Any], parts: Iterable[Tensor]) -> str:
        """What a layer's factors follow from; "" where nobody will ask."""
        if not self.kept:
            return ""
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        digest.update(_digest(weight))
        for part in parts:
            if id(part) not in self._digests:
                self._digests = {id(part): (part, _digest(part))}  # the last one, held so that its id stays its own
            digest.update(self._digests[id(part)][1])
        return digest.hexdigest()

    def holds(self, name: str, rank: int, origin: str) -> bool:
        """Whether a whole file of these factors is there.

        Raises:
            ValueError: a file of that name is something else.
        """
        path = self.path(name)
        if not path.exists():
            return False
        try:
            if not path.is_file():
                raise ValueError("not a file")
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format {metadata.get('format')!r} instead of {FORMAT!r}")
                whole = set(file.keys()) == {"up", "down", "values"} and file.get_slice("down").get_shape()[0] == rank
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path} holds no factors of peftx ({error}): remove it, or name another folder"
            ) from error
        if not whole or metadata.get("origin") != origin:
            logger.warning(f"{path} is of another model or other settings, and is made again")
            return False
        return True

    def put(self, name: str, factors: Factors, origin: str) -> None:
        tensors = {"up": factors.up, "down": factors.down, "values": factors.values}
        facts = {"format": FORMAT, "layer": name, "origin": origin}
        write(tensors, self.path(name), facts | {"error": repr(factors.error), "energy": repr(factors.energy)})

    def values(self, name: str) -> Tensor:
        """Singular values of the weighted weight."""
        with safe_open(self.path(name), "pt") as file:
            return file.get_tensor("values").clone()

    def get(self, name: str) -> Factors:
        with safe_open(self.path(name), "pt") as file:
            metadata = file.metadata()
            up, down, values = (file.get_tensor(key) for key in ("up", "down", "values"))
        return Factors(up, down, float(metadata["error"]), values, float(metadata["energy"]))


@contextmanager
def shelf(folder: Any, needed: int) -> Iterator[Shelf]:
    """A `Shelf` in `folder`, or in a temporary folder that goes afterwards.

    Raises:
        ValueError: it is short of space.
    """
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        _check_space(path, needed - there)
        yield Shelf(path, True)
        return
    with tempfile.TemporaryDirectory(prefix="peftx-") as made:
        _check_space(Path(made), needed)
        yield Shelf(Path(made), False)


def _check_space(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB left, and finished layers need {needed / 1e9:.1f}: name a folder with "
            "more space, folder="
        )


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    rows = max(1, STEP // max(1, tensor[0].numel()))
    for some in tensor.detach().split(rows):
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy())
    return digest.digest()
