"""Federated LoRA: FedSVD (arXiv:2505.12805) and the methods it is compared with, on Flower, with Opacus for privacy.

The mathematics needs neither of the two: `client_state`, `load_global` and `global_state` between a model and what
is sent, `average_B` and the other updates of a server, `refactorize`. `FedSVDStrategy`, `make_client_app` and
`make_server_app` are the same on Flower, `run_in_process` runs them in this process, `DPSpec` says how private,
`train_local` trains one client:

    pip install 'peftx[federated]'
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..tuners.fedsvd import factored_svd, is_due, refactorize, refactorize_model
from .state import (
    average_AB,
    average_B,
    client_state,
    fedex_lora,
    flexlora,
    flora,
    fold,
    global_state,
    load_global,
    refactorize_state,
)

if TYPE_CHECKING:
    from .accounting import BudgetExceeded, epsilon_spent
    from .apps import make_client_app, make_server_app
    from .checks import AuditEntry, Limits, admit
    from .grid import InProcessGrid, run_in_process
    from .local import LocalResult, LocalSettings, train_local
    from .partition import dirichlet_partition
    from .privacy import DPSpec
    from .strategy import FedSVDStrategy

__all__ = [
    "AuditEntry",
    "BudgetExceeded",
    "DPSpec",
    "FedSVDStrategy",
    "InProcessGrid",
    "Limits",
    "LocalResult",
    "LocalSettings",
    "admit",
    "average_AB",
    "average_B",
    "client_state",
    "dirichlet_partition",
    "epsilon_spent",
    "factored_svd",
    "fedex_lora",
    "flexlora",
    "flora",
    "fold",
    "global_state",
    "is_due",
    "load_global",
    "make_client_app",
    "make_server_app",
    "refactorize",
    "refactorize_model",
    "refactorize_state",
    "run_in_process",
    "train_local",
]

_NAMES = {  # imported when they are first used: most need Flower or Opacus
    "AuditEntry": "checks",
    "BudgetExceeded": "accounting",
    "DPSpec": "privacy",
    "FedSVDStrategy": "strategy",
    "InProcessGrid": "grid",
    "Limits": "checks",
    "LocalResult": "local",
    "LocalSettings": "local",
    "admit": "checks",
    "dirichlet_partition": "partition",
    "epsilon_spent": "accounting",
    "make_client_app": "apps",
    "make_server_app": "apps",
    "run_in_process": "grid",
    "train_local": "local",
}

if not TYPE_CHECKING:  # or a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name not in _NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in ("flwr", "opacus"):
                raise
            raise ImportError(f"{__name__}.{name} needs {missing}: pip install 'peftx[federated]'") from error
