"""How a class becomes a method of PEFT."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import peft
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from ..registry import MethodInfo, add, check_name, is_native
from .adapter import Adapter
from .experts import OverExperts
from .layer import PORTING, AdapterLayer
from .sites import LinearSite
from .tuner import AdapterModel

T = TypeVar("T", bound=type)


def register(
    name: str,
    *,
    config: type[PeftConfig],
    paper: str,
    summary: str = "",
    tuner: type[AdapterModel] = AdapterModel,
    **capabilities: Any,
) -> Callable[[T], T]:
    """Class decorator that puts a fine-tuning method into PEFT, so that `get_peft_model(model, config)` finds it.

    It decorates either a `peftx.Adapter` subclass, for which layer and tuner classes are made, or a `BaseTuner`
    subclass. Registering the same class again, as `importlib.reload` does, replaces the earlier record. Where PEFT
    itself ships a method called `name`, nothing is registered and a warning says so: PEFT's own always wins.

    Args:
        name: lower-case identifier; the peft type is `name.upper()`, the prefix of all tensors is `name + "_"`.
        config: dataclass derived from `peftx.AdapterConfig` (or from `peft.LoraConfig`).
        paper: the source, e.g. `"arXiv:2409.15371"`.
        summary: one line for tables; default: the first line of the config's docstring.
        tuner: base of the tuner that is made for an adapter class, where it is more than `peftx.AdapterModel`.
        capabilities: the other fields of `MethodInfo`.

    Raises:
        ValueError: `name` is not a lower-case identifier, or another package registered it.
        TypeError: an unknown capability, or a class that is neither of the two.
    """
    check_name(name)

    def decorate(cls: T) -> T:
        if is_native(name):
            warnings.warn(
                f"PEFT {peft.__version__} ships {name.upper()} itself, so peftx does not register "
                f"{cls.__module__}.{cls.__qualname__}: use PEFT's own config class.",
                stacklevel=2,
            )
            return cls
        if not issubclass(cls, (Adapter, BaseTuner)):
            raise TypeError(f"{cls.__name__} is no subclass of peftx.Adapter. {PORTING}")
        experts = False
        if issubclass(cls, Adapter):
            experts = capabilities.get("experts", LinearSite in cls.sites and not cls.no_delta)
        defaults = {"variants": {name: {}}, "mergeable": not getattr(cls, "no_delta", ""), "experts": experts}
        doc = config.__doc__ or name
        if doc.startswith(f"{config.__name__}("):  # a dataclass's signature, where it has no docstring
            doc = name
        first_line = doc.strip().splitlines()[0]
        add(
            MethodInfo(
                name=name,
                config=config,
                model=cls if issubclass(cls, BaseTuner) else model_of(cls, name, config, tuner, experts),
                paper=paper,
                summary=(summary or first_line).rstrip("."),
                **{**defaults, **capabilities},
            )
        )
        return cls

    return decorate


def model_of(
    adapter_cls: type[Adapter], name: str, config: type[PeftConfig], tuner: type[AdapterModel], experts: bool
) -> type[AdapterModel]:
    """The tuner of an adapter class, and the layer in it, placed in the module of the adapter class, where pickle
    finds them."""
    title, module = config.__name__.removesuffix("Config"), adapter_cls.__module__

    def made(kind: str, base: type, doc: str, *bases: type, **attributes: Any) -> Any:
        cls = type(title + kind, (base, *bases), {"__module__": module, "__doc__": doc, **attributes})
        setattr(sys.modules[module], cls.__name__, cls)
        return cls

    layer = made(
        "Layer",
        AdapterLayer,
        f"A layer with `{adapter_cls.__name__}` adapters; see `{config.__name__}`.",
        adapter_cls=adapter_cls,
        adapter_layer_names=(f"{name}_adapter",),
    )
    # `FloraLinear`, `FloraConv`, ...
    layer.by_site = {
        kind: made(kind.__name__.removesuffix("Site"), layer, f"{layer.__doc__[:-1]}, over {kind.shown}.")
        for kind in adapter_cls.sites
    }
    if experts:
        layer.experts_cls = made("ParamWrapper", OverExperts, f"{layer.__doc__[:-1]}, over fused experts.", layer)
        layer.experts_cls.__name__ = "ParamWrapper"  # by which PEFT knows a layer over a parameter
    return made(
        "Model",
        tuner,
        f"Puts `{adapter_cls.__name__}` into a model; see `{config.__name__}`.",
        prefix=f"{name}_",
        tuner_layer_cls=layer,
    )
