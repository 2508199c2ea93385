"""Every registered method in every trainer of TRL: a new one is tested by being registered."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import CASES, Case
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from runs import (
    TRAINERS,
    base,
    check_training,
    config,
    datasets,
    driver,
    in_four_bits,
    logged,
    make,
    ours,
    rows,
    small_states,
    values,
)
from runs import trained as trained_before
from torch.nn import functional as F

import peftx

pytestmark = pytest.mark.trl


FIRST = {case.info.name: case for case in reversed(CASES)}  # of each method the mode that its config has by default


@pytest.fixture(params=list(FIRST.values()), ids=list(FIRST))
def method(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def resumed(case: Case, name: str, folder: Path, callbacks: Any = list, extra: Any = None, **options: Any) -> Any:
    """A run of four steps, seen to be the same when it is interrupted after two."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True, **options}
    runs = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        model = trained_before(case, name)
        before = values(model)
        more = None if extra is None else extra(model)
        run = make(name, folder, model, callbacks=[*driver(case), *callbacks()], extra=more, **options)
        run.train(resume_from_checkpoint=checkpoint)
        check_training(run, before, case, name)
        runs.append(run)
    whole, rest = (values(run.model) for run in runs)
    assert whole.keys() == rest.keys() and all(torch.equal(whole[key], rest[key]) for key in whole)
    assert logged(runs[0]) == logged(runs[1]) and len(logged(runs[0])) == 4
    return runs[1]


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_a_resumed_training_is_the_same_bit_for_bit(case: Case, name: str, tmp_path: Path) -> None:
    resumed(case, name, tmp_path)


@pytest.mark.parametrize("name", [name for name in TRAINERS if name not in ("SFT", "DPO")])
def test_other_trainers_resume_bit_for_bit(method: Case, name: str, tmp_path: Path) -> None:
    resumed(method, name, tmp_path)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_callbacks_together(method: Case, name: str, tmp_path: Path) -> None:
    fisher: list[Any] = []

    def callbacks() -> list[Any]:
        found: list[Any] = [peftx.DonodCallback(keep=0.5)]
        if name == "SFT":
            fisher.append(peftx.FisherCallback())
            found.append(fisher[-1])
        return found

    resumed(method, name, tmp_path, callbacks)
    if fisher:  # their sums are not in checkpoints
        assert [callback.statistics.samples for callback in fisher] == [8, 4]


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_small_optimizer_states(method: Case, name: str, tmp_path: Path) -> None:
    def extra(model: Any) -> dict[str, Any]:
        return small_states(name, {}, model, tmp_path, min_8bit_size=0)

    run = resumed(method, name, tmp_path, extra=extra)
    states = [
        tensor.dtype
        for state in run.optimizer.state.values()
        for tensor in state.values()
        if getattr(tensor, "ndim", 0)
    ]
    assert torch.uint8 in states


@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward"])
def test_the_best_checkpoint_is_loaded(method: Case, name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    options |= {"save_steps": 1, "eval_steps": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    extra = {"eval_dataset": rows(name, 4)}
    model = trained_before(method, name)
    run = make(name, tmp_path, model, callbacks=driver(method), extra=extra, learning_rate=0.3, **options)
    run.train()
    losses = logged(run, "eval_loss")
    assert run.state.best_metric == min(losses) and len(losses) == 4
    found, wanted = get_peft_model_state_dict(run.model), load_peft_weights(run.state.best_model_checkpoint)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_makes_the_adapter(method: Case, name: str, tmp_path: Path) -> None:
    plain = values(base(name))
    run = make(name, tmp_path, base(name), peft_config=config(method, name), callbacks=driver(method), max_steps=2)
    assert isinstance(run.model, peft.PeftModel) and run.model.peft_config["default"].peft_type == method.info.peft_type
    before = values(run.model)
    run.train()
    after = values(run.model)
    assert any(not torch.equal(after[key], before[key]) for key in after if ours(key, method))
    kept = {key.replace("base_model.model.", "").replace("base_layer.", ""): tensor for key, tensor in after.items()}
    assert all(torch.equal(kept[key], tensor) for key, tensor in plain.items() if key in kept)
    run.save_model()
    loaded = peft.PeftModel.from_pretrained(base(name), str(tmp_path))
    x = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x).logits, run.model.eval()(x).logits)
    assert "import peftx" in (tmp_path / "README.md").read_text()


# What training starts from


def messages() -> Any:
    return datasets.Dataset.from_list([{"messages": row["prompt"] + row["chosen"]} for row in rows("DPO", chat=True)])


def texts() -> Any:
    return datasets.Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows("DPO")])


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "texts": (texts, {}),
    "prompts and completions": (lambda: rows("SFT"), {}),
    "prompts that count": (lambda: rows("SFT"), {"completion_only_loss": False}),
    "conversations in two parts": (lambda: rows("SFT", chat=True), {}),
    "messages": (messages, {}),
    "assistant only": (messages, {"assistant_only_loss": True}),
    "packing": (lambda: rows("SFT"), {"packing": True, "max_length": 16}),
    "packing, wrapped": (lambda: rows("SFT"), {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding free": (lambda: rows("SFT"), {"padding_free": True, "max_length": None}),
}


def explicit(model: Any, batch: list[dict[str, Any]]) -> float:
    """The mean cross-entropy over the labels of rows as the trainer prepared them, a sequence at a time."""
    total = count = 0.0
    for row in batch:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            part = slice(start, start + length)
            ids, labels = (torch.tensor(row.get(key) or row["input_ids"])[part] for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1].double()
            total += float(F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100))
            count += int((labels[1:] != -100).sum())
            start += length
    return total / count


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data(method: Case, form: str, tmp_path: Path) -> None:
    data, options = FORMS[form]
    model = trained_before(method, "SFT")
    options = {"max_steps": 1, "train_sampling_strategy": "sequential", **options}
    run = make("SFT", tmp_path, model, data(), callbacks=driver(method), **options)
    wanted = explicit(trained_before(method, "SFT").eval(), [run.train_dataset[i] for i in range(2)])
    before = values(model)
    run.train()
    assert logged(run)[0] == pytest.approx(wanted, abs=2e-4)
    check_training(run, before, method, "SFT")


def test_a_base_in_four_bits(case: Case, tmp_path: Path) -> None:
    """TRL casts what trains to bf16, and adds the reference in fp32: hence the tolerance, which LoRA needs as well."""
    loaded = in_four_bits(tmp_path / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded, config(case, "SFT"))
    before = values(model)
    run = make("SFT", tmp_path, model, callbacks=driver(case), gradient_checkpointing=True)
    run.train()
    kinds = {parameter.dtype for key, parameter in model.named_parameters() if parameter.requires_grad}
    learns = min(logged(run)[1:]) < logged(run)[0] or case.name == "krona"  # whose rate these few steps do not bear
    assert torch.bfloat16 in kinds and learns
    assert all(torch.equal(tensor, before[key]) for key, tensor in values(model).items() if not ours(key, case))
    run = make("DPO", tmp_path / "dpo", model, callbacks=driver(case), gradient_checkpointing=True, max_steps=2)
    run.train()
    assert logged(run)[0] == pytest.approx(math.log(2), abs=1e-3)


def test_bf16(case: Case, tmp_path: Path) -> None:
    """TRL's default, under autocast, and a model in bf16."""
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        model = peft.get_peft_model(base("SFT").to(dtype), config(case, "SFT"))
        options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 3, "callbacks": driver(case)}
        make("SFT", tmp_path / f"{number}", model, **options).train()
        before = values(model)
        run = make("DPO", tmp_path / f"{number}-dpo", model, **options)
        run.train()
        check_training(run, before, case, "DPO")
