"""Metrics by the names that `evaluate` has for them.

The common ones are computed here, by the functions of scikit-learn that evaluate's own scripts call: the same values,
without the Hub. Every other name, and a path, is `evaluate.load`'s, which runs the script that it finds there.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..utils import CLASSIFIERS, quiet
from .rouge import rouge
from .settings import nearest, read_value

Kind = Literal["classes", "scores", "names", "texts"]
# Functions of sklearn.metrics: what they compare, and the arguments that evaluate's scripts pass on.
SKLEARN: dict[str, tuple[str, Kind, tuple[str, ...]]] = {
    "accuracy": ("accuracy_score", "classes", ("normalize",)),
    "balanced_accuracy": ("balanced_accuracy_score", "classes", ("adjusted",)),
    "f1": ("f1_score", "classes", ("pos_label", "average")),
    "precision": ("precision_score", "classes", ("pos_label", "average", "zero_division")),
    "recall": ("recall_score", "classes", ("pos_label", "average", "zero_division")),
    "matthews_correlation": ("matthews_corrcoef", "classes", ()),
    "cohen_kappa": ("cohen_kappa_score", "classes", ("weights",)),
    "roc_auc": ("roc_auc_score", "scores", ("average", "max_fpr", "multi_class")),
}
SCORES = {"prediction_scores", "references"}  # inputs of a module of evaluate
AVERAGED = ("f1", "precision", "recall")  # binary by default, which two classes are; of more, macro
TEXTS = ("rouge", "exact_match")
LESS = ("loss", "perplexity", "mse", "mae", "rmse", "mape", "mase", "smape", "wer", "cer", "ter", "brier_score")
ARGUMENTS = re.compile(r"(?P<name>.+?):(?P<rest>\w+=[^,]*(,\w+=[^,]*)*)")


class MetricError(ValueError):
    """A metric cannot be computed of these answers; of others it may."""


@dataclass(frozen=True)
class Metric:
    """What one `--metric` stands for.

    Attributes:
        name: as it was said.
        suffix: of the keys of its values: what its arguments change.
        kind: what is compared: numbers of classes; probabilities of the classes, (samples, classes); names of classes
            (of tokens, in lists); or texts.
        function: of predictions and references.
    """

    name: str
    suffix: str
    kind: Kind
    function: Callable[[Any, Any], Mapping[str, Any]]

    def compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """Its values by their keys.

        Raises:
            MetricError: it cannot be computed, or is no number.
        """
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.function(predictions, references)
        except Exception as error:  # of a script, which raises what it likes
            raise MetricError(f"metric {self.name} cannot be computed: {error or type(error).__name__}") from error
        values = {f"{name}{self.suffix}": number(value) for name, value in dict(found or {}).items()}
        numbers = {name: value for name, value in values.items() if value is not None}
        if not numbers:
            raise MetricError(f"metric {self.name} gives no number, but {', '.join(values) or 'nothing'}")
        return numbers


def value_of(values: Mapping[str, float], name: str) -> float:
    """One of a model's values; nan where its loss is not finite, and its answers mean nothing."""
    sound = name == "loss" or math.isfinite(values.get("loss", 0.0))
    return values.get(name, math.nan) if sound else math.nan


def number(value: Any) -> float | None:
    """A number, of NumPy too; None where it is none."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value)


def names_of(said: str | Sequence[str] | None) -> list[str]:
    names = [said] if isinstance(said, str) else list(said or ())
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def find_metric(said: str, task: str, classes: int) -> Metric:
    """The metric that is called `said`: a name of evaluate's, or the path of a script, with arguments behind a colon
    where it has some (`f1:average=micro`).

    Args:
        task: of the model.
        classes: of a classifier.

    Raises:
        ValueError: there is none, it cannot be loaded, or it does not compare what the task has.
    """
    match = ARGUMENTS.fullmatch(said)
    name, rest = (match["name"], match["rest"]) if match else (said, "")
    options = {key: read_value(value) for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    if name in AVERAGED and classes > 2:
        options.setdefault("average", "macro")
    if name == "roc_auc" and classes > 2:
        options.setdefault("multi_class", "ovr")
    suffix = "".join(f"_{value}" for key, value in options.items() if key != "config_name")
    if name in SKLEARN and not options.keys() - set(SKLEARN[name][2]):
        if find_spec("sklearn") is None:
            raise ValueError(f"metric {said} needs scikit-learn: pip install 'peftx[train]'")
        metric = Metric(said, suffix, SKLEARN[name][1], partial(by_sklearn, name, options))
    elif name in TEXTS and not options:
        metric = Metric(said, "", "texts", rouge if name == "rouge" else exact_match)
    else:
        metric = by_evaluate(said, name, options, suffix, task)
    if (metric.kind == "texts") == (task in CLASSIFIERS):
        what = "texts, and a classifier has none" if task in CLASSIFIERS else "classes, and the answers have none"
        known = SKLEARN if task in CLASSIFIERS else TEXTS
        raise ValueError(f"metric {said} compares {what}: there are {', '.join(known)}, and those of evaluate")
    if metric.kind == "scores" and task != "SEQ_CLS":
        raise ValueError(f"metric {said} compares scores, which {task} does not keep: choose one of classes")
    return metric


def by_sklearn(name: str, options: Mapping[str, Any], predictions: Any, references: Any) -> dict[str, Any]:
    import sklearn.metrics

    if name == "roc_auc" and predictions.shape[-1] == 2:
        predictions = predictions[:, 1]
    elif name == "roc_auc":
        options = {"labels": range(predictions.shape[-1]), **options}
    elif name in AVERAGED:
        options = {"zero_division": 0, **options}  # scikit-learn's default, without a warning
    function = getattr(sklearn.metrics, SKLEARN[name][0])
    return {name: function(references, predictions, **options)}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(np.mean([one == other for one, other in zip(predictions, references, strict=True)]))}


def by_evaluate(said: str, name: str, options: dict[str, Any], suffix: str, task: str) -> Metric:
    """A metric of `evaluate.load`.

    Raises:
        ValueError: evaluate is missing or has no such metric; or the metric takes other inputs than predictions (or
            prediction_scores) and references.
    """
    local = Path(name).exists()
    known = [*(SKLEARN if task in CLASSIFIERS else TEXTS)]
    try:
        import evaluate

        with quiet():
            module = evaluate.load(name, config_name=options.pop("config_name", None), keep_in_memory=True)
    except ModuleNotFoundError as error:
        if error.name != "evaluate":
            raise ValueError(f"metric {said} needs the package {error.name}: pip install {error.name}") from None
        raise ValueError(
            f"unknown metric {name!r}{nearest(name, known)}; more by evaluate: pip install 'peftx[train]'"
        ) from None
    except Exception as error:  # of the Hub, of the network, of the script
        if local:
            raise ValueError(f"metric {said} cannot be loaded: {error}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"unknown metric {name!r}: there are {', '.join(known)}, those of evaluate on the Hub, and a script by its "
            f"path ({reason})"
        ) from error
    layouts = module.features if isinstance(module.features, list) else [module.features]
    found = [layout for layout in layouts if set(layout) in ({"predictions", "references"}, SCORES)]
    if not found:
        raise ValueError(f"metric {said} compares {', '.join(layouts[0])}, which this run does not have")
    kinds = [kind_of(layout, task) for layout in found]
    kind = next((kind for kind in kinds if (kind == "texts") != (task in CLASSIFIERS)), kinds[0])
    layout = found[kinds.index(kind)]
    return Metric(said, suffix, kind, partial(computed, module, layout, options, task))


def kind_of(layout: Mapping[str, Any], task: str) -> Kind:
    """What a module of evaluate compares, by the features that it declares."""
    if set(layout) == SCORES:
        return "scores"
    inner = layout["predictions"]
    while hasattr(inner, "feature"):  # a list of them
        inner = inner.feature
    if getattr(inner, "dtype", None) in ("string", "large_string"):
        return "names" if task in CLASSIFIERS else "texts"
    return "classes"


def computed(
    module: Any, layout: Mapping[str, Any], options: Mapping[str, Any], task: str, predictions: Any, references: Any
) -> Mapping[str, Any]:
    if set(layout) == SCORES:
        flat = not hasattr(layout["prediction_scores"], "feature")
        scores = predictions[:, -1] if flat else predictions
        return module.compute(prediction_scores=scores, references=references, **options)
    if task not in CLASSIFIERS and hasattr(layout["references"], "feature"):  # which takes several answers
        references = [[reference] for reference in references]
    elif task == "TOKEN_CLS" and not hasattr(layout["predictions"], "feature") and is_nested(references):
        predictions, references = ([part for row in rows for part in row] for rows in (predictions, references))
    return module.compute(predictions=predictions, references=references, **options)


def is_nested(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, list) for row in rows)


def more_is_better(name: str) -> bool:
    return not any(part in LESS for part in (name, *re.split(r"[_:/]", name)))
