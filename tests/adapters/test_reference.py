"""The reference that TRL's trainers (DPO, KTO, GRPO, RLOO) make of an adapter that was trained: a copy called `ref`."""

import peft
import pytest
import torch
from conftest import Case, logits, randomize, tiny_model, tuner_layers

CASES = {"loldu": [{"init_method": "normal"}, {"train_sigma": False}], "triadaptlora": [{"total_step": 4}]}


def with_reference(model: peft.PeftModel) -> peft.PeftModel:
    """What trl 1.16 does."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    return model


def trained(case: Case, **options) -> peft.PeftModel:
    """After some "training", with ranks that grew where the method has such."""
    model = peft.get_peft_model(tiny_model("llama"), case.config(target_modules=["q_proj", "down_proj"], **options))
    randomize(model, case)
    if hasattr(model.base_model, "update_and_grow") and options.get("total_step"):
        for step in range(1, options["total_step"] + 1):
            randomize(model, case, std=0.01, seed=step)
            model.base_model.update_and_grow(step)
    return model.eval()


def test_the_reference_computes_what_the_policy_does(case: Case, tokens: torch.Tensor) -> None:
    for options in [{}, *CASES.get(case.info.name, [])]:
        model = trained(case, **options)
        wanted = logits(model, tokens)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "default" in name}
        model = with_reference(model)
        assert torch.equal(logits(model, tokens), wanted)
        model.set_adapter("ref")
        assert torch.equal(logits(model, tokens), wanted), options
        model.set_adapter("default")
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names and not any("ref" in name.split(".") for name in names)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
        with torch.no_grad():  # the two are apart
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        model.set_adapter("ref")
        assert torch.equal(logits(model, tokens), wanted)


def test_the_reference_of_an_adapter_whose_scale_was_changed(case: Case, tokens: torch.Tensor) -> None:
    model = trained(case)
    for layer in tuner_layers(model).values():
        layer.scale_layer(0.5)
    wanted = logits(model, tokens)
    model = with_reference(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model, tokens), wanted)


def test_every_parameter_of_an_adapter_has_its_name_in_the_middle(case: Case) -> None:
    model = trained(case)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(".default." in name for name in names)


def test_the_copy_is_of_the_adapter_whose_config_is_given(case: Case, tokens: torch.Tensor) -> None:
    model = trained(case)
    model.add_adapter("other", case.config(target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    randomize(model, case, seed=5)
    wanted = logits(model.eval(), tokens)
    model.add_adapter("ref", model.peft_config["other"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            model.get_parameter(name.replace(".other.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model, tokens), wanted)


@pytest.mark.parametrize("equal", [False, True])
def test_another_name_or_another_config_is_a_fresh_adapter(case: Case, tokens: torch.Tensor, equal: bool) -> None:
    base = logits(tiny_model("llama"), tokens)
    model = trained(case)
    config = model.peft_config["default"] if equal else case.config(target_modules=["q_proj", "down_proj"])
    model.add_adapter("second" if equal else "ref", config)
    model.set_adapter("second" if equal else "ref")
    torch.testing.assert_close(logits(model, tokens), base, rtol=0, atol=1e-5)
