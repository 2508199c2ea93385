"""LoRA-GGPO and its successor LoRA-MGPO: LoRA trained under perturbations of the merged weight, for flatter minima."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Embedding, Linear, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.config import Number
from ..adapters.layer import accumulate, at_least_fp32, unobserved
from ..adapters.lora import Variant, VariantConfig, VariantModel, is_plain, low_rank, weight_row_norms2
from ..registry import register

BLOCK = 2**22  # elements of the noise that exist at a time
PATIENCE = 20  # training forwards without statistics before a warning


@dataclass
class LoRAGGPOConfig(VariantConfig):
    """LoRA-GGPO (arXiv:2502.14538 v1) and LoRA-MGPO (its v2): LoRA trained under perturbations of the merged weight.

    `mode="ggpo"`: every training step sees the weight W' + eps, W' = W + s B A, with a fresh eps_ij ~ N(0, tau_i^2);
    tau_i grows with the norm of row i of W' and with that of its gradient, as far as LoRA's gradients show it. There is
    one forward and one backward a step; the noise is made again from its seed in the backward and never written into
    the weight. It costs two draws of out_features x in_features normal numbers for each module and micro-batch.

    `mode="mgpo"`: eps is a step of length `mgpo_rho` against the optimizer's momentum, of rank 2r, and nearly free. It
    is skipped until the optimizer has moments, and where it holds them in 8 bits or sharded.

    Perturbations act in training mode only; evaluation, merging and the saved file, a plain LoRA, know nothing of
    them. Pass `peftx.GGPOCallback()` to `Trainer`. In a loop of your own, call `model.base_model.update_ggpo_stats()`
    between `backward()` (and clipping) and `optimizer.step()`, and for `"mgpo"` once, before the loop,
    `model.base_model.attach_optimizer(optimizer)`. Under `torch.compile` perturbed layers break the graph, and the
    micro-batches of a window share their noise unless hooks drive it.

    The paper's bodies could not be read. The law of tau follows the abstract and a note that gives the head of the
    covariance; the exponent of `ggpo_beta` is unverified, and `combine="additive"` is the form of a public trainer
    (kohya's sd-scripts). `"mgpo"` follows the authors' trainer.

    Args:
        lora_alpha: default 16, the authors' setting at r = 8.
        mode: `"ggpo"` or `"mgpo"`.
        ggpo_sigma: size of the noise relative to the row's norm. Default 0.03 (sd-scripts).
        ggpo_beta: weight of the gradient's row norms. Default 0.01 (sd-scripts).
        combine: `"quadrature"`: tau_i = sigma / sqrt(in_features) sqrt(||W'_i||^2 + beta ||G_i||^2). `"additive"`:
            tau_i = (sigma ||W'_i|| + beta ||G_i||^2) / sqrt(out_features).
        ramp: `"cosine"` lets the noise grow from 0 to full size over `total_step` steps (Flat-LoRA).
        total_step: optimizer steps of the training, needed by `ramp="cosine"`; `GGPOCallback` fills it in.
        warmup_steps: optimizer steps without perturbation, at least the first, which has no statistics yet.
        noise_per: `"micro"`: each micro-batch of an accumulation window draws its own noise; `"step"`: one for all.
        grad_ema: decay of a running mean of the squared gradient norms; 0, the default: the last step's.
        cheap_norms: leave out the cross term of W and B A in ||W'_i||^2, a product of W with A at each update.
        mgpo_rho: length of the MGPO step; negative: along the momentum, not against it. Default 0.005, with which small
            encoders learn at LoRA's usual rates (README); the authors take 0.05 for T5-base and 0.01 for LLaMA-2.
        mgpo_ema: decay of the running mean of the gradient's norm, by which the MGPO step is divided. Default 0.9.
        mgpo_max_scale: bound of that division's factor. Default 10.
        seed: of the noise. It is also made from the module's name, the step, the micro-batch and the process.
        auto_update: take the statistics by hooks while nobody calls `update_ggpo_stats`. The hooks see gradients
            before clipping, unscaling (do not use them with a `GradScaler`) and DDP's averaging.

    Raises:
        ValueError: a number out of its range.
    """

    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha; the authors use 16 at r = 8."})
    mode: Literal["ggpo", "mgpo"] = field(
        default="ggpo", metadata={"help": "Random perturbation ('ggpo') or one against the momentum ('mgpo')."}
    )
    ggpo_sigma: Number = field(default=0.03, metadata={"help": "Size of the noise relative to the weight's rows."})
    ggpo_beta: Number = field(default=0.01, metadata={"help": "Weight of the gradient's row norms in the noise."})
    combine: Literal["quadrature", "additive"] = field(
        default="quadrature", metadata={"help": "How the norms of weight and gradient rows make the noise's size."}
    )
    ramp: Literal["none", "cosine"] = field(default="none", metadata={"help": "How the noise's size grows over time."})
    total_step: int | None = field(default=None, metadata={"help": "Optimizer steps in all, for `ramp='cosine'`."})
    warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps without perturbation at the start."})
    noise_per: Literal["micro", "step"] = field(
        default="micro", metadata={"help": "Whether each micro-batch or each optimizer step draws its noise."}
    )
    grad_ema: Number = field(default=0.0, metadata={"help": "Decay of the mean of squared gradient row norms."})
    cheap_norms: bool = field(default=False, metadata={"help": "Leave out the cross term in the weight's row norms."})
    mgpo_rho: Number = field(default=0.005, metadata={"help": "Length of the perturbation in mode 'mgpo'."})
    mgpo_ema: Number = field(default=0.9, metadata={"help": "Decay of the mean gradient norm in mode 'mgpo'."})
    mgpo_max_scale: Number = field(default=10.0, metadata={"help": "Greatest factor of `mgpo_rho`."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    auto_update: bool = field(
        default=True, metadata={"help": "Take statistics by hooks when neither callback nor loop provides them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (
            ("ggpo_sigma", 0, math.inf),
            ("ggpo_beta", 0, math.inf),
            ("mgpo_rho", -math.inf, math.inf),
            ("warmup_steps", 0, math.inf),
            ("grad_ema", 0, 1),
            ("mgpo_ema", 0, 1),
        ):
            value = getattr(self, name)
            if not (low <= value < high and math.isfinite(value)):
                raise ValueError(f"`{name}` must be finite, at least {low} and less than {high}, got {value}.")
        if not (self.mgpo_max_scale > 0 and math.isfinite(self.mgpo_max_scale)):
            raise ValueError(f"`mgpo_max_scale` must be positive and finite, got {self.mgpo_max_scale}.")
        if self.total_step is not None and self.total_step <= 0:
            raise ValueError(f"`total_step` must be positive, got {self.total_step}.")


def gradient_row_norms2(
    A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, scale: float
) -> torch.Tensor:
    """||scale (B grad_A + grad_B A)||^2 of each row, (out_features,): what LoRA's gradients show of the weight's."""
    U, V = torch.cat([B, grad_B], dim=1), torch.cat([grad_A, A])
    return (scale**2 * ((U @ (V @ V.T)) * U).sum(dim=1)).clamp(min=0)


def _running(mean: torch.Tensor | None, value: torch.Tensor, decay: float) -> torch.Tensor:
    return value if mean is None else decay * mean + (1 - decay) * value


def draw(seed: int, rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Standard normal numbers (rows, columns), fp32, in blocks of rows; the same for the same seed and device type."""
    generator = torch.Generator(device).manual_seed(seed)
    size = max(1, BLOCK // columns)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        yield block, torch.empty(block.stop - start, columns, device=device).normal_(generator=generator)


class _NoisyOutput(torch.autograd.Function):
    """`result` + x eps^T for a base layer whose weight cannot be read cheaply; eps = diag(tau) draw(seed)."""

    @staticmethod
    def forward(ctx, result, x, tau, seed):
        ctx.seed, ctx.columns, ctx.dtype = seed, x.shape[-1], x.dtype
        ctx.save_for_backward(tau)
        result = result.clone()
        for rows, noise in draw(seed, len(tau), x.shape[-1], x.device):
            result[..., rows] += (F.linear(x, noise.to(x.dtype)) * tau[rows].to(x.dtype)).to(result.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (tau,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return g, None, None, None
        scaled, grad_x = g.to(ctx.dtype) * tau.to(ctx.dtype), 0
        with torch.autocast(g.device.type, enabled=False):
            for rows, noise in draw(ctx.seed, len(tau), ctx.columns, g.device):
                grad_x = grad_x + scaled[..., rows] @ noise.to(ctx.dtype)
        return g, grad_x, None, None


class _NoisyLinear(torch.autograd.Function):
    """x (W + eps)^T + bias with a frozen W; eps = diag(tau) draw(seed). One product, where x eps^T were a second."""

    @staticmethod
    def forward(ctx, x, weight, bias, tau, seed):
        ctx.seed, ctx.dtype = seed, x.dtype
        ctx.save_for_backward(weight, tau)
        parts = [
            F.linear(x, noisy, None if bias is None else bias[rows]) for rows, noisy in _perturbed(ctx, weight, tau)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_x = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                parts = (g[..., rows] @ noisy for rows, noisy in _perturbed(ctx, *ctx.saved_tensors))
                grad_x = next(parts)
                for part in parts:
                    grad_x += part
            if ctx.needs_input_grad[2]:
                grad_bias = g.reshape(-1, g.shape[-1]).sum(dim=0)
        return grad_x, None, grad_bias, None, None


def _perturbed(ctx: Any, weight: torch.Tensor, tau: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows, noise in draw(ctx.seed, weight.shape[0], weight.shape[1], weight.device):
        part = at_least_fp32(weight[rows])
        yield rows, torch.addcmul(part, noise.to(part.dtype), tau[rows, None].to(part.dtype)).to(ctx.dtype)


class Schedule:
    """Where the training of one adapter stands; shared by the rules of all its layers.

    Attributes:
        step: optimizer steps whose gradients the statistics have seen.
        micro: micro-batches of the present step that have had their backward.
        driven: whether somebody calls `update_ggpo_stats`, so that the hooks keep still.
        heard: whether the hooks have seen gradients since the last forward.
        total_step: length of the training, for the ramp.
        optimizer: whose moments mode `"mgpo"` reads.
        rules: those of the layers, with the layer and the adapter's name.
    """

    def __init__(self, config: LoRAGGPOConfig) -> None:
        self.config = config
        self.total_step = config.total_step
        self.step = self.micro = self.idle = 0
        self.driven = self.heard = False
        self.optimizer: Any = None
        self.handle: Any = None
        self.rules: list[tuple[GGPO, Any, str]] = []
        self._seen: list[Any] = []
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizer": None, "_seen": []}  # a copy of the model is not the optimizer's

    def live(self) -> Iterator[tuple[GGPO, Any, str]]:
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
        return [rule.measure(layer, name) for rule, layer, name in self.live()]

    def take(self, found: list[torch.Tensor | None], step: int | None = None) -> None:
        """Makes the statistics of the coming step from the squared gradient norms that `measure` found."""
        self.heard = False
        self.step, self.micro = self.step + 1 if step is None else step, 0
        for rule, _, _ in self.rules:
            rule.pending = None
        totals = [norms.sum() for norms in found if norms is not None]
        if not torch.stack([total.to(totals[0].device) for total in totals]).isfinite().all():
            return  # the gradients overflowed: this optimizer step is skipped
        for (rule, layer, name), norms in zip(self.live(), found, strict=True):
            if norms is not None:
                rule.take(layer, name, norms)

    def attach(self, optimizer: Any) -> None:
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        self.optimizer = optimizer

    def release(self) -> None:
        """Forgets a training: its statistics, its optimizer, and that somebody called `update_ggpo_stats`."""
        self.driven, self.optimizer = False, None
        for rule, _, _ in self.rules:
            for key in rule.statistics:
                setattr(rule, key, None)

    def before_forward(self, model: nn.Module, *args: Any) -> None:
        """Forward pre-hook of the whole model, which no recomputation calls: notices a backward and a step."""
        needed = not torch.compiler.is_compiling() or (self.config.auto_update and not self.driven)
        if model.training and needed:
            self._observe()

    @torch.compiler.disable
    def _observe(self) -> None:
        grads = [layer.lora_B[name].weight.grad for _, layer, name in self.live()]
        if not grads:
            return
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
        if not any(seen):
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
    def size(self) -> float:
        """Factor of the noise by the ramp."""
        if self.config.ramp == "none":
            return 1.0
        if self.total_step is None:
            self.tell(
                "`ramp='cosine'` needs `total_step` in LoRAGGPOConfig, or `peftx.GGPOCallback()`: no ramp so far."
            )
            return 1.0
        return 0.5 * (1 - math.cos(math.pi * min(1.0, self.step / self.total_step)))

    def noise_seed(self, name: str) -> int:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        micro = self.micro if self.config.noise_per == "micro" else 0
        text = f"{self.config.seed}/{name}/{self.step}/{micro}/{rank}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

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


class GGPO(Variant):
    """Training rule of one adapter in one linear layer: which perturbation it sees, and what that is made from."""

    statistics = ("tau", "grad_norms2", "mean_norm")
    tau: torch.Tensor | None = None  # (out_features,) deviation of the noise in each row
    grad_norms2: torch.Tensor | None = None  # (out_features,)
    mean_norm: torch.Tensor | None = None  # () running mean of the gradient's norm
    base_norms2: torch.Tensor | None = None  # (out_features,)
    pending: torch.Tensor | None = None  # gradient norms that the hooks saw
    _hooked: Any = None

    def __init__(self, config: LoRAGGPOConfig, name: str, schedule: Schedule, layer: Any) -> None:
        super().__init__(config, name)
        self.schedule = schedule
        self.layer = layer  # in nn.DataParallel, not the copy that runs

    # Statistics

    @torch.no_grad()
    def measure(self, module: Any, adapter_name: str) -> torch.Tensor | None:
        """Squared row norms (out_features,) of the gradient, at least in fp32, from those of A and B."""
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        if B.grad is None or B.grad.shape != B.shape:
            return None
        grad_A = torch.zeros_like(A) if A.grad is None else A.grad
        A, B, grad_A, grad_B = (at_least_fp32(tensor) for tensor in (A, B, grad_A, B.grad))
        return gradient_row_norms2(A, B, grad_A, grad_B, module.scaling[adapter_name])

    @torch.no_grad()
    def take(self, module: Any, adapter_name: str, norms2: torch.Tensor) -> None:
        """Makes the coming step's statistics from the gradient's squared row norms."""
        config = self.config
        if config.mode == "mgpo":
            self.mean_norm = _running(self.mean_norm, norms2.sum().sqrt(), config.mgpo_ema)
            return
        self.grad_norms2 = _running(self.grad_norms2, norms2, config.grad_ema)
        weight = self.weight_norms2(module, adapter_name)
        if config.combine == "quadrature":
            tau = config.ggpo_sigma * (weight + config.ggpo_beta * self.grad_norms2).sqrt() / module.in_features**0.5
        else:
            tau = config.ggpo_sigma * weight.sqrt() + config.ggpo_beta * self.grad_norms2
            tau = tau / module.out_features**0.5
        self.tau = tau

    @torch.no_grad()
    def weight_norms2(self, module: Any, adapter_name: str) -> torch.Tensor:
        """Squared row norms (out_features,) of the merged weight, at least in fp32."""
        A, B = (at_least_fp32(w[adapter_name].weight) for w in (module.lora_A, module.lora_B))
        cross: torch.Tensor | float = 0.0
        if self.base_norms2 is None or not self.config.cheap_norms:
            weight = module.get_base_weight()
            weight = at_least_fp32(weight.T if isinstance(module.get_base_layer(), Conv1D) else weight)
            if self.base_norms2 is None:
                self.base_norms2 = weight.square().sum(dim=1)
            if not self.config.cheap_norms:
                cross = F.linear(A, weight).T.to(A.dtype)
        return weight_row_norms2(self.base_norms2.to(A.device), cross, A, B, module.scaling[adapter_name])

    @torch.compiler.disable
    def _listen(self, module: Any, adapter_name: str) -> None:
        """Hooks on A and B, which leave the gradient's norms in `pending` while nobody else takes them."""
        weight = module.lora_B[adapter_name].weight
        if self._hooked is weight or not (weight.requires_grad and weight.is_leaf):
            return
        self._hooked = weight
        for parameter in (module.lora_A[adapter_name].weight, weight):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._hear, module, adapter_name))

    def _hear(self, module: Any, adapter_name: str, parameter: torch.Tensor) -> None:
        if not self.schedule.driven:
            self.pending = self.measure(module, adapter_name)
            self.schedule.heard = True

    # Perturbations

    def noise(self, module: Any, adapter_name: str) -> tuple[torch.Tensor, int] | None:
        """tau (out_features,) and the seed of the noise that the weight is to see, or None."""
        trained = module.training and module.lora_B[adapter_name].weight.requires_grad
        if not trained or self.config.mode != "ggpo":
            return None
        if self.config.auto_update and not self.schedule.driven:
            self._listen(module, adapter_name)
        if self.tau is None:
            return None
        silent = self.config.ggpo_sigma == 0 and self.config.combine == "quadrature"
        if silent or self.schedule.step < self.config.warmup_steps:
            return None
        return self.schedule.size * self.tau, self.schedule.noise_seed(f"{self.name}/{adapter_name}")

    @torch.compiler.disable
    @torch.no_grad()
    def direction(self, module: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U (out_features, 2r) and V (2r, in_features; A first) of the MGPO perturbation eps = U V, or None.

        eps = -rho f d / ||d|| with d = scale (M_B A + B M_A), M the first moments, and f = 1 / mean gradient norm.
        """
        config, schedule, scale = self.config, self.schedule, module.scaling[adapter_name]
        if config.auto_update and not schedule.driven:
            self._listen(module, adapter_name)
        if not config.mgpo_rho or schedule.step < config.warmup_steps:
            return None
        factors = [w[adapter_name].weight for w in (self.layer.lora_A, self.layer.lora_B)]
        moments = [schedule.moment(weight) for weight in factors]
        if any(moment is None for moment in moments):
            return None
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        M_A, M_B = (moment.to(A.device) for moment in moments if moment is not None)
        U, V = torch.cat([M_B, B], dim=1), torch.cat([A, M_A])
        length = scale * ((U.T @ U) * (V @ V.T)).sum().clamp(min=0).sqrt()
        mean = torch.ones_like(length) if self.mean_norm is None else self.mean_norm.to(length)
        factor = (1 / (mean + 1e-12)).clamp(max=config.mgpo_max_scale)
        return -config.mgpo_rho * scale * factor / (length + 1e-12) * U, V

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        noise = self.noise(module, active_adapter)
        if noise is not None:
            result = _noisy_output(result, x, *noise)
        return self.add(module, active_adapter, x, result)

    def add(self, module: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` with the adapter's contribution and, in mode `"mgpo"`, the perturbation."""
        active = module.training and self.config.mode == "mgpo" and self.schedule.optimizer is not None
        active = active and module.lora_B[adapter_name].weight.requires_grad
        factors = self.direction(module, adapter_name) if active else None
        if factors is None:
            return super().forward(module, adapter_name, x, result)
        U, V = factors
        lora_A, lora_B = module.lora_A[adapter_name], module.lora_B[adapter_name]
        if is_plain(lora_A, lora_B) and isinstance(module.lora_dropout[adapter_name], nn.Identity):
            A, B, scale = lora_A.weight, lora_B.weight, module.scaling[adapter_name]
            rule = scale * B.detach()
            U = torch.cat([U[:, : len(A)] + rule, U[:, len(A) :]], dim=1)
            return low_rank(result, x, A, B, scale, U=U, V=V, rule=rule)
        return super().forward(module, adapter_name, x, accumulate(result, F.linear(x, V.to(x.dtype)), U.T))


@torch.compiler.disable
def _noisy_output(result: torch.Tensor, x: torch.Tensor, tau: torch.Tensor, seed: int) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _NoisyOutput.apply(result, x, tau, seed)


class GGPOLinear(Linear):
    """PEFT's LoRA layer; over a plain linear layer, noise goes into the weight before its one product."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = not (self.disable_adapters or self.merged or args or kwargs) and self.training
        base = self.base_layer
        noisy = any(getattr(self.lora_variant.get(name), "tau", None) is not None for name in self.active_adapters)
        if not (plain and noisy) or type(base) is not nn.Linear or not unobserved(base) or base.weight.requires_grad:
            return super().forward(x, *args, **kwargs)
        return self._perturbed_forward(x)

    @torch.compiler.disable
    def _perturbed_forward(self, x: torch.Tensor) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        rules: dict[str, Any] = {name: self.lora_variant[name] for name in names}
        noises = {name: rule.noise(self, name) for name, rule in rules.items()}
        first = next((name for name, noise in noises.items() if noise is not None), None)
        if first is None:
            return super().forward(x)
        base = self.base_layer
        autocast = torch.is_autocast_enabled(x.device.type)
        inner = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        bias = None if base.bias is None else base.bias.to(inner.dtype)
        result = _NoisyLinear.apply(inner, base.weight, bias, *noises[first])
        dtype = result.dtype
        for name in names:
            lora_A: Any = self.lora_A[name]
            x = self._cast_input_dtype(x, lora_A.weight.dtype)
            noise = noises[name]
            if noise is not None and name != first:
                result = _noisy_output(result, x, *noise)
            result = rules[name].add(self, name, x, result)
        return result.to(dtype)


def schedules(model: nn.Module) -> list[Schedule]:
    """The schedules of the LoRA-GGPO adapters that are being trained in a model, wrapped by PEFT or not."""
    return [schedule for schedule in _schedules(model) if next(schedule.live(), None)]


def _schedules(model: nn.Module) -> list[Schedule]:
    rules = (rule for layer in model.modules() for rule in getattr(layer, "lora_variant", {}).values())
    return list(dict.fromkeys(rule.schedule for rule in rules if isinstance(rule, GGPO)))


def update_ggpo_stats(model: nn.Module, step: int | None = None) -> None:
    """`LoRAGGPOModel.update_ggpo_stats` for any model, also a transformers one with an adapter (`add_adapter`)."""
    due = [schedule for schedule in schedules(model) if step is None or step != schedule.step]
    if not due and step is not None:
        return
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


class GGPOCallback(TrainerCallback, ExportableState):
    """Drives the perturbations of LoRA-GGPO and LoRA-MGPO in `Trainer(callbacks=[peftx.GGPOCallback()])`.

    It takes the statistics from the averaged, unscaled and clipped gradients before each optimizer step, gives mode
    `"mgpo"` the optimizer and `ramp="cosine"` the number of steps, and saves the statistics in each checkpoint
    (`ggpo_state.safetensors`, beside the adapter, which stays a plain LoRA), so that a resumed run goes on as it was.

    Raises:
        ValueError: at the start of the training, where the model trains no LoRA-GGPO adapter.
    """

    file_name = "ggpo_state.safetensors"
    _model: Any = None
    saved: Mapping[str, str] = {}  # file and fingerprint of the last checkpoint, which `trainer_state.json` keeps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs):
        self._model, self._folder = model, args.output_dir
        found = schedules(model)
        if not found:
            raise ValueError("GGPOCallback: the model trains no LORAGGPO adapter; see `peftx.LoRAGGPOConfig`.")
        for schedule in found:
            schedule.release()
            schedule.driven = True
            schedule.total_step = schedule.config.total_step or state.max_steps
            schedule.attach(optimizer)
            schedule.load_state({}, state.global_step)
        if state.global_step:
            exported = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
            self.saved = exported.get("attributes", {}).get("saved", self.saved)
        if state.global_step and not self._restore(found, args, state.global_step):
            warnings.warn(
                f"GGPOCallback: the checkpoint's {self.file_name} was not found, so the first step is unperturbed. Set "
                "`resume_from_checkpoint` in TrainingArguments to the checkpoint's folder.",
                stacklevel=2,
            )

    def _restore(self, found: list[Schedule], args: Any, step: int) -> bool:
        """Whether a file with the statistics that the checkpoint tells of was found, and loaded."""
        resumed = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else ""
        candidates = [Path(resumed, self.file_name), Path(self.saved.get("file", "")), self._path(step)]
        for path in candidates:
            if path.is_file():
                tensors = load_file(path)
                for schedule in found:
                    schedule.load_state(tensors, step)
                if self._fingerprint(found) == self.saved.get("fingerprint"):
                    return True
                for schedule in found:
                    schedule.load_state({}, step)
        return False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        update_ggpo_stats(model, state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        path = self._path(state.global_step)
        if state.is_world_process_zero and path.parent.is_dir():
            tensors = {key: t for schedule in schedules(model) for key, t in schedule.state().items()}
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for schedule in schedules(model):
            schedule.release()

    def state(self) -> dict[str, Any]:
        """What Trainer writes to `trainer_state.json` when it saves a checkpoint, and gives back on a resume."""
        found = schedules(self._model) if self._model is not None else []
        if not found:  # before the training
            return {"args": {}, "attributes": {"saved": dict(self.saved)}}
        path = self._path(max((schedule.step for schedule in found), default=0))
        return {"args": {}, "attributes": {"saved": {"file": str(path), "fingerprint": self._fingerprint(found)}}}

    def _path(self, step: int) -> Path:
        return Path(self._folder, f"{PREFIX_CHECKPOINT_DIR}-{step}", self.file_name).absolute()

    @staticmethod
    def _fingerprint(found: list[Schedule]) -> str:
        return "-".join(schedule.fingerprint() for schedule in found)


@register(
    "loraggpo",
    config=LoRAGGPOConfig,
    paper="arXiv:2502.14538",
    summary="LoRA under noise shaped by weights and gradients (GGPO), or a step against the momentum (MGPO)",
    lora_export="exact",
    callback=GGPOCallback,
    learning_rate=2e-3,
    tiny={"r": 2, "lora_alpha": 2},
    variants={"lora-ggpo": {"auto_update": False}, "lora-mgpo": {"mode": "mgpo", "auto_update": False}},
)
class LoRAGGPOModel(VariantModel):
    """LoRA with the training rules of `LoRAGGPOConfig`."""

    supported = "linear layers (also transformers' Conv1D and quantised ones)"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        self._schedule = Schedule(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._schedule.handle = model.register_forward_pre_hook(self._schedule.before_forward)

    def delete_adapter(self, adapter_name: str) -> None:
        before = _schedules(self.model)
        super().delete_adapter(adapter_name)
        for schedule in set(before) - set(_schedules(self.model)):
            schedule.handle.remove()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        found = _schedules(self.model)
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        for schedule in found:
            schedule.handle.remove()
        return base

    def _make_rule(self, config: LoRAGGPOConfig, layer: Any, adapter_name: str, key: str) -> GGPO:
        rule = GGPO(config, key, self._schedule, layer)
        self._schedule.rules.append((rule, layer, adapter_name))
        return rule

    def _follows_rule(self, layer: Any) -> bool:
        return super()._follows_rule(layer) and not isinstance(layer, (Embedding, _ConvNd))

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if type(base) is nn.Linear and type(base.weight) is nn.Parameter and not lora_config.fan_in_fan_out:
            kwargs.pop("parameter_name", None)
            return GGPOLinear(target, adapter_name, config=lora_config, **kwargs)
        return VariantModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def update_ggpo_stats(self, step: int | None = None) -> None:
        """Takes the gradients of an optimizer step as the statistics of the next one's perturbations.

        To be called once for each optimizer step: after `backward()`, clipping and `GradScaler.unscale_`, before
        `optimizer.step()` and `zero_grad()`. `GGPOCallback` does so in `Trainer`.

        Args:
            step: the number of this optimizer step, from 1; a second call for it does nothing. Default: counted here.

        Raises:
            RuntimeError: no weight has a gradient.
        """
        update_ggpo_stats(self.model, step)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Says whose first moments mode `"mgpo"` follows: an optimizer with `exp_avg` or `momentum_buffer` states."""
        for schedule in schedules(self.model):
            schedule.attach(optimizer)
