"""Preference pairs as TRL's DPOTrainer tokenises and batches them, without TRL."""

from typing import Any

import pytest
import torch
from conftest import tiny_model

from peftx.pruning import score_dataset
from peftx.pruning.report import excerpt


def pairs(count: int = 6) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(2 + i % 3, 1 + i % 4, 1 + (3 * i + 2) % 6) for i in range(count)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {key: torch.randint(1, 64, (n,), generator=draw).tolist() for key, n in zip(names, some, strict=True)}
        for some in sizes
    ]


def collate(some: list[dict[str, Any]], width: int = 0) -> dict[str, torch.Tensor]:
    """All chosen answers, then all rejected ones, padded to the longest of both."""
    rows = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in some]
    width = max(width, *(len(prompt) + len(answer) for prompt, answer in rows))
    pad = lambda parts: torch.tensor([[*part, *[0] * (width - len(part))] for part in parts])
    return {
        "input_ids": pad([[*prompt, *answer] for prompt, answer in rows]),
        "attention_mask": pad([[1] * (len(prompt) + len(answer)) for prompt, answer in rows]),
        "completion_mask": pad([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows]),
    }


def answers() -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
        }
        for row in pairs()
    ]


@pytest.mark.parametrize("metric", ["nod", "loss", "ifd", "grand_full"])
def test_scores_are_those_of_the_chosen_answers(metric: str) -> None:
    model = tiny_model("llama")
    found = score_dataset(model, pairs(), collate, metrics=[metric], batch_size=3, progress=False)
    wanted = score_dataset(model, answers(), metrics=[metric], batch_size=1, progress=False)
    for name, column in wanted.items():
        torch.testing.assert_close(found[name], column, rtol=1e-4, atol=1e-7, equal_nan=True)


def test_rejected_answers_do_not_matter() -> None:
    model = tiny_model("llama")
    others = [{**row, "rejected_ids": [1] * 20} for row in pairs()]
    one, two = (score_dataset(model, data, collate, progress=False)["nod"] for data in (pairs(), others))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (lambda some: {**collate(some), "completion_mask": None}, "no tensor 'labels', only input_ids"),
        (lambda some: {key: part[: len(some)] for key, part in collate(some).items()}, "no tensor 'labels'"),
        (lambda some: collate(some[::-1]), "does not give row i of a batch to sample i"),
        (lambda some: [], "but a list"),
    ],
)
def test_other_batches_of_pairs_are_refused(collator: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_dataset(tiny_model("llama"), pairs(), collator, batch_size=3, progress=False)


@pytest.mark.parametrize("names", [("prompt", "chosen", "rejected"), ("chosen_ids", "rejected_ids")])
def test_other_pairs_are_refused(names: tuple[str, ...]) -> None:
    rows = [{key: [1, 2] for key in names}] * 4
    with pytest.raises(ValueError, match=r"preference pairs.*unless TRL's DPOTrainer has tokenised them.*select"):
        score_dataset(tiny_model("llama"), rows, collate, progress=False)


class Decoder:
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def test_what_is_shown_is_the_chosen_answer() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    assert excerpt(row, Decoder()) == "1 2 3"
