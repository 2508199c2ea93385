"""LoLDU (lower-diagonal-upper low-rank adaptation), arXiv:2410.13618."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import Adapter, AdapterConfig, Number, Site, register
from ..adapters.products import accumulate

InitMethod = Literal["lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros"]


@dataclass
class LoLDUConfig(AdapterConfig):
    """Trains the diagonal of a truncated LDU factorisation of each weight: r + 1 parameters a module.

    The pivoted LU factorisation of W gives PL (out_features, r), d (r) and U (r, in_features), the leading r columns,
    pivots and unit rows. They are frozen; a vector z (r) and a scalar sigma are trained:

        W' = W + PL diag(sigma z - sigma_0 z_0) U,    sigma_0 = alpha / r

    so that W' = W at the start whatever `init_method` chose for z_0. (The reference code compensates only half of its
    initialisations, and stores the residual W - sigma_0 PL diag(z_0) U in place of W; in delta form the base weight
    stays as it is, quantised or not.) Weight decay on z pulls towards dropping the factorised part of the pretrained
    weight, not towards the base model: leave it at 0.

    Args:
        r: rank; at most min(in_features, out_features) of every target. Default 64; the paper goes up to full rank.
        alpha: sigma starts at alpha / r; default `None` means r, i.e. sigma = 1 as in all of the paper's tables.
        init_method: z_0 from the pivots d: `"lu"` d (default), `"uniform"` U(-|mean d| / 2, |mean d| / 2), `"normal"`
            N(mean d, std d), `"constant"` mean d; or `"s_uniform"` U(-1, 1), `"s_normal"` N(0, 1), `"ones"`, `"zeros"`.
            It matters only through sigma and weight decay.
        train_sigma: whether sigma is trained; default `True`.
        save_projection: whether PL and U are saved too, r (in_features + out_features) values a module. Without them
            the file holds z, sigma and the offset sigma_0 z_0 and is tied to the exact base weight, dtype included: a
            base that factorises otherwise is refused at loading.
        rank_pattern, alpha_pattern: `{name or regex: value}` for modules that deviate from `r` and `alpha`.

    The other arguments and the errors raised are those of `peftx.AdapterConfig`.
    """

    r: int = field(default=64, metadata={"help": "Rank; at most the smaller width of every target."})
    alpha: Number | None = field(default=None, metadata={"help": "sigma starts at alpha / r; None means alpha = r."})
    init_method: InitMethod = field(default="lu", metadata={"help": "How z starts, given the pivots of the weight."})
    train_sigma: bool = field(default=True, metadata={"help": "Whether the scalar sigma is trained."})
    save_projection: bool = field(
        default=False, metadata={"help": "Whether the frozen factors are saved; makes files independent of the base."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank of modules (name or regex) that deviate from `r`."}
    )
    alpha_pattern: dict[str, Number] = field(
        default_factory=dict, metadata={"help": "Alpha of modules (name or regex) that deviate from `alpha`."}
    )


class LDU(NamedTuple):
    """Leading part of W = P L diag(d) U: PL (out, r), d (r), U (r, in), and a checksum of the pivot rows."""

    PL: torch.Tensor
    d: torch.Tensor
    U: torch.Tensor
    checksum: torch.Tensor


def ldu(weight: torch.Tensor, r: int) -> LDU:
    """The leading r terms of the pivoted LDU factorisation of `weight` (out, in), in float64 on the CPU.

    The first r pivots depend on the first r columns only, so these are factorised (out r^2 operations) and the rest of
    U follows from one triangular solve (in r^2), instead of the whole matrix. A pivot below eps max|d| is left in its
    row of U with d = 1, which keeps PL diag(d) U the same and every value finite.
    """
    weight = weight.detach().to("cpu", torch.float64)
    panel, pivots, _ = torch.linalg.lu_factor_ex(weight[:, :r])
    rows = list(range(len(weight)))
    for i, pivot in enumerate(pivots.tolist()):
        rows[i], rows[pivot - 1] = rows[pivot - 1], rows[i]
    L = panel.tril(-1) + torch.eye(*panel.shape, dtype=panel.dtype)
    U = torch.cat(
        [
            panel[:r].triu(),
            torch.linalg.solve_triangular(L[:r], weight[rows[:r], r:], upper=False, unitriangular=True),
        ],
        dim=1,
    )
    d = U.diagonal().clone()
    d = torch.where(d.abs() > torch.finfo(torch.float32).eps * d.abs().max(), d, 1.0)
    PL = torch.empty_like(L)
    PL[rows] = L
    checksum = sum((i + 1) * (row + 1) for i, row in enumerate(rows[:r])) % (2**61 - 1)
    return LDU(PL, d, U / d[:, None], torch.tensor([checksum]))


def start(d: torch.Tensor, method: InitMethod) -> torch.Tensor:
    """z_0 (r) for the pivots d (r)."""
    mean = d.mean()
    match method:
        case "lu":
            return d.clone()
        case "uniform":
            return (torch.rand_like(d) - 0.5) * mean.abs()
        case "normal":
            return mean + torch.randn_like(d) * (d.std() if len(d) > 1 else 0.0)
        case "constant":
            return mean.expand_as(d).clone()
        case "s_uniform":
            return 2 * torch.rand_like(d) - 1
        case "s_normal":
            return torch.randn_like(d)
        case "ones":
            return torch.ones_like(d)
        case _:
            return torch.zeros_like(d)


@register(
    "loldu",
    config=LoLDUConfig,
    paper="arXiv:2410.13618",
    lora_export="exact",
    tiny={"r": 2},
    learning_rate=5e-4,
)
class LoLDU(Adapter):
    z: nn.Parameter  # (r,)
    sigma: nn.Parameter  # (1,)
    c0: torch.Tensor  # (r,) sigma_0 z_0
    PL: torch.Tensor  # (out, r)
    U: torch.Tensor  # (r, in)
    checksum: torch.Tensor  # (1,) int64

    def __init__(self, site: Site, config: LoLDUConfig) -> None:
        super().__init__(site, config)
        r, dtype = config.r, site.dtype
        if r > min(site.in_features, site.out_features):
            raise ValueError(
                f"r={r} is larger than min(in_features, out_features) = "
                f"{min(site.in_features, site.out_features)}. Lower `r`, or set it for this module in `rank_pattern`."
            )
        if torch.get_default_device().type == "meta":  # only the shapes are wanted
            weight = torch.empty(site.shape, dtype=torch.promote_types(site.dtype, torch.float32))
            PL, d, U = weight[:, :r], weight[0, :1].expand(r), weight[:r]
            checksum = torch.empty(1, dtype=torch.int64)
        else:
            weight = site.unmerged_weight()
            if weight.is_meta:
                raise ValueError("LoLDU factorises the weight, which is on the meta device. Load the base model first.")
            PL, d, U, checksum = ldu(weight, r)
        # The offset cancels z and sigma as they will be stored, after rounding to the dtype PEFT gives them.
        z = start(d, config.init_method).to(dtype)
        sigma = torch.tensor([(r if config.alpha is None else config.alpha) / r], dtype=dtype)  # FSDP has no scalars
        c0 = sigma.to(weight.dtype) * z.to(weight.dtype)
        if not config.init_weights:
            z = z + torch.randn(r, dtype=dtype) * d.abs().mean().to(dtype)
        self.z, self.sigma = nn.Parameter(z), nn.Parameter(sigma)
        self.register_buffer("c0", c0)
        self.register_buffer("checksum", checksum)
        self.register_buffer("PL", PL.to(weight.dtype), persistent=config.save_projection)
        self.register_buffer("U", U.to(weight.dtype), persistent=config.save_projection)
        if not config.train_sigma:
            self.freeze("sigma")

    def coefficients(self) -> torch.Tensor:
        """c (r) of the delta PL diag(c) U: sigma z - sigma_0 z_0, at least in fp32."""
        return self.sigma.to(self.c0.dtype) * self.z.to(self.c0.dtype) - self.c0

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        c, h = self.scale * self.coefficients(), F.linear(x, self.U.to(x.dtype))
        return accumulate(result, h * c.to(h.dtype), self.PL.T)

    def prefers_dense(self, tokens: int) -> bool:
        # Multiply-adds of a training step: 2 T r (in + out) factored; T in out for the gradient of the weight and
        # 2 r in out to build and contract it when dense. A quantised base is never replaced by its dequantised copy.
        r, i, o = self.config.r, self.site.in_features, self.site.out_features
        return self.site.backend is None and 2 * tokens * r * (i + o) > i * o * (tokens + 2 * r)

    def delta_weight(self) -> torch.Tensor:
        return (self.PL * self.coefficients()) @ self.U

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.U, self.PL * (self.scale * self.coefficients().detach())

    def prepare_load(self, tensors: dict[str, torch.Tensor]) -> None:
        found = tensors.get("checksum")
        if found is None or found.is_meta or self.checksum.is_meta or found.numel() != 1 or self.config.save_projection:
            return
        if int(found) != int(self.checksum):
            raise ValueError(
                "The base weight factorises otherwise than the one this LoLDU adapter was trained on: another model, "
                "another dtype or another quantisation. Load the base model as it was in training, or train with "
                "`save_projection=True`, which makes the file independent of it."
            )
