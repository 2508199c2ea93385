"""Tiny random models, made from configs, in place of the Hub's models in PEFT's tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

HOME = Path(__file__).with_name(".cache") / f"transformers-{transformers.__version__}"

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, "vocab_size": 1024}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1103}
BART = {
    **{f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in {"layers": 2, "ffn_dim": 32}.items()},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 64,
}

# Name on the Hub -> (architecture, config). Tests look for "gpt2", "llama" and so on in the name.
STAND_INS: dict[str, tuple[str, dict]] = {
    "tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
    ),
    "tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 4}),
    "tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 4}),
    "tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0},
    ),
    "tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "tiny-random-BertModel": ("BertModel", SMALL),
    "tiny-random-RobertaModel": ("RobertaModel", SMALL),
    "tiny-random-DebertaModel": ("DebertaModel", SMALL),
    "tiny-random-DebertaV2Model": ("DebertaV2Model", SMALL),
    "tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", SMALL),
    "tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", SMALL),
    "tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**SMALL, "num_key_value_heads": 4, "pad_token_id": 0},
    ),
}


def stand_in_for(hub_id: str) -> str:
    """The folder of the model that stands in for `hub_id`.

    Raises:
        KeyError: PEFT's tests use a model that STAND_INS lacks.
    """
    name = hub_id.split("/")[-1]
    architecture, config = STAND_INS[name]
    folder = HOME / name
    if not (folder / "model.safetensors").exists():
        model_class = getattr(transformers, architecture)
        torch.manual_seed(0)
        model_class(model_class.config_class(**config)).save_pretrained(folder)
    return str(folder)


def localise(hub_ids: list[str]) -> None:
    """Replaces Hub names by folders, in place."""
    hub_ids[:] = map(stand_in_for, hub_ids)
