"""Compressed models through `from_pretrained`.

A compressed model says so in its `config.json`: `quantization_config` with the ranks of its layers. transformers hands
such a model to the quantizer registered for its `quant_method`, here one that only puts empty `LowRankLinear` layers
where the ranks say, before the weights are read. Nothing is quantised: once loaded, the model is an ordinary one.

`import peftx` imports this module, so it stays light.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..cards.compressed import QUANT_METHOD, keep_card
from .experts import LowRankExperts, LowRankStack, put_thin
from .layers import layers_in
from .linear import LowRankLinear, shape_of
from .stacks import Stack, stacks_in

logger = logging.get_logger(__name__)


@register_quantization_config(QUANT_METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """What `config.json` says about a compressed model.

    Args:
        ranks: of each factorised layer, by its full name in the model that was saved.
        method: the weighting, for readers.
        keep: the share of parameters that was asked for, for readers.

    Raises:
        ValueError: ranks that are not positive integers by name.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        method: str | None = None,
        keep: float | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if not isinstance(ranks, Mapping) or not ranks:
            raise ValueError(f"quantization_config of a compressed model: ranks must map names to ranks, got {ranks!r}")
        for name, rank in ranks.items():
            if not isinstance(name, str) or type(rank) is not int or rank < 1:
                raise ValueError(
                    f"quantization_config of a compressed model: the rank of {name!r} must be a positive integer, "
                    f"got {rank!r}"
                )
        if unknown:
            logger.warning(f"quantization_config of a compressed model: ignoring {', '.join(map(str, unknown))}")
        self.quant_method: Any = QUANT_METHOD
        self.ranks = dict(ranks)
        self.method = method
        self.keep = keep


@register_quantizer(QUANT_METHOD)
class LowRankQuantizer(HfQuantizer):
    """Builds the skeleton of a compressed model before its weights are read."""

    quantization_config: LowRankConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "LowRankConfig describes a model that peftx.compression.compress has made; "
                "it cannot be passed to from_pretrained of a dense one"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        ranks = ranks_in(model, self.quantization_config.ranks)
        layers = {name: layer_of(model, name, rank) for name, rank in ranks.items()}
        for name, layer in layers.items():
            if isinstance(layer, Stack):
                put_thin(model, name, LowRankStack.like(layer, ranks[name]))
            else:
                model.set_submodule(name, LowRankLinear.like(layer, ranks[name]))
        self.quantization_config.ranks = ranks  # the names of this class, which save_pretrained writes again

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leaves the model as `compress` does: an ordinary one whose config tells its ranks.

        Raises:
            ValueError: the checkpoint lacks factors.
            RuntimeError: it has tensors of other sizes than its config.json says.
        """
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        if wrong := next(_mismatched(model), None):
            raise RuntimeError(f"size mismatch: {wrong}, and its config.json says otherwise")
        if missing := list(_not_loaded(model)):
            raise ValueError(
                f"the checkpoint has no {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}: {len(missing)} factors "
                "that its config.json promises are missing, and random ones mean nothing"
            )
        keep_card(model)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _mismatched(model: PreTrainedModel) -> Iterator[str]:
    """Weights whose sizes are not those of their layers: some releases of transformers load these without a word."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features):
            yield f"the checkpoint's {name}.weight has the sizes {tuple(module.weight.shape)}"
        for part, shape in module.sizes().items() if isinstance(module, LowRankStack) else ():
            if (found := getattr(module, part).shape) != shape:
                yield f"the checkpoint's {name}.{part} has the sizes {tuple(found)}"


def _not_loaded(model: PreTrainedModel) -> Iterator[str]:
    """Factors that transformers drew at random, since the checkpoint had none."""
    tensors = dict(model.named_parameters())
    if not any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors.values()):
        return  # this release keeps no marks
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | LowRankStack):
            for part, tensor in module.named_parameters(prefix=name):
                if not getattr(tensor, "_is_hf_initialized", False):
                    yield part


def ranks_in(model: PreTrainedModel, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by the names that the layers have in this class of model.

    They were saved from a class of the same architecture: with its base model inside (`bert.encoder...`) or being the
    base model (`encoder...`). Layers of parts that another class does not have, such as a decoder or a head, are left
    out, as transformers leaves out their weights.

    Raises:
        ValueError: a layer does not exist.
    """
    modules = {**dict(model.named_modules()), **layers_in(model)}
    prefix = f"{model.base_model_prefix}."
    same = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    found = {}
    for name, rank in ranks.items():
        spellings = [name] if same else [name, name.removeprefix(prefix), prefix + name]
        known = next((spelling for spelling in spellings if spelling in modules), None)
        if known is not None:
            found[known] = rank
            continue
        heads = {spelling.partition(".")[0] for spelling in (name, name.removeprefix(prefix))}
        if same or any(head in modules or prefix + head in modules for head in heads):
            raise ValueError(
                f"config.json gives a rank to {name}, which a {type(model).__name__} does not have: the file was "
                "changed, or is of another release of transformers"
            )
    return found


def layer_of(model: nn.Module, name: str, rank: int) -> nn.Module | Stack:
    """The dense layer that factors of this rank are to replace.

    Raises:
        ValueError: it is no linear layer or stack of experts, or the rank is too large.
    """
    parent = name.rpartition(".")[0]
    stacks = dict(stacks_in(model.get_submodule(parent), parent))
    layer = stacks[name] if name in stacks else model.get_submodule(name)
    if not isinstance(layer, Stack) and type(layer) not in (nn.Linear, Conv1D):
        raise ValueError(f"config.json gives a rank to {name}, which is a {type(layer).__name__}, not a Linear")
    limit = min(layer.shape[1:] if isinstance(layer, Stack) else shape_of(layer))
    if rank > limit:
        raise ValueError(f"config.json gives rank {rank} to {name}, which has at most rank {limit}")
    return layer


def materialize(model: nn.Module) -> nn.Module:
    """Makes every `LowRankLinear` and `LowRankExperts` of the model dense again, in place, for tools that need ordinary
    layers.

    Outputs stay equal up to rounding; the size is that of the model before compression, and `save_pretrained` writes a
    model that loads without peftx.

    Returns:
        The same model.

    Raises:
        ValueError: an adapter is on its factors; the model is unchanged.
    """
    low = LowRankLinear | LowRankExperts
    compressed: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, low)}
    layers = {}
    for name, module in compressed.items():
        try:
            layers[name] = module.dense()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "quantization_config", None), LowRankConfig):
        del config.quantization_config
    return model
