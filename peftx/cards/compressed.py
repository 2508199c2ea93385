"""The model card of a compressed model, which goes with it to folders and to the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..files import beside, writing
from .adapter import UNFILLED, is_id
from .papers import citation, link

QUANT_METHOD = "lowrank_svd"  # of a compressed model's `quantization_config`
# of a method; a plain SVD has no paper
PAPERS = {"fwsvd": "arXiv:2207.00112", "asvd": "arXiv:2312.05821", "svd-llm": "arXiv:2403.07378"}
TAGS = ("compressed", "low-rank", "peftx")


def keep_card(model: Any, base_model: str = "") -> None:
    """Lets a compressed model carry its card: `save_pretrained` writes one where there is none, and `push_to_hub`
    replaces transformers' empty template by it.

    Only this instance changes; once `materialize` made it dense, it saves as before. The model refers to itself then:
    its memory is free at the next garbage collection, not before. A `Trainer` writes its own card over this one
    when it pushes: `peftx.hub.finish_card` on its folder adds the code that loads the model.

    Args:
        model: of transformers; others have no files and no card.
        base_model: id or folder of the dense model, "" where nobody knows it any more.
    """
    if hasattr(model, "push_to_hub"):
        vars(model).update(
            save_pretrained=partial(_save, model, base_model),
            _upload_modified_files=partial(_upload, model, base_model),
        )


def _save(model: Any, base_model: str, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path, main = Path(save_directory, "README.md"), args[0] if args else kwargs.get("is_main_process", True)
    if main and _is_compressed(model) and (path.parent / "config.json").is_file() and not path.exists():
        with writing(path), beside(path) as draft:
            draft.write_text(card_of(model, path.parent.resolve().name, base_model), encoding="utf-8")


def _upload(model: Any, base_model: str, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    path = Path(working_dir, "README.md")
    if _is_compressed(model) and path.is_file():
        _complete(path, card_of(model, repo_id, base_model), loading(loader_of(type(model).__name__), repo_id))
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _is_compressed(model: Any) -> bool:
    config = getattr(model.config, "quantization_config", None)
    return getattr(config, "quant_method", None) == QUANT_METHOD and not getattr(model, "_hf_peft_config_loaded", False)


def _complete(path: Path, text: str, code: str) -> None:
    """Makes the card at `path` that of a compressed model.

    transformers' empty template is replaced by `text`; what somebody wrote stays, with the `code` that loads the model
    before it where it has none. The tags of both are kept.
    """
    from huggingface_hub import ModelCard

    old: Any = ModelCard.load(path, ignore_metadata_errors=True)
    new: Any = ModelCard(text)
    tags = sorted({*(old.data.tags or ()), *(new.data.tags or ())})
    if UNFILLED in old.text:
        old = new
    elif "import peftx" not in old.text:
        old.text = f"{code}\n\n{old.text.lstrip()}"
    old.data.tags = tags
    with writing(path), beside(path) as draft:
        old.save(draft)


def loader_of(architecture: str) -> str:
    """The class of transformers that loads a model of this class."""
    import transformers

    return architecture if hasattr(transformers, architecture) else "AutoModel"


def loading(loader: str, name: str) -> str:
    """The code that loads a compressed model, whose first line registers how."""
    return (
        "It needs peftx (`pip install peftx`):\n\n```python\nimport peftx\n"
        f"from transformers import {loader}\n\n"
        f"model = {loader}.from_pretrained({json.dumps(name, ensure_ascii=False)})\n```"
    )


def card_of(model: Any, name: str, base_model: str = "") -> str:
    """The README.md of a compressed model, as far as the model itself tells.

    Args:
        name: repository or folder of the result.
        base_model: of the model that was compressed.
    """
    config = model.config.quantization_config
    after = sum(parameter.numel() for parameter in model.parameters())
    layers = [_low(model, name) for name in config.ranks]
    less = sum(_saved(low) for low in layers)
    return page(
        name=name,
        base_model=base_model,
        loader=loader_of(type(model).__name__),
        parameters=(after + less, after),
        method=config.method or "",
        keep=config.keep,
        layers=len(layers),
        stacks=sum(hasattr(low, "experts") for low in layers),
    )


def _low(model: Any, name: str) -> Any:
    """The factors of a layer, or of a stack of experts, which their module keeps by the name of the parameter."""
    parent, _, key = name.rpartition(".")
    experts = model.get_submodule(parent)
    return experts.factors[key] if hasattr(experts, "factors") else model.get_submodule(name)


def _saved(low: Any) -> int:
    """Entries that factors have less than the dense weights."""
    one = low.in_features * low.out_features - low.rank * (low.in_features + low.out_features)
    return getattr(low, "experts", 1) * one


def page(
    *,
    name: str,
    base_model: str,
    loader: str,
    parameters: tuple[int, int],
    method: str,
    keep: float | None,
    layers: int,
    stacks: int = 0,
    results: Sequence[str] = (),
    details: str = "",
) -> str:
    """The text of a card with its metadata; of a base model that is a folder only the name is told.

    Args:
        loader: the class of transformers that loads it.
        parameters: before and after.
        layers: that were factorised, of which so many are `stacks` of experts.
        results: paragraphs after the code.
        details: after the method's sentence.
    """
    from huggingface_hub import CardData

    known = is_id(base_model)
    tags = sorted({*TAGS, *([method] if method else [])})
    metadata = CardData(base_model=base_model if known else None, library_name="transformers", tags=tags)
    shown = f"`{base_model if known else Path(base_model).name}`" if base_model else "A model"
    before, after = parameters
    paper = PAPERS.get(method, "")
    cited = f" ({link(paper)})" if paper else ""
    share = "" if keep is None else f", keep {keep:g}"
    counted = f"{layers} layers" + (f" ({stacks} stacks of experts among them)" if stacks else "")
    parts = [
        f"---\n{metadata.to_yaml().rstrip()}\n---",
        f"# {' '.join(name.split())}",
        f"{shown} with its linear layers as products of two thin ones: {before:,} parameters became {after:,} "
        f"({1 - after / before:.1%} fewer).",
        loading(loader, name),
        "Without `import peftx` loading stops with an error about sizes of weights.\n"
        "`peftx.compression.materialize(model)` makes ordinary dense layers again.",
        *results,
        f"Method: {method or 'not told'}{cited}{share} of {counted}{details}.",
        *citation(method, paper),
    ]
    return "\n\n".join(parts) + "\n"
