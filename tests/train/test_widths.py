"""Methods at their defaults on models whose widths are small, odd, or unequal."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from peftx.cli import app
from peftx.train import methods

TINY = ("--max-steps", 1, "--batch-size", 2, "--training", "use_cpu=true", "--training", "disable_tqdm=true")


def words() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 31)}, "<eos>": 31}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def llama(width: int, heads: int, pairs: int, deep: int = 1, wide: int = 96) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        intermediate_size=wide,
        num_hidden_layers=deep,
        vocab_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape as stories260K, which is 64 wide with keys and values of 32."""
    place = tmp_path_factory.mktemp("widths")
    shapes = {"stories": (64, 8, 4, 2, 172), "w72": (72, 2, 1), "w576": (576, 9, 3)}
    for name, shape in shapes.items():
        llama(*shape).save_pretrained(place / name)
        words().save_pretrained(place / name)
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        hidden_size=24, num_attention_heads=2, intermediate_size=40, num_hidden_layers=1, vocab_size=32
    )
    transformers.BertForSequenceClassification(bert).save_pretrained(place / "bert")
    words().save_pretrained(place / "bert")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(1, 30)}" for _ in range(5)) for _ in range(12)]
    (place / "data.jsonl").write_text("\n".join(json.dumps({"prompt": t, "answer": t[:2]}) for t in texts))
    (place / "labels.jsonl").write_text("\n".join(json.dumps({"text": t, "label": len(t) % 2}) for t in texts))
    return place


def call(command: str, folder: Path, model: str, out: Path, *more: object, data: str = "data.jsonl") -> Any:
    given = (command, "--model", folder / model, "--data", folder / data, "--output", out, *TINY, *more)
    return CliRunner().invoke(app, [str(part) for part in given], env={"COLUMNS": "200"})


@pytest.mark.parametrize("model", ["w72", "w576"])
def test_compacter_takes_widths_that_its_block_divides(folder: Path, tmp_path: Path, model: str) -> None:
    outcome = call("train", folder, model, tmp_path / "out", "--method", "compacter")
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert loaded.peft_config["default"].phm_dim == 4
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["trained_values"]["adapter"] > 0


def test_loldu_at_its_default_on_narrow_keys(folder: Path, tmp_path: Path) -> None:
    outcome = call("train", folder, "stories", tmp_path / "out", "--method", "loldu")
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    assert "rank 32 in k_proj, v_proj (no wider)" in outcome.stdout and len(outcome.stdout.splitlines()) == 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 64 and config["rank_pattern"] == {"k_proj": 32, "v_proj": 32}
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "stories")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    ranks = {name.split(".")[-4]: p.numel() for name, p in loaded.named_parameters() if name.endswith(".z")}
    assert ranks["k_proj"] == ranks["v_proj"] == 32 and ranks["q_proj"] == ranks["down_proj"] == 64


def test_a_classifier_at_the_default(folder: Path, tmp_path: Path) -> None:
    given = ("--method", "loldu")
    outcome = call("train", folder, "bert", tmp_path / "out", *given, data="labels.jsonl")
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    pattern = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    assert set(pattern.values()) == {24} and "classifier" not in pattern
    resumed = call("train", folder, "bert", tmp_path / "out", *given, "--resume", data="labels.jsonl")
    assert resumed.exit_code == 0, (resumed.output, resumed.exception)


def test_a_rank_that_is_named_stays_an_error(folder: Path, tmp_path: Path) -> None:
    outcome = call("train", folder, "stories", tmp_path / "out", "--method", "loldu", "--set", "r=64")
    assert outcome.exit_code == 2 and "r=64 is larger than min(in_features, out_features) = 32" in outcome.stderr
    pattern = ("--set", "rank_pattern={k_proj: 33}")
    outcome = call("train", folder, "stories", tmp_path / "out", "--method", "loldu", *pattern)
    assert outcome.exit_code == 2 and "r=33 is larger than" in outcome.stderr


def test_compare_says_where_ranks_are_lower(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftx.train import comparison

    monkeypatch.setattr(comparison, "apart", lambda function, settings: function(settings))
    given = ("--methods", "lora,loldu", "--equal", "none", "--seeds", 1)
    outcome = call("compare", folder, "stories", tmp_path / "out", *given)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    assert "loldu has rank 32 in k_proj, v_proj (no wider)" in outcome.stdout
    assert "loldu has rank 32 in k_proj, v_proj (no wider)" in (tmp_path / "out" / "results.md").read_text()
    again = call("compare", folder, "stories", tmp_path / "out", *given)
    assert again.exit_code == 0 and "loldu has rank 32" in again.stdout
    budget = ("--methods", "loldu,lora", "--equal", "budget", "--seeds", 1)
    outcome = call("compare", folder, "stories", tmp_path / "budget", *budget)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)


@pytest.mark.parametrize("name", ["loldu", "fedsvd", "fedsvd-orthonormal", "flora", "psoft", "miss"])
@pytest.mark.parametrize(("width", "heads", "pairs"), [(24, 6, 1), (32, 2, 1), (6, 1, 1)])
def test_every_bounded_method_fits_at_its_default(name: str, width: int, heads: int, pairs: int) -> None:
    model, method = llama(width, heads, pairs, wide=80), methods.find(name)
    config = methods.peft_config(method, methods.check_settings(method, {}), "CAUSAL_LM")
    rank = getattr(config, method.rank_field)
    narrow = methods.fit_ranks(config, method, {}, model)
    get_peft_model(model, config)
    keys = width // heads * pairs
    bound = width if name == "miss" else keys
    assert narrow.get("k_proj") == (bound if bound < rank else None)
    if narrow and hasattr(config, "lora_alpha") and hasattr(config, "alpha_pattern"):
        assert config.alpha_pattern["k_proj"] / narrow["k_proj"] == config.lora_alpha / rank


def test_layers_of_one_name_and_several_widths() -> None:
    model, method = llama(64, 2, 2, deep=2), methods.find("loldu")
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(64, 20, bias=False)
    config = methods.peft_config(method, {"rank_pattern": {"v_proj": 3}}, "CAUSAL_LM")
    narrow = methods.fit_ranks(config, method, {"rank_pattern": {"v_proj": 3}}, model)
    assert narrow == {"model.layers.1.self_attn.k_proj": 20}
    assert config.rank_pattern == {"v_proj": 3, **narrow}
    adapted = get_peft_model(model, config)
    ranks = {
        n.split("model.layers.")[1].split(".loldu")[0]: p.numel() for n, p in adapted.named_parameters() if ".z" in n
    }
    assert ranks["0.self_attn.k_proj"] == 64 and ranks["1.self_attn.k_proj"] == 20 and ranks["1.self_attn.v_proj"] == 3


def test_targets_that_are_named() -> None:
    model, method = llama(64, 8, 4, deep=2), methods.find("loldu")
    for chosen, wanted in ((["q_proj"], {}), (r".*\.1\.self_attn\.(k|q)_proj", {"k_proj": 32})):
        config = methods.peft_config(method, {"target_modules": chosen}, "CAUSAL_LM")
        assert methods.fit_ranks(config, method, {"target_modules": chosen}, model) == wanted
