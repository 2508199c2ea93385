"""The settings of LoRA-GGPO and LoRA-MGPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...adapters import Number
from ...adapters.lora import VariantConfig


@dataclass
class LoRAGGPOConfig(VariantConfig):
    """LoRA-GGPO (arXiv:2502.14538 v1) and LoRA-MGPO (its v2): LoRA trained under perturbations of the merged weight.

    `mode="ggpo"`: every training step sees the weight W' + eps, W' = W + s B A, with a fresh eps_ij ~ N(0, tau_i^2);
    tau_i grows with the norm of row i of W' and with that of its gradient, as far as LoRA's gradients show it. There is
    one forward and one backward a step; the noise is made again from its seed in the backward and never written into
    the weight. It costs two draws of out_features x in_features normal numbers for each module and micro-batch.

    `mode="mgpo"`: eps is a step against the optimizer's momentum, of rank 2r, and cheap. Its Frobenius length in
    each module is mgpo_rho min(mgpo_max_scale, 1 / g), with g the running mean of the norm of that module's gradient:
    ten times `mgpo_rho` while g is below 0.1, as in nearly all modules at the start (MiniLM on SST-2, one run: in 97 %
    of the modules at step 1, 78 % at 25, 35 % at 50, 30 % at 100, the last). It is skipped until the optimizer has
    moments, and where it holds them in 8 bits. The authors update g with each micro-batch's gradient, before clipping;
    here g sees what `update_ggpo_stats` sees, once an optimizer step: with `GGPOCallback` the averaged and clipped
    gradient, which is smaller. Sharded parameters (FSDP) are refused in both modes.

    Perturbations act in training mode only; evaluation, merging and the saved file, a plain LoRA, know nothing of
    them. Pass `peftx.GGPOCallback()` to `Trainer`. In a loop of your own, call `model.base_model.update_ggpo_stats()`
    between `backward()` (and clipping) and `optimizer.step()`, and for `"mgpo"` once, before the loop,
    `model.base_model.attach_optimizer(optimizer)`. `torch.compile` makes one graph of a perturbed model, in which the
    noise is a node of its own; the micro-batches of a window share their noise then, unless hooks drive it.

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
        mgpo_rho: length of the MGPO step where g is 1; at the factor's bound the step is mgpo_max_scale times as long.
            Negative: along the momentum, not against it. Default 0.005, a step of 0.05 at the bound; 0.0005 was not
            told apart on SST-2 (MiniLM, five seeds, each at its own learning rate). The authors pass 0.05 for T5-base
            and 0.01 for LLaMA-2, with the same factor and bound: 0.05 lost a tenth of the accuracy there.
        mgpo_ema: decay of g. Default 0.9 (the authors: 0.9 for T5-base, 0.8 for LLaMA-2).
        mgpo_max_scale: bound of the factor 1 / g. Default 10, the authors'.
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
    mgpo_rho: Number = field(default=0.005, metadata={"help": "Length of the step in mode 'mgpo', before the factor."})
    mgpo_ema: Number = field(default=0.9, metadata={"help": "Decay of the mean gradient norm in mode 'mgpo'."})
    mgpo_max_scale: Number = field(default=10.0, metadata={"help": "Greatest factor of `mgpo_rho`."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    auto_update: bool = field(
        default=True, metadata={"help": "Take statistics by hooks when neither callback nor loop provides them."}
    )

    @property
    def reaches_experts(self) -> bool:
        return self.mode == "mgpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_parameters and not self.reaches_experts:
            raise ValueError(
                "mode='ggpo' draws noise for all of a weight, and of fused experts (`target_parameters`) that is the "
                "stack of all of them. Use mode='mgpo', or leave the experts out."
            )
        for name, low, high in (
            ("ggpo_sigma", 0, math.inf),
            ("ggpo_beta", 0, math.inf),
            ("warmup_steps", 0, math.inf),
            ("grad_ema", 0, 1),
            ("mgpo_ema", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value < high:
                raise ValueError(f"`{name}` must be finite, at least {low} and less than {high}, got {value}.")
        if self.mgpo_max_scale <= 0:
            raise ValueError(f"`mgpo_max_scale` must be positive and finite, got {self.mgpo_max_scale}.")
        if self.total_step is not None and self.total_step <= 0:
            raise ValueError(f"`total_step` must be positive, got {self.total_step}.")
