"""`peftx train`: fine-tune a model by a method. Its options are the fields of the settings, and some of their parts."""

import dataclasses
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..train.settings import Settings, TrainSettings, parse, read_value, read_yaml
from .main import fail, told

S = TypeVar("S", bound=Settings)

# Flags that stand for one value of a section: its type, the section, the name in it, and the help.
SHORT: dict[str, tuple[Any, str, str, str]] = {
    "epochs": (float, "training", "num_train_epochs", "Passes over the data."),
    "max_steps": (int, "training", "max_steps", "Optimizer steps, in place of --epochs."),
    "batch_size": (int, "training", "per_device_train_batch_size", "Samples of a batch on one device."),
    "gradient_accumulation": (int, "training", "gradient_accumulation_steps", "Batches of an optimizer step."),
    "learning_rate": (float, "training", "learning_rate", "Of AdamW."),
    "seed": (int, "training", "seed", "Of adapter, batches and dropout."),
    "bf16": (bool, "training", "bf16", "Compute in bfloat16."),
    "gradient_checkpointing": (bool, "training", "gradient_checkpointing", "Recompute activations: less memory."),
    "prune_keep": (float, "prune", "keep", "Train on this share of the samples, which DONOD chooses."),
}
DEFAULTS = {"epochs": "3", "batch_size": "8", "gradient_accumulation": "1", "learning_rate": "the method's", "seed": 42}
PARTS = ("subset", "split", "eval_split", "eval_data")  # of a data set
PAIRS = {"set": "method_settings", "training": "training"}  # flags with KEY=VALUE, and their sections


def with_options(cls: type[S], *left_out: str) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Makes a command of a function of settings: `cls` gives the options, a YAML file what they leave open.

    What the user can put right is told in one line, by one process, with exit code 2.
    """

    def decorate(run: Callable[[S], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**given: Any) -> None:
            import torch

            try:
                with told():
                    run(parse(cls, collect(cls, given)))
            except (ValueError, OSError, NotImplementedError) as error:
                message = " ".join(str(error).split())
            except torch.OutOfMemoryError as error:
                message = (
                    f"out of memory: lower --batch-size, or --gradient-checkpointing ({str(error).splitlines()[0]})"
                )
            else:
                return
            if os.environ.get("RANK", "0") != "0":  # the first process says it
                raise typer.Exit(2)
            fail(message)

        parameters = options(cls, left_out)
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def options(cls: type[Settings], left_out: tuple[str, ...]) -> list[inspect.Parameter]:
    """The command line's parameters. None stands for what was not said."""

    def parameter(
        name: str, kind: Any, text: str, *flags: str, shown: Any = None, metavar: str | None = None
    ) -> inspect.Parameter:
        default = str(shown) if shown not in (None, "", False) else False
        option = typer.Option(*flags, help=text, show_default=default, metavar=metavar)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])

    hints = typing.get_type_hints(cls)
    found = [parameter("config", Path | None, "YAML file with any of these settings; flags win over it.")]
    sections = []
    for f in dataclasses.fields(cls):
        text = f.metadata["help"]
        kinds = alternatives(hints[f.name])
        kind: Any = kinds[0] if kinds[0] in (int, float, bool) else list[str] if f.metadata.get("many") else str
        if dict[str, Any] in kinds and str not in kinds:
            if bool in kinds and f.name != "prune":
                flag = f.name.replace("_", "-")
                shown = f.metadata["shown"]
                sections.append(parameter(f.name, bool | None, text, f"--{flag}/--no-{flag}", shown=shown))
            continue
        flags = (f"--{f.name.replace('_', '-')}",) if kind is bool else ()
        found.append(parameter(f.name, kind | None, text, *flags, shown=f.metadata.get("shown") or f.default))
    for name, section in PAIRS.items():
        if section not in left_out:
            text = next(f.metadata["help"] for f in dataclasses.fields(cls) if f.name == section)
            found.append(parameter(f"pairs_{name}", list[str] | None, text, f"--{name}", metavar="KEY=VALUE"))
    for name, (kind, _, _, text) in SHORT.items():
        if name not in left_out:
            flag = name.replace("_", "-")
            flags = (f"--{flag}/--no-{flag}",) if kind is bool else ()
            found.append(parameter(name, kind | None, text, *flags, shown=DEFAULTS.get(name)))
    return [p for p in [*found, *sections] if p.name not in left_out]


def data_option(name: str) -> Any:
    """The option of a setting of the data, for a command that has no settings of its own."""
    metadata = next(f.metadata for f in dataclasses.fields(Settings) if f.name == name)
    least = 2 if name == "max_length" else None
    return typer.Option(min=least, help=metadata["help"], show_default=metadata["shown"] or True)


def alternatives(hint: Any) -> list[Any]:
    """The types in a union, None left out."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [kind for kind in kinds if kind is not type(None)]


def collect(cls: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name: of the YAML file, and over them those of the flags. A run is resumed by its own file.

    Other data than the file's come without its parts: what the file says of subset and splits is left out.

    Raises:
        ValueError: the file is no YAML, a KEY=VALUE has no `=`, or there is no run to resume.
        OSError: the file cannot be read.
    """
    flags = {name: value for name, value in given.items() if value is not None and value != []}
    path = flags.pop("config", None)
    if path is None and flags.get("resume"):
        from ..train.folder import SETTINGS, interrupted

        own = interrupted(Path(flags.get("output", ""))) / SETTINGS
        if own.is_file():
            path = own
        elif "model" not in flags:
            raise ValueError(f"nothing to resume in {flags.get('output', 'no --output')}: it has no {SETTINGS}")
    values = read_yaml(path) if path else {}
    if flags.get("data", values.get("data")) != values.get("data"):
        values = {name: value for name, value in values.items() if name not in PARTS}
    names = {f.name for f in dataclasses.fields(cls)}
    for name, value in flags.items():
        if name.startswith("pairs_"):
            section = PAIRS[name.removeprefix("pairs_")]
            values[section] = {**as_mapping(values, section), **dict(pair(text) for text in value)}
        elif name in SHORT:
            _, section, key, _ = SHORT[name]
            values[section] = {**as_mapping(values, section), key: value}
        elif name in names and value is True and isinstance(values.get(name), dict):
            pass  # a section that the file switches on already
        else:
            values[name] = value
    if "epochs" in flags and "max_steps" not in flags:
        values["training"].pop("max_steps", None)
    return values


def as_mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    if value is None or value is True or value is False:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"settings: {name} must be a mapping, got {value!r}")
    return value


def pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    return name.strip(), read_value(value)


@with_options(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Fine-tune a model on your data by any method of peftx or PEFT.

    Fields of the data are found: messages or conversations (role and content, or from and value); prompt and
    completion, response or answer; question and answer; instruction, input and output; document, article, dialogue or
    text and summary; or text. Of a classifier: text (or sentence, content, review...) and label (or class,
    sentiment...); of one of tokens (TOKEN_CLS): tokens and labels, lists of words and of their labels. Of a causal LM
    only the last answer is learned. The output folder gets the adapter, tokenizer, card and metrics.json.
    `accelerate launch -m peftx.cli train ...` and `torchrun` use several devices or processes.
    """
    from ..train.run import train as run

    metrics = run(settings)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(summary(metrics, settings.output))


def summary(metrics: Mapping[str, Any], output: str) -> str:
    from ..train.report import lower_ranks

    values = metrics["trained_values"]
    whole = f" and {values['whole_modules']:,} of new modules" if values["whole_modules"] else ""
    results = [*lower_ranks(metrics), f"training loss {metrics['train_loss']:.4f}"]
    if (best := metrics.get("best")) and best["step"] is not None:
        results.append(f"best by {best['metric']} at step {best['step']}")
    results += [f"held-out {name} {value:.4f}" for name, value in metrics["eval"].items()]
    return (
        f"{metrics['method']}: {values['adapter']:,} values{whole}, {metrics['steps']} steps at learning rate "
        f"{metrics['learning_rate']:g}, {', '.join(results)}: {output}"
    )
