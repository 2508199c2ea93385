"""Arguments, checked where they are given: one error, with the name of the argument and its value."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

from torch import nn

from ..utils import base_of
from .head import TASKS
from .probe import METRICS

ETA_LIMIT = 1e6  # of a step that is meant to be small
SEED_LIMIT = 2**63


def check_whole(name: str, value: Any, low: int = 1, limit: float = math.inf) -> None:
    """A whole number from `low` to below `limit`; True is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {short(value)}")
    if not low <= int(value) < limit:
        bounds = f"at least {low}" if int(value) < low else f"below {int(limit)}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")


def check_flag(name: str, value: Any, other: Sequence[Any] = ()) -> None:
    if not isinstance(value, bool) and value not in other:
        raise ValueError(f"{name} must be {', '.join(map(str, (True, False, *other)))}, got {short(value)}")


def check_name(name: str, value: Any) -> None:
    """None, or a name."""
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"{name} must be a name, got {short(value)}")


def check_choice(name: str, value: Any, choices: Sequence[str], other: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        *most, last = [*map(repr, choices), *([other] if other else [])]
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {short(value)}")


def check_probe(batch_size: Any, eta: Any, reduction: Any, task: Any, head: Any, seed: Any) -> None:
    """The arguments that scores depend on."""
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    number = isinstance(eta, numbers.Real) and not isinstance(eta, bool)
    if not number or not 0 < float(eta) <= ETA_LIMIT:
        raise ValueError(f"eta must be a positive number of at most {ETA_LIMIT:g}, got {short(eta)}")
    check_choice("reduction", reduction, ("mean", "sum"))
    if task is not None and not (isinstance(task, str) and task in TASKS):
        raise ValueError(f"unknown task {short(task)}: one of {', '.join(TASKS)}")
    check_name("head", head)
    check_whole("seed", seed, 0, SEED_LIMIT)


def check_metrics(metrics: Any) -> tuple[str, ...]:
    """The names of scores, each once."""
    if isinstance(metrics, str | Mapping) or not hasattr(metrics, "__iter__"):
        raise ValueError(f"metrics must be a list of {', '.join(METRICS)}, got {short(metrics)}")
    names = list(metrics)
    if unknown := [name for name in names if not isinstance(name, str) or name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(map(short, unknown))}: one of {', '.join(METRICS)}")
    return tuple(dict.fromkeys(names))


def check_indices(indices: Any, count: int) -> Sequence[int]:
    """Indices into `count` samples, as a range or a list."""
    numbers_: Sequence[int]
    if isinstance(indices, range):
        wrong = [place for place in (indices[:1], indices[-1:]) if len(place) and not 0 <= place[0] < count]
        numbers_, odd = indices, wrong[0][0] if wrong else None
    else:
        try:
            numbers_ = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        except TypeError:
            raise ValueError(f"indices must be whole numbers, got {short(indices)}") from None
        odd = next((i for i in numbers_ if isinstance(i, bool) or not isinstance(i, numbers.Integral)), None)
        if odd is not None:
            raise ValueError(f"indices must be whole numbers, got {short(odd)}")
        odd = next((i for i in numbers_ if not 0 <= i < count), None)
    if odd is not None:
        raise ValueError(f"indices must be from 0 to {count - 1}, got {odd}")
    return numbers_


def check_callable(name: str, value: Callable | None) -> None:
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be something to call, got {short(value)}")


def check_model(model: nn.Module, task: str, metrics: Sequence[str], sharded: bool = False) -> None:
    """Raises ValueError where the model, as it is, has no such scores."""
    if sharded or any(hasattr(part, "ds_id") or type(part).__name__ == "DTensor" for part in model.parameters()):
        raise ValueError(
            "the model is split over processes (DeepSpeed ZeRO-3 or FSDP): select on the whole model first, with "
            "peftx.pruning.score_dataset or `peftx prune`, and train on dataset.select(indices)"
        )
    config = getattr(base_of(model), "config", None)
    problem = getattr(config, "problem_type", None)
    if getattr(config, "num_labels", None) == 1:  # what transformers then assumes
        problem = "regression"
    if task == "SEQ_CLS" and problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"the scores are for one label a sample (softmax and cross-entropy), not for {problem}, nor for rewards: "
            "select with another model, by peftx.pruning.score_dataset, and train on dataset.select(indices)"
        )
    if "ifd" in metrics and task != "CAUSAL_LM":
        raise ValueError(f"ifd compares answers with and without their prompt: causal language models only, not {task}")
    if "grand_full" in metrics and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("grand_full is the gradient of the parameters that train, and none does")
