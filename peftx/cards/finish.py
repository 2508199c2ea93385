"""The results on a model card: what was measured, how it was trained, what was not measured, whom to cite."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from peft.utils import CONFIG_NAME

from ..files import check_apart, rewritten
from ..registry import MethodInfo
from ..saved import read_config
from .adapter import complete_card, drop_paths, is_id, method_of
from .compressed import PAPERS, QUANT_METHOD, loader_of, loading
from .labels import named_labels, with_labels
from .papers import HEADING as CITATION
from .papers import citation

START, END = "<!-- results: peftx.hub.finish_card writes from here -->", "<!-- to here -->"
BLOCK = re.compile(f"{re.escape(START)}.*?{re.escape(END)}\n*", re.DOTALL)
VERSIONS = "### Framework versions"  # the section that PEFT puts last
LIMITS = (
    "Nothing else was measured: not with other seeds, on other data or in other languages, and neither bias nor safety."
)
TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
CLASSES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def finish_card(
    folder: str | os.PathLike,
    *,
    metrics: Mapping[str, float],
    dataset: str,
    split: str | None = None,
    task: str | None = None,
    baselines: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    examples: Sequence[tuple[str, str]] | None = None,
    notes: str | Sequence[str] = (),
    limits: str = LIMITS,
    base_model: str | None = None,
    name: str | None = None,
    license: str | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Writes measured results onto the card of a saved adapter or compressed model, as text and as metadata.

    The sections Results, Training, Examples, Limits and Citation stand between two comments and are replaced when the
    function runs again; what else is on the card stays. The Hub reads the results as `model-index`. Results on other
    data sets that the metadata hold already are kept.

    Args:
        folder: with `README.md`, and with `adapter_config.json` or the `config.json` of a whole model.
        metrics: what was measured, by its name on the Hub where it has one: `{"accuracy": 0.83}`.
        dataset: what it was measured on, in words or as `owner/name` on the Hub; only the latter is put into the
            metadata as the card's data set.
        split: of the data set, e.g. `"test"`.
        task: the Hub's name of the task; default: what the config says, e.g. `"text-classification"`.
        baselines: the first of the metrics for what the model is to be compared with, by name.
        training: how it was trained, by name: steps, epochs, learning rate, seed, seconds...
        examples: pairs of an input and the model's answer.
        notes: paragraphs under the results.
        limits: what was not measured.
        base_model: id or path to name instead of the one that the card names, which may be of this machine.
        name: of the model in `model-index`; default: the one that is there, or the folder's name.
        license: id as of the Hub, e.g. `"apache-2.0"`; nothing is assumed.
        labels: names of a classifier's classes, from 0; they stand first on the card. Default: those that are there.

    Returns:
        Path of the card.

    Raises:
        ValueError: no card, no model, results that are no finite numbers, a task that cannot be known, metadata that
            cannot be read. The card is as it was before.
    """
    path = Path(folder, "README.md")
    check_apart(folder, {"base_model": base_model}, "the folder")
    config, settings = read_model(Path(folder))
    if not path.is_file():
        raise ValueError(
            f"{folder} has no README.md to finish: save_pretrained of an adapter writes one, as does peftx compress."
        )
    scores = numbers(metrics, "metrics")
    others = numbers(baselines, "baselines") if baselines else {}
    if not isinstance(dataset, str) or not dataset.strip():
        raise ValueError(f"dataset must say what the metrics were measured on, got {dataset!r}.")
    if training is not None and not isinstance(training, Mapping):
        raise ValueError(f"training must map names to values, got {training!r}.")
    if labels is not None and (isinstance(labels, str) or not all(isinstance(name, str) for name in labels)):
        raise ValueError(f"labels must be the names of the classes, from 0, got {labels!r}.")
    if any(isinstance(pair, str) or len(pair) != 2 for pair in examples or ()):
        raise ValueError("examples must be pairs of an input and an answer.")
    card = read_card(path)
    kind = task or card.data.pipeline_tag or TASKS.get(task_type(config, settings) or "")
    if not kind:
        raise ValueError(f"{folder} does not say for which task it is: name it by task, e.g. 'text-classification'.")
    info = method_of(config)
    with rewritten(path) as draft:
        shutil.copyfile(path, draft)
        if info is not None:
            named = copy.copy(config)
            named.base_model_name_or_path = base_model or config.base_model_name_or_path
            complete_card(draft, named)
            card = read_card(draft)
        compressed = settings.get("quantization_config")
        if (
            isinstance(compressed, dict)
            and compressed.get("quant_method") == QUANT_METHOD
            and "import peftx" not in card.text
        ):
            (architecture,) = (settings.get("architectures") or ["AutoModel"])[:1]
            code = loading(loader_of(str(architecture)), name or Path(folder).resolve().name)
            card.text = f"{code}\n\n{card.text.lstrip()}"
        card.text = with_labels(card.text, named_labels(settings) if labels is None else labels)

        data = card.data
        if base_model:
            rename(card, {getattr(config, "base_model_name_or_path", None), *listed(data.base_model)}, base_model)
            data.base_model = base_model
        drop_paths(card)
        public = is_hub_id(dataset)
        data_id = dataset if public else re.sub(r"[^\w.-]+", "-", dataset.lower()).strip("-.")
        found = [
            EvalResult(kind, data_id, dataset, key, value, dataset_split=split, metric_name=key)
            for key, value in scores.items()
        ]
        former = data.eval_results or []
        kept = [row for row in former if row.unique_identifier != found[0].unique_identifier]
        data.eval_results = [*found, *kept]
        data.model_name = name or data.model_name or Path(folder).resolve().name
        gone = {row.metric_type for row in former}
        measured = [row.metric_type for row in data.eval_results]
        data.metrics = list(dict.fromkeys([*(key for key in listed(data.metrics) if key not in gone), *measured]))
        data.pipeline_tag = data.pipeline_tag or kind
        if public:
            data.datasets = list(dict.fromkeys([*listed(data.datasets), dataset]))
        if license:
            data.license = license
        sections = [
            *results(found, kept, others, [notes] if isinstance(notes, str) else notes),
            *table("Training", ("", ""), (training or {}).items()),
            *table("Examples", ("input", "answer"), examples or ()),
            f"## Limits\n\n{limits}",
            *([] if CITATION in BLOCK.sub("", card.text) else cited(info, settings)),
        ]
        block = "\n\n".join([START, *sections, END]) + "\n"
        text = BLOCK.sub("", card.text)
        before, heading, after = text.partition(f"{VERSIONS}\n")
        card.text = f"{before.rstrip()}\n\n{block}" + (f"\n{heading}{after}" if heading else "")
        card.save(draft)
    return path


def read_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The adapter's config, or None, and the config file as it stands; errors as for `finish_card`."""
    adapter, model = folder / CONFIG_NAME, folder / "config.json"
    if adapter.is_file():
        return read_config(folder), {}
    try:
        settings = json.loads(model.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder} holds no saved model: neither {CONFIG_NAME} nor config.json is there.") from None
    except ValueError as error:
        raise ValueError(f"{model} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{model} is not an object with named fields.")
    return None, settings


def read_card(path: Path) -> Any:
    """A `ModelCard`, whose metadata huggingface_hub types as those of any card."""
    try:
        return ModelCard.load(path)
    except Exception as error:  # of YAML, of the metadata's structure
        raise ValueError(f"The metadata of {path} cannot be read: {' '.join(str(error).split())}") from error


def numbers(values: Mapping[str, Any], what: str) -> dict[str, float]:
    """As floats; errors as for `finish_card`."""
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{what} must map at least one name to a number, got {values!r}.")
    found = {}
    for key, value in values.items():
        try:
            found[key] = float("nan" if isinstance(value, bool | str) else value)
        except (TypeError, ValueError):
            found[key] = math.nan
        if not isinstance(key, str) or not key or not math.isfinite(found[key]):
            raise ValueError(f"{what}: {key!r} is {value!r}, expected a name and a finite number.")
    return found


def listed(value: Any) -> list[Any]:
    """A field of the metadata that may hold one value, several or none."""
    return [value] if isinstance(value, str) else list(value or ())


def rename(card: Any, former: set[Any], base_model: str) -> None:
    """Names another base model wherever the card's text and tags name a former one."""
    names = {name for name in former if isinstance(name, str) and name} - {base_model}
    for name in sorted(names, key=len, reverse=True):
        word = re.compile(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])")
        card.text = word.sub(lambda _: base_model, card.text)
        card.data.tags = [word.sub(lambda _: base_model, tag) for tag in card.data.tags or ()] or None


def task_type(config: Any, settings: Mapping[str, Any]) -> str | None:
    """PEFT's name of the task, from an adapter's config or from a whole model's class."""
    if config is not None:
        return config.task_type
    names = settings.get("architectures") or [""]
    return next((task for suffix, task in CLASSES.items() if str(names[0]).endswith(suffix)), None)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name of the Hub, and is no path here."""
    return "/" in name and is_id(name)


def results(
    found: Sequence[EvalResult], kept: Sequence[EvalResult], baselines: Mapping[str, float], notes: Sequence[str]
) -> list[str]:
    """One table for each data set: a column for each metric, and a row for each baseline."""
    groups: dict[str, dict[str, Any]] = {}
    for row in (*found, *kept):
        where = f"{row.dataset_name}, {row.dataset_split}" if row.dataset_split else row.dataset_name
        groups.setdefault(where, {})[row.metric_name or row.metric_type] = row.metric_value
    parts = ["## Results"]
    for number, (where, scores) in enumerate(groups.items()):
        rows = [["**this model**", *scores.values()]]
        rows += [[name, value, *[""] * (len(scores) - 1)] for name, value in baselines.items() if not number]
        parts += [f"On {where}:", grid(["", *scores], rows, numeric=True)]
    return [*parts, *notes]


def table(title: str, head: Sequence[str], rows: Any) -> list[str]:
    """A section with a table, or nothing."""
    cells = [list(row) for row in rows]
    return [f"## {title}\n\n{grid(head, cells)}"] if cells else []


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]], numeric: bool = False) -> str:
    rule = ["---", *["---:" if numeric else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in (head, rule, *rows))


def cell(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(shown.split()).replace("|", "\\|").replace("<", "&lt;")


def cited(info: MethodInfo | None, settings: Mapping[str, Any]) -> list[str]:
    """The section that names the method's paper, where there is one."""
    compressed = settings.get("quantization_config")
    if info is not None:
        return citation(info.config.__name__.removesuffix("Config"), info.paper)
    method = str(compressed.get("method")) if isinstance(compressed, dict) else ""
    return citation(method, PAPERS.get(method, ""))
