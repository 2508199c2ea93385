"""What a saved adapter is, read from its files: nothing in them is executed, and no base model is needed."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftType, load_peft_weights
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..registry import methods
from ..tuners.model import belongs_to
from .loading import load_adapter, read_config

WRAPPED = "base_model.model."  # before a module's name in every file of PEFT


@dataclass(frozen=True)
class AdaptedModule:
    """One module of the base model that an adapter changes.

    Attributes:
        name: in the base model.
        rank: of the delta, from the tensors' shapes; None where they do not say.
        parameters: number of values, frozen ones included.
        norm: Frobenius norm of the weight delta, or of all its float tensors together where `is_delta` is false.
        is_delta: a delta's norm follows from the file for LoRA's family, else only with the base model.
    """

    name: str
    rank: int | None
    parameters: int
    norm: float
    is_delta: bool


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` found.

    Attributes:
        path: as given.
        method: the peft type, e.g. `"LOLDU"`.
        known_by: `"peftx"`, `"PEFT"`, or `""` where neither knows the method.
        paper: of peftx's methods.
        base_model: the config's `base_model_name_or_path`.
        task_type: the config's.
        modules: of the adapter, in the file's order.
        others: names and numbers of values of the other tensors: modules trained in full, biases, Compacter's rule.
        parameters: number of values in the file.
        nbytes: of all tensors.
        dtypes: dtype to number of values.
        settings: the config as it stands in the file.
        problems: what is wrong with it, a line each; empty where it loads, as far as the file (or the base model, where
            it was loaded) can say.
        loaded: whether it was put on its base model.
    """

    path: str
    method: str
    known_by: str
    paper: str
    base_model: str | None
    task_type: str | None
    modules: tuple[AdaptedModule, ...]
    others: Mapping[str, int]
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    settings: Mapping[str, Any]
    problems: tuple[str, ...] = field(default=())
    loaded: bool = False


def inspect_adapter(path: str | os.PathLike, *, load: bool = False, base_model: Any = None) -> AdapterReport:
    """Describes a saved adapter of any method of peftx or PEFT.

    Args:
        path: folder, or id of a repository on the Hub.
        load: also put it on its base model, which shows whether it fits, and gives the norms of all deltas.
        base_model: a model, or where to find it, instead of the config's; implies `load`.

    Raises:
        ValueError: there is no adapter, or its files cannot be read at all. Everything else is in `problems`.
    """
    settings = read_settings(path)
    method = settings.get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{path}: the peft_type in {CONFIG_NAME} is {method!r}, not a name.")
    try:
        state = load_peft_weights(str(path), device="cpu")
    except Exception as error:
        raise ValueError(f"The tensors of the adapter {path} cannot be read: {error}") from error
    known = {info.peft_type.value: info for info in methods()}.get(method)
    problems = []
    config: Any = None
    try:
        config = read_config(path)
    except ValueError as error:
        problems.append(str(error))
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(method, f"{method.lower()}_")  # type: ignore[call-overload]
    by_module, others = split(state, prefix)
    if not by_module:
        problems.append(f"no tensor in the file is {method}'s: their names have no part that begins with {prefix!r}")
    found = [describe(name, tensors, settings) for name, tensors in by_module.items()]
    problems += unfinite(state)
    problems += [line for name, tensors in by_module.items() for line in mismatched(name, tensors)]
    loaded = False
    if (load or base_model is not None) and config is not None:
        try:
            model = load_adapter(path, base_model)
        except (ValueError, RuntimeError, TypeError) as error:
            problems.append(f"it does not load: {' '.join(str(error).split())}")
        else:
            loaded, found = True, [measured(module, model) for module in found]
    return AdapterReport(
        path=str(path),
        method=method,
        known_by="peftx" if known else "PEFT" if method in PeftType.__members__ else "",
        paper=known.paper if known else "",
        base_model=settings.get("base_model_name_or_path"),
        task_type=settings.get("task_type"),
        modules=tuple(found),
        others={key: tensor.numel() for key, tensor in others.items()},
        parameters=sum(tensor.numel() for tensor in state.values()),
        nbytes=sum(tensor.nbytes for tensor in state.values()),
        dtypes={str(d).removeprefix("torch."): n for d, n in _values_by_dtype(state).items()},
        settings=settings,
        problems=tuple(problems),
        loaded=loaded,
    )


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """adapter_config.json as it stands."""
    file = Path(path, CONFIG_NAME)
    try:
        file = file if file.is_file() else Path(hf_hub_download(str(path), CONFIG_NAME))
    except Exception as error:
        raise ValueError(f"{path} holds no {CONFIG_NAME}, and is no repository that can be reached.") from error
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {CONFIG_NAME} is not an object with named fields.")
    return settings


def split(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The adapter's tensors by module and name (`lora_A`), and those that are of no module, or not the method's."""
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(f".{prefix}")
        if belongs_to(key, prefix) and module.startswith(WRAPPED):
            modules.setdefault(module.removeprefix(WRAPPED), {})[(prefix + name).removesuffix(".weight")] = tensor
        else:
            others[key] = tensor
    return modules, others


def describe(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> AdaptedModule:
    """A module as the file alone shows it."""
    delta = _lora_norm(name, tensors, settings)
    floats = [tensor.double().norm() for tensor in tensors.values() if tensor.is_floating_point()]
    norm = delta if delta is not None else float(torch.tensor(floats).norm()) if floats else 0.0
    return AdaptedModule(name, rank_of(tensors), _count(tensors), norm, delta is not None)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank in a module, from the shapes of its tensors.

    LoRA's is that of its factors, TriAdaptLoRA stores which of its ranks are at work. Else it is the shortest of the
    last two axes of all matrices, or the longest of the vectors where there is no matrix (LoLDU).
    """
    A, _ = factors(tensors)
    if A is not None and A.ndim:
        return A.shape[0]
    for name, tensor in tensors.items():
        if name.endswith("_since"):
            return int((tensor >= 0).sum())
    matrices = [min(tensor.shape[-2:]) for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [len(tensor) for tensor in tensors.values() if tensor.ndim == 1]
    return min(matrices) if matrices else max(vectors, default=None)


def unfinite(state: Mapping[str, Tensor]) -> list[str]:
    """A line for every tensor with NaN or infinity."""
    bad = {key: int((~torch.isfinite(tensor)).sum()) for key, tensor in state.items() if tensor.is_floating_point()}
    return [f"{key}: {count} of {state[key].numel()} values are not finite" for key, count in bad.items() if count]


def mismatched(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """A line for LoRA factors that are not for each other."""
    A, B = factors(tensors)
    if (A is None) != (B is None):
        return [f"{name}: {'lora_A' if A is None else 'lora_B'} is missing"]
    if A is None or B is None:
        return []
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1]:
        return [f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} have different ranks"]
    return []


def factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """LoRA's A and B, of a linear layer, a convolution or an embedding."""
    A, B = (tensors.get(f"lora_{x}", tensors.get(f"lora_embedding_{x}")) for x in "AB")
    return A, B


def measured(module: AdaptedModule, model: Any) -> AdaptedModule:
    """A module with the norm of its delta in the loaded model, where it has one."""
    try:
        layer = model.base_model.model.get_submodule(module.name)
        norm = float(layer.get_delta_weight(model.active_adapters[0]).detach().double().norm())
    except (AttributeError, NotImplementedError, TypeError):
        return module
    return AdaptedModule(module.name, module.rank, module.parameters, norm, True)


def heat_map(report: AdapterReport, path: str | os.PathLike) -> None:
    """Draws the norms of all deltas, by layer and module, into a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure

    cells = {place(module.name): module.norm for module in report.modules}
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = torch.full((len(layers), len(kinds)), float("nan"))
    for (layer, kind), norm in cells.items():
        grid[layers.index(layer), kinds.index(kind)] = norm
    figure = Figure(figsize=(2.5 + 0.7 * len(kinds), 1.8 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) if layer >= 0 else "-" for layer in layers])
    axes.set_ylabel("layer")
    delta = all(module.is_delta for module in report.modules)
    figure.colorbar(image, ax=axes, label="norm of the weight delta" if delta else "norm of the adapter's tensors")
    axes.set_title(report.method)
    figure.savefig(path, format="png", dpi=120)


def place(name: str) -> tuple[int, str]:
    """Layer (-1: none) and kind of a module: `model.layers.3.self_attn.q_proj` is (3, "self_attn.q_proj")."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if match is None:
        return -1, name
    kind = name[match.end() :] or name[: match.start()]
    return int(match[1]), kind


def _lora_norm(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float | None:
    """||scale B A||, where a module's tensors are those of a LoRA whose scale the config says."""
    A, B = factors(tensors)
    if A is None or B is None or mismatched(name, tensors) or "lora_magnitude_vector" in tensors:
        return None
    r = A.shape[0]
    alpha = settings.get("lora_alpha", r)
    patterns = settings.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    if not isinstance(alpha, (int, float)):
        return None
    scale = alpha / (r**0.5 if settings.get("use_rslora") else r)
    A, B = A.double().flatten(1), B.double().flatten(1)
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt() * abs(scale))


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _values_by_dtype(state: Mapping[str, Tensor]) -> Counter[torch.dtype]:
    found: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        found[tensor.dtype] += tensor.numel()
    return found
