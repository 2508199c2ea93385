"""One TriAdaptLoRA adapter: its mathematics, and how it gains ranks."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...adapters import Adapter, ExpertsSite, LinearSite, Site
from ...adapters.products import accumulate, at_least_fp32, autocasted, by_hand, input_gradient, kept, product, uncast
from .config import TriAdaptLoRAConfig, fixed

STD = 0.02  # of every Gaussian start, from the author's code


def core(L: torch.Tensor, U: torch.Tensor, r: int) -> torch.Tensor:
    """L + U at rank r, (r, r): of L the lower and of U the upper triangle, both with the diagonal."""
    if r < L.shape[-1]:
        L, U = L[..., :r, :r], U[..., :r, :r]
    return L.tril() + U.triu()


def norm(core: torch.Tensor) -> torch.Tensor:
    """The normalised Frobenius norm F = ||L + U||_F / r of a core, (1,), in fp32; of a stack of cores the mean."""
    return torch.linalg.matrix_norm(core.float()).mean()[None] / core.shape[-1]


class _Delta(torch.autograd.Function):
    """`result` with `scale` B (L + U) A x at rank r; the gradients are as large as the tensors."""

    @staticmethod
    def forward(ctx, result, x, A, B, lower, upper, r, scale, weight):
        with uncast(x):
            down, C = A[:r].to(x.dtype), core(lower, upper, r)
            h, up = F.linear(x, down), product(C.mT, B[:, :r].mT, scale).to(result.dtype)
        ctx.r, ctx.scale = r, scale
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, down, B, C, up, weight)
        return accumulate(result, h, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, h, down, B, C, up, weight = ctx.saved_tensors
        _, to_x, to_A, to_B, to_L, to_U, *_ = ctx.needs_input_grad
        r, size, grad_x = ctx.r, B.shape[1], None
        flat, h = g.reshape(-1, g.shape[-1]), h.reshape(-1, ctx.r)
        A_, B_, C_ = room(g, B.dtype, (size, down.shape[1]), B.shape, (size, size), filled=r < size)
        with uncast(g):
            if to_x or to_A:
                inner = F.linear(flat, up).to(h.dtype)
            if to_x:
                grad_x = input_gradient(flat, inner, down, weight).view(*g.shape[:-1], down.shape[1])
            if to_A:
                product(inner.T, x.reshape(-1, x.shape[-1]), into=A_.narrow(0, 0, r))
            if to_B or to_L or to_U:
                grad_up = (h.to(g.dtype).T @ flat).to(B.dtype)
            if to_B:
                product(grad_up.T, C.T, ctx.scale, into=B_.narrow(1, 0, r))
            if to_L or to_U:
                product(B[:, :r].T, grad_up.T, ctx.scale, into=C_.narrow(0, 0, r).narrow(1, 0, r))
        grads = A_ if to_A else None, B_ if to_B else None, C_.tril() if to_L else None, C_.triu() if to_U else None
        return g if weight is None else None, grad_x, *grads, None, None, None


def room(g: torch.Tensor, dtype: torch.dtype, *shapes: tuple[int, ...], filled: bool) -> list[torch.Tensor]:
    """Tensors of these shapes where `g` is; if `filled`, with zeros, as parts of one: one operation for all."""
    if not filled:
        return [g.new_empty(shape, dtype=dtype) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    parts = g.new_zeros(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class TriAdaptLoRA(Adapter):
    """W' = W + s B (L + U) A at the active rank; factors have room for `size` ranks.

    `since` holds for each rank the optimizer step at which it became active, or -1. `rank` says how many are, as a
    Python int, so that a forward pass never waits for the device; it follows every way by which `since` gets here:
    assignment, `load_state_dict`, and the `setattr` of transformers' loading.

    Of a stack of experts the four factors have a leading axis of experts. One rank is for all of them: they gain it
    together, by the mean of their F.
    """

    grouped = True
    joins = True

    A: nn.Parameter  # (size, in)
    B: nn.Parameter  # (out, size)
    lower: nn.Parameter  # L (size, size); what is above the diagonal is never read
    upper: nn.Parameter  # U (size, size); what is below the diagonal is never read
    since: torch.Tensor  # (size,) int64
    norm: torch.Tensor  # (1,) F at the last round
    scored: torch.Tensor  # (1,) int64, step of the last round

    def __init__(self, site: Site, config: TriAdaptLoRAConfig) -> None:
        super().__init__(site, config)
        r, widths = config.init_r, (site.in_features, site.out_features)
        size = config.max_rank or max(r, min(2 * config.target_r, *widths))
        A, B = STD * torch.randn(size, site.in_features), torch.zeros(site.out_features, size)
        L, U = torch.eye(size), torch.zeros(size, size)
        if config.init == "zero_core":
            B, L = STD * torch.randn_like(B), torch.zeros_like(L)
        if not config.init_weights:
            A, B = (torch.randn_like(factor) / factor.shape[1] ** 0.5 for factor in (A, B))
            L, U = torch.eye(size) + STD * torch.randn_like(L), STD * torch.randn_like(U)
        self.A, self.B, self.lower, self.upper = (nn.Parameter(tensor) for tensor in (A, B, L, U))
        since = torch.full((size,), -1)
        since[:r] = 0
        self.register_buffer("since", since)
        self.register_buffer("norm", norm(core(L, U, r)))
        self.register_buffer("scored", torch.zeros(1, dtype=torch.int64))
        self.rank = r  # also where a tensor on the meta device cannot say it

    @classmethod
    def over_experts(cls, site: ExpertsSite, config: TriAdaptLoRAConfig) -> Adapter:
        adapter: Any = super().over_experts(site, config)
        adapter.since, adapter.scored = adapter.since[0].clone(), adapter.scored[0].clone()
        adapter.norm = adapter.norm.mean(dim=0)
        return adapter

    def at(self, expert: int) -> Adapter:
        factors = {name: tensor[expert] for name, tensor in self._parameters.items() if tensor is not None}
        return self.with_tensors(expert, factors, self._buffers)

    def prepare_all(self, tensors: dict[str, torch.Tensor]) -> None:
        self.prepare_load(tensors)

    def refresh(self) -> None:
        if not self.since.is_meta:
            self.rank = int((self.since >= 0).sum())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "since":
            self.refresh()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    @property
    def size(self) -> int:
        """The largest rank there is room for."""
        return len(self.since)

    def core(self) -> torch.Tensor:
        """L + U at the active rank, (r, r)."""
        return core(self.lower, self.upper, self.rank)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and the transpose of B (L + U), (r, out), at the active rank."""
        return self.A[..., : self.rank, :], self.core().mT @ self.B[..., : self.rank].mT

    @property
    def constant(self) -> float:
        """The factor s of the delta."""
        return self.config.lora_alpha / (self.rank if self.config.scale_by_current_rank else self.config.target_r)

    @property
    def drops(self) -> bool:
        return self.training and self.config.lora_dropout > 0

    def add_delta(self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        A: torch.Tensor = self.A
        B: torch.Tensor = self.B
        scale = self.scale * self.constant
        if self.drops:
            x = F.dropout(x, self.config.lora_dropout)
        if by_hand() and isinstance(self.site, LinearSite) and A.ndim == 2:  # not of a stack of experts
            own = A, B, self.lower, self.upper
            return _Delta.apply(result, autocasted(x), *own, self.rank, scale, weight)
        if self.rank < self.size:
            A, B = A[..., : self.rank, :], B[..., : self.rank]
        h = self.site.reduce(x, A)
        if self.kept is None:
            h = self.site.reduce(h, self.core())
        else:
            B = kept(self, self.rank, lambda: B @ self.core())
        return self.site.accumulate(result, h, B, scale)

    def delta_weight(self) -> torch.Tensor:
        A, CB = self.factors()
        return self.constant * at_least_fp32(CB).T @ at_least_fp32(A)

    def lora_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        A, CB = (factor.detach() for factor in self.factors())
        return A, self.scale * self.constant * CB.T

    def defects(self) -> tuple[torch.Tensor, torch.Tensor]:
        """||A A^T - I||_F and ||B^T B - I||_F at the active rank, each (), at least in fp32; of a stack the means."""
        A, B = at_least_fp32(self.A[..., : self.rank, :]), at_least_fp32(self.B[..., : self.rank].mT)
        identity = torch.eye(self.rank, dtype=A.dtype, device=A.device)
        first, second = (torch.linalg.matrix_norm(factor @ factor.mT - identity).mean() for factor in (A, B))
        return first, second

    # Growth

    def check_growable(self, name: str) -> None:
        """Raises RuntimeError where the ranks of the module `name` cannot grow."""
        if self.site.merged:
            raise RuntimeError(
                f"{name}: an adapter is merged into the base weight, and would grow into something else than what was "
                "merged. Call `unmerge_adapter` before `update_and_grow`."
            )
        if self.A.shape[-2:] != (self.size, self.site.in_features):
            raise RuntimeError(f"{name}: sharded parameters cannot grow. Train with DDP, or with full parameters.")

    def core_norm(self) -> torch.Tensor:
        """F, on the CPU, so that every process gets the same bits."""
        return norm(self.core().detach().cpu())

    def score(self, step: int) -> float:
        """By how much F has changed since the last call of this, which it remembers."""
        current, previous = self.core_norm(), self.norm
        # In the dtype of what is remembered: `model.bfloat16()` rounds that, and an untouched core has to score zero.
        change = float(current.to(previous.dtype)) - float(previous)
        previous.copy_(current)
        self.scored.fill_(step)
        return change

    @torch.no_grad()
    def activate(self, count: int, step: int, key: str) -> None:
        """Adds `count` ranks to the active ones, in place. They start anew, as AdamW's weight decay may have changed
        them: `key` seeds the private generator of their Gaussian entries."""
        A, B, L, U = self.A, self.B, self.lower, self.upper
        new, identity = slice(self.rank, self.rank + count), self.config.init == "identity"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        A[..., new, :] = STD * torch.randn(*A.shape[:-2], count, A.shape[-1], generator=generator).to(A)
        B[..., new] = 0 if identity else STD * torch.randn(*B.shape[:-1], count, generator=generator).to(B)
        L[..., new, :] = torch.eye(self.size)[new].to(L) if identity else 0
        U[..., new] = 0
        self.since[new] = step
        self.rank += count

    # Files

    def trim(self) -> None:
        """Drops the inactive ranks; the parameters are replaced."""
        r = self.rank
        trimmed = {"A": self.A[..., :r, :], "B": self.B[..., :r]}
        trimmed |= {"lower": self.lower[..., :r, :r], "upper": self.upper[..., :r, :r]}
        for name, tensor in trimmed.items():
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad))
        self.since = self.since[:r].clone()
        self.config = fixed(self.config, r)

    def prepare_load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fits the tensors of a file that was allocated for another max_rank, where its active rank has room."""
        since, size = tensors.get("since"), self.size
        if since is None:
            return
        found = len(since) if since.ndim == 1 else 0
        if since.is_meta:  # shapes only; more than a whole weight is not made for a small file
            r = 1 if size <= max(found, self.site.in_features, self.site.out_features) else size + 1
        else:
            active = since >= 0
            r = int(active.sum())
            if not r or not active.reshape(-1)[:r].all():
                raise ValueError(f"since: found {since.tolist()}, expected active ranks before inactive ones")
        if found == size or r > size:
            return
        for name, tensor in tensors.items():
            wanted = getattr(self, name)
            pairs = list(zip(tensor.shape, wanted.shape, strict=False))
            if tensor.ndim == wanted.ndim and all(have in (want, found) for have, want in pairs):
                common = tuple(slice(min(pair)) for pair in pairs)
                fitted = tensor.new_full(wanted.shape, -1 if name == "since" else 0)
                fitted[common] = tensor[common]
                tensors[name] = fitted
