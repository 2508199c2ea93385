"""Scores of training samples: DONOD's (arXiv:2504.14810), see `probe`, and the usual baselines."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as numbers_from
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from transformers import default_data_collator
from transformers.utils import logging

from ..utils import base_of, undisturbed
from .checks import check_callable, check_flag, check_indices, check_metrics, check_model, check_probe, check_whole
from .collation import Watched, check_order
from .head import task_of
from .pairs import Chosen
from .parts import ROWS, Parts, model_digest
from .probe import ETA
from .processes import agree, reduce_sum
from .rows import Stream, Table, length_of
from .scorer import BatchError, Scorer, check_batch, check_samples, facts
from .selection import fingerprint


def score_dataset(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list], Mapping[str, Any]] | None = None,
    *,
    metrics: Sequence[str] = ("don", "nod"),
    batch_size: int = 8,
    eta: float = ETA,
    reduction: Literal["mean", "sum"] = "mean",
    task: str | None = None,
    head: str | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
    folder: Path | str | None = None,
    part_rows: int = ROWS,
    shard: bool = False,
) -> dict[str, Tensor]:
    """Scores every sample by itself; one forward pass, and no backward pass unless `grand_full` is asked for.

    The model is in eval mode meanwhile and as it was afterwards, like all random number generators; no parameter gets a
    gradient. A sample without a supervised token, or with NaN logits, gets NaN.

    Args:
        model: of transformers, or a PEFT model around one; plain, not wrapped by DDP, FSDP or DeepSpeed.
        dataset: anything with a length and integer indices: `datasets.Dataset`, a list, a torch `Dataset`; or a stream
            that ends, and starts anew in the same order (`datasets.IterableDataset`, torch's), of which one batch is
            held at a time. Rows that were packed before are told from samples only where `position_ids` start again,
            or TRL says so (`seq_lengths`). Preference pairs as TRL's `DPOTrainer` has them, with its collator, are
            scored by their chosen answers.
        collator: makes a batch, with `labels`, from a list of samples, in their order (which is looked at now and
            then, in a hundredth of the time). Default: transformers' `default_data_collator`.
        metrics: of
            `"don"`: |W| - |W'|, positive where the head's norm falls;
            `"nod"`: |W' - W|, how far the head moves;
            `"loss"`: mean cross-entropy over the supervised tokens, in nats; here and in all others without label
            smoothing, class weights or what else a Trainer's loss may add;
            `"el2n"`: |softmax - onehot|, mean over the supervised tokens (arXiv:2107.07075 has one label a sample);
            `"grand"`: |gradient| of the head, so `nod / eta`;
            `"grand_full"`: |gradient| of all parameters that train, of an adapter say: one backward pass a sample;
            `"ifd"`: loss of the answer after its prompt over its loss alone (arXiv:2308.12032); causal LMs with masked
            prompts only, needs a second forward pass over the answers. The answer's first token counts if the sample
            begins with the BOS token, which then stands in for the prompt; else it has nothing to be predicted from;
            `"random"`: uniform in [0, 1), by `seed`.
        batch_size: samples of a forward pass.
        eta: step of the probe. The paper gives none. Ranks hardly depend on it as long as it is small.
        reduction: of the probe's loss over a sample's tokens; `"sum"` makes long samples count more. Not in the paper.
        task: a key of `head.TASKS` (PEFT's task types). Default: that of the adapter, or of the model's class.
        head: name of the linear layer that makes the logits. Default: found.
        indices: which samples; not of a stream. Default: all.
        seed: of `random`.
        progress: show a bar.
        folder: of scores alone. They are written there as Parquet (needs pyarrow), `part_rows` samples a file, and a
            scoring that was interrupted goes on behind the whole files that it finds. Files of other data, another
            model or other settings are refused.
        part_rows: see `folder`. Default: 8192, or what the folder has.
        shard: whether the processes of an initialised `torch.distributed` (accelerate's are) share the samples, each
            with the same model and data, and all of them get all scores. They share whole parts if there is a folder,
            else batches.

    Returns:
        Metric to (n,) in float64, on the CPU, in the order of `indices` or of the stream; also `tokens`, the number of
        supervised ones, and for sequence classification `label`.

    Raises:
        ValueError: an argument of the wrong type or out of range, no samples, a stream that cannot be read twice, no
            labels or labels out of range, a batch whose rows are not the samples (packing, other preference pairs, a
            collator that changes their order), a head that cannot be found or has another form than assumed, a folder
            of something else.
        ModuleNotFoundError: `folder` without pyarrow.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got a {type(model).__name__}")
    check_callable("collator", collator)
    metrics = check_metrics(metrics)
    check_whole("batch_size", batch_size)
    check_probe(batch_size, eta, reduction, task, head, seed)
    check_whole("part_rows", part_rows)
    eta, batch_size, seed, part_rows = float(eta), int(batch_size), int(seed), int(part_rows)
    for name, flag in (("progress", progress), ("shard", shard)):
        check_flag(name, flag)
    with undisturbed(model):
        count = length_of(dataset)
    if count is None and indices is not None:
        raise ValueError(
            "indices are for data with a length; of a stream, take what is wanted first: .take(n), .skip(n)"
        )
    chosen = check_indices(range(count or 0) if indices is None else indices, count or 0)
    task = task or task_of(model)
    check_model(model, task, metrics)
    score = Scorer(model, task, metrics, eta, reduction, head)
    names = score.columns
    world = distributed.get_world_size() if shard and distributed.is_initialized() else 1

    def share() -> Share:
        parts = None
        if folder is not None:
            key = {
                "data": fingerprint(dataset),
                "model": {"class": type(base_of(model)).__name__, "digest": model_digest(model)},
                "settings": {"metrics": sorted(names), "eta": eta, "reduction": reduction, "task": task, "head": head},
                "indices": None if indices is None else fingerprint(chosen),
            }
            parts = Parts(folder, key, names, part_rows)
        return score_share(
            score,
            Stream(dataset) if count is None else Table(dataset, chosen),
            Chosen(collator or default_data_collator),
            batch_size=batch_size,
            parts=parts,
            process=(distributed.get_rank() if world > 1 else 0, world),
            progress=progress,
        )

    with undisturbed(model):
        scores, found = merge(share, names, world, reduce_sum)
    if "random" in metrics:
        scores["random"] = drawn(
            found if count is None else count, seed, scores["tokens"], None if indices is None else chosen
        )
    return {name: scores[name] for name in (*metrics, *facts(task))}


def drawn(count: int, seed: int, tokens: Tensor, indices: Sequence[int] | None = None) -> Tensor:
    """A random number for each sample that has a supervised token, the same whatever else is scored."""
    everywhere = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (everywhere if indices is None else everywhere[list(indices)]).where(tokens > 0, math.nan)


@dataclass(frozen=True)
class Share:
    """What a process has scored: columns (k, m) of the samples at `places` (m,), out of `count`."""

    columns: Tensor
    places: Tensor
    count: int


def score_share(
    score: Scorer,
    source: Table | Stream,
    collator: Callable[[list], Mapping[str, Any]],
    *,
    batch_size: int,
    parts: Parts | None = None,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Share:
    """Scores every `process[1]`-th part, or without a folder batch, beginning with number `process[0]`. A part that is
    there already is read instead."""
    rank, world = process
    size = parts.rows if parts else batch_size
    watched = Watched(collator)
    found = Growing(len(score.columns) + 1, source.count or 0)
    stop = 0
    with logging.tqdm(total=source.count, desc="scoring", unit="sample", disable=not progress) as bar:
        if isinstance(source, Table) and batch_size > 1 and source.count:
            samples = source.spread(batch_size)
            check_samples(samples)
            check_order(collator, samples)
        for number in numbers_from():
            start = number * size
            if not source.has(start):
                break
            stop = start + size
            if number % world != rank:
                stop = source.reach(stop)
            else:
                first = source.read(start, start + 1)[0] if parts else None
                if parts and parts.done(number):
                    stop = source.reach(stop)
                    columns = parts.read(number, source.indices_of(start, stop), first)
                    part = torch.stack([columns[name].double() for name in score.columns])
                    bar.update(stop - start)
                else:
                    part = score_part(score, source, watched, range(start, stop, batch_size), stop, bar)
                    stop = start + part.shape[1]
                    if parts:
                        parts.write(number, source.indices_of(start, stop), part, first)
                found.append(torch.cat([torch.arange(start, stop, dtype=torch.float64)[None], part]))
            if stop < start + size:
                break
    if not stop and isinstance(source, Stream):
        raise ValueError("the data set is empty")
    table = found.table()
    return Share(table[1:], table[0].long(), stop)


def score_part(
    score: Scorer, source: Table | Stream, collator: Callable[[list], Mapping[str, Any]], starts: range, stop: int, bar
) -> Tensor:
    """Scores (k, m) of the samples from `starts[0]` to `stop`, or to the end of the data."""
    found = []
    for start in starts:
        samples = source.read(start, min(start + starts.step, stop))
        if not samples:
            break
        part = torch.full((len(score.columns), len(samples)), math.nan, dtype=torch.float64)
        try:
            check_samples(samples)
            batch = check_batch(collator(samples))
            batch = {key: part.to(score.device) if isinstance(part, Tensor) else part for key, part in batch.items()}
            scores = score(batch, len(samples))
        except BatchError as error:
            indices = source.indices_of(start, start + len(samples))
            raise ValueError(f"samples {indices[0]} to {indices[-1]}: {error}") from None
        for row, name in zip(part, score.columns, strict=True):
            if name in scores:
                row.copy_(scores[name])
        found.append(part)
        bar.update(len(samples))
    return torch.cat(found, 1)


class Growing:
    """A table (k, m) that gets more and more columns; twice the room each time there is none left."""

    def __init__(self, rows: int, room: int) -> None:
        self.data, self.used = torch.empty(rows, max(room, 1024), dtype=torch.float64), 0

    def append(self, part: Tensor) -> None:
        stop = self.used + part.shape[1]
        if stop > self.data.shape[1]:
            self.data = torch.cat([self.data, torch.empty_like(self.data)], 1)
            if stop > self.data.shape[1]:
                self.data = torch.cat([self.data, torch.empty(len(part), stop, dtype=torch.float64)], 1)
        self.data[:, self.used : stop] = part
        self.used = stop

    def table(self) -> Tensor:
        return self.data[:, : self.used]


def merge(
    make: Callable[[], Share], names: Sequence[str], world: int, reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], int]:
    """The columns of all samples, on each of `world` processes, and their number; where one process fails, all do.
    `reduce` sums a tensor over the processes."""
    failure: Exception | None = None
    share = Share(torch.zeros(len(names), 0, dtype=torch.float64), torch.zeros(0, dtype=torch.long), 0)
    try:
        share = make()
    except Exception as error:
        failure = error
    if agree(failure, share.count, world, reduce) != world * share.count:
        raise ValueError("the processes read different numbers of samples, but have to share the same ones")
    if world == 1:
        return dict(zip(names, share.columns.contiguous(), strict=True)), share.count
    # Every sample has one process with its score and zeros elsewhere: the sum is exact, also of NaN.
    table = torch.zeros(len(names), share.count, dtype=torch.float64)
    table[:, share.places] = share.columns
    return dict(zip(names, reduce(table), strict=True)), share.count
