"""`peftx inspect`: every method's files described, and broken ones flagged, without a base model."""

import json

import peft
import pytest
import torch
from conftest import CASES, adapted, tiny_model, tuner_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peftx.cli import app
from peftx.hub import heat_map, inspect_adapter
from peftx.hub.inspect import place

RANKS = {"compacter": 1, "loldu": 2, "krona": 2}  # what the shapes of their tensors say; the others have r=2


def saved(folder, case, **settings):
    base = folder / "base"
    tiny_model("llama").save_pretrained(base)
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = adapted(AutoModelForCausalLM.from_pretrained(base), case, **settings)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def named(name):
    return next(case for case in CASES if case.name == name)


def test_every_method_is_described_by_its_file_alone_and_on_its_base(case, tmp_path):
    folder, model = saved(tmp_path, case)
    report = inspect_adapter(folder)
    assert (report.method, report.known_by, report.problems) == (case.info.peft_type.value, "peftx", ())
    assert (report.task_type, report.base_model, report.loaded) == ("CAUSAL_LM", str(tmp_path / "base"), False)
    layers = tuner_layers(model)
    assert {module.name for module in report.modules} == layers.keys()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(report.dtypes.values()) == report.parameters
    assert sum(module.parameters for module in report.modules) + sum(report.others.values()) == report.parameters
    if case.info.name != "triadaptlora":
        assert {module.rank for module in report.modules} == {RANKS.get(case.info.name, 2)}
    for module in report.modules:
        if module.is_delta:
            delta = layers[module.name].get_delta_weight("default")
            assert module.norm == pytest.approx(delta.norm().item(), rel=1e-5)
    loaded = inspect_adapter(folder, load=True)
    assert loaded.loaded and not loaded.problems
    for module in loaded.modules:
        assert module.is_delta == case.info.mergeable or case.info.lora_export == "dora"
        if case.info.mergeable and case.info.lora_export != "dora":
            assert module.norm == pytest.approx(layers[module.name].get_delta_weight("default").norm().item(), rel=1e-4)


def test_triadaptloras_ranks_are_those_at_work(tmp_path):
    folder, model = saved(tmp_path, named("triadaptlora"))
    ranks = model.base_model.ranks()
    assert {module.name: module.rank for module in inspect_adapter(folder).modules} == ranks


@pytest.mark.parametrize("method", ["lora", "miss"])
def test_pefts_own_methods_are_described_too(tmp_path, method):
    config = {
        "lora": peft.LoraConfig(
            r=4, use_rslora=True, alpha_pattern={"down_proj": 3}, target_modules=["q_proj", "down_proj"]
        ),
        "miss": peft.MissConfig(r=4, target_modules=["q_proj"]),
    }[method]
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert (report.method, report.known_by, report.problems) == (method.upper(), "PEFT", ())
    assert {module.rank for module in report.modules} == {4}
    if method == "lora":
        for module in report.modules:
            delta = tuner_layers(model)[module.name].get_delta_weight("default")
            assert module.norm == pytest.approx(delta.norm().item(), rel=1e-5)


@pytest.mark.parametrize("damage", ["nan", "ranks", "missing", "foreign", "type", "config", "base"])
def test_what_is_wrong_is_said(tmp_path, damage):
    folder, _ = saved(tmp_path, named("allora"))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    wanted = {
        "nan": f"{key}: 2 of 32 values are not finite",
        "ranks": "lora_A (1, 16) and lora_B (16, 2) have different ranks",
        "missing": "lora_A is missing",
        "foreign": "no tensor in the file is ALLORA's",
        "type": "of the type 'UNHEARD', which neither PEFT",
        "config": "`eta` must be",
        "base": "it does not load",
    }[damage]
    if damage == "nan":
        tensors[key][0, :2] = torch.tensor([float("nan"), float("inf")])
    elif damage == "ranks":
        tensors[key] = tensors[key][:1].clone()
    elif damage == "missing":
        del tensors[key]
    elif damage == "foreign":
        tensors = {"something.weight": torch.ones(2)}
    elif damage == "base":
        tiny_model("gpt2").save_pretrained(tmp_path / "base")
    settings |= {"type": {"peft_type": "UNHEARD"}, "config": {"eta": -1}}.get(damage, {})
    save_file(tensors, weights)
    config.write_text(json.dumps(settings))
    report = inspect_adapter(folder, load=damage == "base")
    assert any(wanted in problem for problem in report.problems) and not report.loaded
    outcome = CliRunner().invoke(app, ["inspect", str(folder), *["--load"] * (damage == "base")])
    assert outcome.exit_code == 1 and "loads" in outcome.output and "no: see below" in outcome.output
    assert f"problem: {report.problems[0]}" in outcome.output


def test_what_cannot_be_read_at_all_is_one_line(tmp_path):
    folder, _ = saved(tmp_path, named("bone"))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    for message in ("cannot be read", "is not JSON", "not an object", "is 3, not a name", "holds no adapter_config"):
        outcome = CliRunner().invoke(app, ["inspect", str(folder)])
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1) and message in outcome.stderr
        weights.write_bytes(whole)
        broken = {"cannot be read": "{", "is not JSON": "[1]", "not an object": '{"peft_type": 3}'}.get(message)
        config.write_text(broken or text)
        if message == "is 3, not a name":
            config.unlink()


def test_command_picture_and_json(tmp_path):
    folder, _ = saved(tmp_path, named("bone"))
    picture = tmp_path / "norms.png"
    outcome = CliRunner().invoke(app, ["inspect", str(folder), "--load", "--plot", str(picture)])
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert "BONE, known by peftx arXiv:2409.15371" in outcome.output and "yes, it was loaded" in outcome.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    outcome = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    facts = json.loads(outcome.output)
    assert facts["settings"]["r"] == 2 and len(facts["modules"]) == 4
    heat_map(inspect_adapter(folder), picture)


def test_places_in_a_model():
    assert place("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert place("h.10") == (10, "h")
    assert place("classifier") == (-1, "classifier")
