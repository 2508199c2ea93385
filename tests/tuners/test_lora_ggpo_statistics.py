"""The statistics of LoRA-GGPO's layers, taken as stacks: those of each layer alone, by few operations."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import peftx
from peftx.tuners.lora_ggpo import schedules, statistics

VIEWS = {"as_strided", "detach", "empty", "empty_strided", "permute", "resolve_conj", "promote_types", "to", "view"}
VIEWS |= {
    "numpy_T",
    "_local_scalar_dense",
    "alias",
    "expand",
    "select",
    "slice",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
}
VIEWS = {f"aten::{name}" for name in VIEWS}
STATISTICS = ("tau", "grad_norms2", "mean_norm")


def stack(layers=6, dtype=torch.float64, **kwargs):
    """A trained adapter on equal layers and one of another shape."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)), nn.Linear(8, 5)).to(dtype)
    names = [str(i) for i in range(layers + 1)]
    config = peftx.LoRAGGPOConfig(**{"r": 2, "target_modules": names, "auto_update": False, **kwargs})
    model = peft.get_peft_model(base, config).to(dtype).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def learn(model, factor=1.0):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    model.zero_grad()
    (factor * model.eval()(x)).square().sum().backward()
    model.train()


def taken(model):
    (schedule,) = schedules(model)
    found = [getattr(rule, key) for rule, *_ in schedule.live() for key in STATISTICS]
    return [tensor for tensor in found if tensor is not None]


def operations(call):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    names = [event.name for event in found.events() if all(child.name in VIEWS for child in event.cpu_children)]
    assert not any(event.name == "aten::is_nonzero" for event in found.events())  # nobody waits for the device
    return [name for name in names if name.startswith("aten::") and name not in VIEWS]


@pytest.mark.parametrize("block", [1, 2**24], ids=["one by one", "stacked"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"grad_ema": 0.5},
        {"combine": "additive", "cheap_norms": True},
        {"mode": "mgpo"},
        {"rank_pattern": {"1": 3}, "alpha_pattern": {"4": 5}},
    ],
)
def test_they_are_those_of_each_layer_alone(monkeypatch, kwargs, block):
    monkeypatch.setattr(statistics, "BLOCK", (block, block))
    model = stack(**kwargs)
    alone = copy.deepcopy(model)
    for factor in (1.0, 0.5):
        for one in (model, alone):
            learn(one, factor)
        model.base_model.update_ggpo_stats()
        for place in schedules(alone)[0].live():
            _, layer, name = place
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            G = layer.scaling[name] * (B @ A.grad + B.grad @ A)
            norms2 = statistics.measure([place])
            torch.testing.assert_close(norms2[0], G.detach().square().sum(dim=1))
            statistics.take([place], norms2)
    assert len(taken(model)) == (7 if "mode" in kwargs else 14)
    torch.testing.assert_close(taken(model), taken(alone))


@pytest.mark.parametrize("mode, most", [("ggpo", 1), ("mgpo", 0)])
def test_a_layer_more_costs_its_own_product_alone(mode, most):
    counts = []
    for layers in (4, 12):
        model = stack(layers, mode=mode)
        learn(model)
        model.base_model.update_ggpo_stats()
        counts.append(len(operations(model.base_model.update_ggpo_stats)))
    assert counts[1] - counts[0] == 8 * most


def test_an_overflow_leaves_what_was_and_nothing_where_nothing_was():
    model = stack(grad_ema=0.5)
    weight = model.base_model.model[2].lora_B["default"].weight
    for factor in (None, 1.0, None, 2.0):
        before = [tensor.clone() for tensor in taken(model)]
        learn(model, factor or 1.0)
        if factor is None:
            weight.grad[0, 0] = torch.nan
        model.base_model.update_ggpo_stats()
        if factor is None:
            assert len(before) == len(taken(model)) and all(map(torch.equal, before, taken(model)))
        else:
            assert len(taken(model)) == 14 and not any(map(torch.equal, before, taken(model)))
            assert all(tensor.isfinite().all() for tensor in taken(model))
    assert schedules(model)[0].step == 4


def test_layers_without_a_gradient_keep_theirs():
    model = stack()
    learn(model)
    model.base_model.update_ggpo_stats()
    before = taken(model)
    learn(model, 3.0)
    model.base_model.model[3].lora_B["default"].weight.grad = None
    model.base_model.update_ggpo_stats()
    same = [torch.equal(a, b) for a, b in zip(before, taken(model), strict=True)]
    assert same == [place == 3 for place in range(7) for _ in range(2)]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_and_not_the_whole_stack(way):
    model = stack()
    learn(model)
    model.base_model.update_ggpo_stats()
    twin = way(model)
    for one, other in zip(taken(model), taken(twin), strict=True):
        assert torch.equal(one, other)
        assert other.untyped_storage().nbytes() == other.nbytes
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_a_model_in_another_dtype_goes_on():
    model = stack(grad_ema=0.5)
    learn(model)
    model.base_model.update_ggpo_stats()
    before = taken(model)
    model.to(torch.float32)
    learn(model)
    model.base_model.update_ggpo_stats()
    assert all(tensor.dtype == torch.float32 for tensor in taken(model))
    torch.testing.assert_close([tensor.double() for tensor in taken(model)], before, rtol=1e-4, atol=1e-6)


def test_an_adapter_may_lose_a_layer():
    model = stack()
    learn(model)
    model.base_model.update_ggpo_stats()
    model.base_model.model[2].delete_adapter("default")
    learn(model)
    model.base_model.update_ggpo_stats()
    assert len(taken(model)) == 12
