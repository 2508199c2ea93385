from .bone import BoneConfig, BoneLinear
from .compacter import CompacterConfig, CompacterLinear
from .config import AdapterConfig
from .flora import FloraConfig, FloraLinear
from .layer import AdapterLayer, accumulate
from .loldu import LoLDUConfig, LoLDULinear
from .model import AdapterModel

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "BoneConfig",
    "BoneLinear",
    "CompacterConfig",
    "CompacterLinear",
    "FloraConfig",
    "FloraLinear",
    "LoLDUConfig",
    "LoLDULinear",
    "accumulate",
]
