"""`export_lora`: what it writes is loaded by stock PEFT, in a process that never imports peftx, with equal outputs."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from conftest import CASES, adapted, logits, randomize, tiny_model, tuner_layers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel
from typer.testing import CliRunner

import peftx
from peftx.cli import app

EXACT = [case for case in CASES if case.info.lora_export in ("exact", "dora") and case.name != "bone-bat"]
DELTAS = [case for case in CASES if case.info.mergeable]
KINDS = ["llama", "gpt2", "bert"]
LOAD = """
import sys
from pathlib import Path
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

root = Path(sys.argv[1])
tokens = load_file(root / "tokens.safetensors")["tokens"]
found = {}
for folder in sorted(root.glob("*@*")):
    kind = folder.name.split("@")[1]
    assert PeftConfig.from_pretrained(folder).peft_type == "LORA"
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(root / kind), folder).eval()
    with torch.no_grad():
        found[folder.name] = model(input_ids=tokens).logits
        found[folder.name + " merged"] = model.merge_and_unload()(input_ids=tokens).logits
assert "peftx" not in sys.modules
save_file(found, root / "found.safetensors")
"""


def trained(case, kind):
    """Every linear layer adapted, and on the classifier also biases and the head trained."""
    settings = {"target_modules": "all-linear"}
    if kind == "bert":
        settings |= {"task_type": "SEQ_CLS", "bias": "all"}
    if case.info.name == "triadaptlora":  # ranks that differ from module to module
        settings |= {"total_step": 8, "init_warmup": 0, "growth_interval": 1, "max_rank": 8}
    model = adapted(tiny_model(kind), case, **settings)
    if case.info.name == "triadaptlora":
        model.train()
        assert model.base_model.update_and_grow(2)
        randomize(model.eval(), case)
        assert len(set(model.base_model.ranks().values())) > 1
    if kind == "bert":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and case.info.prefix not in name:
                parameter.data += 0.1
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Logits of all exactly exported adapters as stock PEFT gives them, and as ours were."""
    root = tmp_path_factory.mktemp("export")
    tokens = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, root / "tokens.safetensors")
    wanted = {}
    for kind in KINDS:
        tiny_model(kind).save_pretrained(root / kind)
        for case in EXACT:
            model = trained(case, kind)
            wanted[f"{case.name}@{kind}"] = logits(model, tokens)
            errors = peftx.export_lora(model, root / f"{case.name}@{kind}")
            assert errors == dict.fromkeys(tuner_layers(model), 0.0)
            assert torch.equal(logits(model, tokens), wanted[f"{case.name}@{kind}"])  # the model is left alone
    done = subprocess.run([sys.executable, "-c", LOAD, root], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return wanted, load_file(root / "found.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [case.name for case in EXACT])
def test_stock_peft_gives_the_same_logits_without_peftx(exported, variant, kind):
    wanted, found = exported
    name = f"{variant}@{kind}"
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[name + " merged"], wanted[name], rtol=1e-5, atol=1e-5)


def test_only_dora_needs_more_than_plain_lora(tmp_path):
    for case in EXACT:
        peftx.export_lora(adapted(tiny_model("llama"), case, target_modules=["q_proj"]), tmp_path / case.name)
        config = peft.PeftConfig.from_pretrained(tmp_path / case.name)
        assert type(config) is peft.LoraConfig and config.use_dora == (case.info.lora_export == "dora")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", DELTAS, ids=[case.name for case in DELTAS])
def test_a_rank_gives_the_best_plain_lora_and_its_errors(variant, kind, tmp_path, tokens):
    settings = {"target_modules": "all-linear", **({"task_type": "SEQ_CLS", "bias": "all"} if kind == "bert" else {})}
    model = adapted(tiny_model(kind), variant, **settings)
    wanted, layers = logits(model, tokens), tuner_layers(model)
    errors = peftx.export_lora(model, tmp_path, rank=3)
    assert errors.keys() == layers.keys() and torch.equal(logits(model, tokens), wanted)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (type(config), config.use_dora, config.r, config.lora_alpha) == (peft.LoraConfig, False, 3, 3)
    stock = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    for name, theirs in tuner_layers(stock).items():
        delta = layers[name].get_delta_weight("default").detach()
        S = torch.linalg.svdvals(delta)
        lost = (delta - theirs.get_delta_weight("default")).norm() / delta.norm()
        torch.testing.assert_close(lost, S[3:].norm() / S.norm(), rtol=1e-3, atol=1e-5)
        assert abs(errors[name] - lost) < 1e-5
    exact = tmp_path / "exact"
    assert max(peftx.export_lora(model, exact, rank=64).values()) < 1e-6
    stock = peft.PeftModel.from_pretrained(tiny_model(kind), exact).eval()
    torch.testing.assert_close(logits(stock, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_other_layers_and_no_delta_at_all_have_a_plain_lora_too(tmp_path):
    torch.manual_seed(0)
    for base, x in (
        (nn.Embedding(9, 6), torch.tensor([[1, 8]])),
        (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 5)),
    ):
        case = next(case for case in CASES if case.name == "allora")
        model = adapted(nn.Sequential(base), case, target_modules=["0"])
        plain = nn.Sequential(model.base_model.model[0].get_base_layer())
        wanted = model(x)
        peftx.export_lora(model, tmp_path, rank=4)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path)(x), wanted)
    grouped = adapted(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), case, target_modules=["0"])
    with pytest.raises(NotImplementedError, match="in groups"):
        peftx.export_lora(grouped, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    fresh = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftx.BoneConfig(r=2, target_modules=["0"]))
    assert peftx.export_lora(fresh, tmp_path, rank=1) == {"0": 0.0}


@pytest.mark.parametrize("variant", [case.name for case in EXACT])
def test_a_changed_scale_is_written(tmp_path, tokens, variant):
    (case,) = (case for case in EXACT if case.name == variant)
    model = adapted(tiny_model("llama"), case, target_modules=["q_proj", "up_proj"])
    for layer in tuner_layers(model).values():
        layer.scale_layer(0.5)
    wanted = logits(model, tokens)
    peftx.export_lora(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(stock, tokens), wanted, rtol=1e-5, atol=1e-5)


def test_the_named_adapter_is_written(tmp_path, tokens):
    case = EXACT[0]
    model = adapted(tiny_model("llama"), case, "first", "second", target_modules=["q_proj"])
    model.set_adapter("first")
    wanted = logits(model, tokens)
    model.set_adapter("second")
    peftx.export_lora(model, tmp_path / "deep" / "folder", adapter_name="first")
    stock = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "deep" / "folder").eval()
    torch.testing.assert_close(logits(stock, tokens), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path, unmergeable, tokens):
    model = adapted(tiny_model("llama"), unmergeable, target_modules=["q_proj"])
    for rank in (None, 2):
        with pytest.raises(NotImplementedError, match="cannot be merged or converted to LoRA"):
            peftx.export_lora(model, tmp_path / "out", rank=rank)
    bat = peft.get_peft_model(tiny_model("llama"), peftx.BoneConfig(r=4, init_weights="bat", target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="no exact LoRA form"):
        peftx.export_lora(bat, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [3]}, "ALoraLinearVariant"),
    ],
)
def test_what_of_pefts_own_is_more_than_a_delta_has_no_given_rank(options, reason, tmp_path, tokens):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    with pytest.raises(NotImplementedError, match=rf"{reason} is more than a weight delta.*`rank=None`"):
        peftx.export_lora(model, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = logits(model, tokens)
    peftx.export_lora(model, tmp_path / "copy")
    copied = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "copy").eval()
    torch.testing.assert_close(logits(copied, tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [peft.AdaLoraConfig(total_step=9), peft.LoHaConfig()], ids=type)
@pytest.mark.parametrize("rank", [None, 4])
def test_other_methods_of_peft_are_refused(tmp_path, config, rank):
    config.target_modules = ["q_proj"]
    model = peft.get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), config)
    with pytest.raises(NotImplementedError, match="convert_to_lora"):
        peftx.export_lora(model, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="needs a PeftModel"):
        peftx.export_lora(nn.Linear(2, 2), tmp_path)
    model = adapted(tiny_model("llama"), EXACT[0], "first", "second", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="There is no adapter 'other', only first, second"):
        peftx.export_lora(model, tmp_path, adapter_name="other")
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`rank` must be a whole number, at least 1"):
            peftx.export_lora(model, tmp_path, rank=rank)
    assert not list(tmp_path.iterdir())
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        peftx.export_lora(model, tmp_path)


def saved(tmp_path, case, kind="bert", **settings):
    """Folder of an adapter whose base is a folder too, and the model."""
    base = tmp_path / "base"
    tiny_model(kind).save_pretrained(base)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    model = adapted(auto.from_pretrained(base), case, target_modules="all-linear", task_type=task, **settings)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


@pytest.mark.parametrize("variant", [case.name for case in EXACT])
def test_a_folder_is_exported_as_the_model_is(tmp_path, tokens, variant):
    (case,) = (case for case in EXACT if case.name == variant)
    folder, model = saved(tmp_path, case)
    errors = peftx.export_lora(folder, tmp_path / "from folder")
    assert errors == peftx.export_lora(model, tmp_path / "from model")
    ours, theirs = (load_file(tmp_path / f"from {x}" / "adapter_model.safetensors") for x in ("folder", "model"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key])
    found, wanted = (peft.PeftConfig.from_pretrained(tmp_path / f"from {x}") for x in ("folder", "model"))
    assert found == wanted and found.base_model_name_or_path == str(tmp_path / "base")


def test_a_folder_with_another_number_of_labels_needs_no_telling(tmp_path, tokens):
    config = BertConfig(**{**tiny_model("bert").config.to_dict(), "id2label": {i: str(i) for i in range(5)}})
    BertModel(config).save_pretrained(tmp_path / "base")  # without a head
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = adapted(model, EXACT[0], target_modules=["query"], task_type="SEQ_CLS").eval()
    wanted = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peftx.hub.load_adapter(tmp_path / "adapter").eval(), tokens), wanted)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no adapter that can be read"):
        peftx.export_lora(tmp_path / "nowhere", tmp_path / "out")
    folder, _ = saved(tmp_path, EXACT[0])
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "UNHEARD"}, "of the type 'UNHEARD', which neither PEFT"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "base model .*gone, which is not a folder here"),
        ({"base_model_name_or_path": None}, "name it by `base_model`"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            peftx.export_lora(folder, tmp_path / "out", rank=2)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert peftx.export_lora(folder, tmp_path / "given", rank=2, base_model=tiny_model("bert"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="NaN"):
        peftx.export_lora(folder, tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        peftx.export_lora(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", ["bone", "bone-bat"])
def test_bone_becomes_pefts_miss(tmp_path, tokens, variant):
    (case,) = (case for case in CASES if case.name == variant)
    folder, model = saved(tmp_path, case, "llama")
    wanted = logits(model, tokens)
    for source in (folder, model):
        peftx.hub.export_miss(source, tmp_path / "miss")
        assert type(peft.PeftConfig.from_pretrained(tmp_path / "miss")) is peft.MissConfig
        stock = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "miss").eval()
        torch.testing.assert_close(logits(stock, tokens), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_no_miss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Only Bone adapters"):
        peftx.hub.export_miss(adapted(tiny_model("llama"), EXACT[0], target_modules=["q_proj"]), tmp_path / "out")
    config = peftx.BoneConfig(r=4, rank_pattern={"up_proj": 2}, target_modules=["q_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"one block size for all modules, this adapter has \[2, 4\]"):
        peftx.hub.export_miss(peft.get_peft_model(tiny_model("llama"), config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def call(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_writes_lora_miss_and_merged_models(tmp_path, tokens):
    (case,) = (case for case in CASES if case.name == "bone")
    folder, model = saved(tmp_path, case, "llama")
    wanted = logits(model, tokens)
    for to, said in (("lora", "14 modules for stock PEFT, exact"), ("miss", "MiSS adapter"), ("merged", "Merged")):
        outcome = call(folder, tmp_path / to, "--to", to)
        assert (outcome.exit_code, outcome.stderr) == (0, "") and said in outcome.output
        if to == "merged":
            found = AutoModelForCausalLM.from_pretrained(tmp_path / to).eval()
        else:
            found = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / to).eval()
        torch.testing.assert_close(logits(found, tokens), wanted, rtol=1e-5, atol=1e-5)
    outcome = call(folder, tmp_path / "cut", "--rank", 1)
    assert outcome.exit_code == 0 and "largest relative error 0." in outcome.output
    assert call(folder, tmp_path / "half", "--to", "merged", "--dtype", "bfloat16").exit_code == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name, weight in model.merge_and_unload().named_parameters():
        assert torch.equal(half.get_parameter(name), weight.to(torch.bfloat16))


def test_mistakes_of_the_command_are_one_line(tmp_path):
    folder, _ = saved(tmp_path, next(case for case in CASES if case.name == "bone-bat"), "llama")
    for arguments, message in (
        (["nowhere", tmp_path / "out"], "peftx: nowhere holds no adapter that can be read"),
        ([folder, folder], "is the adapter itself"),
        ([folder, tmp_path / "out", "--to", "merged", "--rank", 2], "--rank is for --to lora"),
        ([folder, tmp_path / "out", "--dtype", "float16"], "--dtype is for --to merged"),
        ([folder, tmp_path / "out"], "no exact LoRA form"),
        ([folder, tmp_path / "out", "--rank", 0], "`rank` must be a whole number"),
    ):
        outcome = call(*arguments)
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1) and message in outcome.stderr
    assert not (tmp_path / "out").exists()
