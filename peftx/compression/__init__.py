"""Low-rank compression of fine-tuned models, weighted by what their training showed (FWSVD, arXiv:2207.00112).

    statistics = collect(model, dataset, collator)         # or a FisherCallback during training
    model, report = compress(model, statistics, keep=0.6)  # an ordinary, smaller model
    model.save_pretrained(folder)                          # which AutoModel*.from_pretrained(folder) loads

Loading needs `import peftx`, and stops without it; the card that `save_pretrained` and `push_to_hub` write says so.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .compress import compress
from .experts import LowRankExperts
from .factorize import METHODS, SIDES, Factors, factorize
from .layers import target_layers
from .linear import LowRankLinear
from .loader import LowRankConfig, materialize
from .ranks import rank_for
from .recover import evaluate, recover
from .report import LayerReport, Report, card, plot
from .statistics import LayerStatistics, Statistics

if TYPE_CHECKING:
    from .callback import FisherCallback
    from .collection import collect

__all__ = [
    "METHODS",
    "SIDES",
    "Factors",
    "FisherCallback",
    "LayerReport",
    "LayerStatistics",
    "LowRankConfig",
    "LowRankExperts",
    "LowRankLinear",
    "Report",
    "Statistics",
    "card",
    "collect",
    "compress",
    "evaluate",
    "factorize",
    "materialize",
    "plot",
    "rank_for",
    "recover",
    "target_layers",
]

# `import peftx` comes through here for the loader; these need transformers' Trainer, which takes a while.
_LATER = {"FisherCallback": "callback", "collect": "collection"}

if not TYPE_CHECKING:  # or a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
