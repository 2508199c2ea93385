"""Compressed models go through files, PEFT, Trainer and torch.compile; what does not fit stops with one error."""

import copy
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import logits, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import peftx
from peftx.cli import app
from peftx.compression import (
    LowRankConfig,
    LowRankLinear,
    card,
    collect,
    compress,
    evaluate,
    materialize,
    plot,
    recover,
)

KINDS = {
    "llama": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


def small(kind: str, keep: float = 0.7, dtype: torch.dtype = torch.float32):
    model, _ = compress(tiny_model(kind).to(dtype), keep=keep, method="svd", progress=False)
    return model


def low_rank(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def changed(folder: Path, **fields) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_round_trip_is_exact_twice(kind, tokens, tmp_path):
    model = small(kind)
    wanted = logits(model, tokens)
    for folder in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "lowrank_svd" and set(config["ranks"]) == set(low_rank(model))
        loaded, info = KINDS[kind].from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert type(loaded) is type(model) and not loaded.training
        assert str(loaded) == str(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(logits(loaded, tokens), wanted)
        model = loaded


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_in_low_precision(kind, dtype, tokens, tmp_path):
    model = small(kind, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = KINDS[kind].from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    kept = {type(p) and name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert all(".wo." in name for name in kept)  # T5 keeps these in fp32, whatever the file has
    assert logits(loaded, tokens).isfinite().all()
    if not kept:
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    single = KINDS[kind].from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}


def test_sharded_and_mapped_files(tokens, tmp_path):
    model = small("llama")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for settings in ({}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}, {"device_map": "auto"}):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_classifier_loads_as_base_model_and_back(tokens, tmp_path):
    model = small("bert")
    model.save_pretrained(tmp_path / "classifier")
    base = transformers.AutoModel.from_pretrained(tmp_path / "classifier")
    assert set(low_rank(base)) == {name.removeprefix("bert.") for name in low_rank(model)}
    hidden = model.bert(tokens).last_hidden_state
    assert torch.equal(base(tokens).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    assert all(name.startswith("encoder.") for name in json.loads((tmp_path / "base/config.json").read_text())[
        "quantization_config"]["ranks"])  # fmt: skip
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert set(low_rank(again)) == set(low_rank(model))
    assert torch.equal(again.bert(tokens).last_hidden_state, hidden)


def test_parts_of_a_model_load_alone(tokens, tmp_path):
    model = small("t5")
    model.save_pretrained(tmp_path)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert all(name.startswith("encoder.") for name in low_rank(encoder)) and low_rank(encoder)
    assert torch.equal(encoder(tokens).last_hidden_state, model.encoder(tokens).last_hidden_state)
    decoder = small("llama")
    decoder.save_pretrained(tmp_path / "llama")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "llama")
    assert torch.equal(loaded(tokens).last_hidden_state, decoder.model(tokens).last_hidden_state)


def stock(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs code with transformers alone."""
    script = f"import sys, transformers, torch\nfolder = sys.argv[1]\n{code}\nassert 'peftx' not in sys.modules"
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=600, check=False
    )


def test_without_peftx_loading_fails_and_materialized_models_load(tokens, tmp_path):
    model = small("gpt2")
    model.save_pretrained(tmp_path / "small")
    wanted = logits(model, tokens)
    assert materialize(model) is model and not low_rank(model)
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D) and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "dense")
    torch.save(tokens, tmp_path / "tokens")
    code = """
from pathlib import Path
for kind in ("AutoModelForCausalLM", "AutoModel"):
    try:
        getattr(transformers, kind).from_pretrained(Path(folder) / "small")
    except RuntimeError as error:
        assert "size mismatch" in str(error) or "mismatch" in str(error), error
    else:
        raise SystemExit(f"{kind} returned a model")
dense, info = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "dense", output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(dense(torch.load(Path(folder) / "tokens")).logits, Path(folder) / "logits")
"""
    run = stock(code, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model, tokens))


@pytest.mark.parametrize("kind", list(KINDS))
def test_materialized_models_have_the_layers_of_before(kind, tokens, tmp_path):
    before, model = tiny_model(kind), small(kind)
    wanted = logits(model, tokens)
    materialize(model)
    assert str(model) == str(before)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=1e-4, atol=1e-5)
    compress(model, keep=0.5, method="svd", progress=False)  # and can be compressed again


# --- files that nobody should trust ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "ranks must map"),
        (None, "ranks must map"),
        (["q_proj"], "ranks must map"),
        ({"model.layers.0.self_attn.q_proj": 0}, "positive integer, got 0"),
        ({"model.layers.0.self_attn.q_proj": "4"}, "positive integer, got '4'"),
        ({"model.layers.0.self_attn.q_proj": True}, "positive integer, got True"),
        ({"model.layers.0.self_attn.q_proj": 2.0}, "positive integer, got 2.0"),
        ({"model.layers.0.self_attn.q_proj": 17}, "at most rank 16"),
        ({"model.layers.7.self_attn.q_proj": 4}, "does not have"),
        ({"nonsense": 4}, "does not have"),
        ({"model.layers.0.self_attn": 4}, "not a Linear"),
        ({"model.embed_tokens": 4}, "not a Linear"),
        ({"": 4}, "not a Linear"),
    ],
)
def test_ranks_that_cannot_be_are_refused(ranks, message, tmp_path):
    small("llama").save_pretrained(tmp_path)
    changed(tmp_path, ranks=ranks)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_ranks_that_contradict_the_weights_are_refused(tmp_path):
    model = small("llama")
    model.save_pretrained(tmp_path)
    name, layer = next(iter(low_rank(model).items()))
    ranks = dict(model.config.quantization_config.ranks)
    changed(tmp_path, ranks={**ranks, name: layer.rank - 1})
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    del ranks[name]  # a layer that is factorised in the file, and not in the config
    changed(tmp_path, ranks=ranks)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_factors_are_not_drawn_at_random(tmp_path):
    model = small("llama")
    model.save_pretrained(tmp_path)
    name = next(iter(low_rank(model)))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{name}.up.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint has no {name}.up.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_of_the_future_is_read_as_far_as_it_is_known(tokens, tmp_path, caplog):
    model = small("llama")
    model.save_pretrained(tmp_path)
    changed(tmp_path, sparse=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_config_is_no_recipe_for_a_dense_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a model that"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=LowRankConfig({"model.layers.0.self_attn.q_proj": 4})
        )


def test_bitsandbytes_is_refused_with_a_reason(tmp_path):
    pytest.importorskip("bitsandbytes")
    small("llama").save_pretrained(tmp_path)
    for bits in ({"load_in_8bit": True}, {"load_in_4bit": True}):
        settings = transformers.BitsAndBytesConfig(**bits)
        with pytest.raises(ValueError, match="LowRankConfig but you are passing a BitsAndBytesConfig"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)


# --- an ordinary model -----------------------------------------------------------------------------------------------


def test_the_layer_is_an_ordinary_module():
    state = torch.get_rng_state()
    layer = LowRankLinear.like(nn.Linear(12, 8), 3)
    assert not torch.equal(torch.get_rng_state(), state)  # by nn.Linear(12, 8)
    state = torch.get_rng_state()
    layer = LowRankLinear(12, 8, 3, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    for p in layer.parameters():
        nn.init.normal_(p)
    assert set(layer.state_dict()) == {"weight", "down.weight", "up.weight", "up.bias"}
    assert "in_features=12, out_features=8, rank=3" in repr(layer)
    x = torch.randn(5, 12, dtype=torch.float64)
    dense = layer.dense()
    torch.testing.assert_close(layer(x), dense(x))
    assert layer.weight.dtype == torch.float64 and layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert LowRankLinear(12, 8, 3, bias=False).bias is None
    with torch.device("meta"):
        assert LowRankLinear(12, 8, 3).up.weight.is_meta


@pytest.mark.parametrize("targets", [["down", "up"], "all-linear"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_adapters_go_on_the_factors(kind, targets, tokens, tmp_path):
    small(kind).save_pretrained(tmp_path / "base")
    load = lambda: KINDS[kind].from_pretrained(tmp_path / "base")
    task = {"bert": "SEQ_CLS"}.get(kind, "CAUSAL_LM")
    model = peft.get_peft_model(load(), peft.LoraConfig(r=2, target_modules=targets, task_type=task))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert sum(name.endswith((".up", ".down")) for name in wrapped) == 2 * len(low_rank(load()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    labels = torch.tensor([0, 1, 2]) if kind == "bert" else tokens
    for _ in range(2):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    wanted = logits(model, tokens)
    assert not torch.equal(wanted, logits(load(), tokens))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), wanted)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), wanted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = KINDS[kind].from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, tokens), logits(merged, tokens))


def test_adapters_of_peftx_go_on_the_factors(tokens):
    model = small("llama")
    before = logits(model, tokens)
    model = peft.get_peft_model(model, peftx.BoneConfig(r=2, target_modules=["down", "up"])).eval()
    assert torch.equal(logits(model, tokens), before)


def test_an_adapter_on_the_factors_must_be_merged_before_they_are_multiplied():
    model = peft.get_peft_model(small("llama"), peft.LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match="merge the adapter first"):
        materialize(model)
    assert low_rank(model)


def test_an_adapter_on_the_whole_layer_is_refused_by_peft():
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(small("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("loaded", [False, True])
def test_trainer_recovers_all_factors(loaded, tokens, tmp_path):
    model = small("bert")
    if loaded:
        model.save_pretrained(tmp_path / "small")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(tokens)] * 4
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=3,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    for name, parameter in model.named_parameters():
        if ".up." in name or ".down." in name:
            assert not torch.equal(parameter, before[name]), name
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(again, tokens), logits(model.eval(), tokens))


@pytest.mark.parametrize("kind", ["tokens", "gpt2"])
def test_evaluation_does_not_depend_on_batches(kind):
    """Means over unequally many supervised tokens add up to the mean over all of them."""
    torch.manual_seed(0)
    config = tiny_model("bert").config
    model = transformers.BertForTokenClassification(config).eval() if kind == "tokens" else tiny_model(kind)
    data = [
        {"input_ids": torch.arange(1, 7), "labels": torch.tensor([1, 2] + [-100] * i + [0] * (4 - i))} for i in range(4)
    ]
    whole, single = (
        evaluate(model, data, transformers.default_data_collator, batch_size=size, progress=False)["loss"]
        for size in (4, 1)
    )
    assert whole == pytest.approx(single, rel=1e-5)


def test_evaluation_leaves_the_mode_of_every_module(tokens):
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    data = [{"input_ids": row, "labels": row} for row in tokens]
    evaluate(model, data, transformers.default_data_collator, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_recovery_of_half_precision_is_in_float32(tokens):
    """A step of the size of a tenth of a bf16 digit moves weights, and dtypes are what they were."""
    model, whole = small("llama", dtype=torch.bfloat16), small("llama")
    whole.load_state_dict(model.state_dict())
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in tokens] * 8
    for one in (model, whole):
        recover(one, data, transformers.default_data_collator, learning_rate=3e-5, progress=False)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].bfloat16()), name


def test_a_loaded_model_can_be_cast_moved_generated_from_and_checkpointed(tokens, tmp_path):
    small("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(model, "is_quantized", False)
    assert model.generate(tokens[:1], max_new_tokens=3, min_new_tokens=3).shape == (1, 10)
    model.gradient_checkpointing_enable()
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.down.weight.grad is not None for layer in low_rank(model).values())
    assert model.bfloat16().half().float().dtype == torch.float32


def test_copies_and_pickles(tokens):
    model = small("llama")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_other_heads_and_ignored_sizes(tokens, tmp_path):
    model = small("llama")
    model.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert set(low_rank(classifier)) == set(low_rank(model))
    found = classifier.model(tokens).last_hidden_state
    assert torch.equal(found, model.model(tokens).last_hidden_state)
    name, layer = next(iter(low_rank(model).items()))
    changed(tmp_path, ranks={**model.config.quantization_config.ranks, name: layer.rank - 1})
    with pytest.raises((ValueError, RuntimeError), match="random ones mean nothing|mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_compile(tokens):
    model = small("llama")
    wanted = logits(model, tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)


def test_import_peftx_is_enough_and_light():
    script = """
import peft, sys
before = set(sys.modules)
import peftx
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "lowrank_svd" in AUTO_QUANTIZER_MAPPING
assert not {"matplotlib", "datasets", "typer", "transformers.trainer"} & (set(sys.modules) - before)
from peftx.compression import __all__, collect, compress
assert callable(collect) and callable(compress) and callable(peftx.compression.collect)
assert all(hasattr(peftx.compression, name) for name in __all__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr


# --- reports ---------------------------------------------------------------------------------------------------------


def test_card_and_picture(tmp_path):
    _, report = compress(tiny_model("bert"), keep=0.6, method="svd", progress=False)
    text = card(
        report,
        name="me/small",
        base_model="me/large",
        loader="AutoModelForSequenceClassification",
        score="accuracy on 872 sentences",
        scores={"dense": 0.91, "compressed": 0.72, "recovered": 0.905},
        calibration="512 sentences",
    )
    from huggingface_hub import ModelCard

    parsed = ModelCard(text)
    assert parsed.data.base_model == "me/large" and "peftx" in parsed.data.tags
    assert parsed.text.split("```python\n")[1].startswith("import peftx\n")
    for number in ("0.9100", "0.7200", "0.9050", f"{report.parameters[1]:,}", "512 sentences"):
        assert number in text
    figure = plot(
        {"svd": [(0.5, 0.6), (0.9, 0.8)], "fwsvd": [(0.9, 0.85)]},
        score="accuracy",
        dense=0.9,
        recovered={"svd": [(0.5, 0.88)]},
    )
    assert len(figure.axes) == 2
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.5, 0.9]
    figure.savefig(tmp_path / "picture.png")


# --- the command line ------------------------------------------------------------------------------------------------


def call(*arguments: object):
    return CliRunner().invoke(app, ["compress", *(str(a) for a in arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with a tokenizer of the words w1 to w62, an adapter, and labelled texts."""
    folder = tmp_path_factory.mktemp("compress")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 64)}}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model = tiny_model("bert")
    model.save_pretrained(folder / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
        folder / "model"
    )
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    lines = [json.dumps({"text": f"w{i % 60 + 1} w{i * 7 % 60 + 1} w{i % 3 + 60}", "label": i % 3}) for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_command_compresses_recovers_and_writes_a_card(folder, tokens, tmp_path):
    out, picture = tmp_path / "small", tmp_path / "picture.png"
    outcome = call(
        *("--model", folder / "model", "--adapter", folder / "adapter", "--data", folder / "data.jsonl", "--out", out),
        *("--keep", 0.7, "--eval-share", 0.25, "--plot", picture, "--layers", "--learning-rate", 0.001),
    )
    assert outcome.exit_code == 0, outcome.output
    assert "fewer in the whole model" in outcome.output and "recovered" in outcome.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = (out / "README.md").read_text()
    assert "accuracy on 10 held-out samples" in page and "30 samples" in page and "import peftx" in page
    assert str(tmp_path) not in page and str(folder) not in page
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert low_rank(model) and logits(model, tokens).isfinite().all()
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == 64


def test_the_command_takes_statistics_from_a_file(folder, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    samples = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(i % 3)} for i in range(6)]
    collect(model, samples, what=["gram"], progress=False).save(tmp_path / "statistics")
    common = ("--model", folder / "model", "--data", folder / "data.jsonl", "--statistics", tmp_path / "statistics")
    outcome = call(*common, "--out", tmp_path / "a", "--method", "svd-llm", "--recover-epochs", 0)
    assert outcome.exit_code == 0, outcome.output
    assert "6 samples" in (tmp_path / "a" / "README.md").read_text()
    outcome = call(*common, "--out", tmp_path / "b", "--method", "fwsvd", "--recover-epochs", 0)
    assert outcome.exit_code == 2 and "no fisher_in was collected" in outcome.stderr
    assert not (tmp_path / "b").exists()


def test_the_command_goes_on_after_an_interruption(folder, tmp_path):
    common = ("--model", folder / "model", "--data", folder / "data.jsonl", "--resume", tmp_path / "work")
    common = (*common, "--recover-epochs", 0, "--keep", 0.7)
    compressing = sys.modules[compress.__module__]
    calls = []

    def solve(*args, stop=None, original=compressing.solve, **kwargs):
        calls.append(1)
        if len(calls) == stop:
            raise OSError("no space left on device")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing, "solve", partial(solve, stop=5))
        outcome = call(*common, "--out", tmp_path / "a")
    assert outcome.exit_code == 2 and "no space left" in outcome.stderr and not (tmp_path / "a").exists()
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing, "solve", solve)
        patch.setattr("peftx.compression.collection.gather", None)  # the statistics are there
        outcome = call(*common, "--out", tmp_path / "b")
    assert outcome.exit_code == 0, outcome.output
    assert len(calls) == 12 - 4
    assert call(*common[:4], *common[6:], "--out", tmp_path / "c").exit_code == 0
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "{folder}/data.jsonl"], "--resume must be a folder"),
        (["--keep", "1.5"], "keep must be a share in (0, 1), got 1.5"),
        (["--method", "tucker"], "method must be one of"),
        (["--out", "{folder}"], ", which is never changed: name another folder"),
        (["--data", "{folder}/none.jsonl"], "none.jsonl"),
        (["--eval-share", "1"], "--eval-share must be in (0, 1)"),
        (["--plot", "{folder}/none/picture.png"], "there is no folder"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--statistics", "{folder}/data.jsonl"], "holds no statistics"),
        (["--task", "TOKEN_CLS"], "--task must be one of"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, tmp_path):
    common = ["--model", folder / "model", "--data", folder / "data.jsonl", "--out", tmp_path / "out"]
    outcome = call(*common, *[argument.format(folder=folder) for argument in arguments])
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.startswith("peftx: ") and message in outcome.stderr and outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
