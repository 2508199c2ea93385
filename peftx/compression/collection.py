"""Statistics of a model's layers from one pass over data, without a Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import default_data_collator
from transformers.utils import logging

from ..utils import IGNORE, is_packed, is_stream, undisturbed
from .checks import SEEDS, check_callable, check_count, check_flag, check_modules, check_whole
from .hooks import Collector
from .layers import target_layers
from .settings import check_settings
from .statistics import Statistics

SAMPLES = 1024  # enough for row sums, which are means over many entries


def collect(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list], Mapping[str, Any]] | None = None,
    *,
    what: str | Sequence[str] = ("fisher",),
    estimator: str = "per_sample",
    directions: int | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    batch_size: int = 8,
    max_samples: int | None = SAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> Statistics:
    """Statistics of the linear layers of `model` as it is, in eval mode; nothing about the model is changed. Of fused
    experts of a mixture each is a layer, of the tokens that are routed to it (`LayerStatistics`).

    For `"fisher"` every batch goes forward and backward, through the model's own loss, and weights get no gradient: it
    may be frozen or adapted, and existing `.grad` stays. The loss of a sample is the sum over its supervised tokens
    (one for a classifier), so a long answer counts more; means over tokens or samples are undone. Labels are the
    data's: the empirical Fisher information, as of FWSVD (arXiv:2207.00112). `"abs"` and `"gram"` need no labels, and
    alone only the forward pass; padding, by the attention mask, does not count.

    Args:
        model: of transformers, or a PEFT model around one; plain, not wrapped by DDP, FSDP or DeepSpeed.
        dataset: anything with a length and integer indices.
        collator: makes a batch, with `labels` for `"fisher"`, from a list of samples. Default: transformers'
            `default_data_collator`.
        what: of `"fisher"` (or `"fisher_in"`, `"fisher_out"` for one side), `"abs"` (mean |x|, ASVD, arXiv:2312.05821)
            and `"gram"` (mean x x^T, SVD-LLM, arXiv:2403.07378; as large as a square weight each, and of a stack of
            experts one for each of them).
        estimator: `"per_sample"`, the definition: squares of each sample's gradient; or `"per_batch"`: of the whole
            batch's, divided by its samples, which is the same in expectation where the mean gradient is 0.
        directions: estimate each sum of squares from so many random combinations; see `Collector`.
        target_modules, exclude_modules: see `target_layers`.
        batch_size: samples in a forward pass.
        max_samples: how many, drawn at random without repetition; None for all. The default of 1024 is ours: the
            paper does not say, and some hundred samples are usual.
        seed: of the draw, and of `directions`.
        progress: show a bar with the time left.

    Raises:
        ValueError: an argument out of range; no samples, no layers, no labels or loss, gradients that are not finite;
            packed rows that attend across samples; a model that is compiled, wrapped, split or offloaded.
    """
    check_whole(model)
    check_settings(what, estimator, directions)
    check_callable("collator", collator, none=True)
    check_modules("target_modules", target_modules)
    check_modules("exclude_modules", exclude_modules)
    check_count("batch_size", batch_size)
    check_count("seed", seed, 0, most=SEEDS)
    check_flag("progress", progress)
    collector = gather(
        model,
        chosen(dataset, max_samples, seed),
        collator,
        Collector(
            model,
            target_layers(model, target_modules, exclude_modules),
            what=what,
            estimator=estimator,
            directions=directions,
            seed=seed,
            strict=True,
        ),
        batch_size=batch_size,
        progress=progress,
    )
    return collector.statistics()


def gather(
    model: nn.Module, dataset: Any, collator: Any, collector: Collector, *, batch_size: int, progress: bool
) -> Collector:
    """Passes all of `dataset` through the model under the collector, which is returned."""
    check_whole(model)
    device = next(model.parameters()).device
    # A private generator, since a DataLoader draws a seed from the global one.
    loader = DataLoader(dataset, batch_size, collate_fn=collator or default_data_collator, generator=torch.Generator())
    backward = bool(collector.sides)
    with (
        undisturbed(model),
        frozen(model) if backward else nullcontext(),
        torch.set_grad_enabled(backward),
        collector,
        logging.tqdm(total=len(dataset), desc="collecting", unit="sample", disable=not progress) as bar,
    ):
        for start, batch in zip(range(0, len(dataset), batch_size), loader, strict=True):
            size = min(batch_size, len(dataset) - start)
            batch = {key: part.to(device) if isinstance(part, Tensor) else part for key, part in batch.items()}
            if is_packed(batch):
                batch.setdefault("use_cache", False)  # with a cache, packed samples attend to one another
            outputs = model(**batch)
            if backward and supervised(batch):
                (outputs.loss if hasattr(outputs, "loss") else outputs[0]).backward()
            bar.update(size)
    return collector


def supervised(batch: Mapping[str, Any]) -> bool:
    """Whether there is anything to learn: a mean over no token is NaN."""
    labels = batch.get("labels")
    return not isinstance(labels, Tensor) or labels.is_floating_point() or bool((labels != IGNORE).any())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient; afterwards those that did will again."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def chosen(dataset: Any, count: int | None, seed: int) -> Any:
    """At most `count` samples of `dataset`, drawn by `seed`, in their order.

    Raises:
        ValueError: there are none, or they cannot be counted.
    """
    check_count("max_samples", count, none=True)
    if is_stream(dataset):
        raise ValueError(
            f"a {type(dataset).__name__} has no length and indices: pass a map-style data set, e.g. a list of the "
            "first samples, list(itertools.islice(dataset, 1024))"
        )
    if not len(dataset):
        raise ValueError("the data set is empty")
    if count is None or count >= len(dataset):
        return dataset
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(dataset, sorted(drawn.tolist()))
