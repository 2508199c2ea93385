"""The methods, one file or folder each, under PEFT's name for them. Importing registers them."""

from .allora import ALLoRAConfig
from .bone import BoneConfig
from .compacter import CompacterConfig
from .fedsvd import FedSVDConfig
from .flora import FloraConfig
from .gradnormlorp import GradNormLoRPConfig
from .loldu import LoLDUConfig
from .lora_ggpo import GGPOCallback, LoRAGGPOConfig
from .triadaptlora import TriAdaptCallback, TriAdaptLoRAConfig, plot_ranks

__all__ = [
    "ALLoRAConfig",
    "BoneConfig",
    "CompacterConfig",
    "FedSVDConfig",
    "FloraConfig",
    "GGPOCallback",
    "GradNormLoRPConfig",
    "LoLDUConfig",
    "LoRAGGPOConfig",
    "TriAdaptCallback",
    "TriAdaptLoRAConfig",
    "plot_ranks",
]
