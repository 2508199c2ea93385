"""What a saved adapter is, read from its files: nothing in them is executed, and no base model is needed."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters.files import belongs_to
from ..registry import methods
from ..utils import plain
from .loading import fetch_adapter, load_adapter, read_config, read_tensors

WRAPPED = "base_model.model."  # before a module's name in every file of PEFT
BLOCK = 1 << 22  # values of a tensor that are in memory at once
LARGEST_CONFIG = 10_000_000  # bytes; PEFT writes one to a few thousand
LONGEST_NAME = 1000
# Tensors of PEFT's methods that change no module: prompts, and what is put before attention.
WHOLE = ("prompt_embeddings", "adaption_prompt", "adaption_gate")
# What PEFT's own methods call the tensor whose first axis is the rank.
RANKED = ("lora_A", "lora_embedding_A", "vera_lambda_d")
UNRANKED = ("IA3", "OFT", "BOFT", "FOURIERFT", "LN_TUNING", "C3A", "ROAD", "TRAINABLE_TOKENS")


@dataclass(frozen=True)
class AdaptedModule:
    """One module of the base model that an adapter changes.

    Attributes:
        name: in the base model.
        rank: as the method counts it, from the tensors' shapes or the config; None where it has none (IA3, OFT...).
        parameters: number of values, frozen ones included.
        norm: Frobenius norm of the weight delta, or of all its float tensors together where `is_delta` is false.
        is_delta: a delta's norm follows from the file for LoRA's family, else only with the base model.
    """

    name: str
    rank: int | None
    parameters: int
    norm: float
    is_delta: bool


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` found.

    Attributes:
        path: as given.
        method: the peft type, e.g. `"LOLDU"`.
        known_by: `"peftx"`, `"PEFT"`, or `""` where neither knows the method.
        paper: of peftx's methods.
        base_model: the config's `base_model_name_or_path`.
        task_type: the config's.
        modules: of the adapter, in the file's order.
        others: names and numbers of values of the other tensors: modules trained in full, biases, Compacter's rule.
        parameters: number of values in the file.
        nbytes: of all tensors.
        dtypes: dtype to number of values.
        settings: the config as it stands in the file.
        problems: what is wrong with it, a line each; empty where it loads, as far as the file (or the base model, where
            it was loaded) can say.
        loaded: whether it was put on its base model.
    """

    path: str
    method: str
    known_by: str
    paper: str
    base_model: str | None
    task_type: str | None
    modules: tuple[AdaptedModule, ...]
    others: Mapping[str, int]
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    settings: Mapping[str, Any]
    problems: tuple[str, ...] = field(default=())
    loaded: bool = False


def inspect_adapter(
    path: str | os.PathLike,
    *,
    load: bool = False,
    base_model: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> AdapterReport:
    """Describes a saved adapter of any method of peftx or PEFT.

    A safetensors file is read in blocks, so that memory is bounded by the largest pair of LoRA factors in it, not by
    the file.

    Args:
        path: folder, or id of a repository on the Hub.
        load: also put it on its base model, which shows whether it fits, and gives the norms of all deltas.
        base_model: a model, or where to find it, instead of the config's; implies `load`.
        revision: branch, tag or commit of the repository; default: its main branch.
        subfolder: of the folder or the repository, where the adapter is.
        token: for the Hub; default: the one that `hf auth login` has stored.

    Raises:
        ValueError: there is no adapter, or its files cannot be read at all. Everything else is in `problems`.
    """
    folder = fetch_adapter(path, revision=revision, subfolder=subfolder, token=token)
    problems: list[str] = []
    settings = read_settings(folder / CONFIG_NAME, path, problems)
    method = settings.get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{path}: the peft_type in {CONFIG_NAME} is {method!r}, not a name.")
    named = {}
    for key in ("base_model_name_or_path", "task_type"):
        named[key] = settings.get(key)
        if not isinstance(named[key], str | None):
            problems.append(f"{key} in {CONFIG_NAME} is {named[key]!r}, not a name")
            named[key] = None
    known = {info.peft_type.value: info for info in methods()}.get(method)
    config: Any = None
    try:
        config = read_config(folder, shown=path)
    except ValueError as error:
        problems.append(str(error))
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(method, f"{method.lower()}_")  # type: ignore[call-overload]
    with opened(folder, path) as state:
        by_module, others = split(state, prefix)
        if not by_module and not any(key.endswith(WHOLE) for key in others):
            problems.append(f"no tensor in the file is {method}'s: no part of a name begins with {prefix!r}")
        problems += [line for name, tensors in by_module.items() for line in mismatched(name, tensors)]
        squares = {}
        for key, tensor in state.items():
            squares[key], bad = survey(tensor)
            problems += [f"{key}: {bad} of {tensor.numel()} values are not finite"] if bad else []
        found = [describe(name, tensors, settings, squares) for name, tensors in by_module.items()]
        dtypes: Counter[str] = Counter()
        for tensor in state.values():
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        facts: dict[str, Any] = {
            "others": {key: tensor.numel() for key, tensor in others.items()},
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "nbytes": sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values()),
        }
    loaded = False
    if (load or base_model is not None) and config is not None:
        try:
            model = load_adapter(folder, base_model, token=token)
        except Exception as error:  # of PEFT, of transformers, of files that nobody has checked
            problems.append(f"it does not load: {' '.join(str(error).split())}")
        else:
            loaded, found = True, [measured(module, model) for module in found]
    return AdapterReport(
        path=str(path),
        method=method,
        known_by="peftx" if known else "PEFT" if method in PeftType.__members__ else "",
        paper=known.paper if known else "",
        base_model=named["base_model_name_or_path"],
        task_type=named["task_type"],
        modules=tuple(found),
        dtypes=dict(dtypes),
        settings=settings,
        problems=tuple(problems),
        loaded=loaded,
        **facts,
    )


def read_settings(file: Path, shown: str | os.PathLike, problems: list[str]) -> dict[str, Any]:
    """adapter_config.json as it stands; fields that stand in it twice are added to `problems`."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        problems.extend(f"{key!r} stands in {CONFIG_NAME} more than once: the last one counts" for key in twice)
        return dict(pairs)

    if (size := file.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{shown}: {CONFIG_NAME} has {size:,} bytes, and cannot be the config of an adapter.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=fields)
    except ValueError as error:
        raise ValueError(f"{shown}: {CONFIG_NAME} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{shown}: {CONFIG_NAME} is nested too deeply to be the config of an adapter.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{shown}: {CONFIG_NAME} is not an object with named fields.")
    return settings


class Stored:
    """A tensor in a safetensors file, of which only what is asked for is read."""

    def __init__(self, file: Any, key: str) -> None:
        self.part = file.get_slice(key)
        self.shape = tuple(self.part.get_shape())
        self.ndim = len(self.shape)
        self.dtype: torch.dtype = (self.part[:0] if self.ndim else self.part[...]).dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.part[index]


AnyTensor = Stored | Tensor


@contextmanager
def opened(folder: Path, shown: str | os.PathLike) -> Iterator[dict[str, AnyTensor]]:
    """The tensors in a saved adapter's file, unread as far as its format allows; a pickle's are read as weights only.

    Raises:
        ValueError: the file cannot be read, also while it is used.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        yield checked_names(read_tensors(folder, shown), shown)
        return
    try:
        with safe_open(file, framework="pt") as content:
            try:
                state = {key: Stored(content, key) for key in content.keys()}  # noqa: SIM118
            except AttributeError as error:  # a dtype that torch does not have
                raise OSError(error) from error
            yield checked_names(state, shown)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The tensors of the adapter {shown} cannot be read: {error}") from error


def checked_names(state: dict[str, Any], shown: str | os.PathLike) -> dict[str, Any]:
    if (longest := max(map(len, state), default=0)) > LONGEST_NAME:
        raise ValueError(f"The tensors of the adapter {shown} cannot be read: a name has {longest:,} characters.")
    return state


def blocks(tensor: AnyTensor) -> Iterator[Tensor]:
    """The tensor in pieces of about `BLOCK` values along its first axis."""
    count = tensor.numel()
    if not tensor.ndim or 0 < count <= BLOCK:
        yield tensor[...]
    elif count:
        rows = max(1, BLOCK * tensor.shape[0] // count)
        for start in range(0, tensor.shape[0], rows):
            yield tensor[start : start + rows]


def survey(tensor: AnyTensor) -> tuple[float, int]:
    """Sum of the squares of a float tensor's values (0 for others), and how many are not finite."""
    square, bad = 0.0, 0
    if tensor.dtype.is_floating_point:
        for block in blocks(tensor):
            values = block.double()
            square += float(values.square().sum())
            if not math.isfinite(square):
                bad += int((~values.isfinite()).sum())
    return square, bad


def split(state: Mapping[str, AnyTensor], prefix: str) -> tuple[dict[str, dict[str, AnyTensor]], dict[str, AnyTensor]]:
    """The adapter's tensors by module and name (`lora_A`), and those that are of no module, or not the method's."""
    modules: dict[str, dict[str, AnyTensor]] = {}
    others = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(f".{prefix}")
        if belongs_to(key, prefix) and module.startswith(WRAPPED):
            modules.setdefault(module.removeprefix(WRAPPED), {})[(prefix + name).removesuffix(".weight")] = tensor
        else:
            others[key] = tensor
    return modules, others


def describe(
    name: str, tensors: Mapping[str, AnyTensor], settings: Mapping[str, Any], squares: Mapping[str, float]
) -> AdaptedModule:
    """A module as the file alone shows it; `squares` is by the tensors' keys in the file."""
    delta = _lora_norm(name, tensors, settings)
    keys = [f"{WRAPPED}{name}.{part}" for part in tensors]
    own = [squares.get(key, squares.get(f"{key}.weight", 0.0)) for key in keys]
    norm = math.sqrt(sum(own)) if delta is None else delta
    count = sum(tensor.numel() for tensor in tensors.values())
    return AdaptedModule(name, rank_of(tensors, settings, name), count, norm, delta is not None)


def rank_of(tensors: Mapping[str, AnyTensor], settings: Mapping[str, Any], name: str) -> int | None:
    """The rank in a module, as its method counts it.

    LoRA's is that of its factors, TriAdaptLoRA stores which of its ranks are at work. For the other methods of peftx it
    is the shortest of the last two axes of all matrices, or the longest of the vectors where there is no matrix
    (LoLDU); for PEFT's, the config's `r`.
    """
    for part in RANKED:
        if part in tensors and tensors[part].ndim:
            return tensors[part].shape[0]
    for part, tensor in tensors.items():
        if part.endswith(("_since", ".since")):
            return int((tensor[...] >= 0).sum())
    method = settings.get("peft_type")
    if method in PeftType.__members__ and method not in {info.peft_type.value for info in methods()}:
        r = _by_pattern(settings.get("rank_pattern"), name, settings.get("r"))
        return r if type(r) is int and method not in UNRANKED else None
    matrices = [min(tensor.shape[-2:]) for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 1]
    return min(matrices) if matrices else max(vectors, default=None)


def mismatched(name: str, tensors: Mapping[str, AnyTensor]) -> list[str]:
    """A line for LoRA factors that are not for each other."""
    A, B = factors(tensors)
    if (A is None) != (B is None):
        return [f"{name}: {'lora_A' if A is None else 'lora_B'} is missing"]
    if A is None or B is None:
        return []
    ranks = (A.shape[0], B.shape[1]) if min(A.ndim, B.ndim) > 1 else (0, 0)
    grouped = B.ndim > 2 and ranks[1] and not ranks[0] % ranks[1]  # of a convolution, B sees r / groups channels
    if not ranks[0] or (ranks[0] != ranks[1] and not grouped):
        return [f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} have different ranks, or none"]
    return []


def factors(tensors: Mapping[str, AnyTensor]) -> tuple[AnyTensor | None, AnyTensor | None]:
    """LoRA's A and B, of a linear layer, a convolution or an embedding."""
    A, B = (tensors.get(f"lora_{x}", tensors.get(f"lora_embedding_{x}")) for x in "AB")
    return A, B


def measured(module: AdaptedModule, model: Any) -> AdaptedModule:
    """A module with the norm of its delta in the loaded model, where it has one."""
    try:
        layer = model.base_model.model.get_submodule(module.name)
        norm = float(layer.get_delta_weight(model.active_adapters[0]).detach().double().norm())
    except (AttributeError, NotImplementedError, TypeError, RuntimeError):
        return module
    return AdaptedModule(module.name, module.rank, module.parameters, norm, True)


def heat_map(report: AdapterReport, path: str | os.PathLike) -> None:
    """Draws the norms of all deltas, by layer and module, into a PNG file. Needs matplotlib.

    Raises:
        ValueError: the adapter has no modules (prompt tuning).
    """
    from matplotlib.figure import Figure

    if not report.modules:
        raise ValueError(f"{report.method} changes no module: there are no norms to draw.")
    cells = {(layer, kind): module.norm for module in report.modules for layer, kind in [place(module.name)]}
    if len(cells) < len(report.modules):  # several stacks of layers, as of an encoder and a decoder
        cells = {(layer, kind): module.norm for module in report.modules for layer, kind in [place(module.name, True)]}
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = torch.full((len(layers), len(kinds)), float("nan"))
    rows, columns = ({value: i for i, value in enumerate(values)} for values in (layers, kinds))
    for (layer, kind), norm in cells.items():
        grid[rows[layer], columns[kind]] = norm
    labels = [plain(kind) for kind in kinds]
    labels = [label if len(label) <= 60 else f"...{label[-57:]}" for label in labels]
    size = (min(40, 2.5 + 0.7 * len(kinds)), min(60, 1.8 + 0.3 * len(layers) + 0.05 * max(map(len, labels))))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")  # where a layer lacks a module
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis")
    every = max(1, -(-len(labels) // 120)), max(1, -(-len(layers) // 250))  # of more there is no room for a name
    axes.set_xticks(range(0, len(kinds), every[0]), labels[:: every[0]], rotation=45, ha="right", parse_math=False)
    names = [str(layer) if layer >= 0 else "-" for layer in layers]
    axes.set_yticks(range(0, len(layers), every[1]), names[:: every[1]])
    axes.set_ylabel("layer")
    delta = all(module.is_delta for module in report.modules)
    figure.colorbar(image, ax=axes, label="norm of the weight delta" if delta else "norm of the adapter's tensors")
    axes.set_title(plain(report.method), parse_math=False)
    figure.savefig(path, format="png", dpi=120)


def place(name: str, whole: bool = False) -> tuple[int, str]:
    """Layer (-1: none) and kind of a module: `model.layers.3.self_attn.q_proj` is (3, "self_attn.q_proj").

    With `whole`, the kind names the stack of layers too, `model.layers.*.self_attn.q_proj`.
    """
    match = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", name)
    if match is None:
        return -1, name
    before, after = name[: match.start()], name[match.end() :]
    if whole:
        return int(match[1]), ".".join(part for part in (before, "*", after) if part)
    return int(match[1]), after or before


def _lora_norm(name: str, tensors: Mapping[str, AnyTensor], settings: Mapping[str, Any]) -> float | None:
    """||scale B A||, where a module's tensors are those of a LoRA whose scale the config says, and nothing else."""
    A, B = factors(tensors)
    if A is None or B is None or mismatched(name, tensors) or (A.ndim > 2 and A.shape[0] != B.shape[1]):
        return None
    if len(tensors) > 2 + ("lora_B.bias" in tensors) or settings.get("use_qalora") or settings.get("target_parameters"):
        return None
    r = A.shape[0]
    alpha = _by_pattern(settings.get("alpha_pattern"), name, settings.get("lora_alpha", r))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        return None
    scale = alpha / (r**0.5 if settings.get("use_rslora") else r)
    V, U = (factor[...].double().flatten(1) for factor in (A, B))
    few = r * r <= len(U) * V.shape[1]  # else the delta's own entries are fewer
    square = ((U.T @ U) * (V @ V.T)).sum() if few else (U @ V).square().sum()
    return float(square.clamp(min=0).sqrt() * abs(scale))


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """The value of the pattern that matches a module's name, as PEFT looks it up.

    Patterns come from the file: one that Python cannot read, or could take for ever with (a repeated group), counts as
    no pattern.
    """
    usable = {
        key: value
        for key, value in (patterns.items() if isinstance(patterns, dict) else ())
        if len(key) <= LONGEST_NAME and not re.search(r"\)[*+{]", key) and len(re.findall(r"[*+{]", key)) <= 4
    }
    for key, value in usable.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error:
            continue
    return default
