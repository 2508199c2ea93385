"""`peftx compare --learning-rates`: chosen on a validation part, reported on a test part with intervals over seeds."""

# ruff: noqa: F811  (fixtures of another file)

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from test_train import SHORT, call, files, here, own_cache, trained  # noqa: F401  (fixtures)

from peftx.train import comparison, heads, report
from peftx.train.intervals import t_interval, t_quantile
from peftx.train.measures import scored
from peftx.train.metrics import MetricError
from peftx.train.picture import plot
from peftx.train.rates import SEED, best_rate, further, grid, parse_rates, settled_rate, summary


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 101])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_quantiles_are_students(freedom: int, level: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_intervals_of_paired_differences() -> None:
    values = [0.01, 0.03, -0.005, 0.02]
    found = t_interval(values)
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high)) and found.holds_zero
    assert not t_interval([0.01, 0.011]).holds_zero and t_interval([0.0, 0.0]).holds_zero and t_interval([1.0]) is None


def test_the_grid_is_of_factors_of_three_around_the_methods_own() -> None:
    assert grid(2e-3) == [0.000222, 0.000667, 0.002, 0.006, 0.018]
    assert grid(2e-3, 3) == grid(2e-3)[1:4]
    assert parse_rates("3e-3, 1e-4,1e-4") == [1e-4, 3e-3]
    assert parse_rates("auto") == 5 and parse_rates("auto:3") == 3
    for said in ("fast", "0,1", "nan", "1e-3,inf", "", ",", "auto:", "auto:-3"):
        with pytest.raises(ValueError, match="learning_rates must be auto, auto:3, or numbers above 0 by comma"):
            parse_rates(said)
    for said in ("auto:1", "auto:4", "auto:15"):
        with pytest.raises(ValueError, match="auto takes an odd number from 3 to 13"):
            parse_rates(said)


def test_the_best_rate_and_where_to_look_further() -> None:
    def accuracies(*values: float) -> dict[float, dict[str, float]]:
        return {rate: {"accuracy": value, "loss": 1.0} for rate, value in zip(grid(2e-3), values, strict=True)}

    assert best_rate(accuracies(0.5, 0.6, 0.8, 0.7, 0.5), "accuracy") == 2e-3
    assert further(2e-3, accuracies(0.5, 0.6, 0.8, 0.7, 0.5), "accuracy") is None
    assert further(2e-3, accuracies(0.5, 0.6, 0.8, 0.7, 0.9), "accuracy") == 0.054
    assert further(2e-3, accuracies(0.9, 0.6, 0.8, 0.7, 0.5), "accuracy") == 7.41e-05
    few = {rate: {"loss": abs(math.log(rate / 3e-2))} for rate in grid(2e-3, 3)}
    while (rate := further(2e-3, few, "loss")) is not None:
        few[rate] = {"loss": abs(math.log(rate / 3e-2))}
    assert sorted(few) == [0.000667, 0.002, 0.006, 0.018, 0.054] and best_rate(few, "loss") == 0.018
    far = accuracies(0.5, 0.6, 0.8, 0.7, 0.9) | {2e-3 * 3**6: {"accuracy": 1.0, "loss": 1.0}}
    assert further(2e-3, far, "accuracy") is None
    losses = {1e-3: {"loss": 2.0}, 1e-2: {"loss": 1.0}, 1e-1: {"loss": math.nan}, 1.0: None}
    assert best_rate(losses, "loss") == 1e-2
    equal = {
        1e-3: {"accuracy": 0.8, "loss": 2.0},
        1e-2: {"accuracy": 0.8, "loss": 1.0},
        2e-2: {"accuracy": 0.8, "loss": 1.0},
    }
    assert best_rate(equal, "accuracy") == 1e-2
    assert best_rate({1e-3: None, 1e-2: {"accuracy": math.nan}}, "accuracy") is None


def test_the_rate_is_the_nearest_to_the_methods_own_that_is_not_told_from_the_best() -> None:
    """With 100 samples, an accuracy of 0.8 has a standard error of 0.04."""

    def settled(*values: float, name: str = "accuracy", count: int = 100, own: float = 2e-3) -> float | None:
        return settled_rate(own, {rate: {name: v} for rate, v in zip(grid(2e-3), values, strict=True)}, name, count)

    assert settled(0.6, 0.7, 0.77, 0.8, 0.5) == 2e-3
    assert settled(0.6, 0.7, 0.75, 0.8, 0.5) == 6e-3 and settled(0.6, 0.7, 0.77, 0.8, 0.5, count=400) == 6e-3
    assert settled(0.79, 0.78, 0.5, 0.5, 0.8) == 0.000667 and settled(0.79, 0.78, 0.5, 0.5, 0.8, own=0.1) == 0.018
    assert settled(0.6, 1.0, 0.999, 1.0, 0.5) == 0.000667
    assert settled(0.6, math.nan, 0.77, 0.8, 0.5) == 2e-3
    assert settled(0.6, 0.7, 0.77, 0.8, 0.5, name="f1") == 6e-3
    assert settled(0.60, 0.59, 0.51, 0.50, 0.52, name="loss") == 6e-3
    assert settled_rate(2e-3, {1e-3: None, 1e-2: {"accuracy": math.nan}}, "accuracy", 100) is None


def runs_of(qualities: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    common = {"method_settings": {}, "learning_rate": 1e-3, "trained_values": {"adapter": 8, "whole_modules": 0}}
    common |= {"peak_memory": 1e6, "memory_of": "the process", "bytes": 32, "steps": 2, "samples": {"eval": 100}}
    return [
        {
            **common,
            "method": name,
            "seed": seed,
            "step_seconds": 0.5,
            "eval": {"loss": 1.0, "accuracy": value, "f1": 0.5 + seed},
        }
        for name, values in qualities.items()
        for seed, value in enumerate(values)
    ]


def test_a_classifier_whose_loss_is_lost_is_no_best() -> None:
    """Of logits that are nan, argmax is the first class: an accuracy, where that class is frequent."""
    measured = {1e-3: {"loss": 0.5, "accuracy": 0.8}, 1e3: {"loss": math.nan, "accuracy": 0.85}}
    assert best_rate(measured, "accuracy") == settled_rate(1e3, measured, "accuracy", 20) == 1e-3
    assert best_rate({1e3: measured[1e3]}, "accuracy") is None
    assert "diverged: bone at 1000" in summary({"bone": 1e-3}, {"bone": measured}, "accuracy", 20)
    runs = runs_of({"lora": (0.80, 0.82), "bone": (0.85, 0.87)})
    runs[2]["eval"]["loss"] = math.nan
    assert math.isnan(report.rows(runs)[1].quality) and "- diverged: bone with seed 0\n" in report.markdown(runs)


def test_a_bar_in_settings_is_no_column() -> None:
    runs = runs_of({"lora": (0.80,)})
    runs[0]["method_settings"] = {"target_modules": ".*(query|value)"}
    assert r"| target_modules=.*(query\|value) |" in report.markdown(runs)
    assert report.cells(report.rows(runs), runs)[1][0][1] == "target_modules=.*(query|value)"  # on the terminal


def test_a_proportion_is_of_what_has_an_answer() -> None:
    tokens = [{"input_ids": [1, 2, 3], "labels": [-100, 0, 1]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    assert scored(tokens, "TOKEN_CLS") == 3
    assert scored([{"input_ids": [1], "labels": 0}] * 4, "SEQ_CLS") == 4
    answered = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, -100]}]
    assert scored(answered, "CAUSAL_LM") == 1


def test_a_difference_whose_interval_holds_zero_is_no_difference() -> None:
    qualities = {"lora": (0.80, 0.82, 0.84), "bone": (0.85, 0.87, 0.88), "loldu": (0.75, 0.85, 0.83)}
    runs = runs_of(qualities)
    table = report.rows(runs)
    wanted = scipy.stats.ttest_rel(qualities["bone"], qualities["lora"]).confidence_interval(0.95)
    assert table[0].difference is None
    assert (table[1].difference.low, table[1].difference.high) == pytest.approx((wanted.low, wanted.high))
    heads, body = report.cells(table, runs)
    place = heads.index("less lora's")
    assert [line[place] for line in body] == ["", f"+0.0467 ± {(wanted.high - wanted.low) / 2:.4f}", "="]
    assert [line[heads.index("f1")] for line in body] == ["1.5000"] * 3
    assert table[2].others == {"f1": (1.5, pytest.approx(1.0))}
    assert "= where that holds 0" in report.notes(table, runs)[1]


def test_a_head_learns_at_a_rate_of_its_own(files: Path, tmp_path: Path) -> None:
    """The first step of AdamW is as long as the rate, where no gradient is tiny."""
    moved = {}
    for rate in (0, 0.05):
        out = tmp_path / str(rate)
        settings = ("--max-steps", 1, "--learning-rate", 1e-3, "--head-learning-rate", rate, "--set", "r=2")
        data = ("--model", files / "encoder", "--task", "SEQ_CLS", "--data", files / "classes.jsonl", "--output", out)
        metrics = trained("train", *data, *SHORT, *settings)
        assert metrics["head_learning_rate"] == rate and metrics["learning_rate"] == 1e-3
        moved[rate] = load_file(out / "adapter_model.safetensors")
    classifier = [name for name in moved[0] if "classifier" in name]
    assert classifier
    for name in classifier:
        torch.testing.assert_close(
            (moved[0.05][name] - moved[0][name]).abs().max(), torch.tensor(0.05), atol=1e-4, rtol=0
        )
    steps = [tensor.abs().max() for name, tensor in moved[0.05].items() if "lora_B" in name]
    torch.testing.assert_close(torch.stack(steps).max(), torch.tensor(1e-3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("named", [False, True])
def test_parameters_with_a_rate_of_their_own_keep_all_else(named: bool) -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b", "head.w", "head.b")}
    part = list(parameters.items()) if named else list(parameters.values())
    groups = [{"params": part[:3:2], "weight_decay": 0.1}, {"params": part[1::2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    heads.apart(optimizer, [parameters["head.w"], parameters["head.b"]], 0.5)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(["a"], 1e-3, 0.1), (["b"], 1e-3, 0.0), (["head.w"], 0.5, 0.1), (["head.b"], 0.5, 0.0)]
    if named:
        assert [g["param_names"] for g in optimizer.param_groups] == [["a"], ["b"], ["head.w"], ["head.b"]]
    with pytest.raises(ValueError, match="does not hold the head's parameters as they are"):
        heads.apart(optimizer, [torch.nn.Parameter(torch.ones(2))], 0.5)


# In comparisons


def given(files: Path, out: Path, *more: Any) -> tuple[Any, ...]:
    data = ("--model", files / "encoder", "--task", "SEQ_CLS", "--data", files / "classes.jsonl", "--output", out)
    return (*data, *SHORT, "--rank", 2, *more)


@pytest.mark.slow
def test_rates_are_chosen_on_samples_that_are_not_reported(files: Path, tmp_path: Path, here: list) -> None:
    out = tmp_path / "out"
    asked = ("--methods", "lora,bone", "--metric", "f1", "--eval-share", 0.3, "--validation-share", 0.25)
    outcome = call("compare", *given(files, out, *asked, "--learning-rates", "1e-3,0.05", "--seeds", 2))
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    found = json.loads((out / "results.json").read_text())
    tried = [(run["method"], run["learning_rate"], run["seed"]) for run in found["choices"]]
    assert tried == [(name, rate, SEED) for name in ("lora", "bone") for rate in (1e-3, 0.05)]
    assert all(
        run["samples"] == {"train": 21, "trained_on": 21, "validation": 7, "eval": 0} for run in found["choices"]
    )
    assert all("eval" not in run and run["validation"].keys() == {"loss", "accuracy", "f1"} for run in found["choices"])
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        (seed, name) for seed in (0, 1) for name in ("lora", "bone")
    ]
    for run in found["runs"]:
        points = {c["learning_rate"]: c["validation"] for c in found["choices"] if c["method"] == run["method"]}
        own = {"lora": 2e-3, "bone": 3e-4}[run["method"]]
        assert run["learning_rate"] == settled_rate(own, points, "accuracy", 7)
        assert run["head_learning_rate"] == 2e-3  # LoRA's own
        assert run["samples"] == {"train": 21, "trained_on": 21, "validation": 7, "eval": 12}
        assert run["eval"].keys() == {"loss", "accuracy", "f1"} and "validation" not in run
    assert [row["method"] for row in found["table"]] == ["lora", "bone"]
    with (out / "results.csv").open() as file:
        bone = list(csv.DictReader(file))[1]
    pairs = [[run["eval"]["accuracy"] for run in found["runs"] if run["method"] == name] for name in ("lora", "bone")]
    differences = [one - other for one, other in zip(pairs[1], pairs[0], strict=True)]
    assert float(bone["difference"]) == pytest.approx(sum(differences) / 2) == found["table"][1]["difference"]["mean"]
    page = (out / "results.md").read_text()
    assert "| less lora's |" in page and "within a standard error of the best of 2 by accuracy on 7 validation" in page
    assert "is at an end of the rates that were tried" in page
    assert "the new classifier learns at 0.002 in every run" in page
    assert not [path.name for path in out.iterdir() if path.name not in {
        ".peftx.json", "results.json", "results.md", "results.csv", "pareto.png", "lora", "bone",
    }]  # fmt: skip

    ran = len(here)
    outcome = call("compare", *given(files, out, *asked, "--learning-rates", "1e-3,0.05", "--seeds", 3))
    assert outcome.exit_code == 0 and len(here) == ran + 2, (outcome.output, outcome.exception)  # the third seed alone
    refused = call("compare", *given(files, out, "--methods", "lora,bone", "--metric", "f1", "--eval-share", 0.3))
    assert refused.exit_code == 2 and "is 'not given', but the comparison in" in refused.stderr


class Fake:
    """Runs that come to what `accuracy` says of a method and its rate, in place of trainings."""

    def __init__(self, run: dict[str, Any], accuracy: Any) -> None:
        self.run, self.accuracy = run, accuracy
        self.seen: list[tuple[str, float, int]] = []

    def __call__(self, function: Any, one: Any) -> dict[str, Any]:
        rate, seed = one.training["learning_rate"], one.training["seed"]
        self.seen.append((one.method, rate, seed))
        values = {"loss": 1.0, "accuracy": self.accuracy(one.method, rate, seed)}
        settings = comparison.plain(comparison.check_settings(comparison.find(one.method), one.method_settings))
        run = {**self.run, "method": one.method, "method_settings": settings, "seed": seed, "learning_rate": rate}
        return {**run, "validation": values} if seed == SEED else {**run, "eval": values}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_does_not_hide_the_others(value: float, tmp_path: Path) -> None:
    runs = runs_of({"lora": (0.80, 0.82), "bone": (value, 0.87), "loldu": (0.75, 0.85)})
    table = report.rows(runs)
    assert math.isnan(table[1].quality_std) and table[2].quality == pytest.approx(0.80)
    page = report.markdown(runs)
    assert f"{value} ± nan" in page and "- diverged: bone with seed 0\n" in page
    plot(runs, [], tmp_path / "pareto.png")
    assert report.front([(1.0, value), (2.0, 0.5)], more_is_better=False) == [1]


@pytest.fixture
def fake_run() -> dict[str, Any]:
    return {
        "steps": 2, "samples": {"train": 9, "eval": 4}, "trained_values": {"adapter": 8, "whole_modules": 2},
        "step_seconds": 0.1, "peak_memory": 1e6, "memory_of": "the process", "bytes": 10, "train_loss": 1.0,
    }  # fmt: skip


def test_auto_goes_on_where_the_best_is_at_an_end(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: dict
) -> None:
    """LoRA's best is two factors beyond its grid, Bone's inside; the rate at which FLoRA fails is passed over."""

    def accuracy(method: str, rate: float, seed: int) -> float:
        if method == "flora" and rate > 0.01:
            raise RuntimeError("linalg.svd: it did not converge")
        best = {"lora": 0.16, "bone": 3e-4, "flora": 6e-3}[method]
        return 0.9 - 0.25 * abs(math.log(rate / best, 3)) + 0.001 * (seed % 100)

    fake = Fake(fake_run, accuracy)
    monkeypatch.setattr(comparison, "apart", fake)
    out = tmp_path / "out"
    asked = ("--methods", "lora,bone,flora", "--learning-rates", "auto", "--seeds", 1)
    outcome = call("compare", *given(files, out, *asked))
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    tried = {
        name: sorted(rate for m, rate, seed in fake.seen if m == name and seed == SEED) for name in ("lora", "bone")
    }
    assert tried == {"lora": [0.000222, 0.000667, 0.002, 0.006, 0.018, 0.054, 0.162, 0.486], "bone": grid(3e-4)}
    reported = {method: rate for method, rate, seed in fake.seen if seed == 0}
    assert reported == {"lora": 0.162, "bone": 3e-4, "flora": 0.006}
    page = (out / "results.md").read_text()
    assert (
        "standard error of the best of 5 to 8 by accuracy" in page
        and "did not run: flora at 0.018 (linalg.svd: it did not" in page
    )

    count = len(fake.seen)
    outcome = call("compare", *given(files, out, *asked[:-1], 2))
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    again = fake.seen[count:]  # what failed is tried again, and each method has one more seed
    assert again == [("flora", 0.018, SEED), ("lora", 0.162, 1), ("bone", 3e-4, 1), ("flora", 0.006, 1)]


def test_a_rate_at_which_a_metric_fails_is_passed_over(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: dict
) -> None:
    def accuracy(method: str, rate: float, seed: int) -> float:
        if rate > 0.1:
            raise {"lora": MetricError("Input contains NaN"), "bone": OverflowError("too large")}[method]
        return 0.8

    monkeypatch.setattr(comparison, "apart", Fake(fake_run, accuracy))
    asked = ("--methods", "lora,bone", "--learning-rates", "1e-3,1", "--seeds", 1)
    outcome = call("compare", *given(files, tmp_path / "out", *asked))
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    page = (tmp_path / "out" / "results.md").read_text()
    assert "did not run: lora at 1 (Input contains NaN), bone at 1 (OverflowError: too large)" in page


@pytest.mark.parametrize("rates", [("--learning-rate", 1e-3), ("--learning-rates", "1e-3,1e-2")])
def test_whatever_a_method_raises_the_others_go_on(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: dict, rates: tuple
) -> None:
    def accuracy(method: str, rate: float, seed: int) -> float:
        return {"lora": 0.8, "flora": 0.7}[method]

    monkeypatch.setattr(comparison, "apart", Fake(fake_run, accuracy))
    out = tmp_path / "out"
    outcome = call("compare", *given(files, out, "--methods", "lora,bone,flora", "--seeds", 1, *rates))
    assert outcome.exit_code == 1 and "bone did not run: KeyError: 'bone'" in outcome.output, outcome.output
    assert [run["method"] for run in json.loads((out / "results.json").read_text())["runs"]] == ["lora", "flora"]


@pytest.mark.slow
def test_another_rate_replaces_the_runs_at_the_former(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: dict
) -> None:
    fake = Fake(fake_run, lambda method, rate, seed: 30 * rate)
    monkeypatch.setattr(comparison, "apart", fake)
    for rates, wanted in (("1e-3,1e-2", 1e-2), ("1e-3,1e-2,2e-2", 2e-2)):
        outcome = call(
            "compare", *given(files, tmp_path / "out", "--methods", "lora", "--learning-rates", rates, "--seeds", 2)
        )
        assert outcome.exit_code == 0, (outcome.output, outcome.exception)
        runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
        assert [(run["seed"], run["learning_rate"]) for run in runs] == [(0, wanted), (1, wanted)]


def test_without_a_head_its_rate_does_not_tie_a_comparison(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: dict
) -> None:
    """It is the first method's own by default, and the first method may change."""
    monkeypatch.setattr(comparison, "apart", Fake(fake_run, lambda method, rate, seed: 0.5))
    asked = ("--learning-rates", "1e-3", "--seeds", 1)
    fake_run["trained_values"] = {"adapter": 8, "whole_modules": 0}
    for methods in ("lora", "bone,lora"):
        outcome = call("compare", *given(files, tmp_path / "out", "--methods", methods, *asked))
        assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    fake_run["trained_values"] = {"adapter": 8, "whole_modules": 2}
    for methods, code in (("lora", 0), ("bone,lora", 2)):
        outcome = call("compare", *given(files, tmp_path / "headed", "--methods", methods, *asked))
        assert outcome.exit_code == code, (outcome.output, outcome.exception)
    assert "it is the first method's" in outcome.stderr


@pytest.mark.slow
def test_a_method_that_learns_at_no_rate_is_told(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: dict
) -> None:
    fake = Fake(fake_run, lambda method, rate, seed: math.nan if method == "bone" else 0.5)
    monkeypatch.setattr(comparison, "apart", fake)
    asked = ("--methods", "lora,bone", "--learning-rates", "1e-3,1e-2", "--seeds", 1)
    outcome = call("compare", *given(files, tmp_path / "out", *asked))
    assert outcome.exit_code == 1 and "bone did not run: no learning rate has a finite accuracy" in outcome.stderr
    assert [seen for seen in fake.seen if seen[2] == 0] == [("lora", 1e-3, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rates", "auto", "--learning-rate", "0.1"], "learning_rate is chosen from `learning_rates`"),
        (
            ["--learning-rates", "quick"],
            "learning_rates must be auto, auto:3, or numbers above 0 by comma, got 'quick'",
        ),
        (
            ["--learning-rates", "auto", "--validation-share", "0"],
            "are chosen on a validation part: name a validation_share",
        ),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--metric", "rouge"], "metric rouge compares texts, and a classifier has none"),
        (["--best-metric", "f1"], "best_metric is 'f1', which is not measured: there are loss, accuracy"),
    ],
)
def test_what_cannot_be_chosen(files: Path, tmp_path: Path, arguments: list[str], message: str, here: list) -> None:
    outcome = call("compare", *given(files, tmp_path / "out", *arguments))
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1 and not here


@pytest.mark.parametrize(
    "choices", [3, [3], [{}], [{"method": "lora"}], "x"], ids=str
)  # fmt: skip
def test_malformed_choices_are_one_error(files: Path, tmp_path: Path, choices: Any, here: list) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(json.dumps({"settings": {}, "runs": [], "choices": choices}))
    outcome = call("compare", *given(files, tmp_path / "out", "--learning-rates", "auto"))
    assert outcome.exit_code == 2 and "results.json is not what compare writes" in outcome.stderr and not here


@pytest.mark.slow
def test_two_jobs_come_to_what_one_does(files: Path, tmp_path: Path) -> None:
    asked = ("--methods", "lora", "--learning-rates", "1e-3,0.02", "--seeds", 2)
    found = []
    for jobs in (1, 2):
        outcome = call("compare", *given(files, tmp_path / str(jobs), *asked, "--jobs", jobs))
        assert outcome.exit_code == 0, (outcome.output, outcome.exception)
        page = json.loads((tmp_path / str(jobs) / "results.json").read_text())
        names = ("method", "seed", "learning_rate", "train_loss", "eval", "validation")
        found.append([[{name: run.get(name) for name in names} for run in page[part]] for part in ("runs", "choices")])
    assert found[0] == found[1] and [len(part) for part in found[0]] == [2, 2]
    assert "step and memory: with 2 runs at a time" in (tmp_path / "2" / "results.md").read_text()
