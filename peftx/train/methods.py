"""Methods by name: those of peftx, those of PEFT, and training in full; and their configs for a model."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..registry import is_native, methods
from .settings import Section, checked, nearest

FULL = "full"
NATIVE_RATE = 2e-3  # as of the peftx methods without a rate of their own, so that a comparison is one of methods
FULL_RATE = 5e-5  # of TrainingArguments
RATES = {"miss": 3e-4}  # PEFT's own where that is too much: MiSS adds its block unscaled, as Bone does
# Other names of one method's modes.
ALIASES: dict[str, tuple[str, Section]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}
# Methods whose modules are not the linear layers: their own default counts.
OTHER_TARGETS = ("adaption_prompt", "beft", "compacter", "ia3", "ln_tuning", "shadow", "trainable_tokens", "xlora")
# Methods whose rank is bounded by the sides (input, output) of a weight.
BOUNDED: dict[str, Callable[[int, int], int]] = dict.fromkeys(("fedsvd", "flora", "loldu", "psoft"), min)
BOUNDED["miss"] = lambda into, out: into
# Fields of a config that the run sets.
OURS = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


@dataclass(frozen=True)
class Method:
    """A method that can be trained.

    Attributes:
        name: as the user said it.
        config: its PEFT config class; None where all weights are trained.
        settings: arguments of the config that the name stands for, or that a run sets.
        learning_rate: for AdamW, unless the user names one.
        callback: makes what drives the method's own rule in the Trainer.
        rank_field: the config's field that sets the size; None where there is none.
    """

    name: str
    config: type[PeftConfig] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = NATIVE_RATE
    callback: type[TrainerCallback] | None = None
    rank_field: str | None = None


class AdaLoraCallback(TrainerCallback):
    """Lets PEFT's AdaLoRA allocate its ranks after each optimizer step, over the steps of this training.

    Raises:
        ValueError: at the start, where the training is no longer than AdaLoRA's phases without allocation.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = model.active_peft_config
        if config.tinit >= state.max_steps - config.tfinal:
            raise ValueError(
                f"AdaLoRA's tinit={config.tinit} and tfinal={config.tfinal} leave no step of {state.max_steps}"
            )
        config.total_step = state.max_steps

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def known() -> dict[str, Method]:
    """All methods by name: peftx's with their variants, PEFT's, aliases and `full`."""
    found: dict[str, Method] = {}
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if is_native(name := PeftType(peft_type).value.lower()):
            rank = "r" if "r" in {f.name for f in dataclasses.fields(config)} else None
            callback = AdaLoraCallback if name == "adalora" else None
            found[name] = Method(name, config, {}, RATES.get(name, NATIVE_RATE), callback, rank)
    for alias, (name, settings) in ALIASES.items():
        found[alias] = dataclasses.replace(found[name], name=alias, settings=settings)
    for info in methods():
        names = {f.name for f in dataclasses.fields(info.config)}
        rank = next((f for f in reversed(info.rank_fields) if f in names), None)
        variants: dict[str, Mapping[str, Any]] = dict(info.variants)
        if key(info.name) not in map(key, variants):
            variants = {info.name: {}, **variants}
        for name, stands_for in variants.items():
            settings = {**info.train_settings, **stands_for}
            found[name] = Method(name, info.config, settings, info.learning_rate, info.callback, rank)
    found[FULL] = Method(FULL, None, {}, FULL_RATE)
    return found


def key(name: str) -> str:
    """Names are equal whatever their case and whether `-` or `_` stands between their parts."""
    return name.strip().lower().replace("_", "-")


def find(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: there is none; the nearest name is in the message.
    """
    table = {key(known_name): method for known_name, method in known().items()}
    if (method := table.get(key(name))) is None:
        raise ValueError(f"unknown method {name!r}{nearest(name, table)}; `peftx methods` lists those of peftx")
    return method


def first_variants() -> list[str]:
    """LoRA, and one variant of each method of peftx."""
    return ["lora", *(next(iter(info.variants), info.name) for info in methods())]


def check_settings(method: Method, settings: Section) -> Section:
    """The settings of a method, those that its name stands for among them, checked against its config's fields.

    Raises:
        ValueError: an unknown field, or a value of the wrong type; `full` has no field.
    """
    if method.config is None:
        return checked(settings, {}, "method full")
    hints = typing.get_type_hints(method.config)
    types = {f.name: hints[f.name] for f in dataclasses.fields(method.config) if f.init and f.name not in OURS}
    return {**method.settings, **checked(settings, types, f"method {method.name}")}


def peft_config(
    method: Method, settings: Section, task: str, new_modules: Sequence[str] = (), experts: Sequence[str] = ()
) -> PeftConfig:
    """The config of a method for a model.

    All linear layers are adapted unless `settings` name targets, or the method has others. Modules that the checkpoint
    did not fill, such as a new classifier, are trained and saved whole. Of fused experts those named are adapted too.

    Raises:
        ValueError: the config does not take its settings, or has no form for experts.
    """
    assert method.config is not None
    names = {f.name for f in dataclasses.fields(method.config)}
    arguments: dict[str, Any] = dict(settings)
    peft_type = method.config.__name__
    if "target_modules" in names and key(other_name(method)) not in map(key, OTHER_TARGETS):
        arguments.setdefault("target_modules", "all-linear")
    if new_modules and "modules_to_save" in names and arguments.get("modules_to_save") is None:
        arguments["modules_to_save"] = list(new_modules)
    if experts:
        if "target_parameters" not in names:
            raise ValueError(f"method {method.name} has no form for fused experts: leave out `experts`")
        arguments.setdefault("target_parameters", list(experts))
    if method.callback is AdaLoraCallback:  # which sets it at the start of the training
        arguments.setdefault("total_step", arguments.get("tinit", 0) + arguments.get("tfinal", 0) + 1)
    try:
        return method.config(task_type=task, **arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"method {method.name}: {str(error).removeprefix(f'{peft_type}: ')}") from error


def fit_ranks(config: Any, method: Method, settings: Section, network: nn.Module) -> dict[str, int]:
    """Lowers a default rank to what narrower targets can have: of these alone, or of all without a `rank_pattern`.

    A rank that `settings` name stays, and LoRA's alpha keeps its ratio to the rank unless they name it.

    Returns:
        The targets whose rank is lower now, by the last parts of their names where these tell them, and their ranks.
    """
    bound = BOUNDED.get(key(other_name(method)))
    if bound is None or method.rank_field is None or method.rank_field in settings:
        return {}
    rank, named = getattr(config, method.rank_field), dict(getattr(config, "rank_pattern", None) or {})
    sizes = {name: bound(*sides) for name, sides in targets(config, network) if get_pattern_key([*named], name) == name}
    ends: dict[str, set[int]] = {}
    for name, size in sizes.items():
        ends.setdefault(name.rpartition(".")[2], set()).add(size)
    narrow = {}
    for name, size in sizes.items():
        end = name.rpartition(".")[2]
        if size < rank:
            narrow[end if len(ends[end]) == 1 else name] = size
    if not narrow:
        return {}
    if not hasattr(config, "rank_pattern"):
        setattr(config, method.rank_field, min(narrow.values()))
        return narrow
    config.rank_pattern = {**named, **narrow}
    alpha = getattr(config, "lora_alpha", None)
    if alpha is not None and not {"lora_alpha", "alpha_pattern"} & {*settings}:
        config.alpha_pattern = {name: alpha * size / rank for name, size in narrow.items()}
    return narrow


def targets(config: PeftConfig, network: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and sides (input, output) of the linear layers, Conv1D among them, and embeddings that a config targets."""
    config = _maybe_include_all_linear_layers(copy.copy(config), network)
    whole = {*(getattr(config, "modules_to_save", None) or ())}
    for name, module in network.named_modules():
        if isinstance(module, Conv1D):
            sides = tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            sides = (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.Linear):  # bitsandbytes' too, whose weights have other shapes
            sides = (module.in_features, module.out_features)
        else:
            continue
        if whole.isdisjoint(name.split(".")) and check_target_module_exists(config, name):
            yield name, (int(sides[0]), int(sides[1]))


def other_name(method: Method) -> str:
    """The peft type of a method, which its variants share, in lower case."""
    kinds = {config: PeftType(peft_type).value.lower() for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return kinds[method.config] if method.config else ""


def trainable(model: nn.Module) -> tuple[int, int]:
    """Trained values: of the adapter (or of the model, where it has none), and of modules that are trained whole."""
    wrapped = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    whole = {id(p): p.numel() for module in wrapped for p in module.parameters() if p.requires_grad}
    own = {id(p): p.numel() for p in model.parameters() if p.requires_grad and id(p) not in whole}
    return sum(own.values()), sum(whole.values())


def owners(parameters: Iterable[str], model: nn.Module) -> list[str]:
    """The outermost modules all of whose parameters are among the named ones."""
    missing = set(parameters)

    def inside(module: nn.Module, name: str) -> list[str]:
        names = [f"{name}.{part}" if name else part for part, _ in module.named_parameters()]
        if not any(part in missing for part in names):
            return []
        if name and all(part in missing for part in names):
            return [name]
        children = [(child, f"{name}.{part}" if name else part) for part, child in module.named_children()]
        return [found for child, path in children for found in inside(child, path)]

    return list(dict.fromkeys(inside(model, "")))


def dtype_of(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)
