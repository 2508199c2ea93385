"""Which trainers compute a loss that Fisher sums can be made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..utils import base_of, innermost
from .hooks import Collector
from .stacks import called

TRL_OWN = "SFTTrainer"  # of TRL's trainers the one whose loss is the likelihood of the labels


def check_trainer(trainer: Any, args: Any) -> None:
    """Raises:
    ValueError: a training that hooks cannot follow, or whose loss is not about labels, with the way out.
    """
    accelerator = getattr(trainer, "accelerator", None)
    parallel = getattr(accelerator, "parallelism_config", None)
    for problem, there in {
        "FSDP": args.fsdp or getattr(trainer, "is_fsdp_enabled", False),
        "DeepSpeed": args.deepspeed or getattr(trainer, "is_deepspeed_enabled", False),
        "tensor, context or sequence parallelism": any(
            getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")
        ),
        "DataParallel (several GPUs in one process; start it with torchrun)": args.n_gpu > 1,
    }.items():
        if there:
            raise ValueError(
                f"FisherCallback does not work under {problem}: train with DDP or on one device, or collect on the "
                "trained model, with peftx.compression.collect"
            )
    for kind in type(trainer).__mro__:
        function = vars(kind).get("compute_loss")
        if function is not None and (getattr(function, "__module__", None) or "").partition(".")[0] == "trl":
            if kind.__name__ != TRL_OWN:
                raise ValueError(
                    f"the loss of {kind.__name__} is one over preferences, rewards or another model, and Fisher sums "
                    "are about labels: train without FisherCallback, and collect on the trained model with "
                    "peftx.compression.collect, from samples with labels"
                )
            break


def check_own_loss(trainer: Any, args: Any) -> None:
    """Raises:
    ValueError: the loss of the training steps is not the model's own.
    """
    for problem, there in {
        "torch_compile=True leaves hooks out": args.torch_compile,
        "with label smoothing the loss is not the model's own": args.label_smoothing_factor,
        "with compute_loss_func the loss is not the model's own": getattr(trainer, "compute_loss_func", None),
        "with loss_type='dft' tokens do not count alike": is_trl(trainer) and getattr(args, "loss_type", "") == "dft",
    }.items():
        if there:
            raise ValueError(f"{problem}: FisherCallback(when='calibration') collects in a pass after training")


def check_head(trainer: Any, collector: Collector) -> None:
    """Raises:
    ValueError: TRL reads the weight of an output embedding that is collected on, past its hooks.
    """
    head: Any = getattr(base_of(collector.model), "get_output_embeddings", lambda: None)()
    for name, layer in collector.layers.items() if head is not None and is_trl(trainer) else ():
        trains = collector.estimator == "per_batch" and isinstance(layer, nn.Linear) and layer.weight.requires_grad
        if innermost(called(layer)) is innermost(head) and not (collector.fields == collector.sides and trains):
            raise ValueError(
                f"TRL's {TRL_OWN} reads the weight of {name} without calling it: leave it out, exclude_modules="
                f"[{name!r}], or collect after training, FisherCallback(when='calibration')"
            )


def is_trl(trainer: Any) -> bool:
    return any(kind.__name__ == TRL_OWN and kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)
