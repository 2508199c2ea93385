"""Adapters on their way to others: export to plain LoRA."""

from .export import export_lora

__all__ = ["export_lora"]
