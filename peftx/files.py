"""Files of adapters in folders, read as what they are: written by somebody else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from peft.utils import CONFIG_NAME


def read_config(folder: str | os.PathLike, shown: str | os.PathLike | None = None) -> Any:
    """The config of a saved adapter in a folder, called `shown` in errors.

    Raises:
        ValueError: there is none, or it cannot be read, or neither PEFT nor peftx knows its method.
    """
    shown = folder if shown is None else shown
    if not Path(folder, CONFIG_NAME).is_file():
        raise ValueError(f"{shown} holds no adapter that can be read: no {CONFIG_NAME} in it.")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(
            f"The adapter {shown} is of the type {error}, which neither PEFT {peft.__version__} nor peftx knows."
        ) from None
    except Exception as error:  # whatever the config classes of PEFT make of values that nobody has checked
        raise ValueError(f"{shown} holds no adapter that can be read: {error}") from error
