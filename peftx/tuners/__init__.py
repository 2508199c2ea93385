from ..adapters.config import AdapterConfig
from ..adapters.layer import AdapterLayer, accumulate
from ..adapters.tuner import AdapterModel
from .allora import ALLoRAConfig
from .bone import BoneConfig, BoneLinear
from .compacter import CompacterConfig, CompacterLinear
from .fedsvd import FedSVDConfig
from .flora import FloraConfig, FloraLinear
from .gradnormlorp import GradNormLoRPConfig
from .loldu import LoLDUConfig, LoLDULinear
from .lora_ggpo import GGPOCallback, LoRAGGPOConfig
from .triadaptlora import TriAdaptCallback, TriAdaptLoRAConfig, TriAdaptLoRALinear

__all__ = [
    "ALLoRAConfig",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "BoneConfig",
    "BoneLinear",
    "CompacterConfig",
    "CompacterLinear",
    "FedSVDConfig",
    "FloraConfig",
    "FloraLinear",
    "GGPOCallback",
    "GradNormLoRPConfig",
    "LoLDUConfig",
    "LoLDULinear",
    "LoRAGGPOConfig",
    "TriAdaptCallback",
    "TriAdaptLoRAConfig",
    "TriAdaptLoRALinear",
    "accumulate",
]
