"""Pruning as an argument of a transformers `Trainer`.

The Trainer makes its loader, counts its steps and builds its schedule before it fires `on_train_begin`, and gives no
event a reference to itself. So the callback has to act where the loader is made: it replaces `get_train_dataloader` of
this one trainer. It finds the trainer on the call stack when `Trainer.__init__` announces that it is done.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..files import check_free, drafted, recover
from ..utils import CLASSIFIERS, base_of, trainer_above, undisturbed
from .checks import check_choice, check_flag, check_model, check_probe, check_whole
from .columns import columns_beside, pyarrow_there
from .head import task_of
from .pairs import samples_of
from .parts import FOLDER, Parts, model_digest, remove_parts
from .probe import ETA
from .processes import agree, synchronise
from .report import PAGE, PICTURE, shown, shown_with, write_report
from .rows import WORKERS, Bare, Stream, Table, length_of, loads, rows_at, subset
from .scorer import Scorer, facts
from .scores import Share, drawn, merge, score_share
from .select import DON_GOAL, METHODS, WEIGHTS, Goal, check_balanced, check_keep, check_settings, preference, select
from .selection import FILE_NAME, IN_JSON, Selection, digest_of, fingerprint
from .warmup import warmed_up, warmup_length

logger = logging.get_logger(__name__)

PART_ROWS = 4096  # more samples than that are scored in parts, of as many or less
PARTS = 8  # of each process, at least

UNATTACHED = (
    "DonodCallback prunes where the Trainer makes its data loader, and this Trainer made it without: the callback was "
    "added later, or the Trainer does not derive from transformers.Trainer. Before trainer.train() call "
    "callback.attach(trainer), or peftx.pruning.prune(trainer) instead of adding the callback."
)


class DonodCallback(TrainerCallback):
    """Trains on the part of the data that a score picks (DONOD, arXiv:2504.14810, and its baselines).

        Trainer(model, args, train_dataset=data, callbacks=[peftx.DonodCallback(keep=0.3)]).train()

    When training starts, every sample is scored once by a forward pass, the `ceil(keep * n)` best are chosen, and the
    loader is made of them: steps, epochs and learning rates are those of a Trainer that was given the kept samples
    only. The data set itself, and `trainer.train_dataset`, stay whole. Random numbers, modes and gradients are
    undisturbed. In DDP every process scores its share, and all of them choose the same.

    Written to `output_dir`: `selection.json`, which a resumed or repeated run uses and a run with other data, model or
    settings refuses; and, with `report`, `selection.md`, the most and the least wanted samples to read, and
    `selection.png` (with matplotlib). Look at these before you trust a score. While more than 4,096 samples are scored,
    their scores are kept in `selection-scores/` (with pyarrow), and a run that was interrupted goes on from there.

    The data may be a stream (`datasets.IterableDataset`) that ends and starts anew in the same order: it is read once
    to score it, and in each pass of the training. Pairs of TRL's `DPOTrainer` are scored by their chosen answers.

    No score promises better training. Measured with wrong labels and answers in the data
    (benchmarks/pruning_noise.py), the paper's own setting, `don_goal="max"`, keeps the wrong ones, since it asks for
    surprising samples; ours is `"min"`.

    Args:
        keep: share of the samples, in (0, 1].
        method: `"donod"`, `"don"`, `"nod"`, `"loss"`, `"el2n"`, `"grand"`, `"grand_full"`, `"ifd"` or `"random"`; see
            `score_dataset`.
        don_goal, goal, weights, balanced: see `select`. The paper's setting is `don_goal="max"`.
        when: `"start"`: the model scores as it is. `"warmup"`: it is trained for a moment on random samples first, and
            set back after scoring. Default: `"warmup"` for classifiers, whose head is new as a rule, else (and for
            `"random"`) `"start"`. Not in the paper.
        warmup_steps: batches of that moment, at the Trainer's batch size and learning rate; of a stream, its first.
            Default: a tenth of an epoch, at least 200, at most an epoch; none for a stream.
        eta, reduction, task, head: see `score_dataset`.
        batch_size: samples in a forward pass. Default: the Trainer's batch of one device; 1 with TRL's `padding_free`.
        seed: of `"random"` and of the warm-up.
        report: whether to write `selection.md` and `selection.png`. Never with `push_to_hub=True`, which would publish
            texts of the samples; an explicit `trainer.push_to_hub()` uploads whatever is in `output_dir`.
        overwrite: score again even if there is a selection; not for resuming in another process.

    Raises:
        ValueError: here for bad settings; from the Trainer for a second DonodCallback; when training starts for data
            that cannot be pruned (empty, packed, without answers, those of KTO and of rewards, a stream that cannot be
            read twice or has workers), a collator that changes the order of its samples, a model split over processes,
            a head that cannot be scored, a selection or scores of something else, a file in the way that no run of this
            callback wrote or that has changed since (`.peftx.json` lists what it wrote), a resumed run without its
            selection, or a trainer that could not be found: then `attach` helps.
    """

    by = "DonodCallback"  # whose files they are, in the folder's list

    def __init__(
        self,
        keep: float = 0.3,
        method: str = "donod",
        *,
        don_goal: Goal = DON_GOAL,
        goal: Goal | None = None,
        weights: Sequence[float] = WEIGHTS,
        balanced: bool | None = None,
        when: Literal["start", "warmup"] | None = None,
        warmup_steps: int | None = None,
        eta: float = ETA,
        reduction: Literal["mean", "sum"] = "mean",
        batch_size: int | None = None,
        task: str | None = None,
        head: str | None = None,
        seed: int = 0,
        report: bool = True,
        overwrite: bool = False,
    ) -> None:
        check_keep(keep)
        check_settings(method, don_goal, goal, weights)
        check_balanced(balanced)
        if when is not None:
            check_choice("when", when, ("start", "warmup"), "None")
        if warmup_steps is not None:
            check_whole("warmup_steps", warmup_steps)
        check_probe(batch_size, eta, reduction, task, head, seed)
        for name, flag in (("report", report), ("overwrite", overwrite)):
            check_flag(name, flag)
        self.keep, self.method, self.don_goal, self.goal = float(keep), method, don_goal, goal
        self.weights = tuple(float(weight) for weight in weights)
        self.balanced, self.when, self.seed = balanced, when, int(seed)
        self.warmup_steps = None if warmup_steps is None else int(warmup_steps)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.eta, self.reduction, self.task, self.head = float(eta), reduction, task, head
        self.report, self.overwrite = report, overwrite
        self.selection: Selection | None = None  # of the data that is trained on
        self._trainer: Any = None
        self._make_loader: Any = None  # its own get_train_dataloader
        self._data: Any = None
        self._scored = False  # whether the selection was made by this run, not read
        self._parts: Parts | None = None  # its scores, until the selection is saved

    @property
    def ranking(self) -> dict[str, Any]:
        """The arguments of `preference` behind the scores."""
        names = ("method", "don_goal", "goal", "weights")
        return {name: getattr(self, name) for name in names}

    @property
    def reports(self) -> bool:
        return self.report and not self._trainer.args.push_to_hub

    def attach(self, trainer: Any) -> "DonodCallback":
        """Makes `trainer` train on the kept samples; for trainers that exist already. Returns the callback."""
        if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "get_train_dataloader"):
            raise ValueError(f"trainer must be a transformers Trainer, got a {type(trainer).__name__}")
        if self._trainer not in (None, trainer):
            raise ValueError("a DonodCallback serves one Trainer: make another one for the second")
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(other, DonodCallback) and other is not self for other in callbacks):
            raise ValueError("a Trainer takes one DonodCallback, and this one has another: remove_callback it first")
        if self not in callbacks:
            trainer.add_callback(self)
        if self._trainer is None:
            self._trainer, self._make_loader = trainer, trainer.get_train_dataloader
            trainer.get_train_dataloader = self.get_train_dataloader
        return self

    def get_train_dataloader(self) -> Any:
        """The trainer's loader of the kept samples; of all of them once the callback was removed from the trainer."""
        trainer = self._trainer
        whole = trainer.train_dataset
        if whole is None or self not in trainer.callback_handler.callbacks:
            return self._make_loader()
        trainer.train_dataset = self.prune(whole)
        try:
            loader = self._make_loader()
            if not loads(loader, trainer.train_dataset):
                raise ValueError(
                    f"{type(trainer).__name__}.get_train_dataloader does not load trainer.train_dataset: select with "
                    "peftx.pruning.score_dataset and select, and give the Trainer the kept samples"
                )
            return loader
        finally:
            trainer.train_dataset = whole

    def on_init_end(self, args, state, control, **kwargs):
        trainer = trainer_above(inspect.currentframe(), self)
        if trainer is not None:
            self.attach(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, selection = self._trainer, self.selection
        if trainer is None or selection is None:
            raise ValueError(UNATTACHED)
        folder = Path(args.output_dir)
        if self._scored and state.global_step > 0:
            self.selection = self._data = None
            wrong = "overwrite=True ignores its selection: leave that out"
            if not self.overwrite:
                wrong = f"its selection is not there: put the {FILE_NAME} of the interrupted run into {args.output_dir}"
            raise ValueError(
                f"training resumes at step {state.global_step}, but {wrong}, or start anew without "
                "resume_from_checkpoint"
            )
        count = selection.key["data"]["samples"]
        means = {name: float(column.nanmean()) for name, column in selection.scores.items() if name != "label"}
        logger.info(f"Training on {len(selection.indices)} of {count} samples; mean scores: {means}")
        with self.together():
            if self._scored and args.should_save:
                with drafted(folder, self.by, replace=False) as draft:
                    selection.save(draft / FILE_NAME)
                if self.reports:
                    tokenizer = trainer.processing_class
                    wanted = preference(selection.scores, **self.ranking)
                    with undisturbed(trainer.model):  # samples may be drawn at random
                        data = rows_at(self._data, shown(wanted))
                        with drafted(folder, self.by, replace=False) as draft:
                            write_report(selection, wanted, data, draft, method=self.method, tokenizer=tokenizer)
            if self._parts is not None and trainer.accelerator.is_local_main_process:
                remove_parts(self._parts.folder)
        self._scored, self._parts = False, None  # from here on it is what a resumed run has to use

    def prune(self, dataset: Any) -> Any:
        """The kept part of `dataset`, which is selected now if it was not before."""
        if self.selection is None or self._data is not dataset:
            self.selection, self._scored = self.choose(dataset)
            self._data = dataset
        return subset(dataset, self.selection.indices)

    def choose(self, dataset: Any) -> tuple[Selection, bool]:
        """The selection, read by the main process if there is one, else made by all; and whether it was made."""
        trainer = self._trainer
        accelerator, model, args = trainer.accelerator, trainer.model, trainer.args
        with undisturbed(model):
            count = length_of(dataset)
        if count is None and args.dataloader_num_workers:
            raise ValueError(f"{WORKERS} (dataloader_num_workers={args.dataloader_num_workers})")
        if getattr(args, "packing", False):
            raise ValueError(
                "packing=True puts several samples into a row, which cannot be scored one by one: prune the data "
                "before, with `peftx prune` or peftx.pruning.score_dataset, or train with packing=False"
            )
        task = self.task or task_of(model)
        metrics = tuple(dict.fromkeys([*METHODS[self.method], *shown_with(self.method)]))
        check_model(model, task, METHODS[self.method], sharded=trainer.is_fsdp_enabled)
        fresh = task in CLASSIFIERS and self.method != "random"
        when = self.when or ("warmup" if fresh else "start")
        steps = 0
        if when == "warmup":
            if count is None and self.warmup_steps is None:
                raise ValueError("how long a warm-up on a stream takes is not known: DonodCallback(warmup_steps=...)")
            steps = self.warmup_steps or warmup_length(count or 0, args.train_batch_size)
        with undisturbed(model):
            data = fingerprint(dataset)
        settings = {n: getattr(self, n) for n in ("keep", *self.ranking, "balanced", "eta", "reduction", "seed")}
        settings |= {"when": when, "warmup_steps": self.warmup_steps, "task": task, "head": self.head}
        base = base_of(model)
        name = f"{type(base).__name__} {getattr(base.config, '_name_or_path', '')}".strip()
        key = {"data": data, "model": name, "settings": settings}
        if (found := self.read(key)) is not None:
            return found, False
        scores, count = self.score(dataset, key, metrics, steps)
        key["data"] = {**data, "samples": count}
        with warnings.catch_warnings():
            if not accelerator.is_main_process:
                warnings.simplefilter("ignore")  # one process says it
            indices = select(scores, self.keep, **self.ranking, balanced=self.balanced)
        return Selection(indices, scores, key), True

    def read(self, key: dict[str, Any]) -> Selection | None:
        """The stored selection as the main process sees it, on every process; without one there is room for it."""
        path = Path(self._trainer.args.output_dir, FILE_NAME)
        found: list[Any] = [None]
        if self._trainer.accelerator.is_main_process:
            try:
                recover(path.parent)
                if path.exists() and not self.overwrite:
                    selection = Selection.load(path)
                    selection.check(key, path)
                    found = [selection]
                else:
                    check_free(path.parent, self.names(key["data"]["samples"]), self.by)
            except (ValueError, OSError) as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        accelerator = self._trainer.accelerator
        return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()

    @contextmanager
    def together(self) -> Iterator[None]:
        """No process goes on before all are done with the block; where one of them fails, all do."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        agree(failure, 0, self._trainer.accelerator.num_processes, self.reduce)

    def names(self, count: int | None) -> list[str]:
        """Of the files for so many samples (None: nobody knows)."""
        columns = [columns_beside(Path(FILE_NAME)).name] if count is None or count > IN_JSON else []
        return [FILE_NAME, *columns, *([PAGE, PICTURE] if self.reports else [])]

    def score(
        self, dataset: Any, key: dict[str, Any], metrics: tuple[str, ...], steps: int
    ) -> tuple[dict[str, Tensor], int]:
        """All scores, on every process, and the number of samples; each process scores its share of them."""
        trainer = self._trainer
        accelerator, model, stream = trainer.accelerator, trainer.model, key["data"]["samples"] is None
        data, collator = samples_of(trainer, Bare(dataset) if stream else dataset)
        flat = getattr(trainer.args, "padding_free", False)  # TRL's: a batch becomes one row
        batch_size = self.batch_size or (1 if flat else trainer._train_batch_size)
        progress = accelerator.is_main_process and not trainer.args.disable_tqdm
        task, head = key["settings"]["task"], self.head
        score = Scorer(model, task, metrics, self.eta, self.reduction, head)
        # Scores are kept while they are made, unless they are few, or of samples that chance makes anew each time.
        parted = pyarrow_there() and (stream or (len(dataset) > PART_ROWS and self.steady(dataset)))
        seen: list[Any] = [key["data"], parted, model_digest(model) if parted and accelerator.is_main_process else ""]
        broadcast_object_list(seen)  # all processes get the main one's start
        same_data, (data_key, parted, digest) = key["data"] == seen[0], seen
        key = {**key, "data": data_key}
        open_parts = partial(self.open_parts, key, score.columns, digest, steps, batch_size)
        if parted and self.overwrite:
            with self.together():
                if accelerator.is_local_main_process:
                    try:
                        open_parts()
                    except ValueError:
                        remove_parts(Path(trainer.args.output_dir, FOLDER))

        def share() -> Share:
            with undisturbed(model), ExitStack() as warm:
                with self.together():  # or the others would wait in `synchronise`
                    if stream and not same_data:
                        raise ValueError("the processes have different data, but have to share the same samples")
                    self._parts = open_parts() if parted else None
                    if steps:
                        rate, size = trainer.args.learning_rate, trainer._train_batch_size
                        common: dict[str, Any] = {"seed": self.seed, "progress": progress}
                        warm.enter_context(
                            warmed_up(model, data, collator, steps=steps, learning_rate=rate, batch_size=size, **common)
                        )
                synchronise(model, accelerator)
                with accelerator.autocast():
                    return score_share(
                        score,
                        Stream(data) if stream else Table(data, range(len(dataset))),
                        collator,
                        batch_size=batch_size,
                        parts=self._parts,
                        process=(accelerator.process_index, accelerator.num_processes),
                        progress=progress,
                    )

        scores, count = merge(share, score.columns, accelerator.num_processes, self.reduce)
        if "random" in metrics:
            scores["random"] = drawn(count, self.seed, scores["tokens"])
        return {name: scores[name] for name in (*metrics, *facts(task))}, count

    def steady(self, dataset: Any) -> bool:
        """Whether a sample is the same each time."""
        with undisturbed(self._trainer.model):
            return len({digest_of([dataset[0]]) for _ in range(3)}) == 1

    def open_parts(
        self, key: dict[str, Any], names: tuple[str, ...], digest: str, steps: int, batch_size: int
    ) -> Parts:
        """Where scores are kept while they are made."""
        trainer, count = self._trainer, key["data"]["samples"]
        settings = {name: key["settings"][name] for name in ("eta", "reduction", "when", "task", "head")}
        settings["scores"] = sorted(names)
        if steps:
            rate, size = trainer.args.learning_rate, trainer._train_batch_size
            settings |= {"warmup": [steps, self.seed, rate, size]}
        wanted = {"data": key["data"], "model": key["model"], "digest": digest, "settings": settings}
        folder, most = Path(trainer.args.output_dir, FOLDER), PART_ROWS
        if count is not None:  # some for each process
            most = min(most, -(-count // (PARTS * trainer.accelerator.num_processes)))
        rows = -(-most // batch_size) * batch_size
        try:
            return Parts(folder, wanted, names, rows)
        except ValueError as error:
            hint = "a scoring that was interrupted left it; or DonodCallback(overwrite=True)"
            raise ValueError(f"{error} ({hint})") from error


def prune(trainer: Trainer, keep: float = 0.3, method: str = "donod", **settings: Any) -> DonodCallback:
    """Makes a trainer that exists already train on the kept samples only: `DonodCallback(...).attach(trainer)`.

    Call it before `trainer.train()`, which selects. Arguments as for `DonodCallback`, which is returned.
    """
    return DonodCallback(keep, method, **settings).attach(trainer)
