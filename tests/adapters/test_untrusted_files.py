"""Files that somebody else wrote: refused as a whole, before memory is taken, and the model is as it was."""

import contextlib
import copy
import json
import os
import resource
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import MLP, Case, adapted, randomize, tiny_model
from safetensors.torch import load_file, save_file

TARGETS = ["lin0", "lin1"]
WEIGHTS = "adapter_model.safetensors"


def picture(model: torch.nn.Module) -> dict[str, Any]:
    """All that a refused file has to leave alone."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trained": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "dtypes": {name: tensor.dtype for name, tensor in model.state_dict().items()},
    }


@contextlib.contextmanager
def unchanged(model: torch.nn.Module):
    before = picture(model)
    yield
    after = picture(model)
    assert before["modules"] == after["modules"] and before["trained"] == after["trained"]
    assert before["dtypes"] == after["dtypes"]
    assert all(torch.equal(tensor, after["values"][name]) for name, tensor in before["values"].items())


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def declare(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def saved(case: Case, mlp: MLP, tmp_path: Path) -> Path:
    """An adapter with a trained head and trained biases."""
    config = case.config(target_modules=TARGETS, modules_to_save=["head"], bias="all")
    model = peft.get_peft_model(copy.deepcopy(mlp), config)
    randomize(model, case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("head" in name or name.endswith("bias")):
                parameter += 0.1
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def ends(tensors: dict[str, torch.Tensor], *ends: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(ends))


def missing_head(t):
    del t[ends(t, "head.weight")]


def wider_head(t):
    t[ends(t, "head.weight")] = torch.zeros(5, 8)


def nan_head(t):
    t[ends(t, "head.bias")][0] = float("nan")


def missing_bias(t):
    del t[ends(t, "lin0.base_layer.bias")]


def nan_bias(t):
    t[ends(t, "lin1.base_layer.bias")][1] = float("inf")


def foreign_weight(t):
    t["base_model.model.lin1.base_layer.weight"] = torch.full((8, 16), 7.0)


def foreign_nan(t):
    t["base_model.model.lin0.base_layer.weight"] = torch.full((16, 12), float("nan"))


def foreign_name(t):
    t["base_model.model.norm.weight"] = torch.ones(4)


FAULTS = [missing_head, wider_head, nan_head, missing_bias, nan_bias, foreign_weight, foreign_nan, foreign_name]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_heads_biases_and_foreign_tensors(case: Case, mlp: MLP, saved: Path, fault: Any) -> None:
    edit(saved, fault)
    for parameter in mlp.lin1.parameters():
        parameter.requires_grad_(False)  # as somebody may have it
    with unchanged(mlp), pytest.raises(ValueError, match="does not fit the model, nothing was loaded"):
        peft.PeftModel.from_pretrained(mlp, saved)


@pytest.mark.parametrize("fault", [missing_head, nan_head, foreign_weight], ids=lambda fault: fault.__name__)
def test_a_refused_second_adapter_leaves_no_wrapper(case: Case, mlp: MLP, saved: Path, fault: Any) -> None:
    model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
    edit(saved, fault)
    with unchanged(model), pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(saved, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]


def pickle_of(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    "fault", [missing_head, wider_head, nan_bias, foreign_weight], ids=lambda fault: fault.__name__
)
@pytest.mark.parametrize("how", ["pickle", "pickle, second", "config"])
def test_pickles_and_configs_of_the_caller_are_checked_too(
    case: Case, mlp: MLP, saved: Path, fault: Any, how: str
) -> None:
    edit(saved, fault)
    config = None
    if how == "config":
        config = case.config(target_modules=TARGETS, modules_to_save=["head"], bias="all")
    else:
        pickle_of(saved)
    if how == "pickle, second":
        model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
        with unchanged(model), pytest.raises(ValueError, match="does not fit the model, nothing was loaded"):
            model.load_adapter(saved, "second")
        assert list(model.peft_config) == ["default"]
        return
    with unchanged(mlp), pytest.raises(ValueError, match="does not fit the model, nothing was loaded"):
        peft.PeftModel.from_pretrained(mlp, saved, config=config)


def test_a_pickle_takes_no_memory_either_and_runs_nothing(case: Case, mlp: MLP, saved: Path) -> None:
    pickle_of(saved)
    x = torch.randn(3, 12)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(mlp), saved)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(mlp), saved, config=peft.PeftConfig.from_pretrained(saved))
    assert torch.equal(model(x), again(x))
    content = (saved / "adapter_model.bin").read_bytes()
    (saved / "adapter_model.bin").write_bytes(content[:-100])
    with unchanged(mlp), pytest.raises(ValueError, match="no complete file of tensors by name"):
        peft.PeftModel.from_pretrained(mlp, saved)
    for odd in ([torch.ones(2)], {"a": 1}, {"a": Bomb(saved / "run")}):
        torch.save(odd, saved / "adapter_model.bin")
        with unchanged(mlp), pytest.raises(ValueError, match="no complete file of tensors by name"):
            peft.PeftModel.from_pretrained(mlp, saved)
    assert not (saved / "run").exists()
    (saved / "adapter_model.bin").write_bytes(content)
    declare(saved, **HUGE.get(case.info.name, {"r": 10**9, **({"lora_alpha": 10**9} if case.is_lora else {})}))
    before = peak()
    with unchanged(mlp), pytest.raises(ValueError, match="does not fit the model|cannot adapt the module"):
        peft.PeftModel.from_pretrained(mlp, saved)
    assert peak() - before < 200_000  # KB


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_keys_may_be_mapped(case: Case, mlp: MLP, saved: Path) -> None:
    wanted = peft.PeftModel.from_pretrained(copy.deepcopy(mlp), saved)
    tensors = load_file(saved / WEIGHTS)
    save_file({key.replace(".lin1.", ".former1."): tensor for key, tensor in tensors.items()}, saved / WEIGHTS)
    with unchanged(mlp), pytest.raises(ValueError, match="does not fit the model"):
        peft.PeftModel.from_pretrained(mlp, saved)
    loaded = peft.PeftModel.from_pretrained(mlp, saved, key_mapping={r"^former(\d)": r"lin\1"})
    x = torch.randn(3, 12)
    assert torch.equal(loaded(x), wanted(x))


def test_an_error_names_the_keys_of_the_file(case: Case, mlp: MLP, saved: Path) -> None:
    edit(saved, nan_head)
    with unchanged(mlp), pytest.raises(ValueError, match=r"base_model\.model\.head\.bias: found values that are not"):
        peft.PeftModel.from_pretrained(mlp, saved)


def test_wrappers_without_an_adapter_stay(case: Case, mlp: MLP, saved: Path) -> None:
    model = peft.PeftModel.from_pretrained(mlp, saved)
    model.add_adapter("second", case.config(target_modules=["lin0"]))
    model.delete_adapter("default")
    edit(saved, nan_head)
    with unchanged(model), pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(saved, "third")
    assert model.active_adapters == ["second"]


HUGE = {
    "loldu": {"r": 10**9},
    "flora": {"r": 10**9},
    "compacter": {"phm_dim": 10**6},
    "triadaptlora": {"max_rank": 10**9},
    "krona": {"p": 10**9},
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_declared_rank_takes_no_memory(case: Case, mlp: MLP, saved: Path) -> None:
    fields = HUGE.get(case.info.name, {"r": 10**9})
    if case.is_lora and "lora_alpha" in json.loads((saved / "adapter_config.json").read_text()):
        fields = {**fields, "lora_alpha": 10**9}
    declare(saved, **fields)
    before = peak()
    with unchanged(mlp), pytest.raises(ValueError, match="does not fit the model|cannot adapt the module"):
        peft.PeftModel.from_pretrained(mlp, saved)
    assert peak() - before < 200_000  # KB


@pytest.mark.parametrize("kind", ["none", "pipe", "directory"])
def test_a_folder_without_a_weight_file(case: Case, mlp: MLP, saved: Path, kind: str) -> None:
    (saved / WEIGHTS).unlink()
    if kind == "pipe":
        os.mkfifo(saved / WEIGHTS)
    elif kind == "directory":
        (saved / WEIGHTS).mkdir()
    said = "has a config but no weights" if kind == "none" else "is not a regular file"
    with unchanged(mlp), pytest.raises(ValueError, match=said):
        peft.PeftModel.from_pretrained(mlp, saved)
    model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
    with unchanged(model), pytest.raises(ValueError, match=said):
        model.load_adapter(saved, "second")


def test_a_config_from_a_file_starts_a_new_adapter_on_another_model(case: Case, saved: Path) -> None:
    config = peft.PeftConfig.from_pretrained(saved)
    config.inference_mode, config.bias, config.modules_to_save = False, "none", None
    other = torch.nn.Sequential()
    other.add_module("lin0", torch.nn.Linear(24, 48))
    other.add_module("lin1", torch.nn.Linear(48, 8))
    model = peft.get_peft_model(other, config)
    model(torch.randn(2, 24)).sum().backward()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_names_with_a_dot_are_refused(case: Case, mlp: MLP) -> None:
    with unchanged(mlp), pytest.raises(ValueError, match="no '.', got 'default.v2'"):
        peft.get_peft_model(mlp, case.config(target_modules=["lin0"]), adapter_name="default.v2")
    model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
    with unchanged(model), pytest.raises(ValueError, match="got 'a.b'"):
        model.add_adapter("a.b", case.config(target_modules=["lin0"]))


# transformers' own `load_adapter`


@pytest.fixture
def natively(case: Case, tmp_path: Path) -> Path:
    if case.info.name == "compacter":
        pytest.skip("PEFT refuses methods that share tensors in transformers' own functions")
    model = adapted(tiny_model("llama"), case, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def first(t):
    return sorted(k for k, v in t.items() if v.is_floating_point() and v.ndim)[0]


def drop(t):
    del t[first(t)]


def poison(t):
    t[first(t)].view(-1)[0] = float("nan")


def grow(t):
    t[first(t)] = torch.cat([t[first(t)]] * 2)


def norm(t):
    t["base_model.model.model.norm.weight"] = torch.full((16,), 7.0)


def embedding(t):
    t["base_model.model.model.embed_tokens.weight"] = torch.full((64, 16), 7.0)


@pytest.mark.parametrize("fault", [drop, poison, grow, norm, embedding], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("loader", ["transformers", "peft"])
def test_transformers_own_loader_refuses_the_same(case: Case, natively: Path, fault: Any, loader: str) -> None:
    model = tiny_model("llama")
    edit(natively, fault)
    with unchanged(model), pytest.raises(ValueError, match="does not fit the model, nothing was loaded"):
        if loader == "peft":
            peft.PeftModel.from_pretrained(model, natively)
        else:
            model.load_adapter(str(natively))
    assert not getattr(model, "_hf_peft_config_loaded", False)


@pytest.mark.parametrize("fault", [drop, poison, grow, norm], ids=lambda fault: fault.__name__)
def test_transformers_own_loader_refuses_them_from_elsewhere(case: Case, natively: Path, fault: Any) -> None:
    """Tensors in memory, a config of the caller's, a pickle."""
    config = case.config(target_modules=["q_proj", "down_proj"])
    good = load_file(natively / WEIGHTS)
    model = tiny_model("llama")
    model.load_adapter(peft_config=copy.copy(config), adapter_state_dict=good)
    wanted = peft.PeftModel.from_pretrained(tiny_model("llama"), natively)
    assert torch.equal(model(torch.arange(7)[None]).logits, wanted(torch.arange(7)[None]).logits)
    edit(natively, fault)
    tensors, read = load_file(natively / WEIGHTS), peft.PeftConfig.from_pretrained(natively)
    model = tiny_model("llama")
    refused = pytest.raises(ValueError, match="does not fit the model, nothing was loaded")
    for made in (config, read):
        with unchanged(model), refused:
            model.load_adapter(peft_config=copy.copy(made), adapter_state_dict=tensors)
    with unchanged(model), refused:
        model.load_adapter(str(natively), peft_config=config)
    pickle_of(natively)
    with unchanged(model), refused:
        model.load_adapter(str(natively), use_safetensors=False)
    with unchanged(model), pytest.raises(ValueError, match="no weights .adapter_model.safetensors"):
        model.load_adapter(str(natively))  # transformers looks for no other name in a folder
    assert not getattr(model, "_hf_peft_config_loaded", False)


def test_old_keys_have_a_clear_answer_in_transformers_own_loader(case: Case, natively: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("_adapter.", "_").replace("magnitude_vector.weight", "magnitude_vector")] = tensors.pop(
                key
            )

    before = load_file(natively / WEIGHTS).keys()
    edit(natively, rename)
    if load_file(natively / WEIGHTS).keys() == before:
        return  # LoRA's keys were and are LoRA's
    model = tiny_model("llama")
    with unchanged(model), pytest.raises(ValueError, match="written by an earlier release.*PeftModel.from_pretrained"):
        model.load_adapter(str(natively))
    peft.PeftModel.from_pretrained(model, natively)


def test_a_resized_vocabulary_is_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    if case.info.name == "compacter":
        pytest.skip("its default targets are those of any model; one case is enough")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = peft.get_peft_model(base, case.config(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(70)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
