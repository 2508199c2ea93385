"""Metrics of `peftx train`: by name, by a script, of generated answers, and for the best checkpoint."""

# ruff: noqa: F811  (fixtures of another file)

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import sklearn.metrics
import torch
import transformers
from safetensors.torch import load_file
from test_train import SHORT, call, files, own_cache, trained  # noqa: F401  (fixtures)

from peftx.data.records import hold_out, read
from peftx.train import TrainSettings, run
from peftx.train.answers import generation_options, prompts_and_answers
from peftx.train.measures import Measures, best_key
from peftx.train.methods import find
from peftx.train.metrics import find_metric, more_is_better
from peftx.train.rouge import rouge

LABELS = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1, 0])
FOUND = np.array([0, 1, 0, 0, 1, 1, 1, 0, 1, 1])  # 4 true and 2 false positives, 1 false and 3 true negatives
SCRIPT = """
import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features(predictions=datasets.Value("{kind}"), references=datasets.Value("{kind}"))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"score": {value}, "kept": [1, 2], "first": str(references[0])}}
"""


def measures(*names: str, task: str = "SEQ_CLS", labels: tuple[str, ...] = ("no", "yes")) -> Measures:
    return Measures(tuple(find_metric(name, task, len(labels)) for name in names), task, labels)


@pytest.mark.parametrize(
    ("name", "key", "wanted"),
    [
        ("accuracy", "accuracy", 0.7),
        ("f1", "f1", 2 * 4 / (2 * 4 + 2 + 1)),
        ("precision", "precision", 4 / 6),
        ("recall", "recall", 4 / 5),
        ("f1:average=macro", "f1_macro", (8 / 11 + 6 / 9) / 2),
        ("f1:average=macro,pos_label=0", "f1_macro_0", (8 / 11 + 6 / 9) / 2),
        ("f1:pos_label=0", "f1_0", 6 / 9),
        ("matthews_correlation", "matthews_correlation", (4 * 3 - 2 * 1) / math.sqrt(6 * 5 * 5 * 4)),
        ("balanced_accuracy", "balanced_accuracy", (4 / 5 + 3 / 5) / 2),
    ],
)
def test_classes(name: str, key: str, wanted: float) -> None:
    assert measures(name).of_classes(None, FOUND, LABELS) == {key: pytest.approx(wanted, abs=1e-12)}


def test_more_than_two_classes_are_averaged_and_the_key_says_so() -> None:
    labels, found = np.array([0, 1, 2, 2, 1, 0]), np.array([0, 2, 2, 2, 1, 1])
    chosen = measures("f1", "recall:average=micro", labels=("a", "b", "c"))
    assert chosen.of_classes(None, found, labels) == {
        "f1_macro": pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3),
        "recall_micro": pytest.approx(4 / 6),
    }
    scores = np.random.default_rng(0).normal(size=(6, 3))
    soft = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    wanted = [sklearn.metrics.roc_auc_score(labels == i, soft[:, i]) for i in range(3)]
    assert measures("roc_auc", labels=("a", "b", "c")).of_classes(scores, found, labels) == {
        "roc_auc_ovr": pytest.approx(np.mean(wanted))
    }


def test_scores_are_probabilities_of_the_second_class() -> None:
    """Of all pairs of a positive and a negative, the share that is in order."""
    scores = np.stack([np.zeros(10), np.array([-2, 3, 1, -1, 0.5, 2, 0.7, -3, -1.5, 1.5])], 1)
    pairs = [(one, other) for one in scores[LABELS == 1, 1] for other in scores[LABELS == 0, 1]]
    wanted = np.mean([one > other for one, other in pairs])
    chosen = measures("roc_auc", "f1")
    assert chosen.with_scores and chosen.of_classes(scores, FOUND, LABELS)["roc_auc"] == pytest.approx(wanted)


def test_tokens_without_a_label_do_not_count() -> None:
    labels = np.array([[0, 1, -100], [-100, 1, 1]])
    found = np.array([[0, 1, 1], [0, 0, 1]])
    chosen = measures("f1", "accuracy", task="TOKEN_CLS")
    assert chosen.of_classes(None, found, labels) == {"f1": pytest.approx(0.8), "accuracy": 0.75}


def test_rouge_has_the_values_of_rouge_score() -> None:
    """Those of the package, version 0.1.2, for these texts; the last pair has nothing in common."""
    ours = ["The cat sat on the mat.\nIt was warm.", "b a c d", ""]
    theirs = ["A cat sat on a mat.\nIt was very warm, the cat.", "a b c d", "x"]
    first = {"rouge1": 0.761904761904762, "rouge2": 0.5263157894736842, "rougeL": 0.6666666666666666}
    assert rouge(ours[:1], theirs[:1]) == pytest.approx({**first, "rougeLsum": 0.761904761904762})
    assert rouge(ours[1:2], theirs[1:2]) == pytest.approx(
        {"rouge1": 1, "rouge2": 1 / 3, "rougeL": 0.75, "rougeLsum": 0.75}
    )
    assert rouge(ours, theirs)["rougeL"] == pytest.approx((0.6666666666666666 + 0.75 + 0) / 3)
    assert measures("exact_match", task="CAUSAL_LM").of_texts(["a", "b"], ["a", "B"]) == {"exact_match": 0.5}


def test_which_way_is_better() -> None:
    assert [
        name for name in ("f1", "loss", "perplexity", "rougeL", "wer", "eval/mse", "f1_macro") if more_is_better(name)
    ] == [
        "f1",
        "rougeL",
        "f1_macro",
    ]
    assert best_key("f1", "SEQ_CLS", ["f1_macro", "recall_macro"]) == "f1_macro"
    with pytest.raises(ValueError, match="'f2', which is not measured: there are loss, accuracy, f1_macro"):
        best_key("f2", "SEQ_CLS", ["f1_macro"])


def test_where_answers_begin() -> None:
    samples = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5], "labels": [-100]}]
    assert prompts_and_answers(samples, "CAUSAL_LM") == [([5, 6], [7, 8])]
    assert prompts_and_answers([{"input_ids": [5, 6], "labels": [7]}], "SEQ_2_SEQ_LM") == [([5, 6], [7])]
    assert generation_options({"max_new_tokens": 3, "num_beams": 2}) == {"max_new_tokens": 3, "num_beams": 2}


# In runs


def given(files: Path, out: Path, *more: Any) -> tuple[Any, ...]:
    return (
        "--model",
        files / "bert",
        "--data",
        files / "classes.jsonl",
        "--output",
        out,
        *SHORT,
        "--set",
        "r=2",
        *more,
    )


def test_metrics_are_in_the_results_and_on_the_card(files: Path, tmp_path: Path) -> None:
    """And the best checkpoint is chosen by one of them, on samples of its own."""
    out = tmp_path / "out"
    asked = ("--metric", "f1", "--metric", "matthews_correlation", "--metric", "roc_auc", "--best-metric", "roc_auc")
    rate = ("--learning-rate", 0.05, "--max-steps", 5, "--training", "save_steps=1", "--eval-share", 0.4)
    metrics = trained("train", *given(files, out, *asked, *rate, "--validation-share", 0.5))
    assert metrics["samples"] == {"train": 12, "trained_on": 12, "validation": 12, "eval": 16}
    assert metrics["eval"].keys() == {"loss", "accuracy", "f1", "matthews_correlation", "roc_auc"}

    log = [entry for entry in metrics["history"] if "eval_roc_auc" in entry][:5]
    step = min((entry for entry in log), key=lambda entry: (-entry["eval_roc_auc"], entry["step"]))["step"]
    assert metrics["best"] == {"metric": "roc_auc", "step": step} and len(log) == 5
    assert metrics["validation"]["roc_auc"] == pytest.approx(log[step - 1]["eval_roc_auc"])
    ends, best = (load_file(path / "adapter_model.safetensors") for path in (out, out / f"checkpoint-{step}"))
    torch.testing.assert_close(ends, best)

    # what the test part says is what the saved model says of it
    held = hold_out(read(str(files / "classes.jsonl")), 0.4)[1]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(files / "encoder", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "encoder")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in held])
    labels = [metrics["labels"].index(row["label"]) for row in held]
    wanted = sklearn.metrics.roc_auc_score(labels, logits.softmax(-1)[:, 1])
    assert metrics["eval"]["roc_auc"] == pytest.approx(wanted)
    assert metrics["eval"]["f1"] == pytest.approx(sklearn.metrics.f1_score(labels, logits.argmax(-1)))
    page = (out / "README.md").read_text()
    assert f"| f1, 16 held-out samples | {metrics['eval']['f1']:.4f} |" in page
    assert f"| checkpoint | of step {step}, the best by roc_auc on the validation samples |" in page


@pytest.mark.slow
def test_the_best_checkpoint_by_what_is_always_measured(files: Path, tmp_path: Path) -> None:
    """Of a language model perplexity, which is of all tokens; without a validation part the held-out one decides."""
    out = tmp_path / "out"
    data = ("--model", files / "llama", "--data", files / "pairs.jsonl", "--output", out, *SHORT, "--set", "r=2")
    steps = ("--max-steps", 3, "--training", "eval_steps=1", "--learning-rate", 0.3, "--validation-share", 0)
    metrics = trained("train", *data, *steps, "--best-metric", "perplexity")
    losses = {entry["step"]: entry["eval_token_loss"] for entry in metrics["history"] if "eval_token_loss" in entry}
    step = min((1, 2, 3), key=lambda step: losses[step])
    assert metrics["best"] == {"metric": "perplexity", "step": step} and "validation" not in metrics
    assert math.log(metrics["eval"]["perplexity"]) == pytest.approx(losses[step], rel=1e-5)
    assert (
        f"| checkpoint | of step {step}, the best by perplexity on the held-out samples |"
        in (out / "README.md").read_text()
    )


@pytest.mark.parametrize("model", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_generated_answers(files: Path, tmp_path: Path, model: str) -> None:
    """Greedy, one by one as in batches; the numbers are those of the answers."""
    out = tmp_path / "out"
    data = ("--model", files / model, "--data", files / "pairs.jsonl", "--output", out, *SHORT, "--set", "r=2")
    metrics = trained(
        "train", *data, "--generate", "--metric", "rouge", "--metric", "exact_match", "--learning-rate", 0.02
    )
    assert metrics["eval"].keys() == {
        "loss", "perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match",
    }  # fmt: skip
    kind = {"llama": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM}[model]
    tuned = peft.PeftModel.from_pretrained(kind.from_pretrained(files / model), out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / model)
    held = hold_out(read(str(files / "pairs.jsonl")), 0.1)[1]
    longest = max(len(tokenizer(row["answer"], add_special_tokens=model == "t5").input_ids) for row in held)
    longest += model == "llama" and tokenizer.eos_token_id is not None
    answers = []
    for row in held:
        prompt = tokenizer(row["question"] + "\n", return_tensors="pt")
        made = tuned.generate(**prompt, do_sample=False, max_new_tokens=longest)[0]
        made = made[prompt.input_ids.shape[1] :] if model == "llama" else made
        answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
    wanted = rouge(answers, [row["answer"] for row in held])
    assert {name: metrics["eval"][name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("bert", ["--metric", "rouge"], "metric rouge compares texts, and a classifier has none: there are accuracy"),
        ("bert", ["--metric", "f1", "--eval-share", 0], "a metric needs held-out samples"),
        (
            "bert",
            ["--metric", "f1", "--best-metric", "f2"],
            "'f2', which is not measured: there are loss, accuracy, f1",
        ),
        ("bert", ["--metric", "f1:average=most"], "metric f1:average=most cannot be computed: The 'average' parameter"),
        ("bert", ["--generate", "--metric", "f1"], "generate is for language models, and the task is SEQ_CLS"),
        ("bert", ["--best-metric", "f1", "--training", "load_best_model_at_end=true"], "is set by `best_metric`"),
        ("bert", ["--validation-share", 1], "validation_share must be in [0, 1), got 1"),
        ("llama", ["--metric", "rouge"], "metric rouge needs answers to compare, which --generate makes"),
        ("llama", ["--generate"], "generate: name what the answers are measured by"),
        (
            "llama",
            ["--generate", "--metric", "f1"],
            "metric f1 compares classes, and the answers have none: there are rouge",
        ),
        (
            "llama",
            ["--metric", "rouge", "--config", "{tmp}/odd.yaml"],
            "generate: unknown key 'max_tokens', did you mean",
        ),
        (
            "llama",
            ["--metric", "rouge", "--config", "{tmp}/beams.yaml"],
            "generate: num_beams must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    files: Path, tmp_path: Path, model: str, arguments: list, message: str
) -> None:
    (tmp_path / "odd.yaml").write_text("generate: {max_tokens: 3}")
    (tmp_path / "beams.yaml").write_text("generate: {num_beams: 0}")
    data = files / ("classes.jsonl" if model == "bert" else "pairs.jsonl")
    arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
    outcome = call("train", "--model", files / model, "--data", data, "--output", tmp_path / "out", *SHORT, *arguments)
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_part_with_one_label_has_no_roc_auc(files: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps({"text": f"w{i}", "label": "odd"}) for i in range(4)))
    outcome = call(
        "train", *given(files, tmp_path / "out", "--metric", "roc_auc", "--eval-data", tmp_path / "one.jsonl")
    )
    assert outcome.exit_code == 2 and "roc_auc of right answers is nan on the held-out part" in outcome.stderr


def test_best_metric_in_yaml(files: Path, tmp_path: Path) -> None:
    chosen = TrainSettings(
        model="m",
        data="d",
        output=str(tmp_path),
        metric="f1",
        best_metric="f1",
        training={"save_steps": 5, "use_cpu": True},
    )
    arguments = run.training_arguments(chosen, find("lora"))
    assert arguments.load_best_model_at_end and arguments.eval_strategy == arguments.save_strategy == "steps"
    assert chosen.validation == 0.1


@pytest.mark.slow
def test_a_script_and_unknown_names(files: Path, tmp_path: Path) -> None:
    """evaluate's own loader runs the script; there is no Hub."""
    pytest.importorskip("evaluate")
    for name, kind, value in (
        ("hits", "int32", "sum(p == r for p, r in zip(predictions, references))"),
        ("words", "string", "sum(p == r for p, r in zip(predictions, references)) / len(references)"),
    ):
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(kind=kind, value=value))
    hits, names = str(tmp_path / "hits.py"), str(tmp_path / "words.py")
    chosen = measures(hits, names, "accuracy")
    assert chosen.of_classes(None, FOUND, LABELS) == {"score": 7.0, "words_score": 0.7, "accuracy": 0.7}
    texts = measures(names, task="CAUSAL_LM")
    assert texts.of_texts(["a", "b"], ["a", "c"]) == {"score": 0.5}
    with pytest.raises(ValueError, match="compares classes, and the answers have none"):
        find_metric(hits, "CAUSAL_LM", 0)
    with pytest.raises(ValueError, match=r"unknown metric 'f2': there are accuracy, .*matthews_correlation.*evaluate"):
        find_metric("f2", "SEQ_CLS", 2)
    (tmp_path / "broken.py").write_text("import nothing_such\n")
    with pytest.raises(ValueError, match=r"broken.py cannot be loaded: .*nothing_such"):
        find_metric(str(tmp_path / "broken.py"), "SEQ_CLS", 2)
    metrics = trained(
        "train", *given(files, tmp_path / "out", "--metric", hits, "--best-metric", "score", "--max-steps", 2)
    )
    assert metrics["eval"]["score"] == metrics["eval"]["accuracy"] * metrics["samples"]["eval"]
