"""Answers that a language model generates to the prompts of held-out samples, for the metrics that compare texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig

from ..utils import IGNORE, base_of, quiet, undisturbed
from .heads import HeadTrainer
from .settings import Section, checked

OPTIONS: dict[str, Any] = {  # of transformers.GenerationConfig: those that change an answer
    "max_new_tokens": int,
    "min_new_tokens": int,
    "num_beams": int,
    "early_stopping": bool,
    "length_penalty": float,
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "use_cache": bool,
}
Measure = Callable[[list[str], list[str]], dict[str, float]]


class AnsweringTrainer(HeadTrainer):
    """A Trainer whose evaluations generate answers as well, and measure them.

    Args:
        task: CAUSAL_LM or SEQ_2_SEQ_LM.
        measure: makes numbers of answers and of what the samples say.
        options: of `generate`; greedy, and as long as the longest answer of the samples, where they are silent.
        padding: the token that prompts are filled with.

    Raises:
        ValueError: the model is in parts (FSDP, DeepSpeed).
    """

    def __init__(self, *args: Any, task: str, measure: Measure, options: Section, padding: int, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("generate needs the whole model in each process: leave it out under FSDP and DeepSpeed")
        self.task, self.measure, self.options, self.padding = task, measure, options, padding

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        assert output.metrics is not None
        answers, references = self.answered(dataloader.dataset)
        found = self.measure(answers, references)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def answered(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """What the model answers and what the samples say, without special tokens; every process has all of it."""
        tokenizer: Any = self.processing_class
        pairs = prompts_and_answers(samples, self.task)
        if not pairs:
            raise ValueError("no held-out sample has an answer within max_length: raise it")
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # rows of one batch are of similar lengths
        mine = order[self.args.process_index :: self.args.world_size]
        limit = max(len(answer) for _, answer in pairs)
        model: Any = self.accelerator.unwrap_model(self.model)
        size = self.args.per_device_eval_batch_size
        ours: list[tuple[int, list[int]]] = []
        with undisturbed(model), torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(mine), size):
                rows = mine[start : start + size]
                ours += zip(rows, self.generate(model, [pairs[i][0] for i in rows], limit), strict=True)
        found = dict(gather_object(ours) if self.args.world_size > 1 else ours)
        texts = [[found[i] for i in range(len(pairs))], [answer for _, answer in pairs]]
        answers, references = (
            [text.strip() for text in tokenizer.batch_decode(part, skip_special_tokens=True)] for part in texts
        )
        return answers, references

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """New tokens for each prompt. Prompts are padded on the left, as decoders need it; on the right otherwise."""
        decoder = self.task == "CAUSAL_LM"
        width = max(map(len, prompts))
        device = next(model.parameters()).device
        rows = torch.full((len(prompts), width), self.padding, device=device)
        mask = torch.zeros_like(rows)
        for i, prompt in enumerate(prompts):
            place = slice(width - len(prompt), None) if decoder else slice(len(prompt))
            rows[i, place] = torch.tensor(prompt, device=device)
            mask[i, place] = 1
        places = getattr(base_of(model).config, "max_position_embeddings", None)
        if decoder and places:
            limit = max(1, min(limit, places - width))
        ends: Any = base_of(model).generation_config.eos_token_id
        own = getattr(self.processing_class, "eos_token_id", None)
        options: Section = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": self.padding, **self.options}
        if ends is None and own is not None:
            options.setdefault("eos_token_id", own)
        made: Tensor = model.generate(input_ids=rows, attention_mask=mask, **options)
        return [row[width:].tolist() if decoder else row.tolist() for row in made]


def prompts_and_answers(samples: Sequence[Mapping[str, Any]], task: str) -> list[tuple[list[int], list[int]]]:
    """Token ids of both, of each sample with an answer: of a causal LM labels say where it begins."""
    found = []
    for sample in samples:
        ids, labels = list(sample["input_ids"]), list(sample["labels"])
        answer = [label for label in labels if label != IGNORE]
        if task == "CAUSAL_LM":
            ids = ids[: next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))]
        if answer and ids:
            found.append((ids, answer))
    return found


def generation_options(given: Section) -> Section:
    """Arguments of `generate`, checked by name and value.

    Raises:
        ValueError: transformers' GenerationConfig does not know one, or does not take its value.
    """
    chosen = checked(given, OPTIONS, "generate")
    for name in ("max_new_tokens", "num_beams"):
        if chosen.get(name, 1) < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {chosen[name]}")
    try:
        with quiet():
            GenerationConfig(**{"do_sample": False, **chosen}).validate(strict=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generate: {' '.join(str(error).split())}") from error
    return chosen
