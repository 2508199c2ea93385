"""Putting methods into PEFT at run time."""

import copy
import dataclasses
import importlib
import json
import multiprocessing
import pickle
import sys
import types

import peft
import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peftx
from peftx import registry


def test_peft_knows_the_method(case):
    info = case.info
    assert PEFT_TYPE_TO_CONFIG_MAPPING[info.peft_type] is info.config
    assert PEFT_TYPE_TO_TUNER_MAPPING[info.peft_type] is info.model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[info.peft_type] == info.prefix == info.model.prefix
    assert info.model.target_module_mapping["llama"]


def test_the_enum_member_behaves_like_the_others(case):
    member = case.info.peft_type
    name = case.info.name.upper()
    assert PeftType(name) is PeftType[name] is getattr(PeftType, name) is member
    assert member in PeftType and member in list(PeftType) and name in PeftType.__members__
    assert member == name and member.value == name and isinstance(member, PeftType)
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": name}
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert {member: 1}[name] == 1


def test_configs_are_copied_and_pickled(case):
    config = case.config(target_modules=["lin0"])
    assert copy.deepcopy(config) == config and pickle.loads(pickle.dumps(config)) == config


def _echo(config):
    return config.peft_type.value, type(config).__name__


def test_configs_reach_a_spawned_process():
    configs = [peftx.BoneConfig(r=2), peftx.LoLDUConfig(r=2)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_echo, configs) == [("BONE", "BoneConfig"), ("LOLDU", "LoLDUConfig")]


def test_records_are_frozen_and_complete(case):
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.info.name = "other"
    assert case.info.paper.startswith("arXiv:") and case.info.summary
    assert {"config", "model", "paper", "mergeable", "lora_export"} <= set(dataclasses.asdict(case.info))


def test_import_is_idempotent_and_reload_safe():
    names = [info.name for info in peftx.methods()]
    members = list(PeftType)
    modules = [peftx.registry, peftx.tuners.bone, peftx.tuners.loldu]
    saved = {module: dict(vars(module)) for module in modules}
    records = dict(registry._METHODS)
    mappings = [dict(m) for m in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)]
    try:
        for module in modules:
            importlib.reload(module)
        assert [info.name for info in peftx.methods()] == names and list(PeftType) == members
        config = peftx.tuners.bone.BoneConfig(r=2, target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
        assert model(torch.ones(1, 4)).shape == (1, 4)
    finally:  # other tests hold the first classes
        for module, state in saved.items():
            vars(module).update(state)
        registry._METHODS.update(records)
        for mapping, state in zip((PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING), mappings, strict=True):
            mapping.update(state)


def _define(name, module="somebody.elses"):
    """A config and adapter class called after `name` in a module of their own."""
    sys.modules.setdefault(module, types.ModuleType(module))
    config = dataclasses.make_dataclass(
        name.capitalize() + "Config", [], bases=(peftx.AdapterConfig,), namespace={"__module__": module}
    )
    config.__doc__ = "Somebody's method."
    adapter = type(name.capitalize(), (peftx.Adapter,), {"__module__": module})
    return config, adapter


@pytest.mark.parametrize("name", ["lora", "miss"])
def test_peft_s_own_methods_are_never_shadowed(name):
    config, adapter = _define(name)
    theirs = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]]
    with pytest.warns(UserWarning, match=f"ships {name.upper()} itself.*use PEFT's own"):
        assert peftx.register(name, config=config, paper="arXiv:0")(adapter) is adapter
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]] is theirs
    with pytest.raises(RuntimeError, match="not registered.*use PEFT's own config class"):
        config()


def test_peft_catching_up_is_noticed(monkeypatch):
    # A later PEFT that ships BONE: the member exists and is not ours.
    monkeypatch.setattr(PeftType.BONE, "_peftx", False)
    assert registry.is_native("bone")
    with pytest.warns(UserWarning, match="BONE itself"):
        peftx.register("bone", config=peftx.BoneConfig, paper="")(peftx.tuners.bone.Bone)


@pytest.mark.parametrize("name", ["Bone", "bo-ne", "bone_", "", "1bone"])
def test_impossible_names_are_refused(name):
    with pytest.raises(ValueError, match="lower-case identifier"):
        peftx.register(name, config=peftx.BoneConfig, paper="")


def test_a_name_is_given_once():
    config, adapter = _define("bone")
    with pytest.raises(ValueError, match=r"'bone' is already registered by peftx\.tuners\.bone"):
        peftx.register("bone", config=config, paper="")(adapter)


def test_an_unknown_capability_is_refused():
    config, adapter = _define("sprout")
    with pytest.raises(TypeError, match="colour"):
        peftx.register("sprout", config=config, paper="", colour="blue")(adapter)
    assert "SPROUT" not in PeftType.__members__


def test_a_layer_class_of_an_earlier_release_is_told_what_to_do():
    message = r"KronaLinear is written for an earlier peftx.*peftx\.Adapter.*constructor.*CONTRIBUTING\.md"
    with pytest.raises(TypeError, match=message):
        type("KronaLinear", (peftx.AdapterLayer,), {"adapter_layer_names": ("krona_A",)})


@pytest.mark.parametrize("base", [object, torch.nn.Module, torch.nn.Linear])
def test_only_adapters_and_tuners_are_registered(base):
    config, _ = _define("sprout")
    message = r"SproutLinear is no subclass of peftx\.Adapter.*CONTRIBUTING\.md"
    with pytest.raises(TypeError, match=message):
        peftx.register("sprout", config=config, paper="")(type("SproutLinear", (base,), {}))
    assert "SPROUT" not in PeftType.__members__
