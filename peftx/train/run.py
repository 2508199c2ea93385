"""One run: a model, data and a method in; an adapter, its tokenizer, card and numbers out. The Trainer trains."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..data.text import pad, padding_of
from ..files import DRAFT, NEW, drafted, note, read_list, writing
from ..progress import Progress
from ..utils import CLASSIFIERS, quiet
from .answers import AnsweringTrainer
from .folder import BY, Record, begin, check_names, end, find_place, plain
from .heads import HeadTrainer, heads_of
from .measures import measures_of, of_trainer
from .methods import Method, check_settings, find, trainable
from .metrics import more_is_better
from .plan import adapt, load, prepared, scales_loss, without_validation
from .results import evaluation_metrics, finish, kept, training_loss
from .settings import Section, TrainSettings, arguments_of, checked, section


@quiet()
def train(
    settings: TrainSettings, callbacks: Sequence[TrainerCallback] = (), *, choosing: bool = False
) -> dict[str, Any]:
    """Fine-tunes a model by a method, and saves everything in `settings.output`.

    There are, after it: the adapter (or the model, where the method is `full`), the tokenizer, the card `README.md`,
    `metrics.json`, `settings.yaml`, and the Trainer's checkpoints. Under `accelerate launch` or `torchrun` every
    process calls this, and the first one writes.

    Args:
        settings: what to do.
        callbacks: for the Trainer, beside those that the settings ask for.
        choosing: whether the run only helps to choose: it is measured on the validation part, and nothing reads the
            held-out samples.

    Returns:
        What is in `metrics.json`.

    Raises:
        ValueError: settings, data, model or method do not fit, or the folder holds another run.
        OSError: a file cannot be read or written.
    """
    method = find(settings.method)
    chosen = check_settings(method, settings.method_settings)
    extras = extra_callbacks(settings)
    arguments = training_arguments(settings, method)
    optimizer = optimizer_options(settings)
    main = arguments.process_index == 0
    with arguments.main_process_first(local=False), warnings.catch_warnings():
        if not main:  # the first process says it
            warnings.simplefilter("ignore")
        place = find_place(settings)
    if place.where != place.folder:
        arguments = training_arguments(dataclasses.replace(settings, output=str(place.where)), method)
    plan, samples, held_samples = prepared(settings, show=main and not arguments.disable_tqdm)
    task, tokenizer = plan.task, plan.tokenizer
    samples, validation = without_validation(settings, samples)
    held_samples = [] if choosing else held_samples
    measures = measures_of(settings, plan, {"validation": validation, "held-out": held_samples})
    if measures.best:
        arguments.metric_for_best_model = of_trainer(measures.best, task)
        given = settings.training.get("greater_is_better")
        arguments.greater_is_better = more_is_better(measures.best) if given is None else given
    check_names(place, settings, tokenizer, whole=method.config is None)
    transformers.set_seed(arguments.seed)
    network, new_modules = load(settings, plan, str(arguments.device))
    collate = functools.partial(pad, padding=padding_of(network, tokenizer))
    if arguments.world_size > 1 or arguments.gradient_accumulation_steps > 1:
        network.accepts_loss_kwargs = task != "SEQ_CLS" and scales_loss(network, collate(samples[:1]))
    model, config, narrow = adapt(network, method, chosen, task, new_modules, arguments, settings.experts)
    if settings.small_states is None and hasattr(config, "optimizer_options"):
        optimizer = config.optimizer_options()
    elif optimizer is not None and hasattr(config, "optimizer_options"):
        optimizer = {**config.optimizer_options(), **optimizer}
    generating: dict[str, Any] = {}
    if measures.generate is not None:
        generating = {"task": task, "measure": measures.of_texts, "options": measures.generate}
        generating["padding"] = padding_of(network, tokenizer)
    heads = heads_of(model, new_modules) if settings.head_learning_rate is not None else []
    trainer = (AnsweringTrainer if generating else HeadTrainer)(
        model,
        arguments,
        collate,
        samples,
        validation or held_samples or None,
        processing_class=tokenizer,
        compute_metrics=measures.compute,
        preprocess_logits_for_metrics=measures.reduced,
        callbacks=[*([method.callback()] if method.callback else []), *extras, *callbacks],
        **small_states(arguments, optimizer),
        **generating,
        heads=heads,
        head_rate=settings.head_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(settings.method))
    trainer.add_callback(Record(settings, place))  # the last one: what the others refuse leaves no trace
    adapter, whole = trainable(model)
    if main:
        begin(place)
    with writing(place.where, "go on by resume"):
        outcome = trainer.train(resume_from_checkpoint=str(place.checkpoint) if place.checkpoint else None)
    save(trainer, place.where, main)
    found: dict[str, Any] = {}
    if validation and (choosing or measures.best):
        found["validation"] = evaluation_metrics(trainer.evaluate(), task, measures.keys)
    prefix = "test" if validation else "eval"
    of_test: dict[str, Any] = {"eval_dataset": held_samples, "metric_key_prefix": prefix} if validation else {}
    evaluation = trainer.evaluate(**of_test) if held_samples else {}
    # resumed when nothing is left, a Trainer takes one step more, at a learning rate of zero
    log, last = trainer.state.log_history, trainer.state.max_steps
    history = [entry for entry in log if "loss" not in entry or entry["step"] <= last]
    metrics = {
        "model": settings.model,
        "task": task,
        "method": settings.method,
        "method_settings": plain(chosen),
        "lower_ranks": narrow,
        "learning_rate": arguments.learning_rate,
        **({"head_learning_rate": settings.head_learning_rate} if heads else {}),
        "seed": arguments.seed,
        "steps": min(trainer.state.global_step, last),
        "epochs": trainer.state.epoch,
        "processes": arguments.world_size,
        "samples": {
            "train": len(samples),
            "trained_on": kept(extras, len(samples)),
            **({"validation": len(validation)} if validation else {}),
            "eval": len(held_samples),
        },
        "trained_values": {"adapter": adapter, "whole_modules": whole},
        "train_loss": training_loss(history),
        "train_seconds": outcome.metrics["train_runtime"],
        **found,
        "eval": evaluation_metrics(evaluation, task, measures.keys, prefix),
        **({"best": {"metric": measures.best, "step": trainer.state.best_global_step}} if measures.best else {}),
        "labels": [network.config.id2label[i] for i in range(network.config.num_labels)]
        if task in CLASSIFIERS
        else None,
        "history": history,
    }
    if main:
        metrics["bytes"] = finish(place.where, metrics)
        end(place)
    trainer.accelerator.wait_for_everyone()
    return metrics


def save(trainer: Trainer, where: Path, main: bool) -> None:
    """The model and its tokenizer, all of it or nothing; every process takes part."""
    draft = where / DRAFT
    if not main:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(draft), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
    else:
        with drafted(where, BY, replace=False):
            if (where / "README.md").is_file():  # which may have results, and is completed
                shutil.copyfile(where / "README.md", draft / "README.md")
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(draft), _internal_call=True)
            (draft / "training_args.bin").unlink(missing_ok=True)  # a pickle
            trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
        if main:
            note(where, [name for name in read_list(where) if "/" not in name], BY)


def extra_callbacks(settings: TrainSettings) -> list[TrainerCallback]:
    """What chooses samples, and what collects Fisher sums."""
    found: list[TrainerCallback] = []
    if (prune := section(settings.prune)) is not None:
        from ..pruning import DonodCallback

        found.append(DonodCallback(**checked(prune, arguments_of(DonodCallback), "prune")))
    if (fisher := section(settings.fisher)) is not None:
        from ..compression import FisherCallback

        found.append(FisherCallback(**checked(fisher, arguments_of(FisherCallback), "fisher")))
    for callback in found:
        callback.by = BY  # type: ignore[attr-defined]
    return found


def optimizer_options(settings: TrainSettings) -> Section | None:
    """Arguments of `peftx.optim.create_optimizer`; None where the Trainer makes the optimizer."""
    options = section(settings.small_states)
    if options is None:
        return None
    from ..optim import LowRankAdamW, create_optimizer

    types = {**arguments_of(LowRankAdamW), **arguments_of(create_optimizer)}
    return checked(options, {k: v for k, v in types.items() if k not in ("model", "args", "params")}, "small_states")


def small_states(arguments: TrainingArguments, options: Section | None) -> dict[str, Any]:
    if options is None:
        return {}
    from ..optim import trainer_kwargs

    return trainer_kwargs(arguments, **options)


def training_arguments(settings: TrainSettings, method: Method) -> TrainingArguments:
    """`TrainingArguments` of the settings, with our defaults where they are silent.

    Raises:
        ValueError: an unknown field, a value that TrainingArguments does not take, or a field that has its own setting.
    """
    types = arguments_of(TrainingArguments)
    given = checked(settings.training, types, "training")
    best = settings.best_metric is not None
    own = [("output_dir", "output"), ("resume_from_checkpoint", "resume")]
    own += [(name, "best_metric") for name in ("metric_for_best_model", "load_best_model_at_end") if best]
    for name, instead in own:
        if name in given:
            raise ValueError(f"training: {name} is set by `{instead}`: leave it out")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if given.get(name, 1) < 1:
            raise ValueError(f"training: {name} must be at least 1, got {given[name]}")
    steps = given.get("max_steps", -1)  # -1, TrainingArguments' own: as many as the epochs have
    if not 0 < given.get("num_train_epochs", 1) < math.inf or (steps < 1 and steps != -1):
        raise ValueError("training: num_train_epochs must be above 0, and max_steps at least 1")
    if not 0 <= given.get("learning_rate", 0) < math.inf:
        raise ValueError(f"training: learning_rate must be a number of at least 0, got {given['learning_rate']}")
    defaults: dict[str, Any] = {
        "learning_rate": method.learning_rate,
        "logging_steps": 10,
        "save_strategy": "steps" if "save_steps" in given else "epoch",
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": False,
        "log_level_replica": "error",
    }
    if best:
        defaults |= evaluated_and_saved(given)
    if given.get("push_to_hub"):
        defaults["hub_model_id"] = Path(settings.output).parent.name if Path(settings.output).name == NEW else None
    if method.config is not None:  # every adapter takes part in each step
        defaults["ddp_find_unused_parameters"] = False
    if given.get("gradient_checkpointing") or given.get("activation_checkpointing"):
        defaults["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        return TrainingArguments(settings.output, **{**defaults, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"training: {error}") from error


def evaluated_and_saved(given: Section) -> Section:
    """What a choice of the best checkpoint needs: evaluations wherever one is saved."""
    steps = given.get("save_steps", given.get("eval_steps"))
    strategies = (given.get("eval_strategy"), given.get("save_strategy"), "epoch" if steps is None else "steps")
    strategy = next(value for value in strategies if value not in (None, "best"))
    found: Section = {"load_best_model_at_end": True, "save_strategy": strategy, "eval_strategy": strategy}
    return found if steps is None else {**found, "save_steps": steps, "eval_steps": steps}
