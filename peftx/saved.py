"""The config of a saved adapter, which anybody may have written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

METRICS = "metrics.json"  # of `peftx train`, beside the adapter

# What PEFT takes unchecked from a config; of a LoRA's numbers more is checked where they are used
KINDS: dict[tuple[str, ...], tuple[type, ...]] = {
    ("base_model_name_or_path", "task_type", "revision"): (str,),
    ("auto_mapping", "rank_pattern", "alpha_pattern"): (dict,),
    ("target_modules", "exclude_modules", "modules_to_save"): (str, list, set, tuple),
    ("inference_mode", "use_rslora", "use_dora", "fan_in_fan_out"): (bool,),
}


def read_config(folder: str | os.PathLike, shown: str | os.PathLike | None = None) -> Any:
    """The config of a saved adapter in a folder, called `shown` in errors.

    Raises:
        ValueError: there is none, or it cannot be read, or neither PEFT nor peftx knows its method.
    """
    shown = folder if shown is None else shown
    if not Path(folder, CONFIG_NAME).is_file():
        raise ValueError(f"{shown} holds no adapter that can be read: no {CONFIG_NAME} in it.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(
            f"The adapter {shown} is of the type {error}, which neither PEFT {peft.__version__} nor peftx knows. "
            "A method of your own is known once the module that registers it is imported."
        ) from None
    except Exception as error:  # whatever the config classes of PEFT make of values that nobody has checked
        raise ValueError(f"{shown} holds no adapter that can be read: {error}") from error
    if config.peft_type is None:
        raise ValueError(f"{shown} holds no adapter that can be read: its {CONFIG_NAME} names no peft_type.")
    for name, kinds in ((name, kinds) for names, kinds in KINDS.items() for name in names):
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{shown} holds no adapter that can be read: {name} in {CONFIG_NAME} is {value!r}.")
    return config


def check_is_model(name: str | os.PathLike, way: str) -> None:
    """Raises ValueError, with the way out, where the name of a model is the folder of an adapter and of nothing else.

    Args:
        way: what to do, with `{adapter}` and `{base}` in it.
    """
    folder = Path(name)
    if (folder / CONFIG_NAME).is_file() and not (folder / MODEL_CONFIG_NAME).exists():
        base = read_config(folder).base_model_name_or_path or "its base model"
        raise ValueError(f"{name} is an adapter of {base}, and no model: {way.format(adapter=name, base=base)}")


def class_names(folder: str | os.PathLike) -> list[str]:
    """The names of the classes, from 0, as `peftx train` has left them beside a classifier's adapter; else none."""
    path = Path(folder, METRICS)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["labels"] if path.is_file() else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names if len({*names}) == len(names) else []
