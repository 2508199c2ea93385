"""Adapters on their way to others: read from folders or the Hub, exported to what knows PEFT but not peftx."""

from .export import export_lora, export_merged, export_miss
from .loading import load_adapter, read_adapter

__all__ = ["export_lora", "export_merged", "export_miss", "load_adapter", "read_adapter"]
