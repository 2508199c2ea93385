"""DonodCallback in TRL's trainers: pairs are scored by their chosen answers, and what has no answer is refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_model
from runs import base, datasets, in_four_bits, logged, make, rows, tokenizer, values

import peftx
from peftx.pruning import score_dataset

pytestmark = pytest.mark.trl


def lora(name: str = "DPO", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False)
    return peft.get_peft_model(base(name), config)


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({}, {}),
    "conversations": ({}, {}),
    "cut": ({}, {"max_length": 5}),
    "cut in front": ({}, {"max_length": 5, "truncation_mode": "keep_end"}),
    "warm-up": ({"when": "warmup", "warmup_steps": 2}, {}),
    "ifd": ({"method": "ifd", "keep": 0.3}, {}),
    "gradients": ({"method": "grand_full"}, {}),
    "multiples": ({}, {"pad_to_multiple_of": 8}),
}


@pytest.mark.parametrize("way", WAYS)
def test_pairs_are_scored_by_their_chosen_answers(way: str, tmp_path: Path) -> None:
    """As fine-tuning on the chosen answers scores them."""
    settings, options = WAYS[way]
    settings = {"keep": 0.5, **settings}
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, **options}
    pairs = rows("DPO", chat=way == "conversations")
    answers = datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    found, wanted = peftx.DonodCallback(**settings), peftx.DonodCallback(**settings)
    run = make("DPO", tmp_path / "dpo", lora(), pairs, callbacks=[found], **options)
    if way == "ifd":
        with pytest.warns(UserWarning, match="dropped whatever their rank"):
            run.train()
    else:
        run.train()
    if "truncation_mode" in options:  # of which the SFTTrainer has one
        options.pop("truncation_mode")
        collator = run.data_collator
        scores = score_dataset(lora(), run.train_dataset, collator, progress=False)
        rows_, ids = [], [[*row["prompt_ids"], *row["chosen_ids"]] for row in run.train_dataset]
        for row, sample in zip(ids, run.train_dataset, strict=True):
            labels = [-100] * len(sample["prompt_ids"]) + sample["chosen_ids"]
            rows_.append({"input_ids": row[-5:], "labels": labels[-5:]})
        expected = score_dataset(lora(), rows_, batch_size=1, progress=False)
        torch.testing.assert_close(scores["nod"], expected["nod"], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found.selection.scores["nod"], scores["nod"], rtol=1e-4, atol=1e-8)
        return
    make("SFT", tmp_path / "sft", lora(), answers, callbacks=[wanted], **options).get_train_dataloader()
    assert found.selection.indices == wanted.selection.indices
    for name, column in wanted.selection.scores.items():
        torch.testing.assert_close(found.selection.scores[name], column, rtol=1e-5, atol=1e-8, equal_nan=True)
    kept = len(found.selection.indices)
    assert 0 < kept < 16 and run.state.global_step == -(-kept // 3)


def test_the_training_is_that_of_the_kept_pairs(tmp_path: Path) -> None:
    callback = peftx.DonodCallback(keep=0.5)
    run = make("DPO", tmp_path / "all", lora(), callbacks=[callback], max_steps=-1, num_train_epochs=1)
    run.train()
    kept = rows("DPO").select(callback.selection.indices)
    other = make("DPO", tmp_path / "kept", lora(), kept, max_steps=-1, num_train_epochs=1)
    other.train()
    assert logged(run) == logged(other) and len(logged(run)) == 4
    assert all(torch.equal(tensor, values(other.model)[key]) for key, tensor in values(run.model).items())
    page = (tmp_path / "all" / "selection.md").read_text()
    row = kept[0]
    assert f"{row['prompt']}{row['chosen']}" in page and row["rejected"] + " |" not in page


def test_a_stream_of_pairs(tmp_path: Path) -> None:
    one, two = peftx.DonodCallback(keep=0.5), peftx.DonodCallback(keep=0.5)
    make("DPO", tmp_path / "table", lora(), callbacks=[one], max_steps=2).train()
    make("DPO", tmp_path / "stream", lora(), rows("DPO").to_iterable_dataset(), callbacks=[two], max_steps=2).train()
    assert one.selection.indices == two.selection.indices


def test_precomputed_references(tmp_path: Path) -> None:
    one, two = peftx.DonodCallback(keep=0.5), peftx.DonodCallback(keep=0.5)
    first = make("DPO", tmp_path / "step by step", lora(), callbacks=[one])
    second = make("DPO", tmp_path / "before", lora(), callbacks=[two], precompute_ref_log_probs=True)
    first.train()
    second.train()
    assert one.selection.indices == two.selection.indices
    assert logged(second) == pytest.approx(logged(first), abs=1e-5)


def test_a_base_in_four_bits(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path / "base")
    config = peftx.ALLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    callback = peftx.DonodCallback(keep=0.5)
    run = make("SFT", tmp_path, model, peft_config=config, callbacks=[callback], max_steps=-1, num_train_epochs=1)
    run.train()
    assert len(callback.selection.indices) == 8 and run.state.global_step == 4


REFUSED = {
    "KTO": r"the collator made no tensor 'labels'.*score a data set of prompts and answers.*dataset.select\(indices\)",
    "GRPO": r"no tensor 'labels', but a list.*prompts and answers",
    "RLOO": r"no tensor 'labels', but a list.*prompts and answers",
    "Reward": r"not for regression, nor for rewards: select with another model.*dataset.select\(indices\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_wanted_answer_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    run = make(name, tmp_path, lora(name), callbacks=[peftx.DonodCallback()])
    before = values(run.model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        run.train()
    assert run.state.global_step == 0 and not (tmp_path / "selection.json").exists()
    assert all(torch.equal(tensor, before[key]) for key, tensor in values(run.model).items())


def test_pairs_of_texts_alone_have_no_score() -> None:
    model = tiny_model("llama")
    collate = lambda some: tokenizer()([row["chosen"] for row in some], return_tensors="pt")
    with pytest.raises(ValueError, match="preference pairs.*unless TRL's DPOTrainer has tokenised them"):
        score_dataset(model, rows("DPO"), collate, progress=False)
