"""More fine-tuning methods for Hugging Face PEFT.

`import peftx` registers them; after that `peft.get_peft_model(model, peftx.BoneConfig(...))` and everything else that
PEFT, transformers and accelerate do with an adapter works as for PEFT's own methods. Nothing in PEFT is patched.
"""

from .registry import MethodInfo, methods, register
from .tuners import (
    AdapterConfig,
    AdapterLayer,
    AdapterModel,
    ALLoRAConfig,
    BoneConfig,
    CompacterConfig,
    FloraConfig,
    LoLDUConfig,
)
from .tuners.triadaptlora import TriAdaptCallback, TriAdaptLoRAConfig

__version__ = "0.1.0"

__all__ = [
    "ALLoRAConfig",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "BoneConfig",
    "CompacterConfig",
    "FloraConfig",
    "LoLDUConfig",
    "MethodInfo",
    "TriAdaptCallback",
    "TriAdaptLoRAConfig",
    "methods",
    "register",
]
