"""States of embeddings: 32-bit by default, since rare rows share blocks with frequent ones."""

import copy

import peft
import pytest
import torch
from conftest import tiny_model
from torch import nn

import peftx
from peftx.optim import blockwise, create_optimizer, moments, param_groups, summarize, trainer_kwargs

FREQUENT, RARE = slice(1, 16), slice(0, None, 16)  # rows of which 16 share a block


def as_the_cuda_kernel(x, book):
    """bitsandbytes' CUDA kernel, simulated: the nearest entry of the book, which for small second moments is 0."""
    codes, absmax = blockwise.encode(x, book)
    if book.zero == 0:
        codes[x < absmax.repeat_interleave(256) * book.values[1] / 2] = 0
    return codes, absmax


def moved(**options) -> tuple[float, float]:
    """How far the rare and the frequent rows of an embedding go in 200 steps with a rate of 1e-3."""
    model = nn.Sequential(nn.Embedding(256, 16))
    p, draw = model[0].weight, torch.Generator().manual_seed(1)
    p.data = torch.randn(256, 16, generator=draw)
    before = p.detach().clone()
    optimizer = create_optimizer(model, 1e-3, min_8bit_size=0, weight_decay=0.0, **options)
    for t in range(200):
        p.grad = torch.randn(256, 16, generator=draw)
        p.grad[RARE] *= 1e-3 * (t % 20 == 0)
        optimizer.step()
    way = (p.detach() - before).abs()
    return way[RARE].max().item(), way[FREQUENT].max().item()


def test_rare_rows_leap_with_8_bits_and_walk_with_the_default(monkeypatch):
    exact = moved(optim_bits=32)
    assert exact == pytest.approx((0.04, 0.045), abs=0.01)
    assert moved() == exact
    assert moved(embedding_bits=8)[0] < 0.75 * exact[0]  # our coder rounds up: too slow, but no leap
    monkeypatch.setattr(moments, "encode", as_the_cuda_kernel)
    leap, frequent = moved(embedding_bits=8)
    assert leap > 100 and frequent == pytest.approx(exact[1], abs=0.01)
    assert moved() == exact


def bits(model: nn.Module, **options) -> dict[str, int]:
    """Bits of the states of every trained parameter, once they exist."""
    optimizer = create_optimizer(model, min_8bit_size=0, **options)
    optimizer.allocate_states()
    names = {id(p): name for name, p in model.named_parameters()}
    states = {names[id(p)]: state for p, state in optimizer.state.items()}
    return {name: 8 * state["exp_avg"].element_size() for name, state in states.items()}


CONFIGS = {
    "lora": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "flora": peftx.FloraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "saved": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "tokens": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_embeddings_and_all_adapters_on_them_have_32_bits(config):
    model = peft.get_peft_model(tiny_model("llama"), config)
    found = bits(model)
    of_embeddings = {name for name in found if "embed_tokens" in name}
    assert of_embeddings and of_embeddings < found.keys()
    assert {name for name, width in found.items() if width == 32} == of_embeddings
    assert set(bits(model, embedding_bits=8).values()) == {8}
    assert set(bits(model, optim_bits=32).values()) == {32}


def test_of_a_dense_model_the_embedding_alone_whether_projected_or_not():
    model = tiny_model("llama")
    for options in ({}, {"rank": 2}, {"rank": 2, "target": "weight"}):
        found = bits(model, **options)
        assert [name for name, width in found.items() if width == 32] == ["model.embed_tokens.weight"]
    model.lm_head.weight = model.model.embed_tokens.weight
    assert bits(model)["model.embed_tokens.weight"] == 32


def test_there_is_no_group_more_without_a_trained_embedding_or_without_8_bits():
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert [group.get("optim_bits") for group in param_groups(model)] == [None]
    dense = tiny_model("llama")
    plain = [len(group["params"]) for group in param_groups(dense, embedding_bits=8)]
    assert [len(group["params"]) for group in create_optimizer(dense, optim_bits=32).param_groups] == plain
    assert len(param_groups(dense)) == len(plain) + 1


def test_states_from_before_are_refused_with_the_way_out_and_go_on_with_it():
    model = tiny_model("llama")

    def step(optimizer):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()

    step(old := create_optimizer(model, min_8bit_size=0, embedding_bits=8))
    saved = copy.deepcopy(old.state_dict())
    fresh = create_optimizer(model, min_8bit_size=0)
    with pytest.raises(ValueError, match=r"parameter groups of \[.*embedding_bits \(8 is what"):
        fresh.load_state_dict(saved)
    assert not fresh.state
    same = create_optimizer(model, min_8bit_size=0, embedding_bits=8)
    same.load_state_dict(saved)
    step(same)
    assert summarize(same).full == 0
    step(fresh)
    again = create_optimizer(model, min_8bit_size=0)
    again.load_state_dict(fresh.state_dict())
    assert summarize(again).full == 1


def test_8_bit_states_of_an_embedding_alone_go_on_as_they_were_and_this_is_told(caplog):
    model = nn.Sequential(nn.Embedding(64, 64))
    (p,) = model.parameters()
    p.grad = torch.ones_like(p)
    (old := create_optimizer(model, embedding_bits=8)).step()
    fresh = create_optimizer(model)
    with caplog.at_level("WARNING"):
        fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    assert "8-bit, and go on so" in caplog.text and summarize(fresh).eight_bit == 1
    caplog.clear()
    create_optimizer(model, embedding_bits=8).load_state_dict(old.state_dict())
    assert not caplog.records


@pytest.mark.parametrize("wrong", [4, 16, "8", 8.0, True, None])
def test_other_widths_are_refused(wrong):
    for make in (
        lambda: param_groups(tiny_model("llama"), embedding_bits=wrong),
        lambda: create_optimizer(tiny_model("llama"), embedding_bits=wrong),
        lambda: trainer_kwargs(1e-3, embedding_bits=wrong),
    ):
        with pytest.raises(ValueError, match="embedding_bits must be 8 or 32"):
            make()
