"""More fine-tuning methods for Hugging Face PEFT.

`import peftx` registers them; after that `peft.get_peft_model(model, peftx.BoneConfig(...))` and everything else that
PEFT, transformers and accelerate do with an adapter works as for PEFT's own methods. Nothing in PEFT is patched.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import command as command  # the first one: before PEFT is imported
from . import compression as compression  # registers the loader of compressed models
from .adapters import (
    Adapter,
    AdapterConfig,
    AdapterLayer,
    AdapterModel,
    Site,
    fast_experts,
    inference,
    register,
    rescale_adapter_scale,
)
from .registry import MethodInfo, methods
from .tuners import (
    ALLoRAConfig,
    BoneConfig,
    CompacterConfig,
    FedSVDConfig,
    FloraConfig,
    GGPOCallback,
    GradNormLoRPConfig,
    LoLDUConfig,
    LoRAGGPOConfig,
    TriAdaptCallback,
    TriAdaptLoRAConfig,
    plot_ranks,
)

if TYPE_CHECKING:  # what is imported when it is first used; `__getattr__` is hidden, or a misspelt name would be Any
    from . import federated as federated
    from . import hub as hub
    from . import optim as optim
    from . import pruning as pruning
    from . import train as train
    from .compression import FisherCallback
    from .hub import export_gguf, export_lora, hotswap
    from .pruning import DonodCallback

__version__ = "0.2.0.dev0"

__all__ = [
    "ALLoRAConfig",
    "Adapter",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "BoneConfig",
    "CompacterConfig",
    "DonodCallback",
    "FedSVDConfig",
    "FisherCallback",
    "FloraConfig",
    "GGPOCallback",
    "GradNormLoRPConfig",
    "LoLDUConfig",
    "LoRAGGPOConfig",
    "MethodInfo",
    "Site",
    "TriAdaptCallback",
    "TriAdaptLoRAConfig",
    "export_gguf",
    "export_lora",
    "fast_experts",
    "hotswap",
    "inference",
    "methods",
    "plot_ranks",
    "register",
    "rescale_adapter_scale",
]

_PACKAGES = ("federated", "hub", "optim", "pruning", "train")  # imported when they are first used,
# and what of theirs is public here
_NAMES = {"DonodCallback": "pruning", "FisherCallback": "compression"}
_NAMES |= dict.fromkeys(("export_gguf", "export_lora", "hotswap"), "hub")


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _NAMES:
            return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
