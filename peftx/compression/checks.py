"""Arguments and models that cannot be worked with, refused before anything begins."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

SEEDS = 2**63  # torch's generators; `set_seed` takes 2**32, numpy's


def check_count(name: str, value: Any, least: int = 1, *, none: bool = False, most: float = math.inf) -> None:
    """Raises:
    ValueError: `value` is no whole number from `least` up to, and without, `most`; None may do.
    """
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < most:
        below = "" if most == math.inf else f" and below {most}"
        raise ValueError(
            f"{name} must be a whole number, at least {least}{below}{', or None' * none}, got {shown(value)}"
        )


def check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """Raises:
    ValueError: `value` is no finite number, or not in its range.
    """
    said = f"above {above:g}" if above is not None else f"of at least {least:g}" if least is not None else ""
    try:
        number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        number = False
    low = -math.inf if least is None else least
    if not number or value < low or (above is not None and value <= above):
        raise ValueError(f"{name} must be a finite number {said}".rstrip() + f", got {shown(value)}")


def check_flag(name: str, value: Any, *, none: bool = False) -> None:
    """Raises:
    ValueError: `value` is neither True nor False; None may do.
    """
    if not isinstance(value, bool) and not (none and value is None):
        raise ValueError(f"{name} must be True or False{', or None' * none}, got {shown(value)}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises:
    ValueError: `value` is none of the known words.
    """
    if not isinstance(value, str) or value not in (known := tuple(known)):
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")


def check_modules(name: str, value: Any) -> None:
    """Raises:
    ValueError: `value` is neither a regular expression nor some names, nor None.
    """
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}={shown(value)} is no regular expression: {error}") from None
        if value:
            return
    elif value is None or (
        isinstance(value, list | tuple | set | frozenset) and all(isinstance(part, str) and part for part in value)
    ):
        return
    raise ValueError(
        f"{name} must be a regular expression, a list of names of modules or their ends, or None, got {shown(value)}"
    )


def check_file_name(name: str, value: Any, taken: Iterable[str] = ()) -> None:
    """Raises:
    ValueError: `value` is not the plain name of a file, or one of another file's, or None.
    """
    if value is None:
        return
    plain = isinstance(value, str) and value.isprintable() and value.strip(" .") != ""
    if not plain or {"/", "\\", ":"} & set(value) or Path(value).name != value:
        raise ValueError(f"{name} must be the name of a file, without a folder, or None, got {shown(value)}")
    if value.lower() in taken:
        raise ValueError(f"{name} must not be {value!r}, which training writes itself")


def check_callable(name: str, value: Any, *, none: bool = False) -> None:
    """Raises:
    ValueError: `value` cannot be called; None may do.
    """
    if not callable(value) and not (none and value is None):
        raise ValueError(f"{name} must be a function{', or None' * none}, got {shown(value)}")


def check_folder(name: str, value: Any) -> None:
    """Raises:
    ValueError: `value` is no path, or something there is no folder. None will do.
    """
    if value is None:
        return
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise ValueError(f"{name} must be the path of a folder, or None, got {shown(value)}")
    if Path(value).exists() and not Path(value).is_dir():
        raise ValueError(f"{name} must be a folder, and {value} is a file")


def shown(value: Any) -> str:
    """A value for an error: not too long."""
    try:
        text = repr(value)
    except Exception:  # whatever it is
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_compiled(model: nn.Module) -> bool:
    """By `torch.compile(model)` or `model.compile()`."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def check_whole(model: Any, purpose: str = "collect on it") -> None:
    """Raises:
    ValueError: no model; or one that is compiled, wrapped, split over processes, offloaded or without weights.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {shown(model)}")
    if is_compiled(model):
        raise ValueError(f"the model is compiled, which leaves hooks out: {purpose} before torch.compile")
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if wrapper := kinds & {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "PipelineModule"}:
        raise ValueError(f"the model is wrapped in {wrapper.pop()}: pass the model inside, model.module")
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" or type(module).__name__.startswith("FSDP"):
            raise ValueError(SPLIT.format(purpose=purpose))
        if getattr(getattr(module, "_hf_hook", None), "offload", False) or _inside(module):
            raise ValueError(
                f"parts of the model are offloaded (accelerate's cpu_offload, disk_offload or device_map), and their "
                f"weights are not there: load it whole to {purpose}, or take the hooks off first, "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter).__name__ == "DTensor":
            raise ValueError(SPLIT.format(purpose=purpose))
        if parameter.is_meta:
            raise ValueError(f"{name} has no values (meta device): load the model whole to {purpose}")


SPLIT = (
    "the model is split over processes (FSDP, tensor parallelism or DeepSpeed ZeRO-3): train without, under DDP or on "
    "one device, or {purpose} when it is whole again"
)


def _inside(module: nn.Module) -> bool:
    """Whether one of several hooks of accelerate offloads."""
    return any(getattr(hook, "offload", False) for hook in getattr(getattr(module, "_hf_hook", None), "hooks", ()))
