"""accelerate's offloading to the CPU and the disk: what a model computes stays what it is in memory."""

import copy
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import Case, adapted, forward, logits, tiny_model
from transformers.pytorch_utils import Conv1D

TARGETS = ["q_proj", "o_proj", "down_proj"]


def offloaded(model: torch.nn.Module, how: str, folder: Path) -> torch.nn.Module:
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "buffers":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    # `device_map`: the first block in memory, the others elsewhere
    blocks = {"base_model.model.model.layers.0": "cpu", "base_model.model.model.layers.1": "disk"}
    rest = dict.fromkeys(["base_model.model.model.embed_tokens", "base_model.model.model.norm"], "cpu")
    rest |= {"base_model.model.model.rotary_emb": "cpu", "base_model.model.lm_head": "cpu"}
    if hasattr(model.base_model, "compacter_rule"):
        rest["base_model.compacter_rule"] = "cpu"
    return accelerate.dispatch_model(model, {**rest, **blocks}, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("how", ["cpu", "buffers", "disk", "device_map"])
def test_an_offloaded_model_computes_what_it_did(case: Case, how: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), case, target_modules=TARGETS)
    wanted = logits(model, tokens)
    model = offloaded(model, how, tmp_path)
    for _ in range(2):  # garbage, if it is any, differs
        torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=1e-6)
    with torch.enable_grad():
        torch.testing.assert_close(forward(model, tokens).detach(), wanted, rtol=0, atol=1e-6)
    names = ["default", "__base__", "default"]
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=tokens).logits
    mixed = logits(model, tokens, adapter_names=names)
    torch.testing.assert_close(mixed[1], base[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[0], wanted[0], rtol=0, atol=1e-6)


class Net(torch.nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv = torch.nn.Embedding(20, 8), torch.nn.Conv1d(8, 8, 3, padding=1)
        self.wide, self.lin = Conv1D(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.wide(self.conv(self.emb(x).mT).mT.contiguous()))


LAYERS = {"Linear": "lin", "Conv1D": "wide", "Embedding": "emb", "Conv1d": "conv"}


@pytest.mark.parametrize("how", ["cpu", "buffers", "disk"])
def test_every_kind_of_layer_is_offloaded(case: Case, how: str, tmp_path: Path) -> None:
    targets = [LAYERS[name] for name in case.info.layer_types if name in LAYERS]
    x = torch.arange(12).view(2, 6)
    with torch.no_grad():
        model = adapted(Net().eval(), case, target_modules=targets)
        wanted = model(x)
        with model.disable_adapter():
            base = model(x)
        model = offloaded(model, how, tmp_path)
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
        close(model(x), wanted)
        close(model(x, adapter_names=["default", "__base__"]), torch.stack([wanted[0], base[1]]))
        if not case.info.mergeable:
            return
        for _ in range(2):
            model.merge_adapter(safe_merge=True)
            close(model(x), wanted)
            with model.disable_adapter():  # unmerges
                close(model(x), base)
            close(model(x), wanted)
        model.merge_adapter()
        model.unmerge_adapter()
        close(model(x), wanted)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_model_merges(mergeable: Case, how: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), mergeable, target_modules=TARGETS)
    wanted = logits(copy.deepcopy(model).merge_and_unload(), tokens)
    model = offloaded(model, how, tmp_path)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=1e-6)
