"""The transformers Trainer: every method on a tiny BERT, whose dropout and classifier a resume has to get right too."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Case
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from training import STEPS, adapter_of, assert_equal, losses, trainer


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture) -> None:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def test_resume_is_bit_equal_to_the_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    config = {"task_type": "SEQ_CLS", "bias": "all"}
    whole = trainer(case.config(**config), tmp_path)
    start = {name: tensor.clone() for name, tensor in adapter_of(whole).items()}
    whole.train()

    resumed = trainer(case.config(**config), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_equal(adapter_of(resumed), adapter_of(whole))
    assert_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert_equal(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS

    trained = {name for name, tensor in adapter_of(whole).items() if not torch.equal(tensor, start[name])}
    assert any(case.info.prefix in name for name in trained)
    assert any("classifier" in name for name in trained) and any(name.endswith("bias") for name in trained)


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(case: Case, tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0])
    run = trainer(
        case.config(task_type="SEQ_CLS"),
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(scores)},
        max_steps=3,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    run.train()
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3))
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_equal({name: tensor.contiguous() for name, tensor in adapter_of(run).items()}, best)
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient checkpointing
@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["bf16", "checkpointing-reentrant", "checkpointing"],
)
def test_trains_as_in_full_precision_without_checkpointing(case: Case, tmp_path: Path, arguments: dict) -> None:
    plain = trainer(case.config(), tmp_path, save_strategy="no")
    plain.train()
    run = trainer(case.config(), tmp_path, save_strategy="no", **arguments)  # the constructor seeds the dropout
    run.train()
    assert run.model.base_model.model.is_gradient_checkpointing is ("gradient_checkpointing" in arguments)
    tolerance = 2e-2 if "bf16" in arguments else 1e-5
    assert losses(run) == pytest.approx(losses(plain), rel=tolerance)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    if "bf16" not in arguments:
        torch.testing.assert_close(adapter_of(run), adapter_of(plain))


def warnings_of(config: PeftConfig, folder: Path) -> set[tuple[str, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(config, folder, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
        run.train()
        run.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    return {(warning.category.__name__, str(warning.message)) for warning in caught}


@pytest.fixture(scope="module")
def warnings_of_lora(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    return warnings_of(LoraConfig(r=2, task_type="SEQ_CLS"), tmp_path_factory.mktemp("lora"))


@pytest.mark.slow
def test_training_warns_of_nothing_that_lora_does_not(case: Case, tmp_path: Path, warnings_of_lora: set) -> None:
    assert warnings_of(case.config(task_type="SEQ_CLS"), tmp_path) <= warnings_of_lora
