"""What `peftx train` and `peftx compare` do: settings in, a fine-tuned adapter or a comparison of methods out."""

import importlib
from typing import TYPE_CHECKING, Any

from .settings import CompareSettings, TrainSettings, parse, read_yaml

if TYPE_CHECKING:
    from .comparison import compare
    from .run import train

__all__ = ["CompareSettings", "TrainSettings", "compare", "parse", "read_yaml", "train"]

_NAMES = {"train": "run", "compare": "comparison"}  # these import the Trainer

if not TYPE_CHECKING:  # or a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name in _NAMES:
            return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
