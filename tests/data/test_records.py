"""Data as people have it: files of every kind, and fields by the names that they have."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from peftx.data.fields import label_field
from peftx.data.records import label_names, read
from peftx.data.text import IGNORE, encode

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of single words, which it knows by themselves."""
    words = [
        "<user>",
        "<assistant>",
        "<system>",
        "<tool>",
        "<end>",
        "a",
        "b",
        "c",
        "d",
        "e",
        "what",
        "is",
        "it",
        "yes",
        "no",
        "Hi",
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *words])}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def sides(tokenizer: Any, record: Any, **names: Any) -> tuple[str, str]:
    """What is given to the model, and what it is to answer."""
    (sample,) = encode([record], tokenizer, "CAUSAL_LM", **names)
    ids, labels = sample["input_ids"], sample["labels"]
    start = labels.count(IGNORE)
    assert all(x == IGNORE for x in labels[:start]) and labels[start:] == ids[start:]
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "what is it", "completion": "a b"},
        {"prompt": "what is it", "response": "a b"},
        {"prompt": "what is it", "answer": "a b"},
        {"question": "what is it", "answer": "a b"},
        {"question": "what is it", "response": "a b"},
        {"query": "what is it", "response": "a b"},
        {"input": "what is it", "target": "a b"},
        {"inputs": "what is it", "targets": "a b"},
        {"input": "what is it", "output": "a b"},
        {"source": "what is it", "target": "a b"},
        {"problem": "what is it", "solution": "a b"},
        {"instruction": "what is it", "response": "a b"},
        {"instruction": "what is it", "input": "", "output": "a b"},
        {"instruction": "what", "input": "is it", "output": "a b"},
        {"instruction": "what", "context": "is it", "response": "a b"},
        {"instruction": "what", "input": "is it", "response": "a b"},
        {"instruction": "what", "input": "is it", "answer": "a b"},
        {"user": "what is it", "assistant": "a b"},
        {"Question": "what is it", "Answer": "a b", "id": 3},
        {"text": "what is it", "summary": "a b"},
        {"id": "1", "dialogue": "what is it", "summary": "a b"},
        {"document": "what is it", "summary": "a b"},
        {"article": "what is it", "highlights": "a b", "id": "1"},
        {"query": "what is it", "response": "a b", "document": "c"},
    ],
    ids=lambda record: "-".join(record),
)
def test_prompt_and_answer_are_found(tokenizer: Any, record: dict) -> None:
    assert sides(tokenizer, record) == ("what is it", "a b <eos>")


SHARED = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "is it"}]
SHARED += [{"from": "gpt", "value": "yes"}]
TURNS = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a"}]
TURNS += [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}]
WRITTEN = "<user> what <end> <assistant> a <end> <user> is it <end> <assistant>"


@pytest.mark.parametrize(
    ("record", "given"),
    [
        ({"messages": TURNS}, WRITTEN),
        ({"conversations": SHARED}, WRITTEN),
        ({"conversation": SHARED}, WRITTEN),
        ({"conversations": TURNS}, WRITTEN),
        ({"conversations": SHARED, "system": "Hi"}, f"<system> Hi <end> {WRITTEN}"),
        ({"conversations": [{"from": "system", "value": "Hi"}, *SHARED]}, f"<system> Hi <end> {WRITTEN}"),
        ({"id": "1", "conversations": [{"from": t["from"].upper(), "value": t["value"]} for t in SHARED]}, WRITTEN),
        ({"prompt": TURNS[:-1], "completion": TURNS[-1:]}, WRITTEN),
        ({"prompt": TURNS[:-1], "completion": "yes"}, WRITTEN),
    ],
)
def test_chats(tokenizer: Any, record: dict, given: str) -> None:
    assert sides(tokenizer, record) == (given, "yes <end>")


def test_a_conversational_completion_may_have_turns_of_its_own(tokenizer: Any) -> None:
    found = sides(tokenizer, {"prompt": TURNS[:1], "completion": TURNS[1:]})
    assert found == ("<user> what <end> <assistant>", "a <end> <user> is it <end> <assistant> yes <end>")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": SHARED[:-1]}, "the last of its conversations is not the assistant's"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "a turn of its conversations is by 'cat', none of user"),
        ({"conversations": [{"who": "human", "what": "a"}]}, "has the fields who, what, not role and content"),
        ({"conversations": "hello"}, "are not a list of objects with role and content"),
        ({"conversations": []}, "the last of its conversations is not the assistant's"),
        ({"conversations": None}, "record 1 has an empty field 'conversations'"),
        (
            {"messages": [*TURNS[:-1], {"role": "assistant", "content": ""}]},
            "an empty field 'content of the last turn'",
        ),
        ({"prompt": TURNS[:1], "completion": TURNS[2:3]}, "the last of its completion is not the assistant's"),
        ({"question": "a", "answer": None}, "record 1 has an empty field 'answer'"),
        ({"question": "a", "answer": " "}, "record 1 has an empty field 'answer'"),
        ({"question": "a", "answer": {"text": "b"}}, "its field 'answer' is not a text but a dict"),
        ({"problem": "a", "solution": "b", "output": "c"}, "output and solution may each be the answer: name one by"),
        ({"query": "a", "source": "b", "answer": "c"}, "query and source may each be the prompt: name one by --prompt"),
        ({"x": "a", "y": "b"}, "found no prompt and answer among its fields x, y: name them by --prompt and --answer"),
        ({"prompt": "a", "y": "b"}, "found no answer to its 'prompt' among its fields prompt, y: name it by --answer"),
        ({"x": "a", "Answer": "b"}, "found no prompt of its 'Answer' among its fields x, Answer: name it by --prompt"),
    ],
)
def test_what_is_no_prompt_and_answer(tokenizer: Any, record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode([record], tokenizer, "CAUSAL_LM")


def test_a_chat_without_a_template_is_told(tokenizer: Any) -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(ValueError, match="record 1: the tokenizer has no chat template to write its messages with"):
        encode([{"messages": TURNS}], bare, "CAUSAL_LM")


def test_empty_fields_are_counted_and_named(tokenizer: Any) -> None:
    records = [{"question": "a", "answer": "b"} for _ in range(30)]
    for i in (2, 6, 7):
        records[i] = {"question": "a", "answer": ""}
    with pytest.raises(ValueError, match=r"3 records have \(3, 7, 8\) an empty field 'answer': fill it, or leave"):
        encode(records, tokenizer, "CAUSAL_LM")
    records = [{"question": "a", "answer": None} for _ in range(30)]
    with pytest.raises(ValueError, match=r"30 records have \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\) an empty field"):
        encode(records, tokenizer, "CAUSAL_LM")


@pytest.mark.parametrize("text", ["text", "sentence", "content", "review", "Text", "tweet"])
@pytest.mark.parametrize("label", ["label", "Label", "labels", "class", "category", "sentiment", "target"])
def test_text_and_label_are_found(tokenizer: Any, text: str, label: str) -> None:
    records = [{"idx": 7, text: "a b", label: 1}, {"idx": 8, text: "c", label: 0}]
    assert label_names(records, label_field("SEQ_CLS", None, records)) == ["LABEL_0", "LABEL_1"]
    assert encode(records, tokenizer, "SEQ_CLS") == [
        {"input_ids": tokenizer("a b").input_ids, "labels": 1},
        {"input_ids": tokenizer("c").input_ids, "labels": 0},
    ]


@pytest.mark.parametrize(
    ("record", "label", "message"),
    [
        ({"text": "a", "label": 1}, "lable", "no record has the label field 'lable': the fields are text, label"),
        ({"text": "a", "stars": 1}, None, "the fields are text, stars; name the one of the labels by --label"),
        ({"text": "a", "topic": 1, "intent": 2}, None, "intent and topic may each be the label: name one by --label"),
    ],
)
def test_a_label_that_is_not_found_lists_the_fields(record: dict, label: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_field("SEQ_CLS", label, [record])


def test_two_texts_are_not_guessed(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="content and body may each be the text: name one by --prompt"):
        encode([{"content": "a", "body": "b", "label": 0}], tokenizer, "SEQ_CLS")
    with pytest.raises(ValueError, match="found no text among its fields premise, label: name it by --prompt"):
        encode([{"premise": "a", "label": 0}], tokenizer, "SEQ_CLS")


def test_words_and_their_tags_by_other_names(tokenizer: Any) -> None:
    (sample,) = encode([{"words": ["a", "b"], "ner_tags": [0, 1]}], tokenizer, "TOKEN_CLS")
    assert sample["labels"] == [0, 1]


ROWS = [{"sentence": 'a, "b"; c', "label": 1}, {"sentence": "d\ne", "label": 0}]

QUOTES = [{"sentence": '"a b', "label": 1}, {"sentence": 'd "e', "label": 0}]


@pytest.mark.parametrize(
    ("name", "page", "wanted"),
    [
        ("a.csv", 'sentence,label\n"a, ""b""; c",1\n"d\ne",0\n', ROWS),
        ("a.csv", 'sentence;label\r\n"a, ""b""; c";1\r\n"d\ne";0\r\n', ROWS),
        ("A.CSV", '\ufeffsentence;label\n"a, ""b""; c";1\n\n"d\ne";0', ROWS),
        ("a.csv", 'sep=;\nsentence;label\n"a, ""b""; c";1\n"d\ne";0', ROWS),
        ("a.csv", 'sentence\tlabel\n"a, ""b""; c"\t1\n"d\ne"\t0\n', ROWS),
        ("a.tsv", 'sentence\tlabel\n"a, ""b""; c"\t1\n"d\ne"\t0\n', ROWS),
        ("a.tsv", 'sentence\tlabel\n"a b\t1\nd "e\t0\n', QUOTES),
        ("a.csv", "text,label\nNA,0\nnull,1\n", [{"text": "NA", "label": 0}, {"text": "null", "label": 1}]),
        ("a.csv", "text,n\na,007\nb,12\n", [{"text": "a", "n": "007"}, {"text": "b", "n": "12"}]),
        ("a.csv", "text,n\na,1.0\nb,0.0\n", [{"text": "a", "n": 1.0}, {"text": "b", "n": 0.0}]),
        ("a.csv", "text,label\na,\n ,1\n", [{"text": "a", "label": None}, {"text": None, "label": 1}]),
        ("a.csv", " text , label\na\u2028b,x\n", [{"text": "a\u2028b", "label": "x"}]),
        ("a.csv", "text\na\nb\n", [{"text": "a"}, {"text": "b"}]),
        ("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\r\n', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '\ufeff[{"text": "a"}]', [{"text": "a"}]),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '{"data": [{"text": "a"}]}', [{"text": "a"}]),
        ("a.json", '{"text": ["a", "b"], "label": [1, 0]}', [{"text": "a", "label": 1}, {"text": "b", "label": 0}]),
    ],
)  # fmt: skip
def test_files_of_every_kind(tmp_path: Path, name: str, page: str, wanted: Any) -> None:
    (tmp_path / name).write_bytes(page.encode())
    assert read(str(tmp_path / name)) == wanted


@pytest.mark.parametrize(
    ("name", "page", "message"),
    [
        ("a.csv", "text,label\na,1\nb,c,0\n", "line 3 has 3 cells between ',', the first line 2"),
        ("a.csv", 'text,label\n"a,1\nb,0\n', "cannot read .*a.csv: line 3: unexpected end of data"),
        ("a.csv", "text,text\na,1\n", "its first line must name each column once, got text, text"),
        ("a.csv", "text,\na,1\n", "its first line must name each column once"),
        ("a.csv", "text,label\n", "a.csv is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.tsv", "text\tlabel\na\n", "line 2 has 1 cells"),
        ("a.csv", "text,label\ncaf\xe9,1\n".encode("latin-1"), "is not UTF-8 .line 2: .*Latin-1 or UTF-16, it may be"),
        ("a.jsonl", '{"text": "caf\xe9"}\n'.encode("latin-1"), "is not UTF-8 .line 1"),
        ("a.json", '[{"text": "caf\xe9"}]'.encode("latin-1"), "is not UTF-8"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "is not UTF-8"),
        ("a.json", "[1, 2]", "not a list of objects with named fields"),
        ("a.json", "[", "not JSON"),
        ("a.json", "[]", "a.json is empty"),
        ("a.json", '{"a": [1], "b": []}', "its columns are not of one length"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.txt", "a", "neither a folder nor a file that is known by its ending"),
        ("a.parquet", "PAR1", "cannot read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, page: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(page if isinstance(page, bytes) else page.encode())
    with pytest.raises(ValueError, match=message):
        read(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_pipe_or_a_folder_is_no_file(tmp_path: Path, name: str) -> None:
    import os

    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is no file that can be read"):
        read(str(tmp_path / name))


def test_a_field_of_a_csv_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{'a' * 200_000},1\n")
    assert len(read(str(tmp_path / "a.csv"))[0]["text"]) == 200_000


def test_rows_of_a_file_are_those_of_json(tmp_path: Path, tokenizer: Any) -> None:
    """One reader for all: the same samples from the same rows, whatever the file."""
    rows = [{"prompt": "what is it", "answer": str(i)} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("prompt;answer\n" + "\n".join(f"what is it;{i}" for i in range(3)))
    samples = [encode(read(str(tmp_path / name)), tokenizer, "CAUSAL_LM") for name in ("a.jsonl", "a.json", "a.csv")]
    assert samples[0] == samples[1] == samples[2]
