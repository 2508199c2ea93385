"""Records as samples for a tokenizer: the data of the commands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..utils import CLASSIFIERS, IGNORE
from .fields import TOKENS, EmptyError, Messages, chat_of, class_of, label_field, text_field, text_of, texts_of


def chat_texts(given: Messages, wanted: Messages, tokenizer: Any) -> tuple[str, str]:
    """Prompt and answer as the tokenizer's chat template writes them.

    Raises:
        ValueError: there is no template, or it does not take these turns.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the tokenizer has no chat template to write its messages with: take an instruct model, or make fields of "
            "prompt and completion"
        )
    try:
        start = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*given, *wanted], tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template does not take its messages ({error})") from None
    if not whole.startswith(start):
        raise ValueError("the chat template does not write the prompt first: make prompt and completion fields")
    return start, whole[len(start) :]


def longest(max_length: int, tokenizer: Any, config: Any) -> int:
    """Tokens of a sample: `max_length`, or what tokenizer and model can take where that is less."""
    limits = (max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    return min(limit for limit in limits if limit)


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Errors of records name the file that these are from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from error


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

    def sides(record: Mapping[str, Any]) -> tuple[str, str, bool]:
        turns = chat_of(record, prompt, answer)
        texts = texts_of(record, prompt, answer) if turns is None else chat_texts(*turns, tokenizer)
        return *texts, turns is not None

    def causal(record: Mapping[str, Any]) -> dict[str, Any]:
        given, wanted, chat = sides(record)  # of a chat the template has written all special tokens
        start = tokenizer(given, add_special_tokens=not chat).input_ids if given or not chat else []
        if start and start[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            start = start[:-1]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and not chat else []
        target = tokenizer(wanted, add_special_tokens=False).input_ids + end
        ids, labels = start + target, [IGNORE] * len(start) + target
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    def translated(record: Mapping[str, Any]) -> dict[str, Any]:
        given, wanted, _ = sides(record)
        limits = {"truncation": True, "max_length": max_length}
        return {
            "input_ids": tokenizer(given, **limits).input_ids,
            "labels": tokenizer(text_target=wanted, **limits).input_ids,
        }

    def classified(record: Mapping[str, Any]) -> dict[str, Any]:
        text = tokenizer(text_of(record, text_field(record, prompt)), truncation=True, max_length=max_length)
        return {"input_ids": text.input_ids, "labels": class_of(record[field], label2id, field)}

    def tagged(record: Mapping[str, Any]) -> dict[str, Any]:
        column = prompt or next((name for name in TOKENS if name in record), TOKENS[0])
        words, tags = record[column], record[field]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise ValueError(f"{column} and {field} are not two lists of the same length")
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
    if task not in encoders:
        raise ValueError(f"{task}: records are for {', '.join(encoders)}; use peftx.pruning.score_dataset")
    field = label or (label_field(task, None, records) if task in CLASSIFIERS else "")
    samples = []
    empty: dict[str, list[int]] = {}
    for number, record in enumerate(records, 1):
        try:
            samples.append(encoders[task](record))
        except EmptyError as error:
            empty.setdefault(error.field, []).append(number)
        except KeyError as error:
            raise ValueError(f"record {number} has no field {error}, only {', '.join(record)}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"record {number}: {error}") from None
    for name, rows in empty.items():
        shown = f"{', '.join(map(str, rows[:10]))}{', ...' if len(rows) > 10 else ''}"
        which = f"record {shown} has" if len(rows) == 1 else f"{len(rows)} records have ({shown})"
        raise ValueError(f"{which} an empty field {name!r}: fill it, or leave them out")
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
