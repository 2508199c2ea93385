"""The tensors of a saved adapter's file, unread as far as its format allows, and what they tell of its modules."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters.files import belongs_to
from ..registry import methods
from .loading import read_tensors

WRAPPED = "base_model.model."  # before a module's name in every file of PEFT
BLOCK = 1 << 22  # values of a tensor that are in memory at once
LONGEST_NAME = 1000
# What PEFT's own methods, and LoLDU, call the tensor whose first axis is the rank.
RANKED = ("lora_A", "lora_embedding_A", "vera_lambda_d", "loldu_adapter.z")
UNRANKED = ("IA3", "OFT", "BOFT", "FOURIERFT", "LN_TUNING", "C3A", "ROAD", "TRAINABLE_TOKENS")


@dataclass(frozen=True)
class AdaptedModule:
    """One module of the base model that an adapter changes.

    Attributes:
        name: in the base model.
        rank: as the method counts it, from the tensors' shapes or the config; None where it has none (IA3, OFT...).
        parameters: number of values, frozen ones included.
        norm: Frobenius norm of the weight delta, or of all its float tensors together where `is_delta` is false.
        is_delta: a delta's norm follows from the file for LoRA's family, else only with the base model.
    """

    name: str
    rank: int | None
    parameters: int
    norm: float
    is_delta: bool


class Stored:
    """A tensor in a safetensors file, of which only what is asked for is read."""

    def __init__(self, file: Any, key: str) -> None:
        self.part = file.get_slice(key)
        self.shape = tuple(self.part.get_shape())
        self.ndim = len(self.shape)
        self.dtype: torch.dtype = (self.part[:0] if self.ndim else self.part[...]).dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.part[index]


AnyTensor = Stored | Tensor


@contextmanager
def opened(folder: Path, shown: str | os.PathLike) -> Iterator[dict[str, AnyTensor]]:
    """The tensors in a saved adapter's file, unread as far as its format allows; a pickle's are read as weights only.

    Raises:
        ValueError: the file cannot be read, also while it is used.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        yield checked_names(read_tensors(folder, shown), shown)
        return
    try:
        with safe_open(file, framework="pt") as content:
            try:
                state = {key: Stored(content, key) for key in content.keys()}  # noqa: SIM118
            except AttributeError as error:  # a dtype that torch does not have
                raise OSError(error) from error
            yield checked_names(state, shown)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The tensors of the adapter {shown} cannot be read: {error}") from error


def checked_names(state: dict[str, Any], shown: str | os.PathLike) -> dict[str, Any]:
    if (longest := max(map(len, state), default=0)) > LONGEST_NAME:
        raise ValueError(f"The tensors of the adapter {shown} cannot be read: a name has {longest:,} characters.")
    return state


def blocks(tensor: AnyTensor) -> Iterator[Tensor]:
    """The tensor in pieces of about `BLOCK` values along its first axis."""
    count = tensor.numel()
    if not tensor.ndim or 0 < count <= BLOCK:
        yield tensor[...]
    elif count:
        rows = max(1, BLOCK * tensor.shape[0] // count)
        for start in range(0, tensor.shape[0], rows):
            yield tensor[start : start + rows]


def survey(tensor: AnyTensor) -> tuple[float, int]:
    """Sum of the squares of a float tensor's values (0 for others), and how many are not finite."""
    square, bad = 0.0, 0
    if tensor.dtype.is_floating_point:
        for block in blocks(tensor):
            values = block.double()
            square += float(values.square().sum())
            if not math.isfinite(square):
                bad += int((~values.isfinite()).sum())
    return square, bad


def split(state: Mapping[str, AnyTensor], prefix: str) -> tuple[dict[str, dict[str, AnyTensor]], dict[str, AnyTensor]]:
    """The adapter's tensors by module and name (`lora_A`), and those that are of no module, or not the method's."""
    modules: dict[str, dict[str, AnyTensor]] = {}
    others = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(f".{prefix}")
        if belongs_to(key, prefix) and module.startswith(WRAPPED):
            modules.setdefault(module.removeprefix(WRAPPED), {})[(prefix + name).removesuffix(".weight")] = tensor
        else:
            others[key] = tensor
    return modules, others


def describe(
    name: str, tensors: Mapping[str, AnyTensor], settings: Mapping[str, Any], squares: Mapping[str, float]
) -> AdaptedModule:
    """A module as the file alone shows it; `squares` is by the tensors' keys in the file."""
    delta = _lora_norm(name, tensors, settings)
    keys = [f"{WRAPPED}{name}.{part}" for part in tensors]
    own = [squares.get(key, squares.get(f"{key}.weight", 0.0)) for key in keys]
    norm = math.sqrt(sum(own)) if delta is None else delta
    count = sum(tensor.numel() for tensor in tensors.values())
    return AdaptedModule(name, rank_of(tensors, settings, name), count, norm, delta is not None)


def rank_of(tensors: Mapping[str, AnyTensor], settings: Mapping[str, Any], name: str) -> int | None:
    """The rank in a module, as its method counts it.

    LoRA's is that of its factors, LoLDU's of its vectors; TriAdaptLoRA stores which of its ranks are at work. For the
    other methods of peftx it is the shortest of the last two axes of all matrices, or the longest of the vectors where
    there is no matrix; for PEFT's, the config's `r`, and for any with stacks of experts among its modules.
    """
    stacked = settings.get("target_parameters") and by_pattern(settings.get("rank_pattern"), name, settings.get("r"))
    if type(stacked) is int:
        return stacked
    for part in RANKED:
        if part in tensors and tensors[part].ndim:
            return tensors[part].shape[0]
    for part, tensor in tensors.items():
        if part.endswith(("_since", ".since")):
            return int((tensor[...] >= 0).sum())
    method = settings.get("peft_type")
    if method in PeftType.__members__ and method not in {info.peft_type.value for info in methods()}:
        r = by_pattern(settings.get("rank_pattern"), name, settings.get("r"))
        return r if type(r) is int and method not in UNRANKED else None
    matrices = [min(tensor.shape[-2:]) for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 1]
    return min(matrices) if matrices else max(vectors, default=None)


def mismatched(name: str, tensors: Mapping[str, AnyTensor]) -> list[str]:
    """A line for LoRA factors that are not for each other."""
    A, B = factors(tensors)
    if (A is None) != (B is None):
        return [f"{name}: {'lora_A' if A is None else 'lora_B'} is missing"]
    if A is None or B is None:
        return []
    if not (A.dtype.is_floating_point and B.dtype.is_floating_point):
        return [f"{name}: its factors are {A.dtype} and {B.dtype}, and no floats".replace("torch.", "")]
    ranks = (A.shape[0], B.shape[1]) if min(A.ndim, B.ndim) > 1 else (0, 0)
    grouped = B.ndim > 2 and ranks[1] and not ranks[0] % ranks[1]  # of a convolution, B sees r / groups channels
    if not ranks[0] or (ranks[0] != ranks[1] and not grouped):
        return [f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} have different ranks, or none"]
    return []


def factors(tensors: Mapping[str, AnyTensor]) -> tuple[AnyTensor | None, AnyTensor | None]:
    """LoRA's A and B, of a linear layer, a convolution or an embedding."""
    A, B = (tensors.get(f"lora_{x}", tensors.get(f"lora_embedding_{x}")) for x in "AB")
    return A, B


def _lora_norm(name: str, tensors: Mapping[str, AnyTensor], settings: Mapping[str, Any]) -> float | None:
    """||scale B A||, where a module's tensors are those of a LoRA whose scale the config says, and nothing else."""
    A, B = factors(tensors)
    if A is None or B is None or mismatched(name, tensors) or (A.ndim > 2 and A.shape[0] != B.shape[1]):
        return None
    if len(tensors) > 2 + ("lora_B.bias" in tensors) or settings.get("use_qalora") or settings.get("target_parameters"):
        return None
    r = A.shape[0]
    alpha = by_pattern(settings.get("alpha_pattern"), name, settings.get("lora_alpha", r))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        return None
    scale = alpha / (r**0.5 if settings.get("use_rslora") else r)
    V, U = (factor[...].double().flatten(1) for factor in (A, B))
    few = r * r <= len(U) * V.shape[1]  # else the delta's own entries are fewer
    square = ((U.T @ U) * (V @ V.T)).sum() if few else (U @ V).square().sum()
    return float(square.clamp(min=0).sqrt() * abs(scale))


def by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """The value of the pattern that matches a module's name, as PEFT looks it up.

    Patterns come from the file: one that Python cannot read, or could take for ever with (a repeated group), counts as
    no pattern.
    """
    usable = {
        key: value
        for key, value in (patterns.items() if isinstance(patterns, dict) else ())
        if len(key) <= LONGEST_NAME and not re.search(r"\)[*+{]", key) and len(re.findall(r"[*+{]", key)) <= 4
    }
    for key, value in usable.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error:
            continue
    return default
