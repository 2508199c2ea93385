"""The settings of a run: fields with help texts, read from YAML and flags, checked by name and type."""

# ruff: noqa: RUF009  (`setting` makes a field)

from __future__ import annotations

import difflib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub.dataclasses import type_validator

T = TypeVar("T")
Section = dict[str, Any]


def setting(text: str, default: Any = None, shown: str | None = None, many: bool = False) -> Any:
    """A field with its help text, with what the command line shows as its default, and whether it takes several."""
    return field(default=default, metadata={"help": text, "shown": shown, "many": many})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `train` and `compare` share. In YAML the names of the fields are the keys, on the command line the flags.

    Raises:
        ValueError: no model, data or output folder; 4 and 8 bits at once; an impossible share or length.
    """

    model: str = setting("Model: folder or hub id.", "")
    data: str = setting("Training data: .jsonl, .json, .csv, .tsv or .parquet file, or hub id of a data set.", "")
    output: str = setting("New folder for what comes out.", "")
    task: str | None = setting("CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS.", shown="the model's")
    subset: str | None = setting("Configuration of a hub data set.")
    split: str = setting("Split of a hub data set.", "train")
    eval_data: str | None = setting("Held-out data, as --data.", shown="a part of --data")
    eval_split: str | None = setting("Split of --eval-data, or of --data.")
    eval_share: float = setting("Part of --data that is held out where no other is named; 0 for none.", 0.1)
    validation_share: float | None = setting(
        "Part of the training samples that is set aside for choices: of checkpoints, of learning rates.",
        shown="0.1 where there are such",
    )
    metric: str | list[str] | None = setting(
        "Also measure this: f1, matthews_correlation, roc_auc, rouge, ..., a metric of evaluate, or a script's path.",
        many=True,
    )
    best_metric: str | None = setting("End with the checkpoint that is best by this metric, loss or accuracy.")
    generate: Section | bool | None = setting("Generate answers to the held-out prompts, for --metric rouge.")
    prompt: str | None = setting("Field of the prompt, or of the text to classify.", shown="found")
    answer: str | None = setting("Field of the answer.", shown="found")
    label: str | None = setting("Field of a classifier's label.", shown="found")
    head_learning_rate: float | None = setting(
        "Of modules that are trained whole, such as a new classifier.", shown="that of the adapter"
    )
    max_length: int = setting("Tokens of a sample, if the model takes so many; the rest is cut off.", 512)
    dtype: str = setting("Of the base model's weights: auto, float32, bfloat16, float16.", "auto")
    experts: bool = setting("Adapt the fused experts of a mixture of experts too (target_parameters).", False)
    load_in_4bit: bool = setting("Quantise the base model to 4 bits (NF4) by bitsandbytes.", False)
    load_in_8bit: bool = setting("Quantise the base model to 8 bits by bitsandbytes.", False)
    training: Section = field(default_factory=dict, metadata={"help": "Any field of transformers.TrainingArguments."})
    prune: Section | bool | None = setting("Arguments of peftx.DonodCallback, which chooses the samples to train on.")
    fisher: Section | bool | None = setting("Collect Fisher sums for `peftx compress` (peftx.FisherCallback).")
    small_states: Section | bool | None = setting(
        "8-bit optimizer states (peftx.optim).", shown="where the method's config has options for them"
    )
    overwrite: bool = setting("Replace what an earlier run has written to the output folder, and only that.", False)

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"no {name}: name one by --{name}, or by `{name}:` in the YAML file")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: choose one")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share must be in [0, 1), got {self.eval_share}")
        if self.head_learning_rate is not None and not 0 <= self.head_learning_rate < math.inf:
            raise ValueError(f"head_learning_rate must be a number of at least 0, got {self.head_learning_rate}")
        if self.validation_share is not None and not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share must be in [0, 1), got {self.validation_share}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.dtype not in (known := ("auto", "float32", "bfloat16", "float16")):
            raise ValueError(f"dtype must be one of {', '.join(known)}, got {self.dtype}")

    @property
    def chooses(self) -> bool:
        """Whether something is chosen by what it measures."""
        return self.best_metric is not None

    @property
    def validation(self) -> float:
        """The share of what is trained on that is set aside for choices."""
        return (0.1 if self.chooses else 0.0) if self.validation_share is None else self.validation_share


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """One run of one method."""

    method: str = setting("A method of peftx (`peftx methods`) or of PEFT (lora, dora, miss, ...), or full.", "lora")
    method_settings: Section = field(default_factory=dict, metadata={"help": "Fields of the method's config."})
    resume: bool = setting("Go on from the last whole checkpoint in the output folder.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: choose one")


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """Several methods on the same data, with the same number of steps, by several seeds."""

    methods: str | list[str] | dict[str, Section | None] = setting(
        "Methods by comma, the first is the yardstick; all: LoRA and those of peftx. In YAML also {method: settings}.",
        "all",
    )
    equal: Literal["rank", "budget", "none"] = setting(
        "What is made equal by choosing r: rank, budget (trainable values), or none.", "rank"
    )
    rank: int | None = setting("r of all methods, or of the yardstick.", shown="8, of --equal rank")
    seeds: int = setting("Runs of each method, with the seeds 0, 1, ...", 3)
    learning_rates: str | list[float] | None = setting(
        "Choose each method's learning rate on the validation part: of these, by comma, or auto: five by factors of 3 "
        "around the method's own, or as many as auto:3 says, and further ones where the best is at an end.",
    )
    jobs: int = setting("Runs at a time, on CPUs; they share the threads.", 1)

    @property
    def chooses(self) -> bool:
        return super().chooses or self.learning_rates is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "seeds", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.equal == "none" and self.rank is not None:
            raise ValueError("rank is for equal: rank or budget, and not for none")
        if self.learning_rates is not None and not self.validation:
            raise ValueError("learning_rates are chosen on a validation part: name a validation_share above 0")


S = TypeVar("S", bound=Settings)


def parse(cls: type[S], values: Mapping[str, Any]) -> S:
    """Settings of the class `cls` from what YAML or flags say.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of the wrong type or out of its range.
    """
    hints = typing.get_type_hints(cls)
    types = {f.name: hints[f.name] for f in fields(cls)}
    empty = {f.name for f in fields(cls) if f.default_factory is not MISSING}
    given = {name: {} if value is None and name in empty else value for name, value in values.items()}
    return cls(**checked(given, types, "settings"))


def checked(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values`, where all names are among those of `types`, and all values of these types.

    An int is taken for a float. Types that cannot be checked here are left to whom they belong.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    known = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{where}: unknown key {name!r}{nearest(str(name), types)}")
        known[name] = converted(value, types[name], f"{where}: {name}")
    return known


def converted(value: Any, expected: Any, what: str) -> Any:
    candidates = [value, float(value)] if type(value) is int else [value]
    if isinstance(value, list):
        candidates += [[float(part) for part in value]] if all(type(part) in (int, float) for part in value) else []
        candidates += [set(value), tuple(value)] if all(isinstance(part, str | int) for part in value) else []
    if value is False and "Strategy" in str(expected):  # YAML's `no`
        candidates = ["no"]
    problems = []
    for candidate in candidates:
        try:
            type_validator(what, candidate, expected)
            return candidate
        except TypeError as error:
            problems.append(str(error))
    if any("Unsupported type" in problem for problem in problems):
        return value
    shown = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
    raise ValueError(f"{what} must be of type {shown}, got {value!r}")


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean ...?`, or all names where none is near."""
    names = sorted(names)
    normal = {known.replace("_", "-").lower(): known for known in names}
    if found := difflib.get_close_matches(name.replace("_", "-").lower(), normal, n=1):
        return f", did you mean {normal[found[0]]}?"
    return f": there are {', '.join(names)}" if len(names) <= 60 else ""


def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the named arguments of a function or class."""
    if inspect.isclass(function):
        function = function.__init__
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    skipped = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: hints.get(p.name, Any) for p in parameters if p.name != "self" and p.kind not in skipped}


def section(value: Section | bool | None) -> Section | None:
    """The arguments of something that is switched on by `true` or by its arguments; None where it is off."""
    if isinstance(value, dict):
        return value
    return {} if value else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: it is not YAML, or not a mapping, or says a key twice.
        OSError: it cannot be read.
    """
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a mapping of settings, but a {type(values).__name__}")
    return values


def read_value(text: str) -> Any:
    """What `KEY=` stands for on the command line: a YAML value."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError:
        return text


def _loader() -> Any:
    """The safe loader, which also reads `1e-4` as a number, as YAML 1.2 and JSON do, and refuses a key said twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            said = set()
            for key, _ in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge") else key
                if name in said:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} is said twice", key.start_mark)
                said.add(name)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader
