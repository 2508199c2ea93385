"""Adapters as GGUF, in llama.cpp itself: its tokens and log-probabilities are those of transformers with PEFT."""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from conftest import CASES, adapted, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import peftx
from peftx.cli import app
from peftx.hub.gguf import FAMILIES, FILE

pytestmark = pytest.mark.serving
gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from engines import distance, serve, write_base

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = {
    "gemma": dict(head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3_text": dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "granite": dict(attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0),
    "phi3": dict(original_max_position_embeddings=64),
    "qwen3": dict(head_dim=16),
    "smollm3": dict(num_hidden_layers=5),  # of which the fourth has no rotary positions
}
ROUGH = {
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "gpt2",
    "starcoder2",
}  # llama.cpp looks GELU up in a half-precision table


def tiny(kind: str, **settings):
    sizes = {**SMALL, **SIZES.get(kind, {}), **settings}
    if kind == "gpt2":
        sizes = {key: value for key, value in sizes.items() if key.endswith("_id") or key.startswith(("n_", "vocab"))}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def linear(model) -> list[str]:
    """All linear layers, the head too where it is not the embeddings."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return [name for name in names if name != "lm_head" or not model.config.tie_word_embeddings]


def tensors(folder: Path) -> dict[str, tuple]:
    return {t.name: (t.tensor_type.name, t.data.copy()) for t in gguf.GGUFReader(folder / FILE).tensors}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tiny("llama"), tmp_path_factory.mktemp("base") / "llama.gguf")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_with_ranks_and_alphas_that_differ(tmp_path, kind):
    base = write_base(tiny(kind), tmp_path / "base.gguf")
    tolerance = 2e-3 if kind in ROUGH else 1e-5
    assert distance(tiny(kind), serve(base), PROMPT) < tolerance
    model = tiny(kind)
    ranks = {"k_proj": 2, "c_attn": 3, "down_proj": 5, "fc1": 1}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=linear(model), init_lora_weights=False, rank_pattern=ranks)
    config.alpha_pattern, config.fan_in_fan_out = {"v_proj": 3, "o_proj": 1.5}, kind == "gpt2"
    model = get_peft_model(model, config).eval()
    assert set(peftx.export_gguf(model, tmp_path / "out").values()) == {0.0}
    server = serve(base, (tmp_path / "out" / FILE, 1.0))
    assert distance(model, server, PROMPT) < tolerance
    with torch.no_grad(), model.disable_adapter():
        assert distance(model, serve(base), PROMPT) < tolerance  # the adapter is not in the base
        plain = model(torch.tensor([PROMPT])).logits
    assert (model(torch.tensor([PROMPT])).logits - plain).abs().max() > 0.5


def test_every_method_from_the_model_and_from_its_folder(tmp_path, base, mergeable):
    case = mergeable
    tiny("llama").save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rank = None if case.lora_export == "exact" else 32
    model = adapted(loaded, case, target_modules=linear(loaded), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    for source, out in ((model, "one"), (tmp_path / "adapter", "two")):
        errors = peftx.export_gguf(source, tmp_path / out, rank=rank)
        assert len(errors) == 15 and max(errors.values()) < 1e-5
    assert distance(model, serve(base, (tmp_path / "one" / FILE, 1.0)), PROMPT) < 5e-5
    assert tensors(tmp_path / "one").keys() == tensors(tmp_path / "two").keys()
    assert distance(model, serve(base, (tmp_path / "two" / FILE, 1.0)), PROMPT) < 5e-5


def test_scales_that_were_set_and_several_at_once(tmp_path, base):
    config = LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "k_proj"], init_lora_weights=False
    )
    model = get_peft_model(tiny("llama"), config).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj", "up_proj"], init_lora_weights=False))
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(0.5)
    for name in ("default", "other"):
        peftx.export_gguf(model, tmp_path / name, name)
    model.base_model.set_adapter(["default", "other"])
    server = serve(base, *((tmp_path / name / FILE, 1.0) for name in ("default", "other")))
    assert distance(model, server, PROMPT) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.1)])
def test_dtypes(tmp_path, base, dtype, tolerance):
    model = tiny("llama")
    config = LoraConfig(r=4, target_modules=linear(model), init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    peftx.export_gguf(model, tmp_path / "out", dtype=getattr(torch, dtype))
    peftx.export_gguf(model, tmp_path / "exact")
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    exact = tensors(tmp_path / "exact")
    for name, (found, data) in tensors(tmp_path / "out").items():
        values = torch.from_numpy(data)
        values = values.view(torch.bfloat16) if dtype == "bfloat16" else values
        assert found == kind and torch.equal(values, torch.from_numpy(exact[name][1]).to(getattr(torch, dtype)))
    worst = distance(model, serve(base, (tmp_path / "out" / FILE, 1.0)), PROMPT, tokens=1)
    assert worst < tolerance


def test_the_fields_of_the_file(tmp_path):
    model = get_peft_model(tiny("qwen2"), LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"]))
    model.peft_config["default"].base_model_name_or_path = "some-one/a-model"
    peftx.export_gguf(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".peftx.json", "README.md", FILE]
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / FILE).fields.items()}
    wanted = {"architecture": "qwen2", "type": "adapter", "base_model.0.organization": "Some One"}
    assert {name: fields.get(f"general.{name}") for name in list(wanted)[:2]} == dict(list(wanted.items())[:2])
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 8
    assert fields["general.base_model.0.name"] == "a-model"
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    peftx.export_gguf(model, tmp_path / "out")
    assert str(tmp_path).encode() not in (tmp_path / "out" / FILE).read_bytes()


def lora(kind="llama", settings=(), **config):
    config = {"r": 2, "target_modules": ["q_proj"], **config}
    return get_peft_model(tiny(kind, **dict(settings)), LoraConfig(**config))


def gradnorm():
    case = next(case for case in CASES if case.info.name == "gradnormlorp")
    return adapted(tiny("llama"), case, target_modules=["q_proj"])


REFUSED = {
    "dora": (lambda: lora(use_dora=True), "llama.cpp has no DoRA: .*merge it instead"),
    "gradnormlorp": (gradnorm, r"llama.cpp has no DoRA: cut GradNormLoRP's delta to a plain LoRA \(`--rank`"),
    "modules_to_save": (
        lambda: lora(modules_to_save=["input_layernorm"]),
        "cannot hold .*input_layernorm.weight and 1 more tensors",
    ),
    "bias": (lambda: lora("qwen2", bias="all"), "cannot hold .*bias and .* more tensors that were trained in full"),
    "lora_bias": (lambda: lora("qwen2", lora_bias=True), "no form of lora_bias: merge it"),
    "tokens": (lambda: lora(trainable_token_indices=[3]), "no form of trainable_token_indices: merge it"),
    "embedding": (lambda: lora(target_modules=["embed_tokens"]), "adapted embedding, model.embed_tokens of a llama"),
    "tied head": (
        lambda: lora("gemma", target_modules=["lm_head"]),
        "lm_head of a gemma model is the embedding itself, and cannot be adapted alone",
    ),
    "pissa": (lambda: lora(init_lora_weights="pissa"), r"its start \(pissa\) has changed"),
    "family": (lambda: lora("gpt_neox", target_modules=["dense"]), "type 'gpt_neox' has no known form .* only llama, "),
    "no transformers model": (
        lambda: get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"])),
        "of the type None has no known form in GGUF",
    ),
    "compacter": (
        lambda: get_peft_model(tiny("llama"), peftx.CompacterConfig(target_modules=["o_proj"], phm_dim=2)),
        "COMPACTER adapters cannot be merged or converted",
    ),
    "bat": (
        lambda: adapted(tiny("llama"), next(c for c in CASES if c.name == "bone-bat"), target_modules=["q_proj"]),
        "no exact LoRA form",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused_with_the_way_out(tmp_path, what):
    make, message = REFUSED[what]
    with pytest.raises(NotImplementedError, match=message):
        peftx.export_gguf(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_are_refused_and_attention_beside_them_has_no_family(tmp_path):
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = tiny("qwen3_moe", **sizes)
    with pytest.raises(NotImplementedError, match="'qwen3_moe' has no known form"):
        peftx.export_gguf(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tmp_path / "out")


def test_values_and_arguments_that_cannot_be(tmp_path):
    model = lora(init_lora_weights=False)
    with pytest.raises(ValueError, match="`dtype` must be float32, float16 or bfloat16, got torch.float64"):
        peftx.export_gguf(model, tmp_path / "out", dtype=torch.float64)
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)
    weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="attn_q has values that float16 cannot hold: name another `dtype`"):
        peftx.export_gguf(model, tmp_path / "out", dtype=torch.float16)
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="attn_q has values that float32 has no number for"):
        peftx.export_gguf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lora().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="name it by `base_model`"):
        peftx.export_gguf(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=r"config of the base model .*nowhere cannot be read"):
        peftx.export_gguf(tmp_path / "adapter", tmp_path / "out", base_model=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is the adapter itself"):
        peftx.export_gguf(tmp_path / "adapter", tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).write_text("another's")
    with pytest.raises(ValueError, match="is there already, and not by peftx export"):
        peftx.export_gguf(tmp_path / "adapter", tmp_path / "out", base_model=tiny("llama"))
    assert (tmp_path / "out" / FILE).read_text() == "another's"


def test_a_head_with_other_rows_than_the_base_s_is_refused(tmp_path):
    model = tiny("qwen2")
    model.resize_token_embeddings(70, mean_resizing=False)
    model.config.vocab_size = 64
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(NotImplementedError, match="cannot hold"):
        peftx.export_gguf(model, tmp_path / "out")


def test_the_command(tmp_path, base):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = adapted(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        next(case for case in CASES if case.name == "bone-bat"),
        target_modules=["q_proj", "k_proj"],
        task_type="CAUSAL_LM",
    )
    model.save_pretrained(tmp_path / "adapter")

    def call(*words):
        return CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), *map(str, words)])

    outcome = call(tmp_path / "out", "--to", "gguf", "--rank", 32, "--dtype", "float16")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert "LoRA adapter of 4 modules for llama.cpp, exact" in outcome.output
    assert {kind for kind, _ in tensors(tmp_path / "out").values()} == {"F16"}
    assert distance(model, serve(base, (tmp_path / "out" / FILE, 1.0)), PROMPT, tokens=1) < 0.01
    for words, message in (
        ([tmp_path / "out", "--to", "gguf"], "is not empty: name another folder, or say --overwrite"),
        ([tmp_path / "two", "--to", "gguf"], "no exact LoRA form"),
        ([tmp_path / "two", "--to", "gguf", "--base-model", tmp_path / "no"], "cannot be read"),
    ):
        outcome = call(*words)
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1) and message in outcome.stderr
    assert call(tmp_path / "out", "--to", "gguf", "--rank", 4, "--overwrite").exit_code == 0
    assert {kind for kind, _ in tensors(tmp_path / "out").values()} == {"F32"}


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    lora().save_pretrained(tmp_path / "adapter")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "peftx\[gguf\]"'):
        peftx.export_gguf(lora(), tmp_path / "out")
    outcome = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "gguf"])
    assert outcome.exit_code == 2 and outcome.stderr == 'peftx: gguf is missing: pip install "peftx[gguf]"\n'


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names the folder of SmolLM2-135M-Instruct")
@pytest.mark.parametrize("variant", ["bone", "loldu", "allora"])
def test_a_real_model_answers_the_same(tmp_path, variant):
    """Real weights, real prompts, all seven linear layers; llama.cpp on the base in F32."""
    folder = os.environ["SMOLLM2"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    base = write_base(model, tmp_path / "base.gguf", tokenizer)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]
    plain = serve(base)
    bare = [distance(model, plain, tokenizer(prompt)["input_ids"], 8, 20) for prompt in prompts]
    case = next(case for case in CASES if case.name == variant)
    model = adapted(model, case, r=8, target_modules="all-linear")
    peftx.export_gguf(model, tmp_path / "out")
    server = serve(base, (tmp_path / "out" / FILE, 1.0))
    found = [distance(model, server, tokenizer(prompt)["input_ids"], 24, 20) for prompt in prompts]
    print(json.dumps({"variant": variant, "base": max(bare), "adapted": max(found)}))
    assert max(bare) < 1e-3 and max(found) < 1e-2


def test_the_smallest_model_of_all_tests_is_a_family(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    peftx.export_gguf(model, tmp_path)
    base = write_base(tiny_model("llama"), tmp_path / "base.gguf")
    assert distance(model, serve(base, (tmp_path / FILE, 1.0)), PROMPT) < 1e-5
