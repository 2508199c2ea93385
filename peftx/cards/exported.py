"""The card of an exported adapter or merged model: what it came from, and how it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..files import check_free
from ..utils import AUTO_CLASSES
from .adapter import LABELS, OF_BASE, is_id, labels_in, method_of, settings, shapes_in, size, versions
from .finish import TASKS
from .labels import code, with_labels
from .papers import citation, link

Kind = Literal["lora", "dora", "miss", "gguf", "merged"]
PLACE = (str, os.PathLike)
EQUAL = "Its outputs are equal to the adapter's, up to rounding."

TITLES: Mapping[Kind, str] = {
    "lora": "Plain LoRA adapter",
    "dora": "Plain DoRA adapter",
    "miss": "MiSS adapter",
    "gguf": "LoRA adapter in GGUF",
    "merged": "Merged model",
}
WHAT: Mapping[Kind, str] = {
    "lora": "PEFT loads it without peftx, as do vLLM and whatever else knows LoRA",
    "dora": "PEFT loads it without peftx",
    "miss": "PEFT loads it without peftx, and can train it on",
    "gguf": "llama.cpp loads it, beside the base model as GGUF",
    "merged": "transformers loads it as any model: the adapter is in its weights",
}


def put(
    folder: Path,
    place: str | os.PathLike,
    by: str,
    kind: Kind,
    config: Any,
    *,
    source: Any = None,
    base_model: Any = None,
    error: float = 0.0,
    file: str = "adapter.gguf",
    labels: Sequence[str] = (),
) -> None:
    """Writes `README.md` into a draft of an export, unless there is one at `place` that `peftx <by>` did not write, or
    that has been changed since.

    Args:
        folder: the draft, with its other files.
        place: where they will be.
        by: the command.
        kind: what was written.
        config: of the adapter that it was.
        source: the adapter's id on the Hub or its folder, of which only the name is told.
        base_model: likewise; default, and where it is a model: the one that `config` names.
        error: the largest relative error of a module's delta, 0 if exact.
        file: the name of a GGUF.
        labels: of a classifier; default: those of the adapter, in memory or by its card.
    """
    try:
        check_free(Path(place), ["README.md"], by)
    except ValueError:
        return
    base = str((base_model if isinstance(base_model, PLACE) else config.base_model_name_or_path) or "")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    shapes = {} if kind == "merged" else shapes_in(weights)
    info = method_of(config)
    method = type(config).__name__.removesuffix("Config")
    known = base if is_id(base) else ""
    nearness = f"Each delta was cut to a rank, with a relative error of up to {error:.2g}." if error else EQUAL
    about = f" ({info.summary}; {link(info.paper)})" if info else ""
    origin = {"adapter": name_of(source), "base model": name_of(base)}
    rows = {"method": method, **{name: code(value) for name, value in origin.items() if value}}
    rows |= {f"`{field}`": value for field, value in settings(config).items()}
    parts = [
        f"# {TITLES[kind]}{f' of {known}' if known else ''}",
        f"Written by peftx from an adapter of the method {method}{about}. {WHAT[kind]}. {nearness}",
        loading(kind, config.task_type, base, labels_in(config, shapes), file),
        "## What it came from",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]),
        *size(weights, shapes),
        *(citation(method, info.paper) if info else []),
        versions(),
    ]
    text = with_labels("\n\n".join(parts) + "\n", labels or vars(config).get(LABELS, ()), of=card_of(source))
    ModelCard(f"---\n{metadata(kind, config, info, known).to_yaml()}\n---\n{text}").save(folder / "README.md")


def metadata(kind: Kind, config: Any, info: Any, base: str) -> ModelCardData:
    """What the Hub reads: with a base model's id, the card hangs under it in the tree of models."""
    method = f"peft:method:{info.name if info else str(getattr(config.peft_type, 'value', '')).lower()}"
    tags = {"merged": ["peftx", method], "gguf": ["gguf", "llama-cpp", "lora", "peftx", method]}.get(
        kind, ["peft", "peftx", kind]
    )
    return ModelCardData(
        base_model=base or None,
        base_model_relation=("finetune" if kind == "merged" else "adapter") if base else None,
        library_name={"merged": "transformers", "gguf": "gguf"}.get(kind, "peft"),
        pipeline_tag=TASKS.get(config.task_type or ""),
        tags=sorted({*tags, *([f"{OF_BASE}{base}"] if base and kind != "merged" else [])}),
    )


def name_of(place: Any) -> str:
    """An id on the Hub as it is; of a folder here its name; of anything else nothing."""
    if not isinstance(place, PLACE) or not str(place):
        return ""
    return str(place) if is_id(str(place)) else Path(place).resolve().name


def card_of(source: Any) -> str:
    """The text of the card of an adapter that lies here."""
    try:
        return Path(source, "README.md").read_text(encoding="utf-8")
    except (TypeError, OSError, ValueError):
        return ""


def loading(kind: Kind, task: str | None, base: str, labels: int | None, file: str) -> str:
    """The section with the code, or the command, that loads it."""
    auto = AUTO_CLASSES.get(task or "", "AutoModel")
    named = json.dumps(base if is_id(base) else "path/or/name of the base model", ensure_ascii=False)
    if kind == "gguf":
        return f"## Load it\n\n```\nllama-cli -m base-model.gguf --lora {file}\n```"
    lines = [f"from transformers import {auto}", ""]
    if kind == "merged":
        lines += [f'model = {auto}.from_pretrained("path/or/name of this model")']
    else:
        count = f", num_labels={labels}" if labels else ""
        made = f"{auto}.from_pretrained({named}{count})" if base else "...  # the model it was trained on"
        lines = ["from peft import PeftModel", *(lines if base else [""]), f"base_model = {made}"]
        lines += ['model = PeftModel.from_pretrained(base_model, "path/or/name of this adapter")']
    return "\n".join(["## Load it", "", "```python", *lines, "```"])
