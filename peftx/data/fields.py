"""What people call the fields of their data: the prompt, the answer, the text, the label, the turns of a chat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Messages = list[dict[str, Any]]

# Prompt and answer that belong together wherever both are there; joined by a line break where there is more than one.
PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("prompt",), "answer"),
    (("question",), "answer"),
    (("instruction", "input", "context"), "output"),
    (("instruction", "input", "context"), "response"),
    (("dialogue",), "summary"),
    (("document",), "summary"),
    (("article",), "summary"),
    (("article",), "highlights"),
)
# Otherwise one of each, which must be the only one of its kind.
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "inputs", "source", "user", "human")
ANSWERS = (
    "completion",
    "response",
    "answer",
    "output",
    "outputs",
    "target",
    "targets",
    "solution",
    "reply",
    "assistant",
    "summary",
)
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue")
TEXTS = ("text", "sentence", "content", "review", "comment", "tweet", "document", "utterance", "body", "description")
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "emotion", "topic", "y")
TOKENS = ("tokens", "words")
TAGS = ("labels", "tags", "ner_tags", "pos_tags", "chunk_tags", "label")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer", "tool"), None),  # as they are
}


class EmptyError(ValueError):
    """A field that is needed holds nothing."""

    def __init__(self, field: str) -> None:
        super().__init__(f"its field {field!r} is empty")
        self.field = field


def is_empty(value: Any) -> bool:
    """None, a text of spaces, or the NaN that pandas has for an empty cell."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def named(record: Record, name: str) -> str | None:
    """The field with this name, else with this name in other case; None where there is none, or more than one."""
    if name in record:
        return name
    found = [field for field in record if isinstance(field, str) and field.strip().lower() == name.lower()]
    return found[0] if len(found) == 1 else None


def only(record: Record, names: Iterable[str], what: str, option: str) -> str | None:
    """The one field of the record that is among `names`; None where there is none.

    Raises:
        ValueError: there are several.
    """
    found = [field for field in (named(record, name) for name in names) if field is not None]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} may each be the {what}: name one by --{option}")
    return found[0] if found else None


def text_field(record: Record, given: str | None) -> str:
    """Of the text of a classifier.

    Raises:
        KeyError: there is no such field.
        ValueError: none is known, or several.
    """
    if given:
        return given
    found = named(record, "text") or named(record, "sentence") or only(record, TEXTS, "text", "prompt")
    if found is None:
        raise ValueError(f"found no text among its fields {', '.join(record)}: name it by --prompt")
    return found


def label_field(task: str, label: str | None, records: Sequence[Record]) -> str:
    """The field of the labels: the named one, else the one that is called like one.

    Raises:
        ValueError: no record has it; or it is called like none, or several are. The message lists the fields.
    """
    fields = list(dict.fromkeys(field for record in records for field in record))
    table = dict.fromkeys(fields)
    if label is not None:
        if label not in table:
            raise ValueError(f"no record has the label field {label!r}: the fields are {', '.join(fields)}")
        return label
    kinds = TAGS if task == "TOKEN_CLS" else LABELS
    found = named(table, kinds[0]) or only(table, kinds, "label", "label")
    if found is None:
        raise ValueError(
            f"a classifier needs samples of at least two labels, found none in the field {kinds[0]!r}: the fields are "
            f"{', '.join(fields)}; name the one of the labels by --label"
        )
    return found


def text_of(record: Record, field: str, *, empty: bool = False) -> str:
    """The text in a field.

    Raises:
        KeyError: there is no such field.
        EmptyError: it holds nothing, unless `empty` allows an empty text.
        ValueError: it holds no text.
    """
    value = record[field]
    if is_empty(value) and not (empty and isinstance(value, str)):
        raise EmptyError(field)
    if not isinstance(value, str | int | float):
        raise ValueError(f"its field {field!r} is not a text but a {type(value).__name__}")
    return str(value)


def messages_of(record: Record, field: str) -> Messages:
    """The turns in a field as `role` and `content`: also ShareGPT's `from` and `value`.

    Raises:
        ValueError: there are none, or one has no known role or no text.
    """
    turns = record[field]
    if is_empty(turns):
        raise EmptyError(field)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"its {field} are not a list of objects with role and content")
    found: Messages = []
    for turn in turns:
        role, content = named(turn, "role") or named(turn, "from"), named(turn, "content") or named(turn, "value")
        if role is None or content is None:
            raise ValueError(f"a turn of its {field} has the fields {', '.join(turn)}, not role and content")
        name = str(turn[role]).strip().lower()
        if name not in ROLES:
            raise ValueError(f"a turn of its {field} is by {turn[role]!r}, none of {', '.join(ROLES)}")
        rest = {key: value for key, value in turn.items() if key not in (role, content)}
        found.append({**rest, "role": ROLES[name] or name, "content": turn[content]})
    return found


def chat_of(record: Record, prompt: str | None, answer: str | None) -> tuple[Messages, Messages] | None:
    """What is asked and what is answered, where the record is a chat; None where it is texts.

    Raises:
        ValueError: see `messages_of`; or the last turn is not the assistant's.
    """
    field = next((f for f in (named(record, n) for n in CHATS) if f), None)
    if not (prompt or answer) and field and not (isinstance(record[field], str) and named(record, "summary")):
        turns = messages_of(record, field)
        given, wanted = turns[:-1], turns[-1:]
        if not wanted or wanted[0]["role"] != "assistant":
            raise ValueError(f"the last of its {field} is not the assistant's")
    else:
        fields = (prompt, answer) if prompt and answer else ("prompt", "completion")
        if any(name not in record for name in fields) or not any(isinstance(record[name], list) for name in fields):
            return None
        roles = ("user", "assistant")
        parts = [
            messages_of(record, name)
            if isinstance(record[name], list)
            else [{"role": role, "content": text_of(record, name)}]
            for name, role in zip(fields, roles, strict=True)
        ]
        given, wanted = parts
        if not wanted or wanted[-1]["role"] != "assistant":
            raise ValueError(f"the last of its {fields[1]} is not the assistant's")
    if is_empty(wanted[-1]["content"]) and not wanted[-1].get("tool_calls"):
        raise EmptyError(answer or "content of the last turn")
    system = record.get("system")  # of datasets that have it beside the turns
    if isinstance(system, str) and system.strip() and (not given or given[0]["role"] != "system"):
        given = [{"role": "system", "content": system}, *given]
    return given, wanted


def texts_of(record: Record, prompt: str | None, answer: str | None) -> tuple[str, str]:
    """Prompt and answer of a record: of the given fields, of the fields in `PAIRS`, of others, or `text` alone.

    Raises:
        ValueError: none, or more than one, is known.
    """
    if prompt or answer:
        return text_of(record, prompt, empty=True) if prompt else "", text_of(record, answer or "text")
    for names, target in PAIRS:
        found = [named(record, name) for name in names]
        reply = named(record, target)
        if found[0] is not None and reply is not None:
            return joined(record, found[0], [name for name in found[1:] if name is not None]), text_of(record, reply)
    alone = named(record, "text")
    reply = only(record, ANSWERS, "answer", "answer")
    asked = [name for name in PROMPTS if named(record, name)]
    if "instruction" in asked:  # an input is part of it
        asked = [name for name in asked if name not in ("input", "inputs")]
    first = only(record, asked, "prompt", "prompt")
    if reply is not None and first is None:
        first = alone
    if first is not None and reply is not None:
        more = [named(record, name) for name in ("input", "context") if first.lower() == "instruction"]
        return joined(record, first, [name for name in more if name is not None]), text_of(record, reply)
    if alone is not None:
        return "", text_of(record, alone)
    fields = ", ".join(record)
    if first is not None:
        raise ValueError(f"found no answer to its {first!r} among its fields {fields}: name it by --answer")
    if reply is not None:
        raise ValueError(f"found no prompt of its {reply!r} among its fields {fields}: name it by --prompt")
    raise ValueError(f"found no prompt and answer among its fields {fields}: name them by --prompt and --answer")


def joined(record: Record, first: str, more: Sequence[str]) -> str:
    """A prompt of one field or several: TRL's `prompt` as it is, others with a line break behind each."""
    if first.lower() == "prompt":
        return text_of(record, first, empty=True)
    parts = [text_of(record, first), *(text_of(record, name) for name in more if not is_empty(record[name]))]
    return "\n".join(parts) + "\n"


def class_of(value: Any, label2id: Mapping[str, int] | None, field: str = "label") -> int:
    """The number of a label, given as its name or as the number itself."""
    if is_empty(value):
        raise EmptyError(field)
    if isinstance(value, str):
        if value not in (label2id or {}):
            raise ValueError(f"label {value!r} is not one of the model's: {', '.join(label2id or {})}")
        return (label2id or {})[value]
    if not isinstance(value, int | float) or not math.isfinite(value) or not float(value).is_integer():
        raise ValueError(f"label {value!r} is neither a name nor a whole number")
    if label2id and not 0 <= value < len(label2id):
        raise ValueError(f"label {value!r} is the number of none of the model's: {', '.join(label2id)}")
    return int(value)
