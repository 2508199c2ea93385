"""What the tuners of both families share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _check_lora_target_modules_mamba, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..cards.adapter import keep_card
from . import experts, files, plain
from .reference import REFERENCE, copy_tokens
from .source import loading
from .weighted import check_weighted


class CheckedTuner(BaseTuner):
    """What the tuners of both families add to PEFT's.

    Where PEFT leaves a model half changed after an error (an unsupported module among the targets, a rank or a file
    that does not fit), the failed adapter is taken out again, and the model is as it was, `requires_grad` included. A
    file is compared with the model before memory is taken for what its config declares.

    An adapter called `"ref"` that is added with the config object of another one becomes a copy of it. TRL makes the
    reference of a trained adapter in this way (DPO, KTO, GRPO, RLOO); it copies most parameters itself, but no buffers.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        source = loading(sys._getframe(1), adapter_name)
        before = files.Before(self)
        try:
            if "." in adapter_name or not adapter_name:
                raise ValueError(f"An adapter's name becomes that of a module: it has no '.', got {adapter_name!r}.")
            self._find_experts(model, config)
            experts.tell_of_experts(model, config)
            if source is not None:
                self._file = files.Opened(self, source)
            with experts.patterns_of_parameters(self, config):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            experts.check_matched(self, model, config)
            # PEFT asks for the check of the values itself, but for heads that the file lacks, too late.
            heads = config.modules_to_save or config.trainable_token_indices
            if self._file is not None and (heads or self._file.misfit or self._file.source.native):
                files.check_header(self, model, adapter_name, self._file)
        except BaseException:
            before.restore(self, adapter_name, self.tuner_layer_cls)
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._file = None
        if source is not None and not source.native:
            config.before = before  # until the file has been read
        if adapter_name == REFERENCE:
            self._copy_reference(config)

    def _find_experts(self, model: nn.Module, config: Any) -> None:
        """Raises NotImplementedError where names among the targets mean fused experts to PEFT's LoRA, and nothing to
        the method."""
        if found := experts.experts_named(model, config):
            known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            targets = [] if isinstance(config.target_modules, str) else sorted(config.target_modules)
            names = ", ".join(repr(name) for name in targets if name not in known) or "the targets"
            raise NotImplementedError(
                f"{config.peft_type.value} cannot adapt the fused experts that {names} stand for in this model, and "
                "would adapt the other targets alone. Leave those names out to do just that, or use PEFT's LoRA, which "
                f"adapts {', '.join(sorted(found[1]))}."
            )

    def _room(self, fits: bool) -> Any:
        """Where the tensors of an adapter are made: on the meta device, without memory, if its file does not fit."""
        if self._file is None or fits:
            return nullcontext()
        self._file.misfit = True
        return torch.device("meta")

    def withdraw(self, adapter_name: str) -> None:
        """Forgets what the tuner itself holds of an adapter that has left its layers."""
        self.peft_config.pop(adapter_name, None)

    _file: files.Opened | None = None  # for which an adapter is being made

    def _copy_reference(self, config: Any) -> None:
        source = next((name for name, other in self.peft_config.items() if other is config and name != REFERENCE), None)
        if source is not None:
            for _, layer in self._layers():
                self._copy_adapter(layer, source, REFERENCE)
            copy_tokens(self.model, source, REFERENCE)

    def _copy_adapter(self, layer: Any, source: str, target: str) -> None:
        """Gives `target` all of `source` that is no parameter."""
        raise NotImplementedError

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        keep_card(model)
        tensors = super()._get_adapter_state_dict(model, *args, **kwargs)
        others = tuple(f".{cls.prefix}adapter.{name}." for name in kwargs.get("unwanted_adapter_names", ()))
        kept = {key: tensor for key, tensor in tensors.items() if not any(other in key for other in others)}
        if names := files.nested(cls, model):
            kept = {files.renamed(key, names): tensor for key, tensor in kept.items()}
        return plain.for_diffusers(cls, model, kept, sys._getframe(1), *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return files.without_name(key, f"{cls.prefix}adapter", adapter_name) or super()._remove_adapter_name_from_key(
            key, adapter_name
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT, after checking the file against the model: a file that does not fit is refused as a whole.

        Raises:
            ValueError: missing, unexpected, wrongly shaped, wrongly typed or non-finite tensors.
        """
        before = config.__dict__.pop("before", None)
        try:
            state_dict = {cls.current_key(key): tensor for key, tensor in state_dict.items()}
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            files.check_tensors(cls, model, config, adapter_name, remapped)
        except Exception:
            if before is not None:
                before.restore(model, adapter_name, cls.tuner_layer_cls)
                _forget_config(model, adapter_name)
            raise
        return remapped

    @classmethod
    def current_key(cls, key: str) -> str:
        """The key of today for one of a file, which an earlier release may have written."""
        return key

    @classmethod
    def prepare_load(cls, layer: Any, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Called for every layer with an adapter's tensors from a file, by name, before they are compared; it may
        refuse them by a ValueError, or replace them in `tensors`. On the meta device only their shapes are known."""

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
        both = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder = self.model.get_encoder() if num_beams > 1 and both else None
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

    # Combining and merging

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's LoRA does it, after a check of the arguments; errors as for `AdapterModel`'s."""
        names = ("combination_type", "svd_rank", "svd_clamp", "svd_full_matrices", "svd_driver", "density")
        given = dict(zip((*names, "majority_sign_method"), args, strict=False)) | kwargs
        checked = ("combination_type", "svd_rank", "density", "majority_sign_method")
        check_weighted(self, adapters, weights, **{name: given[name] for name in checked if name in given})
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)  # type: ignore[misc]

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls):
                yield name, module

    def _check_merge_finite(self, adapter_names: list[str] | None) -> None:
        """Raises ValueError where merging these adapters (default: the active ones) would give NaNs or infinities."""
        raise NotImplementedError

    def _check_merge_allowed(self) -> None:
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise NotImplementedError(
                "Cannot merge where `layer_replication` shares a base weight among layers: each has an adapter of its "
                "own. Keep the adapters attached."
            )
        super()._check_merge_allowed()

    def disable_adapter_layers(self) -> None:
        # PEFT's layers unmerge when they are called next, where a weight that accelerate offloads cannot be written.
        for _, layer in self._layers():
            if layer.merged and any(hasattr(module, "_hf_hook") for module in layer.modules()):
                with onload_layer(layer):
                    layer.unmerge()
        super().disable_adapter_layers()

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


@contextmanager
def errors_naming(config: Any, key: str) -> Iterator[None]:
    """While active, an error about one layer also says for which method, and which layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{config.peft_type.value} cannot adapt the module {key!r}: {error}") from error


def _forget_config(model: Any, adapter_name: str) -> None:
    """Takes an adapter's config from a `PeftModel`, its tuner or a transformers model with adapters."""
    model.peft_config.pop(adapter_name, None)
    inner = getattr(model, "base_model", None)
    if isinstance(inner, CheckedTuner):
        inner.withdraw(adapter_name)
        if not inner.peft_config:
            vars(inner.model).pop("peft_config", None)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}
