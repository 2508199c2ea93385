"""Files from elsewhere: each fault is one clear error, and the model is as it was before."""

import copy
import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from conftest import randomize, tiny_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import peftx

TARGETS = ["lin0", "lin1"]


@pytest.fixture
def saved(case, mlp, tmp_path):
    """Folder of a trained adapter."""
    model = peft.get_peft_model(copy.deepcopy(mlp), case.config(target_modules=TARGETS))
    randomize(model, case)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_trained_biases_load_where_none_are_trained(case, mlp, tmp_path):
    others = dict(target_modules=["lin0"], modules_to_save=["lin1"])
    trained = peft.get_peft_model(copy.deepcopy(mlp), case.config(**others, bias="all"))
    randomize(trained, case)
    biases = {name: parameter for name, parameter in trained.named_parameters() if name.endswith(".bias")}
    for parameter in biases.values():
        parameter.data.fill_(1.23)
    trained.save_pretrained(tmp_path)
    fresh = peft.get_peft_model(copy.deepcopy(mlp), case.config(**others))
    peft.set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
    assert biases and all((fresh.get_parameter(name) == 1.23).all() for name in biases)


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(k for k, v in tensors.items() if "lin0" in k and v.is_floating_point() and v.ndim)[0]
    change(tensors, key)
    save_file(tensors, path)
    return key


def drop(tensors, key):
    del tensors[key]


def add(tensors, key):
    tensors[key.replace("lin0", "lin9")] = tensors[key].clone()


def grow(tensors, key):
    tensors[key] = torch.cat([tensors[key]] * 2)


def transpose(tensors, key):
    tensors[key] = tensors[key][None]


def to_int(tensors, key):
    tensors[key] = tensors[key].to(torch.int32)


def poison(tensors, key):
    tensors[key].view(-1)[0] = float("nan")


FAULTS = {
    drop: "lin0.*: missing, expected shape",
    add: "lin9.*: unexpected",
    grow: r"lin0.*: found shape .* expected \(",
    transpose: r"lin0.*: found shape .* expected \(",
    to_int: "lin0.*: found dtype torch.int32, expected torch.float32",
    poison: "lin0.*: found values that are not finite",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_faulty_file_is_refused_and_the_base_is_untouched(case, mlp, saved, fault, low_cpu_mem_usage):
    edit(saved, fault)
    x = torch.randn(3, 12)
    before, modules = mlp(x), [(name, type(m)) for name, m in mlp.named_modules()]
    with pytest.raises(ValueError, match=FAULTS[fault]):
        peft.PeftModel.from_pretrained(mlp, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert [(name, type(m)) for name, m in mlp.named_modules()] == modules
    assert not hasattr(mlp, "peft_config") and torch.equal(mlp(x), before)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_faulty_second_adapter_leaves_the_first_alone(case, mlp, saved, fault):
    model = peft.PeftModel.from_pretrained(mlp, saved, is_trainable=True)
    x = torch.randn(3, 12)
    before, trainable = model(x), {n for n, p in model.named_parameters() if p.requires_grad}
    edit(saved, fault)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        model.load_adapter(saved, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(model(x), before)


def test_a_faulty_file_does_not_remove_an_adapter_that_was_there(case, mlp, saved):
    model = peft.get_peft_model(mlp, case.config(target_modules=TARGETS))
    randomize(model, case, seed=7)
    x = torch.randn(3, 12)
    before = model(x)
    edit(saved, poison)
    with pytest.raises(ValueError, match="not finite"):
        model.load_adapter(saved, "default")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_before_the_model_is_touched(case, mlp, saved, size):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a complete safetensors file"):
        peft.PeftModel.from_pretrained(mlp, saved)
    assert type(mlp.lin0) is nn.Linear


def test_the_wrong_model_is_refused(case, mlp, saved):
    other = nn.Sequential()
    other.add_module("lin0", nn.Linear(12, 24))
    other.add_module("lin1", nn.Linear(24, 8))
    with pytest.raises(ValueError, match="lin0"):
        peft.PeftModel.from_pretrained(other, saved)
    assert type(other.lin0) is nn.Linear


def test_an_unsupported_layer_is_refused_and_nothing_is_wrapped(case):
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16))
    with pytest.raises(
        TypeError, match=rf"{case.info.name.upper()} cannot adapt the module '1': LayerNorm is not supp"
    ):
        peft.get_peft_model(model, case.config(target_modules=["0", "1"]))
    assert [type(m) for m in model] == [nn.Linear, nn.LayerNorm]


def test_a_failed_second_adapter_leaves_the_first_alone(case, mlp):
    model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
    mlp.norm = nn.LayerNorm(4)
    randomize(model, case)
    x = torch.randn(3, 12)
    before = model(x)
    with pytest.raises(TypeError, match="'norm'"):
        model.add_adapter("second", case.config(target_modules=["lin0", "lin1", "norm"]))
    assert list(model.peft_config) == ["default"] and torch.equal(model(x), before)
    assert type(mlp.lin1) is nn.Linear and type(mlp.norm) is nn.LayerNorm
    model.add_adapter("second", case.config(target_modules=["lin0", "lin1"]))  # the name is free again


def test_the_card_tells_how_to_load(case, mlp, saved):
    text = (saved / "README.md").read_text()
    code = text.split("```python\n")[1].splitlines()
    module, registers = case.info.config.__module__, f"  # registers {case.info.name.upper()} with PEFT"
    if module.startswith("peftx."):
        assert code[0] == f"import peftx{registers}: pip install peftx"
    else:
        assert code[:2] == ["import peftx  # pip install peftx", f"import {module}{registers}"]
    model = peft.PeftModel.from_pretrained(mlp, saved)
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text().count("import peftx") == 1


def test_the_card_says_what_the_adapter_is(case, tmp_path):
    base = tiny_model("bert")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = case.config(target_modules=["query", "value"], task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "peft" and card.data.base_model == str(tmp_path / "base")
    assert {"peft", "peftx", f"peft:method:{case.info.name}"} <= set(card.data.tags)
    assert ("lora" in card.data.tags) == (case.info.prefix == "lora_")
    assert "More Information Needed" not in card.text and card.text.count("\n# ") == 1
    tensors = load_file(path.parent / "adapter_model.safetensors")
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,} values in {len(tensors)} tensors" in card.text
    for name in ("target_modules", *case.kwargs):
        assert f"| `{name}` | `" in card.text
    assert "| `target_modules` | `query, value` |" in card.text
    assert case.info.paper.removeprefix("arXiv:") in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace("path/or/name of this adapter", str(path.parent))
    assert str(tmp_path) not in card.text  # a path of this machine helps nobody else
    code = code.replace("path/or/name of the base model", str(tmp_path / "base"))
    found: dict = {}
    exec(code, found)  # as it stands on the card
    assert type(found["model"]) is peft.PeftModelForSequenceClassification


def test_a_card_that_somebody_wrote_is_kept(mlp, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My adapter\n\nRead this.\n")
    peft.get_peft_model(mlp, peftx.BoneConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "peftx" in card.data.tags
    assert card.text.startswith("## Load this adapter") and "# My adapter\n\nRead this." in card.text
    assert "## Settings" not in card.text


SCRIPT = """
import sys, torch, peft
from torch import nn
model = nn.Sequential()
model.add_module("lin0", nn.Linear(12, 16)); model.add_module("lin1", nn.Linear(16, 8))
if sys.argv[2] == "with":
    exec(open(sys.argv[1] + "/README.md").read().split("```python\\n")[1].splitlines()[0])
peft.PeftModel.from_pretrained(model, sys.argv[1])
"""


@pytest.mark.slow
def test_a_fresh_process_needs_the_first_line_of_the_card(mlp, tmp_path):
    peft.get_peft_model(mlp, peftx.BoneConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), how],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        for how in ("with", "without")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[1].returncode != 0 and "KeyError: 'BONE'" in runs[1].stderr


def test_the_happy_path_is_silent(case, mlp, saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(mlp, saved)
        model(torch.randn(2, 12))
        model.save_pretrained(saved)
        model.merge_and_unload() if case.info.mergeable else model.unload()
