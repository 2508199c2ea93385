"""LoLDU (lower-diagonal-upper low-rank adaptation), arXiv:2410.13618."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn

from ..adapters import Adapter, AdapterConfig, Number, Site, register

# Relative distance of the pivots at which a base counts as another one. With 18 matrices of MiniLM, r=64, they were
# at most 0.0005 apart for fp16, 0.003 for bf16, 0.02 for 8 bits, 0.17 for NF4, and some 9 for other weights.
TOLERANCE = 0.3
# Relative distance of two weights that is no rounding, and the step of a quantised one. The same matrices were 0.002
# apart for bf16, 0.008 for 8 bits, 0.09 for NF4 and 0.12 for FP4, as a sketch tells them to within an eighth.
DISTANCE, QUANTISED = 0.02, 0.15
SKETCH = 32
OTHER_BASE = (
    "The base weight factorises otherwise than the one this LoLDU adapter was trained on{found}. Load the base model "
    "of the training, {how}, or train with `save_projection=True`, for a file that needs none."
)
ANOTHER = {"found": ": it is another model", "how": "in any dtype"}
ROUNDED = {
    "found": ": it is the same weight, rounded otherwise, which the last of its {r} pivots do not bear",
    "how": "in the dtype or quantisation that it had there",
}
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
            the file holds z, sigma, the offset sigma_0 z_0, and the pivots and their rows, by which the factors are
            made again. The base may have another dtype or quantisation then: the delta differs by 2 to 4 times what
            the base weight does (fp16 0.08 %, bf16 0.6 %, 8 bits 3 %, NF4 38 %, medians of MiniLM's matrices at r=64;
            the weights themselves 0.02, 0.2, 0.8 and 9 %). Another base is refused: one whose weights are more than
            some 3 % off, where a quantised one is involved 30 %, by a sketch of 32 sums; and a quantised one
            whose factors are others altogether, as from ranks near the width.
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
    """Leading part of W = P L diag(d) U: PL (out, r), d (r), U (r, in) in float64, the pivot rows (r) in order, and a
    sketch (32) of what was factorised."""

    PL: torch.Tensor
    d: torch.Tensor
    U: torch.Tensor
    rows: torch.Tensor
    sketch: torch.Tensor


def ldu(weight: torch.Tensor, r: int, rows: torch.Tensor | None = None) -> LDU:
    """The leading r terms of the pivoted LDU factorisation of `weight` (out, in), in float64 on the CPU.

    The first r pivots depend on the first r columns only, so these are factorised (out r^2 operations) and the rest of
    U follows from one triangular solve (in r^2), instead of the whole matrix; no more of the weight is read. A pivot
    below eps max|d| is left in its row of U with d = 1, which keeps PL diag(d) U the same and every value finite.

    Args:
        rows: pivot rows to take in this order, instead of the largest entries: those of the same weight in another
            dtype. Row interchanges for accuracy are then what they were there.
    """
    weight = weight.detach()
    panel = weight[:, :r].to("cpu", torch.float64)
    order = list(range(len(weight)))
    if rows is None:
        factors, pivots, _ = torch.linalg.lu_factor_ex(panel)
        for i, pivot in enumerate(pivots.tolist()):
            order[i], order[pivot - 1] = order[pivot - 1], order[i]
    else:
        chosen = rows.tolist()
        known = set(chosen)
        order = [*chosen, *(row for row in order if row not in known)]
        factors = _eliminated(panel[order])
    L = factors.tril(-1) + torch.eye(*factors.shape, dtype=factors.dtype)
    rest = weight[order[:r], r:].to("cpu", torch.float64)
    U = torch.cat(
        [factors[:r].triu(), torch.linalg.solve_triangular(L[:r], rest, upper=False, unitriangular=True)], dim=1
    )
    d = U.diagonal().clone()
    d = torch.where(d.abs() > torch.finfo(torch.float32).eps * d.abs().max(), d, 1.0)
    PL = torch.empty_like(L)
    PL[order] = L
    return LDU(PL, d, U / d[:, None], torch.tensor(order[:r]), sketch(panel))


def _eliminated(panel: torch.Tensor) -> torch.Tensor:
    """Gaussian elimination without interchanges, L below the diagonal and U on and above it."""
    panel = panel.clone()
    for i in range(panel.shape[1]):
        pivot = panel[i, i]
        if pivot != 0:
            panel[i + 1 :, i] /= pivot
        panel[i + 1 :, i + 1 :] -= panel[i + 1 :, i, None] * panel[i, i + 1 :]
    return panel


def sketch(panel: torch.Tensor) -> torch.Tensor:
    """Signed sums over the leading columns of `panel` (out, r), (32,): those of two weights are as far apart relative
    to their length as the weights are, give or take an eighth (a count sketch).

    The sign and the sum of an entry follow from its place alone.
    """
    panel = panel[:, :16].flatten()
    place = torch.arange(len(panel), device="cpu") * 0x9E3779B1 & 0xFFFFFFFF
    place = (place ^ place >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    place ^= place >> 13
    return panel.new_zeros(SKETCH).index_add_(0, place % SKETCH, panel * (1 - 2 * (place // SKETCH % 2)))


def checksum(rows: torch.Tensor) -> torch.Tensor:
    """What files of peftx 0.1 hold of the pivot rows, (1,) int64."""
    return torch.tensor([sum((i + 1) * (row + 1) for i, row in enumerate(rows.tolist())) % (2**61 - 1)])


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
    learning_rate=2e-3,
)
class LoLDU(Adapter):
    grouped = True
    z: nn.Parameter  # (r,)
    sigma: nn.Parameter  # (1,)
    c0: torch.Tensor  # (r,) sigma_0 z_0
    PL: torch.Tensor  # (out, r)
    U: torch.Tensor  # (r, in)
    rows: torch.Tensor  # (r,) int32, the pivot rows
    pivots: torch.Tensor  # (r,) d, by which a file knows its base again
    sketch: torch.Tensor  # (33,) of the weight, and how coarsely it is rounded, by which it does too

    def __init__(self, site: Site, config: LoLDUConfig) -> None:
        super().__init__(site, config)
        r, dtype = config.r, site.dtype
        if r > min(site.in_features, site.out_features):
            raise ValueError(
                f"r={r} is larger than min(in_features, out_features) = "
                f"{min(site.in_features, site.out_features)}. Lower `r`, or set it for this module in `rank_pattern`."
            )
        if torch.get_default_device().type == "meta":  # only the shapes are wanted
            blank = torch.empty(site.shape)
            PL, d, U, rows = blank[:, :r], blank[0, :1].expand(r), blank[:r], torch.empty(r)
            base = torch.empty(SKETCH + 1)
        else:
            PL, d, U, rows, sums = self._factorised()
            step = QUANTISED if site.backend is not None else torch.finfo(dtype).eps
            base = torch.cat([sums, sums.new_tensor([step])])
        # The offset cancels z and sigma as they will be stored, after rounding to the dtype PEFT gives them.
        z = start(d, config.init_method).to(dtype)
        sigma = torch.tensor([(r if config.alpha is None else config.alpha) / r], dtype=dtype)  # FSDP has no scalars
        wide = torch.promote_types(dtype, torch.float32)
        c0 = sigma.to(wide) * z.to(wide)
        if not config.init_weights:
            z = z + torch.randn(r, dtype=dtype) * d.abs().mean().to(dtype)
        self.z, self.sigma = nn.Parameter(z), nn.Parameter(sigma)
        self.register_buffer("c0", c0)
        self.register_buffer("rows", rows.to(torch.int32))
        self.register_buffer("pivots", d.to(wide))
        self.register_buffer("sketch", base.to(wide))
        self.register_buffer("PL", PL.to(wide), persistent=config.save_projection)
        self.register_buffer("U", U.to(wide), persistent=config.save_projection)
        if not config.train_sigma:
            self.freeze("sigma")
        self._dense_from = self._most_factored()

    def _factorised(self, rows: torch.Tensor | None = None) -> LDU:
        weight = self.site.unmerged_weight() if self.site.merged else self.site.weight()
        if weight.is_meta:
            raise ValueError("LoLDU factorises the weight, which is on the meta device. Load the base model first.")
        return ldu(weight, self.config.r, rows)

    def coefficients(self) -> torch.Tensor:
        """c (r) of the delta PL diag(c) U: sigma z - sigma_0 z_0, at least in fp32."""
        return self.sigma.to(self.c0.dtype) * self.z.to(self.c0.dtype) - self.c0

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        c, h = self.site.per_row(self.coefficients()), self.site.reduce(x, self.U)
        return self.site.accumulate(result, h * c.to(h.dtype), self.PL, self.scale)

    def prefers_dense(self, tokens: int) -> bool:
        return tokens > self._dense_from

    def _most_factored(self) -> float:
        """The number of tokens up to which the factored product is the cheaper one."""
        # Multiply-adds of a training step: 2 T r (in + out) factored; T in out for the gradient of the weight and
        # 2 r in out to build and contract it when dense. A quantised base is never replaced by its dequantised copy.
        r, i, o = self.config.r, self.site.in_features, self.site.out_features
        gain = 2 * r * (i + o) - i * o  # for each token
        return 2 * r * i * o / gain if self.site.backend is None and gain > 0 else math.inf

    def delta_weight(self) -> torch.Tensor:
        return (self.PL * self.coefficients()) @ self.U

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.U, self.PL * (self.scale * self.coefficients().detach())

    def prepare_load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Factorises in the file's order of rows, where the base is the same in another dtype or quantisation."""
        sum_, own = tensors.pop("checksum", None), ("rows", "pivots", "sketch")
        earlier = sum_ is not None and "rows" not in tensors  # a file of peftx 0.1
        if self.rows.is_meta or any(tensor.is_meta for tensor in tensors.values()):
            missing = own if earlier else () if "sketch" in tensors else ("sketch",)
            tensors |= {name: getattr(self, name).to("meta") for name in missing}
            return
        if sum_ is not None and earlier:
            same = not sum_.is_floating_point() and int(sum_.sum()) == int(checksum(self.rows))
            if not self.config.save_projection and not same:
                found = ". The file is of peftx 0.1, which bound it to the exact base"
                raise ValueError(OTHER_BASE.format(found=found, how="in the same dtype"))
            tensors |= {name: getattr(self, name) for name in own}
            return
        known = tensors.setdefault("sketch", self.sketch) is not self.sketch  # files had none at first
        if any(
            name not in tensors
            or tensors[name].shape != getattr(self, name).shape
            or tensors[name].is_floating_point() != getattr(self, name).is_floating_point()
            or not torch.isfinite(tensors[name]).all()
            for name in own
        ):
            return  # the comparison with the adapter's own tensors says so
        self._check_rows(tensors["rows"].tolist())
        if not self.config.save_projection:
            self._factorise_as(tensors["rows"].long(), tensors["pivots"], tensors["sketch"] if known else None)

    def _check_rows(self, rows: list[int]) -> None:
        seen: set[int] = set()
        for i, row in enumerate(rows):
            if row in seen or not 0 <= row < self.site.out_features:
                raise ValueError(
                    f"rows: found {row} at {i}, expected {len(rows)} different rows of a weight that has "
                    f"{self.site.out_features}"
                )
            seen.add(row)

    def _factorise_as(self, rows: torch.Tensor, pivots: torch.Tensor, base: torch.Tensor | None) -> None:
        """Takes the factors that these rows in this order give, if they are those of the file's base."""
        PL, d, U, _, sums = self._factorised(rows)
        if base is not None:
            step = min(max(float(base[-1]), float(self.sketch[-1])), QUANTISED)
            if not (sums - base[:-1].to(sums)).norm() <= (DISTANCE + 2 * step) * sums.norm():
                raise ValueError(OTHER_BASE.format(**ANOTHER))
        finite = all(torch.isfinite(part.to(self.PL)).all() for part in (PL, U))
        if not (finite and (d - pivots.to(d)).norm() <= TOLERANCE * d.norm()):
            reason = {name: text.format(r=self.config.r) for name, text in ROUNDED.items()}
            raise ValueError(OTHER_BASE.format(**(reason if base is not None else ANOTHER)))
        self.PL, self.U = PL.to(self.PL), U.to(self.U)
