"""Before and after: how good a model is on held-out data, and fine-tuning what compression has made of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..utils import undisturbed
from .checks import check_callable, check_count, check_flag, check_number, check_whole

Collator = Callable[[list], Mapping[str, Any]]


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Sequence[Any], collator: Collator, *, batch_size: int = 16, progress: bool = False
) -> dict[str, float]:
    """`loss`, the mean over supervised tokens (of a classifier: samples), in nats; of a classifier also `accuracy`.

    In eval mode; every module's mode and the random number generators are as before afterwards.

    Raises:
        ValueError: an argument out of range; nothing is supervised; the model is compiled, wrapped, split or offloaded.
    """
    from ..losses import supervised

    check_whole(model, "evaluate it")
    _check_data(dataset, collator)
    check_count("batch_size", batch_size)
    check_flag("progress", progress)

    device = next(model.parameters()).device
    loss = right = total = 0.0
    classifier = False
    with undisturbed(model):
        loader: Any = DataLoader(dataset, batch_size, collate_fn=collator)  # type: ignore[arg-type]
        for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not progress):
            inputs = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}
            labels, output = inputs["labels"], model(**inputs)
            classifier = labels.ndim == 1
            count = supervised(model, inputs)
            if count:  # the mean over nothing is NaN
                loss += float(output.loss) * count
            total += count
            if classifier:
                right += int((output.logits.argmax(-1) == labels).sum())
    if not total:
        raise ValueError("no held-out sample has a label")
    return {"loss": loss / total} | ({"accuracy": right / total} if classifier else {})


def recover(
    model: nn.Module,
    dataset: Sequence[Any],
    collator: Collator,
    *,
    epochs: float = 1.0,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    max_steps: int = -1,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Fine-tunes all parameters of a compressed model with the transformers `Trainer`, in place, and writes no file.

    AdamW, the rate falling linearly to 0 after a twentieth of the steps. The paper, as we recall it,
    fine-tunes for a few epochs; how the factors' rate should differ from the original one it does not say. For anything
    else, use a `Trainer`: the compressed model is an ordinary one.

    A model in half precision trains in float32, where small steps are not rounded away, and gets its dtype back.

    Args:
        model: whole, in memory, not wrapped or compiled.
        dataset: samples, of any length above 0.
        collator: makes a batch with labels of a list of them.
        epochs: passes over the data, above 0; a part of one will do.
        learning_rate: at its highest, above 0.
        batch_size: samples of a step on each device.
        max_steps: at most so many steps, instead of `epochs`; -1 for no such limit.
        seed: of the order and dropout, 0 to 2^32 - 1.
        progress: show a bar with the time left.

    Raises:
        ValueError: an argument out of range, before anything changes.
    """
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

    from ..progress import Progress
    from ..utils import forked_rng

    check_whole(model, "fine-tune it")
    _check_data(dataset, collator)
    check_number("epochs", epochs, above=0)
    check_number("learning_rate", learning_rate, above=0)
    check_count("batch_size", batch_size)
    if max_steps != -1 or isinstance(max_steps, bool | float):
        check_count("max_steps", max_steps)
    check_count("seed", seed, 0, most=2**32)
    check_flag("progress", progress)
    model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder, forked_rng(model), in_float32(model):
        set_seed(seed)
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=0.05,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not progress,
            dataloader_pin_memory=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, collator, dataset)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(Progress("recovering"))
        trainer.train()
    model.eval()


def _check_data(dataset: Any, collator: Any) -> None:
    """Raises:
    ValueError: no samples that can be counted, or nothing that makes batches of them.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"dataset must have a length and indices, and a {type(dataset).__name__} has not")
    if not len(dataset):
        raise ValueError("the data set is empty")
    check_callable("collator", collator)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Tensors of less than 32 bits are float32; afterwards they have their dtype again."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    narrow = {tensor: tensor.dtype for tensor in tensors if tensor.dtype.itemsize < 4}
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in narrow.items():
            tensor.data = tensor.data.to(dtype)
