"""`peftx train` and `peftx compare`, on tiny models and data."""

import csv
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from conftest import EXAMPLES, tiny_model, words
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import peftx
from peftx.cli import app
from peftx.data.records import hold_out, label_names, read, read_both
from peftx.train import (
    CompareSettings,
    TrainSettings,
    apart,
    comparison,
    methods,
    parse,
    plan,
    read_yaml,
    report,
    results,
    run,
    sizes,
)
from peftx.train.settings import nearest

NEW_HEAD = ("--model", "{files}/encoder", "--task", "SEQ_CLS")
SHORT = ("--max-steps", 2, "--batch-size", 4, "--training", "use_cpu=true", "--training", "disable_tqdm=true")


def quantisable() -> transformers.PreTrainedModel:
    """Wide enough for bitsandbytes' CPU kernels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their tokenizers; questions with answers; texts of two classes."""
    folder = tmp_path_factory.mktemp("train")
    for name in ("llama", "bert", "t5"):
        tiny_model(name).save_pretrained(folder / name)
    quantisable().save_pretrained(folder / "wide")
    tiny_model("bert").bert.save_pretrained(folder / "encoder")
    for name in ("llama", "bert", "t5", "wide", "encoder"):
        words().save_pretrained(folder / name)
    draw = random.Random(0)
    numbers = [[draw.randrange(1, 60) for _ in range(4 + i % 3)] for i in range(40)]
    texts = [" ".join(f"w{token}" for token in row) for row in numbers]
    pairs = [{"question": text, "answer": text[: text.index(" ", 4 * (i % 2))]} for i, text in enumerate(texts)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    labelled = [(text, ("even", "odd")[row[0] % 2]) for text, row in zip(texts, numbers, strict=True)]
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        lines = [comma.join(line) for line in [("text", "label"), *labelled]]
        (folder / f"classes{suffix}").write_text("\n".join(lines))
    rows = [{"text": text, "label": label} for text, label in labelled]
    (folder / "classes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["even", "odd"]))
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "classes.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False)


def call(command: str, *arguments: object) -> Any:
    return CliRunner().invoke(app, [command, *(str(part) for part in arguments)], env={"COLUMNS": "200"})


def trained(command: str, *arguments: object) -> dict[str, Any]:
    """What is in metrics.json after a run that must succeed."""
    outcome = call(command, *arguments)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    output = arguments[arguments.index("--output") + 1]
    return json.loads(Path(str(output), "metrics.json").read_text())


def settings(files: Path, output: Path, **changes: Any) -> TrainSettings:
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    changes["training"] = {**training, **changes.get("training", {})}
    model, data = changes.pop("model", "llama"), changes.pop("data", "pairs.jsonl")
    return TrainSettings(model=str(files / model), data=str(files / data), output=str(output), **changes)


# One run


def test_the_training_loss_is_that_of_all_steps(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out, *SHORT, "--max-steps", 5)
    whole = trained("train", *data, "--training", "save_steps=3", "--training", "logging_steps=1000")
    each = [entry["loss"] for entry in whole["history"] if "loss" in entry]
    assert len(each) == 2 and whole["train_loss"] == pytest.approx((3 * each[0] + 2 * each[1]) / 5)
    again = trained("train", "--output", out, "--resume")  # nothing is left to do
    assert again["train_loss"] == whole["train_loss"] and again["steps"] == 5
    shutil.rmtree(out / "checkpoint-5")
    assert trained("train", "--output", out, "--resume")["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)


def test_a_folder_without_a_run_has_nothing_to_resume(tmp_path: Path) -> None:
    outcome = call("train", "--output", tmp_path, "--resume")
    assert outcome.exit_code == 2 and f"peftx: nothing to resume in {tmp_path}" in outcome.stderr


def test_other_data_come_without_the_parts_of_the_files(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: owner/model\ndata: owner/data\nsubset: main\neval_split: test\n")
    given = ("--config", tmp_path / "run.yaml", "--model", files / "llama", "--data", files / "pairs.jsonl")
    trained("train", *given, "--output", tmp_path / "out", *SHORT)
    outcome = call("train", *given, "--output", tmp_path / "again", *SHORT, "--subset", "other")
    assert outcome.exit_code == 2 and "subset is 'other', but" in outcome.stderr


@pytest.mark.parametrize("method", ["lora", "bone"])
def test_the_card_says_once_how_it_was_trained(files: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    metrics = trained("train", "--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out, *SHORT,
                      "--method", method)  # fmt: skip
    before = (out / "README.md").read_text()
    assert before.count("## Training run") == 1 and "Framework versions" in before
    assert "## Load this adapter" in before and "More Information Needed" not in before
    assert ("import peftx" in before) == (method == "bone")
    results.finish(out, metrics)
    assert (out / "README.md").read_text() == before
    for accuracy in (0.5, 0.6):
        peftx.hub.finish_card(out, metrics={"accuracy": accuracy}, dataset="owner/data")
    results.finish(out, metrics)
    card = (out / "README.md").read_text()
    parts = ("## Training run", "\n## Results\n", "| **this model** | 0.6 |", "### Framework versions")
    assert [card.count(part) for part in parts] == [1] * 4


def test_an_adapter_is_trained_saved_and_measured(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out, *SHORT)
    outcome = call("train", *arguments, "--method", "loldu", "--set", "r=4", "--eval-share", 0.2)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    metrics = json.loads((out / "metrics.json").read_text())
    assert outcome.stdout.startswith("loldu: 70 values, 2 steps at learning rate 0.002, training loss")
    assert outcome.stdout.endswith(f"{out}\n") and outcome.stdout.count("\n") == 1
    assert metrics["trained_values"] == {"adapter": 70, "whole_modules": 0} and metrics["steps"] == 2
    assert metrics["samples"] == {"train": 32, "trained_on": 32, "eval": 8}
    assert metrics["method_settings"] == {"r": 4} and metrics["seed"] == 42
    assert metrics["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert {"tokenizer.json", "settings.yaml", "README.md"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("training_args.bin"))
    card = (out / "README.md").read_text()
    assert "import peftx" in card and f"| loss, 8 held-out samples | {metrics['eval']['loss']:.4f} |" in card

    # The loss is the mean over all held-out tokens, by the adapter as it was saved.
    _, held = hold_out(read(str(files / "pairs.jsonl")), 0.2)
    model, tokenizer = peftx.hub.load_adapter(out), words()
    losses = []
    for pair in held:
        prompt = tokenizer(pair["question"] + "\n").input_ids
        answer = [*tokenizer(pair["answer"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        losses += (-scores.log_softmax(-1)[torch.arange(len(answer)), answer]).tolist()
    wanted = sum(losses) / len(losses)
    assert metrics["eval"]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["eval"]["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)


def test_flags_win_over_the_file(files: Path, tmp_path: Path) -> None:
    page = f"""
model: {files / "llama"}
data: {files / "pairs.jsonl"}
output: {tmp_path / "out"}
method: bone
method_settings: {{r: 4}}
training: {{learning_rate: 1e-3, num_train_epochs: 2, max_steps: 7, warmup_steps: 1, logging_steps: 1, use_cpu: true}}
"""
    (tmp_path / "run.yaml").write_text(page)
    flags = ("--epochs", 1, "--batch-size", 9, "--set", "r=2", "--seed", 5, "--bf16", "--gradient-checkpointing")
    outcome = call("train", "--config", tmp_path / "run.yaml", *flags)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["seed"], metrics["learning_rate"]) == (4, 5, 1e-3)
    assert metrics["method_settings"] == {"r": 2}
    rates = [entry["learning_rate"] for entry in metrics["history"] if "learning_rate" in entry]
    assert rates == pytest.approx([0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])  # one step of warm-up
    assert "4/4" in outcome.stderr and "bone" in outcome.stderr  # the progress bar
    kept = read_yaml(tmp_path / "out" / "settings.yaml")
    assert kept["method_settings"] == {"r": 2} and kept["training"]["gradient_checkpointing"] is True
    assert parse(TrainSettings, kept).training == kept["training"]


@pytest.mark.parametrize(
    ("method", "given", "config"),
    [
        ("lora", {}, {"r": 8, "use_dora": False}),
        ("dora", {"r": 2}, {"r": 2, "use_dora": True}),
        ("MiSS", {"r": 4}, {"r": 4}),
        ("ia3", {}, {"feedforward_modules": ["down_proj"]}),
        ("adalora", {"init_r": 4, "target_r": 2}, {"total_step": 2}),
        ("lora_mgpo", {"r": 2}, {"mode": "mgpo", "auto_update": False}),
        ("triadaptlora", {"target_r": 2}, {"target_r": 2}),
        ("full", {}, None),
    ],
)
def test_methods(files: Path, tmp_path: Path, method: str, given: dict, config: dict | None) -> None:
    pairs = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    arguments = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    metrics = trained("train", *arguments, "--method", method, *pairs)
    saved = tmp_path / "out"
    assert metrics["eval"]["loss"] > 0 and metrics["learning_rate"] == methods.find(method).learning_rate
    if config is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(saved)
        assert metrics["trained_values"]["adapter"] == sum(p.numel() for p in model.parameters())
        return
    found = json.loads((saved / "adapter_config.json").read_text())
    assert {name: found[name] for name in config} == config
    start = load_file(saved / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in start.values())
    if method == "triadaptlora":
        assert any("triadapt" in key for entry in metrics["history"] for key in entry)  # its callback was there


@pytest.mark.parametrize(("base", "suffix", "method"), [("encoder", ".csv", "lora"), ("llama", ".parquet", "bone")])
def test_a_classifier_of_new_labels(files: Path, tmp_path: Path, base: str, suffix: str, method: str) -> None:
    data = files / f"classes{suffix}"
    arguments = ("--model", files / base, "--data", data, "--output", tmp_path / "out", *SHORT)
    metrics = trained("train", *arguments, "--task", "SEQ_CLS", "--method", method, "--set", "r=4")
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert card.startswith("## Labels\n\n0 `even`, 1 `odd`\n\n") and card.count("`even`") == 1
    assert metrics["labels"] == ["even", "odd"] and 0 <= metrics["eval"]["accuracy"] <= 1
    bias = 2 if base == "encoder" else 0  # it has a pooler already
    assert metrics["trained_values"]["whole_modules"] == 2 * 16 + bias
    model = peftx.hub.load_adapter(tmp_path / "out")
    assert model.config.num_labels == 2
    _, held = hold_out(read(str(data)), 0.1)
    tokens = [words()(row["text"], return_tensors="pt").input_ids for row in held]
    with torch.no_grad():
        answers = [("even", "odd")[model(ids).logits.argmax()] for ids in tokens]
    right = [answer == row["label"] for answer, row in zip(answers, held, strict=True)]
    assert metrics["eval"]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_data_of_every_kind(files: Path, tmp_path: Path) -> None:
    wanted = read(str(files / "classes.jsonl"))
    assert len(wanted) == 40 and wanted[0].keys() == {"text", "label"}
    for suffix in (".csv", ".tsv", ".parquet"):
        assert read(str(files / f"classes{suffix}")) == wanted
    (tmp_path / "set").mkdir()
    for split, rows in (("train", wanted[:30]), ("test", wanted[30:])):
        (tmp_path / "set" / f"{split}.json").write_text(json.dumps(rows))
    given = settings(files, tmp_path / "out", data=tmp_path / "set")
    assert read_both(given) == (wanted[:30], None)
    found = read_both(dataclasses.replace(given, eval_split="test"))
    assert found == (wanted[:30], wanted[30:])
    with pytest.raises(ValueError, match="cannot read .*set: .*train"):
        read(str(tmp_path / "set"), split="tran")


def test_a_translator_learns_from_a_prompt_of_its_own(files: Path, tmp_path: Path) -> None:
    arguments = ("--model", files / "t5", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    virtual = ("--method", "prompt_tuning", "--set", "num_virtual_tokens=3", "--gradient-accumulation", 2)
    metrics = trained("train", *arguments, *virtual, "--eval-data", files / "pairs.jsonl")
    assert metrics["task"] == "SEQ_2_SEQ_LM" and metrics["samples"]["eval"] == metrics["samples"]["train"] == 40


def test_a_models_own_labels_stay(files: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w7", "label": i % 3} for i in range(1, 13)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ("--model", files / "bert", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", *SHORT)
    metrics = trained("train", *arguments, "--eval-share", 0)
    assert metrics["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and metrics["eval"] == {}
    before = load_file(files / "bert" / "model.safetensors")["classifier.weight"]
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert 0 < (before - after).abs().max() < 0.01  # it was trained from where it was


class Watch(transformers.TrainerCallback):
    """Keeps what the Trainer works with."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)


def test_pruning_and_fisher_sums(files: Path, tmp_path: Path) -> None:
    arguments = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    metrics = trained("train", *arguments, "--method", "bone", "--set", "r=4", "--prune-keep", 0.25, "--fisher")
    assert metrics["samples"]["trained_on"] == 9 == math.ceil(0.25 * 36)
    assert len(json.loads((tmp_path / "out" / "selection.json").read_text())["indices"]) == 9
    from peftx.compression import Statistics

    assert "model.layers.0.mlp.down_proj" in str(Statistics.load(tmp_path / "out" / "fisher.safetensors").layers)
    files_of_callbacks = {"selection.json", "selection.md", "fisher.safetensors"}
    entries = json.loads((tmp_path / "out" / ".peftx.json").read_text())["files"]
    assert {name: entries[name]["by"] for name in files_of_callbacks} == dict.fromkeys(files_of_callbacks, "train")
    again = ("--method", "bone", "--set", "r=4", "--prune-keep", 0.25, "--fisher")
    trained("train", *arguments, *again, "--resume")  # nothing is left to do
    trained("train", *arguments, *again, "--overwrite")
    (tmp_path / "out" / "fisher.safetensors").write_text("mine")
    for option in ("--resume", "--overwrite"):
        refused = call("train", *arguments, *again, option)
        assert refused.exit_code == 2 and "fisher.safetensors has changed since" in refused.stderr
    assert (tmp_path / "out" / "fisher.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("method", "states", "bits", "rank"),
    [
        ("lora", True, 8, None),
        ("lora", {"rank": 2, "optim_bits": 32}, 32, 2),
        ("gradnormlorp", None, 8, 0.5),  # its config says so
        ("gradnormlorp", False, None, None),
    ],
)
def test_small_states(files: Path, tmp_path: Path, method: str, states: Any, bits: int | None, rank: Any) -> None:
    watch = Watch()
    run.train(settings(files, tmp_path / "out", method=method, small_states=states), [watch])
    assert isinstance(watch.optimizer, peftx.optim.LowRankAdamW) is (bits is not None)
    if bits is not None:
        assert {group["optim_bits"] for group in watch.optimizer.param_groups} == {bits}
        assert rank in {group["rank"] for group in watch.optimizer.param_groups}


@pytest.mark.parametrize(("flag", "layer"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
def test_quantised_bases(files: Path, tmp_path: Path, flag: str, layer: str) -> None:
    watch = Watch()
    found = run.train(settings(files, tmp_path / "out", model="wide", method="loldu", **{flag: True}), [watch])
    base = watch.model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()
    assert type(base).__name__ == layer and found["eval"]["loss"] > 0
    with pytest.raises(ValueError, match="quantised model cannot be trained in full"):
        run.train(settings(files, tmp_path / "full", model="wide", method="full", **{flag: True}))
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_a_new_classifier_of_a_quantised_base(files: Path, tmp_path: Path, flag: str) -> None:
    """The classifier, and the pooler that the checkpoint lacks, are trained and so not quantised."""
    lacking = transformers.BertModel(tiny_model("bert").config, add_pooling_layer=False)
    lacking.save_pretrained(tmp_path / "bert")
    words().save_pretrained(tmp_path / "bert")
    watch = Watch()
    given: dict[str, Any] = {"model": tmp_path / "bert", "data": "classes.jsonl", "task": "SEQ_CLS", flag: True}
    found = run.train(settings(files, tmp_path / "out", method="bone", method_settings={"r": 4}, **given), [watch])
    assert found["labels"] == ["even", "odd"]
    heads = {n: p for n, p in watch.model.named_parameters() if "classifier" in n or "pooler" in n}
    assert {p.dtype for p in heads.values()} == {torch.float32} and len(heads) == 8  # and their originals
    assert found["trained_values"]["whole_modules"] == 2 * 17 + 16 * 17


def test_an_evaluation_does_not_end_the_gradients_of_a_4_bit_base(files: Path, tmp_path: Path) -> None:
    """On some CPUs bitsandbytes packs the weights for good in eval mode, and has no gradient for packed ones."""
    watch = Watch()
    training = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    given: dict[str, Any] = {"model": "wide", "method_settings": {"r": 4}, "load_in_4bit": True}
    broken = run.train(settings(files, tmp_path / "out", training=training, **given), [watch])
    layers = [m for m in watch.model.modules() if type(m).__name__ == "Linear4bit"]
    assert layers and not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers)
    training = {"max_steps": 4, "logging_steps": 1}
    whole = run.train(settings(files, tmp_path / "whole", training=training, **given))
    losses = [[entry["loss"] for entry in part["history"] if "loss" in entry] for part in (broken, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_classifier_of_tokens(files: Path, tmp_path: Path) -> None:
    """A word's first piece has its label; the loss and the accuracy are over all words, by the saved adapter."""
    pieces = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "a": 4, "b": 5, "##c": 6, "##d": 7}
    tokenizer = transformers.BertTokenizer(vocab=pieces)
    tokenizer.save_pretrained(tmp_path / "bert")
    tiny_model("bert").bert.save_pretrained(tmp_path / "bert")
    draw = random.Random(0)
    rows = []
    for _ in range(60):
        tokens = [draw.choice(["a", "b", "acd", "bd"]) for _ in range(draw.randrange(2, 6))]
        rows.append({"tokens": tokens, "labels": [{"a": "first", "b": "second"}[token[0]] for token in tokens]})
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--model", tmp_path / "bert", "--data", tmp_path / "tags.jsonl", "--output", tmp_path / "out", *SHORT)
    learn = ("--max-steps", 60, "--learning-rate", 0.01, "--training", "logging_steps=1", "--set", "r=4")
    metrics = trained("train", *given, "--task", "TOKEN_CLS", *learn)
    assert metrics["labels"] == ["first", "second"]
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model = peftx.hub.load_adapter(tmp_path / "out")
    assert type(model.get_base_model()).__name__ == "BertForTokenClassification"
    _, held = hold_out(rows, 0.1)
    wanted, right = [], []
    for row in held:
        ids, first = [1], []
        for token in row["tokens"]:
            first.append(len(ids))
            ids += [pieces[token[0]], *(pieces[f"##{letter}"] for letter in token[1:])]
        with torch.no_grad():
            scores = model(torch.tensor([[*ids, 2]])).logits[0, first].double()
        classes = torch.tensor([("first", "second").index(label) for label in row["labels"]])
        wanted += torch.nn.functional.cross_entropy(scores, classes, reduction="none").tolist()
        right += (scores.argmax(-1) == classes).tolist()
    assert metrics["eval"]["loss"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert metrics["eval"]["accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(
    ("model", "data"), [("llama", "pairs.jsonl"), ("t5", "pairs.jsonl"), ("bert", "classes.jsonl")]
)
def test_the_loss_falls(files: Path, tmp_path: Path, model: str, data: str) -> None:
    training = {"max_steps": 80, "learning_rate": 0.01, "logging_steps": 10, "save_strategy": "no"}
    given: dict[str, Any] = {"model": model, "data": data, "method": "full", "eval_share": 0.0}
    found = run.train(settings(files, tmp_path / "out", training=training, **given))
    losses = [entry["loss"] for entry in found["history"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


# Resume, and the output folder


@pytest.mark.parametrize("method", ["bone", "triadaptlora"])
def test_a_resumed_run_equals_the_unbroken_one(files: Path, tmp_path: Path, method: str) -> None:
    """BERT has dropout, and its classifier is new: every random number counts."""
    out = tmp_path / "out"
    data = ("--model", files / "encoder", "--data", files / "classes.jsonl", "--task", "SEQ_CLS", "--output", out)
    arguments = (*data, "--method", method, "--prune-keep", 0.5, *SHORT, "--max-steps", 6)
    trained("train", *arguments, "--training", "save_steps=3", "--training", "logging_steps=1")
    whole = load_file(out / "adapter_model.safetensors")
    history = json.loads((out / "metrics.json").read_text())["history"]
    shutil.rmtree(out / "checkpoint-6")
    for name in ("adapter_model.safetensors", "metrics.json"):
        (out / name).unlink()
    metrics = trained("train", "--output", out, "--resume")  # all else is in settings.yaml
    resumed = load_file(out / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    losses = [[entry["loss"] for entry in part if "loss" in entry] for part in (history, metrics["history"])]
    assert losses[0] == losses[1] and len(losses[0]) == 6

    refused = call("train", *arguments, "--resume", "--method", "lora")
    assert refused.exit_code == 2 and f"method is 'lora', but the run to resume has {method!r}" in refused.stderr


def test_the_output_folder(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out, *SHORT, "--set", "r=2")
    refused = call("train", *arguments, "--resume")
    assert refused.exit_code == 2 and f"there is no checkpoint in {out} to resume from" in refused.stderr
    assert not out.exists()
    trained("train", *arguments)
    (out / "mine.txt").write_text("mine")
    before = (out / "adapter_model.safetensors").read_bytes()
    refused = call("train", *arguments, "--seed", 1)
    assert refused.exit_code == 2
    assert refused.stderr == f"peftx: output {out} is not empty: name another folder, or say overwrite or resume\n"
    assert (out / "adapter_model.safetensors").read_bytes() == before
    given = (*arguments, "--overwrite", "--data", files / "nothing.jsonl")
    assert call("train", *given).exit_code == 2  # found before anything is replaced
    assert (out / "adapter_model.safetensors").read_bytes() == before
    trained("train", *arguments, "--seed", 1, "--overwrite")
    assert (out / "adapter_model.safetensors").read_bytes() != before and (out / "mine.txt").read_text() == "mine"
    refused = call("train", *arguments[:4], "--output", out / "mine.txt")
    assert refused.exit_code == 2 and "is a file, not a folder" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["encoder", "head of two"])
def test_the_other_commands_take_a_classifier_that_was_trained(files: Path, tmp_path: Path, model: str) -> None:
    """Its task, and the number and the names of its labels, are those of the run: none of them is told again."""
    rows = [{"text": f"w{i} w{i % 7}", "label": ("bad", "good", "odd")[i % 3]} for i in range(1, 37)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = files / "encoder"
    if model == "head of two":  # which a head for three replaces
        head = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        head.save_pretrained(folder := tmp_path / "base")
        words().save_pretrained(folder)
    base, data, adapter = ("--model", folder), ("--data", tmp_path / "data.jsonl"), tmp_path / "adapter"
    trained("train", *base, *data, "--task", "SEQ_CLS", "--method", "bone", "--set", "r=4", *SHORT, "--output", adapter)

    outcome = call("prune", *base, *data, "--adapter", adapter, "--keep", 0.5, "--out", tmp_path / "kept.jsonl")
    assert outcome.exit_code == 0, outcome.output
    assert "FutureWarning" not in outcome.stderr and "tokens" not in outcome.stdout
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 18 and Counter(row["label"] for row in kept) == dict.fromkeys(("bad", "good", "odd"), 6)

    compressing = (*base, *data, "--adapter", adapter, "--recover-epochs", 0, "--out", tmp_path / "small")
    outcome = call("compress", *compressing)
    assert outcome.exit_code == 0, outcome.output
    outcome = call("export", adapter, tmp_path / "merged", "--to", "merged")
    assert outcome.exit_code == 0, outcome.output
    for written in ("small", "merged"):
        config = json.loads((tmp_path / written / "config.json").read_text())
        assert config["id2label"] == {"0": "bad", "1": "good", "2": "odd"}

    for command, out in (("prune", "--out"), ("compress", "--out"), ("train", "--output"), ("compare", "--output")):
        outcome = call(command, "--model", adapter, *data, out, tmp_path / "no.jsonl")
        assert outcome.exit_code == 2 and not (tmp_path / "no.jsonl").exists()
        assert f"peftx: {adapter} is an adapter of {folder}, and no model: " in outcome.stderr
        way = "peftx export " if command in ("train", "compare") else f"--model {folder} --adapter {adapter}"
        assert way in outcome.stderr


@pytest.mark.parametrize("said", ['["bad", "bad", "odd"]', '["bad", 1, "odd"]', '["bad"]', "7", "{", None])
def test_names_of_classes_that_cannot_be_are_passed_over(tmp_path: Path, said: str | None) -> None:
    tiny_model("bert").bert.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = peftx.BoneConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    if said is not None:
        (tmp_path / "adapter" / "metrics.json").write_text(f'{{"labels": {said}}}')
    config = peftx.hub.load_adapter(tmp_path / "adapter").get_base_model().config
    assert config.id2label == {i: f"LABEL_{i}" for i in range(3)}


def test_other_sizes_than_the_saved_head_are_no_base_model(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peftx.BoneConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    said = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**said, "max_position_embeddings": 8}))
    with pytest.raises(ValueError, match="base cannot be loaded: bert.embeddings.position_embeddings.weight is of"):
        peftx.hub.load_adapter(tmp_path / "adapter")


# What the user can put right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "loldo"], "unknown method 'loldo', did you mean loldu?"),
        (["--set", "rr=4"], "method lora: unknown key 'rr', did you mean r?"),
        (["--set", "r=four"], "method lora: r must be of type int, got 'four'"),
        (["--method", "bone", "--set", "r=0"], "method bone: `r` must be a positive integer, got 0"),
        (["--method", "full", "--set", "r=4"], "method full: unknown key 'r'"),
        (["--set", "r"], "'r' is not KEY=VALUE"),
        (["--method", "loldu", "--set", "r=99"], "method loldu does not fit llama: LOLDU cannot adapt the module"),
        (["--training", "warmup_step=2"], "training: unknown key 'warmup_step', did you mean warmup_steps?"),
        (["--training", "max_grad_norm=big"], "training: max_grad_norm must be of type float, got 'big'"),
        (["--training", "lr_scheduler_type=liner"], "training: liner is not a valid SchedulerType"),
        (["--training", "output_dir=x"], "training: output_dir is set by `output`"),
        (["--data", "{tmp}/none.jsonl"], "No such file or directory: '{tmp}/none.jsonl'"),
        (["--data", "{tmp}/none.csv"], "there is no file {tmp}/none.csv"),
        (["--data", "{tmp}/none"], "cannot read {tmp}/none: "),
        (["--data", "{tmp}/empty.jsonl"], "empty.jsonl is empty"),
        (["--data", "{tmp}/one.jsonl"], "has too few samples (1) to hold some out: name eval_data"),
        (["--data", "{tmp}/odd.jsonl"], "record 1: found no prompt and answer among its fields a, b: name them"),
        (["--prompt", "query"], "record 1 has no field 'query', only question, answer"),
        (["--max-length", "3"], "no sample has an answer within the first 3 tokens"),
        (["--model", "{tmp}/nothing"], "the model {tmp}/nothing, which is not a folder here, cannot be loaded: "),
        (["--model", "{files}/encoder"], "cannot tell the task of a BertModel: name one of CAUSAL_LM"),
        (["--task", "SEQ_CLASS"], "task must be one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, got SEQ_CLASS"),
        (["--task", "SEQ_CLS"], "a classifier needs samples of at least two labels, found none in the field 'label'"),
        (["--load-in-4bit", "--load-in-8bit"], "load_in_4bit and load_in_8bit exclude each other"),
        (["--overwrite", "--resume"], "resume and overwrite exclude each other"),
        (["--eval-share", "1"], "eval_share must be in [0, 1), got 1.0"),
        (["--dtype", "float23"], "dtype must be one of auto, float32"),
        (["--prune-keep", "1.5"], "keep must be a share of the samples in (0, 1], got 1.5"),
        (["--config", "{tmp}/bad.yaml"], "settings: unknown key 'methode', did you mean method?"),
        (["--config", "{tmp}/list.yaml"], "list.yaml is not a mapping of settings, but a list"),
        (["--config", "{tmp}/torn.yaml"], "torn.yaml is not YAML"),
        (["--config", "{tmp}/type.yaml"], "settings: eval_share must be of type float, got 'much'"),
        (["--config", "{tmp}/prune.yaml"], "prune: unknown key 'keeps', did you mean keep?"),
        (["--config", "{tmp}/states.yaml"], "small_states: unknown key 'ranks', did you mean rank?"),
        (["--config", "{tmp}/none.yaml"], "No such file or directory"),
        (["--config", "{tmp}/twice.yaml"], "twice.yaml is not YAML: 'r' is said twice"),
        (["--batch-size", "0"], "training: per_device_train_batch_size must be at least 1, got 0"),
        (["--gradient-accumulation", "0"], "training: gradient_accumulation_steps must be at least 1, got 0"),
        (["--learning-rate", "-1"], "training: learning_rate must be a number of at least 0, got -1.0"),
        (["--max-steps", "0"], "training: num_train_epochs must be above 0, and max_steps at least 1"),
        (["--eval-split", "test"], "eval_split is 'test', but {files}/pairs.jsonl is a single file, which has none"),
        (["--split", "test"], "split is 'test', but {files}/pairs.jsonl is a single file"),
        (["--data", "{tmp}/torn.csv"], "cannot read {tmp}/torn.csv: "),
        (["--data", "{tmp}/chat.jsonl"], "record 1: its messages are not a list of objects with role and content"),
        (["--data", "{tmp}/foreign.jsonl"], "no sample has a word that the tokenizer of {files}/llama knows within"),
        (["--max-steps", "-5"], "training: num_train_epochs must be above 0, and max_steps at least 1"),
        (["--epochs", "nan"], "training: num_train_epochs must be above 0, and max_steps at least 1"),
        (
            ["--model", "{files}/bert", "--data", "{files}/classes.jsonl", "--eval-data", "{tmp}/new.jsonl"],
            "{tmp}/new.jsonl: its held-out samples have labels that none to train on has: new; leave",
        ),
        (
            ["--model", "{files}/bert", "--data", "{tmp}/two.jsonl", "--eval-data", "{tmp}/huge.jsonl"],
            "{tmp}/huge.jsonl, record 21: label 10000000000 is the number of none of the model's: LABEL_0, LABEL_1",
        ),
        (
            [*NEW_HEAD, "--data", "{tmp}/two.jsonl", "--eval-data", "{tmp}/huge.jsonl"],
            "{tmp}/two.jsonl and {tmp}/huge.jsonl, labels in the field 'label' are to be numbered 0, 1",
        ),
        (
            [*NEW_HEAD, "--data", "{tmp}/two.jsonl", "--eval-data", "{tmp}/six.jsonl"],
            "{tmp}/six.jsonl: its held-out samples have labels that none to train on has: LABEL_2, LABEL_3, LABEL_4, L",
        ),
        (
            ["--model", "{files}/bert", "--data", "{tmp}/even.jsonl", "--eval-data", "{files}/classes.jsonl"],
            "{tmp}/even.jsonl, a classifier needs samples of at least two labels, found only even",
        ),
        (["--task", "SEQ_CLS", "--data", "{tmp}/huge.jsonl"], "to be numbered 0, 1, ..., but one is 10000000000"),
        (["--task", "SEQ_CLS", "--data", "{tmp}/null.jsonl"], "null.jsonl, record 21 has an empty field 'label': fill"),
        (["--task", "SEQ_CLS", "--data", "{tmp}/nan.jsonl"], "nan.jsonl, record 21 has an empty field 'label': fill"),
        (["--task", "TOKEN_CLS", "--data", "{tmp}/uneven.jsonl"], "tokens and labels are not two lists of the same"),
        (["--model", "{tmp}/torn"], "the model {tmp}/torn cannot be loaded: "),
    ],
)
def test_bad_input_is_one_line(files: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    pages = {
        "empty.jsonl": "\n",
        "one.jsonl": '{"text": "w1 w2"}\n',
        "odd.jsonl": '{"a": 1, "b": 2}\n' * 20,
        "bad.yaml": "methode: loldu",
        "list.yaml": "- 1",
        "torn.yaml": "a: [1",
        "type.yaml": "eval_share: much",
        "prune.yaml": "prune: {keeps: 0.5}",
        "states.yaml": "small_states: {ranks: 2}",
        "twice.yaml": "method_settings: {r: 2, r: 3}",
        "torn.csv": "question,answer\nw1,w2\nw3,w4,w5\n",
        "chat.jsonl": '{"messages": "hello"}\n' * 20,
        "foreign.jsonl": '{"question": "what", "answer": "that"}\n' * 20,
        "uneven.jsonl": '{"tokens": ["w1", "w2"], "labels": [0]}\n' * 10 + '{"tokens": ["w1"], "labels": [1]}\n' * 10,
    }
    pages["new.jsonl"] = '{"text": "w1 w2", "label": "new"}\n'
    pages["two.jsonl"] = '{"text": "w1 w2", "label": 0}\n{"text": "w1 w3", "label": 1}\n'
    pages["six.jsonl"] = '{"text": "w1 w2", "label": 5}\n'
    pages["even.jsonl"] = '{"text": "w1 w2", "label": "even"}\n' * 5
    for name, value in (("huge", "10000000000"), ("null", "null"), ("nan", "NaN")):
        rows = [f'{{"text": "w1", "label": {label}}}\n' for label in (0, 1)] * 10
        pages[f"{name}.jsonl"] = "".join([*rows, f'{{"text": "w1", "label": {value}}}\n'])
    shutil.copytree(files / "llama", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn" * 8)
    for name, page in pages.items():
        (tmp_path / name).write_text(page)
    arguments = [argument.format(tmp=tmp_path, files=files) for argument in arguments]
    given = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    outcome = call("train", *given, *arguments)
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert message.format(tmp=tmp_path, files=files) in outcome.stderr
    assert outcome.stderr.startswith("peftx: ") and outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "data", "output"])
def test_what_must_be_named(files: Path, tmp_path: Path, name: str) -> None:
    given = {"model": files / "llama", "data": files / "pairs.jsonl", "output": tmp_path / "out"}
    outcome = call("train", *(part for key, value in given.items() if key != name for part in (f"--{key}", value)))
    assert outcome.exit_code == 2 and outcome.stderr.startswith(f"peftx: no {name}: name one by --{name}")


def test_missing_datasets_is_named(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    outcome = call("train", "--model", files / "bert", "--data", files / "classes.parquet", "--output", tmp_path / "o")
    assert outcome.exit_code == 2 and "datasets is missing" in outcome.stderr and "pip install" in outcome.stderr


def test_a_run_that_a_callback_refuses_leaves_no_trace(files: Path, tmp_path: Path) -> None:
    training = {"torch_compile": False, "label_smoothing_factor": 0.1}
    with pytest.raises(ValueError, match="with label smoothing the loss is not the model's own"):
        run.train(settings(files, tmp_path / "out", fisher=True, training=training))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", ["lora", "bone", "allora"])
def test_fused_experts_are_adapted_where_that_is_asked(files: Path, tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64),
        **dict(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0),
    )
    transformers.MixtralForCausalLM(config).save_pretrained(files / "mixture")
    words().save_pretrained(files / "mixture")
    data = ("--data", files / "pairs.jsonl", "--method", method, *SHORT, "--set", "r=2")
    trained("train", "--model", files / "mixture", *data, "--experts", "--output", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.partition(".experts.")[1] for key in tensors} == {"", ".experts."}
    assert any("experts.base_layer" in key for key in tensors)
    outcome = call("train", "--model", files / "llama", *data, "--experts", "--output", tmp_path / "none")
    assert outcome.exit_code and "has no fused experts" in outcome.output and not (tmp_path / "none").exists()


def test_small_functions() -> None:
    assert nearest("targetmodules", ["target_modules", "r"]) == ", did you mean target_modules?"
    assert nearest("zzz", ["target_modules", "r"]) == ": there are r, target_modules"
    rows = [{"text": str(i)} for i in range(10)]
    train, held = hold_out(rows, 0.3)
    assert len(held) == 3 and sorted(row["text"] for row in train + held) == [str(i) for i in range(10)]
    assert label_names([{"y": 2}, {"y": 0}, {}], "y") == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(ValueError, match="numbers and texts"):
        label_names([{"y": 2}, {"y": "a"}], "y")
    table = methods.known()
    assert {"lora", "miss", "dora", "full", "vera"} <= table.keys()
    assert {name for info in peftx.methods() for name in info.variants} <= table.keys()
    assert methods.find("LoRA_GGPO").settings == {"auto_update": False}
    assert methods.find("triadaptlora").rank_field == "target_r"
    assert methods.find("miss").learning_rate == methods.find("bone").learning_rate


@pytest.mark.parametrize(("model", "wanted"), [("llama", True), ("bert", False), ("t5", False)])
def test_whose_loss_follows_the_number_of_items(model: str, wanted: bool) -> None:
    """What the Trainer takes for granted, and what is not so for BERT and T5."""
    ids = torch.tensor([[5, 7, 9, 11]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.tensor([1]) if model == "bert" else ids
    assert plan.scales_loss(tiny_model(model), batch) is wanted


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_two_processes_train_as_one(files: Path, tmp_path: Path, model: str) -> None:
    data = files / ("pairs.jsonl" if model == "llama" else "classes.jsonl")
    common = ["--model", files / model, "--data", data, "--method", "bone", "--max-steps", "3", "--eval-share", "0.2"]
    for pair in ("logging_steps=1", "use_cpu=true", "weight_decay=0.0"):
        common += ["--training", pair]
    common += ["--generate", "--metric", "rouge"] if model == "llama" else ["--metric", "f1", "--metric", "recall"]
    # BERT has dropout, which draws other numbers in each process
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    if model == "bert":
        still = tiny_model("bert")
        still.config.hidden_dropout_prob = still.config.attention_probs_dropout_prob = 0.0
        still.save_pretrained(tmp_path / "bert")
        words().save_pretrained(tmp_path / "bert")
        common[1] = tmp_path / "bert"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "peftx.cli", "train", *common, "--batch-size", "4", "--output", tmp_path / "two"]
    two = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("\n") == 1 and two.stdout.startswith("bone: ")  # one process prints
    found = json.loads((tmp_path / "two" / "metrics.json").read_text())
    wanted = trained("train", *common, "--batch-size", 8, "--output", tmp_path / "one")
    assert (found["processes"], wanted["processes"]) == (2, 1)
    losses = [[entry["loss"] for entry in part["history"] if "loss" in entry] for part in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    assert found["eval"] == pytest.approx(wanted["eval"], rel=1e-5) and len(found["eval"]) > 3
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# Comparisons


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[TrainSettings]:
    """Runs in this process, which is faster; the settings of those that ran."""
    seen: list[TrainSettings] = []

    def apart(function: Any, one: TrainSettings) -> dict[str, Any]:
        seen.append(one)
        return function(one)

    monkeypatch.setattr(comparison, "apart", apart)
    return seen


def test_compare_at_equal_rank_goes_on_where_it_stopped(files: Path, tmp_path: Path, here: list) -> None:
    out = tmp_path / "out"
    given = ("--model", files / "bert", "--data", files / "classes.jsonl", "--output", out, *SHORT, "--rank", 4)
    outcome = call("compare", *given, "--methods", "lora,bone", "--seeds", 1)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    first = json.loads((out / "results.json").read_text())["runs"]
    assert [(r["method"], r["method_settings"]) for r in first] == [
        ("lora", {"r": 4, "lora_alpha": 4}),
        ("bone", {"r": 4}),
    ]
    outcome = call("compare", *given, "--methods", "lora,bone", "--seeds", 2)
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    assert [one.training["seed"] for one in here] == [0, 0, 1, 1]
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert runs[:2] == first and (out / "bone" / "seed-1" / "adapter_model.safetensors").is_file()

    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == ["lora", "bone"]
    for row in table:
        own = [run for run in runs if run["method"] == row["method"]]
        qualities = [run["eval"]["accuracy"] for run in own]
        assert len(own) == 2 and float(row["accuracy_mean"]) == pytest.approx(sum(qualities) / 2)
        assert float(row["accuracy_std"]) == pytest.approx(abs(qualities[0] - qualities[1]) / math.sqrt(2))
        assert int(row["trained_values"]) == own[0]["trained_values"]["adapter"]
        assert int(row["file_bytes"]) == (out / row["method"] / "seed-0/adapter_model.safetensors").stat().st_size
        assert float(row["peak_memory_process_bytes"]) >= 0
    assert float(table[0]["step_ratio"]) == 1.0
    page = (out / "results.md").read_text()
    assert "| lora | r=4, lora_alpha=4 |" in page and "standard deviation over 2 seeds" in page
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")

    refused = call("compare", *given, "--methods", "lora", "--learning-rate", 0.1)
    assert refused.exit_code == 2 and "training is {" in refused.stderr and "say overwrite" in refused.stderr


def test_compare_at_equal_budget_tells_what_does_not_run(files: Path, tmp_path: Path, here: list) -> None:
    given = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    budget = ("--equal", "budget", "--rank", 2, "--seeds", 1)
    outcome = call("compare", *given, *budget, "--methods", "lora,bone,loldu,compacter,prefix_tuning")
    assert outcome.exit_code == 1, (outcome.output, outcome.exception)
    runs = {r["method"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]}
    assert runs.keys() == {"lora", "bone", "loldu", "compacter"}
    values = {name: run["trained_values"]["adapter"] for name, run in runs.items()}
    counts = {}  # of bone, by rank
    for r in (3, 4, 5, 6):
        model = peft.get_peft_model(tiny_model("llama"), peftx.BoneConfig(r=r, target_modules="all-linear"))
        counts[r] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert values["bone"] == min(counts.values(), key=lambda count: abs(count - values["lora"]))
    assert runs["loldu"]["method_settings"] == {"r": 8}  # the narrowest layer's
    said = " ".join(outcome.output.split())
    assert f"loldu comes no nearer to the budget of {values['lora']:,} values than {values['loldu']:,}" in said
    assert "compacter has no rank: it has its own size" in said
    assert "peftx: prefix_tuning did not run: " in outcome.stderr and outcome.stderr.count("did not run") == 1


@pytest.mark.slow
def test_all_leaves_out_what_does_not_fit(files: Path, tmp_path: Path, here: list) -> None:
    sizes = {"hidden_size": 18, "num_attention_heads": 3, "intermediate_size": 30, "num_hidden_layers": 1}
    odd = transformers.LlamaConfig(**sizes, vocab_size=64, pad_token_id=0)  # no multiple of Compacter's phm_dim
    transformers.LlamaForCausalLM(odd).save_pretrained(tmp_path / "odd")
    words().save_pretrained(tmp_path / "odd")
    given = ("--model", tmp_path / "odd", "--data", files / "pairs.jsonl", *SHORT, "--max-steps", 1, "--seeds", 1)
    given = (*given, "--rank", 2)
    outcome = call("compare", *given, "--output", tmp_path / "all", "--methods", "all")
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    runs = json.loads((tmp_path / "all" / "results.json").read_text())["runs"]
    left_out = {"compacter", "krona"}  # the latter of examples/my_method.py, which takes no such width either
    assert [run["method"] for run in runs] == [name for name in methods.first_variants() if name not in left_out]
    assert "compacter is left out: method compacter does not fit llama: " in outcome.stdout
    page = (tmp_path / "all" / "results.md").read_text()
    assert "- compacter is left out: " in page and "compacter has no rank" not in page and "; one seed" in page

    outcome = call("compare", *given, "--output", tmp_path / "two", "--methods", "lora,compacter")
    assert outcome.exit_code == 1 and "peftx: compacter did not run: method compacter does not fit" in outcome.stderr
    assert "| lora |" in (tmp_path / "two" / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}/nothing"], "the model {tmp}/nothing, which is not a folder here, cannot be loaded"),
        (["--data", "{tmp}/odd.jsonl"], "record 1: found no prompt and answer among its fields a: name them"),
    ],
)
def test_what_no_run_could_do_is_said_once(
    files: Path, tmp_path: Path, arguments: list[str], message: str, here: list
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n' * 20)
    given = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    outcome = call("compare", *given, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert outcome.exit_code == 2 and message.format(tmp=tmp_path) in outcome.stderr
    assert outcome.stderr.count("\n") == 1 and not here and not (tmp_path / "out").exists()


def test_contestants() -> None:
    assert comparison.contestants("lora, LoRA,lora_ggpo") == {"lora": {}, "lora-ggpo": {}}
    assert comparison.contestants({"all": None, "bone": {"r": 2}})["bone"] == {"r": 2}
    with pytest.raises(ValueError, match="LoRA is named twice, with different settings"):
        comparison.contestants({"lora": {"r": 2}, "LoRA": {"r": 4}})


def test_what_a_run_sets_for_a_method_can_be_set_otherwise() -> None:
    compacter = methods.find("compacter")
    assert peftx.CompacterConfig().phm_bias and methods.check_settings(compacter, {}) == {"phm_bias": False}
    assert methods.check_settings(compacter, {"phm_bias": True}) == {"phm_bias": True}


def test_memory_is_of_the_training(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the evaluation after it."""
    asked: list[str] = []
    monkeypatch.setattr(apart, "peak_memory", lambda before: asked.append("memory") or {"peak_memory": 7})
    evaluate = transformers.Trainer.evaluate
    monkeypatch.setattr(transformers.Trainer, "evaluate", lambda self: asked.append("evaluation") or evaluate(self))
    assert apart.measured(settings(files, tmp_path / "out"))["peak_memory"] == 7
    assert asked == ["memory", "evaluation"]


def test_a_seed_that_is_missing_is_told() -> None:
    common = {"method_settings": {}, "learning_rate": 1e-3, "trained_values": {"adapter": 8, "whole_modules": 0}}
    common |= {"eval": {"loss": 1.0}, "peak_memory": 1e6, "memory_of": "the process", "bytes": 32, "steps": 2}
    common |= {"samples": {"eval": 4}, "step_seconds": 0.5}
    runs = [{**common, "method": name, "seed": seed} for name, seed in (("lora", 0), ("lora", 1), ("bone", 0))]
    notes = report.notes(report.rows(runs), runs)
    assert "bone has 1 of 2 seeds" in notes and "over 2 seeds" in notes[0]


@pytest.mark.slow
def test_compare_in_processes_of_their_own(files: Path, tmp_path: Path) -> None:
    page = f"""
model: {files / "llama"}
data: {files / "pairs.jsonl"}
methods: {{bone: {{r: 4}}, full: }}
equal: none
seeds: 1
training: {{max_steps: 2, use_cpu: true, disable_tqdm: true}}
"""
    (tmp_path / "compare.yaml").write_text(page)
    outcome = call("compare", "--config", tmp_path / "compare.yaml", "--output", tmp_path / "out")
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["bone", "full"]
    assert all(run["peak_memory"] > 0 and run["step_seconds"] > 0 for run in runs)
    assert "held-out loss" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora,bonne"], "unknown method 'bonne', did you mean bone?"),
        (["--methods", ","], "methods: name at least one"),
        (["--equal", "size"], "settings: equal must be of type Literal['rank', 'budget', 'none'], got 'size'"),
        (["--equal", "none", "--rank", "4"], "rank is for equal: rank or budget"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--training", "seed=3"], "training: seed is set by `seeds`"),
        (["--eval-share", "0"], "compare needs held-out samples"),
        (["--config", "{tmp}/method.yaml"], "settings: unknown key 'method', did you mean methods?"),
    ],
)
def test_bad_comparisons(files: Path, tmp_path: Path, arguments: list[str], message: str, here: list) -> None:
    (tmp_path / "method.yaml").write_text("method: lora")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    given = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", tmp_path / "out", *SHORT)
    outcome = call("compare", *given, *arguments)
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1 and not here


@pytest.mark.parametrize(
    ("count", "budget", "wanted"),
    [
        (lambda r: 100 * r, 840, 8),
        (lambda r: 100 * r, 860, 9),
        (lambda r: 100 * r, 1, 1),
        (lambda r: r + 1 if r <= 24 else None, 5000, 24),  # refused above
        (lambda r: 10 * r if r % 4 == 0 else None, 130, 12),  # refused between
        (lambda r: None, 130, None),
    ],
)
def test_closest_rank(count: Any, budget: int, wanted: int | None) -> None:
    rank, found = sizes.closest_rank(count, budget)
    if wanted is None:
        assert (rank, found) == (0, 0)
        return
    assert found == count(rank)
    assert abs(found - budget) <= abs(count(wanted) - budget)


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (4.0, 0.9), (1.0, 0.3)]
    for more, sign in ((True, 1), (False, -1)):
        signed = [(cost, sign * quality) for cost, quality in points]
        found = report.front(signed, more)
        beaten = {
            i
            for i, (cost, quality) in enumerate(points)
            for j, (other, better) in enumerate(points)
            if j != i and other <= cost and better >= quality and (other, better) != (cost, quality)
        }
        assert set(found) == set(range(len(points))) - beaten == {0, 1, 3}


def test_rank_keeps_the_scale() -> None:
    lora, bone = methods.find("lora"), methods.find("bone")
    assert sizes.with_rank(lora, {}, 32) == {"r": 32, "lora_alpha": 32}
    assert sizes.with_rank(lora, {"lora_alpha": 16}, 32) == {"r": 32, "lora_alpha": 16}
    assert sizes.with_rank(bone, {}, 32) == {"r": 32}
    assert sizes.with_rank(methods.find("full"), {}, 32) == {}


def test_no_is_a_strategy_and_not_false(tmp_path: Path) -> None:
    """YAML takes `save_strategy: no` for false."""
    (tmp_path / "run.yaml").write_text("training: {save_strategy: no, eval_strategy: no}")
    training = read_yaml(tmp_path / "run.yaml")["training"]
    given = TrainSettings(model="m", data="d", output=str(tmp_path / "out"), training=training)
    arguments = run.training_arguments(given, methods.find("lora"))
    assert (arguments.save_strategy, arguments.eval_strategy) == ("no", "no")


@pytest.mark.parametrize(("name", "cls"), [("train.yaml", TrainSettings), ("compare.yaml", CompareSettings)])
def test_examples_are_settings(name: str, cls: Any) -> None:
    found = parse(cls, {"output": "out", **read_yaml(EXAMPLES / name)})
    entries = {found.method: found.method_settings} if cls is TrainSettings else comparison.contestants(found.methods)
    for method, chosen in entries.items():
        methods.check_settings(methods.find(method), chosen)
    run.training_arguments(found, methods.find(next(iter(entries))))
