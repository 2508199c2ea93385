"""FedSVD: federated LoRA that trains B only, and an A that follows as the singular basis of the averaged product."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper, _ConvNd
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn import functional as F

from ..adapters import register
from ..adapters.lora import Variant, VariantConfig, VariantModel, is_plain, low_rank
from ..adapters.lora_experts import FactoredParamWrapper
from ..adapters.products import at_least_fp32, unobserved


@dataclass
class FedSVDConfig(VariantConfig):
    """FedSVD (arXiv:2505.12805): LoRA of which clients train B only, while the server turns A between rounds.

    All clients share A, so that averaging their B averages their products B A exactly. After a round the server writes
    the averaged product as B' A' with orthonormal rows of A' and B' = U S from its singular value decomposition: the
    function stays, and A follows what was learnt, though nobody takes a gradient step on it, noised or not. On disk
    the adapter is a LoRA.

    `peftx.federated` runs the rounds on Flower, with Opacus for privacy. In a loop of your own, average the B of the
    clients into the model and call `model.base_model.update_basis(server_round)`. A local optimizer starts anew each
    round, as in the reference: its moments belong to the coordinates of the last A.

    An orthonormal A has |A|_F = sqrt(r), PEFT's start of A about sqrt(r / 3). After the first refactorisation a step of
    B of a given length therefore changes the weight sqrt(3) times as much, and so does noise of a given size on B: the
    basis by itself is no less noisy. (A gradient that is neither clipped nor normalised grows by sqrt(3) as well.)
    Compare methods at learning rates tuned for each. What holds is a bound: |A' x| <= |x|, with condition number 1.

    The rows of A never leave the space that they spanned at the start, since B A has no others. Once they are
    orthonormal a refactorisation rotates them within it, and plain SGD on B does not notice: the products B A are those
    of FFA-LoRA with an orthonormal A, also with clipping, and with noise of equal law. Adam, whose steps depend on the
    coordinates, does notice.

    Args:
        refactorize_every: rounds between two refactorisations. Default 1, as in the reference; 0: never, which is
            FFA-LoRA.
        refactorize_warmup: rounds at the start without a refactorisation. Default 0, as in the reference.
        init_a: `"kaiming"`: A starts as `init_lora_weights` says, the reference's choice. `"orthonormal"`: then with
            an orthonormal basis of the same row space, as after a refactorisation; rounded as the base is.

    Raises:
        ValueError: a negative number of rounds; at injection, `r` above the shorter side of a layer.
    """

    refactorize_every: int = field(
        default=1, metadata={"help": "Rounds between two refactorisations; 0: never (FFA-LoRA)."}
    )
    refactorize_warmup: int = field(default=0, metadata={"help": "Rounds at the start without a refactorisation."})
    init_a: Literal["kaiming", "orthonormal"] = field(
        default="kaiming", metadata={"help": "A starts as LoRA's does, or with an orthonormal basis of its rows."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("refactorize_every", "refactorize_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


def is_due(server_round: int, every: int = 1, warmup: int = 0) -> bool:
    """Whether round `server_round` (from 1) ends with a refactorisation."""
    return every > 0 and server_round > warmup and server_round % every == 0


def factored_svd(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin SVD of B A by way of its factors: two thin QRs and an SVD of their cores, never the product.

    O((d_in + d_out) r^2 + r^3) time. Shapes, with k = min(r, d_in, d_out) and any leading batch dimensions: A
    (r, d_in), B (d_out, r); returns U (d_out, k), S (k,) descending, Vh (k, d_in). The signs are LAPACK's.

    Raises:
        ValueError: the product overflows.
    """
    Q_a, R_a = torch.linalg.qr(A.mT)
    Q_b, R_b = torch.linalg.qr(B)
    core = R_b @ R_a.mT
    if not torch.isfinite(core).all():
        raise ValueError(f"The product of the factors overflows {core.dtype}.")
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return Q_b @ U, S, Vh @ Q_a.mT


@torch.no_grad()
def refactorize(A: torch.Tensor, B: torch.Tensor, *, sign_fix: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A' and B' with B' A' = B A, orthonormal rows of A', and B' = U S: orthogonal columns whose norms are the singular
    values, descending.

    The rows of A' span a space that contains that of A's rows, and equals it unless they are linearly dependent; so a
    layer with B = 0, which learnt nothing yet, keeps what it can learn. Inputs are left alone; O((d_in + d_out) r)
    memory.

    Args:
        A: (r, d_in), r <= min(d_in, d_out).
        B: (d_out, r). Both may have equal leading batch dimensions.
        sign_fix: the entry of greatest magnitude of each row of A' becomes positive, which makes the result
            reproducible.

    Returns:
        A' (r, d_in) and B' (d_out, r) in fp32, or fp64 if one of the inputs is. Half precision would cost the
        orthonormality 4e-3.

    Raises:
        ValueError: shapes that are not those of a LoRA, r above a side, or values that are not finite.
    """
    if A.ndim < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
        raise ValueError(f"Expected A (r, d_in) and B (d_out, r), got {tuple(A.shape)} and {tuple(B.shape)}.")
    r, d_in, d_out = *A.shape[-2:], B.shape[-2]
    if not 1 <= r <= min(d_in, d_out):
        raise ValueError(f"r={r} must be at least 1 and at most the shorter side of the layer, {d_in} -> {d_out}.")
    if not (A.is_floating_point() and B.is_floating_point()):
        raise ValueError(f"A and B must be real floating-point tensors, got {A.dtype} and {B.dtype}.")
    for name, factor in (("A", A), ("B", B)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"{name} has values that are not finite (NaN or infinite).")
    dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    with torch.autocast(A.device.type, enabled=False):
        U, S, A = factored_svd(A.to(dtype), B.to(dtype))
    if sign_fix:
        greatest = A.gather(-1, A.abs().argmax(-1, keepdim=True))
        sign = torch.where(greatest < 0, -1.0, 1.0).to(dtype)
        A, U = A * sign, U * sign.mT
    return A, U * S[..., None, :]


def linear_layers(model: nn.Module, adapter_name: str = "default", experts: bool = False) -> dict[str, LoraLayer]:
    """The layers of a LoRA adapter, all of them linear, by their names in the base model.

    Args:
        model: a `PeftModel`, its tuner, or a transformers model with adapters, of any method that is LoRA.
        experts: whether stacks of experts that are factored count as linear.

    Raises:
        ValueError: no such adapter, or one that is more than W + s B A in linear layers: an embedding or convolution,
            DoRA, `lora_bias`, `target_parameters`.
    """
    tuner = getattr(model, "base_model", None) if isinstance(model, PeftModel) else model
    model = tuner.model if isinstance(tuner, BaseTuner) else model
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    known = {adapter for layer in layers.values() for adapter in layer._all_available_adapter_names()}
    if adapter_name not in known:
        raise ValueError(f"The model has no LoRA adapter {adapter_name!r}; its adapters are {sorted(known)}.")
    found = {}
    for name, layer in layers.items():
        if adapter_name in (*layer.lora_A, *layer.lora_embedding_A):
            factors = [
                getattr(layer, name)[adapter_name] for name in ("lora_A", "lora_B") if adapter_name in layer.lora_A
            ]
            rule = layer.lora_variant.get(adapter_name)
            if (
                not factors
                or not all(isinstance(factor, nn.Linear) and factor.bias is None for factor in factors)
                or not (rule is None or isinstance(rule, Variant))
                or adapter_name in getattr(layer, "lora_magnitude_vector", ())
                or (isinstance(layer, ParamWrapper) and not (experts and isinstance(layer, FactoredParamWrapper)))
            ):
                raise ValueError(
                    f"The adapter {adapter_name!r} is no plain LoRA of a linear layer in {name!r} "
                    f"({type(layer).__name__}): embeddings, convolutions, DoRA, `lora_bias` and `target_parameters` "
                    "have no factors A and B of their own."
                )
            found[name] = layer
    return found


def factors_of(layer: Any, adapter_name: str) -> tuple[Any, Any]:
    """The parameters A (r, in_features) and B (out_features, r) of one adapter in one layer; of a stack of experts
    views of them with a leading axis."""
    if isinstance(layer, FactoredParamWrapper):
        return layer.factors(adapter_name)
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def check_unmerged(layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Raises ValueError where an adapter, about to change, is merged into the base weight."""
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(
            f"The adapter {adapter_name!r} is merged into {len(merged)} layers ({merged[0]}, ...), where a change "
            "would not act and unmerging would subtract another: call `unmerge_adapter()` first."
        )


@torch.no_grad()
def refactorize_model(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Refactorises every layer of a LoRA adapter in place; the model computes what it did, within rounding.

    The parameters stay the same objects; nothing is written unless all layers can be. State of an optimizer belongs to
    the coordinates of the old A: make a new one.

    Args:
        model: see `peftx.federated.client_state`.
        adapter_name: which adapter; it must not be merged.

    Returns:
        By the name of the layer in the base model, the singular values of B A (r,), descending, without the scale; of a
        stack of experts (E, r).

    Raises:
        ValueError: no such adapter, no plain linear LoRA, merged, or values that are not finite; the layer is named.
    """
    layers = linear_layers(model, adapter_name, experts=True)
    check_unmerged(layers, adapter_name)
    turned = {}
    for name, layer in layers.items():
        try:
            turned[name] = refactorize(*factors_of(layer, adapter_name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, factors in turned.items():
        for parameter, factor in zip(factors_of(layers[name], adapter_name), factors, strict=True):
            parameter.copy_(factor)
    return {name: torch.linalg.vector_norm(B, dim=-2) for name, (_, B) in turned.items()}


class FrozenLinear(nn.Linear):
    """A linear layer whose parameters stay frozen, also when transformers' loader replaces them by trainable ones, and
    get no gradient where somebody calls `model.requires_grad_(True)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.detach())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            param.requires_grad_(False)


class FedSVD(Variant):
    """One adapter in one linear layer: LoRA with a constant A."""

    last_round: int | None = None  # whose end has been dealt with

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x, scale = module.lora_dropout[active_adapter](x), module.scaling[active_adapter]
        if unobserved(lora_A) and is_plain(lora_B):
            return low_rank(result, x, lora_A.weight.detach(), lora_B.weight, scale)
        return result + lora_B(lora_A(x)) * scale

    def over_experts(self, layer: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        A, B = layer.factors(adapter_name)
        return layer.site.accumulate(result, layer.site.reduce(x, A.detach()), B, layer.scaling[adapter_name])


@register(
    "fedsvd",
    config=FedSVDConfig,
    paper="arXiv:2505.12805",
    summary="Federated LoRA: clients train B, the server turns A into the singular basis of the average",
    lora_export="exact",
    experts=True,
    learning_rate=2e-3,
    tiny={"r": 2},
    variants={"fedsvd": {}, "fedsvd-orthonormal": {"init_a": "orthonormal"}},
)
class FedSVDModel(VariantModel):
    """LoRA whose A is frozen and turned between rounds; see `FedSVDConfig`."""

    variant = FedSVD
    supported = "linear layers (also transformers' Conv1D and quantised ones)"

    def _follows_rule(self, layer: Any) -> bool:
        return not isinstance(layer, (Embedding, _ConvNd)) and super()._follows_rule(layer)

    def _make_rule(self, config: FedSVDConfig, layer: Any, adapter_name: str, key: str) -> Variant:
        A, B = factors_of(layer, adapter_name)
        r, side = layer.r[adapter_name], min(layer.in_features, layer.out_features)
        with torch.no_grad():
            if r > side:
                raise ValueError(
                    f"r={r} is above the layer's shorter side, {side}: A cannot have r orthonormal rows that are of "
                    "use. Lower `r`, set a `rank_pattern`, or leave this module out by `exclude_modules`."
                )
            if config.init_a == "orthonormal" and not A.is_meta:
                # Unlike `refactorize`'s signs, which may turn with a rounding, this follows A continuously.
                Q, R = torch.linalg.qr(at_least_fp32(A).mT)
                sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R.dtype)[..., None, :]
                A.copy_((Q * sign).mT)
                B.copy_(B.to(R.dtype) @ (R.mT * sign))  # zero, unless `init_lora_weights` says otherwise
        layer.lora_A[adapter_name].__class__ = FrozenLinear
        # PEFT freezes these again after every call that trains an adapter; a dict of the layer's own, not its class's.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}
        layer._freeze_non_trainable_peft_weights(adapter_name)
        return super()._make_rule(config, layer, adapter_name, key)

    def refactorize(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """Refactorises an adapter, by default the active one, now; see `peftx.federated.refactorize_model`."""
        return refactorize_model(self, self._one(adapter_name))

    def update_basis(self, server_round: int, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """What the server does at the end of a round: refactorises if the config says so, once for each round.

        Args:
            server_round: from 1. A server that resumes passes the number of the round at hand; nothing else is needed.
            adapter_name: default: the active adapter.

        Returns:
            As `refactorize`; empty if nothing was done.
        """
        adapter_name = self._one(adapter_name)
        layers = linear_layers(self, adapter_name, experts=True)
        rules: list[Any] = [layer.lora_variant[adapter_name] for layer in layers.values()]
        config: Any = self.peft_config[adapter_name]
        due = is_due(server_round, config.refactorize_every, config.refactorize_warmup)
        if not due or all(rule.last_round == server_round for rule in rules):
            return {}
        found = refactorize_model(self, adapter_name)
        for rule in rules:
            rule.last_round = server_round
        return found

    def _one(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"{len(self.active_adapters)} adapters are active: name one by `adapter_name`.")
            return self.active_adapters[0]
        return adapter_name
