"""Adapters on their way to others: read from folders or the Hub, looked into, exported to what does not know peftx."""

from ..cards.finish import finish_card
from .export import export_lora, export_merged, export_miss
from .inspect import AdaptedModule, AdapterReport, heat_map, inspect_adapter
from .loading import load_adapter, read_adapter

__all__ = [
    "AdaptedModule",
    "AdapterReport",
    "export_lora",
    "export_merged",
    "export_miss",
    "finish_card",
    "heat_map",
    "inspect_adapter",
    "load_adapter",
    "read_adapter",
]
