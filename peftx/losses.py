"""Transformers' own losses: which label is compared with the logits of which token, and what a mean is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .utils import IGNORE, base_of

# Named like causal language models, or generating like them, these compare each label with the logits of its own place:
# decoders whose labels the caller shifts, and the permutation and masked models among the generating ones.
UNSHIFTED = frozenset(
    {
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "CpmAntForCausalLM",
        "FlaubertWithLMHeadModel",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MoshiDepthDecoder",
        "MusicgenForCausalLM",
        "MusicgenMelodyForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "ProphetNetForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
    }
)


def loss_type(model: nn.Module) -> str | None:
    """Transformers' name for the loss of a model, a key of its `LOSS_MAPPING`; None where it has none.

    A language model whose class says nothing (`GPT2LMHeadModel`, `BertLMHeadModel`, `MarianMTModel`) has "ForCausalLM",
    as transformers has it.
    """
    base = base_of(model)
    kind = getattr(base, "loss_type", None)
    if kind is None and hasattr(base, "can_generate") and base.can_generate():
        return "ForCausalLM"
    return kind


def shifts_labels(model: nn.Module) -> bool:
    """Whether a token's logits are compared with the label of the next, so that the first label of a row is left out.

    True of causal language models, but for those of `UNSHIFTED` (by class, subclasses too); false of masked ones, of
    encoder-decoders, whose inputs are shifted instead, and of classifiers.
    """
    base = base_of(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    if any(kind.__name__ in UNSHIFTED for kind in type(base).__mro__):
        return False
    return LOSS_MAPPING.get(loss_type(base) or "") is ForCausalLMLoss


def supervised(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many losses the model's own mean over a batch is taken over: tokens or records with a label, or records.

    Batches weighted by it add up to the mean over all of them at once.

    Args:
        model: adapted or not.
        batch: by name, as the model takes it: "labels" (batch,), (batch, tokens) or (batch, labels), or "shift_labels".
    """
    given = batch.get("shift_labels")
    labels: torch.Tensor = batch["labels"] if given is None else given
    config = getattr(base_of(model), "config", None)
    sequences = str(loss_type(model)).endswith("Classification") and loss_type(model) != "ForTokenClassification"
    if labels.is_floating_point() or (
        sequences and (getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", 0) == 1)
    ):
        return len(labels)
    if labels.ndim > 1 and given is None and shifts_labels(model):
        labels = labels[..., 1:]
    return int((labels != IGNORE).sum())
