"""What several packages need around the passes of a model, or a `Trainer`."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import IterableDataset

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


IGNORE = -100  # label of what has no loss, as torch and transformers have it
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
AUTO_CLASSES = {  # PEFT's task types and the classes of transformers that load their models
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def innermost(module: nn.Module) -> Any:
    """The layer under all tuner layers, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_of(model: Any) -> Any:
    """The transformers model, with whatever PEFT put inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_stream(dataset: Any) -> bool:
    """Whether the data has no indices, and is read from its start: a `datasets.IterableDataset`, torch's, ..."""
    table = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return not table or isinstance(dataset, IterableDataset)


def plain(text: str) -> str:
    """Text from a file, fit for a terminal or a picture: what is not printable (escape sequences) stands as code."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def forked_rng(model: nn.Module) -> Any:
    """`torch.random.fork_rng` for the CPU and the devices that the model is on."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type in ("cuda", "xpu")}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(devices=sorted(devices, key=str), device_type=kind)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports and bars of loading and saving, and what it grumbles about PEFT."""
    from transformers.utils import logging

    with muted(logging, logging.ERROR), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


@contextmanager
def muted(logging: Any, level: int) -> Iterator[None]:
    """A library's `logging` of transformers' kind (`datasets` has it too): from `level` on, and without bars."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(level)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module's mode and all random number generators are as before."""
    training = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    with forked_rng(model):
        model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether positions start again inside a row."""
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 3:
        return False
    before = batch.get("attention_mask")
    real = before[:, :-2] != 0 if isinstance(before, Tensor) and before.shape == positions.shape else True
    return bool(((positions[:, 1:-1] == 0) & (positions[:, 2:] == 1) & real).any())


def columns_of(trainer: Trainer, dataset: Any) -> tuple[Any, Any]:
    """The data and the collator as the trainer's own loaders have them: only with columns that the model takes."""
    if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
        return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


def trainer_above(frame: FrameType | None, callback: TrainerCallback) -> Trainer | None:
    """The trainer with this callback that is at work further up the stack: no event of it says which."""
    from transformers import Trainer

    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None
