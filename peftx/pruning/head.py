"""The output layer: which module it is, its weight, and what stands between it and the logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from ..utils import base_of, innermost

# PEFT's TaskType names, and the transformers classes that they mean.
TASKS: dict[str, str] = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}


UNITS = 256  # unit vectors that a layer is asked at a time


def task_of(model: nn.Module) -> str:
    """The task as PEFT names it: from the adapter's config, else from the class of the model."""
    if isinstance(model, PeftModel) and model.active_peft_config.task_type in TASKS:
        return str(getattr(model.active_peft_config.task_type, "value", model.active_peft_config.task_type))
    name = type(base_of(model)).__name__
    if (task := task_of_class(name)) is None:
        raise ValueError(f"cannot tell the task of a {name}: pass task= one of {', '.join(TASKS)}")
    return task


def task_of_class(name: str) -> str | None:
    """The task of a transformers model class."""
    # Encoder-decoders first: some of their classes stand among the causal ones too.
    for task in ("SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"):
        entries = getattr(modeling_auto, TASKS[task]).values()
        if any(name == entry if isinstance(entry, str) else name in entry for entry in entries):
            return task
    return None


def find_head(model: nn.Module, task: str, name: str | None = None) -> nn.Module:
    """The linear layer that makes the logits: the one `name`d, the output embeddings, or the last linear layer behind
    the encoder that has `num_labels` outputs. A copy that PEFT trains (`modules_to_save`) is found if it is active.

    Raises:
        ValueError: there is none, or it is not linear.
    """
    base = base_of(model)
    if name is not None:
        try:
            found: Any = base.get_submodule(name)
        except AttributeError:
            raise ValueError(f"head={name!r}: the {type(base).__name__} has no module of that name") from None
        where = name
    elif task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        getter = getattr(base, "get_output_embeddings", lambda: None)
        found, where = getter(), "get_output_embeddings()"
    else:
        found, where = classifier(base), "the classifier"
    if isinstance(found, AuxiliaryTrainingWrapper):
        found = active_copy(found)
    inside = innermost(found)
    if inside is None:
        raise ValueError(
            f"found no output layer in {type(base).__name__}: name the linear layer that makes the logits, head="
        )
    if not isinstance(inside, nn.Linear):
        raise ValueError(
            f"the output layer of {type(base).__name__} ({where}) is a {type(found).__name__}; the scores need an "
            "nn.Linear: name the linear layer that makes the logits, head="
        )
    return found


def classifier(base: nn.Module) -> nn.Module | None:
    """The last linear layer outside the encoder with as many outputs as there are labels."""
    labels = getattr(getattr(base, "config", None), "num_labels", None)
    encoder = getattr(base, "base_model_prefix", "")
    found: nn.Module | None = None
    for name, child in base.named_children():
        if name != encoder:
            for layer, outputs in linear_layers(child):
                found = layer if outputs == labels else found
    return found


def linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The linear layers in `module` and their numbers of outputs; one with an adapter counts as one, and of a module
    that PEFT trains a copy of, the active copy counts."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = active_copy(module)
    layer = innermost(module)
    if isinstance(layer, nn.Linear):
        yield module, layer.out_features
    elif layer is module:
        for child in module.children():
            yield from linear_layers(child)


def active_copy(wrapper: AuxiliaryTrainingWrapper) -> nn.Module:
    """The module that the wrapper calls now."""
    copies = wrapper.modules_to_save if isinstance(wrapper, ModulesToSaveWrapper) else None
    names = [name for name in wrapper.active_adapters if copies is None or name in copies]
    if wrapper.disable_adapters or not names:
        return wrapper.original_module
    return wrapper.token_adapter if copies is None else copies[names[0]]  # trainable tokens, of tied embeddings


def affine(module: nn.Module, h: Tensor) -> tuple[float, Tensor | None, Tensor]:
    """|W|_F^2 in float64, b (V,) and W h + b (n, V) of a layer that computes just that, for inputs `h` (n, D).

    A plain linear layer is read. One that is quantised, or carries an adapter, is asked: b is its answer to 0, and W
    its answers to the unit vectors less b, some at a time, so that W as a whole is nowhere.
    """
    if type(module) is nn.Linear:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        with torch.autocast(h.device.type, enabled=False):
            product = nn.functional.linear(h.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return square_norm(weight), bias, product
    layer: Any = innermost(module)
    bias = module(h.new_zeros(1, h.shape[1]))[0]
    exact = torch.promote_types(bias.dtype, torch.float32)
    square, product = 0.0, bias.to(exact).expand(len(h), -1)
    for part in torch.eye(layer.in_features, dtype=h.dtype, device=h.device).split(UNITS):
        columns = (module(part) - bias).to(exact)  # of W, as rows
        square += square_norm(columns)
        product = product + (h @ part.T).to(columns) @ columns
    return square, bias, product


def quantized(module: nn.Module) -> bool:
    layer: Any = innermost(module)
    return type(layer.weight) is not nn.Parameter


def square_norm(weight: Tensor) -> float:
    """|W|_F^2, summed in float64, some rows at a time."""
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    rows = max(1, 2**22 // weight.shape[1])
    return sum(float(part.double().square().sum()) for part in weight.split(rows))


@dataclass(frozen=True)
class Head:
    """A checked output layer. `logits = scale * z` or `cap * tanh(z / cap)`, with `z = W h + b`."""

    square: float  # |W|_F^2
    bias: Tensor | None
    scale: float = 1.0  # not measured where the logits are z
    cap: float | None = None

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits by z."""
        if self.cap is None:
            return self.scale
        return 1 - (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.cap).square()


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of every call of `module` in the block."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args[0] if args else kwargs["input"], output)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def check_head(model: nn.Module, module: nn.Module, h: Tensor, z: Tensor, logits: Tensor) -> Head | None:
    """The head, once it is seen to be what the formulas assume.

    `h` (n, D), `z` (n, V) and `logits` (n, V) are what went in, what came out and what the model made of it. Two things
    are checked at the first eight positions: z = W h + b, and that the logits are z, z times one number (Cohere,
    Granite), or z soft-capped (Gemma; `final_logit_softcapping` in the config). The number is measured, not read.
    Returns None where NaN and infinity leave nothing to look at.

    Raises:
        ValueError: one of the two does not hold.
    """
    finite = (z.isfinite().all(-1) & logits.isfinite().all(-1)).nonzero()[:8, 0]
    if not len(finite):
        return None
    h, z, logits = h[finite], z[finite], logits[finite]
    square, bias, product = affine(module, h)
    # What half-precision and quantised products may differ by; a wrong formula is off by much more.
    single = min(torch.finfo(part.dtype).bits for part in (h, z, product, logits)) >= 32
    tolerance = 1e-3 if single and not quantized(module) else 5e-2
    z, logits = z.float(), logits.float()

    def same(found: Tensor, wanted: Tensor) -> bool:
        return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-6))

    if not same(product.float(), z):
        raise ValueError(
            f"the output layer ({type(module).__name__}) does not compute W h + b, so its gradient has another form: "
            "score without an adapter on it, or name another layer, head="
        )
    if torch.equal(logits, z):
        return Head(square, bias)
    alike = logits.shape == z.shape  # or some outputs are cut off
    cap = softcap(base_of(model))  # first, since a factor fits a soft cap of small logits well
    if alike and cap is not None and same(logits, cap * torch.tanh(z / cap)):
        return Head(square, bias, cap=cap)
    scale = float((logits * z).sum() / z.square().sum().clamp(min=1e-30)) if alike else 0.0
    if scale > 0 and same(logits, scale * z):
        return Head(square, bias, scale)
    raise ValueError(
        f"{type(base_of(model)).__name__} changes the output of its head in a way that is neither a factor nor a soft "
        "cap (final_logit_softcapping), so DON, NOD and GraNd of the head have another form. loss, el2n, ifd, "
        "grand_full and random need no head."
    )


def softcap(base: nn.Module) -> float | None:
    config = getattr(base, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if (cap := getattr(part, "final_logit_softcapping", None)) is not None:
            return float(cap)
    return None
