"""The model card of a saved adapter: how to load it, and what it is."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import safe_open

from ..files import beside, writing
from ..registry import MethodInfo, info_of, methods
from ..utils import AUTO_CLASSES, CLASSIFIERS
from .labels import code, named_labels, with_labels
from .papers import link

UNFILLED = "# Model Card for Model ID"  # the title of the template that PEFT starts from, which says nothing yet
LOADING = "## Load this adapter"
LABELS = "labels of the base model"  # in a config's `vars`, no field of it: for the card, not for the file
OF_BASE = "base_model:adapter:"  # how PEFT begins a tag
# fields of a config that are shown whatever their value
ALWAYS = ("r", "target_modules", "lora_alpha", "task_type")
# fields that are no settings of the training, or stand elsewhere on the card
HIDDEN = (
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "runtime_config",
)


def complete_card(path: Path, config: Any, repo_id: str = "") -> None:
    """Fills in the card at `path`, which PEFT has just written: tags, and first of all the code that loads the adapter.

    The labels of a classifier, where its base model's config names them, stand before it. A card that nobody has
    written yet, the template of PEFT and transformers, gets a text too: method, paper, settings, size. What a user
    wrote stays. For a card on its way to the Hub, `repo_id` is named in the code. A base model that is a folder here is
    told without its path; in the metadata, where PEFT writes it and the Hub refuses it, only until then. The card of a
    method of PEFT's own asks for no peftx.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    info = method_of(config)
    weights = path.parent / SAFETENSORS_WEIGHTS_NAME
    shapes = shapes_in(weights)
    card.data.library_name = "peft"
    tags = {"peft"}
    if info is not None:
        tags |= {"peftx", f"peft:method:{info.name}"} | ({"lora"} if info.prefix == "lora_" else set())
    card.data.tags = sorted(tags.union(card.data.tags or ()))
    if config.base_model_name_or_path and not card.data.base_model:
        card.data.base_model = config.base_model_name_or_path
    if repo_id:
        drop_paths(card)
    text = card.text
    if UNFILLED in text:
        text = "\n\n".join([*description(info, config), *size(weights, shapes), versions()])
    else:  # of another base model, it may be, than when it was written
        title = re.compile(rf"^# {re.escape(_title(config, ''))}(?: of \S+)?$", re.MULTILINE)
        text = title.sub(lambda _: f"# {_title(config)}", text, count=1)
    earlier = re.compile(rf"{LOADING}\n\n```python\nimport peftx.*?```\n*", re.DOTALL)
    text = f"{loading_code(info, config, labels_in(config, shapes), repo_id)}\n\n{earlier.sub('', text).lstrip()}"
    card.text = with_labels(text, vars(config).get(LABELS, ()))
    with writing(path), beside(path) as draft:
        card.save(draft)


def method_of(config: Any) -> MethodInfo | None:
    """The record of an adapter's method; None for PEFT's own and for whole models."""
    try:
        return None if config is None else info_of(type(config))
    except RuntimeError:
        return None


def drop_paths(card: Any) -> None:
    """Takes a base model that is no id of the Hub out of a card's metadata, and out of its tags."""
    named = card.data.base_model
    if isinstance(named, list):
        card.data.base_model = [name for name in named if is_id(name)] or None
    elif named and not is_id(named):
        card.data.base_model = None
    tags = [tag for tag in card.data.tags or () if not tag.startswith(OF_BASE) or is_id(tag.removeprefix(OF_BASE))]
    card.data.tags = tags or None


def keep_card(model: Any) -> None:
    """Lets the card survive being pushed: `model.push_to_hub` and `Trainer.push_to_hub` save the model first and then
    write a card of their own over it.

    The model that is being saved completes those too, from then on. Only this instance changes: PEFT's classes, and the
    models of other methods, stay as they are.
    """
    if isinstance(model, peft.PeftModel):
        base: Any = getattr(model.get_base_model(), "config", None)
        for config in model.peft_config.values():
            if config.task_type in CLASSIFIERS and hasattr(base, "to_dict"):
                vars(config)[LABELS] = named_labels(base.to_dict())
        vars(model).update(
            _upload_modified_files=partial(_complete_and_upload, model),
            create_or_update_model_card=partial(_update_and_complete, model),
        )


def _complete_and_upload(model: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    _complete(model, Path(working_dir, "README.md"), repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _update_and_complete(model: Any, output_dir: Any) -> None:
    path = Path(output_dir, "README.md")
    with tempfile.TemporaryDirectory() as folder:  # PEFT writes in place, and a user's card survives a full disk
        new = Path(folder, path.name)
        if path.is_file():
            shutil.copyfile(path, new)
        type(model).create_or_update_model_card(model, folder)
        with writing(path), beside(path) as draft:
            shutil.copyfile(new, draft)
    if UNFILLED not in path.read_text(encoding="utf-8"):  # else its config, saved later, describes it, size and all
        _complete(model, path)


def _complete(model: Any, path: Path, repo_id: str = "") -> None:
    """The files of the adapter called default are those beside the card."""
    config = model.peft_config.get("default")
    if isinstance(config, tuple(info.config for info in methods())) and path.is_file():
        complete_card(path, config, repo_id)


def is_id(name: str) -> bool:
    """Whether `name` has the form of an id on the Hub, and is no path here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def loading_code(info: MethodInfo | None, config: Any, labels: int | None = None, repo_id: str = "") -> str:
    """The section whose first line of code registers the method, where PEFT does not know it."""
    auto = AUTO_CLASSES.get(config.task_type, "AutoModel")
    base = config.base_model_name_or_path
    named = json.dumps(base if is_id(base) else "path/or/name of the base model", ensure_ascii=False) if base else ""
    module, lines = type(config).__module__, []
    if info:
        lines = [f"import peftx  # registers {info.peft_type.value} with PEFT: pip install peftx"]
    if info and module.split(".")[0] != "peftx":
        code = f"import {module}" if module != "__main__" else "..."
        lines = ["import peftx  # pip install peftx", f"{code}  # registers {info.peft_type.value} with PEFT"]
    lines += ["from peft import PeftModel"]
    if base:
        count = f", num_labels={labels}" if labels else ""
        lines += [f"from transformers import {auto}", "", f"base_model = {auto}.from_pretrained({named}{count})"]
    else:
        lines += ["", "base_model = ...  # the model it was trained on"]
    here = json.dumps(repo_id or "path/or/name of this adapter", ensure_ascii=False)
    lines += [f"model = PeftModel.from_pretrained(base_model, {here})"]
    return "\n".join([LOADING, "", "```python", *lines, "```"])


def description(info: MethodInfo | None, config: Any) -> list[str]:
    """What the method is, and the adapter's settings."""
    made = "Trained with [PEFT](https://github.com/huggingface/peft) and peftx."
    rows = (f"| `{name}` | {value} |" for name, value in settings(config).items())
    table = ["## Settings", "\n".join(["| field | value |", "| --- | --- |", *rows])]
    if info is None:
        return [f"# {_title(config)}", f"{made} PEFT loads it without peftx.", *table]
    title = type(config).__name__.removesuffix("Config")
    how = {
        "exact": "`peftx.export_lora` writes it as a plain LoRA adapter with equal outputs, which needs no peftx.",
        "dora": "`peftx.export_lora` writes it as PEFT's DoRA adapter with equal outputs, which needs no peftx.",
        "svd": "`peftx.export_lora(..., rank=...)` writes it as a plain LoRA adapter, with an error that it tells.",
        "none": "It is no change of a weight: it cannot be merged, nor exported as a plain LoRA.",
    }[info.lora_export_of(vars(config))]
    merge = "`merge_and_unload()` adds it to the base model's weights: no cost at inference. " if info.mergeable else ""
    return [f"# {_title(config)}", f"{made} {title}: {info.summary} ({link(info.paper)}).", f"{merge}{how}", *table]


def _title(config: Any, base: str | None = None) -> str:
    name = config.base_model_name_or_path or ""
    base = (f" of {name}" if is_id(name) else "") if base is None else base
    return f"{type(config).__name__.removesuffix('Config')} adapter{base}"


def settings(config: Any) -> dict[str, str]:
    """The fields of a config that are not at their default, and the ones that everybody asks for."""
    shown = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        plain = value is None or value == f.default or (f.default is dataclasses.MISSING and not value)
        if f.name in HIDDEN or not f.init or (plain and (f.name not in ALWAYS or value is None)):
            continue
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, (set, list, tuple)):
            value = ", ".join(str(part) for part in dict.fromkeys(sorted(value, key=str)))
        shown[f.name] = code(str(value)).replace("|", "\\|")
    return shown


def shapes_in(weights: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor in a safetensors file; nothing where there is none."""
    if not weights.is_file():
        return {}
    with safe_open(weights, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


def labels_in(config: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> int | None:
    """How many labels the saved head of a classifier has, if it was saved."""
    if config.task_type not in CLASSIFIERS:
        return None
    saved = {*(config.modules_to_save or ())}
    rows = [({*key.split(".")}, shape[0]) for key, (shape, _) in sorted(shapes.items()) if len(shape) == 2]
    rows = [(names, count) for names, count in rows if names & saved]
    heads = [count for names, count in rows if not names.isdisjoint(SEQ_CLS_HEAD_NAMES)]
    return heads[-1] if heads else min((count for _, count in rows), default=None)  # last: `dense` before `out_proj`


def size(weights: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """A section on the numbers of values and bytes, where there is a safetensors file to read them from."""
    if not shapes:
        return []
    values = sum(math.prod(shape) for shape, _ in shapes.values())
    dtypes = ", ".join(sorted({dtype for _, dtype in shapes.values()}))
    return ["## Size", f"{values:,} values in {len(shapes)} tensors ({dtypes}), {weights.stat().st_size:,} bytes."]


def versions() -> str:
    from .. import __version__

    return f"### Framework versions\n\n- PEFT {peft.__version__}\n- peftx {__version__}"
