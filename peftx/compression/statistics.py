"""What compression knows about the layers of a model: one small file, made by a pass over data or during training."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import beside
from ..utils import base_of
from .layers import PROBES, correlation, describe, layers_in, shape_of, signature

FILE_NAME = "fisher.safetensors"
FORMAT = "peftx.statistics.1"
SHARED = "peftx.statistics.2"  # with one Gram matrix for layers of one input
STACKED = "peftx.statistics.3"  # and stacks of experts
UNUSABLE = (
    *(SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError),
    *(RecursionError, OverflowError, RuntimeError),
)
ESTIMATORS = ("per_sample", "per_batch")
ALIKE = 0.5  # least correlation of these entries before and after: of unrelated weights it is 0 +- 1 / 8


@dataclass(frozen=True)
class LayerStatistics:
    """Of one linear layer y = W x, W (out_features, in_features). All tensors are on the CPU; None: not collected.

    Of a stack of E experts, each a linear layer of the tokens that are routed to it: all but the signature have a
    leading axis of E. What went to the others counts 0, so that the means are over the same samples and tokens, and
    experts that matter more have larger ones; one that got no token has zeros.

    Attributes:
        fisher_in: (in_features,), float64: mean over samples n of sum_o (dL_n / dW_oj)^2, where L_n is the loss of
            sample n summed over its supervised tokens (see `collect`).
        fisher_out: (out_features,), float64: the same, summed over inputs.
        abs_mean: (in_features,), float64: mean over tokens of |x_j|.
        gram: (in_features, in_features), float32 or float64: mean over tokens of x x^T.
        shape: (out_features, in_features), or (E, out_features, in_features).
        signature: (at most 64,), float32: entries of the weight at even distances.
    """

    fisher_in: Tensor | None
    fisher_out: Tensor | None
    abs_mean: Tensor | None
    gram: Tensor | None
    shape: tuple[int, ...]
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
        """Writes one safetensors file, whole or not at all. A Gram matrix that layers share is in it once."""
        tensors: dict[str, Tensor] = {}
        grams: dict[int, str] = {}  # to the layer that has it in the file
        shared = {}
        for name, layer in self.items():
            for field in FIELDS:
                if (part := getattr(layer, field)) is None:
                    continue
                if field == "gram" and grams.setdefault(id(part), name) != name:
                    shared[name] = grams[id(part)]
                else:
                    tensors[f"{name}.{field}"] = part
        header: dict[str, Any] = {
            "samples": self.samples,
            "tokens": self.tokens,
            "estimator": self.estimator,
            "model": self.model,
            "shapes": {name: list(layer.shape) for name, layer in self.items()},
        }
        if shared:
            header["gram_of"] = shared
        stacked = any(len(layer.shape) > 2 for layer in self.values())
        form = STACKED if stacked else SHARED if shared else FORMAT
        write(tensors, Path(path), {"format": form, "statistics": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote. The file is not trusted.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is something else, or contradicts itself.
        """
        try:
            if Path(path).exists() and not Path(path).is_file():
                raise ValueError("not a file")
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return cls(**checked(metadata, tensors))
        except FileNotFoundError:
            raise
        except UNUSABLE as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} holds no statistics of peftx ({reason}): collect them again") from error

    def check(self, model: nn.Module) -> None:
        """Whether these are statistics of `model`, as it was or fine-tuned since.

        Raises:
            ValueError: a layer is missing or has another shape, or its weight correlates less than 0.5 with what it
                was (64 entries are compared).
        """
        found = layers_in(base_of(model))
        for name, layer in self.items():
            if name not in found:
                raise ValueError(
                    f"the statistics have a layer {name}, and {describe(model)} has no linear layer of that name: they "
                    f"are statistics of another model ({self.model})"
                )
            if (shape := shape_of(found[name])) != tuple(layer.shape):
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
    if metadata.get("format") not in (FORMAT, SHARED, STACKED):
        raise ValueError(f"format {metadata.get('format')!r} instead of {FORMAT!r}")
    header = json.loads(metadata["statistics"])
    shared = header.get("gram_of", {})
    shapes, facts = header["shapes"], {key: header[key] for key in ("samples", "tokens", "estimator", "model")}
    for key in ("samples", "tokens"):
        if type(facts[key]) is not int or facts[key] < 1:
            raise ValueError(f"{key} must be a positive integer, got {facts[key]!r}")
    if facts["estimator"] not in ESTIMATORS:
        raise ValueError(f"unknown estimator {facts['estimator']!r}")
    if not isinstance(facts["model"], str) or not isinstance(shapes, dict) or not shapes:
        raise ValueError("the header names no model, or no layers")
    for name, shape in shapes.items():
        if len(shape) not in (2, 3) or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"{name} cannot have the shape {shape!r}")
    if not isinstance(shared, dict) or not all(
        name in shapes and isinstance(owner, str) and f"{owner}.gram" in tensors and owner not in shared
        for name, owner in shared.items()
    ):
        raise ValueError("the header gives layers the Gram matrix of another one that has none")
    known = {f"{name}.{field}" for name in shapes for field in FIELDS}
    if unknown := [key for key in tensors if key not in known]:
        raise ValueError(f"unknown tensor {unknown[0]!r}")
    layers = {}
    for name, (*stack, out, into) in shapes.items():
        parts: dict[str, Any] = {field: tensors.get(f"{name}.{field}") for field in FIELDS}
        if name in shared:
            if parts["gram"] is not None:
                raise ValueError(f"{name} has a Gram matrix and another one's")
            parts["gram"] = tensors[f"{shared[name]}.gram"]
        if parts["signature"] is None:
            raise ValueError(f"{name} has no signature")
        wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "fisher_in": ((*stack, into), (torch.float64,)),
            "fisher_out": ((*stack, out), (torch.float64,)),
            "abs_mean": ((*stack, into), (torch.float64,)),
            "gram": ((*stack, into, into), (torch.float32, torch.float64)),
            "signature": ((min(PROBES, math.prod([*stack, out, into])),), (torch.float32,)),
        }
        for field, part in parts.items():
            if part is None:
                continue
            size, dtypes = wanted[field]
            if tuple(part.shape) != size or part.dtype not in dtypes:
                raise ValueError(
                    f"{name}.{field} must be {size} of {dtypes[0]}, and is {tuple(part.shape)} of {part.dtype}"
                )
            if field == "gram" and name in shared:
                continue  # seen where it is
            if not part.isfinite().all():
                raise ValueError(f"{name}.{field} is not finite")
            if (part.diagonal(dim1=-2, dim2=-1) if field == "gram" else part).lt(0).any() and field != "signature":
                raise ValueError(f"{name}.{field} has a negative entry where none can be")
        gram = parts["gram"]
        if gram is not None and name not in shared and not all(map(symmetric, gram if stack else [gram])):
            raise ValueError(f"{name}.gram is not symmetric")
        layers[name] = LayerStatistics(shape=(*stack, out, into), **parts)
    return {"layers": layers, **facts}


def symmetric(gram: Tensor) -> bool:
    """Up to a thousandth, a block of rows at a time."""
    atol = 1e-4 * float(gram.abs().max())
    return all(
        torch.allclose(gram[start : start + 512], gram[:, start : start + 512].T, atol=atol)
        for start in range(0, len(gram), 512)
    )


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside its place and renames it, so that it is whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    own = {}
    for key, part in tensors.items():
        part = part.detach().cpu().contiguous()
        storage = part.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != part.nbytes:  # files share no memory
            part = part.clone()
        seen.add(part.untyped_storage().data_ptr())
        own[key] = part
    with beside(path) as draft:
        save_file(own, draft, metadata)
