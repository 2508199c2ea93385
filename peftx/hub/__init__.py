"""Adapters on their way to others: read from folders or the Hub, looked into, exported to what does not know peftx."""

from ..cards.finish import finish_card
from .export import export_lora, export_miss
from .gguf import export_gguf
from .inspect import AdapterReport, inspect_adapter
from .loading import load_adapter, read_adapter
from .merged import export_merged
from .picture import heat_map
from .swapping import hotswap
from .tensors import AdaptedModule

__all__ = [
    "AdaptedModule",
    "AdapterReport",
    "export_gguf",
    "export_lora",
    "export_merged",
    "export_miss",
    "finish_card",
    "heat_map",
    "hotswap",
    "inspect_adapter",
    "load_adapter",
    "read_adapter",
]
