"""Real trainers of TRL on an adapter that was trained before: the first step sees policy = reference."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from conftest import Case, randomize, tiny_model

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sft(case: Case) -> peft.PeftModel:
    model = peft.get_peft_model(tiny_model("llama"), case.config(target_modules=["q_proj", "down_proj"]))
    randomize(model, case)
    if case.info.name == "triadaptlora":
        model.peft_config["default"].total_step = 4
        for step in range(1, 5):
            randomize(model, case, std=0.01, seed=step)
            model.base_model.update_and_grow(step)
        model.peft_config["default"].total_step = None
    return model


ARGUMENTS = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1}
ARGUMENTS |= {"disable_tqdm": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False}


def logged(trainer: Any, key: str) -> float:
    trainer.train()
    return next(entry[key] for entry in trainer.state.log_history if key in entry)


def test_dpo(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a b c", "chosen": " d e f", "rejected": " g h"}] * 4
    trainer = trl.DPOTrainer(
        sft(case),
        args=trl.DPOConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert logged(trainer, "loss") == pytest.approx(math.log(2), abs=1e-6)


def test_kto(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a b c", "completion": " d e f", "label": True},
        {"prompt": "a b", "completion": " g", "label": False},
    ]
    trainer = trl.KTOTrainer(
        sft(case),
        args=trl.KTOConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=datasets.Dataset.from_list(rows * 2),
        processing_class=tokenizer,
    )
    assert logged(trainer, "kl") == pytest.approx(0, abs=1e-6)


def test_grpo(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    trainer = trl.GRPOTrainer(
        sft(case),
        reward,
        args=trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, beta=0.1, **ARGUMENTS),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b c"}] * 4),
        processing_class=tokenizer,
    )
    assert logged(trainer, "kl") == pytest.approx(0, abs=1e-6)
