"""The demo's chat model: before and after, and its notes."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from huggingface_hub import ModelCard

from peftx.cli import app
from peftx.demo import llm, llm_report, notes
from peftx.demo.errors import DemoError

SPECIAL = ["<pad>", "<eos>"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}assistant: "


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, and a tokenizer of letters and a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Letters, decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def outcome(chat, tmp_path_factory) -> llm.Outcome:
    seen: list[int] = []
    outcome = llm.run(
        llm.Options(tmp_path_factory.mktemp("run") / "out", chat, "loldu", epochs=0.3), lambda *s: seen.append(s[1])
    )
    assert seen == [1, 2, 3]
    return outcome
