"""Adapters as LoRA in GGUF, for llama.cpp and what is built on it; by the package `gguf`, no llama.cpp needed.

llama.cpp adds `alpha / rank * B (A x)` to the product with a weight of its own base file. The tensors there have names
of their own and, in some families, rows of `q_proj` and `k_proj` in another order: those of B must follow.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from ..cards import exported as cards
from ..files import drafted
from .export import plain_lora
from .loading import NAME_IT
from .merged import BY, check_place
from .tensors import WRAPPED, by_pattern, factors, split

FILE = "adapter_model.gguf"
# Settings of PEFT's LoRA that are more than B A, or change the base model.
BEYOND = {"lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication"}
BEYOND |= {"use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"}
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that take their part out of the base weights
MERGE = "merge it instead (`peftx export --to merged`, `export_merged`)"
QUERIES = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of the models of one `model_type`.

    Attributes:
        architecture: as llama.cpp calls it.
        paired: whether rows of a rotary pair stand side by side there; in transformers they are half a head apart.
    """

    architecture: str
    paired: bool = False


# Each is compared with llama.cpp itself in tests/serving.
FAMILIES = {
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "granite": Family("granite", paired=True),
    "olmo": Family("olmo", paired=True),
    "smollm3": Family("smollm3", paired=True),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "gpt2": Family("gpt2"),
    "olmo2": Family("olmo2"),
    "phi": Family("phi2"),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2"),
}


def export_gguf(
    model: PeftModel | str | os.PathLike,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    rank: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    base_model: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> dict[str, float]:
    """Writes an adapter as a LoRA in GGUF: `llama-cli -m base.gguf --lora folder/adapter_model.gguf`.

    What has a LoRA form (`export_lora`) is written exactly but for rounding to `dtype`, other deltas are cut to a
    `rank`. Where modules differ in alpha / rank, the difference is in their B. The base model's own GGUF may be
    quantised; its config is read here, its weights only where `export_lora` needs them.

    Args:
        model, adapter_name, rank, base_model, revision, subfolder, token: as for `export_lora`.
        path: folder for `adapter_model.gguf`; made if missing.
        dtype: of the factors: float32 (default), float16 or bfloat16. With the latter two llama.cpp rounds
            activations before A as well.

    Returns:
        By the name of each adapted module, the error of `export_lora`.

    Raises:
        ModuleNotFoundError: the package `gguf` is missing, `pip install "peftx[gguf]"`.
        TypeError, ValueError: as for `export_lora`; also where `dtype` is another, or cannot hold a value, or the base
            model's config cannot be read.
        NotImplementedError: as for `export_lora`; the base model is of no family of `FAMILIES`; the adapter is DoRA,
            has modules or biases trained in full, or targets embeddings, experts, or a head that is the embeddings, or
            what llama.cpp has no tensor for. Nothing is written then.
    """
    if dtype not in _formats():
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {dtype}.")
    hub: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "token": token}
    known: dict[str, Any] = {}

    def check(config: Any) -> None:
        check_place(path, (FILE,), config)
        known["config"] = config
        known["base"] = base = _base_config(model, config, base_model, token)
        _family(base)

    saved = isinstance(model, (str, os.PathLike))
    if saved:
        check_place(path, (), None, base_model, Path(model, subfolder or ""))
    state, config, errors = plain_lora(model, adapter_name, rank, check, base_model=base_model, **hub)
    tensors, alpha = _converted(state, config, known["base"], dtype)
    with drafted(path, BY) as folder:
        _write(folder / FILE, tensors, alpha, _family(known["base"]), config, dtype)
        lost, source = max(errors.values(), default=0.0), model if saved else None
        cards.put(folder, path, BY, "gguf", known["config"], source=source, error=lost, file=FILE)
    return errors


def _formats() -> dict[torch.dtype, tuple[Any, Any]]:
    """By dtype, what GGUF calls tensors and files of it."""
    try:
        from gguf import GGMLQuantizationType, LlamaFileType
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is missing: pip install "peftx[gguf]"', name=error.name) from error
    return {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }


def _base_config(model: Any, config: Any, base_model: Any, token: Any) -> Any:
    if isinstance(model, PeftModel):
        return getattr(model.get_base_model(), "config", None)
    if isinstance(base_model, nn.Module):
        return getattr(base_model, "config", None)
    name = str(base_model or config.base_model_name_or_path or "")
    if not name:
        raise ValueError(f"The adapter does not say what its base model is: {NAME_IT}.")
    try:
        return AutoConfig.from_pretrained(name, revision=None if base_model else config.revision, token=token)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"The config of the base model {name} cannot be read: {told}") from error


def _family(base: Any) -> Family:
    kind = getattr(base, "model_type", None)
    if kind not in FAMILIES:
        raise NotImplementedError(
            f"A base model of the type {kind!r} has no known form in GGUF, only {', '.join(FAMILIES)}: {MERGE} and let "
            "llama.cpp convert the whole."
        )
    return FAMILIES[kind]


def _check_plain(config: LoraConfig, others: dict[str, Any]) -> None:
    """Raises NotImplementedError unless an adapter is factors of linear layers and nothing else."""
    if config.use_dora:
        raise NotImplementedError(
            f"llama.cpp has no DoRA: cut GradNormLoRP's delta to a plain LoRA (`--rank`, `rank=`), or {MERGE}."
        )
    if names := [name for name in sorted(BEYOND) if getattr(config, name, None)]:
        raise NotImplementedError(f"llama.cpp has no form of {' and '.join(names)}: {MERGE}.")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(REBASED):
        raise NotImplementedError(
            f"The adapter belongs to a base model that its start ({start}) has changed, which no GGUF holds: {MERGE}, "
            "or save it with PEFT's `path_initial_model_for_weight_conversion`."
        )
    if others:
        first = next(iter(others)).removeprefix(WRAPPED)
        raise NotImplementedError(
            f"A LoRA in GGUF cannot hold {first} and {len(others) - 1} more tensors that were trained in full "
            f"(`modules_to_save`, `bias`): {MERGE}."
        )


def _converted(
    state: dict[str, Tensor], config: LoraConfig, base: Any, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """The tensors under llama.cpp's names, A (rank, in) and B (out, rank), and the file's alpha."""
    modules, others = split(state, "lora_")
    _check_plain(config, {key: tensor for key, tensor in others.items() if not _is_base(key, tensor, config, base)})
    pairs = {}
    for module, parts in modules.items():
        A, B = factors(parts)
        name = _name(module, parts, base)
        if not isinstance(A, Tensor) or not isinstance(B, Tensor) or len(parts) > 2:
            raise ValueError(f"{module} has no pair of factors, but {', '.join(parts)}.")
        if not len(A):
            continue
        r = len(A)
        scale = by_pattern(config.alpha_pattern, module, config.lora_alpha) / (math.sqrt(r) if config.use_rslora else r)
        pairs[name] = A.detach().cpu().float(), _ordered(B.detach().cpu().float(), module, base), scale * r
    if not pairs:
        raise ValueError("The adapter has no rank in any module: there is nothing to write.")
    alpha = Counter(alpha for *_, alpha in pairs.values()).most_common(1)[0][0] or 1.0
    tensors = {}
    for name, (A, B, own) in pairs.items():
        for part, value in (("a", A), ("b", B if own == alpha else own / alpha * B)):
            tensors[f"{name}.weight.lora_{part}"] = cast = value.to(dtype)
            if not torch.isfinite(cast).all():
                reason = "cannot hold: name another `dtype`" if torch.isfinite(value).all() else "has no number for"
                raise ValueError(f"{name} has values that {str(dtype).removeprefix('torch.')} {reason}.")
    return tensors, alpha


def _is_base(key: str, tensor: Any, config: LoraConfig, base: Any) -> bool:
    """Whether a tensor is the base model's own: PEFT saves an adapted head's weight with the adapter. A head with
    another number of rows is another's."""
    part = key.rpartition(".base_layer.")[2]
    frozen = part == "weight" or (part == "bias" and config.bias == "none")
    return ".base_layer." in key and frozen and tuple(tensor.shape[:1]) == (base.vocab_size,)


def _name(module: str, parts: dict[str, Any], base: Any) -> str:
    """What llama.cpp calls the weight of a linear layer."""
    import gguf

    architecture = _family(base).architecture
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, base.num_hidden_layers)
    found = names.get_name(module) or names.get_name(f"model.{module}")
    where = f"{module} of a {base.model_type} model"
    if any("embedding" in part for part in parts) or found == "token_embd":
        raise NotImplementedError(f"An adapted embedding, {where}, is not written to GGUF: {MERGE}.")
    if (found == "output" or module == "lm_head") and getattr(base, "tie_word_embeddings", False):
        raise NotImplementedError(f"In GGUF {where} is the embedding itself, and cannot be adapted alone: {MERGE}.")
    if found is None or any(getattr(part, "ndim", 2) != 2 for part in parts.values()):
        raise NotImplementedError(f"llama.cpp has no tensor for {where}: {MERGE}.")
    return found


def _ordered(B: Tensor, module: str, base: Any) -> Tensor:
    """B (out, rank) with its rows in llama.cpp's order."""
    last = module.rpartition(".")[2]
    if not _family(base).paired or last not in QUERIES:
        return B
    heads = base.num_attention_heads if last == "q_proj" else base.num_key_value_heads or base.num_attention_heads
    if len(B) % (2 * heads):
        raise ValueError(f"{module} has {len(B)} rows, which are no {heads} heads of pairs.")
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(
    file: Path, tensors: dict[str, Tensor], alpha: float, family: Family, config: LoraConfig, dtype: torch.dtype
) -> None:
    import gguf

    of_tensor, of_file = _formats()[dtype]
    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_file_type(of_file)
    base = str(config.base_model_name_or_path or "")
    if base.count("/") == 1 and not Path(base).exists():  # an id of the Hub; a place on this disk is nobody's business
        organization, name = base.split("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for name, tensor in tensors.items():
        if dtype == torch.bfloat16:
            writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=of_tensor)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
