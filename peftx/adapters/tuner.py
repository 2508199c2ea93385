"""The tuner of all methods that own their tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import replicate_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ..utils import innermost
from . import experts
from .checked import CheckedTuner, errors_naming
from .layer import AdapterLayer
from .sites import ExpertsSite
from .weighted import CombinationType, add_weighted, check_weighted


class AdapterModel(CheckedTuner):
    """Puts the layers of one method into a model. `peftx.register` makes a subclass for each adapter class."""

    target_module_mapping: dict = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    tuner_layer_cls: Any  # an `AdapterLayer`

    # Injection

    _prepare_adapter_config = LoraModel._prepare_adapter_config

    def _find_experts(self, model: nn.Module, config: Any) -> None:
        # Names that mean fused experts to PEFT's LoRA mean them here, too.
        if self.tuner_layer_cls.experts_cls is None:
            return super()._find_experts(model, config)
        if found := experts.experts_named(model, config):
            config.target_modules, config.target_parameters = found
        experts.check_same_parameters(self.peft_config, config)
        return None

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
            kind, options = self._kind(target, parameter_name)
            with self._place(target, kind, options, config, current_key):
                if isinstance(target, kind) and getattr(target, "parameter_name", None) == parameter_name:
                    target.update_layer(adapter_name, config)
                    return
                layer = kind(target, adapter_name, config, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _copy_adapter(self, layer: Any, source: str, target: str) -> None:
        layer.copy_adapter(source, target)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise NotImplementedError(
            f"{peft_config.peft_type.value} cannot tie the adapters of tied modules ({', '.join(tied_weight_keys)}). "
            "Put them into `modules_to_save`, which stay tied, or target one of them without `ensure_weight_tying`."
        )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Adds a weighted sum of adapters, which is what PEFT's LoRA makes of them once exported (`peftx.export_lora`).

        It is a LoRA in the layers of the method: it trains, merges, saves and loads as its other adapters do, and
        `export_lora` writes it for stock PEFT. Like PEFT, this does nothing where `adapter_name` is taken.

        Args:
            adapters, weights: which, and how much of each; negative ones subtract.
            combination_type: as in PEFT. `"cat"` is the exact sum; `"svd"` (default) the best of its rank; `"linear"`
                and its kin combine the factors, and need equal ranks. Those that end in `"svd"` need no exact factors.
            svd_rank: default: the largest of the adapters' ranks in a module; without exact factors the whole.
            svd_clamp, svd_driver, density, majority_sign_method: as in PEFT.
            svd_full_matrices: without effect, the rest of the matrices would be cut off.

        Raises:
            ValueError: an unknown adapter, a weight missing or not finite, an impossible setting, different ranks where
                they must be equal, or adapters that train the same head.
            NotImplementedError: the adapters are no weight deltas (Compacter), sit on fused experts, or have no exact
                factors where the combination is one of factors (Bone's bat).
        """
        if adapter_name in self.peft_config:
            return
        check_weighted(self, adapters, weights, combination_type, svd_rank, density, majority_sign_method)
        add_weighted(
            self, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, svd_driver, density,
            majority_sign_method,
        )  # fmt: skip

    def _kind(self, target: nn.Module, parameter_name: str | None) -> tuple[type[AdapterLayer], dict[str, Any]]:
        """The class of the layer over a module, or over one of its parameters, and what else makes its site."""
        cls, base, quantization_kwargs = self.tuner_layer_cls, innermost(target), get_quantization_kwargs(self)
        if parameter_name is None:
            return cls.over(base, **quantization_kwargs), quantization_kwargs
        experts.check_experts(base, parameter_name)
        if cls.experts_cls is None:
            raise NotImplementedError(
                f"{cls.__name__.removesuffix('Layer')} has no form for the stacked weights of fused experts, such as "
                f"{parameter_name}: leave out `target_parameters`."
            )
        return cls.experts_cls, {"parameter_name": parameter_name}

    def _place(self, target: nn.Module, kind: Any, options: dict[str, Any], config: Any, key: str) -> Any:
        """Where the tensors of an adapter are made: on the meta device, without memory, if its file does not fit."""
        if self._file is None:
            return nullcontext()
        known = isinstance(target, kind) and getattr(target, "parameter_name", None) == options.get("parameter_name")
        site = target.site if known else kind.site_for(innermost(target), **options)
        keys = [key]
        if isinstance(site, ExpertsSite):  # nested as it will be, which is not known yet
            keys = experts.nested_keys(key, site.base)
        return self._room(any(self._file.fits(one, kind.make_adapter, site, config) for one in keys))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer places its adapters itself. PEFT's version moves the whole layer, which fails for adapters on the
        # meta device, and copies `.weight`, which some quantised layers do not have.
        setattr(parent, child_name, new_module)

    @classmethod
    def current_key(cls, key: str) -> str:
        # Until the adapters became modules, a tensor `block` of Bone was saved as `<layer>.bone_block`.
        head, _, last = key.rpartition(".")
        name = last.removeprefix(cls.prefix)
        return key if name in (last, "adapter") else f"{head}.{cls.prefix}adapter.{name}".lstrip(".")

    @classmethod
    def prepare_load(cls, layer: Any, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        layer.adapters[adapter_name].prepare_all(tensors)

    # Merging

    def _check_merge_allowed(self) -> None:
        for _, layer in self._layers():
            layer.check_mergeable()
        super()._check_merge_allowed()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.tuner_layer_cls.adapter_cls.no_delta and super().supports_lora_conversion(adapter_name)

    def _check_merge_finite(self, adapter_names: list[str] | None) -> None:
        for _, layer in self._layers():
            names = layer.active_adapters if adapter_names is None else adapter_names
            layer.check_finite([name for name in layer.present(names) if name not in layer.merged_adapters])
