"""What a run knows before it trains: the task, the samples, and the model as the method adapts it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftType, get_peft_model, prepare_model_for_kbit_training
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, TrainingArguments

from ..adapters import fast_experts
from ..adapters.experts import fused_experts
from ..data.fields import label_field
from ..data.records import Records, hold_out, label_names, read_both
from ..data.text import encode, longest, naming, padding_of
from ..pruning.head import task_of_class
from ..saved import check_is_model
from ..utils import AUTO_CLASSES, CLASSIFIERS, IGNORE
from .methods import Method, dtype_of, fit_ranks, owners, peft_config
from .settings import Section, Settings, TrainSettings

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before its weights are loaded. `options` are `from_pretrained`'s, for a new classifier."""

    task: str
    tokenizer: Any
    config: Any
    options: dict[str, Any]


class DoesNotFitError(ValueError):
    """The method cannot adapt this model; another one may."""


def planned(settings: Settings, records: Records, others: Records | None = None) -> Plan:
    """Raises ValueError where there is no such model, its task is unknown, or the records have no labels for it, or
    the held-out ones, `others`, labels that a new classifier has not seen."""
    name = settings.model
    check_is_model(name, "merge it (peftx export {adapter} model --to merged), and name what that writes")
    with loading(name):
        config = transformers.AutoConfig.from_pretrained(name)
    task = task_for(settings, config)
    options: dict[str, Any] = {}
    if task in CLASSIFIERS:
        names = labels(settings, task, records)
        options = head_options(config, task, names)
        if (
            options
            and others
            and (unknown := [name for name in labels(settings, task, records, others) if name not in names])
        ):
            raise ValueError(
                f"{settings.eval_data or settings.data}: its held-out samples have labels that none to train on has: "
                f"{', '.join(unknown)}; leave such samples out, or train on some"
            )
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if task == "TOKEN_CLS" and "ByteLevel" in str(getattr(tokenizer, "backend_tokenizer", None)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # each word alone
    return Plan(task, tokenizer, config, options)


def labels(settings: Settings, task: str, records: Records, others: Records | None = None) -> list[str]:
    """Names of the classes of these records, and of the held-out ones too if they are given."""
    field, sources = label_field(task, settings.label, records), [settings.data]
    if others:
        own = label_field(task, settings.label, others)
        records = [*records, *({field: record.get(own)} for record in others)]
        sources.append(settings.eval_data or settings.data)
    with naming(" and ".join(dict.fromkeys(sources))):
        return label_names(records, field)


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
    plan = planned(settings, records, others)
    samples = encoded(settings, records, plan, settings.data, show=show)
    if others is None:  # after encoding, so that a bad record is named by its place in the file
        return plan, *hold_out(samples, settings.eval_share, settings.data)
    return plan, samples, encoded(settings, others, plan, settings.eval_data or settings.data)


def without_validation(settings: Settings, samples: Records) -> tuple[Records, Records]:
    """The samples that are trained on, and the validation part."""
    return hold_out(samples, settings.validation, settings.data, "another validation_share, or more samples")


def encoded(settings: Settings, records: Records, plan: Plan, source: str, *, show: bool = False) -> Records:
    """The records as token ids and labels.

    Raises:
        ValueError: a record lacks a field, or the tokenizer or the length leaves nothing of any of them.
    """
    rows = tqdm(records, desc="Tokenising", leave=False, disable=not show)
    fields: dict[str, Any] = {"prompt": settings.prompt, "answer": settings.answer, "label": settings.label}
    fields["label2id"] = plan.options.get("label2id", plan.config.label2id)
    if plan.task in CLASSIFIERS:
        fields["label"] = label_field(plan.task, settings.label, records)
    tokenizer = plan.tokenizer
    length = longest(settings.max_length, tokenizer, plan.config)
    with naming(source):
        samples = encode(rows, tokenizer, plan.task, max_length=length, **fields)
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
    network: Any,
    method: Method,
    settings: Section,
    task: str,
    new_modules: list[str],
    arguments: TrainingArguments,
    experts: bool = False,
) -> tuple[Any, Any, dict[str, int]]:
    """The model as it is trained; its config, None for `full`; and ranks that were lowered, see `fit_ranks`.

    Raises:
        ValueError: the method does not fit the model, or its experts are asked for and it has none.
    """
    names = fused_experts(network) if experts else []
    if experts and not names:
        raise ValueError(f"experts: {network.config.model_type} has no fused experts")
    quantised = getattr(network, "quantization_method", None) is not None
    if method.config is None:
        if quantised:
            raise ValueError("a quantised model cannot be trained in full: choose another method")
        return network, None, {}
    config = peft_config(method, settings, task, new_modules, names)
    narrow = fit_ranks(config, method, settings, network)
    if quantised:
        network = prepare_model_for_kbit_training(
            network,
            use_gradient_checkpointing=bool(arguments.gradient_checkpointing),
            gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs,
        )
    try:
        model = get_peft_model(network, config)
        if names and config.peft_type == PeftType.LORA:
            fast_experts(model)
        return model, config, narrow
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        raise DoesNotFitError(f"method {method.name} does not fit {network.config.model_type}: {error}") from error
