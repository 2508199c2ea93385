"""A model that was adapted, trained and deleted leaves nothing behind."""

import gc
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Case, tiny_model
from training import trainer


def options(case: Case) -> dict[str, Any]:
    return {"auto_update": True} if case.info.name == "loraggpo" else {}


@pytest.mark.filterwarnings("ignore:LORAGGPO")
@pytest.mark.parametrize("unload", [False, True], ids=["", "unload"])
def test_nothing_holds_a_model_that_was_trained(case: Case, unload: bool) -> None:
    model = peft.get_peft_model(tiny_model("llama"), case.config(target_modules="all-linear", **options(case))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if hasattr(model.base_model, "attach_optimizer"):
        model.base_model.attach_optimizer(optimizer)
    rows = torch.randint(1, 64, (2, 5))
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    if unload:
        base = model.unload()
        model = peft.get_peft_model(base, case.config(target_modules="all-linear", **options(case)))
        held += [weakref.ref(parameter) for parameter in model.parameters()]
        del base
    del model, optimizer
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


@pytest.mark.slow
def test_nothing_holds_a_model_after_trainer_and_callbacks(case: Case, tmp_path: Path) -> None:
    run = trainer(case.config(task_type="SEQ_CLS"), tmp_path, max_steps=2, save_strategy="no")
    if case.info.callback is not None:
        run.add_callback(case.info.callback())
    run.train()
    held = [weakref.ref(parameter) for parameter in run.model.parameters()]
    del run
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
