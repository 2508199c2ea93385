"""Ranks that make methods equal: in rank, or in the number of trained values."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial

import torch
import transformers
from peft import get_peft_model

from ..adapters.experts import fused_experts
from ..utils import AUTO_CLASSES
from .methods import Method, check_settings, find, fit_ranks, peft_config, trainable
from .plan import Plan, skeleton
from .settings import CompareSettings, Section

RANK = 8
LARGEST = 14  # power of 2, above which no rank is tried
Count = Callable[[Method, Section], int | None]


def sized(
    settings: CompareSettings, entries: dict[str, Section], plan: Plan
) -> tuple[dict[str, Section], dict[str, str]]:
    """The entries with ranks as `settings.equal` says, and notes on those that cannot be made equal, by name."""
    if settings.equal == "none":
        return entries, {}
    notes = {name: f"{name} has no rank: it has its own size" for name in entries if find(name).rank_field is None}
    if settings.equal == "rank":
        rank = settings.rank or RANK
        return {name: with_rank(find(name), chosen, rank) for name, chosen in entries.items()}, notes
    names = list(entries)
    first = with_rank(find(names[0]), entries[names[0]], settings.rank) if settings.rank else entries[names[0]]
    result = {**entries, names[0]: first}
    count = counter(settings, plan)
    budget = count(find(names[0]), first)
    if budget is None:
        raise ValueError(f"method {names[0]} does not fit the model, so there is no budget: name another first")
    for name in names[1:]:
        method = find(name)
        if method.rank_field is None:
            continue
        rank, found = closest_rank(partial(values, count, method, entries[name]), budget)
        if rank:  # else the method does not fit, which its run will say
            result[name] = with_rank(method, entries[name], rank)
            if abs(found - budget) > 0.1 * budget:
                notes[name] = f"{name} comes no nearer to the budget of {budget:,} values than {found:,}"
    return result, notes


def values(count: Count, method: Method, settings: Section, rank: int) -> int | None:
    return count(method, with_rank(method, settings, rank))


def with_rank(method: Method, settings: Section, rank: int) -> Section:
    """The settings with this rank; LoRA's alpha, unless it is named, keeps its default ratio to the rank."""
    if method.rank_field is None:
        return settings
    defaults = {f.name: f.default for f in dataclasses.fields(method.config)}  # type: ignore[arg-type]
    defaults |= dict(method.settings)
    chosen = {**settings, method.rank_field: rank}
    alpha, r = defaults.get("lora_alpha"), defaults.get(method.rank_field)
    if "lora_alpha" not in settings and isinstance(alpha, int) and isinstance(r, int):
        chosen["lora_alpha"] = max(1, round(alpha * rank / r))
    return chosen


def closest_rank(count: Callable[[int], int | None], budget: int) -> tuple[int, int]:
    """The rank with the number of values nearest to the budget, and this number; zeros where no rank works.

    `count` grows with the rank, and is None for one that the method refuses: then smaller ones are tried.
    """
    counts: dict[int, int | None] = {}
    for rank in (2**power for power in range(LARGEST + 1)):
        found = counts[rank] = count(rank)
        if (found or 0) >= budget or (rank > 64 and found is None):
            break
    low = max((r for r, c in counts.items() if c is not None and c <= budget), default=0)
    high = min((r for r in counts if r > low), default=low)
    while high - low > 1:
        middle = (low + high) // 2
        counts[middle] = found = count(middle)
        if found is not None and found <= budget:
            low = middle
        else:
            high = middle
    valid = [(abs(c - budget), r, c) for r, c in counts.items() if c is not None]
    return min(valid, default=(0, 0, 0))[1:]


def counter(settings: CompareSettings, plan: Plan) -> Count:
    """What counts the values that a method trains on the model, without a new classifier; None if it does not fit.

    The model is on the meta device, without its weights. A method that needs weights to start (LoLDU) gets random ones.
    """
    network, new_modules = skeleton(settings, plan)
    cls = getattr(transformers, AUTO_CLASSES[plan.task])
    experts = fused_experts(network) if settings.experts else []

    def count(method: Method, chosen: Section) -> int | None:
        if method.config is None:
            return sum(p.numel() for p in network.parameters())
        for device in ("meta", "cpu"):
            with torch.random.fork_rng(devices=[]), torch.device(device):
                base = cls.from_config(network.config)
            adapter = peft_config(method, check_settings(method, chosen), plan.task, new_modules, experts)
            fit_ranks(adapter, method, chosen, base)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return trainable(get_peft_model(base, adapter))[0]
            except Exception as error:
                if "meta" not in str(error) and not isinstance(error, NotImplementedError):
                    return None
        return None

    return count
