"""Collecting as an argument of a transformers `Trainer`."""

import functools
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.utils import logging

from ..files import LIST, check_free, written
from ..utils import columns_of, trainer_above
from .checks import SEEDS, check_choice, check_count, check_file_name, check_modules, check_whole
from .collection import SAMPLES, chosen, gather
from .hooks import Collector
from .layers import target_layers
from .settings import check_settings
from .statistics import FILE_NAME, Statistics
from .trainers import check_head, check_own_loss, check_trainer

logger = logging.get_logger(__name__)

WHEN = ("last_epoch", "train", "calibration")
TAKEN = (  # what a training writes itself
    *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("pytorch_model.bin", "config.json", "generation_config.json", "adapter_config.json", "readme.md"),
    *("trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json"),
    *(LIST, "selection.json", "selection.md", "selection.png", "settings.yaml", "metrics.json"),  # or peftx
)
DIRECTIONS = 32  # a standard deviation of at most a quarter in one batch, and of 2 to 3 % in a hundred of them


class FisherCallback(TrainerCallback):
    """Collects what `peftx.compression.compress` needs to know, while a model is fine-tuned.

        callback = peftx.FisherCallback()
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        compress(model, callback.statistics, keep=0.6)

    Row sums of squared gradients (FWSVD, arXiv:2207.00112), one vector a layer, from the very passes that train: hooks
    see what goes in and out of every layer, so weights may be frozen under adapters, and clipping, gradient
    accumulation, mixed precision and checkpointing change nothing. The hooks are on in the steps that count, and in the
    first one, so that what cannot be collected on is found before hours of training. What is trained is the same, bit
    for bit. In DDP every process collects on its share, and sums are added at the end.

    Of fused experts of a mixture each is a layer, of the tokens that are routed to it. While the hooks are on they are
    computed by grouped products, transformers' default; with another `experts_implementation` they round otherwise.

    `callback.statistics` is there when training has ended, and so is the file in `output_dir`. If they cannot be made
    then, an error is logged and they are None: the trained model is not lost to it.

    TRL's `SFTTrainer` works likewise, with labels of whatever kind, `packing` and `padding_free`, whose samples are
    those that the rows are made of. Its trainers for preferences and rewards (DPO, KTO, GRPO, RLOO, Reward) have losses
    that are not about labels, and are refused when they start.

    Sums are not part of checkpoints: a run that is resumed inside the steps that count starts them anew, and says so.

    Memory: one vector a layer, or expert, and side. In the steps that count, frozen layers hold their inputs until the
    backward pass, which plain frozen layers need not do (an adapter's do anyway).

    Args:
        estimator: `"per_batch"` squares the gradient of a micro-batch, packed or not. Where a weight trains, it reads
            the gradient that is there anyway. `"per_sample"` squares that of each sample, which is the definition; with
            `directions`, frozen layers cost about the same either way. See `collect`.
        when: `"last_epoch"`: of it the last steps, which `max_samples` are enough for, since what is compressed is the
            fine-tuned model; `"train"`: from the start; `"calibration"`: no hook during training, and one pass over
            training samples after it, in eval mode (no dropout), as `collect` does.
        what: see `collect`. Default: what `compress` needs by default; its `side="both"` needs `"fisher"`.
        directions: see `collect`. The exact sums of a frozen layer (None) cost as much as its gradient would, and this
            estimate some per cent of it; weights that train have their gradient, so that `"per_batch"` is exact there.
        target_modules, exclude_modules: see `collect`.
        max_samples: stop after so many; None for all.
        every: collect in one of so many optimizer steps: the cost falls accordingly.
        batch_size: of the calibration pass. Default: the Trainer's batch of one device.
        seed: of the calibration's draw, and of `directions`.
        output: name of the file, in `output_dir`, without a folder; None for none.

    Raises:
        ValueError: here for settings out of range; when training starts for a model without such layers, or one that
            is compiled, offloaded, or split or replicated by FSDP, DeepSpeed or `DataParallel`, for a loss that is
            not about labels or that the model does not compute itself, or for a file called `output` that no run of
            this callback wrote or that has changed since (`.peftx.json` lists what it wrote).
    """

    by = "FisherCallback"  # whose file it is, in the folder's list

    def __init__(
        self,
        estimator: str = "per_batch",
        when: Literal["last_epoch", "train", "calibration"] = "last_epoch",
        *,
        what: str | Sequence[str] = ("fisher_in",),
        directions: int | None = DIRECTIONS,
        target_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        max_samples: int | None = SAMPLES,
        every: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
        output: str | None = FILE_NAME,
    ) -> None:
        check_settings(what, estimator, directions)
        check_choice("when", when, WHEN)
        check_count("max_samples", max_samples, none=True)
        check_count("every", every)
        check_count("batch_size", batch_size, none=True)
        check_count("seed", seed, 0, most=SEEDS)
        check_modules("target_modules", target_modules)
        check_modules("exclude_modules", exclude_modules)
        check_file_name("output", output, TAKEN)
        self.estimator, self.when, self.directions = estimator, when, directions
        self.what = (what,) if isinstance(what, str) else tuple(what)
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.max_samples, self.every, self.batch_size, self.seed = max_samples, every, batch_size, seed
        self.output = output
        self.statistics: Statistics | None = None
        self._collector: Collector | None = None
        self._trainer: Any = None
        self._begin = self._first = 0  # steps: of this run, and that count

    def close(self) -> None:
        """Takes the hooks off, whatever happened; `Trainer.train` does it too."""
        collector, self._collector = self._collector, None
        if collector is not None:
            collector.close()

    def on_init_end(self, args, state, control, **kwargs):
        trainer: Any = trainer_above(inspect.currentframe(), self)
        if trainer is None:
            return
        train = trainer.train  # there is no event for a training that fails

        @functools.wraps(train)
        def train_and_close(*positional: Any, **named: Any) -> Any:
            try:
                return train(*positional, **named)
            finally:
                self.close()

        trainer.train = train_and_close

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.close()  # of a training that was interrupted
        self.statistics = None
        self._trainer = trainer_above(inspect.currentframe(), self)
        check_whole(model, "collect on it")
        check_trainer(self._trainer, args)
        if self.output is not None:
            check_free(Path(args.output_dir), [self.output], self.by)
        collector = self._new(model)
        if self.when == "calibration":
            self._data()
        else:
            check_own_loss(self._trainer, args)
            check_head(self._trainer, collector)
        self._collector = collector
        if self.when == "calibration":
            return
        if args.load_best_model_at_end:
            logger.warning(
                "load_best_model_at_end: the sums will be those of the last steps, not of the best model. "
                "FisherCallback(when='calibration') collects on the model that is loaded."
            )
        self._begin, self._first = state.global_step, self._first_step(args, state)
        if state.global_step > self._first:
            logger.warning(
                f"FisherCallback: training resumes at step {state.global_step}, and collects since step {self._first}: "
                "the sums start anew, and miss the steps before"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        collector = self._collector
        if collector is None or self.when == "calibration":
            return
        share = math.inf if self.max_samples is None else math.ceil(self.max_samples / args.world_size)
        since, found = state.global_step - self._first, collector.totals.samples
        if state.global_step == self._begin or (since >= 0 and since % self.every == 0 and found < share):
            collector.attach()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._collector is not None:
            self._collector.detach()
            if state.global_step < self._first:
                self._collector = self._new(model)  # that was the trial

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._collector is None:
            return
        try:
            self._finish(self._collector, args, model)
        except ValueError as error:
            logger.error(f"FisherCallback has no statistics: {error}")
        finally:
            self.close()

    def _finish(self, collector: Collector, args: Any, model: Any) -> None:
        collector.detach()
        if args.world_size > 1:
            self._reduce(collector, args)
        if collector.totals.dropped:
            logger.warning(
                f"FisherCallback: {collector.totals.dropped} batches with infinite or NaN gradients do not count "
                "(with fp16 the first ones usually have)"
            )
        if self.when != "calibration" and not collector.totals.samples:
            logger.warning(f"FisherCallback: training ended before step {self._first}, so it collects in an extra pass")
        if not collector.totals.samples:
            collector = self._calibrate(args, model)
        self.statistics = collector.statistics()
        logger.info(f"FisherCallback: {self.statistics}")
        if self.output is not None:
            if args.should_save:
                self._save(Path(args.output_dir, self.output))
            if self._trainer is not None:
                self._trainer.accelerator.wait_for_everyone()

    def _save(self, path: Path) -> None:
        assert self.statistics is not None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written(path, self.by) as draft:
                self.statistics.save(draft)
        except (ValueError, OSError, SafetensorError) as error:  # the training is done, and its model to be saved
            logger.error(f"FisherCallback could not write {path} ({error}): callback.statistics.save(...) does it anew")

    def _first_step(self, args: Any, state: Any) -> int:
        """Of those that count: the last ones of the last epoch that hold `max_samples`."""
        if self.when == "train":
            return 0
        endless = state.num_train_epochs > state.max_steps  # a stream of unknown length
        steps = state.max_steps if endless else math.ceil(state.max_steps / max(1, state.num_train_epochs))
        if self.max_samples is not None:
            size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            steps = min(steps, self.every * math.ceil(self.max_samples / size))
        return max(0, state.max_steps - steps)

    def _new(self, model: Any) -> Collector:
        layers = target_layers(model, self.target_modules, self.exclude_modules)
        return Collector(
            model, layers, what=self.what, estimator=self.estimator, directions=self.directions, seed=self.seed
        )

    def _data(self) -> tuple[Any, Any]:
        """Samples and collator of a pass after training."""
        if self._trainer is None or self._trainer.train_dataset is None:
            raise ValueError(
                "FisherCallback found no Trainer and data for a pass after training: collect with "
                "peftx.compression.collect"
            )
        data, collator = columns_of(self._trainer, self._trainer.train_dataset)
        return chosen(data, self.max_samples, self.seed), collator

    def _calibrate(self, args: Any, model: Any) -> Collector:
        trainer, (picked, collator) = self._trainer, self._data()
        share = Subset(picked, range(args.process_index, len(picked), args.world_size))
        collector = self._new(model)
        with trainer.accelerator.autocast():
            gather(
                model,
                share,
                collator,
                collector,
                batch_size=self.batch_size or trainer._train_batch_size,
                progress=trainer.accelerator.is_main_process and not args.disable_tqdm,
            )
        if args.world_size > 1:
            self._reduce(collector, args)
        return collector

    def _reduce(self, collector: Collector, args: Any) -> None:
        """Sums over processes, each of which calls it."""
        from accelerate.utils import reduce

        collector.totals.reduce(functools.partial(reduce, reduction="sum"), args.device)
