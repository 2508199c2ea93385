"""Weighted sums of adapters of the methods that own their tensors, against PEFT's own of the exported ones."""

import math
from pathlib import Path

import peft
import pytest
import torch
from conftest import CASES, MLP, Case, adapted, tuner_layers
from torch import nn

import peftx

EXACT = [case for case in CASES if not case.is_lora and case.lora_export == "exact"]
KINDS = ["svd", "linear", "cat", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
RANDOM = ["dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"]


@pytest.mark.parametrize("kind", KINDS + RANDOM)
@pytest.mark.parametrize("exact", EXACT, ids=lambda case: case.name)
def test_it_is_what_peft_makes_of_the_exported_adapters(exact: Case, kind: str, mlp: MLP, tmp_path: Path) -> None:
    base = mlp.state_dict()
    base = {name: tensor.clone() for name, tensor in base.items()}
    model = adapted(mlp, exact, "a", "b", target_modules=["lin0", "lin1"])
    plain = MLP().eval()
    plain.load_state_dict(base)
    for name in "ab":
        peftx.export_lora(model, tmp_path / name, adapter_name=name)
    stock = peft.PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name="a")
    stock.load_adapter(tmp_path / "b", adapter_name="b")
    density = {} if kind in KINDS[:3] else {"density": 1.0 if kind in RANDOM else 0.6}  # what is dropped is drawn
    x, outputs = torch.randn(5, 12), []
    for each in (model, stock):
        each.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=kind, **density)
        each.set_adapter("c")
        outputs.append(each.eval()(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_it_trains_merges_saves_loads_and_exports(mlp: MLP, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "loldu")
    plain = MLP().eval()
    plain.load_state_dict(mlp.state_dict())
    model = adapted(mlp, case, "a", "b", target_modules=["lin0", "lin1"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type="cat")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    model.set_adapter("c")
    model(torch.randn(3, 12)).sum().backward()
    assert {name.rpartition(".c.")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    x = torch.randn(5, 12)
    wanted = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    for folder in (tmp_path / "c", tmp_path / "lora"):
        loaded = peft.PeftModel.from_pretrained(plain, folder) if folder.exists() else None
        if loaded is None:
            peftx.export_lora(model, folder, adapter_name="c")
            loaded = peft.PeftModel.from_pretrained(plain, folder)
        torch.testing.assert_close(loaded(x), wanted)
        plain = loaded.unload()
    model.add_weighted_adapter(["c", "b"], [1.0, -0.5], "d", combination_type="svd")  # of a sum itself
    found, a = (model.base_model.model.lin0.get_delta_weight(name) for name in "da")
    torch.testing.assert_close(found, a, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


@pytest.mark.parametrize("layer", ["embedding", "convolution", "groups"])
def test_layers_of_every_kind_have_sums(layer: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(20, (3, 5)) if layer == "embedding" else torch.randn(2, 4, 6, 6)
    module: nn.Module = nn.Embedding(20, 6)
    if layer != "embedding":
        module = nn.Conv2d(4, 6, 3, groups=2 if layer == "groups" else 1, stride=2, padding=1)
    config = peftx.FloraConfig(r=2, target_modules=["0"], init_weights=False)
    model = peft.get_peft_model(nn.Sequential(module), config, adapter_name="a")
    model.add_adapter("b", config)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "c", combination_type="cat")
    outputs = {}
    for name in "abc":
        model.set_adapter(name)
        outputs[name] = model(x)
    with model.disable_adapter():
        base = model(x)
    wanted = base + 0.5 * (outputs["a"] - base) - 2 * (outputs["b"] - base)
    torch.testing.assert_close(outputs["c"], wanted, rtol=1e-4, atol=1e-4)


def test_heads_go_along_and_other_targets_are_joined(mlp: MLP) -> None:
    model = peft.get_peft_model(mlp, peftx.BoneConfig(r=2, target_modules=["lin0"], init_weights=False), "a")
    head = peftx.BoneConfig(r=2, target_modules=["lin1"], modules_to_save=["head"], init_weights=False)
    model.add_adapter("b", head)
    wrapper = model.base_model.model.head
    wrapper.modules_to_save["b"].weight.data += 1
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="cat")
    assert [name for name, layer in tuner_layers(model).items() if "c" in layer.adapters] == ["lin0", "lin1"]
    assert torch.equal(wrapper.modules_to_save["c"].weight, wrapper.modules_to_save["b"].weight)
    model.add_adapter("other", peftx.BoneConfig(r=2, target_modules=["lin1"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="train the same module"):
        model.add_weighted_adapter(["b", "other"], [1.0, 1.0], "d")


FAULTS = [
    (dict(adapters=["a", "z"]), "Adapter z does not exist"),
    (dict(weights=[1.0]), "a weight for each adapter"),
    (dict(adapters=[], weights=[]), "a weight for each adapter"),
    (dict(weights=[1.0, math.nan]), "finite numbers"),
    (dict(combination_type="sum"), "Invalid combination_type: 'sum'"),
    (dict(combination_type="ties"), "density"),
    (dict(combination_type="dare_linear", density=0), "density"),
    (dict(svd_rank=0), "svd_rank"),
    (dict(combination_type="ties", density=0.5, majority_sign_method="most"), "majority_sign_method"),
]


@pytest.mark.parametrize(("change", "reason"), FAULTS, ids=lambda value: str(value)[:30])
def test_faulty_arguments_are_refused_and_nothing_is_added(change: dict, reason: str, mlp: MLP) -> None:
    for name in ("bone", "allora"):  # of either family
        case = next(case for case in CASES if case.name == name)
        model = adapted(MLP().eval(), case, "a", "b", target_modules=["lin1"])
        keys = [*model.state_dict()]
        arguments = {"adapters": ["a", "b"], "weights": [0.5, 0.5], "adapter_name": "c", **change}
        with pytest.raises(ValueError, match=reason):
            model.add_weighted_adapter(**arguments)
        assert {*model.peft_config} == {"a", "b"} and [*model.state_dict()] == keys


def test_what_has_no_factors_or_no_delta_says_so(mlp: MLP) -> None:
    for case in CASES:
        if case.is_lora or case in EXACT:
            continue
        model = adapted(MLP().eval(), case, "a", "b", target_modules=["lin1"])
        with pytest.raises(NotImplementedError, match="Activate them together|take one of those that end in 'svd'"):
            model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="cat")
        assert {*model.peft_config} == {"a", "b"}
        if case.info.mergeable:
            model.add_weighted_adapter(["a", "b"], [0.5, -1.5], "c")
            layer = model.base_model.model.lin1
            a, b, c = (layer.get_delta_weight(name) for name in "abc")
            torch.testing.assert_close(c, 0.5 * a - 1.5 * b, rtol=0, atol=1e-5)


def test_different_ranks_are_joined_or_refused(mlp: MLP) -> None:
    model = peft.get_peft_model(mlp, peftx.FloraConfig(r=2, target_modules=["lin0"], init_weights=False), "a")
    model.add_adapter("b", peftx.FloraConfig(r=3, target_modules=["lin0"], init_weights=False))
    with pytest.raises(
        ValueError, match=r"lin0: all adapters must have the same rank for 'linear', they have \[2, 3\]"
    ):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="linear")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="cat")
    assert model.peft_config["c"].combined_rank == 5


def test_a_sum_of_bone_adapters_is_no_miss(mlp: MLP, tmp_path: Path) -> None:
    model = peft.get_peft_model(mlp, peftx.BoneConfig(r=2, target_modules=["lin0"], init_weights=False), "a")
    model.add_weighted_adapter(["a"], [2.0], "c")
    with pytest.raises(ValueError, match="is a LoRA and no MiSS"):
        peftx.hub.export_miss(model, tmp_path / "miss", adapter_name="c")


def test_the_ranks_of_a_sum_do_not_grow(mlp: MLP) -> None:
    config = peftx.TriAdaptLoRAConfig(target_r=4, init_r=1, total_step=10, target_modules=["lin0"])
    model = peft.get_peft_model(mlp, config, "a")
    model.add_weighted_adapter(["a"], [2.0], "c")
    model.set_adapter("c")
    model.train()
    model(torch.randn(3, 12)).sum().backward()
    assert model.base_model.update_and_grow(5) == []
