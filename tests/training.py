"""A tiny BERT under the transformers Trainer, whose dropout and classifier a resume has to get right too."""

from pathlib import Path
from typing import Any

import torch
from conftest import tiny_model
from peft import PeftConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

STEPS = 4


def examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Token rows whose class is that of their first token."""
    rows = torch.randint(1, 64, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in rows]


def trainer(config: PeftConfig, folder: Path, *, compute_metrics: Any = None, **arguments: Any) -> Trainer:
    """Ready to train 4 steps of 4 examples, with a checkpoint after each 2."""
    arguments = {
        "max_steps": STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return Trainer(
        get_peft_model(tiny_model("bert"), config),
        TrainingArguments(folder, **arguments),
        train_dataset=examples(),
        eval_dataset=examples(4),
        compute_metrics=compute_metrics,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def adapter_of(run: Trainer) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(run.model)


def assert_equal(actual: Any, wanted: Any) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
