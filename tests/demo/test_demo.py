"""The demo's data set, and the whole demo on a tiny encoder."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from datasets import DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import peftx
from peftx.demo import data, model, picture, report, run
from peftx.demo.errors import DemoError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A folder with a two-layer BERT and a tokenizer that knows the commonest words of the task."""
    folder = tmp_path_factory.mktemp("encoder")
    words = Counter(word for text, _ in data.examples() for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    vocabulary = SPECIAL + [word for word, _ in words.most_common(2000) if word not in SPECIAL]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.1, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(tiny_encoder) -> DatasetDict:
    return data.load(model.tokenizer(tiny_encoder))


def families(part) -> list[str]:
    return part.features["label"].int2str(part["label"])


def test_task_is_the_size_we_say(task):
    texts = len(task["train"]) + len(task["test"])
    assert 1000 < texts < 3000
    assert len(task["test"]) == pytest.approx(texts * data.HELD_OUT, abs=1)
    assert task["train"].features["label"].num_classes == data.FAMILIES
    assert set(families(task["train"])) == set(families(task["test"])) == set(task["train"].features["label"].names)
    assert max(map(len, task["train"]["input_ids"])) == data.MAX_TOKENS


def test_split_is_stratified(task):
    shares = [Counter(families(part)) for part in task.values()]
    for family in shares[0]:
        train, test = (counts[family] / counts.total() for counts in shares)
        assert train == pytest.approx(test, abs=2 / len(task["test"]))


def test_no_text_names_its_family_and_none_comes_twice(task):
    rows = [row for part in task.values() for row in part]
    names = task["train"].features["label"].names
    assert not [row["text"] for row in rows if any(name in row["text"].lower() for name in names)]
    assert len({tuple(row["input_ids"]) for row in rows}) == len(rows)


def test_task_is_deterministic(task, tiny_encoder):
    data.library.cache_clear()
    again = data.load(model.tokenizer(tiny_encoder))
    assert all(task[part].to_dict() == again[part].to_dict() for part in task)


def test_limit_keeps_all_families(tiny_encoder):
    small = data.load(model.tokenizer(tiny_encoder), limit=200)
    assert sum(map(len, small.values())) == 200
    assert len(set(families(small["test"]))) == data.FAMILIES


SOURCE = '''"""Docstring of a module, which is left out."""
class A:
    """The  class
    in NAME."""
    def f(self):
        """Too short."""
'''


def test_sources_leave_out_tests_and_private_copies(tmp_path):
    for name in ("json/__init__.py", "json/_private.py", "json/tests/test_it.py", "json/decoder.py", "_json.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.replace("NAME", name))
    found = data.library(tmp_path)
    assert found["json"] == ["The class in json/__init__.py.", "The class in json/decoder.py."]
    assert sum(map(len, found.values())) == 2


def test_without_sources_there_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(data, "library", lambda: {name: [] for name in "abcdefgh"})
    with pytest.raises(DemoError, match="no sources of Python's standard library"):
        data.examples()


def test_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    with pytest.raises(DemoError, match=r'pip install "peftx\[demo\]"'):
        model.default_folder()


def test_encoder_package_is_not_imported():
    folder = model.default_folder()
    assert (folder / "model.safetensors").stat().st_size > 90_000_000
    assert model.PACKAGE not in sys.modules


def test_adapted_layers_and_head(tiny_encoder):
    base = model.classifier(tiny_encoder, labels=3, seed=0)
    assert model.head_modules(base) == ["pooler", "classifier"]
    adapted = model.adapted_modules(base)
    assert len(adapted) == 2 * 6
    assert not [name for name in adapted if "pooler" in name or "classifier" in name]


def test_without_dropout_a_training_step_repeats_itself(tiny_encoder, task):
    base = model.classifier(tiny_encoder, labels=3, seed=0).train()
    ids = torch.tensor([task["train"][0]["input_ids"]])
    assert not torch.equal(base(ids).logits, base(ids).logits)
    assert model.without_dropout(base) is base and base.training
    assert torch.equal(base(ids).logits, base(ids).logits)


@pytest.fixture(scope="module")
def learned(tiny_encoder, tmp_path_factory) -> run.Report:
    return run.run(run.Options(tiny_encoder, tmp_path_factory.mktemp("learned") / "out", epochs=2, texts=240))


@pytest.fixture(scope="module")
def outcome(tiny_encoder, tmp_path_factory) -> run.Report:
    watched: list[tuple[str, int, int, float]] = []
    folder, few = tmp_path_factory.mktemp("demo") / "out", ("lora", "bone", "bone-bat", "compacter", "gradnormlorp")
    options = run.Options(tiny_encoder, folder, few, epochs=0.5, texts=120)
    outcome = run.run(options, lambda *step: watched.append(step))
    assert len(watched) == sum(len(result.losses) for result in outcome.results)
    assert {name for name, *_ in watched} == {result.name for result in outcome.results}
    return outcome


@pytest.mark.slow
def test_every_method_runs_learns_and_survives_saving_and_merging(learned):
    variants = [name for info in peftx.methods() for name in info.variants]
    assert [result.name for result in learned.results] == ["lora", *variants]
    for result in learned.results:
        assert result.equal, result
        start, end = picture.smooth(result.losses)[2], picture.smooth(result.losses)[-1]
        assert end < start, result.name
        assert result.held_out_loss < learned.start_loss, result.name


@pytest.mark.slow
def test_comparison_is_fair(learned):
    steps = 2 * 192 // 8
    assert {len(result.losses) for result in learned.results} == {steps}
    assert {len(result.step_seconds) for result in learned.results} == {steps}
    assert len({result.head_parameters for result in learned.results}) == 1
    first = [result.losses[0] for result in learned.results]  # same head and batch, adapters start as the identity
    assert first == pytest.approx([first[0]] * len(first), abs=1e-3)
    assert learned.step_ratio(learned.results[0]) == 1.0


def test_report_files(outcome):
    paths = report.write(outcome)
    assert [path.name for path in paths] == ["results.md", "results.json", "results.png"]
    table = paths[0].read_text(encoding="utf-8")
    saved = json.loads(paths[1].read_text(encoding="utf-8"))
    for result in outcome.results:
        assert f"| {result.name} | {result.accuracy:.3f} |" in table
        assert (
            outcome.options.output / result.name / "adapter_model.safetensors"
        ).stat().st_size == result.adapter_bytes
    assert [row["name"] for row in saved["results"]] == [result.name for result in outcome.results]
    assert saved["versions"]["peftx"] == peftx.__version__
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert report.table(outcome).row_count == len(outcome.results) + 2
    best = max(result.accuracy for result in outcome.results)
    assert report.headline(outcome).startswith(f"{outcome.best.name} gets {round(best * outcome.test_texts)} of ")


def test_what_is_a_plain_lora_is_exported_and_loads_without_us(outcome):
    for result in outcome.results:
        folder = outcome.options.output / result.name / run.PLAIN
        exported = result.name not in ("lora", "bone-bat", "compacter", "krona")  # the last is of the tests
        assert folder.is_dir() == exported == (result.exported_difference is not None), result.name
        if exported:
            assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_broken_adapter_is_reported(outcome):
    broken = replace(outcome.results[1], merged_difference=0.5)
    assert not broken.equal
    assert "DIFFERS" in report.markdown(replace(outcome, results=[outcome.results[0], broken]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("bone", "bonne")}, "unknown method bonne: the demo knows lora, "),
        ({"epochs": 0}, "epochs must be a positive number, got 0"),
        ({"model": Path("no-such-folder")}, "no model in no-such-folder"),
        ({"output": Path(__file__)}, "cannot write to the folder"),
    ],
)
def test_mistakes_are_told_before_the_work(change, message, tiny_encoder, tmp_path):
    with pytest.raises(DemoError, match=re.escape(message)):
        run.run(run.Options(**({"model": tiny_encoder, "output": tmp_path / "out"} | change)))
