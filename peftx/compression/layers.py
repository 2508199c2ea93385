"""The linear layers of a model and its stacks of them, under adapters or not, and what recognises their weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import Bnb8bitBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..adapters.products import unpack
from ..utils import base_of, innermost
from . import linear
from .checks import check_modules
from .stacks import Layer, Stack, called, stacks_in

logger = logging.get_logger(__name__)
PROBES = 64  # entries of a weight that recognise it
HEADS = {*SEQ_CLS_HEAD_NAMES, "lm_head", "pooler", "qa_outputs", "cls"}
ROUTERS = {"router", "gate", "shared_expert_gate"}


def target_layers(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """The linear layers to look at, by their names in the base model: what a PEFT adapter wraps counts as the layer.

    A stacked weight of fused experts, such as `model.layers.0.mlp.experts.down_proj`, is one, too: a linear layer for
    each expert.

    Args:
        model: of transformers, or a PEFT model around one.
        target_modules: in PEFT's forms: a regular expression, a list of names or their ends, or `"all-linear"`.
            Default: every `nn.Linear`, transformers `Conv1D` and stack of experts inside the repeated blocks of the
            encoder and decoder. Left out: classifiers, output embeddings, poolers, routers of experts, and layers with
            a tied weight. `"all-linear"` has stacks, too; neither has packed or split ones, of which a warning tells.
        exclude_modules: in the first two forms.

    Returns:
        Name to module, in the model's order; PEFT's wrapper where there is one (`base_layer` looks inside). Of a stack
        no module, but a `Stack`.

    Raises:
        ValueError: no regular expression, none is left, or one that was named shares its weight with another, or is a
            stack that is packed, or split over processes.
    """
    check_modules("target_modules", target_modules)
    check_modules("exclude_modules", exclude_modules)
    base = base_of(model)
    layers, tied = layers_in(base), tied_layers(base)
    shorthand = isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    named = not shorthand and target_modules is not None
    if target_modules is None:
        layers = {name: layers[name] for name in default_names(base, layers)}
        target_modules = list(layers)
    elif not isinstance(target_modules, str):
        target_modules = list(target_modules)
    # The task only tells PEFT to leave a classifier out of "all-linear".
    config: Any = LoraConfig(task_type="SEQ_CLS", target_modules=target_modules)
    config.exclude_modules = exclude_modules if isinstance(exclude_modules, str) else set(exclude_modules or [])
    config = _maybe_include_all_linear_layers(config, base)
    if shorthand:
        stacks = (name for name, layer in layers.items() if isinstance(layer, Stack))
        config.target_modules = {*config.target_modules, *stacks}
    chosen = {name: layer for name, layer in layers.items() if check_target_module_exists(config, name)}
    shared = [name for name in chosen if name in tied]
    if shared and not shorthand:
        raise ValueError(f"{shared[0]} shares its weight with {tied[shared[0]]}: leave it out, exclude_modules=")
    for name in shared:
        del chosen[name]
    for name, problem in {name: unusable(layer) for name, layer in chosen.items()}.items():
        if problem and named:
            raise ValueError(f"{name}: {problem}")
        if problem:
            logger.warning(f"{name} is left out: {problem}")
            del chosen[name]
    if not chosen:
        asked = f"target_modules={target_modules!r}, exclude_modules={exclude_modules!r}"
        raise ValueError(
            f"{describe(model)} has no layer to look at: {asked if layers else 'no linear layer in blocks'}"
        )
    return chosen


def layers_in(base: nn.Module, prefix: str = "") -> dict[str, Layer]:
    """All `nn.Linear` and `Conv1D` by name, or the adapters' wrappers around them, and stacks of experts; nothing of an
    adapter itself."""
    found: dict[str, Layer] = {}
    for name, child in base.named_children():
        if isinstance(innermost(child), nn.Linear | Conv1D):
            found[prefix + name] = child
        elif stacks := dict(stacks_in(child, prefix + name)):
            found |= stacks
        elif not isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found |= layers_in(child, f"{prefix}{name}.")
    return found


def unusable(layer: Layer) -> str | None:
    return layer.problem() if isinstance(layer, Stack) else None


def default_names(base: nn.Module, layers: Mapping[str, Layer]) -> Iterator[str]:
    """Those inside the blocks: inside a ModuleList of modules that are not linear layers themselves."""
    blocks = tuple(
        f"{name}."
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and not any(isinstance(innermost(m), nn.Linear | Conv1D) for m in module)
    )
    head = getattr(base, "get_output_embeddings", lambda: None)()
    tied = tied_layers(base)
    for name, layer in layers.items():
        parts = name.split(".")
        router = "router" in parts or (parts[-1] in ROUTERS and beside_experts(base, name))
        if name.startswith(blocks) and not (router or HEADS & set(parts) or layer is head or name in tied):
            yield name


def beside_experts(base: nn.Module, name: str) -> bool:
    return hasattr(base.get_submodule(name.rpartition(".")[0]), "experts")


def tied_layers(base: nn.Module) -> dict[str, str]:
    """Layers whose weight is also somewhere else, and where."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    tied = {}
    for name, layer in layers_in(base).items():
        stacked = isinstance(layer, Stack)
        users = names.get(id(layer.parameter if isinstance(layer, Stack) else innermost(layer).weight), ())
        if other := next((user for user in users if user != (name if stacked else f"{name}.weight")), None):
            tied[name] = other
    return tied


def shape_of(layer: Layer) -> tuple[int, ...]:
    """(out_features, in_features), also of a quantised layer, and of what an adapter is on; of a stack of experts
    (E, out_features, in_features)."""
    return layer.shape if isinstance(layer, Stack) else linear.shape_of(innermost(called(layer)))


def dense_weight(base: nn.Module) -> Tensor:
    """The weight, dequantised if need be; the layer stays as it is."""
    unpack(base)
    if type(base.weight).__name__ == "Int8Params":  # on a CPU `dequantize_module_weight` would lose the layer's scales
        return Bnb8bitBackend().get_base_weight(base)
    return dequantize_module_weight(base)


def signature(layer: Layer) -> Tensor:
    """(min(64, entries),), float32: entries of the base weight at even distances, as it is stored, row after row."""
    weight = (layer.parameter if isinstance(layer, Stack) else dense_weight(innermost(layer))).detach()
    if weight.device.type == "meta" or type(weight).__name__ == "DTensor" or not weight.numel():
        raise ValueError(
            "the weights are not here (on the meta device, or split by FSDP or DeepSpeed): load them whole"
        )
    count = weight.numel()
    places = torch.linspace(0, count - 1, min(PROBES, count), dtype=torch.float64).round().long()
    return weight.reshape(-1)[places.to(weight.device)].to("cpu", torch.float32)


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; of constants, 1 where they are equal and 0 where not."""
    a, b = (part.double() - part.double().mean() for part in (first, second))
    norms = float(a.norm() * b.norm())
    if not norms > 0 or not math.isfinite(norms):
        return float(torch.equal(first, second))
    return float(a @ b) / norms


def describe(model: nn.Module) -> str:
    """Class and name of the model."""
    base = base_of(model)
    return f"{type(base).__name__} {getattr(getattr(base, 'config', None), '_name_or_path', '')}".strip()
