"""Scores of training samples: what one step of SGD on a sample would do to the output layer, and the usual baselines.

DON and NOD are DONOD's (arXiv:2504.14810): how far the norm of the output layer falls, and how far the layer moves. The
paper says neither which optimizer nor which step its probe takes; here it is one step of plain SGD on the head alone.
Then both have a closed form in the head's input and the logits, and no backward pass is needed. (A first step of Adam
moves every entry by about the learning rate, whatever the sample, so its NOD says nothing.)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import default_data_collator
from transformers.utils import logging

from ..utils import IGNORE, is_packed, undisturbed
from .head import TASKS, Head, base_of, calls_of, check_head, find_head, task_of

METRICS = ("don", "nod", "loss", "el2n", "grand", "grand_full", "ifd", "random")
OF_HEAD = {"don", "nod", "grand"}
ETA = 1e-3
POSITIONS = 64
BLOCK = 2**20  # entries of a gradient that is built some rows at a time

Way = Literal["gram", "blocked"]


def gradient_way(length: int, outputs: int, width: int) -> Way:
    """The cheaper way to |G| for T = `length` positions, a head of V = `outputs` by D = `width`: T (V + D) < V D ?"""
    return "gram" if length * (outputs + width) < outputs * width else "blocked"


def gradient_square(d: Tensor, h: Tensor, way: Way | None = None) -> Tensor:
    """|G|_F^2 of G = d^T h, without ever holding G.

    Args:
        d: (..., T, V), gradient of the loss by the output of the head.
        h: (..., T, D), input of the head, same dtype.
        way: `"gram"`, the entrywise product of two T x T Gram matrices, 2 T^2 (V + D) operations; `"blocked"`, G some
            rows at a time, 2 T V D operations. Default: `gradient_way`.

    Returns:
        (...) in float64.
    """
    if (way or gradient_way(d.shape[-2], d.shape[-1], h.shape[-1])) == "gram":
        return ((d @ d.mT).double() * (h @ h.mT).double()).sum((-2, -1)).clamp(min=0)
    rows = max(1, BLOCK // h.shape[-1])
    blocks = ((part.mT @ h).square().sum((-2, -1), dtype=torch.float64) for part in d.split(rows, -1))
    return torch.stack(list(blocks)).sum(0)


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - onehot(labels), (..., V), in float32 at least; precise for confident samples too."""
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at = labels.unsqueeze(-1)
    p.scatter_(-1, at, 0.0)
    return p.scatter_(-1, at, -p.sum(-1, keepdim=True))  # the label's own p - 1 would cancel


def head_statistics(
    h: Tensor,
    z: Tensor,
    labels: Tensor,
    *,
    logits: Tensor | None = None,
    slope: Tensor | float = 1.0,
    bias: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    way: Way | None = None,
) -> tuple[Tensor, Tensor]:
    """<W, G> and |G|^2 of each sample, for G the gradient of its cross-entropy by the weight W (V, D) of the head.

    Args:
        h: (B, T, D), input of the head at the T supervised positions of each of B samples.
        z: (B, T, V), its output, W h + b.
        labels: (B, T), none of them ignored.
        logits, slope: what the model makes of z, and its derivative. Default: z and 1.
        bias: (V,).
        reduction: of the loss over positions.
        way: see `gradient_square`.

    Returns:
        Two tensors (B,) in float64; softmax and products are in float32 at least, sums in float64.
    """
    d = residual(z if logits is None else logits, labels)
    d *= slope / labels.shape[-1] if reduction == "mean" else slope
    inner = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for some, of_some in zip(d.split(POSITIONS, -2), z.split(POSITIONS, -2), strict=True):  # no second (T, V) tensor
        without_bias = of_some.to(d) if bias is None else of_some.to(d) - bias.to(d)
        inner += (some * without_bias).sum((-2, -1), dtype=torch.float64)
    return inner, gradient_square(d, h.to(d), way)


def don_nod(inner: Tensor, square: Tensor, weight_square: float, eta: float = ETA) -> tuple[Tensor, Tensor]:
    """DON = |W| - |W'| and NOD = |W' - W| for W' = W - eta G, from <W, G>, |G|^2 and |W|^2; float64.

    DON is a quotient: the difference of the two norms loses every digit where eta is small.
    """
    fall = 2 * eta * inner - eta**2 * square  # |W|^2 - |W'|^2
    norms = math.sqrt(weight_square) + (weight_square - fall).clamp(min=0).sqrt()
    return torch.where(norms > 0, fall / norms, torch.where(fall.isnan(), fall, 0.0)), eta * square.sqrt()


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
) -> dict[str, Tensor]:
    """Scores every sample by itself; one forward pass, and no backward pass unless `grand_full` is asked for.

    The model is in eval mode meanwhile and as it was afterwards, like all random number generators; no parameter gets a
    gradient. A sample without a supervised token, or with NaN logits, gets NaN.

    Args:
        model: of transformers, or a PEFT model around one; plain, not wrapped by DDP, FSDP or DeepSpeed.
        dataset: anything with a length and integer indices: `datasets.Dataset`, a list, a torch `Dataset`. Rows that
            were packed before are told from samples only where `position_ids` start again.
        collator: makes a batch, with `labels`, from a list of samples. Default: transformers' `default_data_collator`.
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
        indices: which samples. Default: all.
        seed: of `random`.
        progress: show a bar.

    Returns:
        Metric to (n,) in float64, on the CPU, in the order of `indices`; also `tokens`, the number of supervised ones,
        and for sequence classification `label`.

    Raises:
        ValueError: no samples, no length, unknown metric or task, no labels or labels out of range, a batch whose rows
            are not the samples (packing), a head that cannot be found or has another form than assumed.
    """
    count = length_of(dataset)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}: one of {', '.join(METRICS)}")
    check_probe(batch_size, eta, reduction, task)
    task = task or task_of(model)
    check_model(model, task, metrics)
    score = Scorer(model, task, tuple(metrics), eta, reduction, head)
    chosen = range(count) if indices is None else list(indices)
    columns = (*metrics, *facts(task))
    scores = {name: torch.full((len(chosen),), math.nan, dtype=torch.float64) for name in columns}
    device = next(model.parameters()).device
    # A private generator, since a DataLoader draws a seed from the global one.
    loader = DataLoader(
        Subset(dataset, chosen),
        batch_size,
        collate_fn=collator or default_data_collator,
        generator=torch.Generator(),
    )
    with (
        undisturbed(model),
        logging.tqdm(total=len(chosen), desc="scoring", unit="sample", disable=not progress) as bar,
    ):
        for start, batch in zip(range(0, len(chosen), batch_size), loader, strict=True):
            here = slice(start, min(start + batch_size, len(chosen)))
            batch = {key: part.to(device) if isinstance(part, Tensor) else part for key, part in batch.items()}
            try:
                found = score(batch, here.stop - start)
            except BatchError as error:
                raise ValueError(f"samples {chosen[start]} to {chosen[here.stop - 1]}: {error}") from None
            for name, part in found.items():
                scores[name][here] = part.to("cpu", torch.float64)
            bar.update(here.stop - start)
    if "random" in metrics:
        everywhere = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        scores["random"] = everywhere[list(chosen)].where(scores["tokens"] > 0, math.nan)
    return scores


def facts(task: str) -> tuple[str, ...]:
    """What `score_dataset` returns beside the metrics."""
    return ("label", "tokens") if task == "SEQ_CLS" else ("tokens",)


class BatchError(ValueError):
    """What is wrong with a batch; the caller says which samples it holds."""


class Scorer:
    """Scores batches; the head is looked at once, in the first batch that has a supervised token."""

    def __init__(
        self, model: nn.Module, task: str, metrics: Sequence[str], eta: float, reduction: Any, head: str | None
    ) -> None:
        self.model, self.task, self.metrics, self.eta, self.reduction = model, task, set(metrics), eta, reduction
        self.module = find_head(model, task, head) if OF_HEAD & self.metrics else None
        self.head: Head | None = None

    def __call__(self, batch: dict[str, Any], size: int) -> dict[str, Tensor]:
        """Each score of the `size` samples in the batch, and their facts; (size,)."""
        labels = self.labels(batch, size)
        supervised = labels != IGNORE
        scores = {"tokens": supervised.sum(1), "label": labels[:, 0]}
        if not supervised.any() or not self.metrics - {"random"}:
            return {name: scores[name] for name in facts(self.task)}
        with torch.no_grad():
            h, z, logits = self.forward(batch, self.module)
            check_labels(labels[supervised], logits.shape[-1])
            if self.module is not None and self.head is None:
                assert h is not None and z is not None
                # One position of each sample, not a copy of all logits.
                rows = supervised.any(1).nonzero()[:, 0]
                at = (rows, supervised.int().argmax(1)[rows])
                parts = (part[at] for part in (h, z, logits))
                self.head = check_head(self.model, self.module, *parts)
            with torch.autocast(logits.device.type, enabled=False):
                scores |= self.losses(h, z, logits, labels, supervised)
            if "ifd" in self.metrics:
                scores["ifd"] = scores["loss"] / self.loss_alone(batch, supervised)
        if "grand_full" in self.metrics:
            scores["grand_full"] = self.full_gradients(batch, labels)
        return {name: scores[name] for name in (*self.metrics, *facts(self.task)) if name in scores}

    def labels(self, batch: Mapping[str, Any], size: int) -> Tensor:
        """(size, T), in line with the logits."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise BatchError(f"the collator made no tensor 'labels', only {', '.join(batch)}")
        if len(labels) != size or is_packed(batch):
            raise BatchError(
                "the rows of the batch are not the samples: data that is packed (or flattened, padding_free) mixes "
                "samples in a row. Score and select before packing; for a flattening collator, batch_size=1."
            )
        if labels.is_floating_point() or labels.ndim != (1 if self.task == "SEQ_CLS" else 2):
            raise BatchError(f"labels of {self.task} must be integers, got {tuple(labels.shape)} of {labels.dtype}")
        labels = with_float64(labels)
        if self.task == "SEQ_CLS":
            return labels[:, None]
        return labels[:, 1:] if self.task == "CAUSAL_LM" else labels

    def forward(
        self, batch: Mapping[str, Any], module: nn.Module | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Input of the head (B, T, D), its output and the logits (B, T, V), in line with `labels`."""
        # An encoder-decoder makes the decoder's input from the labels.
        keep_labels = self.task == "SEQ_2_SEQ_LM" and "decoder_input_ids" not in batch
        inputs = {key: part for key, part in batch.items() if key != "labels" or keep_labels}
        if module is None:
            return None, None, self.align(self.model(**inputs).logits, batch)
        with calls_of(module) as calls:
            logits = self.model(**inputs).logits
        if len(calls) != 1:
            raise ValueError(f"the model called its head {len(calls)} times in a forward pass instead of once")
        h, z = calls[0]
        if self.task == "SEQ_CLS" and z.ndim == 3:  # decoders classify every position, and pick one
            at = (torch.arange(len(z), device=z.device), picked(z, logits, batch.get("attention_mask")))
            h, z = h[at], z[at]
        return self.align(h, batch), self.align(z, batch), self.align(logits, batch)

    def align(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(B, T, ...), in line with `labels`. Virtual tokens of prompt tuning come first, and are left out."""
        outputs = with_float64(outputs)
        if self.task == "SEQ_CLS":
            return outputs[:, None]
        outputs = outputs[:, -batch["labels"].shape[1] :]
        return outputs[:, :-1] if self.task == "CAUSAL_LM" else outputs

    def losses(
        self, h: Tensor | None, z: Tensor | None, logits: Tensor, labels: Tensor, supervised: Tensor
    ) -> dict[str, Tensor]:
        """What the forward pass alone gives: (B,) of each."""
        names = ("loss", "el2n", "don", "nod", "grand")
        scores = {name: torch.full((len(labels),), math.nan, dtype=torch.float64) for name in names}
        for at in groups(supervised):
            rows = at[0][:, 0]
            x, y = logits[at], labels[at]
            if {"loss", "ifd"} & self.metrics:
                scores["loss"][rows.cpu()] = cross_entropy(x, y).mean(1).cpu()
            if "el2n" in self.metrics:
                scores["el2n"][rows.cpu()] = residual(x, y).norm(dim=-1).double().mean(1).cpu()
            if self.head is not None and h is not None and z is not None:
                settings = {"slope": self.head.slope(x), "bias": self.head.bias, "reduction": self.reduction}
                inner, square = head_statistics(h[at], z[at], y, logits=x, **settings)
                don, nod = don_nod(inner, square, self.head.square, self.eta)
                for name, part in (("don", don), ("nod", nod), ("grand", square.sqrt())):
                    scores[name][rows.cpu()] = part.cpu()
        return scores

    def loss_alone(self, batch: Mapping[str, Any], supervised: Tensor) -> Tensor:
        """Mean loss (B,) of each answer without its prompt; NaN where there is no prompt or nothing to predict."""
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(tokens))
        bos = getattr(base_of(self.model).config, "bos_token_id", None)
        first = tokens[torch.arange(len(tokens)), mask.argmax(1)]
        answers = []
        for row, answered in enumerate(supervised):
            start = first[row : row + 1] if bos is not None and first[row] == bos else tokens[row, :0]
            prompted = mask[row].sum() - 1 > answered.sum()
            answer = tokens[row, 1:][answered]
            answers.append(torch.cat([start, answer]) if prompted else answer[:0])
        pad = nn.utils.rnn.pad_sequence
        ids = pad(answers, batch_first=True)
        attended = pad([torch.ones_like(answer) for answer in answers], batch_first=True)
        alone = torch.full((len(ids),), math.nan, dtype=torch.float64)
        if ids.shape[1] < 2:
            return alone
        labels = ids.masked_fill(attended == 0, IGNORE)
        _, _, logits = self.forward({"input_ids": ids, "attention_mask": attended, "labels": labels}, None)
        for row, answer in enumerate(answers):
            if len(answer) > 1:
                losses = cross_entropy(logits[row, : len(answer) - 1], answer[1:])
                alone[row] = losses.mean().cpu()
        return alone

    def full_gradients(self, batch: Mapping[str, Any], labels: Tensor) -> Tensor:
        """|gradient| (B,) of all parameters that train; rows go through the model one by one."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norms = torch.full((len(labels),), math.nan, dtype=torch.float64)
        for row, wanted in enumerate(labels):
            if (wanted == IGNORE).all():
                continue
            sample = {
                key: part[row : row + 1] if isinstance(part, Tensor) and len(part) == len(labels) else part
                for key, part in batch.items()
            }
            with torch.enable_grad():
                _, _, logits = self.forward(sample, None)
                loss = nn.functional.cross_entropy(logits[0].float(), wanted, ignore_index=IGNORE)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            square = sum(float(part.cpu().square().sum(dtype=torch.float64)) for part in gradients if part is not None)
            norms[row] = math.sqrt(square)
        return norms


def with_float64(tensor: Tensor) -> Tensor:
    """On a device that has float64: Apple's has not."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(...), softmax in float32 at least, result in float64."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return -logits.log_softmax(-1, dtype=exact).gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()


def groups(supervised: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The supervised positions of a (B, T) mask as indices (rows (b, 1), positions (b, t)): all rows at once where T
    is 1, else one by one, so that no more than one sample's logits are held in float32."""
    if supervised.shape[1] == 1:
        rows = supervised[:, 0].nonzero()
        yield rows, torch.zeros_like(rows)
        return
    for row, mask in enumerate(supervised):
        positions = mask.nonzero().T
        if positions.shape[1]:
            yield torch.full((1, 1), row, device=mask.device), positions


def picked(z: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The position (B,) of z (B, T, V) that a decoder's classifier took its logits (B, V) from: the last equal one, and
    not of padding. Virtual tokens come first, and have no mask."""
    equal = z.to(logits.dtype).isclose(logits[:, None], rtol=0, atol=0, equal_nan=True).all(-1)
    if mask is not None:
        equal[:, -mask.shape[1] :] &= mask.bool()
    if not equal.any(1).all():
        raise ValueError("cannot tell which position the classifier's logits come from: they equal none of the head's")
    return equal.shape[1] - 1 - equal.flip(1).to(torch.int8).argmax(1)


def check_labels(labels: Tensor, outputs: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        raise BatchError(f"label {low if low < 0 else high} is outside the model's {outputs} outputs")


def length_of(dataset: Any) -> int:
    try:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError
        count = len(dataset)
    except TypeError:
        raise ValueError(
            f"a {type(dataset).__name__} cannot be pruned: choosing samples needs a length and indices. Make it a "
            "map-style data set first, e.g. datasets.Dataset.from_generator(...) or a list."
        ) from None
    if not count:
        raise ValueError("the data set is empty")
    return count


def check_probe(batch_size: int | None, eta: float, reduction: str, task: str | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    if not (eta > 0 and math.isfinite(eta)):
        raise ValueError(f"eta must be a positive number, got {eta!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")


def check_model(model: nn.Module, task: str, metrics: Sequence[str], sharded: bool = False) -> None:
    if sharded or any(hasattr(part, "ds_id") or type(part).__name__ == "DTensor" for part in model.parameters()):
        raise ValueError(
            "the model is split over processes (DeepSpeed ZeRO-3 or FSDP): select on the whole model first, with "
            "peftx.pruning.score_dataset or `peftx prune`, and train on dataset.select(indices)"
        )
    config = getattr(base_of(model), "config", None)
    problem = getattr(config, "problem_type", None)
    if getattr(config, "num_labels", None) == 1:  # what transformers then assumes
        problem = "regression"
    if task == "SEQ_CLS" and problem in ("regression", "multi_label_classification"):
        raise ValueError(f"the scores are for one label a sample (softmax and cross-entropy), not for {problem}")
    if "ifd" in metrics and task != "CAUSAL_LM":
        raise ValueError(f"ifd compares answers with and without their prompt: causal language models only, not {task}")
    if "grand_full" in metrics and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("grand_full is the gradient of the parameters that train, and none does")
