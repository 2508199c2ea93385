from .bone import BoneConfig, BoneLinear
from .config import AdapterConfig
from .layer import AdapterLayer, accumulate
from .loldu import LoLDUConfig, LoLDULinear
from .model import AdapterModel

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "BoneConfig",
    "BoneLinear",
    "LoLDUConfig",
    "LoLDULinear",
    "accumulate",
]
