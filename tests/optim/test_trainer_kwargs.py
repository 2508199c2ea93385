"""peftx.optim with transformers' Trainer: one line to use it, the groups it makes, and resume to the bit."""

import logging
from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

import peftx
from peftx.optim import LowRankAdamW, create_optimizer, param_groups, trainer_kwargs

OPTIONS = dict(rank=2, update_proj_gap=3, min_8bit_size=0)


def lora(**options) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], **options)
    return peft.get_peft_model(tiny_model("bert"), config)


def arguments(folder: Path, **options) -> TrainingArguments:
    options = {
        "max_steps": 8,
        "save_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "weight_decay": 0.03,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-7,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return TrainingArguments(folder, **options)


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 64, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


class OwnTrainer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = peftx.optim.create_optimizer(model or self.model, self.args, **OPTIONS)
        return self.optimizer


def make(route: str, folder: Path, **options) -> Trainer:
    args = arguments(folder, **options)
    if route == "subclass":
        return OwnTrainer(lora(), args, train_dataset=rows())
    return Trainer(lora(), args, train_dataset=rows(), **trainer_kwargs(args, **OPTIONS))


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("route", ["kwargs", "subclass"])
@pytest.mark.parametrize("bf16", [False, True])
def test_one_line_trains_and_resumes_bit_equal(route, bf16, tmp_path):
    whole = make(route, tmp_path / "whole", bf16=bf16)
    before = trained(whole)
    whole.train()
    optimizer = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert isinstance(optimizer, LowRankAdamW)
    after = trained(whole)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert {type(value) for state in optimizer.state.values() for value in state.values()} == {int, torch.Tensor}
    torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    resumed = make(route, tmp_path / "resumed", bf16=bf16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(value, after[name]) for name, value in trained(resumed).items())


def test_hyperparameters_come_from_the_arguments_and_options_win(tmp_path):
    trainer = make("kwargs", tmp_path)
    for _ in range(2):  # the tuple can be used again
        trainer.optimizer = None
        group = trainer.create_optimizer().param_groups[0]
        found = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "update_proj_gap")}
        assert found == dict(lr=0.02, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.03, update_proj_gap=3)
    group = create_optimizer(lora(), arguments(tmp_path), lr=0.5, weight_decay=0.0).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["rank"]) == (0.5, 0.0, None)
    assert create_optimizer(lora(), 0.3).defaults["lr"] == 0.3
    assert create_optimizer(lora()).defaults["weight_decay"] == 0.01
    with pytest.raises(TypeError, match="args"):  # or the learning rate of the arguments would be ignored
        trainer_kwargs(**OPTIONS)


def test_a_model_made_by_the_trainer_works_too(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    trainer = Trainer(model_init=lambda: lora(), args=args, train_dataset=rows(), **trainer_kwargs(args, **OPTIONS))
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_the_class_itself_can_be_given_to_the_trainer(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    chosen = (LowRankAdamW, {"lr": 0.01, **OPTIONS})
    trainer = Trainer(lora(), args, train_dataset=rows(), optimizer_cls_and_kwargs=chosen)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0] and {group["rank"] for group in groups} == {2}


def test_of_a_lora_only_a_and_b_are_projected():
    model = lora(use_dora=True, modules_to_save=["classifier"])
    projected = {name for group in param_groups(model, 0.1, rank=2) if group["rank"] for name, _ in group["params"]}
    assert projected == {name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    rest = {name for group in param_groups(model, 0.1, rank=2) if not group["rank"] for name, _ in group["params"]}
    assert any("magnitude" in name for name in rest) and any("classifier" in name for name in rest)


def test_of_a_dense_model_neither_embeddings_nor_head_are_projected():
    model = tiny_model("llama")
    groups = param_groups(model, 0.1, rank=2)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    projected = {name for group in groups if group["rank"] for name, _ in group["params"]}
    assert projected == {name for name in names if name.endswith("_proj.weight")}
    chosen = [group for group in param_groups(model, rank=2, target=r"layers\.0.*q_proj") if group["rank"]]
    assert [name for group in chosen for name, _ in group["params"]] == ["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_decay_is_the_trainers(kind, tmp_path):
    model = tiny_model(kind)
    decayed = {name for group in param_groups(model, 0.1) if group["weight_decay"] for name, _ in group["params"]}
    reference = Trainer(model, arguments(tmp_path)).get_decay_parameter_names(model)
    assert decayed == set(reference)


def test_nothing_to_train_or_to_project_is_refused():
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="no trainable matrix"):
        param_groups(model, rank=2)
    with pytest.raises(ValueError, match="target='lin'"):
        create_optimizer(model, rank=2, target="lin")
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rnk": 4}, TypeError, "no argument 'rnk'"),
        ({"rank": 2.5}, ValueError, "rank must be"),
        ({"rank": 4, "target": "(["}, ValueError, "target must be"),
        ({"rank": 4, "target": 5}, ValueError, "target must be"),
        ({"update_proj_gap": 1.5}, ValueError, "update_proj_gap must be"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be"),
        ({"proj_refresh": "qr"}, ValueError, "proj_refresh must be"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_given(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        trainer_kwargs(arguments(tmp_path), **options)
    with pytest.raises(error, match=message.replace("no argument", "argument")):
        create_optimizer(lora(), 1e-3, **options)


@pytest.mark.parametrize("args", ["1e-3", [1e-3], object(), float("nan"), -1.0, True])
def test_arguments_that_are_none_are_refused(args):
    for make in (trainer_kwargs, lambda args: create_optimizer(lora(), args)):
        with pytest.raises((TypeError, ValueError), match=r"args must be|lr must be"):
            make(args)


def test_numbers_of_training_arguments_are_refused_too(tmp_path):
    args = arguments(tmp_path)
    args.learning_rate = float("inf")
    with pytest.raises(ValueError, match="lr must be"):
        trainer_kwargs(args)
    with pytest.raises(ValueError, match="weight_decay must be"):
        param_groups(lora(), weight_decay=-1.0)


def test_a_rank_where_fsdp1_has_flattened_the_matrices_is_refused_with_the_reason():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self._fsdp_wrapped_module = nn.Linear(4, 4)

    with pytest.raises(NotImplementedError, match="FSDP1 flattens"):
        param_groups(Flattened(), rank=2)
    assert param_groups(Flattened())


def test_training_warns_once_that_small_states_stay_32_bit(tmp_path, caplog):
    args = arguments(tmp_path, max_steps=2, save_strategy="no")
    trainer = Trainer(lora(), args, train_dataset=rows(), **trainer_kwargs(args))
    with caplog.at_level(logging.INFO, "peftx"):
        trainer.train()
    (record,) = [record for record in caplog.records if record.name.startswith("peftx")]
    assert record.levelno == logging.WARNING and "min_8bit_size" in record.message


def test_it_learns(tmp_path):
    """All three forms halve the loss of a small dense model, as AdamW does."""
    for options in ({}, {"rank": 4, "proj_refresh": "randomized"}, {"rank": 4, "update": "apollo"}):
        torch.manual_seed(0)
        model = tiny_model("llama").train()
        optimizer = create_optimizer(model, 0.02, update_proj_gap=20, min_8bit_size=0, **options)
        ids = torch.randint(1, 64, (8, 7), generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(40):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] / 2, (options, losses[-1])
