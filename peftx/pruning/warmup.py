"""A short run before scoring, undone afterwards: a fresh classifier says nothing about samples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import logging

from ..utils import forked_rng, is_stream
from .collation import check_order
from .rows import Stream, Table
from .scorer import check_samples

SHARE, LEAST = 0.1, 200


def warmup_length(count: int, batch_size: int) -> int:
    """Steps of the default warm-up: a tenth of an epoch, at least 200 steps, at most one epoch.

    On SST-2 with MiniLM 50 steps were too few: the model still leaned to one class (benchmarks/pruning_noise.py).
    """
    epoch = -(-count // batch_size)
    return min(epoch, max(LEAST, round(SHARE * epoch)))


@contextmanager
def warmed_up(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list], Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[nn.Module]:
    """The model after `steps` steps of AdamW on random samples; when the block ends, all of it is as before.

    Trains what `requires_grad` with a learning rate that falls linearly to 0, no weight decay and gradients clipped to
    norm 1, outside autocast. The paper does not say when to score, nor how a head that is not pre-trained gets there.

    Raises:
        ValueError: nothing trains, or the model gives no loss.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("when='warmup' trains the model for a while, but none of its parameters requires a gradient")
    kept = [(tensor, tensor.detach().clone()) for tensor in (*parameters, *model.buffers())]
    gradients = [parameter.grad for parameter in parameters]
    modes = {module: module.training for module in model.modules()}
    with forked_rng(model):
        if batch_size > 1:
            rows = Stream(dataset) if is_stream(dataset) else Table(dataset, range(len(dataset)))
            samples = rows.read(0, batch_size) if isinstance(rows, Stream) else rows.spread(batch_size)
            check_samples(samples)
            check_order(collator, samples)
        try:
            torch.manual_seed(seed)
            model.train()
            fit(model, parameters, dataset, collator, steps, learning_rate, batch_size, seed, progress)
            for module, mode in modes.items():
                module.training = mode
            yield model
        finally:
            with torch.no_grad():
                for tensor, start in kept:
                    tensor.copy_(start)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for module, mode in modes.items():
                module.training = mode


def fit(
    model: nn.Module,
    parameters: list[nn.Parameter],
    dataset: Any,
    collator: Callable[[list], Mapping[str, Any]],
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> None:
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    shuffle = None if isinstance(dataset, IterableDataset) else True
    loader = DataLoader(dataset, batch_size, shuffle=shuffle, collate_fn=collator, generator=generator)
    with torch.enable_grad(), logging.tqdm(total=steps, desc="warm-up", unit="step", disable=not progress) as bar:
        for _, batch in zip(range(steps), cycle_over(loader), strict=False):
            loss = model(
                **{key: part.to(device) if isinstance(part, Tensor) else part for key, part in batch.items()}
            ).loss
            if loss is None:
                raise ValueError("the model gives no loss to warm up with: when='start', or labels in the batch")
            optimizer.zero_grad()
            if loss.isfinite():  # a batch without a supervised token has none
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            schedule.step()
            bar.update()


def cycle_over(loader: DataLoader) -> Iterator[Any]:
    """Epoch after epoch, each in a new order."""
    while True:
        yield from loader
