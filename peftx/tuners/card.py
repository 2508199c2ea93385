"""The model card of a saved adapter: how to load it, and what it is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..registry import MethodInfo, info_of

UNFILLED = "# Model Card for Model ID"  # the title of the template that PEFT starts from, which says nothing yet
LOADING = "## Load this adapter"
TITLES = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "CAUSAL_LM": "CausalLM"}
TITLES |= {"SEQ_2_SEQ_LM": "Seq2SeqLM", "QUESTION_ANS": "QuestionAnswering"}
# fields of a config that are shown whatever their value
ALWAYS = ("r", "target_modules", "lora_alpha", "task_type")
# fields that are no settings of the training, or stand elsewhere on the card
HIDDEN = ("peft_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def complete_card(path: Path, config: Any) -> None:
    """Fills in the card at `path`, which PEFT has just written: tags, and first of all the code that loads the adapter.

    A card that nobody has written yet, PEFT's template, gets a text too: method, paper, settings, size. What a user
    wrote stays.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    info = info_of(type(config))
    tags = {"peft", "peftx", f"peft:method:{info.name}"} | ({"lora"} if info.prefix == "lora_" else set())
    card.data.tags = sorted(tags.union(card.data.tags or ()))
    if config.base_model_name_or_path and not card.data.base_model:
        card.data.base_model = config.base_model_name_or_path
    text = card.text
    if UNFILLED in text:
        text = "\n\n".join([*description(info, config, path.parent), versions()])
    earlier = re.compile(rf"{LOADING}\n\n```python\nimport peftx.*?```\n*", re.DOTALL)
    card.text = f"{loading_code(info, config)}\n\n{earlier.sub('', text).lstrip()}"
    card.save(path)


def loading_code(info: MethodInfo, config: Any) -> str:
    """The section whose first line of code registers the method."""
    auto = f"AutoModel{'For' if config.task_type in TITLES else ''}{TITLES.get(config.task_type, '')}"
    base = config.base_model_name_or_path
    lines = [f"import peftx  # registers {info.peft_type.value} with PEFT: pip install peftx"]
    lines += ["from peft import PeftModel"]
    if base:
        lines += [f"from transformers import {auto}", "", f'base_model = {auto}.from_pretrained("{base}")']
    else:
        lines += ["", "base_model = ...  # the model it was trained on"]
    lines += ['model = PeftModel.from_pretrained(base_model, "path/or/name of this adapter")']
    return "\n".join([LOADING, "", "```python", *lines, "```"])


def description(info: MethodInfo, config: Any, folder: Path) -> list[str]:
    """What the method is, and the adapter's settings and size."""
    base = config.base_model_name_or_path or "a model without a name"
    title = type(config).__name__.removesuffix("Config")
    address = info.paper.replace("arXiv:", "https://arxiv.org/abs/") if info.paper.startswith("arXiv:") else ""
    paper = f"[{info.paper}]({address})" if address else info.paper
    how = {
        "exact": "`peftx.export_lora` writes it as a plain LoRA adapter with equal outputs, which needs no peftx.",
        "dora": "`peftx.export_lora` writes it as PEFT's DoRA adapter with equal outputs, which needs no peftx.",
        "svd": "`peftx.export_lora(..., rank=...)` writes it as a plain LoRA adapter, with an error that it tells.",
        "none": "It is no change of a weight: it cannot be merged, nor exported as a plain LoRA.",
    }[info.lora_export]
    merge = "`merge_and_unload()` adds it to the base model's weights: no cost at inference. " if info.mergeable else ""
    return [
        f"# {title} adapter of {base}",
        f"Trained with [PEFT](https://github.com/huggingface/peft) and peftx. {title}: {info.summary.rstrip('.')} "
        f"({paper}).",
        f"{merge}{how}",
        "## Settings",
        "\n".join(["| field | value |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in settings(config).items())]),
        *size(folder / SAFETENSORS_WEIGHTS_NAME),
    ]


def settings(config: Any) -> dict[str, str]:
    """The fields of a config that are not at their default, and the ones that everybody asks for."""
    shown = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        plain = value is None or value == f.default or (f.default is dataclasses.MISSING and not value)
        if f.name in HIDDEN or not f.init or (plain and (f.name not in ALWAYS or value is None)):
            continue
        if isinstance(value, (set, list, tuple)):
            value = ", ".join(str(part) for part in dict.fromkeys(sorted(value, key=str)))
        shown[f.name] = f"`{value}`".replace("|", "\\|")
    return shown


def size(weights: Path) -> list[str]:
    """A section on the numbers of values and bytes, where there is a safetensors file to read them from."""
    if not weights.is_file():
        return []
    with safe_open(weights, framework="pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
        values = 0
        for part in slices:
            count = 1
            for length in part.get_shape():
                count *= length
            values += count
        dtypes = sorted({part.get_dtype() for part in slices})
    return [
        "## Size",
        f"{values:,} values in {len(slices)} tensors ({', '.join(dtypes)}), {weights.stat().st_size:,} bytes.",
    ]


def versions() -> str:
    from .. import __version__

    return f"### Framework versions\n\n- PEFT {peft.__version__}\n- peftx {__version__}"
