"""From a trained model to a smaller one: choose layers and ranks, factorise, replace."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..cards.compressed import keep_card
from .factorize import METHODS, SIDES, Factors, Weighting, allocate, rank_for, saves, solve, spectrum, weighting_for
from .linear import LowRankLinear
from .loader import LowRankConfig
from .report import LayerReport, Report
from .statistics import Statistics, base_layer, is_compiled, shape_of, target_layers

logger = logging.get_logger(__name__)

ALLOCATIONS = ("uniform", "global")


def compress(
    model: nn.Module,
    statistics: Statistics | None = None,
    *,
    keep: float,
    method: str = "fwsvd",
    allocation: str = "uniform",
    side: str = "in",
    alpha: float = 0.5,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    randomized: bool = False,
    progress: bool = True,
) -> tuple[Any, Report]:
    """Replaces linear layers of a trained model by products of two thin ones, in place.

    Adapters are merged first, as by `merge_and_unload`: a `PeftModel` is used up, go on with the model returned. The
    factors are trainable; what an adapter's training has frozen beside them stays frozen. Everything is checked and
    computed before a layer is replaced, so an error leaves the model as it was (at worst merged, where a merged weight
    is not finite); for a moment weights and factors are in memory together.

    Args:
        model: a transformers model or `PeftModel` around one (or any module, without `from_pretrained`).
        statistics: of this model, from `collect` or a `FisherCallback`; svd needs none.
        keep: share of the factorised layers' entries to keep, in (0, 1). Every other layer stays, so the whole model
            keeps more: `Report.summary` has both.
        method: "fwsvd" (arXiv:2207.00112), "svd", "asvd" (arXiv:2312.05821) or "svd-llm" (arXiv:2403.07378). Fisher
            information needs labels and knows the loss; the last two need inputs only.
        allocation: "uniform", the share `keep` of each layer as in the papers; or "global", as many parameters in all,
            given to the directions worth most for each parameter, whatever layer they are in.
        side: fwsvd's importances, of inputs ("in", the paper's), outputs ("out") or "both".
        alpha: asvd's exponent, default the paper's 0.5.
        target_modules, exclude_modules: names or a regex, as in PEFT; default: all linear layers of the blocks.
        randomized: decompose by random projections, see `factorize`.
        progress: show a bar.

    Returns:
        The model, and what was done to it.

    Raises:
        ValueError: `keep`, method, allocation, side or alpha out of range; the model is quantised, compressed, or has
            adapters outside a `PeftModel`; the statistics are another model's, miss a layer, are all zero or not
            finite; a weight is not finite; nothing can be made smaller.
        NotImplementedError: the adapter cannot be merged.
    """
    check_settings(keep, method, allocation, side, alpha)
    base = _bare(model)
    chosen, skipped = _choose(model, base, keep, target_modules, exclude_modules)
    if statistics is not None:
        statistics.check(model)
    elif method != "svd":
        raise ValueError(f"{method} needs statistics: peftx.compression.collect(model, ...), or a FisherCallback")
    shapes = {name: shape_of(base.get_submodule(name)) for name in chosen}

    def weights(name: str) -> Weighting:
        known = None if statistics is None else statistics.get(name)
        if known is None and method != "svd":
            raise ValueError(f"{name}: no statistics for this layer; collect them with the same target_modules")
        with _naming(name):
            return weighting_for(method, known, shapes[name], side=side, alpha=alpha)

    for name in chosen:  # all of them are tried before the model is touched, and made again one by one
        weights(name)
        if not all(bool(p.isfinite().all()) for p in base.get_submodule(name).parameters()):
            raise ValueError(f"{name}: its weight has NaN or infinity")

    if isinstance(model, PeftModel):
        base = model.merge_and_unload(progressbar=False, safe_merge=True)
    before, layers = count(base), {name: base.get_submodule(name) for name in chosen}
    ranks: dict[str, int | None] = {name: rank_for(keep, *shape) for name, shape in shapes.items()}
    if allocation == "global":
        budget = sum(rank_for(keep, *shape) * sum(shape) for shape in shapes.values())
        spectra = {}
        for name, layer in tqdm(layers.items(), desc="spectra", unit="layer", disable=not progress):
            with _naming(name):
                spectra[name] = spectrum(_weight(layer), weights(name)).cpu()
        ranks = allocate(spectra, shapes, budget)
    made, rows = {}, {}
    for name, layer in tqdm(layers.items(), desc=method, unit="layer", disable=not progress):
        rank, error = ranks[name], 0.0
        if rank is not None:
            with _naming(name):
                factors = solve(_weight(layer), rank, weights(name), randomized=randomized)
            made[name], error = _layer(layer, factors), factors.error
        rows[name] = LayerReport(shapes[name], rank, error)

    for name, low in made.items():
        base.set_submodule(name, low)
    if (config := _config(base)) is not None:
        config.quantization_config = LowRankConfig({name: low.rank for name, low in made.items()}, method, keep)
        keep_card(base, str(getattr(config, "_name_or_path", "")))
    _log(skipped)
    report = Report(method, keep, allocation, rows, (before, count(base)), skipped)
    logger.info(report.summary())
    return base, report


@torch.no_grad()
def _layer(layer: Any, factors: Factors) -> LowRankLinear:
    low = LowRankLinear.like(layer, factors.down.shape[0])
    low.down.weight.copy_(factors.down)
    low.up.weight.copy_(factors.up)
    if layer.bias is not None:
        low.up.bias.copy_(layer.bias)
    return low


def _log(skipped: Mapping[str, str]) -> None:
    reasons = defaultdict(list)
    for name, why in skipped.items():
        reasons[why].append(name)
    for why, names in reasons.items():
        logger.warning(f"compress leaves as they are, {why}: {', '.join(names)}")


def check_settings(keep: float, method: str, allocation: str = "uniform", side: str = "in", alpha: float = 0.5) -> None:
    """Raises:
    ValueError: a setting of `compress` is out of range.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1:
        raise ValueError(f"keep must be a share in (0, 1), got {keep!r}")
    for name, value, known in (
        ("method", method, METHODS),
        ("allocation", allocation, ALLOCATIONS),
        ("side", side, SIDES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a number of at least 0, got {alpha!r}")


def count(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _bare(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, or itself.

    Raises:
        ValueError: it cannot be compressed.
    """
    if is_compiled(model):
        raise ValueError("the model is compiled: compress it before torch.compile")
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, BaseTuner):
            raise ValueError("this adapter changes no weights and cannot be merged: compress its base model")
        base: nn.Module = model.get_base_model()
    else:
        base = model
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model has adapters outside a PeftModel: merge or remove them first")
    config = getattr(_config(base), "quantization_config", None)
    if isinstance(config, LowRankConfig) or any(isinstance(module, LowRankLinear) for module in base.modules()):
        raise ValueError("the model is compressed already: peftx.compression.materialize(model) makes it dense again")
    if config is not None:
        raise ValueError(
            f"the model is quantised ({type(config).__name__}): load it without quantization_config and compress that"
        )
    return base


def _choose(
    model: nn.Module, base: nn.Module, keep: float, target_modules: Any, exclude_modules: Any
) -> tuple[list[str], dict[str, str]]:
    """Layers that become smaller, and why the other targets do not.

    Raises:
        ValueError: a layer is quantised or not in memory; none becomes smaller.
    """
    chosen, skipped = [], {}
    for name in target_layers(model, target_modules, exclude_modules):
        layer = base_layer(base.get_submodule(name))
        weight = getattr(layer, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"{name} is quantised ({type(layer).__name__}): load the model without quantization and compress that"
            )
        if type(layer) not in (nn.Linear, Conv1D):
            skipped[name] = f"a {type(layer).__name__} is no plain Linear"
        elif weight.is_meta:
            raise ValueError(f"{name} has no weight in memory (meta device): load the model without offloading")
        elif not saves(rank_for(keep, *shape_of(layer)), *shape_of(layer)):
            skipped[name] = "too small to gain"
        else:
            chosen.append(name)
    if not chosen:
        why = f": {'; '.join(f'{name}: {why}' for name, why in list(skipped.items())[:3])}" if skipped else ""
        raise ValueError(f"no layer can be made smaller{why or ': no linear layer was targeted'}")
    return chosen, skipped


def _weight(layer: Any) -> torch.Tensor:
    """(out, in)."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the layer's name before an error about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
