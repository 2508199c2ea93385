"""Configuration fields that every method has, and how a config is checked, resolved for a module, read and saved."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import type_validator
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from ..cards.adapter import complete_card
from ..registry import info_of

Names = list[str] | set[str] | tuple[str, ...] | str
Number = int | float


class FileConfig(PeftConfig):
    """What the configs of both families add to PEFT's: types and numbers are checked, and the model card of a saved
    adapter says how to load it, and what it is.
    """

    # types of fields that PEFT defines and does not check
    inherited: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        peft_type = info_of(type(self)).peft_type
        _check_types(self)
        _check_values(self)
        super().__post_init__()
        self.peft_type = peft_type

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in PEFT; a model card beside it is filled in, see `complete_card`."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        if card.is_file():
            complete_card(card, self)


@dataclasses.dataclass
class AdapterConfig(FileConfig):
    """Base of the configs of all methods that own their tensors.

    Args:
        target_modules: names, a regex, or `"all-linear"`; default: PEFT's targets of LoRA for the architecture.
        target_parameters: stacked weights of fused experts, such as `["mlp.experts.gate_up_proj"]`, as in PEFT's LoRA.
        exclude_modules: names or a regex of modules that are left alone.
        layers_to_transform: indices of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where it is not found by itself.
        modules_to_save: modules that are trained and saved whole, e.g. a classifier head.
        bias: `"none"`, `"all"`, or `"<method>_only"`: which biases of the base model are trained.
        init_weights: `True` starts as the base model; `False` starts with a random delta (for tests).
        trainable_token_indices: rows of the input embeddings (or, by name, of other ones) that are trained and saved.
        ensure_weight_tying: whether `modules_to_save` that the base model ties stay tied.
        layer_replication: as in PEFT's LoRA, `[(start, end), ...]` of the layers that the model is rebuilt from.
        combined_rank: of what `add_weighted_adapter` made the rank of its LoRA factors, which stand where the method's
            own tensors do; default: none.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.
    """

    target_modules: Names | None = dataclasses.field(
        default=None, metadata={"help": "Names or regex of the modules to adapt, or 'all-linear'."}
    )
    target_parameters: list[str] | set[str] | tuple[str, ...] | None = dataclasses.field(
        default=None, metadata={"help": "Names of stacked parameters of fused experts to adapt."}
    )
    exclude_modules: Names | None = dataclasses.field(
        default=None, metadata={"help": "Names or regex of modules that are not adapted."}
    )
    layers_to_transform: list[int] | int | None = dataclasses.field(
        default=None, metadata={"help": "Indices of the layers to adapt; all when None."}
    )
    layers_pattern: list[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Name of the list of layers, used with `layers_to_transform`."}
    )
    modules_to_save: list[str] | set[str] | tuple[str, ...] | None = dataclasses.field(
        default=None, metadata={"help": "Modules that are trained and saved whole, e.g. a classifier head."}
    )
    bias: str = dataclasses.field(
        default="none", metadata={"help": "Biases of the base model to train: 'none', 'all' or '<method>_only'."}
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata={"help": "True: start as the base model. False: start with a random delta (tests)."}
    )

    trainable_token_indices: list[int] | dict[str, list[int]] | None = dataclasses.field(
        default=None, metadata={"help": "Rows of the embeddings that are trained too."}
    )
    ensure_weight_tying: bool = dataclasses.field(
        default=False, metadata={"help": "Whether modules to save that the base model ties stay tied."}
    )
    layer_replication: list[tuple[int, int] | list[int]] | None = dataclasses.field(
        default=None, metadata={"help": "Ranges of layers that the model is rebuilt from."}
    )

    combined_rank: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Rank of a weighted sum of adapters, which is a LoRA; set by `add_weighted_adapter`."},
    )

    # config field holding a pattern -> config field that a match overrides
    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    def for_module(self, key: str) -> AdapterConfig:
        """This config as it applies to the module called `key`: a copy where patterns match, with their values."""
        changes = {}
        for pattern_field, target in self.pattern_fields.items():
            pattern = getattr(self, pattern_field, None) or {}
            match = get_pattern_key(list(pattern), key)
            if match in pattern:
                changes[target] = pattern[match]
        return dataclasses.replace(self, **changes) if changes else self


@cache
def _own_types(cls: Any) -> dict[str, Any]:
    """Type of each field that `cls` and its bases outside PEFT define, or give a type by `inherited`."""
    hints = {**cls.inherited}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("peft."):
            hints.update(inspect.get_annotations(base, eval_str=True))
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name in hints}


def _check_types(config: Any) -> None:
    for name, expected in _own_types(config.__class__).items():
        value = getattr(config, name)
        try:
            if isinstance(value, bool) and not _admits_bool(expected):  # a bool is an int to Python, not to a user
                raise TypeError
            type_validator(name, value, expected)
        except TypeError:
            shown = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
            raise TypeError(f"{type(config).__name__}: `{name}` must be of type {shown}, got {value!r}.") from None


def _check_values(config: Any) -> None:
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a string (a regex).")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("`layers_pattern` needs `layers_to_transform`.")
    if config.bias not in ("none", "all") and not config.bias.endswith("_only"):
        raise ValueError(f"`bias` must be 'none', 'all' or end in '_only', got {config.bias!r}.")
    for name in (f.name for f in dataclasses.fields(config)):
        _check_numbers(name, getattr(config, name))
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None)
        for pattern in [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{name}`: {pattern!r} is no regular expression ({error}).") from None


def _check_numbers(name: str, value: Any) -> None:
    """Every number is finite; ranks are positive, and dropouts are probabilities."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(part, (list, tuple)):
            _check_numbers(name, part)
        if isinstance(part, bool) or not isinstance(part, int | float):
            continue
        if isinstance(part, int) and abs(part) >= 2**63:
            raise ValueError(f"`{name}` must be less than 2**63, got an integer of {part.bit_length()} bits.")
        if not math.isfinite(part):
            raise ValueError(f"`{name}` must be finite, got {value}.")
        if name in ("r", "rank_pattern", "combined_rank") and part <= 0:
            kind = "a positive integer" if name != "rank_pattern" else "positive"
            raise ValueError(f"`{name}` must be {kind}, got {value}.")
        if name in ("alpha", "lora_alpha", "alpha_pattern") and part == 0:
            raise ValueError(f"`{name}` must not be zero, got {value}: the delta would stay zero.")
        if name.endswith("dropout") and not 0 <= part < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
        if name in ("layers_to_transform", "trainable_token_indices", "layer_replication") and part < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def _admits_bool(expected: Any) -> bool:
    args = typing.get_args(expected)
    return expected in (bool, Any) or any(arg in (True, False) or _admits_bool(arg) for arg in args)
