"""Base models as F32 GGUF files, by the package `gguf` alone, and llama.cpp itself on them (`xllamacpp`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
}
PAIRED = ("llama", "mistral", "smollm3", "granite", "olmo")  # whose rotary pairs llama.cpp wants side by side


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k: the two halves of each head, interleaved."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return torch.stack([halves[:, 0], halves[:, 1]], 2).flatten(0, 2)


def write_base(model: PreTrainedModel, path: Path, tokenizer: Any = None) -> Path:
    """A base model of `ARCHITECTURES`, with its byte-level BPE tokenizer or words that nobody will read."""
    config: Any = model.config
    kind = config.model_type
    arch = ARCHITECTURES[kind]
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * width))
    writer.add_head_count(heads)
    kv_heads = getattr(config, "num_key_value_heads", heads)
    writer.add_head_count_kv(kv_heads)
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if (eps := getattr(config, name, None)) is not None:
            (writer.add_layer_norm_rms_eps if name == "rms_norm_eps" else writer.add_layer_norm_eps)(eps)
    if kind == "olmo":
        writer.add_layer_norm_eps(1e-5)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope:
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("gemma2", "gemma3_text", "phi3") and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokens(writer, config.vocab_size, tokenizer)
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), layers)
    tied = config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        name = names.get_name(key, (".weight", ".bias"))
        if tied and key.startswith("lm_head"):
            continue
        assert name, key
        module = model.get_submodule(key.rpartition(".")[0])
        value = tensor.float()
        if isinstance(module, Conv1D) and value.ndim == 2:
            value = value.T
        if kind in PAIRED and (".q_proj." in key or ".k_proj." in key):
            value = paired(value, heads if ".q_proj." in key else kv_heads)
        if kind.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokens(writer: gguf.GGUFWriter, count: int, tokenizer: Any) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, count))])
        writer.add_token_scores([0.0] * count)
        writer.add_token_types([2, 3, 3, *[1] * (count - 3)])
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = tokenizer.convert_ids_to_tokens(range(count))
    special = set(tokenizer.all_special_ids)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(count)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def serve(base: Path, *adapters: tuple[Path, float]) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    found = []
    for path, scale in adapters:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(path), scale
        found.append(info)
    params.lora_adapters = found
    return xllamacpp.Server(params)


def greedy(server: xllamacpp.Server, ids: list[int], tokens: int, top: int) -> list[tuple[int, dict[int, float]]]:
    """The tokens that llama.cpp appends to a prompt, each with the log-probabilities of the `top` likeliest."""
    asked = {"prompt": ids, "n_predict": tokens, "temperature": 0, "n_probs": top, "cache_prompt": False}
    answer = server.handle_completions(asked)
    assert "choices" in answer, answer
    return [
        (at["id"], {one["id"]: one["logprob"] for one in at["top_logprobs"]})
        for at in answer["choices"][0]["logprobs"]["content"]
    ]


@torch.no_grad()
def distance(model: Any, server: xllamacpp.Server, ids: list[int], tokens: int = 6, top: int = 64) -> float:
    """The largest difference of log-probabilities; the tokens must be the same."""
    worst, ids = 0.0, list(ids)
    for token, found in greedy(server, ids, tokens, top):
        wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert int(wanted.argmax()) == token
        worst = max(worst, *(abs(float(wanted[i]) - value) for i, value in found.items()))
        ids.append(token)
    assert len(ids) > tokens or tokens == 0
    return worst
