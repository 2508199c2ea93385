"""The invariants of Bone, against loops over tiles written from the formulas, in float64."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

import peftx
from peftx.tuners import bone
from peftx.tuners.bone import BoneLayer, bat_delta, bat_invert, fold, tile

TARGETS = ["lin0", "lin1", "head"]
FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "bone_peft_0.17"


def bat_oracle(weight, block):
    """W[a, b] B[a] + B[a], tile by tile."""
    r, delta = block.shape[-1], torch.empty_like(weight)
    for a in range(weight.shape[0] // r):
        for b in range(weight.shape[1] // r):
            rows, columns = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r)
            delta[rows, columns] = weight[rows, columns] @ block[a] + block[a]
    return delta


def default_oracle(block, in_features):
    """delta[o, j] = D[j mod r, o], entry by entry."""
    r, out_features = block.shape
    delta = torch.empty(out_features, in_features, dtype=block.dtype)
    for o in range(out_features):
        for j in range(in_features):
            delta[o, j] = block[j % r, o]
    return delta


def layer(in_features, out_features, seed=0, **kwargs):
    """A Bone layer in float64 with random blocks."""
    torch.manual_seed(seed)
    base = nn.Linear(in_features, out_features, dtype=torch.float64)
    adapted = BoneLayer(base, "default", peftx.BoneConfig(**kwargs)).double()
    for adapter in adapted.adapters.values():
        nn.init.normal_(adapter.block, std=0.1)
    return adapted


def test_default_delta_of_peft_0_17():
    block = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    assert tile(block, 5).tolist() == [[1, 2, 3, 1, 2], [10, 20, 30, 10, 20]]


def test_bat_delta_of_peft_0_17():
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    block = torch.tensor([[[0.0, 1], [2, 0]]])
    assert bat_delta(weight, block).tolist() == [[4, 2, 8, 4], [14, 5, 18, 7]]
    assert bat_invert(weight + bat_delta(weight, block), block).tolist() == weight.tolist()


@given(r=st.integers(1, 9), n=st.integers(1, 20), out=st.integers(1, 7), batch=st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_fold_and_tile_are_the_formula(r, n, out, batch):
    block, x = torch.randn(r, out, dtype=torch.float64), torch.randn(batch, n, dtype=torch.float64)
    delta = default_oracle(block, n)
    torch.testing.assert_close(tile(block, n), delta, rtol=0, atol=0)
    torch.testing.assert_close(fold(x, r) @ block, x @ delta.T)


@given(r=st.integers(1, 5), a=st.integers(1, 4), b=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_bat_delta_is_the_formula(r, a, b):
    weight = torch.randn(a * r, b * r, dtype=torch.float64)
    block = torch.randn(a, r, r, dtype=torch.float64) / (3 * r)
    delta = bat_oracle(weight, block)
    torch.testing.assert_close(bat_delta(weight, block), delta)
    torch.testing.assert_close(bat_invert(weight + delta, block), weight)
    # the equivalent product form: W' + I = (W + I)(I + B), tile by tile
    eye = torch.eye(r, dtype=torch.float64)
    tiles = weight.unflatten(0, (a, r)).unflatten(-1, (b, r)).permute(0, 2, 1, 3)
    product = (tiles + eye) @ (eye + block[:, None]) - eye
    torch.testing.assert_close(weight + delta, product.permute(0, 2, 1, 3).reshape(weight.shape))


@pytest.mark.parametrize("tokens", [1, 3, 20])  # of a few, bat makes no dense weight
@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_forward_and_gradients_equal_the_dense_formula(init_weights, tokens):
    adapted = layer(12, 8, r=4, init_weights=init_weights)
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, tokens, 8, dtype=torch.float64)
    block = adapted.adapters["default"].block
    weight, bias = adapted.base_layer.weight.detach(), adapted.base_layer.bias.detach()
    found = torch.autograd.grad(adapted(x), [x, block], g)

    block = block.detach().clone().requires_grad_()
    delta = default_oracle(block, 12) if init_weights is True else bat_oracle(weight, block)
    wanted = x @ (weight + delta).T + bias
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, [x, block], g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_trains_r_times_out_parameters(mlp, init_weights):
    model = peft.get_peft_model(mlp, peftx.BoneConfig(r=4, init_weights=init_weights, target_modules=TARGETS))
    assert model.get_nb_trainable_parameters()[0] == 4 * (16 + 8 + 4)


def test_delta_has_period_r():
    delta = layer(20, 6, r=8).adapters["default"].delta_weight()
    assert torch.equal(delta[:, :12], delta[:, 8:])


def test_ragged_width_equals_zero_padding():
    narrow, wide = layer(20, 6, r=8), layer(24, 6, r=8)
    wide.adapters["default"].block.data = narrow.adapters["default"].block.data
    wide.base_layer.weight.data[:, :20], wide.base_layer.weight.data[:, 20:] = narrow.base_layer.weight, 0
    wide.base_layer.bias.data = narrow.base_layer.bias.data
    x = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), wide(nn.functional.pad(x, (0, 4))))


@pytest.mark.parametrize("in_features, r", [(12, 5), (12, 12), (12, 30)])
def test_any_block_size_works_in_the_default_mode(in_features, r):
    adapted = layer(in_features, 8, r=r)
    x = torch.randn(3, in_features, dtype=torch.float64)
    y = adapted(x)
    adapted.merge()
    torch.testing.assert_close(adapted(x), y)


@pytest.mark.parametrize("init_weights, tolerance", [(True, 1e-6), ("bat", 1e-5)])
def test_merge_and_unmerge_in_fp32(init_weights, tolerance):
    adapted = layer(24, 16, r=8, init_weights=init_weights).float()
    before, x = adapted.base_layer.weight.clone(), torch.randn(4, 24)
    y = adapted(x)
    adapted.merge()
    torch.testing.assert_close(adapted(x), y, rtol=0, atol=1e-5)
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, before, rtol=0, atol=tolerance)


def two_adapters(init_weights):
    adapted = layer(12, 8, r=4, init_weights=init_weights)
    adapted.update_layer("other", peftx.BoneConfig(r=2, init_weights=init_weights))
    adapted.adapters["other"].block.data = torch.randn_like(adapted.adapters["other"].block, dtype=torch.float64) * 0.1
    return adapted


def test_default_adapters_commute():
    adapted = two_adapters(True)
    x = torch.randn(3, 12, dtype=torch.float64)
    adapted.set_adapter(["default", "other"])
    y = adapted(x)
    adapted.set_adapter(["other", "default"])
    torch.testing.assert_close(adapted(x), y)


def test_bat_adapters_compose_in_order_and_unmerge_in_reverse():
    adapted = two_adapters("bat")
    x, weight = torch.randn(3, 12, dtype=torch.float64), adapted.base_layer.weight.detach().clone()
    outputs = []
    for order in (["default", "other"], ["other", "default"]):
        composed = weight
        for name in order:
            composed = composed + bat_oracle(composed, adapted.adapters[name].block.detach())
        adapted.set_adapter(order)
        y = adapted(x)
        torch.testing.assert_close(y, x @ composed.T + adapted.base_layer.bias)
        adapted.merge()
        torch.testing.assert_close(adapted.base_layer.weight, composed)
        torch.testing.assert_close(adapted(x), y)
        adapted.unmerge()
        torch.testing.assert_close(adapted.base_layer.weight, weight)
        outputs.append(y)
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize("block", [1, 100, 2**17], ids=["one by one", "some", "all"])
@pytest.mark.parametrize("inside", [False, True], ids=["attached", "inference"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "watched"])
def test_bat_adapters_mix_in_a_batch(monkeypatch, kind, inside, block, tokens):
    monkeypatch.setattr(bone, "BLOCK", (block, block))
    base = Conv1D(8, 12) if kind == "Conv1D" else nn.Linear(12, 8)
    base.double().requires_grad_(False)
    adapted = BoneLayer.over(base)(base, "a", peftx.BoneConfig(r=4, init_weights="bat")).double()
    for name, config in {"b": {"r": 4}, "c": {"r": 2}, "plain": {"r": 3, "init_weights": True}}.items():
        adapted.update_layer(name, peftx.BoneConfig(**{"init_weights": "bat", **config}))
    for adapter in adapted.adapters.values():
        adapter.block.data = 0.1 * torch.randn(adapter.block.shape, dtype=torch.float64)
    adapted.set_scale("b", 0.5)
    if kind == "watched":
        base.register_forward_hook(lambda *args: None)
    names = ["b", "plain", "a", "__base__", "c", "b", "c"]
    x = torch.randn(len(names), tokens, 12, dtype=torch.float64)
    weight = base.weight.T if kind == "Conv1D" else base.weight
    with peftx.inference(adapted) if inside else nullcontext():
        for _ in range(2):
            found = adapted(x, adapter_names=names)
            for row, name in enumerate(names):
                wanted = weight
                if name != "__base__":
                    block = adapted.adapters[name].block.detach()
                    delta = default_oracle(block, 12) if name == "plain" else bat_oracle(weight, block)
                    wanted = weight + adapted.adapters[name].scale * delta
                torch.testing.assert_close(found[row], x[row] @ wanted.T + base.bias)


def test_a_bat_adapter_of_few_tokens_makes_no_dense_weight():
    adapted = layer(64, 64, r=8, init_weights="bat")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, torch.no_grad():
        adapted(torch.randn(1, 64, dtype=torch.float64))
        adapted(torch.randn(2, 64, dtype=torch.float64), adapter_names=["default", "default"])
    most = max(event.cpu_memory_usage for event in found.events())
    assert most < 64 * 64 * 8


def test_modes_mix_on_one_layer():
    adapted = layer(12, 8, r=4, init_weights="bat")
    adapted.update_layer("plain", peftx.BoneConfig(r=3))
    adapted.adapters["plain"].block.data = torch.randn(3, 8, dtype=torch.float64)
    x, weight = torch.randn(3, 12, dtype=torch.float64), adapted.base_layer.weight.detach()
    adapted.set_adapter(["default", "plain"])
    wanted = weight + bat_oracle(weight, adapted.adapters["default"].block.detach())
    wanted = wanted + default_oracle(adapted.adapters["plain"].block.detach(), 12)
    torch.testing.assert_close(adapted(x), x @ wanted.T + adapted.base_layer.bias)


def test_scale_multiplies_the_delta():
    for mode in (True, "bat"):
        adapted = layer(12, 8, r=4, init_weights=mode)
        x = torch.randn(3, 12, dtype=torch.float64)
        base, y = adapted.base_layer(x), adapted(x)
        adapted.set_scale("default", 0.5)
        torch.testing.assert_close(adapted(x) - base, (y - base) / 2)
        torch.testing.assert_close(x @ adapted.get_delta_weight("default").T, (y - base) / 2)
        adapted.unscale_layer()
        torch.testing.assert_close(adapted(x), y)


def test_lora_factors_are_exact_and_bat_has_none():
    adapted = layer(20, 6, r=8)
    A, B = adapted.lora_factors("default")
    assert A.shape == (8, 20) and B.shape == (6, 8)
    torch.testing.assert_close(B @ A, adapted.adapters["default"].delta_weight())
    with pytest.raises(NotImplementedError, match="no exact LoRA form"):
        layer(12, 8, r=4, init_weights="bat").lora_factors("default")


@pytest.mark.parametrize("in_features, out_features", [(10, 8), (8, 10)])
def test_bat_refuses_a_block_size_that_does_not_divide(in_features, out_features):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(in_features, out_features))
    with pytest.raises(ValueError, match=rf"'1'.*r=4.*in_features={in_features}.*out_features={out_features}"):
        peft.get_peft_model(model, peftx.BoneConfig(r=4, init_weights="bat", target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def old_file(tmp_path, blocks, **config):
    """An adapter folder as PEFT 0.14 to 0.18 wrote it: their keys, their fields, nothing of ours."""
    save_file(
        {f"base_model.model.{k}.bone_block": v for k, v in blocks.items()},
        tmp_path / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    fields = dict(
        auto_mapping=None,
        base_model_name_or_path=None,
        bias="none",
        exclude_modules=None,
        inference_mode=True,
        init_weights=True,
        layers_pattern=None,
        layers_to_transform=None,
        modules_to_save=None,
        peft_type="BONE",
        r=4,
        revision=None,
        target_modules=sorted(blocks),
        task_type=None,
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("mode", [True, "bat", "bat before PEFT 0.14"])
def test_loads_and_writes_the_files_of_old_peft(mlp, tmp_path, mode, low_cpu_mem_usage):
    torch.manual_seed(1)
    if mode is True:
        blocks = {"lin0": torch.randn(4, 16), "lin1": torch.randn(4, 8)}
        deltas = {k: default_oracle(v, getattr(mlp, k).in_features) for k, v in blocks.items()}
    else:  # before 0.14 the config of bat files said init_weights=true; the tensor's axes tell
        blocks = {"lin0": torch.randn(4, 4, 4), "lin1": torch.randn(2, 4, 4)}
        deltas = {k: bat_oracle(getattr(mlp, k).weight.detach(), v) for k, v in blocks.items()}
    folder = old_file(tmp_path, blocks, init_weights="bat" if mode == "bat" else True)
    wanted = copy.deepcopy(mlp)
    for k, delta in deltas.items():
        getattr(wanted, k).weight.data += delta
    x = torch.randn(5, 12)
    model = peft.PeftModel.from_pretrained(mlp, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(model(x), wanted(x), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "again", folder))
    first = {k.replace(".bone_block", ".bone_adapter.block"): v for k, v in first.items()}
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.skipif(not FIXTURES.exists(), reason="adapters written by PEFT 0.17 itself are not beside the project")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default_div", "bat"])
def test_loads_what_peft_0_17_wrote(tmp_path, name, low_cpu_mem_usage):
    folder = FIXTURES / name
    widths = json.loads((folder / "meta.json").read_text())["widths"]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0 = nn.Linear(widths[0], widths[1])
            self.lin1 = nn.Linear(widths[1], widths[2], bias=False)
            self.head = nn.Linear(widths[2], widths[3])

        def forward(self, x):
            return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))

    net, io = Net(), load_file(folder / "io.safetensors")
    net.load_state_dict(load_file(folder / "base.safetensors"))
    model = peft.PeftModel.from_pretrained(net, folder / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    for x, y, base in (("x", "y", "y_base"), ("x3", "y3", "y3_base")):
        torch.testing.assert_close(model(io[x]), io[y], rtol=0, atol=1e-6)
        with model.disable_adapter():
            torch.testing.assert_close(model(io[x]), io[base], rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again, first = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, folder / "adapter"))
    first = {k.replace(".bone_block", ".bone_adapter.block"): v for k, v in first.items()}
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(io["x"]), io["y_merged"], rtol=0, atol=1e-6)
    for name in ("lin0", "lin1", "head"):
        torch.testing.assert_close(getattr(merged, name).weight, io[f"merged_weight.{name}"], rtol=0, atol=1e-6)


def test_renamed_to_miss_it_computes_the_same(mlp, tmp_path):
    for mode in (True, "bat"):
        torch.manual_seed(2)
        base = copy.deepcopy(mlp)
        model = peft.get_peft_model(
            copy.deepcopy(base), peftx.BoneConfig(r=4, init_weights=mode, target_modules=TARGETS)
        )
        for name, parameter in model.named_parameters():
            if name.endswith(".block"):
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        save_file(
            {k.replace(".bone_adapter.", ".miss_"): v for k, v in tensors.items()},
            tmp_path / "adapter_model.safetensors",
        )
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config.pop("rank_pattern")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "MISS"}))
        x = torch.randn(5, 12)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_trained_biases_are_saved(mlp, tmp_path):
    base = copy.deepcopy(mlp)
    model = peft.get_peft_model(mlp, peftx.BoneConfig(r=4, bias="bone_only", target_modules=["lin0"]))
    model.base_model.model.lin0.bias.data += 1
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))
