"""`export_lora`: what it writes is loaded by stock PEFT, in a process that never imports peftx, with equal outputs."""

import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from conftest import CASES, adapted, logits, randomize, tiny_model, tuner_layers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)
from typer.testing import CliRunner

import peftx
from peftx.cli import app

EXACT = [case for case in CASES if case.lora_export in ("exact", "dora")]
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
    assert PeftConfig.from_pretrained(folder).peft_type == ("MISS" if "miss" in folder.name else "LORA")
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(root / kind), folder).eval()
    with torch.no_grad():
        found[folder.name] = model(input_ids=tokens).logits
        if "adapted" not in folder.name:  # of two tied weights, PEFT would merge into both
            found[folder.name + " merged"] = model.merge_and_unload()(input_ids=tokens).logits
for folder in root.glob("merged-*"):
    kind, dtype = folder.name.split("-")[1:]
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {model.dtype} == {getattr(torch, dtype)}
    with torch.no_grad():
        found[folder.name] = model(input_ids=tokens).logits.float()
for folder in root.glob("conv-*"):
    parts = load_file(folder / "base.safetensors")
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 6, parts["0.weight"].shape[-1], padding=1))
    base.load_state_dict({key: parts[key] for key in ("0.weight", "0.bias")})
    with torch.no_grad():
        found[folder.name] = PeftModel.from_pretrained(base, folder).eval()(parts["x"])
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


def named(variant):
    return next(case for case in CASES if case.name == variant)


def moved(model, case):
    """With everything trained that is no adapter, too: biases, heads."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and case.info.prefix not in name:
            parameter.data += 0.1
    return model


def others(root):
    """Adapters that are exported in other ways, or of models with something special, by the name of their folder."""
    found = {}
    for variant in ("bone", "bone-bat"):
        model = adapted(tiny_model("llama"), named(variant), target_modules=["q_proj", "down_proj"])
        found[f"{variant} miss@llama"] = model, peftx.hub.export_miss
        model = adapted(tiny_model("llama"), named(variant), target_modules=["q_proj", "down_proj"])
        for layer in tuner_layers(model).values():
            layer.scale_layer(0.5)
        found[f"{variant} scaled miss@llama"] = model, peftx.hub.export_miss
    model = adapted(tiny_model("llama"), named("bone-bat"), target_modules="all-linear")
    found["bone-bat cut@llama"] = model, lambda model, path: peftx.export_lora(model, path, rank=32)
    for variant in ("bone", "allora", "gradnormlorp"):
        case = named(variant)
        only = "lora_only" if case.is_lora else f"{case.info.name}_only"
        settings = {"target_modules": ["c_attn"], "bias": only, "modules_to_save": ["ln_f"]}
        found[f"{variant} bias@gpt2"] = moved(adapted(tiny_model("gpt2"), case, **settings), case), peftx.export_lora
        settings = {"target_modules": ["c_attn", "lm_head"]}
        found[f"{variant} adapted head@gpt2"] = adapted(tiny_model("gpt2"), case, **settings), peftx.export_lora
    for variant in ("allora", "flora"):
        model = adapted(tiny_model("llama"), named(variant), target_modules=["embed_tokens", "q_proj"])
        found[f"{variant} embeddings@llama"] = model, peftx.export_lora
    for variant in ("bone", "loldu", "fedsvd"):
        folder, kind = root / f"{variant}-saved", "bert" if variant == "loldu" else "gpt2"
        auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
        targets = {"bone": ["c_attn", "lm_head"], "fedsvd": ["c_attn"], "loldu": ["query", "value"]}[variant]
        settings = {"target_modules": targets, "task_type": "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"}
        if variant == "fedsvd":
            settings["modules_to_save"] = ["lm_head"]  # which is tied
        model = moved(adapted(auto.from_pretrained(root / kind), named(variant), **settings), named(variant))
        model.save_pretrained(folder)
        dtype = {"bone": torch.float32, "loldu": torch.float16, "fedsvd": torch.bfloat16}[variant]

        def write(model, path, folder=folder, dtype=dtype):
            peftx.hub.export_merged(folder, path, dtype=dtype)

        found[f"merged-{kind}-{str(dtype).removeprefix('torch.')}"] = model, write
    return found


OTHERS = [
    *("bone miss@llama", "bone-bat miss@llama", "bone scaled miss@llama", "bone-bat scaled miss@llama"),
    *("bone-bat cut@llama", "allora embeddings@llama", "flora embeddings@llama"),
    *(f"{variant} {what}@gpt2" for variant in ("bone", "allora", "gradnormlorp") for what in ("bias", "adapted head")),
    *("merged-gpt2-float32", "merged-bert-float16", "merged-gpt2-bfloat16"),
    *("conv-3-2", "conv-3-[4, 3, 2, 1]", "conv-1-[2, 3]"),
]


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
    for name, (model, write) in others(root).items():
        wanted[name] = logits(model, tokens)
        write(model, root / name)
    torch.manual_seed(0)
    for size, r in ((3, 2), (3, [4, 3, 2, 1]), (1, [2, 3])):
        base, x = nn.Sequential(nn.Conv2d(4, 6, size, padding=1)), torch.randn(2, 4, 7, 7)
        folder = root / f"conv-{size}-{r}"
        folder.mkdir()
        save_file({**base.state_dict(), "x": x}, folder / "base.safetensors")
        model = adapted(base, named("flora"), target_modules=["0"], r=r)
        wanted[folder.name] = model(x).detach()
        assert peftx.export_lora(model, folder) == {"0": 0.0}
    done = subprocess.run([sys.executable, "-c", LOAD, root], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return wanted, load_file(root / "found.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [case.name for case in EXACT])
@pytest.mark.slow
def test_stock_peft_gives_the_same_logits_without_peftx(exported, variant, kind):
    wanted, found = exported
    name = f"{variant}@{kind}"
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[name + " merged"], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_stock_peft_reads_everything_else_too(exported, name):
    wanted, found = exported
    tolerance = {"float16": 3e-3, "bfloat16": 3e-2}.get(name.split("-")[-1], 1e-5)
    torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)
    if f"{name} merged" in found:
        torch.testing.assert_close(found[f"{name} merged"], wanted[name], rtol=1e-5, atol=1e-5)


def test_every_folder_was_read(exported):
    wanted, found = exported
    assert wanted.keys() == {name.removesuffix(" merged") for name in found}
    assert set(OTHERS) == wanted.keys() - {f"{case.name}@{kind}" for case in EXACT for kind in KINDS}


def test_only_dora_needs_more_than_plain_lora(tmp_path):
    for case in EXACT:
        peftx.export_lora(adapted(tiny_model("llama"), case, target_modules=["q_proj"]), tmp_path / case.name)
        config = peft.PeftConfig.from_pretrained(tmp_path / case.name)
        assert type(config) is peft.LoraConfig and config.use_dora == (case.lora_export == "dora")


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


@pytest.mark.parametrize("kind", ["DistilBert", "DebertaV2", "Roberta"])
def test_labels_are_counted_at_the_last_layer_of_the_head(tmp_path, kind):
    """Saved heads of two layers: pre_classifier and classifier, pooler and classifier, dense and out_proj."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "max_position_embeddings": 16, "pad_token_id": 0}
    if kind == "DistilBert":
        sizes |= {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    heads = [name for name, _ in model.named_children() if name in ("pre_classifier", "pooler", "classifier")]
    config = peftx.BoneConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=heads)
    model = peft.get_peft_model(model, config).eval()
    randomize(model, named("bone"))
    model.save_pretrained(tmp_path / "adapter")
    assert "num_labels=3)" in (tmp_path / "adapter" / "README.md").read_text()
    ids = torch.randint(1, 32, (2, 7))
    again = peftx.hub.load_adapter(tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_weight_in_three_places_is_merged_into_the_adapted_one_only(tmp_path):
    sizes = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 16, "pad_token_id": 0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = {"input_ids": torch.randint(3, 32, (2, 7)), "decoder_input_ids": torch.randint(3, 32, (2, 5))}
    wanted = model(**ids).logits
    merged = peftx.hub.export_merged(tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    for found in (merged, loaded):
        torch.testing.assert_close(found.eval()(**ids).logits, wanted, atol=1e-5, rtol=1e-4)


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
    with pytest.raises(ValueError, match="The tensors of the adapter .*adapter cannot be read"):
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


def test_a_merged_model_is_rounded_once(tmp_path):
    base = tiny_model("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), named("bone"), target_modules=["q_proj"])
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "adapter")
    merged = peftx.hub.export_merged(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)
    layer = tuner_layers(model)["model.layers.0.self_attn.q_proj"]
    exact = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, exact.half())


def test_a_merged_model_keeps_ties_that_nothing_broke_and_its_tokenizer(tmp_path):
    import tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, named("bone"), target_modules=["c_attn"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    merged = peftx.hub.export_merged(tmp_path / "adapter", tmp_path / "merged")
    assert merged.lm_head.weight is merged.transformer.wte.weight and merged.config.tie_word_embeddings
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 64
    with pytest.raises(ValueError, match="cannot hold: name another `dtype`"):
        model.save_pretrained(tmp_path / "adapter")
        blocks = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        save_file({k: v + 1e6 for k, v in blocks.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
        peftx.hub.export_merged(tmp_path / "adapter", tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_nothing_that_is_read_is_written_over(tmp_path):
    folder, _ = saved(tmp_path, named("bone"), "llama")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(folder)
    for export in (peftx.export_lora, peftx.hub.export_miss):
        for out in (folder, tmp_path / "link", f"{folder}/../adapter"):
            with pytest.raises(ValueError, match="is the adapter itself, which is never changed"):
                export(folder, out)
    with pytest.raises(ValueError, match="holds an adapter, which transformers would put on the merged model again"):
        peftx.hub.export_merged(folder, folder)
    with pytest.raises(ValueError, match="is the base model itself, which is never changed"):
        peftx.hub.export_merged(folder, tmp_path / "base")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_export_of_embeddings_is_silent(tmp_path):
    model = adapted(tiny_model("gpt2"), named("allora"), target_modules=["wte", "c_attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftx.export_lora(model, tmp_path / "out")
    model = adapted(tiny_model("gpt2"), named("allora"), target_modules=["c_attn"])
    peftx.export_lora(model, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, of a layout that the config does not tell
        peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "out")


@pytest.mark.parametrize("variant", ["bone", "loldu", "allora", "gradnormlorp"])
def test_an_adapter_over_a_quantised_base(tmp_path, variant):
    bnb = pytest.importorskip("bitsandbytes")

    def base():
        torch.manual_seed(0)
        dense = nn.Linear(64, 64)
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.load_state_dict(dense.state_dict())
        return nn.Sequential(layer.to("cpu"))

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    model = adapted(base(), named(variant), target_modules=["0"])
    wanted = model(x).detach()
    assert peftx.export_lora(model, tmp_path) == {"0": 0.0}
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path)(x), wanted, rtol=1e-2, atol=1e-2)


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
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "adapter_model.safetensors").write_text("another's")
    for arguments, message in (
        (["nowhere", tmp_path / "out"], "peftx: nowhere holds no adapter that can be read"),
        ([folder, folder], "is the adapter itself, which is never changed"),
        ([folder, tmp_path / "used", "--rank", 2], "used is not empty: name another folder, or say --overwrite"),
        ([folder, tmp_path / "out", "--to", "merged", "--rank", 2], "--rank is for --to lora"),
        ([folder, tmp_path / "out", "--dtype", "float16"], "--dtype is for --to merged"),
        ([folder, tmp_path / "out"], "no exact LoRA form"),
        ([folder, tmp_path / "out", "--rank", 0], "`rank` must be a whole number"),
    ):
        outcome = call(*arguments)
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1) and message in outcome.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "used" / "adapter_model.safetensors").read_text() == "another's"
