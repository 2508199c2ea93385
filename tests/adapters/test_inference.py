"""`peftx.inference`: the same outputs, from what is made once."""

from typing import Any

import peft
import pytest
import torch
from conftest import Case, adapted, forward, tiny_model, tuner_layers
from torch import nn

import peftx


def owners(model: nn.Module) -> list[Any]:
    rules = [rule for layer in tuner_layers(model).values() for rule in getattr(layer, "lora_variant", {}).values()]
    return [*rules, *(module for module in model.modules() if hasattr(module, "kept"))]


def test_outputs_are_the_same(case: Case, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), case, "default", "other")
    model.train()
    wanted = {}
    with torch.no_grad():
        for name in ("other", "default"):
            model.set_adapter(name)
            wanted[name] = forward(model.eval(), tokens)
    model.train()
    with peftx.inference(model):
        assert not any(module.training for module in model.modules())
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            for _ in range(2):
                output = forward(model, tokens)
                torch.testing.assert_close(output, wanted[name], rtol=1e-5, atol=1e-6)
        assert not output.requires_grad
        with model.disable_adapter():
            base = forward(model, tokens)
        rows = ["other", "__base__", "default"][: len(tokens)]
        mixed = forward(model, tokens[: len(rows)], adapter_names=rows)
        for row, name in enumerate(rows):
            expected = base if name == "__base__" else wanted[name]
            torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)
    assert model.training and all(owner.kept is None for owner in owners(model))


def test_what_changed_outside_counts(case: Case, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), case).eval()
    with peftx.inference(model):
        first = forward(model, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data *= 1.5
        for layer in tuner_layers(model).values():
            layer.get_base_layer().weight.data *= 1.1
        wanted = forward(model, tokens)
    with peftx.inference(model):
        torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, wanted)


def test_merging_inside(mergeable: Case, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), mergeable).eval()
    with peftx.inference(model):
        wanted = forward(model, tokens)
        for _ in range(2):
            model.merge_adapter()
            torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
            torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_a_change_of_scale_inside_counts(case: Case, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), case).eval()
    with torch.no_grad(), peftx.rescale_adapter_scale(model, 2.0):
        wanted = forward(model, tokens)
    with peftx.inference(model):
        first = forward(model, tokens)
        with peftx.rescale_adapter_scale(model, 2.0):
            torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(forward(model, tokens), first)


def test_training_inside_is_refused(case: Case, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), case).train()
    with pytest.raises(RuntimeError, match="cannot be trained"), peftx.inference(model):
        model.train()
        with torch.enable_grad():
            forward(model, tokens)
    forward(model, tokens).sum().backward()
    assert all(owner.kept is None for owner in owners(model))


def test_gradients_in_evaluation_are_exact(case: Case, tokens: torch.Tensor) -> None:
    """Who enables gradients inside gets those of the weights, not of what was kept."""
    model = adapted(tiny_model("llama"), case).eval()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        forward(model, tokens).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    with peftx.inference(model):
        forward(model, tokens)
        with torch.enable_grad():
            found = gradients()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_it_reads_the_weight_once(tokens: torch.Tensor) -> None:
    """Row norms, dense weights and projections are made at the first use, and not again."""
    for config in (
        peftx.GradNormLoRPConfig(r=2, target_modules=["q_proj"]),
        peftx.BoneConfig(r=2, init_weights="bat", target_modules=["q_proj"]),
        peftx.CompacterConfig(phm_dim=2, reduction_factor=2, target_modules=["q_proj"]),
    ):
        model = peft.get_peft_model(tiny_model("llama"), config)
        with peftx.inference(model):
            forward(model, tokens)
            keepers = [owner for owner in owners(model) if owner.kept]
            assert keepers
            before = {id(owner): dict(owner.kept) for owner in keepers}
            forward(model, tokens)
            for owner in keepers:
                assert all(owner.kept[key] is value for key, value in before[id(owner)].items())
                assert owner.kept.keys() == before[id(owner)].keys()
