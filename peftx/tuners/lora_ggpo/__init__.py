"""LoRA-GGPO and its successor LoRA-MGPO, arXiv:2502.14538: LoRA trained under perturbations of the merged weight."""

from .callback import GGPOCallback
from .config import LoRAGGPOConfig
from .model import LoRAGGPOModel
from .schedule import schedules, update_ggpo_stats

__all__ = ["GGPOCallback", "LoRAGGPOConfig", "LoRAGGPOModel", "schedules", "update_ggpo_stats"]
