"""A collator that changes the order of the samples is told from one that keeps it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_pruning import Packed, classes, pad_rows, pad_sequences, rows, small
from test_pruning_callback import trainer

import peftx
from peftx.pruning import score_dataset
from peftx.pruning.collation import Watched, check_order
from peftx.pruning.warmup import warmed_up


def by_length(samples: list) -> list:
    return sorted(samples, key=lambda sample: -len(sample["input_ids"]))


def shuffled(samples: list) -> list:
    return [samples[i] for i in torch.randperm(len(samples)).tolist()]


def without_long(samples: list) -> list:
    """Drops what is too long, and fills up with the first."""
    kept = [sample for sample in samples if len(sample["input_ids"]) < 9] or samples[:1]
    return (kept + kept[:1] * len(samples))[: len(samples)]


CHANGES: dict[str, Any] = {
    "sorts": by_length,
    "sorts by content": lambda samples: sorted(samples, key=lambda sample: sample["input_ids"][0]),
    "reverses": lambda samples: samples[::-1],
    "rotates by half": lambda samples: samples[len(samples) // 2 :] + samples[: len(samples) // 2],
    "interleaves": lambda samples: samples[::2] + samples[1::2],
    "swaps the last two": lambda samples: [*samples[:-2], *samples[:-3:-1]],
    "shuffles": shuffled,
    "shuffles with its own generator": lambda samples: random.Random(3).sample(samples, len(samples)),
    "repeats the first": lambda samples: [samples[0], *samples[:-1]],
    "drops and repeats": without_long,
}


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("change", CHANGES)
def test_other_orders_are_refused(change: str, batch_size: int) -> None:
    for kind, samples, pad in (("llama", rows(30), pad_rows), ("bert", classes(30), pad_sequences)):
        if change == "interleaves" and batch_size == 2:
            continue  # the same order
        with pytest.raises(ValueError, match=r"sorts, shuffles, drops or repeats|at random, rows or their order"):
            score_dataset(small(kind), samples, lambda batch, p=pad: p(CHANGES[change](batch)), batch_size=batch_size)


def test_labels_alone_out_of_order() -> None:
    def collator(samples: list) -> dict:
        batch = pad_rows(samples)
        batch["labels"] = pad_rows(by_length(samples))["labels"]
        return batch

    with pytest.raises(ValueError, match="'labels' does not follow the order of the samples"):
        score_dataset(small("llama"), rows(30), collator)


def test_an_order_that_changes_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows come last in a stream, behind the batches that are always looked at."""
    monkeypatch.setattr("peftx.pruning.collation.SHARE", 1.0)  # the model is too small for a hundredth
    samples = sorted(rows(80), key=lambda sample: len(sample["input_ids"]))
    stream = peftx.pruning.rows.Bare(samples)
    with pytest.raises(ValueError, match=r"samples \d+ to \d+: the collator does not give row i"):
        score_dataset(small("llama").double(), stream, lambda batch: pad_rows(without_long(batch)), batch_size=4)


def dropped_tokens(samples: list) -> dict:
    batch = pad_rows(samples)
    batch["input_ids"] = batch["input_ids"].where(torch.rand(batch["input_ids"].shape) < 0.8, 5)
    return batch


def takes_out(samples: list) -> dict:
    """Leaves nothing in the samples that it got."""
    return pad_rows([{"input_ids": sample.pop("input_ids"), "labels": sample.pop("labels")} for sample in samples])


def left(samples: list) -> dict:
    return {name: part.flip(1) for name, part in pad_rows(samples).items()}


@pytest.mark.parametrize("collator", [pad_rows, left, dropped_tokens, takes_out])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_what_keeps_the_order_is_not_refused(collator: Any, count: int) -> None:
    data = [dict(sample) for sample in rows(count)]

    class Fresh:
        def __len__(self) -> int:
            return count

        def __getitem__(self, place: int) -> dict:
            return dict(data[place])

    found = score_dataset(small("llama"), Fresh(), collator, batch_size=4)
    assert found["don"].isfinite().all()


def test_numbers_of_the_batch_are_no_rows() -> None:
    """As many class weights as samples, say."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    check_order(lambda samples: {**pad_rows(samples), "class_weights": weights}, rows(4))


def test_equal_rows_have_no_order() -> None:
    same = [rows()[0]] * 10
    assert score_dataset(small("llama"), same, lambda batch: pad_rows(batch[::-1]))["nod"].unique().numel() == 1


def test_one_row_at_a_time_needs_no_order() -> None:
    wanted = score_dataset(small("llama"), rows(), pad_rows)
    found = score_dataset(small("llama"), rows(), lambda batch: pad_rows(by_length(batch)), batch_size=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
    score_dataset(small("llama"), rows(), Packed(), batch_size=1)


def test_chance_in_everything_is_refused() -> None:
    def collator(samples: list) -> dict:
        tokens = torch.randint(1, 64, (len(samples), 5))
        return {"input_ids": tokens, "labels": tokens}

    with pytest.raises(ValueError, match="makes 'input_ids', 'labels' at random, rows or their order"):
        score_dataset(small("llama"), rows(), collator)


def test_looks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the time, beside the first batches."""
    clock = [0.0]
    monkeypatch.setattr("peftx.pruning.collation.time.perf_counter", lambda: clock[0])
    calls = []

    def collator(samples: list) -> dict:
        calls.append(1)
        clock[0] += 1.0
        return pad_rows(samples)

    watched = Watched(collator)
    for _ in range(1000):
        watched(rows(4))
        clock[0] += 9.0  # the model
    looks = len(calls) - 1000
    assert 20 < looks < 0.015 * clock[0] + 10


def test_warm_up_and_callback_refuse_before_they_train(tmp_path: Path) -> None:
    model = small("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    arguments = {"steps": 2, "learning_rate": 0.1}
    with (
        pytest.raises(ValueError, match="sorts, shuffles"),
        warmed_up(model, rows(), lambda batch: pad_rows(by_length(batch)), **arguments),
    ):
        pass

    def collator(samples: list) -> dict:
        return transformers.default_data_collator(samples[::-1])

    for when in ("start", "warmup"):
        run = trainer(tmp_path / when, peftx.DonodCallback(when=when))
        run.data_collator = collator
        run.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
        with pytest.raises(ValueError, match="sorts, shuffles, drops or repeats"):
            run.train()
        assert not (tmp_path / when / "selection.json").exists()


def test_the_caller_gets_the_samples_untouched() -> None:
    samples = rows(6)
    check_order(takes_out, samples)
    assert samples == rows(6)
