"""What the tuners of both families share, and the tuner of all methods that own their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ..cards.adapter import keep_card

if TYPE_CHECKING:
    from .layer import AdapterLayer


class CheckedTuner(BaseTuner):
    """What the tuners of both families add to PEFT's: where PEFT leaves a model half changed after an error (an
    unsupported module among the targets, a rank that does not fit, a file that does not fit), the failed adapter is
    taken out again."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            _take_out(model, adapter_name, self.tuner_layer_cls)
            self.peft_config.pop(adapter_name, None)
            raise

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        keep_card(model)
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT, after checking the file against the model: a file that does not fit is refused as a whole.

        Raises:
            ValueError: missing, unexpected, wrongly shaped, wrongly typed or non-finite tensors.
        """
        try:
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            for name, layer in model.named_modules():
                if isinstance(layer, cls.tuner_layer_cls):
                    prefix = name.removeprefix("_fsdp_wrapped_module.")
                    keys = {attribute: key for attribute, (key, _) in _saved(layer, prefix, adapter_name).items()}
                    tensors = {attribute: remapped[key] for attribute, key in keys.items() if key in remapped}
                    try:
                        cls._prepare_load(layer, adapter_name, tensors)
                    except ValueError as error:
                        raise ValueError(f"{prefix}: {error}") from None
                    remapped.update({keys[attribute]: tensor for attribute, tensor in tensors.items()})
            problems = cls._find_problems(model, adapter_name, remapped)
            if problems:
                more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
                raise ValueError(
                    f"The {config.peft_type.value} adapter does not fit the model, nothing was loaded:\n  "
                    + "\n  ".join(problems[:10])
                    + more
                )
        except Exception:
            if getattr(config, "_from_file", False):
                _withdraw(model, adapter_name, cls.tuner_layer_cls)
            raise
        config._from_file = False
        return remapped

    @classmethod
    def _prepare_load(cls, layer: Any, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Called for every layer with an adapter's tensors from a file, by attribute name, before they are loaded."""

    @classmethod
    def _find_problems(cls, model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> list[str]:
        expected: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, (cls.tuner_layer_cls, CheckedTuner)):
                prefix = name.removeprefix("_fsdp_wrapped_module.")
                expected.update(_saved(module, prefix, adapter_name).values())
        problems = []
        for key, wanted in expected.items():
            shown = cls._remove_adapter_name_from_key(key, adapter_name)
            found = state_dict.get(key)
            if found is None:
                problems.append(f"{shown}: missing, expected shape {tuple(wanted.shape)}")
            elif wanted.numel() and found.shape != wanted.shape:  # sharded tensors (ZeRO-3) have no elements here
                problems.append(f"{shown}: found shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
            elif found.is_floating_point() != wanted.is_floating_point():
                problems.append(f"{shown}: found dtype {found.dtype}, expected {wanted.dtype}")
            elif found.is_floating_point() and not found.is_meta and not torch.isfinite(found).all():
                problems.append(f"{shown}: found values that are not finite (NaN or infinite)")
        problems += [
            f"{key}: unexpected, the model has no such tensor"
            for key in state_dict
            if key not in expected and belongs_to(key, cls.prefix)
        ]
        return problems

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        # PEFT guards Mamba's fused projections for a closed list of types; the reason holds for every method.
        try:
            _check_lora_target_modules_mamba(SimpleNamespace(peft_type="LORA"), model, target_name)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(str(error).replace("PEFT:LORA", f"PEFT:{peft_config.peft_type.value}")) from None

    # Mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While active, every tuner layer receives the `adapter_names` of the batch (PEFT's protocol, whose own
        hooks stay after an error)."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {"__base__"}.union(*(layer._all_available_adapter_names() for _, layer in self._layers()))
        if unknown := set(adapter_names) - known:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        # Beam search repeats every sample, except for the encoder of an encoder-decoder model, which runs once.
        num_beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(num_beams)]
        encoder = self.model.get_encoder() if num_beams > 1 and _is_encoder_decoder(self.model) else None
        encoder_modules = set(encoder.modules()) if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=adapter_names if module in encoder_modules else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Merging

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls):
                yield name, module

    def _check_merge_finite(self, adapter_names: list[str] | None) -> None:
        """Raises ValueError where merging these adapters (default: the active ones) would give NaNs or infinities."""
        raise NotImplementedError

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if safe_merge:  # all layers are checked before the first is written
            self._check_merge_allowed()
            self._check_merge_finite(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge and safe_merge:
            self._check_merge_allowed()
            self._check_merge_finite(adapter_names)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


class AdapterModel(CheckedTuner):
    """Puts the layers of one method into a model. `peftx.register` makes a subclass for each layer class."""

    target_module_mapping: dict = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    tuner_layer_cls: type[AdapterLayer]

    # Injection

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config.for_module(current_key)
        with errors_naming(peft_config, current_key):
            if isinstance(target, self.tuner_layer_cls):
                target.update_layer(adapter_name, config)
                return
            layer_cls = self.tuner_layer_cls.for_base_layer(innermost(target))
            layer = layer_cls(target, adapter_name, config, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer places its adapters itself. PEFT's version moves the whole layer, which fails for adapters on the
        # meta device, and copies `.weight`, which some quantised layers do not have.
        setattr(parent, child_name, new_module)

    @classmethod
    def _prepare_load(cls, layer: AdapterLayer, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        layer.prepare_load(adapter_name, tensors)

    # Merging

    def _check_merge_allowed(self) -> None:
        for _, layer in self._layers():
            layer.check_mergeable()
        super()._check_merge_allowed()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.tuner_layer_cls.no_delta and super().supports_lora_conversion(adapter_name)

    def _check_merge_finite(self, adapter_names: list[str] | None) -> None:
        for _, layer in self._layers():
            names = layer.active_adapters if adapter_names is None else adapter_names
            layer.merged_weight([n for n in layer._present(names) if n not in layer.merged_adapters], check=True)


@contextmanager
def errors_naming(config: Any, key: str) -> Iterator[None]:
    """While active, an error about one layer also says for which method, and which layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{config.peft_type.value} cannot adapt the module {key!r}: {error}") from error


def innermost(module: nn.Module) -> nn.Module:
    """The layer under all tuner layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def unsupported(base_layer: nn.Module, supported: str) -> TypeError:
    return TypeError(
        f"{type(base_layer).__name__} is not supported, only {supported} are. "
        "Name other modules in `target_modules`, or leave this one out by `exclude_modules`."
    )


def belongs_to(key: str, prefix: str) -> bool:
    """Whether a state-dict key is of an adapter's tensor: it ends like `lora_A.weight` or `bone_block`."""
    return any(part.startswith(prefix) for part in key.split(".")[-2:])


def _saved(module: Any, prefix: str, adapter_name: str) -> dict[str, tuple[str, torch.Tensor]]:
    """State-dict key and tensor of everything that the adapter saves in a layer, or in the tuner for all layers, by the
    name of the attribute that holds it."""
    tensors = {}
    for attribute, container in module.named_children():
        if not isinstance(container, (nn.ParameterDict, nn.ModuleDict, BufferDict)) or adapter_name not in container:
            continue
        for key, tensor in container.state_dict(keep_vars=True).items():
            adapter, _, rest = key.partition(".")
            if adapter == adapter_name:
                name = f"{attribute}.{rest}" if rest not in ("", "weight") else attribute
                tensors[name] = (f"{prefix}.{attribute}.{key}" if prefix else f"{attribute}.{key}", tensor)
    return tensors


def forget(layer: Any, adapter_name: str) -> None:
    """Takes one adapter out of a tuner layer of either family, whatever becomes active then."""
    for name in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        if adapter_name in getattr(layer, name, ()):
            del getattr(layer, name)[adapter_name]


def _take_out(model: nn.Module, adapter_name: str, layer_cls: Any) -> None:
    """Removes one adapter from all layers, and the layers that hold no other adapter."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, layer_cls):
            forget(layer, adapter_name)
            if not layer._all_available_adapter_names():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)


def _withdraw(model: Any, adapter_name: str, layer_cls: type[BaseTunerLayer]) -> None:
    """Takes back an adapter that was added for a file which then did not fit."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    elif hasattr(model, "unload"):
        model.unload()
    else:
        _take_out(model, adapter_name, layer_cls)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
