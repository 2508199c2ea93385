"""Configs: types, values, files."""

import json
import re

import peft
import pytest

import peftx


def test_json_round_trip(case, tmp_path):
    config = case.config(target_modules=["lin1", "lin0"], exclude_modules=["head"], modules_to_save=["head"])
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == case.info.name.upper()


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_modules", 5),
        ("target_modules", ["lin0", 1]),
        ("exclude_modules", 1.5),
        ("layers_to_transform", "0"),
        ("modules_to_save", "head"),
        ("bias", None),
        ("trainable_token_indices", [True]),
        ("trainable_token_indices", {"embed_tokens": ["1"]}),
        ("layer_replication", [(0, 0.5)]),
        ("layer_replication", [(False, 2)]),
        ("ensure_weight_tying", "yes"),
        ("init", "no"),
        ("init", 2.5),
        ("init", None),
    ],
)
def test_wrong_types_are_named(case, field, value):
    if field == "init":
        field = case.init_field
        if case.is_lora and value == "no":
            pytest.skip("LoRA's other starts have names; PEFT refuses an unknown one when a layer is made")
    with pytest.raises(
        TypeError, match=f"{case.info.config.__name__}: `{field}` must be of type .*, got {re.escape(repr(value))}"
    ):
        case.info.config(**{field: value})


@pytest.mark.parametrize("r", ["8", 8.0, True, None])
def test_a_rank_is_an_int(r):
    for config in (peftx.BoneConfig, peftx.LoLDUConfig):
        with pytest.raises(TypeError, match=r"`r` must be of type int"):
            config(r=r)


@pytest.mark.parametrize("r", [0, -3])
def test_a_rank_is_positive(r):
    for config in (peftx.BoneConfig, peftx.LoLDUConfig):
        with pytest.raises(ValueError, match=f"`r` must be a positive integer, got {r}"):
            config(r=r)


@pytest.mark.parametrize(
    "field, value",
    [
        ("layers_to_transform", [-1]),
        ("layer_replication", [(-1, 2)]),
        ("trainable_token_indices", {"embed_tokens": [10**400]}),
        ("layers_to_transform", 10**400),
    ],
)
def test_impossible_numbers_are_named(case, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must (not be negative|be less than 2.{{2}}63)"):
        case.info.config(target_modules=["lin0"], **{field: value})


def test_every_number_of_a_config_is_bounded(case):
    sizes = [name for name, value in case.info.tiny.items() if type(value) is int]
    for name in sizes:
        with pytest.raises(ValueError, match=f"`{name}` must be less than 2.{{2}}63, got an integer of 1329 bits"):
            case.config(**{name: 10**400})


def test_wrong_values_are_named(case):
    with pytest.raises(ValueError, match="`bias` must be"):
        case.info.config(bias="some")
    with pytest.raises(ValueError, match=r"`layers_to_transform` cannot be used when `target_modules` is a string"):
        case.info.config(target_modules=".*lin", layers_to_transform=[0])
    with pytest.raises(ValueError, match="`layers_pattern` needs `layers_to_transform`"):
        case.info.config(target_modules=["lin0"], layers_pattern="layers")


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_file_with_a_wrong_type_is_refused_before_the_model_is_touched(case, mlp, tmp_path):
    model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
    model.save_pretrained(tmp_path)
    base = model.unload()
    _edit(tmp_path, target_modules=7)
    with pytest.raises(TypeError, match=f"{case.info.config.__name__}: `target_modules` must be"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert type(base.lin0).__name__ == "Linear" and not hasattr(base, "peft_config")


def test_an_unknown_future_field_is_a_warning(case, mlp, tmp_path):
    model = peft.get_peft_model(mlp, case.config(target_modules=["lin0"]))
    model.save_pretrained(tmp_path)
    base = model.unload()
    _edit(tmp_path, warp_factor=9)
    with pytest.warns(UserWarning, match="warp_factor"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_patterns_are_resolved_for_a_module():
    config = peftx.LoLDUConfig(r=8, rank_pattern={"lin0": 4, r"layers\.1\..*": 2}, alpha_pattern={"lin0": 1})
    assert [config.for_module(key).r for key in ("model.lin0", "layers.1.lin5", "lin1")] == [4, 2, 8]
    assert [config.for_module(key).alpha for key in ("model.lin0", "lin1")] == [1, None]
    assert config.r == 8
