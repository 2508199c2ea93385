"""Tiny language models of every class of transformers that is named causal, masked or sequence to sequence."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "d_inner", "ffn_dim", "dff", "hidden_dim"), 32),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size"), 64),
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rotary_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4),
}
FAMILIES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "paired": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def names() -> Iterator[tuple[str, str]]:
    """Family and name of each class, once."""
    seen: set[str] = set()
    for family, mapping in FAMILIES.items():
        for entry in mapping.values():
            for name in (entry,) if isinstance(entry, str) else entry:
                if name not in seen:
                    seen.add(name)
                    yield family, name


def shrunk(config: Any) -> Any:
    for name, size in SIZES.items():
        with contextlib.suppress(Exception):  # a property, or a size that differs from layer to layer
            if type(getattr(config, name, None)) is int:
                setattr(config, name, size)
    for inner in list(vars(config).values()):
        if isinstance(inner, transformers.PreTrainedConfig):
            shrunk(inner)
    return config


def small(config: Any) -> Any:
    """A config of the same class made with small sizes, as far as it has them."""
    sizes = {name: size for name, size in SIZES.items() if type(vars(config).get(name)) is int}
    return type(config)(**{name: size for name, size in sizes.items() if name not in config.attribute_map})


def undropped(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            undropped(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def build(name: str, family: str = "causal") -> transformers.PreTrainedModel:
    """A random model without dropout, in evaluation mode, with weights large enough for its logits to differ.

    Raises:
        ValueError: there is no config of this class as small.
    """
    kind, found = getattr(transformers, name), "too large"
    for make in (small, shrunk):
        try:
            config = make(kind.config_class())
            undropped(config)
            if family == "causal" and hasattr(config, "is_decoder"):
                config.is_decoder = True
            if config.is_encoder_decoder:
                config.decoder_start_token_id = 0
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(config).parameters())
            if size > 3e6:
                continue
            torch.manual_seed(0)
            model = kind(config).eval()
        except Exception as error:  # whatever a config says of sizes that nobody has tried
            found = f"{type(error).__name__}: {error}"
            continue
        for part in model.modules():
            if isinstance(part, torch.nn.Linear | transformers.pytorch_utils.Conv1D | torch.nn.Embedding):
                part.weight.data.mul_(4)
        return model
    raise ValueError(f"{name}: {found:.200}")
