"""Lines of JSON as samples for a tokenizer: the data of the commands."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils import IGNORE

# Field names by which a prompt and its answer are known; joined by a line break where there is more than one.
PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("question",), "answer"),
    (("instruction", "input"), "output"),
    (("instruction", "context"), "response"),
)


def read_lines(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The lines of a JSONL file that are not blank, as they are and parsed.

    Raises:
        ValueError: the file is not UTF-8, a line is not a JSON object, or there is none.
        OSError: the file cannot be read.
    """
    try:
        page = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from None
    lines, records = [], []
    for number, line in enumerate(page.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON, one object a line ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not an object with named fields")
        lines.append(line)
        records.append(record)
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines, records


def text_of(record: Mapping[str, Any], field: str) -> str:
    if not isinstance(record[field], str | int | float):
        raise ValueError(f"its field {field!r} is not a text but a {type(record[field]).__name__}")
    return str(record[field])


def prompt_and_answer(
    record: Mapping[str, Any], tokenizer: Any, prompt: str | None, answer: str | None
) -> tuple[str, str]:
    """The two texts of a record: of the given fields, of chat `messages`, of the fields in `PAIRS`, or `text` alone."""
    if prompt or answer:
        return text_of(record, prompt) if prompt else "", text_of(record, answer or "text")
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError("its messages are not a list of objects with role and content")
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("the last of its messages is not the assistant's")
        try:
            given = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the chat template does not take its messages ({error})") from None
        if not whole.startswith(given):
            raise ValueError("the chat template does not write the prompt first: make prompt and completion fields")
        return given, whole[len(given) :]
    for fields, target in PAIRS:
        if fields[0] in record and target in record:
            parts = [text_of(record, field) for field in fields if record.get(field)]
            plain = fields == ("prompt",)  # TRL's form, joined as it is
            return "\n".join(parts) + ("" if plain else "\n"), text_of(record, target)
    if "text" in record:
        return "", text_of(record, "text")
    raise ValueError(f"found no prompt and answer among its fields {', '.join(record)}: name them")


def class_of(value: Any, label2id: Mapping[str, int] | None) -> int:
    """The number of a label, given as its name or as the number itself."""
    if isinstance(value, str):
        if value not in (label2id or {}):
            raise ValueError(f"label {value!r} is not one of the model's: {', '.join(label2id or {})}")
        return (label2id or {})[value]
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"label {value!r} is neither a name nor a whole number")
    return int(value)


def label_field(task: str, label: str | None) -> str:
    """The field of the labels: the named one, else `label`, or `labels` where each token has one."""
    return label or ("labels" if task == "TOKEN_CLS" else "label")


def longest(max_length: int, tokenizer: Any, config: Any) -> int:
    """Tokens of a sample: `max_length`, or what tokenizer and model can take where that is less."""
    limits = (max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    return min(limit for limit in limits if limit)


def encode(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    task: str,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    label: str | None = None,
    label2id: Mapping[str, int] | None = None,
    max_length: int = 1024,
) -> list[dict[str, Any]]:
    """`input_ids` and `labels` of each record. Of a causal LM only the answer, with its end token, has labels.

    For TOKEN_CLS a record has a list of words (field `prompt`, else `tokens`) and as many labels; of a word that the
    tokenizer splits, the first piece has the label, and the others have none, as in transformers' examples.

    Raises:
        ValueError: a record lacks a field; its number (from 1) is in the message.
    """

    def causal(record: Mapping[str, Any]) -> dict[str, Any]:
        given, wanted = prompt_and_answer(record, tokenizer, prompt, answer)
        chat = "messages" in record and not (prompt or answer)  # the template has written all special tokens
        start = tokenizer(given, add_special_tokens=not chat).input_ids if given or not chat else []
        if start and start[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            start = start[:-1]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and not chat else []
        target = tokenizer(wanted, add_special_tokens=False).input_ids + end
        ids, labels = start + target, [IGNORE] * len(start) + target
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    def translated(record: Mapping[str, Any]) -> dict[str, Any]:
        given, wanted = prompt_and_answer(record, tokenizer, prompt, answer)
        limits = {"truncation": True, "max_length": max_length}
        return {
            "input_ids": tokenizer(given, **limits).input_ids,
            "labels": tokenizer(text_target=wanted, **limits).input_ids,
        }

    def classified(record: Mapping[str, Any]) -> dict[str, Any]:
        text = tokenizer(text_of(record, prompt or "text"), truncation=True, max_length=max_length)
        return {"input_ids": text.input_ids, "labels": class_of(record[field], label2id)}

    def tagged(record: Mapping[str, Any]) -> dict[str, Any]:
        words, tags = record[prompt or "tokens"], record[field]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise ValueError(f"{prompt or 'tokens'} and {field} are not two lists of the same length")
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer does not tell which word a piece is of: a fast one is needed")
        text = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        numbers = [IGNORE if tag == IGNORE else class_of(tag, label2id) for tag in tags]
        of = text.word_ids()
        pairs = zip([None, *of], of, strict=False)
        labels = [IGNORE if word is None or word == before else numbers[word] for before, word in pairs]
        return {"input_ids": text.input_ids, "labels": labels}

    encoders: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "CAUSAL_LM": causal,
        "SEQ_2_SEQ_LM": translated,
        "SEQ_CLS": classified,
        "TOKEN_CLS": tagged,
    }
    field = label_field(task, label)
    if task not in encoders:
        raise ValueError(f"{task}: lines of JSON are for {', '.join(encoders)}; use peftx.pruning.score_dataset")
    samples = []
    for number, record in enumerate(records, 1):
        try:
            samples.append(encoders[task](record))
        except KeyError as error:
            raise ValueError(f"record {number} has no field {error}, only {', '.join(record)}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"record {number}: {error}") from None
    return samples


def padding_of(network: Any, tokenizer: Any) -> int:
    """The token that rows are filled with: the model's own, since classifiers on a decoder look for it, else the
    tokenizer's, else its end token."""
    ids = (getattr(network.config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None), 0)


def pad(samples: Sequence[Mapping[str, Any]], padding: int = 0) -> dict[str, Tensor]:
    """A batch, padded on the right: `input_ids`, `attention_mask`, `labels`."""

    def rows(name: str, value: int) -> Tensor:
        columns = [torch.tensor(sample[name]) for sample in samples]
        if columns[0].ndim == 0:
            return torch.stack(columns)
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    ids = rows("input_ids", padding)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": rows("labels", IGNORE)}
