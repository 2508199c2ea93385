from .allora import ALLoRAConfig
from .bone import BoneConfig, BoneLinear
from .compacter import CompacterConfig, CompacterLinear
from .config import AdapterConfig
from .fedsvd import FedSVDConfig
from .flora import FloraConfig, FloraLinear
from .gradnormlorp import GradNormLoRPConfig
from .layer import AdapterLayer, accumulate
from .loldu import LoLDUConfig, LoLDULinear
from .lora_ggpo import GGPOCallback, LoRAGGPOConfig
from .model import AdapterModel
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
