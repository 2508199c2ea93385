"""AdamW whose moments are quantised block by block and, if asked, live in a low-rank projection of the gradient."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from . import projection
from .checks import LATER, OPTIONS, as_python, check_names, check_options, check_parameter, check_schedule, check_state
from .fused import fusable, fused_step
from .lanes import Apollo, descend, descend_apollo, plain, project, shrink
from .moments import Rule, Segment, directions, segments, span_of
from .report import log_summary
from .rounding import seed_of
from .state import is_projected, layout, moments, read_moment, working_dtype, write_moment

REGROUPED = (
    "the tensors are as many, so the groups may have been made by `peftx.optim.create_optimizer` with another rank, "
    "target or embedding_bits (8 is what it did before it had this argument)"
)
FUSED_LIMIT = 1e18  # of the gradients' norm: bitsandbytes' kernel squares in fp32, and inf would stay in its states

logger = logging.getLogger(__name__)


class LowRankAdamW(torch.optim.Optimizer):
    r"""AdamW (arXiv:1711.05101) with 8-bit moments (arXiv:2110.02861) and low-rank projection (arXiv:2403.03507).

    With the default `rank=None` this is AdamW with bitsandbytes' 8-bit states. With a rank, a matrix G (short, long) of
    a gradient, turned if it is at least as high as wide, is replaced by its projection R = Q^T G (rank, long):

        every `update_proj_gap` steps, starting with the first: Q = leading left singular vectors of G
        m = beta1 m + (1 - beta1) R,  v = beta2 v + (1 - beta2) R^2,  t = t + 1
        D = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        W = (1 - lr weight_decay) W - lr scale Q D

    Tensors that are not matrices are never projected. A rank of at least the short side rotates (Q is square) and saves
    nothing. While the first gradient of a projected tensor is exactly zero, as that of LoRA's A while B is zero, its
    state waits for one that has a direction. All arguments can be set per parameter group.

    Each 8-bit state takes 2 bytes and 8 / 256 bytes for the blocks' scales per element of R (or of the parameter);
    bitsandbytes' dequantiser reads it. States are quantised after use, so the first step is that of fp32 AdamW. The
    arithmetic is fp32 whatever the parameters' dtype, also under autocast, and a parameter is rounded once per step.
    Moments of float64 parameters that are not 8-bit are float64. Where the square of a gradient would overflow (from
    9e18 in fp32) the moments take it as that large.

    If any gradient has a value that is not finite, the step is skipped as a whole: no parameter, no state changes;
    a warning is logged and `skipped_steps` counts it. After each step in which a parameter is new, one line at level
    INFO tells how many tensors are 8-bit, 32-bit and projected (see `summarize`).

    Args:
        params: parameters, named parameters or groups of them; floating-point, dense, each once.
        lr: default 1e-3 (PyTorch's), like betas and eps.
        betas: default (0.9, 0.999). eps: default 1e-8, added to sqrt(v_hat); at least 1e-30.
        weight_decay: decoupled; default 0.01 (PyTorch's).
        rank: rows of R, at least 1; or, between 0 and 1, their share of the short side, rounded down but at least one
            row (0.5 is r // 2 for LoRA's factors, whatever their r). Default None, no projection.
        update_proj_gap: steps between two refreshes of Q, at least 1; default 200 (GaLore's).
        scale: of the projected tensors' update, not of their decay; default 1.0. GaLore's papers use 0.25.
        proj_refresh: `"randomized"` (default; two power iterations, arXiv:0909.4061: nearly the same subspace, fifty
            times as fast for 4096 x 4096, and exact from 8 rows below the short side); `"svd"` (exact); `"random"` (a
            random subspace, which costs nothing to find).
        refresh_moments: what a refresh does with the moments: `"keep"` them as they are (default; GaLore),
            `"rotate"` m into the new basis, or `"reset"` both (and the bias correction).
        update: `"galore"` (default: the formula above). `"apollo"` (arXiv:2412.05270, meant for
            `proj_refresh="random"`): W -= lr scale G s, s_j = |D_j| / |R_j| for each column, and the norm of an update
            grows by at most 1 % a step. `"frugal-sign"` and `"frugal-sgd"` (arXiv:2411.07837, meant for
            `refresh_moments="reset"`): to Q D is added the sign of, or simply, the rest G - Q R of the gradient.
        optim_bits: 8 (default) or 32; `create_optimizer` keeps the states of embeddings in 32 (see `param_groups`).
        min_8bit_size: moments of fewer elements (after projection) stay 32-bit; default 4096 (bitsandbytes'). Many
            LoRA factors are smaller; 0 quantises everything.
        basis_bits: Q in fp32 (32, default) or bfloat16 (16).
        fused: use bitsandbytes' fused kernel for contiguous 8-bit tensors without projection. Default None: on CUDA
            if bitsandbytes is installed. The kernel may round second moments to zero, and on a CPU it turns zeros into
            small numbers, which `fused=False` does neither; its states are in the same format.
        bf16_stochastic_round: whether bfloat16 parameters are rounded stochastically (arXiv:2010.06192), each element
            to its lower or its upper neighbour so that the mean is right; to the nearest, a weight of 1.0 never moves
            at rates below 2e-3. Other dtypes are not touched by it. Name and default, False, are torchao's: a run
            stays what it was, and PEFT keeps adapters in fp32, which need no luck. The bits come from a private
            generator and depend on the parameter's place and on `rounded_steps`, a count in the state dict: a resumed
            run goes on to the bit, and all ranks of DDP round alike.

    Raises:
        ValueError: an argument of another type, not finite or out of its range, also one that a schedule sets (from
            `step`); a complex or integer parameter, one that comes twice; from `load_state_dict`: a state dict that is
            not of this optimizer, or not of these parameters. Nothing is changed then.
        NotImplementedError: parameters sharded as DTensor (FSDP2), when they are given or, if they were sharded since,
            at the first step: a projection would need the whole gradient, and nothing could gather the blocks of the
            shards' states. With FSDP1 only `rank=None` works: every rank quantises its own flat shard and judges by
            this shard alone whether the gradient is finite; PyTorch's `FSDP.optim_state_dict` refuses to gather such
            states from more than one rank.
        TypeError: a parameter that is no tensor, or parameters in a set, which has no order.
        ImportError: `fused=True` without bitsandbytes.
        RuntimeError: from `step`, before anything has changed, for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_refresh: str = "randomized",
        refresh_moments: str = "keep",
        update: str = "galore",
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        basis_bits: int = 32,
        fused: bool | None = None,
        bf16_stochastic_round: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_refresh=proj_refresh,
            refresh_moments=refresh_moments,
            update=update,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            basis_bits=basis_bits,
            fused=fused,
            bf16_stochastic_round=bf16_stochastic_round,
            skipped_steps=0,
            rounded_steps=0,
        )
        check_options(defaults)
        super().__init__(params, as_python(defaults))

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because of gradients that are not finite. Part of the state dict."""
        return max(group["skipped_steps"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("parameters must come in an order, which states are saved by; a set has none")
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
        check_options({**self.defaults, **param_group})
        for tensor in tensors:
            check_parameter(tensor)
        if len(set(map(id, tensors))) < len(tensors):
            raise ValueError("a parameter appears more than once in a parameter group")
        super().add_param_group({**as_python(param_group), "params": params})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns, if one is given. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for group, params in work:
            check_schedule(group)
            for (
                p
            ) in params:  # those of a state were checked when it was made; FSDP2 exchanges parameters behind our back
                if not self.state.get(p):
                    check_parameter(p)
        gradients = [p.grad for _, params in work for p in params]
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise RuntimeError("LowRankAdamW needs dense gradients; make them so (embeddings: sparse=False)")
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm) and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            logger.warning("step skipped: a gradient is not finite (%d skipped so far)", self.skipped_steps)
            return
        fresh = [(p, group) for group, params in work for p in params if not self.state.get(p)]
        for p, group in fresh:
            self._allocate(p, group)
        with ExitStack() as full_precision:
            for kind in {gradient.device.type for gradient in gradients}:
                full_precision.enter_context(torch.autocast(kind, enabled=False))
            everything = (p for group in self.param_groups for p in group["params"])
            random = any(group["bf16_stochastic_round"] for group in self.param_groups)
            places = {p: place for place, p in enumerate(everything)} if random else {}
            for group, params in work:
                self._update(group, params, places, fuse=norm < FUSED_LIMIT)
        if fresh:
            log_summary(self, logger)

    def allocate_states(self) -> None:
        """Makes the states of all parameters now (zeros) instead of at their first step, on any device, also "meta"."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p):
                    self._allocate(p, group)

    def _allocate(self, p: torch.Tensor, group: Mapping[str, Any]) -> None:
        check_parameter(p)
        state = self.state[p]
        state["step"] = 0
        for key, (shape, dtype) in layout(p, group).items():
            state[key] = torch.zeros(shape, dtype=dtype, device=p.device)

    def _update(
        self, group: dict[str, Any], params: list[torch.Tensor], places: Mapping[torch.Tensor, int], fuse: bool
    ) -> None:
        """Cuts the tensors of a group into segments and works off a batch as soon as it is full."""
        lr, decay = float(group["lr"]), 1 - float(group["lr"]) * group["weight_decay"]
        batches: dict[tuple[Any, ...], list[Segment]] = defaultdict(list)
        filled: dict[tuple[Any, ...], int] = defaultdict(int)

        def work_off(key: tuple[Any, ...]) -> None:
            batch, rule, projected = batches.pop(key), key[0], key[1]
            found = directions(batch, rule)
            if projected:
                torch._foreach_copy_([segment.target for segment in batch], found)
            else:
                descend([segment.target for segment in batch], found, decay, lr, [segment.seed for segment in batch])
            ends = [segment.finish for segment in batch if segment.finish is not None]
            descend_apollo([end for end in ends if isinstance(end, Apollo)], decay)
            for end in ends:
                if not isinstance(end, Apollo):
                    end()
            filled[key] = 0

        stochastic = group["bf16_stochastic_round"]
        group["rounded_steps"] += stochastic
        for p in params:
            state, projected = self.state[p], is_projected(p, group)
            chance = stochastic and p.dtype == torch.bfloat16
            seed = seed_of(places[p], group["rounded_steps"]) if chance else None
            if projected and not self._refresh(p, group):
                shrink(p, decay, seed)
                continue
            age = state["step"] % group["update_proj_gap"] if resets(p, group) else state["step"]
            state["step"] += 1
            rule = Rule(group["betas"][0], group["betas"][1], group["eps"], age + 1)
            if fuse and fusable(p, state, group):
                fused_step(p, state, rule, lr, group["weight_decay"], seed)
                continue
            lane = project(p, state, group, decay, lr, seed) if projected else plain(p)
            for segment in segments(lane[0], moments(state), *lane[1:], seed):
                key = (rule, projected, p.device, p.dtype, segment.gradient.dtype, segment.moments[0].dtype)
                if filled[key] + segment.gradient.numel() > span_of(p) and batches[key]:
                    work_off(key)
                batches[key].append(segment)
                filled[key] += segment.gradient.numel()
        for key in list(batches):
            if batches[key]:
                work_off(key)

    def _refresh(self, p: torch.Tensor, group: Mapping[str, Any]) -> bool:
        """Renews the basis when it is due. False if there is none yet, because no gradient had a direction so far."""
        state = self.state[p]
        if state["step"] % group["update_proj_gap"]:
            return True
        if state["step"] and group["refresh_moments"] == "reset":
            for moment in moments(state):
                moment.zero_()
        gradient = projection.lay(p.grad).to(working_dtype(p.dtype))  # type: ignore[arg-type]
        if not gradient.any():
            return state["step"] > 0
        old = state["basis"].to(gradient.dtype, copy=True)
        new = projection.basis(gradient, old.shape[1], group["proj_refresh"], seed=state["step"])
        new = projection.align(new, old)
        state["basis"].copy_(new)
        if state["step"] and group["refresh_moments"] == "rotate":
            m = read_moment(state, "exp_avg")
            write_moment(state, "exp_avg", (new.T @ old).to(m.dtype) @ m)
        return True

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit: states keep their dtypes and move to the parameters' devices.

        The hyperparameters in it replace those given at construction. Everything is checked first (see `Raises`), but
        after the hooks registered to run before; names are compared without the wrappers of torch.compile, DDP, FSDP.
        """
        given: Any = copy.copy(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            given = hook(self, given) or given
        groups, states = self._checked(given)
        if any(ours["optim_bits"] > new["optim_bits"] for ours, new in zip(self.param_groups, groups, strict=True)):
            logger.warning("the loaded states are 8-bit, and go on so, where 32 bits were asked for (embeddings?)")
        state = defaultdict(dict, {p: _moved(state, p.device) for p, state in states.items()})
        groups = [
            {**copy.deepcopy(new), **{key: ours[key] for key in ("params", "param_names") if key in ours}}
            for ours, new in zip(self.param_groups, groups, strict=True)
        ]
        self.__setstate__({"state": state, "param_groups": groups})
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def _checked(self, state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[torch.Tensor, Any]]:
        """The groups and, by parameter, the states of a state dict that fits this optimizer."""
        try:
            groups, states = list(state_dict["param_groups"]), dict(state_dict["state"])
            found = [len(group["params"]) for group in groups]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("not the state dict of an optimizer: it needs 'state' and 'param_groups'") from error
        wanted = [len(group["params"]) for group in self.param_groups]
        if found != wanted:
            hint = f"; {REGROUPED}" if sum(found) == sum(wanted) else ""
            raise ValueError(
                f"the state dict has parameter groups of {found} tensors, the optimizer has {wanted}{hint}"
            )
        groups = [
            {**{key: ours[key] for key in LATER}, **group}
            for group, ours in zip(groups, self.param_groups, strict=True)
        ]
        by_id: dict[Any, tuple[torch.Tensor, Mapping[str, Any]]] = {}
        for group, ours in zip(groups, self.param_groups, strict=True):
            if missing := OPTIONS - group.keys():
                raise ValueError(f"the state dict is another optimizer's: {sorted(missing)} are missing in its groups")
            check_options(group)
            check_names(group, ours)
            by_id |= {key: (p, group) for key, p in zip(group["params"], ours["params"], strict=True)}
        if strangers := states.keys() - by_id.keys():
            raise ValueError(f"the state dict has states of parameters that are in no group: {sorted(strangers)}")
        for key, state in states.items():
            check_state(state, *by_id[key], where=f"state of parameter {key}")
        return groups, {by_id[key][0]: state for key, state in states.items()}


def _moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value for key, value in state.items()
    }


def resets(p: torch.Tensor, group: Mapping[str, Any]) -> bool:
    return is_projected(p, group) and group["refresh_moments"] == "reset"
