"""From a trained model to a smaller one: choose layers and ranks, factorise, replace."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..cards.compressed import keep_card
from ..utils import base_of, innermost
from .checks import check_choice, check_flag, check_folder, check_number, check_whole, shown
from .experts import LowRankExperts, LowRankStack, put_thin
from .factorize import METHODS, SIDES, Factors, solve
from .layers import layers_in, shape_of, target_layers
from .linear import LowRankLinear
from .loader import LowRankConfig
from .ranks import allocate, largest, price_of, rank_for, saves
from .report import LayerReport, Report
from .shelf import Shelf, shelf
from .stacks import Layer, Stack, called, other_stacks
from .statistics import Statistics
from .weightings import Piece, Weightings, naming, pieces_of

logger = logging.get_logger(__name__)

ALLOCATIONS = ("uniform", "global")
UNDECORATED = "experts that transformers does not decorate by `use_experts_implementation`"


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
    randomized: bool | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> tuple[Any, Report]:
    """Replaces linear layers of a trained model by products of two thin ones, in place; of a mixture also the stacks of
    its experts, each by two thin stacks, which all experts of the stack have in one rank.

    Adapters are merged first, as by `merge_and_unload`: a `PeftModel` is used up, go on with the model returned. The
    factors are trainable; what an adapter's training has frozen beside them stays frozen. Everything is checked and
    computed before a layer is replaced, so an error or an interruption leaves the model as it was (at worst merged,
    where a merged weight is not finite).

    Memory beside the model: one layer's work, and of a stack one expert's. Finished factors wait in files, and then
    replace the weights layer by layer, each of which is freed before the next one is read.

    An expert that no token of the statistics reached is decomposed by the mean of the sums over those of its stack that
    have some; `LayerReport.unseen` has the numbers of such experts.

    Args:
        model: a transformers model or `PeftModel` around one (or any module, without `from_pretrained`); whole, in
            memory, not wrapped or split.
        statistics: of this model, from `collect` or a `FisherCallback`; svd needs none.
        keep: share of the factorised layers' entries to keep, in (0, 1). Every other layer stays, so the whole model
            keeps more: `Report.summary` has both.
        method: "fwsvd" (arXiv:2207.00112), "svd", "asvd" (arXiv:2312.05821) or "svd-llm" (arXiv:2403.07378). Fisher
            information needs labels and knows the loss; the last two need inputs only.
        allocation: "uniform", the share `keep` of each layer, which is FWSVD's setting as we recall it; or "global",
            as many parameters in all, given to the directions worth most for each parameter, whatever layer they are
            in. That decomposes whole layers exactly.
        side: fwsvd's importances, of inputs ("in", as we recall the paper's), outputs ("out") or "both".
        alpha: asvd's exponent, default 0.5, as we recall the paper's.
        target_modules, exclude_modules: names or a regex, as in PEFT; default: all linear layers of the blocks, and
            all stacks of experts (`target_layers`).
        randomized: decompose by random projections, see `factorize`; an error about one per cent above the least one.
            Default: for more than 2^22 entries where it takes less than half the operations, as for a square layer
            that keeps a third of its rank. False: never.
        folder: of finished layers, which stay there: after an interruption the same call on the same model takes them
            from it. They are bound to the weights, the statistics and the settings; others are made again. Default: a
            temporary folder. Either needs as much space as the factors, for "global" at most as the weights.
        progress: show a bar with the time left.

    Returns:
        The model, and what was done to it.

    Raises:
        ValueError: an argument out of range; the model is quantised, compressed, compiled, wrapped, offloaded, or has
            adapters outside a `PeftModel`; the statistics are another model's, miss a layer, are all zero or not
            finite; a weight is not finite; nothing can be made smaller; `folder` holds something else or is full.
        NotImplementedError: the adapter cannot be merged.
    """
    check_settings(keep, method, allocation, side, alpha)
    keep = float(keep)
    check_flag("randomized", randomized, none=True)
    check_flag("progress", progress)
    check_folder("folder", folder)
    if statistics is not None and not isinstance(statistics, Statistics):
        raise ValueError(f"statistics must be Statistics, as of Statistics.load(path), got {type(statistics).__name__}")
    base = _bare(model)
    chosen, skipped = _choose(model, keep, target_modules, exclude_modules)
    if statistics is not None:
        statistics.check(model)
    elif method != "svd":
        raise ValueError(f"{method} needs statistics: peftx.compression.collect(model, ...), or a FisherCallback")
    layers = layers_in(base)
    shapes = {name: shape_of(layers[name]) for name in chosen}
    how: dict[str, Any] = {"side": side, "alpha": float(alpha)}
    weightings = Weightings(method, statistics, shapes, how)
    for name in chosen:
        for piece in pieces_of(name, shapes[name]):
            weightings.check(piece)
        if not all(bool(part.isfinite().all()) for part in _tensors(layers[name])):
            raise ValueError(f"{name}: its weight has NaN or infinity")

    if isinstance(model, PeftModel):
        base = model.merge_and_unload(progressbar=False, safe_merge=True)
    layers = {name: layer for name, layer in layers_in(base).items() if name in shapes}
    before, spread = count(base), allocation == "global"
    found = {name: largest(*shape[-2:]) if spread else rank_for(keep, *shape[-2:]) for name, shape in shapes.items()}
    exact = False if spread else randomized
    with shelf(folder, sum(_bytes(layers[name], rank) for name, rank in found.items())) as done:
        with _bar(shapes, method, progress) as bar:
            for name, rank in found.items():
                for piece in pieces_of(name, shapes[name]):
                    weight = _weight(layers[name], piece.expert)
                    _finish(weight, piece, rank, weightings, done, randomized=exact)
                    bar.update(weight.numel())
        ranks: dict[str, int | None] = dict(found)
        if spread:
            budget = sum(rank_for(keep, *shape[-2:]) * price_of(shape) for shape in shapes.values())
            worth = {name: _worth(pieces_of(name, shape), weightings, done) for name, shape in shapes.items()}
            ranks = allocate(worth, shapes, budget)
        del layers, weight  # or a replaced weight would stay
        rows = _replace(base, ranks, weightings, done)
    if (config := _config(base)) is not None:
        kept = {name: rank for name, rank in ranks.items() if rank is not None}
        config.quantization_config = LowRankConfig(kept, method, keep)
        keep_card(base, str(getattr(config, "_name_or_path", "")))
    _log(skipped)
    report = Report(method, keep, allocation, rows, (before, count(base)), skipped)
    if lacking := sum(len(row.unseen) for row in rows.values()):
        logger.warning(
            f"{lacking} experts got no token in the statistics, and are decomposed by the mean of the others of their "
            "stack: print(report) has their numbers"
        )
    logger.info(report.summary())
    return base, report


def _finish(
    weight: Tensor, piece: Piece, rank: int, weightings: Weightings, done: Shelf, *, randomized: bool | None
) -> None:
    """Makes the factors of a weight (out, in), unless they are there."""
    name = piece.name
    facts = {"method": weightings.method, **weightings.how, "rank": rank, "randomized": randomized, "layer": name}
    origin = done.made_of(weight, facts, weightings.check(piece).values() if done.kept else ())
    if not done.holds(name, rank, origin):
        device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        weights = weightings.of(piece, device, randomized)
        with naming(name):
            done.put(name, solve(weight, rank, weights, randomized=randomized), origin)


def _worth(pieces: Sequence[Piece], weightings: Weightings, done: Shelf) -> Tensor:
    """Of each direction of a layer, or of all experts of a stack together."""
    first, *others = (done.values(piece.name).square() * weightings.scale(piece) for piece in pieces)
    return sum(others, first)


def _replace(
    base: nn.Module, ranks: Mapping[str, int | None], weightings: Weightings, done: Shelf
) -> dict[str, LayerReport]:
    """Puts the factors of these ranks in the places of the layers, one after the other."""
    rows: dict[str, LayerReport] = {}
    made = 0
    for name, rank in ranks.items():
        error, shape = 0.0, weightings.shapes[name]
        if rank is not None:
            try:
                if len(shape) > 2:
                    error = _thin(base, name, rank, weightings, done)
                else:
                    factors = done.get(name).at(rank)
                    low, error = _layer(base.get_submodule(name), factors), factors.error
                    base.set_submodule(name, low)
            except BaseException:
                if made:
                    logger.error(
                        f"compress was interrupted when {made} of {len(ranks)} layers were replaced: load the model "
                        "again (finished layers that a folder= holds need not be made again)"
                    )
                raise
            made += 1
        rows[name] = LayerReport(shape, rank, error, () if rank is None else weightings.unseen(name))
    return rows


@torch.no_grad()
def _thin(base: nn.Module, name: str, rank: int, weightings: Weightings, done: Shelf) -> float:
    """Puts factors in the place of a stack of experts, and gives the error of all of them together."""
    parent, _, key = name.rpartition(".")
    low = LowRankStack.like(Stack(base.get_submodule(parent), key), rank)
    lost = energy = 0.0
    for piece in pieces_of(name, weightings.shapes[name]):
        factors, scale = done.get(piece.name).at(rank), weightings.scale(piece)
        low.down[piece.expert].copy_(factors.down)
        low.up[piece.expert].copy_(factors.up.T)
        lost, energy = lost + scale * factors.error**2 * factors.energy, energy + scale * factors.energy
    put_thin(base, name, low)
    return math.sqrt(lost / energy) if energy else 0.0


def _bar(shapes: Mapping[str, tuple[int, ...]], method: str, progress: bool) -> Any:
    entries = sum(math.prod(shape) for shape in shapes.values())
    return tqdm(total=entries, desc=method, unit=" entries", unit_scale=True, disable=not progress)


def _tensors(layer: Layer) -> list[Tensor]:
    if isinstance(layer, Stack):
        bias = getattr(layer.base, f"{layer.name}_bias", None)
        return [layer.parameter] if bias is None else [layer.parameter, bias]
    return list(layer.parameters())


def _weight(layer: Any, expert: int | None) -> Tensor:
    """(out, in)."""
    if isinstance(layer, Stack):
        return layer.weight()[expert]
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _bytes(layer: Layer, rank: int) -> int:
    shape = shape_of(layer)
    return rank * price_of(shape) * _tensors(layer)[0].itemsize + 2**12 * math.prod(shape[:-2])


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
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep < 1:
        raise ValueError(f"keep must be a share in (0, 1), got {shown(keep)}")
    check_choice("method", method, METHODS)
    check_choice("allocation", allocation, ALLOCATIONS)
    check_choice("side", side, SIDES)
    check_number("alpha", alpha, least=0)


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
    check_whole(model, "compress it")
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, BaseTuner):
            raise ValueError("this adapter changes no weights and cannot be merged: compress its base model")
        base: nn.Module = model.get_base_model()
    else:
        base = model
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model has adapters outside a PeftModel: merge or remove them first")
    config = getattr(_config(base), "quantization_config", None)
    low = LowRankLinear | LowRankExperts
    if isinstance(config, LowRankConfig) or any(isinstance(module, low) for module in base.modules()):
        raise ValueError("the model is compressed already: peftx.compression.materialize(model) makes it dense again")
    if config is not None:
        raise ValueError(
            f"the model is quantised ({type(config).__name__}): load it without quantization_config and compress that"
        )
    return base


def _choose(
    model: nn.Module, keep: float, target_modules: Any, exclude_modules: Any
) -> tuple[list[str], dict[str, str]]:
    """Layers that become smaller, and why the other targets do not.

    Raises:
        ValueError: a layer is quantised; none becomes smaller.
    """
    chosen: list[str] = []
    skipped = {} if target_modules else dict.fromkeys(other_stacks(base_of(model)), UNDECORATED)
    for name, target in target_layers(model, target_modules, exclude_modules).items():
        layer = innermost(called(target))
        shape = shape_of(target)[-2:]
        weight = target.parameter if isinstance(target, Stack) else getattr(layer, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"{name} is quantised ({type(layer).__name__}): load the model without quantization and compress that"
            )
        if not isinstance(target, Stack) and type(layer) not in (nn.Linear, Conv1D):
            skipped[name] = f"a {type(layer).__name__} is no plain Linear"
        elif not saves(rank_for(keep, *shape), *shape):
            skipped[name] = "too small to gain"
        else:
            chosen.append(name)
    if not chosen:
        why = f": {'; '.join(f'{name}: {why}' for name, why in list(skipped.items())[:3])}" if skipped else ""
        raise ValueError(f"no layer can be made smaller{why or ': no linear layer was targeted'}")
    return chosen, skipped
