"""What a saved adapter is, read from its files: nothing in them is executed, and no base model is needed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME

from ..registry import methods
from ..saved import read_config
from .loading import fetch_adapter, load_adapter
from .tensors import AdaptedModule, describe, mismatched, opened, split, survey

LARGEST_CONFIG = 10_000_000  # bytes; PEFT writes one to a few thousand
# Tensors of PEFT's methods that change no module: prompts, and what is put before attention.
WHOLE = ("prompt_embeddings", "adaption_prompt", "adaption_gate")


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


def inspect_adapter(
    path: str | os.PathLike,
    *,
    load: bool = False,
    base_model: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> AdapterReport:
    """Describes a saved adapter of any method of peftx or PEFT.

    A safetensors file is read in blocks, so that memory is bounded by the largest pair of LoRA factors in it, not by
    the file.

    Args:
        path: folder, or id of a repository on the Hub.
        load: also put it on its base model, which shows whether it fits, and gives the norms of all deltas.
        base_model: a model, or where to find it, instead of the config's; implies `load`.
        revision: branch, tag or commit of the repository; default: its main branch.
        subfolder: of the folder or the repository, where the adapter is.
        token: for the Hub; default: the one that `hf auth login` has stored.

    Raises:
        ValueError: there is no adapter, or its files cannot be read at all. Everything else is in `problems`.
    """
    folder = fetch_adapter(path, revision=revision, subfolder=subfolder, token=token)
    problems: list[str] = []
    settings = read_settings(folder / CONFIG_NAME, path, problems)
    method = settings.get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{path}: the peft_type in {CONFIG_NAME} is {method!r}, not a name.")
    named = {}
    for key in ("base_model_name_or_path", "task_type"):
        named[key] = settings.get(key)
        if not isinstance(named[key], str | None):
            problems.append(f"{key} in {CONFIG_NAME} is {named[key]!r}, not a name")
            named[key] = None
    known = {info.peft_type.value: info for info in methods()}.get(method)
    config: Any = None
    try:
        config = read_config(folder, shown=path)
    except ValueError as error:
        problems.append(str(error))
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(method, f"{method.lower()}_")  # type: ignore[call-overload]
    with opened(folder, path) as state:
        by_module, others = split(state, prefix)
        if not by_module and not any(key.endswith(WHOLE) for key in others):
            problems.append(f"no tensor in the file is {method}'s: no part of a name begins with {prefix!r}")
        problems += [line for name, tensors in by_module.items() for line in mismatched(name, tensors)]
        squares = {}
        for key, tensor in state.items():
            squares[key], bad = survey(tensor)
            problems += [f"{key}: {bad} of {tensor.numel()} values are not finite"] if bad else []
        found = [describe(name, tensors, settings, squares) for name, tensors in by_module.items()]
        dtypes: Counter[str] = Counter()
        for tensor in state.values():
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        facts: dict[str, Any] = {
            "others": {key: tensor.numel() for key, tensor in others.items()},
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "nbytes": sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values()),
        }
    loaded = False
    if (load or base_model is not None) and config is not None:
        try:
            model = load_adapter(folder, base_model, token=token)
        except Exception as error:  # of PEFT, of transformers, of files that nobody has checked
            problems.append(f"it does not load: {' '.join(str(error).split())}")
        else:
            loaded, found = True, [measured(module, model) for module in found]
    return AdapterReport(
        path=str(path),
        method=method,
        known_by="peftx" if known else "PEFT" if method in PeftType.__members__ else "",
        paper=known.paper if known else "",
        base_model=named["base_model_name_or_path"],
        task_type=named["task_type"],
        modules=tuple(found),
        dtypes=dict(dtypes),
        settings=settings,
        problems=tuple(problems),
        loaded=loaded,
        **facts,
    )


def read_settings(file: Path, shown: str | os.PathLike, problems: list[str]) -> dict[str, Any]:
    """adapter_config.json as it stands; fields that stand in it twice are added to `problems`."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        problems.extend(f"{key!r} stands in {CONFIG_NAME} more than once: the last one counts" for key in twice)
        return dict(pairs)

    if (size := file.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{shown}: {CONFIG_NAME} has {size:,} bytes, and cannot be the config of an adapter.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=fields)
    except ValueError as error:
        raise ValueError(f"{shown}: {CONFIG_NAME} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{shown}: {CONFIG_NAME} is nested too deeply to be the config of an adapter.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{shown}: {CONFIG_NAME} is not an object with named fields.")
    return settings


def measured(module: AdaptedModule, model: Any) -> AdaptedModule:
    """A module with the norm of its delta in the loaded model, where it has one."""
    try:
        layer = model.base_model.model.get_submodule(module.name)
        norm = float(layer.get_delta_weight(model.active_adapters[0]).detach().double().norm())
    except (AttributeError, NotImplementedError, TypeError, RuntimeError):
        return module
    return AdaptedModule(module.name, module.rank, module.parameters, norm, True)
