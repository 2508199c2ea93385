"""The one place that touches PEFT's type enum and mappings, and the table of peftx's methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import peft
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class MethodInfo:
    """What peftx knows about one fine-tuning method; documentation, tests and benchmarks are generated from it.

    Attributes:
        name: lower-case name; the peft type is its upper case, the state-dict prefix is `name + "_"` unless the
            method keeps LoRA's tensors (`"lora_"`).
        config: the `PeftConfig` subclass a user passes to `get_peft_model`.
        model: the `BaseTuner` subclass that PEFT instantiates.
        paper: where the method comes from, e.g. `"arXiv:2409.15371"`.
        summary: one line on what it does, without a full stop.
        mergeable: whether a weight delta exists, so that `merge_and_unload` works; default: what the layer class says.
        exact_start: whether a fresh adapter leaves the base model's output bit for bit as it is; else to about 1e-6.
        lora_export: `"exact"` (the delta has the adapter's rank), `"dora"`, `"svd"` (truncated, with an error) or
            `"none"`.
        svd_settings: config arguments any of which makes that `"svd"`.
        layer_types: names of the layer classes that can be targeted.
        experts: whether stacked weights of fused experts (`target_parameters`) can be targeted; default: of a method
            with linear layers and a weight delta.
        quantized: whether bitsandbytes 4-bit and 8-bit bases work.
        mixed_batches: whether `adapter_names=` works.
        exact_gradient: whether the adapter's gradients are those of the output, not rescaled by a rule of the method.
        callback: the `TrainerCallback` that drives the method's training rule, where it has one.
        rank_fields: the config's fields that set the rank that is at work.
        learning_rate: a rate at which the method learns with AdamW on the task of `peftx demo`, and on SST-2 in
            `peftx train`, where a new classifier learns at the same rate.
        train_settings: config arguments that `peftx train` and `peftx compare` set unless the user does, where the
            config's defaults, which are the paper's, were measured to learn less safely.
        tiny: config arguments that fit layers 10 to 32 wide.
        variants: name to config arguments of every mode that tests and benchmarks should cover.
    """

    name: str
    config: type[PeftConfig]
    model: type[BaseTuner]
    paper: str
    summary: str
    mergeable: bool = True
    exact_start: bool = True
    lora_export: Literal["exact", "dora", "svd", "none"] = "svd"
    svd_settings: Mapping[str, Any] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ("Linear", "Conv1D")
    experts: bool = False
    quantized: bool = True
    mixed_batches: bool = True
    exact_gradient: bool = True
    callback: type[TrainerCallback] | None = None
    rank_fields: tuple[str, ...] = ("r",)
    learning_rate: float = 2e-3
    train_settings: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all that can be targeted."""
        return (*self.layer_types, "fused experts") if self.experts else self.layer_types

    @property
    def peft_type(self) -> PeftType:
        return PeftType[self.name.upper()]

    def lora_export_of(self, settings: Mapping[str, Any]) -> str:
        """`lora_export` with these config arguments."""
        truncated = any(settings.get(name) == value for name, value in self.svd_settings.items())
        return "svd" if truncated else self.lora_export

    @property
    def prefix(self) -> str:
        return self.model.prefix


# Survives `importlib.reload`: a reloaded module sees its old globals.
_METHODS: dict[str, MethodInfo] = globals().get("_METHODS", {})


def methods() -> tuple[MethodInfo, ...]:
    """The records of all registered methods, in the order of their registration."""
    return tuple(_METHODS.values())


def info_of(config_cls: type[PeftConfig]) -> MethodInfo:
    """The record of the method for which `config_cls` (or a base of it) was registered.

    Raises:
        RuntimeError: `config_cls` was never registered, or PEFT ships a method of that name itself.
    """
    for info in _METHODS.values():
        if issubclass(config_cls, info.config):
            return info
    raise RuntimeError(
        f"{config_cls.__name__} is not registered with PEFT. Either its method lacks the `@peftx.register(...)` "
        f"decorator, or PEFT {peft.__version__} ships a method of the same name: then use PEFT's own config class."
    )


def is_native(name: str) -> bool:
    """Whether PEFT itself (not peftx) knows a method called `name`."""
    member = PeftType.__members__.get(name.upper())
    return member is not None and not getattr(member, "_peftx", False)


def _extend_peft_type(name: str) -> PeftType:
    """Adds a member to the closed enum `PeftType`, the way `aenum.extend_enum` does; idempotent."""
    value = name.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    member._peftx = True  # type: ignore[attr-defined]
    # EnumType.__setattr__ refuses names that stand in _member_map_, so the attribute comes first.
    type.__setattr__(PeftType, value, member)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    return member


def check_name(name: str) -> None:
    """Raises ValueError where `name` cannot be that of a method."""
    if not (name.isidentifier() and name.islower()) or name.endswith("_"):
        raise ValueError(f"The name of a method must be a lower-case identifier without a trailing '_', got {name!r}.")


def add(info: MethodInfo) -> None:
    """Puts a method into PEFT's mappings and into our table; the same class again replaces its earlier record.

    Raises:
        ValueError: another package registered a method of this name.
    """
    known = _METHODS.get(info.name)
    if known is not None and _place(known.config) != _place(info.config):
        raise ValueError(f"A method called {info.name!r} is already registered by {known.config.__module__}.")
    member = _extend_peft_type(info.name)
    for mapping in (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        mapping.pop(member, None)
    register_peft_method(name=info.name, config_cls=info.config, model_cls=info.model, prefix=info.model.prefix)
    _METHODS[info.name] = info


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
