"""A file of an adapter against the model that it is loaded into: what it must hold, and how it leaves again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig

from .source import PREFIX, Source, problems, refuse

WRAPPED = "_fsdp_wrapped_module."  # before the names in a model that FSDP wraps
CONTAINERS = (nn.ParameterDict, nn.ModuleDict, BufferDict)


def belongs_to(key: str, prefix: str) -> bool:
    """Whether a key is of an adapter's tensor: `lora_A.weight`, `bone_adapter.block`, or of old `bone_block`."""
    return any(part.startswith(prefix) for part in key.split(".")[-3:])


def without_name(key: str, container: str, adapter_name: str) -> str | None:
    """The key in the file of a tensor of a module in `container`; None where it is in no such container."""
    head, found, rest = key.partition(f".{container}.{adapter_name}.")
    return f"{head}.{container}.{rest}" if found else None


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name.removeprefix(WRAPPED), module


def saved(module: nn.Module, prefix: str, adapter_name: str) -> dict[str, tuple[str, torch.Tensor]]:
    """State-dict key and tensor of everything that the adapter saves in a layer, or in the tuner for all layers.

    By name: of a LoRA `lora_A`, of an adapter that is a module its tensors' own names.
    """
    tensors = {}
    for attribute, container in module.named_children():
        if not isinstance(container, CONTAINERS) or adapter_name not in container:
            continue
        for key, tensor in container.state_dict(keep_vars=True).items():
            adapter, _, rest = key.partition(".")
            if adapter == adapter_name:
                name = attribute if rest in ("", "weight") else rest
                tensors[name] = (f"{prefix}.{attribute}.{key}" if prefix else f"{attribute}.{key}", tensor)
    return tensors


def file_keys(tuner: Any, layer: nn.Module, name: str, adapter_name: str) -> dict[str, str]:
    """The keys in a file of an adapter's tensors in the layer `name`, by the tensors' names."""
    own = saved(layer, f"{PREFIX}{name}", adapter_name)
    return {part: tuner._remove_adapter_name_from_key(key, adapter_name) for part, (key, _) in own.items()}


def nested(tuner: Any, model: nn.Module) -> dict[str, str]:
    """Names of the tuner's layers under those of other methods, and what they would be on a model without such."""
    modules, found = dict(model.named_modules()), {}
    for name, module in modules.items():
        if isinstance(module, tuner.tuner_layer_cls) and ".base_layer" in name:
            parts: list[str] = []
            for depth, part in enumerate(path := name.split(".")):
                parent = modules[".".join(path[:depth])]
                other = isinstance(parent, BaseTunerLayer) and not isinstance(parent, tuner.tuner_layer_cls)
                parts += [] if part == "base_layer" and other else [part]
            found[f"{name}."] = ".".join([*parts, ""])
    return {name: plain for name, plain in found.items() if name != plain}


def renamed(key: str, names: Mapping[str, str]) -> str:
    """A key of a layer's tensor by the layer's new name, where `names` has one."""
    name = next((name for name in names if key.startswith(name)), "")
    return names.get(name, "") + key.removeprefix(name)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def current(tuner: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file by the keys of today."""
    return {tuner.current_key(key): tensor for key, tensor in tensors.items()}


class Opened:
    """A file for which an adapter is being made.

    Args:
        tuner: of the adapter.
        source: the file.

    Attributes:
        header: the file's tensors on the meta device.
        tensors: the same by the keys of today.
        misfit: whether an adapter in some layer has other shapes than the file.
    """

    def __init__(self, tuner: Any, source: Source) -> None:
        self.misfit = False
        self.source, self.header = source, source.header()
        self.tensors = current(tuner, self.header)
        self._layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self.tensors.items():
            layer, found, name = key.partition(f".{tuner.prefix}adapter.")
            if found:
                self._layers.setdefault(layer, {})[name] = tensor
        self._trials: dict[tuple, tuple[Any, nn.Module]] = {}

    def fits(self, key: str, make: Any, site: Any, config: Any) -> bool:
        """Whether the adapter that `make` makes of a site and a config has the file's shapes in the layer `key`; it
        takes no memory."""
        shape = id(config), type(site), site.shape
        if shape not in self._trials:
            with torch.device("meta"):
                self._trials[shape] = config, make(site, config)  # the config stays, or its id may be another's
        trial, found = self._trials[shape][1], {**self._layers.get(PREFIX + key, {})}
        try:
            trial.prepare_all(found)  # type: ignore[operator]
        except ValueError:
            return False
        wanted = trial.state_dict()
        return all(name in found and found[name].shape == tensor.shape for name, tensor in wanted.items())


def check_header(tuner: Any, model: nn.Module, adapter_name: str, file: Opened) -> None:
    """Compares a file with the adapter that was made for it: shapes and dtypes, and where transformers loads it, which
    asks nobody again, the values too.

    Raises:
        ValueError: as for `check_tensors`, or, where transformers loads the file, keys of an earlier release.
    """
    method, config = tuner.peft_config[adapter_name].peft_type.value, tuner.peft_config[adapter_name]
    old = [key for key in file.header if tuner.current_key(key) != key]
    if file.source.native and old:
        raise ValueError(
            f"The {method} adapter was written by an earlier release, with keys such as {old[0]!r}, which "
            "transformers' own `load_adapter` cannot rename. Load it by PeftModel.from_pretrained and save it again."
        )
    tensors = current(tuner, file.source.tensors()) if file.source.native else {**file.tensors}
    expected: dict[str, torch.Tensor] = {}
    for name, module in named_modules(model):
        if isinstance(module, tuner.tuner_layer_cls):
            keys = file_keys(tuner, module, name, adapter_name)
            with _naming(name):
                expected |= _prepared(tuner, module, adapter_name, keys, tensors)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict(keep_vars=True)
            heads = module.adapter_state_dict_load_map(adapter_name)
            expected |= {f"{PREFIX}{name}.{key}": state[target] for key, target in heads.items()}
    shared = saved(tuner, "base_model", adapter_name).values()
    expected |= {tuner._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in shared}
    biases = {
        tuner._remove_adapter_name_from_key(f"{PREFIX}{key}", adapter_name): tensor
        for key, tensor in _biases(tuner, model, config, tensors).items()
    }
    embeddings = {f"{PREFIX}{key}": tensor for key, tensor in _embeddings(model, config).items()}
    expected, known = _with_rest(config, expected, tensors, biases, embeddings)
    refuse(method, problems(expected, tensors, known))


def check_tensors(
    tuner_cls: Any, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Compares a file's tensors, by the model's names, with the model, and lets the adapters prepare them.

    Raises:
        ValueError: missing, unexpected, wrongly shaped, wrongly typed or non-finite tensors.
    """
    expected: dict[str, torch.Tensor] = {}
    heads: dict[str, str] = {}  # their keys in the file
    for name, module in named_modules(model):
        if isinstance(module, tuner_cls.tuner_layer_cls):
            keys = {part: key for part, (key, _) in saved(module, name, adapter_name).items()}
            with _naming(name):
                expected |= _prepared(tuner_cls, module, adapter_name, keys, state_dict)
        elif isinstance(module, BaseTuner):
            expected |= dict(saved(module, name, adapter_name).values())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict(keep_vars=True)
            targets = module.adapter_state_dict_load_map(adapter_name)
            heads |= {f"{name}.{target}": f"{name}.{key}" for key, target in targets.items()}
            expected |= {f"{name}.{target}": state[target] for target in targets.values()}
    has_prefix = any(key.startswith(PREFIX) for key, _ in model.named_parameters())
    found = {key if has_prefix else key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    biases, embeddings = _biases(tuner_cls, model, config, found), _embeddings(model, config)
    expected, known = _with_rest(config, expected, found, biases, embeddings)

    def plain(key: str) -> str:
        return tuner_cls._remove_adapter_name_from_key(key, adapter_name)

    def shown(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {heads.get(key) or plain(key): tensor for key, tensor in tensors.items()}

    refuse(config.peft_type.value, problems(shown(expected), shown(found), {*map(plain, known)}))


def _prepared(
    tuner: Any, layer: nn.Module, adapter_name: str, keys: dict[str, str], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors that a layer expects, by their keys in `tensors`.

    What the adapter replaces is replaced there, and tensors of an earlier release that it takes are taken.
    """
    container = f".{tuner.prefix}adapter."
    starts = {key.partition(container)[0].removeprefix(PREFIX) + container for key in keys.values() if container in key}
    if any(key not in tensors for key in keys.values()):
        others = {key: key.removeprefix(PREFIX) for key in tensors if key not in keys.values()}
        former = {k: (key, start) for k, key in others.items() for start in starts if key.startswith(start)}
        keys = {**{key.removeprefix(start): k for k, (key, start) in former.items()}, **keys}
    found = {part: tensors[key] for part, key in keys.items() if key in tensors}
    before = set(found)
    tuner.prepare_load(layer, adapter_name, found)
    for part in before - set(found):
        del tensors[keys[part]]
    tensors.update({keys[part]: tensor for part, tensor in found.items()})
    return {keys[part]: tensor for part, (_, tensor) in saved(layer, "", adapter_name).items()}


def _with_rest(
    config: Any,
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    biases: dict[str, torch.Tensor],
    embeddings: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Trained biases are expected too, as PEFT saves them; embeddings and other biases only where a file has them."""
    heads = {key for key in biases if "modules_to_save" in key or "original_module" in key}
    trained, optional = {key: tensor for key, tensor in biases.items() if key not in heads}, embeddings
    if config.bias == "none":
        trained, optional = {}, embeddings | biases
    return expected | trained | {key: tensor for key, tensor in optional.items() if key in found}, heads


def _biases(tuner: Any, model: nn.Module, config: Any, found: Iterable[str]) -> dict[str, torch.Tensor]:
    if config.bias == "none" and not any(key.endswith(".bias") for key in found):
        return {}
    named = ((name.removeprefix(WRAPPED), tensor) for name, tensor in model.named_parameters())
    biases: dict[str, torch.Tensor] = {name: tensor for name, tensor in named if name.rpartition(".")[2] == "bias"}
    return biases if config.bias == "none" else tuner._get_learnable_bias_state_dict(model, biases, config)


def _embeddings(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """What PEFT saves with an adapter that targets an embedding, or whose vocabulary was resized: the embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    try:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return {}
    known = {
        id(layer.base_layer if hasattr(layer, "base_layer") else layer): layer for layer in layers if layer is not None
    }
    resized = _is_resized(model, config)
    return {
        key: tensor
        for name, module in named_modules(model)
        if id(module) in known and (resized or hasattr(known[id(module)], "base_layer"))
        for key, tensor in ((f"{name}.{part}", tensor) for part, tensor in module.state_dict(keep_vars=True).items())
    }


def _is_resized(model: Any, config: Any) -> bool:
    """Whether the vocabulary is not that of the base model, as far as its config can be read here."""
    name = config.base_model_name_or_path
    try:
        base = PretrainedConfig.get_config_dict(name, local_files_only=True)[0] if name else {}
    except (OSError, ValueError):
        return False
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size is not None and base.get("vocab_size", size) != size


def forget(layer: Any, adapter_name: str) -> None:
    """Takes one adapter out of a tuner layer of either family, whatever becomes active then."""
    for name in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        if adapter_name in getattr(layer, name, ()):
            del getattr(layer, name)[adapter_name]


class Before:
    """What a model is before an adapter is made, to be so again where that fails.

    Attributes:
        modules: all of them.
        trained: parameters that require gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = set(model.modules())
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore(self, model: nn.Module, adapter_name: str, layer_cls: Any) -> None:
        """Removes the adapter from all layers and heads, and the wrappers that were made for it."""
        for name, layer in reversed(list(model.named_modules())):  # layers may be nested
            if isinstance(layer, layer_cls):
                forget(layer, adapter_name)
                if layer in self.modules or layer._all_available_adapter_names():
                    continue
                inner = layer.base_layer
            elif isinstance(layer, AuxiliaryTrainingWrapper) and adapter_name in layer._adapters:
                layer.delete_adapter(adapter_name, [name for name in layer.active_adapters if name != adapter_name])
                if layer in self.modules or layer._adapters:
                    continue
                inner = layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            else:
                continue
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, inner)
        trained = set(map(id, self.trained))
        for parameter in model.parameters():
            if parameter.is_leaf and parameter.requires_grad != (id(parameter) in trained):
                parameter.requires_grad_(id(parameter) in trained)
