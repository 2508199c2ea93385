"""What compression knows about the layers of a model: one small file, made by a pass over data or during training."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import Bnb8bitBackend
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.products import unpack
from . import linear

FILE_NAME = "fisher.safetensors"
FORMAT = "peftx.statistics.1"
ESTIMATORS = ("per_sample", "per_batch")
PROBES = 64  # entries of a weight that recognise it
ALIKE = 0.5  # least correlation of these entries before and after: of unrelated weights it is 0 +- 1 / 8
HEADS = {*SEQ_CLS_HEAD_NAMES, "lm_head", "pooler", "qa_outputs", "cls"}
ROUTERS = {"router", "gate", "shared_expert_gate"}


@dataclass(frozen=True)
class LayerStatistics:
    """Of one linear layer y = W x, W (out_features, in_features). All tensors are on the CPU; None: not collected.

    Attributes:
        fisher_in: (in_features,), float64: mean over samples n of sum_o (dL_n / dW_oj)^2, where L_n is the loss of
            sample n summed over its supervised tokens (see `collect`).
        fisher_out: (out_features,), float64: the same, summed over inputs.
        abs_mean: (in_features,), float64: mean over tokens of |x_j|.
        gram: (in_features, in_features), float32 or float64: mean over tokens of x x^T.
        shape: (out_features, in_features).
        signature: (at most 64,), float32: entries of the weight at even distances.
    """

    fisher_in: Tensor | None
    fisher_out: Tensor | None
    abs_mean: Tensor | None
    gram: Tensor | None
    shape: tuple[int, int]
    signature: Tensor


class Statistics(Mapping[str, LayerStatistics]):
    """Layer statistics by the layer's name in the base model: nothing of PEFT's wrappers is in the names.

    Args:
        layers: at least one.
        samples: how many the means are over; those without a supervised token are none.
        tokens: how many of their tokens went in, without padding.
        estimator: `"per_sample"` or `"per_batch"`, see `collect`.
        model: class and name of the model.
    """

    def __init__(
        self, layers: Mapping[str, LayerStatistics], *, samples: int, tokens: int, estimator: str, model: str
    ) -> None:
        self.layers = dict(layers)
        self.samples, self.tokens, self.estimator, self.model = samples, tokens, estimator, model

    def __getitem__(self, name: str) -> LayerStatistics:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Statistics({len(self)} layers, {self.samples} samples, {self.estimator}, {self.model!r})"

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {
            f"{name}.{field}": part.detach().cpu().contiguous().clone()  # of its own: files share no memory
            for name, layer in self.items()
            for field in FIELDS
            if (part := getattr(layer, field)) is not None
        }
        header = {
            "samples": self.samples,
            "tokens": self.tokens,
            "estimator": self.estimator,
            "model": self.model,
            "shapes": {name: list(layer.shape) for name, layer in self.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.part")
        save_file(tensors, draft, {"format": FORMAT, "statistics": json.dumps(header)})
        draft.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote. The file is not trusted.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is something else, or contradicts itself.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return cls(**checked(metadata, tensors))
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} holds no statistics of peftx ({reason}): collect them again") from error

    def check(self, model: nn.Module) -> None:
        """Whether these are statistics of `model`, as it was or fine-tuned since.

        Raises:
            ValueError: a layer is missing or has another shape, or its weight correlates less than 0.5 with what it
                was (64 entries are compared).
        """
        found = linear_layers(base_model(model))
        for name, layer in self.items():
            if name not in found:
                raise ValueError(
                    f"the statistics have a layer {name}, and {describe(model)} has no linear layer of that name: they "
                    f"are statistics of another model ({self.model})"
                )
            if (shape := shape_of(found[name])) != layer.shape:
                raise ValueError(
                    f"{name} is {layer.shape} in the statistics and {shape} in {describe(model)}: they are statistics "
                    f"of another model ({self.model})"
                )
            if (alike := correlation(layer.signature, signature(found[name]))) < ALIKE:
                raise ValueError(
                    f"the weight of {name} correlates by {alike:.2f} with the one that the statistics were collected "
                    f"on ({self.model}): they are statistics of another model. Collect them on this one."
                )


FIELDS = tuple(field.name for field in fields(LayerStatistics) if field.name != "shape")


def checked(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `Statistics` from a file's contents."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')!r} instead of {FORMAT!r}")
    header = json.loads(metadata["statistics"])
    shapes, facts = header["shapes"], {key: header[key] for key in ("samples", "tokens", "estimator", "model")}
    for key in ("samples", "tokens"):
        if type(facts[key]) is not int or facts[key] < 1:
            raise ValueError(f"{key} must be a positive integer, got {facts[key]!r}")
    if facts["estimator"] not in ESTIMATORS:
        raise ValueError(f"unknown estimator {facts['estimator']!r}")
    if not isinstance(facts["model"], str) or not isinstance(shapes, dict) or not shapes:
        raise ValueError("the header names no model, or no layers")
    for name, shape in shapes.items():
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"{name} cannot have the shape {shape!r}")
    known = {f"{name}.{field}" for name in shapes for field in FIELDS}
    if unknown := [key for key in tensors if key not in known]:
        raise ValueError(f"unknown tensor {unknown[0]!r}")
    layers = {}
    for name, (out, into) in shapes.items():
        parts: dict[str, Any] = {field: tensors.get(f"{name}.{field}") for field in FIELDS}
        if parts["signature"] is None:
            raise ValueError(f"{name} has no signature")
        wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "fisher_in": ((into,), (torch.float64,)),
            "fisher_out": ((out,), (torch.float64,)),
            "abs_mean": ((into,), (torch.float64,)),
            "gram": ((into, into), (torch.float32, torch.float64)),
            "signature": ((min(PROBES, out * into),), (torch.float32,)),
        }
        for field, part in parts.items():
            if part is None:
                continue
            size, dtypes = wanted[field]
            if tuple(part.shape) != size or part.dtype not in dtypes:
                raise ValueError(
                    f"{name}.{field} must be {size} of {dtypes[0]}, and is {tuple(part.shape)} of {part.dtype}"
                )
            if not part.isfinite().all():
                raise ValueError(f"{name}.{field} is not finite")
            if (part.diagonal() if field == "gram" else part).lt(0).any() and field != "signature":
                raise ValueError(f"{name}.{field} has a negative entry where none can be")
        if (gram := parts["gram"]) is not None and not torch.allclose(
            gram, gram.T, atol=1e-4 * float(gram.abs().max())
        ):
            raise ValueError(f"{name}.gram is not symmetric")
        layers[name] = LayerStatistics(shape=(out, into), **parts)
    return {"layers": layers, **facts}


def target_layers(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """The linear layers to look at, by their names in the base model: what a PEFT adapter wraps counts as the layer.

    Args:
        model: of transformers, or a PEFT model around one.
        target_modules: in PEFT's forms: a regular expression, a list of names or their ends, or `"all-linear"`.
            Default: every `nn.Linear` and transformers `Conv1D` inside the repeated blocks of the encoder and decoder.
            Left out: classifiers, output embeddings, poolers, routers of experts, and layers with a tied weight.
        exclude_modules: in the first two forms.

    Returns:
        Name to module, in the model's order; PEFT's wrapper where there is one (`base_layer` looks inside).

    Raises:
        ValueError: none is left, or one that was named shares its weight with another.
    """
    base = base_model(model)
    layers, tied = linear_layers(base), tied_layers(base)
    shorthand = isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if target_modules is None:
        layers = {name: layers[name] for name in default_names(base, layers)}
        target_modules = list(layers)
    elif not isinstance(target_modules, str):
        target_modules = list(target_modules)
    # The task only tells PEFT to leave a classifier out of "all-linear".
    config: Any = LoraConfig(task_type="SEQ_CLS", target_modules=target_modules)
    config.exclude_modules = exclude_modules if isinstance(exclude_modules, str) else set(exclude_modules or [])
    config = _maybe_include_all_linear_layers(config, base)
    chosen = {name: layer for name, layer in layers.items() if check_target_module_exists(config, name)}
    shared = [name for name in chosen if name in tied]
    if shared and not shorthand:
        raise ValueError(f"{shared[0]} shares its weight with {tied[shared[0]]}: leave it out, exclude_modules=")
    for name in shared:
        del chosen[name]
    if not chosen:
        asked = f"target_modules={target_modules!r}, exclude_modules={exclude_modules!r}"
        raise ValueError(
            f"{describe(model)} has no layer to look at: {asked if layers else 'no linear layer in blocks'}"
        )
    return chosen


def base_model(model: nn.Module) -> Any:
    """The transformers model, with whatever PEFT put inside it."""
    return model.get_base_model() if isinstance(model, PeftModel | PeftMixedModel) else model


def base_layer(layer: nn.Module) -> Any:
    """What an adapter is on, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def linear_layers(base: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """All `nn.Linear` and `Conv1D` by name, or the adapters' wrappers around them; nothing of an adapter itself."""
    found: dict[str, nn.Module] = {}
    for name, child in base.named_children():
        if isinstance(base_layer(child), nn.Linear | Conv1D):
            found[prefix + name] = child
        elif not isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found |= linear_layers(child, f"{prefix}{name}.")
    return found


def default_names(base: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Those inside the blocks: inside a ModuleList of modules that are not linear layers themselves."""
    blocks = tuple(
        f"{name}."
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and not any(isinstance(base_layer(m), nn.Linear | Conv1D) for m in module)
    )
    head = getattr(base, "get_output_embeddings", lambda: None)()
    tied = tied_layers(base)
    for name, layer in layers.items():
        parts = name.split(".")
        router = "router" in parts or (parts[-1] in ROUTERS and beside_experts(base, name))
        if name.startswith(blocks) and not (router or HEADS & set(parts) or layer is head or name in tied):
            yield name


def beside_experts(base: nn.Module, name: str) -> bool:
    return hasattr(base.get_submodule(name.rpartition(".")[0]), "experts")


def tied_layers(base: nn.Module) -> dict[str, str]:
    """Linear layers whose weight is also somewhere else, and where."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in users if other != mine)
        for name, layer in linear_layers(base).items()
        if len(users := names.get(id(base_layer(layer).weight), ())) > 1
        for mine in [f"{name}.base_layer.weight" if isinstance(layer, BaseTunerLayer) else f"{name}.weight"]
    }


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), also of a quantised layer, and of what an adapter is on."""
    return linear.shape_of(base_layer(layer))


def dense_weight(base: nn.Module) -> Tensor:
    """The weight, dequantised if need be; the layer stays as it is."""
    unpack(base)
    if type(base.weight).__name__ == "Int8Params":  # on a CPU `dequantize_module_weight` would lose the layer's scales
        return Bnb8bitBackend().get_base_weight(base)
    return dequantize_module_weight(base)


def signature(layer: nn.Module) -> Tensor:
    """(min(64, entries),), float32: entries of the base weight at even distances, as it is stored, row after row."""
    weight = dense_weight(base_layer(layer)).detach()
    if weight.device.type == "meta" or type(weight).__name__ == "DTensor" or not weight.numel():
        raise ValueError(
            "the weights are not here (on the meta device, or split by FSDP or DeepSpeed): load them whole"
        )
    count = weight.numel()
    places = torch.linspace(0, count - 1, min(PROBES, count), dtype=torch.float64).round().long()
    return weight.reshape(-1)[places.to(weight.device)].to("cpu", torch.float32)


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; of constants, 1 where they are equal and 0 where not."""
    a, b = (part.double() - part.double().mean() for part in (first, second))
    norms = float(a.norm() * b.norm())
    if not norms > 0 or not math.isfinite(norms):
        return float(torch.equal(first, second))
    return float(a @ b) / norms


def is_compiled(model: nn.Module) -> bool:
    """By `torch.compile(model)` or `model.compile()`."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def describe(model: nn.Module) -> str:
    """Class and name of the model."""
    base = base_model(model)
    return f"{type(base).__name__} {getattr(getattr(base, 'config', None), '_name_or_path', '')}".strip()
