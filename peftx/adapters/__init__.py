"""What every method stands on.

One adapter of one layer is a module, `Adapter`; what it sits on is a `Site`. Everything else that a method needs is
written once: the layer that holds the adapters, the tuner that puts layers into a model, the checks of files.
"""

from .adapter import Adapter
from .config import AdapterConfig, Number
from .inference import inference
from .layer import AdapterLayer
from .lora_experts import fast_experts
from .method import register
from .scale import rescale_adapter_scale
from .sites import ConvSite, EmbeddingSite, ExpertsSite, LinearSite, MixtureSite, Site
from .tuner import AdapterModel

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "ConvSite",
    "EmbeddingSite",
    "ExpertsSite",
    "LinearSite",
    "MixtureSite",
    "Number",
    "Site",
    "fast_experts",
    "inference",
    "register",
    "rescale_adapter_scale",
]
