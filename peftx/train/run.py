"""One run: a model, data and a method in; an adapter, its tokenizer, card and numbers out. The Trainer trains."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from peft import get_peft_model, prepare_model_for_kbit_training
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from ..data.records import Records, hold_out, label_names, read_both
from ..data.text import encode, label_field, longest, pad, padding_of
from ..progress import Progress
from ..pruning.head import task_of_class
from ..utils import AUTO_CLASSES, IGNORE, quiet
from .methods import Method, check_settings, dtype_of, find, owners, peft_config, trainable
from .settings import Section, Settings, TrainSettings, arguments_of, checked, parse, read_yaml, section

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
SETTINGS, METRICS = "settings.yaml", "metrics.json"
PACKAGES = ("peftx", "peft", "transformers", "accelerate", "torch")
WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")


@quiet()
def train(settings: TrainSettings, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Fine-tunes a model by a method, and saves everything in `settings.output`.

    There are, after it: the adapter (or the model, where the method is `full`), the tokenizer, the card `README.md`,
    `metrics.json`, `settings.yaml`, and the Trainer's checkpoints. Under `accelerate launch` or `torchrun` every
    process calls this, and the first one writes.

    Args:
        settings: what to do.
        callbacks: for the Trainer, beside those that the settings ask for.

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
    checkpoint = check_folder(settings) if main or settings.resume else None
    plan, samples, held_samples = prepared(settings, show=main and not arguments.disable_tqdm)
    task, tokenizer = plan.task, plan.tokenizer
    transformers.set_seed(arguments.seed)
    network, new_modules = load(settings, plan, str(arguments.device))
    collate = functools.partial(pad, padding=padding_of(network, tokenizer))
    if arguments.world_size > 1 or arguments.gradient_accumulation_steps > 1:
        network.accepts_loss_kwargs = task != "SEQ_CLS" and scales_loss(network, collate(samples[:1]))
    model, config = adapt(network, method, chosen, task, new_modules, arguments)
    if settings.small_states is None and hasattr(config, "optimizer_options"):
        optimizer = config.optimizer_options()
    elif optimizer is not None and hasattr(config, "optimizer_options"):
        optimizer = {**config.optimizer_options(), **optimizer}
    trainer = Trainer(
        model,
        arguments,
        collate,
        samples,
        held_samples or None,
        processing_class=tokenizer,
        compute_metrics=accuracy if task == "SEQ_CLS" else token_metrics,
        preprocess_logits_for_metrics=classes if task == "SEQ_CLS" else functools.partial(token_losses, task),
        callbacks=[*([method.callback()] if method.callback else []), *extras, *callbacks],
        **small_states(arguments, optimizer),
    )
    trainer.remove_callback(PrinterCallback)
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(settings.method))
    trainer.add_callback(Record(settings))  # the last one: what the others refuse leaves no trace
    adapter, whole = trainable(model)
    if main and settings.overwrite:
        clear(Path(settings.output))
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(settings.output)
    evaluation = trainer.evaluate() if held_samples else {}
    # resumed when nothing is left, a Trainer takes one step more, at a learning rate of zero
    log, last = trainer.state.log_history, trainer.state.max_steps
    history = [entry for entry in log if "loss" not in entry or entry["step"] <= last]
    metrics = {
        "model": settings.model,
        "task": task,
        "method": settings.method,
        "method_settings": plain(chosen),
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "steps": min(trainer.state.global_step, last),
        "epochs": trainer.state.epoch,
        "processes": arguments.world_size,
        "samples": {"train": len(samples), "trained_on": kept(extras, len(samples)), "eval": len(held_samples)},
        "trained_values": {"adapter": adapter, "whole_modules": whole},
        "train_loss": training_loss(history),
        "train_seconds": outcome.metrics["train_runtime"],
        "eval": evaluation_metrics(evaluation, task),
        "labels": [network.config.id2label[i] for i in range(network.config.num_labels)]
        if task in CLASSIFIERS
        else None,
        "history": history,
    }
    if main:
        metrics["bytes"] = finish(Path(settings.output), metrics)
    trainer.accelerator.wait_for_everyone()
    return metrics


def extra_callbacks(settings: TrainSettings) -> list[TrainerCallback]:
    """What chooses samples, and what collects Fisher sums."""
    found: list[TrainerCallback] = []
    if (prune := section(settings.prune)) is not None:
        from ..pruning import DonodCallback

        found.append(DonodCallback(**checked(prune, arguments_of(DonodCallback), "prune")))
    if (fisher := section(settings.fisher)) is not None:
        from ..compression import FisherCallback

        found.append(FisherCallback(**checked(fisher, arguments_of(FisherCallback), "fisher")))
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
    for name, instead in (("output_dir", "output"), ("resume_from_checkpoint", "resume")):
        if name in given:
            raise ValueError(f"training: {name} is set by `{instead}`: leave it out")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if given.get(name, 1) < 1:
            raise ValueError(f"training: {name} must be at least 1, got {given[name]}")
    if given.get("max_steps") == 0 or given.get("num_train_epochs", 1) <= 0:
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
    if method.config is not None:  # every adapter takes part in each step
        defaults["ddp_find_unused_parameters"] = False
    if given.get("gradient_checkpointing") or given.get("activation_checkpointing"):
        defaults["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        return TrainingArguments(settings.output, **{**defaults, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"training: {error}") from error


def check_folder(settings: TrainSettings) -> str | None:
    """The checkpoint to resume from, if that is asked for; else the folder is new, or may be overwritten.

    Raises:
        ValueError: it is a file, or holds what nobody asked to replace; nothing to resume, or another run.
    """
    folder = Path(settings.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file, not a folder")
    if settings.resume:
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint in {folder} to resume from")
        check_same_run(settings, folder / SETTINGS)
        return checkpoint
    if folder.exists() and any(folder.iterdir()) and not settings.overwrite:
        raise ValueError(f"output {folder} is not empty: name another folder, or say overwrite or resume")
    return None


def clear(folder: Path) -> None:
    """Removes what an earlier run has left; other files stay."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    ours = ("adapter_*", "model*.safetensors", "*config.json", "selection.*", "fisher.safetensors", SETTINGS, METRICS)
    for path in (path for pattern in ours for path in folder.glob(pattern)):
        path.unlink()


def check_same_run(settings: TrainSettings, path: Path) -> None:
    """A run is resumed as what it was; its `training` may change (transformers warns of what it minds)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, so what the checkpoint belongs to is unknown: start anew with overwrite")
    free = ("training", "output", "resume", "overwrite")
    before = parse(TrainSettings, read_yaml(path))
    for name in (f.name for f in dataclasses.fields(settings) if f.name not in free):
        ours, theirs = plain(getattr(settings, name)), plain(getattr(before, name))
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r}, but the run to resume has {theirs!r}: say that, or start anew")


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings that are not at their default, as YAML holds them."""
    shown = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value != default:
            shown[f.name] = plain(value)
    return shown


def plain(value: Any) -> Any:
    """With lists for sets and tuples, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def write_settings(settings: TrainSettings) -> None:
    """`settings.yaml`: what `peftx train --config` takes, and what a resumed run is compared with."""
    import yaml

    shown = {k: v for k, v in as_dict(settings).items() if k not in ("resume", "overwrite")}
    Path(settings.output, SETTINGS).write_text(yaml.safe_dump(shown, sort_keys=False), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before its weights are loaded. `options` are `from_pretrained`'s, for a new classifier."""

    task: str
    tokenizer: Any
    config: Any
    options: dict[str, Any]


def planned(settings: Settings, records: Records) -> Plan:
    """Raises ValueError where there is no such model, its task is unknown, or the records have no labels for it."""
    name = settings.model
    with loading(name):
        config = transformers.AutoConfig.from_pretrained(name)
    task = task_for(settings, config)
    options: dict[str, Any] = {}
    if task in CLASSIFIERS:
        options = head_options(config, task, label_names(records, label_field(task, settings.label)))
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if task == "TOKEN_CLS" and "ByteLevel" in str(getattr(tokenizer, "backend_tokenizer", None)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # each word alone
    return Plan(task, tokenizer, config, options)


def skeleton(settings: Settings, plan: Plan) -> tuple[Any, list[str]]:
    """The model on the meta device, without its weights, and the modules that the checkpoint has no weights for."""
    with loading(settings.model):
        network, report = getattr(transformers, AUTO_CLASSES[plan.task]).from_pretrained(
            settings.model, device_map={"": "meta"}, output_loading_info=True, **plan.options
        )
    return network, unfilled(network, report)


def unfilled(network: Any, report: Mapping[str, Any]) -> list[str]:
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
    return owners([*report["missing_keys"], *mismatched], network)


def load(settings: TrainSettings, plan: Plan, device: str) -> tuple[Any, list[str]]:
    """The model, and the modules that the checkpoint has no weights for (a new classifier).

    Raises:
        ValueError: its weights do not fit or cannot be read.
    """
    name, options = settings.model, dict(plan.options)
    if settings.load_in_4bit or settings.load_in_8bit:
        whole = None  # the output layer of a language model stays as it is by default
        if plan.task in CLASSIFIERS:  # what is trained whole cannot be quantised
            whole = [*SEQ_CLS_HEAD_NAMES, *skeleton(settings, plan)[1]]
        options |= {"quantization_config": quantization(settings, whole), "device_map": {"": device}}
    with loading(name):
        network, report = getattr(transformers, AUTO_CLASSES[plan.task]).from_pretrained(
            name, dtype=dtype_of(settings.dtype), output_loading_info=True, **options
        )
    for module in network.modules():
        # On a CPU bitsandbytes packs 4-bit weights for good in the first pass in eval mode (of an evaluation, or of
        # scoring samples), and gradients do not flow through packed ones.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if network.config.pad_token_id is None:
        network.config.pad_token_id = padding_of(network, plan.tokenizer)
    return network, unfilled(network, report)


@contextmanager
def loading(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        where = "" if Path(name).exists() else ", which is not a folder here,"
        message = str(error).split("Model type should be one of")[0]  # and some hundred names
        raise ValueError(f"the model {name}{where} cannot be loaded: {message}") from error


def task_for(settings: Settings, config: Any) -> str:
    """The task that is asked for, or the model's own."""
    if (task := settings.task) is None:
        architecture = next(iter(config.architectures or ()), "model without an architecture")
        if (task := task_of_class(architecture)) not in TASKS:
            raise ValueError(
                f"cannot tell the task of a {architecture}: name one of {', '.join(TASKS)} by `task` (--task)"
            )
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task}")
    return task


def head_options(config: Any, task: str, names: Sequence[str]) -> dict[str, Any]:
    """Nothing where the model's own classifier knows all labels; else a new one is made for them."""
    own = set((config.id2label or {}).values())
    is_classifier = task_of_class(next(iter(config.architectures or ()), "")) == task
    numbered = all(name.startswith("LABEL_") for name in names)
    if is_classifier and (own.issuperset(names) or (numbered and len(names) <= config.num_labels)):
        return {}
    ids = dict(enumerate(names))
    return {"id2label": ids, "label2id": {v: k for k, v in ids.items()}, "ignore_mismatched_sizes": True}


def quantization(settings: TrainSettings, whole: list[str] | None) -> BitsAndBytesConfig:
    """QLoRA's 4 bits (arXiv:2305.14314): NF4, its constants quantised too; or LLM.int8 (arXiv:2208.07339).

    The modules `whole` are not quantised.
    """
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    compute = torch.bfloat16 if settings.dtype == "auto" else dtype_of(settings.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=whole,  # whatever its name says
    )


def prepared(settings: Settings, *, show: bool = False) -> tuple[Plan, Records, Records]:
    """All that needs no weights: the plan, and the samples to train on and the held-out ones.

    Raises:
        ValueError: the data, the model's config or tokenizer, or one does not fit the other.
        OSError: a file cannot be read.
    """
    records, others = read_both(settings)
    plan = planned(settings, records + (others or []))
    samples = encoded(settings, records, plan, settings.data, show=show)
    if others is None:  # after encoding, so that a bad record is named by its place in the file
        return plan, *hold_out(samples, settings.eval_share, settings.data)
    return plan, samples, encoded(settings, others, plan, settings.eval_data or settings.data)


def encoded(settings: Settings, records: Records, plan: Plan, source: str, *, show: bool = False) -> Records:
    """The records as token ids and labels.

    Raises:
        ValueError: a record lacks a field, or the tokenizer or the length leaves nothing of any of them.
    """
    rows = tqdm(records, desc="Tokenising", leave=False, disable=not show)
    fields: dict[str, Any] = {"prompt": settings.prompt, "answer": settings.answer, "label": settings.label}
    fields["label2id"] = plan.options.get("label2id", plan.config.label2id)
    tokenizer = plan.tokenizer
    length = longest(settings.max_length, tokenizer, plan.config)
    try:
        samples = encode(rows, tokenizer, plan.task, max_length=length, **fields)
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from error
    special = set(tokenizer.all_special_ids)
    if not any(set(sample["input_ids"]) - special for sample in samples):
        raise ValueError(
            f"no sample has a word that the tokenizer of {settings.model} knows within the first {length} tokens: "
            "are its files there?"
        )
    supervised = (plan.task == "SEQ_CLS" or any(y != IGNORE for y in sample["labels"]) for sample in samples)
    if not any(supervised):
        what = "a label" if plan.task == "TOKEN_CLS" else "an answer"
        raise ValueError(f"no sample has {what} within the first {length} tokens")
    return samples


def scales_loss(network: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether the model's loss follows `num_items_in_batch`.

    The Trainer believes it of every model that takes any keyword, and then neither averages over processes nor over
    accumulated batches; yet BERT's and T5's losses are means of their batch, whatever it is.
    """
    kinds = [p.kind for p in inspect.signature(network.forward).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return False
    batch = {name: tensor.to(network.device) for name, tensor in batch.items()}
    with torch.no_grad():
        one, two = (network(**batch, num_items_in_batch=count).loss for count in (1, 2))
    return bool(torch.isclose(one, 2 * two, rtol=1e-3))


def adapt(
    network: Any, method: Method, settings: Section, task: str, new_modules: list[str], arguments: TrainingArguments
) -> tuple[Any, Any]:
    """The model as it is trained, and its config; None for `full`.

    Raises:
        ValueError: the method does not fit the model.
    """
    quantised = getattr(network, "quantization_method", None) is not None
    if method.config is None:
        if quantised:
            raise ValueError("a quantised model cannot be trained in full: choose another method")
        return network, None
    config = peft_config(method, settings, task, new_modules)
    if quantised:
        network = prepare_model_for_kbit_training(
            network,
            use_gradient_checkpointing=bool(arguments.gradient_checkpointing),
            gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs,
        )
    try:
        return get_peft_model(network, config), config
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        raise DoesNotFitError(f"method {method.name} does not fit {network.config.model_type}: {error}") from error


class DoesNotFitError(ValueError):
    """The method cannot adapt this model; another one may."""


def classes(logits: Any, labels: Tensor) -> Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def token_losses(task: str, logits: Any, labels: Tensor) -> Tensor:
    """Sum of the losses, number of the tokens, and how many of them were right, of each sample: (samples, 3).

    The Trainer's own evaluation loss is a mean of means of batches, which depends on how samples are batched.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    if task == "CAUSAL_LM":
        scores, labels = scores[:, scores.shape[1] - labels.shape[1] :][:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(scores.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    parts = losses, labels != IGNORE, scores.argmax(-1) == labels
    return torch.stack([part.sum(-1).float() for part in parts], dim=-1)


def token_metrics(prediction: Any) -> dict[str, float]:
    total, count, right = prediction.predictions.astype("float64").sum(0)
    return {"token_loss": float(total / max(1, count)), "token_accuracy": float(right / max(1, count))}


def evaluation_metrics(found: Mapping[str, float], task: str) -> dict[str, float]:
    """`loss`, and `accuracy` or `perplexity`; of TOKEN_CLS over all tokens that have a label."""
    if not found:
        return {}
    if task == "SEQ_CLS":
        return {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}
    loss = found["eval_token_loss"]
    if task == "TOKEN_CLS":
        return {"loss": loss, "accuracy": found["eval_token_accuracy"]}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def training_loss(history: Sequence[Mapping[str, Any]]) -> float:
    """Mean over all steps and processes. The Trainer's own leaves out the steps before a resume, and, since the last
    log entry, the other processes; `Record` sees to it that no step is without an entry."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / max(last, 1)


def kept(callbacks: Sequence[Any], count: int) -> int:
    """How many samples were trained on."""
    chosen = [callback.selection for callback in callbacks if getattr(callback, "selection", None) is not None]
    return len(chosen[0].indices) if chosen else count


def finish(folder: Path, metrics: dict[str, Any]) -> int:
    """Adds the results to the card, writes the numbers, and removes the Trainer's pickled arguments; bytes saved."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    size = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))
    versions = {name: version(name) for name in PACKAGES}
    page = json.dumps({**metrics, "bytes": size, "versions": versions}, indent=1, default=str)
    (folder / METRICS).write_text(page + "\n", encoding="utf-8")
    path = folder / "README.md"
    card = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else ModelCard("---\n{}\n---\n")
    card.text = f"{RUN.sub('', card.text).rstrip()}\n\n{run_section(metrics)}\n"
    card.save(path)
    return size


START, END = "<!-- run: peftx train writes from here -->", "<!-- run: to here -->"
RUN = re.compile(rf"{START}.*?{END}\n*", re.DOTALL)


def run_section(metrics: Mapping[str, Any]) -> str:
    """The part of the card that says how it was trained, and how good it is."""
    count = metrics["samples"]
    rows = {
        "trained on": f"{count['trained_on']:,} samples, {metrics['steps']:,} steps",
        "learning rate, seed": f"{metrics['learning_rate']:g}, {metrics['seed']}",
        **({"labels, from 0": ", ".join(metrics["labels"])} if metrics["labels"] else {}),
        "training loss": f"{metrics['train_loss']:.4f}",
        **{f"{name}, {count['eval']:,} held-out samples": f"{v:.4f}" for name, v in metrics["eval"].items()},
    }
    return "\n".join(
        [
            START,
            "",
            "## Training run",
            "",
            "| | |",
            "| --- | ---: |",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            END,
        ]
    )


class Record(TrainerCallback):
    """Writes the settings when the training starts, and has the loss logged wherever it may end."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_settings(self.settings)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True
