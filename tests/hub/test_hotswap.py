"""An adapter in the place of another one."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import CASES, MLP, Case, adapted
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import peftx


def own_mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


def two(case: Case, folder: Path, **config) -> tuple[peft.PeftModel, Path]:
    """A model with the adapter `default`, and the folder of another one."""
    model = adapted(own_mlp(), case, "other", "default", target_modules=["lin0", "lin1"], **config)
    model.save_pretrained(folder, selected_adapters=["other"])
    return model, folder / "other"


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def state(model: peft.PeftModel) -> tuple:
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return (
        {name: tensor.clone() for name, tensor in tensors.items()},
        {name: config.to_dict() for name, config in model.peft_config.items()},
        [parameter.requires_grad for parameter in model.parameters()],
    )


def last(tensors: dict) -> str:
    return max(key for key, tensor in tensors.items() if tensor.is_floating_point() and "lin1" in key)


FAULTS = {
    "nan": lambda tensors: tensors.update({last(tensors): tensors[last(tensors)] * float("nan")}),
    "missing": lambda tensors: tensors.pop(last(tensors)),
    "of the base": lambda tensors: tensors.update({"base_model.model.head.weight": torch.ones(4, 8)}),
    "shape": lambda tensors: tensors.update({last(tensors): torch.ones(5, 7)}),
    "dtype": lambda tensors: tensors.update({last(tensors): tensors[last(tensors)].int()}),
}


def test_a_file_that_does_not_fit_changes_nothing(case: Case, tmp_path: Path) -> None:
    model, folder = two(case, tmp_path)
    tensors, config, training = state(model)
    x = torch.randn(3, 12)
    wanted, whole = model(x), load_file(folder / "adapter_model.safetensors")
    for fault in FAULTS.values():
        change(folder, fault)
        with pytest.raises(ValueError, match="lin1|head"):
            peftx.hotswap(model, folder)
        assert (config, training) == state(model)[1:] and torch.equal(model(x), wanted)
        torch.testing.assert_close(state(model)[0], tensors, rtol=0, atol=0)
        save_file(whole, folder / "adapter_model.safetensors")
    peftx.hotswap(model, folder)
    assert not torch.equal(model(x), wanted)


def test_what_is_no_place_for_it_is_told(tmp_path: Path) -> None:
    bone, flora = (next(case for case in CASES if case.name == name) for name in ("bone", "flora"))
    model, folder = two(bone, tmp_path / "bone")
    for arguments, reason in (
        ((folder, "else"), "no adapter 'else' to replace; there are: other, default"),
        ((tmp_path / "none",), "holds no adapter that can be read"),
        ((two(flora, tmp_path / "flora")[1],), "adapter of BONE by one of FLORA.*load_adapter"),
        ((two(bone, tmp_path / "r", r=4)[1],), r"lin0: the new adapter has .*\(4, 16\).*load_adapter"),
    ):
        with pytest.raises(ValueError, match=reason):
            peftx.hotswap(model, *arguments)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights: call `unmerge_adapter` first"):
        peftx.hotswap(model, folder)
    with pytest.raises(ValueError, match="no adapter 'default' to replace; there are: none"):
        peftx.hotswap(own_mlp(), folder)


def test_settings_of_the_forward_are_the_file_s(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "flora")
    model, _ = two(case, tmp_path / "one")
    other, folder = two(case, tmp_path / "two", scale=3.0)
    other.set_adapter("other")
    x = torch.randn(3, 12)
    peftx.hotswap(model, folder)
    assert torch.equal(model(x), other(x)) and model.peft_config["default"].scale == 3.0


def test_heads_are_swapped_too(tmp_path: Path) -> None:
    config = peftx.BoneConfig(r=2, target_modules=["lin0"], modules_to_save=["head"], init_weights=False)
    model, other = (peft.get_peft_model(own_mlp(), config) for _ in range(2))
    other.base_model.model.head.modules_to_save["default"].weight.data += 1
    other.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    peftx.hotswap(model, tmp_path)
    assert torch.equal(model(x), other(x))
    change(tmp_path, lambda tensors: tensors.pop("base_model.model.head.weight"))
    with pytest.raises(ValueError, match=r"head\.weight is missing"):
        peftx.hotswap(model, tmp_path)


def test_plain_lora_is_left_to_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    model, other = (peft.get_peft_model(own_mlp(), config) for _ in range(2))
    other.save_pretrained(tmp_path)
    peftx.hotswap(model, tmp_path)
    x = torch.randn(3, 12)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("lora", [case for case in CASES if case.is_lora], ids=lambda case: case.name)
def test_a_lower_rank_and_another_alpha_fit_into_a_lora(lora: Case, tmp_path: Path) -> None:
    model, _ = two(lora, tmp_path / "one", r=4, rank_pattern={"lin1": 3})
    alpha = {} if lora.info.name == "allora" else {"lora_alpha": 3}
    other, folder = two(lora, tmp_path / "two", r=2, rank_pattern={"lin1": 1}, **alpha)
    other.set_adapter("other")
    x = torch.randn(3, 12)
    peftx.hotswap(model, folder)
    torch.testing.assert_close(model(x), other(x))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = peft.PeftModel.from_pretrained(own_mlp(), tmp_path).eval()
    torch.testing.assert_close(again(x), other(x))


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(case: Case, tmp_path: Path) -> None:
    model = adapted(own_mlp(), case, "a", "b", target_modules=["lin0", "lin1"])
    model.save_pretrained(tmp_path)
    outputs, x = {}, torch.randn(3, 12)
    with torch.no_grad():
        for name in "ab":
            model.set_adapter(name)
            outputs[name] = model(x)
        served = peft.PeftModel.from_pretrained(own_mlp(), tmp_path / "a").eval()
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(served, backend=counter)
        torch.testing.assert_close(compiled(x), outputs["a"])
        count = counter.frame_count
        for name in "ba":
            peftx.hotswap(compiled, tmp_path / name)
            torch.testing.assert_close(compiled(x), outputs[name])
    assert counter.frame_count == count > 0
