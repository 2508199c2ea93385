"""Where the training of an adapter stands: steps, micro-batches, and who provides the statistics."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...adapters.sharding import refuse_shards
from .config import LoRAGGPOConfig
from .noise import ramped
from .statistics import measure, take

PATIENCE = 20  # training forwards without statistics before a warning


class Schedule:
    """Where the training of one adapter stands; shared by the rules of all its layers.

    Attributes:
        clock: `step` and `micro`, where a compiled graph reads them anew.
        step: optimizer steps whose gradients the statistics have seen.
        micro: micro-batches of the present step that have had their backward.
        waiting: whether it is too early for perturbations.
        driven: whether somebody calls `update_ggpo_stats`, so that the hooks keep still.
        heard: whether the hooks have seen gradients since the last forward.
        learning: whether the latest pass of the whole model has gradients.
        total_step: length of the training, for the ramp.
        optimizer: whose moments mode `"mgpo"` reads.
        rules: those of the layers, with the layer and the adapter's name.
    """

    def __init__(self, config: LoRAGGPOConfig) -> None:
        self.config = config
        self.total_step = config.total_step
        self.clock = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.step = self.micro = self.idle = 0
        self.driven = self.heard = self.checked = False
        self.learning = True
        self.optimizer: Any = None
        self.handle: Any = None
        self.rules: list[tuple[Any, Any, str]] = []
        self._seen: list[Any] = []
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizer": None, "_seen": []}  # a copy of the model is not the optimizer's

    @property
    def step(self) -> int:
        return int(self.clock[0])

    @step.setter
    def step(self, step: int) -> None:
        self.clock[0], self.waiting = step, step < self.config.warmup_steps

    @property
    def micro(self) -> int:
        return int(self.clock[1])

    @micro.setter
    def micro(self, micro: int) -> None:
        self.clock[1] = micro

    def live(self) -> Iterator[tuple[Any, Any, str]]:
        """The rules of layers that still have the adapter and train it."""
        for rule, layer, name in self.rules:
            if layer.lora_variant.get(name) is rule and layer.lora_B[name].weight.requires_grad:
                yield rule, layer, name

    def tell(self, what: str) -> None:
        """A warning, once."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"LORAGGPO: {what}", stacklevel=3)

    def measure(self) -> list[torch.Tensor | None]:
        return measure(list(self.live()))

    def take(self, found: list[torch.Tensor | None], step: int | None = None) -> None:
        """Makes the statistics of the coming step from the squared gradient norms that `measure` found."""
        self.heard = False
        self.step, self.micro = self.step + 1 if step is None else step, 0
        for rule, _, _ in self.rules:
            rule.pending = None
        take(list(self.live()), found)

    def attach(self, optimizer: Any) -> None:
        self.optimizer = _unwrapped(optimizer)

    def check_optimizer(self, optimizer: Any) -> None:
        """Raises TypeError or ValueError unless it is an optimizer of this adapter's parameters."""
        optimizer = _unwrapped(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        weights = [w[name].weight for _, layer, name in self.live() for w in (layer.lora_A, layer.lora_B)]
        if missing := sum(weight.requires_grad and id(weight) not in known for weight in weights):
            raise ValueError(
                f"The optimizer does not have {missing} of the adapter's {len(weights)} parameters: make it from those "
                "of this model, after `get_peft_model`, and attach that one."
            )

    def release(self) -> None:
        """Forgets a training: its statistics, its optimizer, and that somebody called `update_ggpo_stats`."""
        self.driven, self.optimizer = False, None
        for rule, _, _ in self.rules:
            for key in rule.statistics:
                setattr(rule, key, None)

    def before_forward(self, model: nn.Module, *args: Any) -> None:
        """Forward pre-hook of the whole model, which no recomputation calls: notices a backward and a step."""
        if not torch.compiler.is_compiling():
            self.learning = torch.is_grad_enabled()
        needed = not torch.compiler.is_compiling() or (self.config.auto_update and not self.driven)
        if model.training and needed:
            if not self.checked:
                self.refuse_shards(model)
                self.checked = True
            self._observe()

    def refuse_shards(self, model: nn.Module) -> None:
        """Raises RuntimeError where the model is sharded."""
        method = f"LoRA-{self.config.mode.upper()}"
        refuse_shards(model, method, "its rule needs whole rows of the weights, gradients and moments")

    @torch.compiler.disable
    def _observe(self) -> None:
        places = list(self.live())
        if not places:
            return
        if self.config.auto_update and not self.driven:
            for rule, layer, name in places:
                rule.listen(layer, name)
        grads = [layer.lora_B[name].weight.grad for _, layer, name in places]
        seen = [None if grad is None else (id(grad), grad._version) for grad in grads]
        known, self._seen = self._seen, seen
        if self.driven or not self.config.auto_update:
            self.micro += seen != known and any(seen)
        elif self.heard:
            # The version of a weight tells no step: fused and bitsandbytes' optimizers do not raise it. A gradient that
            # is gone, zero, or another tensor than before does.
            self.heard = False
            added = any(a and b and a[0] == b[0] and a[1] > b[1] for a, b in zip(seen, known, strict=False))
            first = not any(known) and any(seen)
            if (added or first) and any(grad is not None and grad.any() for grad in grads):
                self.micro += 1
            else:
                self._take_from_hooks()
        if self.learning and not any(seen):
            self._warn_if_idle()

    def _take_from_hooks(self) -> None:
        found = [rule.pending for rule, _, _ in self.live()]
        if any(norms is not None for norms in found):
            self.tell(
                "the statistics come from hooks, which see gradients before clipping, unscaling and DDP's averaging. "
                "Pass `peftx.GGPOCallback()` to Trainer, or call `model.base_model.update_ggpo_stats()` before each "
                "`optimizer.step()`."
            )
            self.take(found)

    def _warn_if_idle(self) -> None:
        missing = self.config.mode == "mgpo" and self.optimizer is None
        self.idle = 0 if (self.step or self.driven) and not missing else self.idle + 1
        if self.idle == PATIENCE:
            self.tell(
                "training is that of plain LoRA so far. Pass `peftx.GGPOCallback()` to Trainer, or call "
                + ("`model.base_model.attach_optimizer(optimizer)` before the loop and " if missing else "")
                + "`model.base_model.update_ggpo_stats()` before each `optimizer.step()`."
            )

    @property
    def perturbs(self) -> bool:
        """Whether a layer is called to learn: with gradients, or by re-entrant checkpointing in a pass that has them.
        Answers that are generated in training mode (GRPO, RLOO) and log-probabilities without gradients are not."""
        return self.learning or torch.is_grad_enabled()

    def grown(self, tau: torch.Tensor) -> torch.Tensor:
        """`tau` by the ramp."""
        if self.config.ramp == "none":
            return tau
        if self.total_step is None:
            self.tell(
                "`ramp='cosine'` needs `total_step` in LoRAGGPOConfig, or `peftx.GGPOCallback()`: no ramp so far."
            )
            return tau
        return ramped(tau, self.clock, self.total_step)

    def moment(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The optimizer's first moment of a weight, where it has one in full precision."""
        state = getattr(self.optimizer, "state", {}).get(weight)
        if not state:
            return None
        moment = state.get("exp_avg", state.get("momentum_buffer"))
        if isinstance(moment, torch.Tensor) and moment.shape == weight.shape and moment.is_floating_point():
            return moment
        self.tell("the optimizer holds no first moments in full precision (8 bits, sharded, or none): plain LoRA.")
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """What the next step depends on and the adapter's file does not hold, by module, adapter and name."""
        return {
            f"{rule.name}|{name}|{key}": tensor
            for rule, _, name in self.live()
            for key in rule.statistics
            if (tensor := getattr(rule, key)) is not None
        }

    def fingerprint(self) -> str:
        """Tells the statistics of one training from those of another."""
        digest = hashlib.blake2b(digest_size=16)
        for key, tensor in sorted(self.state().items()):
            digest.update(key.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def load_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        self.step, self.micro, self._seen = step, 0, []
        for rule, layer, name in self.live():
            for key in rule.statistics:
                tensor = state.get(f"{rule.name}|{name}|{key}")
                setattr(rule, key, None if tensor is None else tensor.to(layer.lora_B[name].weight.device))


def schedules(model: nn.Module) -> list[Schedule]:
    """The schedules of the LoRA-GGPO adapters that are being trained in a model, wrapped by PEFT or not."""
    return [schedule for schedule in all_schedules(model) if next(schedule.live(), None)]


def _unwrapped(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer


def all_schedules(model: nn.Module) -> list[Schedule]:
    """Those that nothing trains any more too."""
    rules = (rule for layer in model.modules() for rule in getattr(layer, "lora_variant", {}).values())
    return list(dict.fromkeys(rule.schedule for rule in rules if hasattr(rule, "schedule")))


def update_ggpo_stats(model: nn.Module, step: int | None = None) -> None:
    """`LoRAGGPOModel.update_ggpo_stats` for any model, also a transformers one with an adapter (`add_adapter`)."""
    due = [schedule for schedule in schedules(model) if step is None or step != schedule.step]
    if not due and step is not None:
        return
    for schedule in due:
        schedule.refuse_shards(model)
    found = [(schedule, schedule.measure()) for schedule in due]
    found = [(schedule, norms) for schedule, norms in found if any(norm is not None for norm in norms)]
    if not found:
        raise RuntimeError(
            "update_ggpo_stats() found no gradients: call it after `backward()`, and before `optimizer.step()` and "
            "`zero_grad()`. Gradients that are sharded (DeepSpeed ZeRO) cannot be read."
        )
    for schedule, norms in found:
        schedule.driven = True
        schedule.take(norms, step)
