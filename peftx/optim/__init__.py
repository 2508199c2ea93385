"""Optimizers with small states: AdamW in block-wise 8 bits, with or without a low-rank projection of the gradient."""

from .adamw import LowRankAdamW
from .blockwise import dequantize, quantize
from .report import StateSummary, state_bytes, summarize
from .trainer import OptimizerFactory, create_optimizer, param_groups, trainer_kwargs

__all__ = [
    "LowRankAdamW",
    "OptimizerFactory",
    "StateSummary",
    "create_optimizer",
    "dequantize",
    "param_groups",
    "quantize",
    "state_bytes",
    "summarize",
    "trainer_kwargs",
]
