"""From a model and `TrainingArguments` to a `LowRankAdamW`, for transformers' Trainer or a loop of one's own."""

from __future__ import annotations

import inspect
import numbers
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from .adamw import LowRankAdamW
from .checks import check_option, check_options, one_of

NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")  # as the Trainer has it
LORA = re.compile(r"\.lora_(embedding_)?[AB]\.")


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    rank: int | float | None = None,
    target: str | None = None,
    embedding_bits: int = 32,
) -> list[dict[str, Any]]:
    """Trainable parameters, with their names, in groups: with and without decay, projected or not, embeddings or not.

    Biases and the weights of normalisation layers have no decay. With a rank, the projected parameters are the matrices
    whose name `target`, a regular expression, finds. Without a target: LoRA's A and B where the model has them (so no
    magnitudes and no head); else all matrices but those of embeddings and of a language model's head.

    The states of embeddings, and of all adapters on them, have `embedding_bits`: 32 by default, as transformers has it
    with bitsandbytes; 8 leaves them to `optim_bits`. Where rare tokens share a block with frequent ones, 8 bits round
    their second moments to the block's smallest number, or, in bitsandbytes' CUDA kernel, to 0, and m / eps is a leap.

    Raises ValueError if nothing is trainable, if there is a rank and nothing to project, or for a `weight_decay`,
    `rank`, `target` or `embedding_bits` that is none; NotImplementedError for a rank where FSDP1 has flattened the
    matrices.
    """
    check_option("weight_decay", weight_decay)
    check_option("rank", rank)
    check_target(target)
    check_embedding_bits(embedding_bits)
    if rank is not None and any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        raise NotImplementedError(
            "FSDP1 flattens parameters, so there is no matrix to project: use DDP, or rank=None (8 bits without it)"
        )
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no trainable parameter")
    chosen: set[str] = set()
    if rank is not None:
        chosen = {name for name, p in trained if p.dim() == 2} & set(_targets(model, trained, target))
        if not chosen:
            raise ValueError(f"rank={rank}, but there is no trainable matrix to project (target={target!r})")
    decaying = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    sparse = _of_embeddings(model) if embedding_bits == 32 else set()
    groups: dict[tuple[bool, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, p in trained:
        groups.setdefault((name in decaying, name in chosen, id(p) in sparse), []).append((name, p))
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decays else 0.0,
            "rank": rank if projected else None,
            **({"optim_bits": 32} if embedded else {}),
        }
        for (decays, projected, embedded), params in groups.items()
    ]


def check_embedding_bits(embedding_bits: Any) -> None:
    """Raises ValueError unless `embedding_bits` is 8 or 32."""
    if not one_of(8, 32)(embedding_bits):
        raise ValueError(f"embedding_bits must be 8 or 32, not {embedding_bits!r}")


def _of_embeddings(model: nn.Module) -> set[int]:
    """The ids of the parameters of embeddings and of adapters on them, whose gradients have rows of rare tokens."""
    found = set()
    for module in model.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, (nn.Embedding, nn.EmbeddingBag)):
            found |= {id(p) for p in module.parameters()}
    return found


def check_target(target: Any) -> None:
    """Raises ValueError unless `target` is None or a regular expression."""
    try:
        re.compile("" if target is None else target)
    except (TypeError, re.error) as error:
        raise ValueError(f"target must be None or a regular expression, not {target!r}: {error}") from error


def _targets(model: nn.Module, trained: list[tuple[str, nn.Parameter]], target: str | None) -> list[str]:
    if target is not None:
        return [name for name, _ in trained if re.search(target, name)]
    factors = [name for name, _ in trained if LORA.search(name)]
    if factors:
        return factors
    head = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    excluded |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return [name for name, p in trained if id(p) not in excluded]


def create_optimizer(
    model: nn.Module,
    args: Any = None,
    *,
    rank: int | float | None = None,
    target: str | None = None,
    embedding_bits: int = 32,
    **options: Any,
) -> LowRankAdamW:
    """A `LowRankAdamW` of a model's trainable parameters, grouped by `param_groups`.

    Args:
        args: `TrainingArguments` (learning rate, betas, epsilon and weight decay are taken from them), a learning rate,
            or None (the optimizer's defaults).
        rank, target, embedding_bits: see `param_groups`. An optimizer's state dict fits one of the same three.
        options: any other argument of `LowRankAdamW`; they win over `args`.

    In a subclass of Trainer:

        def create_optimizer(self, model=None):
            self.optimizer = peftx.optim.create_optimizer(model or self.model, self.args, rank=4)
            return self.optimizer
    """
    options = {**_hyperparameters(args), **options}
    weight_decay = options.setdefault("weight_decay", 0.01)
    bits = 8 if options.get("optim_bits") == 32 and embedding_bits == 32 else embedding_bits  # no group without a need
    return LowRankAdamW(param_groups(model, weight_decay, rank, target, bits), **options)


def _hyperparameters(args: Any) -> dict[str, Any]:
    if args is None:
        return {}
    if isinstance(args, (numbers.Real, torch.Tensor)):
        return {"lr": args}
    if not hasattr(args, "learning_rate"):
        raise TypeError(f"args must be TrainingArguments, a learning rate or None, not {args!r}")
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def check_arguments(
    args: Any,
    *,
    rank: int | float | None = None,
    target: str | None = None,
    embedding_bits: int = 32,
    **options: Any,
) -> None:
    """Raises what `create_optimizer` would, of what can be known without the model."""
    known = inspect.signature(LowRankAdamW).parameters
    if unknown := options.keys() - (known.keys() - {"params"}):
        raise TypeError(f"LowRankAdamW has no argument {sorted(unknown)[0]!r}; it has {', '.join(list(known)[1:])}")
    check_target(target)
    check_embedding_bits(embedding_bits)
    defaults = {name: parameter.default for name, parameter in known.items() if name != "params"}
    check_options(
        {**defaults, "skipped_steps": 0, "rounded_steps": 0, **_hyperparameters(args), "rank": rank, **options}
    )


class OptimizerFactory:
    """What the Trainer calls to make the optimizer from the model it holds then."""

    def __call__(self, model: nn.Module, **options: Any) -> LowRankAdamW:
        return create_optimizer(model, **options)


def trainer_kwargs(args: Any, **options: Any) -> dict[str, Any]:
    """What `Trainer` needs to use `LowRankAdamW`; the arguments are those of `create_optimizer` after the model.

        trainer = Trainer(model, args, train_dataset=data, **peftx.optim.trainer_kwargs(args, rank=4, min_8bit_size=0))

    `args`, `TrainingArguments` as the Trainer's, or a learning rate, has no default: the Trainer hands nothing on.
    The optimizer is made when the Trainer makes its own, so this also works with `model_init` and, without a rank, with
    FSDP1. FSDP2 is refused, at the first step at the latest (`LowRankAdamW` says why).

    Raises here, before anything is trained: TypeError for an argument that there is not, ValueError for a value out of
    its range.
    """
    check_arguments(args, **options)
    return {"optimizer_cls_and_kwargs": (OptimizerFactory, {"args": args, **options})}
