"""Every argument is checked where it is given, in one error that names it and its value."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_pruning import pad_rows, rows, small
from test_pruning_callback import trainer

import peftx
from peftx.pruning import preference, score_dataset, select, topsis

NO_WHOLE: list[Any] = [1.5, True, False, math.nan, math.inf, "x", "3", [1], 1.0, torch.tensor(2.0), {}]
NO_NUMBER: list[Any] = [True, math.nan, math.inf, -1.0, 0, "x", "0.1", [0.1], None, 1j, 1e200]
NO_NAME: list[Any] = [5, 1.5, True, b"x", ["donod"], math.nan, ""]
NO_FLAG: list[Any] = [1, 0, "yes", 1.0, math.nan, []]

CALLBACK: dict[str, list[Any]] = {
    "keep": [0, -0.5, 1.5, True, math.nan, "0.3", None, [0.3], 1j],
    "method": [*NO_NAME, None, "best", "DONOD"],
    "don_goal": [*NO_NAME, None, "up"],
    "goal": [*NO_NAME, "up"],
    "weights": [*NO_NUMBER, "12", (1,), (1, 2, 3), (1, "a"), (1, True), (1, math.nan), (0, 0), (1, -1), {1: 2, 3: 4}],
    "balanced": NO_FLAG,
    "when": [*NO_NAME, "later"],
    "warmup_steps": [*NO_WHOLE, 0, -1],
    "batch_size": [*NO_WHOLE, 0, -1],
    "eta": NO_NUMBER,
    "reduction": [*NO_NAME, None, "max"],
    "task": [*NO_NAME, "QA"],
    "head": NO_NAME,
    "seed": [*NO_WHOLE, -1, 2**63, None],
    "report": [*NO_FLAG, None],
    "overwrite": [*NO_FLAG, None],
}
PROBE = ("batch_size", "eta", "reduction", "task", "head", "seed")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CALLBACK.items() for value in values])
def test_the_callback_refuses(name: str, value: Any) -> None:
    settings = {"method": "nod"} if name == "goal" else {}
    with pytest.raises(ValueError, match=name.replace("warmup_steps", "warmup_steps must be")) as caught:
        peftx.DonodCallback(**settings, **{name: value})
    assert repr(value)[:6] in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("batch_size", "eta", "reduction", "task", "head", "seed")
            for value in CALLBACK[name]
        ),
        *(("metrics", value) for value in ("don", 5, None, ["don", 5], [True], {"don": 1}, [["don"]], 1.5)),
        *(("indices", value) for value in ([0, 1.5], [True], ["1"], [-1], [10], range(5, 11), range(-2, 3), 3, "01")),
        ("indices", torch.tensor([0.0, 1.0])),
        ("indices", [math.nan]),
        *(("progress", value) for value in [*NO_FLAG, None]),
        *(("shard", value) for value in [*NO_FLAG, None]),
        *(("part_rows", value) for value in [*NO_WHOLE, 0, -1, None]),
        *(("collator", value) for value in (5, "pad", [1])),
        *(("model", value) for value in (5, None, "llama")),
        *(("dataset", value) for value in (5, None, "data.jsonl", {"train": rows()}, 1.5)),
    ],
)
def test_score_dataset_refuses(name: str, value: Any) -> None:
    if name in ("batch_size", "eta") and value is None:
        value = math.nan
    arguments = {"model": MODEL, "dataset": rows(), "collator": pad_rows, "progress": False, name: value}
    known = {"dataset": "cannot be pruned", "metrics": "metric"}
    with pytest.raises(ValueError, match=known.get(name, name)) as caught:
        score_dataset(**arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


MODEL = small("llama")
SCORES = {"don": torch.arange(4.0), "nod": torch.arange(4.0), "loss": torch.arange(4.0)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("keep", "method", "don_goal", "goal", "weights", "balanced")
        for value in CALLBACK[name]
    ],
)
def test_select_refuses(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"keep": 0.5, "method": "loss" if name == "goal" else "donod"}
    with pytest.raises(ValueError, match=name):
        select(SCORES, **{**settings, name: value})
    if name not in ("keep", "balanced"):
        del settings["keep"]
        with pytest.raises(ValueError, match=name):
            preference(SCORES, **{**settings, name: value})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1, 2], "scores must be what score_dataset returns"),
        (None, "scores must be"),
        ({**SCORES, "don": "abcd"}, r"scores\['don'\] must be numbers"),
        ({**SCORES, "don": torch.ones(4, 2)}, r"scores\['don'\] must be \(n,\), one number a sample, got \(4, 2\)"),
        ({**SCORES, "nod": torch.ones(3)}, r"scores\['nod'\] must be \(4,\).*got \(3,\)"),
        ({**SCORES, "label": torch.ones(5)}, r"scores\['label'\] must be \(4,\)"),
        ({**SCORES, "label": ["a", "b", "c", "d"]}, r"scores\['label'\] must be numbers"),
        ({**SCORES, "label": torch.tensor([0, 1, math.nan, 0])}, r"scores\['label'\] has NaN"),
    ],
)
def test_scores_are_checked(scores: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(scores, 0.5)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    callback = peftx.DonodCallback(
        np.float32(0.5), weights=np.array([1, 2]), warmup_steps=np.int64(3), seed=np.int32(1), eta=np.float32(1e-3)
    )
    assert type(callback.keep) is float and callback.weights == (1.0, 2.0) and type(callback.seed) is int
    for indices in (np.array([3, 1]), torch.tensor([3, 1]), (np.int64(3), 1), range(3, 0, -2)):
        found = score_dataset(MODEL, rows(), pad_rows, indices=indices, progress=False)
        torch.testing.assert_close(found, score_dataset(MODEL, rows(), pad_rows, indices=[3, 1], progress=False))
    assert select({"loss": [3, 1, 2]}, 1 / 3, "loss") == [1]
    assert topsis(torch.ones(2, 2), (True, False), torch.tensor([1.0, 2.0])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [None, 5, "trainer", MODEL])
def test_attach_wants_a_trainer(value: Any) -> None:
    with pytest.raises(ValueError, match="trainer must be a transformers Trainer, got a"):
        peftx.DonodCallback().attach(value)


def test_a_head_is_no_path(tmp_path: Any) -> None:
    run = trainer(tmp_path / "run", peftx.DonodCallback(head="../../x"))
    with pytest.raises(ValueError, match=r"head='../../x': the LlamaForCausalLM has no module of that name"):
        run.train()
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["run"])
