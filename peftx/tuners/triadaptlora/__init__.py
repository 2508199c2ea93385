"""TriAdaptLoRA, arXiv:2501.08008: LoRA with a triangular core, whose rank grows during training."""

from ...adapters import register
from .adapter import TriAdaptLoRA
from .callback import TriAdaptCallback
from .config import TriAdaptLoRAConfig
from .growth import GrowingModel, update_and_grow
from .plot import plot_ranks

__all__ = ["TriAdaptCallback", "TriAdaptLoRA", "TriAdaptLoRAConfig", "plot_ranks", "update_and_grow"]

register(
    "triadaptlora",
    config=TriAdaptLoRAConfig,
    paper="arXiv:2501.08008",
    tuner=GrowingModel,
    lora_export="exact",
    callback=TriAdaptCallback,
    rank_fields=("init_r", "target_r"),
    tiny={"init_r": 2, "target_r": 4, "growth_size": 1},
    variants={"triadaptlora": {}, "triadaptlora-zero-core": {"init": "zero_core"}},
)(TriAdaptLoRA)
