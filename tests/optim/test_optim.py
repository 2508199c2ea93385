"""peftx.optim: the 8-bit format against bitsandbytes, steps against explicit float64 oracles, states, loading."""

import copy
import logging
import math
import sys
from itertools import pairwise

import accelerate
import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from peftx.optim import (
    LowRankAdamW,
    blockwise,
    create_optimizer,
    dequantize,
    fused,
    moments,
    quantize,
    state_bytes,
    summarize,
)
from peftx.optim.blockwise import code_book
from peftx.optim.projection import basis as find_basis
from peftx.optim.state import read_moment

CPU = torch.device("cpu")
F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def steps(optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    """`count` steps with gradients that depend on the number of the step, the tensor's place and its shape only."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, start + count):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=1000 * t + i, dtype=p.dtype)
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer) -> dict:
    return copy.deepcopy(optimizer.state_dict())


def same(one, other) -> bool:
    """Bit-equality of nested state."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


# The oracle: section 5b of the method, step by step, on whole float64 matrices.


def nearest(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """x after 8-bit storage: per 256 elements, the nearest of bitsandbytes' code book, found by trying all."""
    book = create_dynamic_map(signed).double()
    out = torch.empty_like(x).flatten()
    for block, into in zip(x.flatten().split(256), out.split(256), strict=True):
        absmax = block.abs().max()
        if absmax == 0:
            into.zero_()
            continue
        codes = (block[:, None] / absmax - book).abs().argmin(1)
        if not signed:
            codes[(codes == 0) & (block > 0)] = 1
        into.copy_(book[codes] * absmax)
    return out.view(x.shape)


def oracle(
    weight, gradients, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, rank=None, gap=200, scale=1.0,
    eight_bit=False, refresh="keep", update="galore",
):  # fmt: skip
    """The weights (float64) after all `gradients`."""
    dtype, tall = (
        torch.promote_types(weight.dtype, torch.float32),
        weight.dim() == 2 and weight.shape[0] >= weight.shape[1],
    )
    weight = weight.detach().double()
    m = v = None
    age, norm, base = 0, None, None
    for t, gradient in enumerate(gradients):
        gradient = gradient.double()
        g = gradient.T if tall else gradient
        if rank is not None and t % gap == 0:
            # In the dtype of the weight: LAPACK's signs differ between single and double precision.
            old, base = base, torch.linalg.svd(g.to(dtype), full_matrices=False).U[:, :rank].double()
            if t:
                base = base * torch.where((base * old).sum(0) < 0, -1.0, 1.0)
            if t and refresh == "rotate":
                m = base.T @ old @ m
            if t and refresh == "reset":
                m, v, age = torch.zeros_like(m), torch.zeros_like(v), 0
        low = gradient if rank is None else base.T @ g
        m = (1 - betas[0]) * low + (0 if m is None else betas[0] * m)
        v = (1 - betas[1]) * low**2 + (0 if v is None else betas[1] * v)
        age += 1
        d = (m / (1 - betas[0] ** age)) / ((v / (1 - betas[1] ** age)).sqrt() + eps)
        if eight_bit:
            m, v = nearest(m, True), nearest(v, False)
        if rank is None:
            full = d
        elif update == "galore":
            full = base @ d
        elif update == "apollo":
            full = g * (d.norm(dim=0) / low.norm(dim=0))
            limit = full.norm() if norm is None else min(full.norm(), 1.01 * norm)
            full, norm = full * (limit / full.norm()), limit
        else:
            rest = g - base @ low
            full = base @ d + (rest.sign() if update == "frugal-sign" else rest)
        full = full.T if rank is not None and tall else full
        weight = weight * (1 - lr * weight_decay) - lr * (1 if rank is None else scale) * full
    return weight


def run(weight: torch.Tensor, gradients, **options) -> tuple[torch.Tensor, LowRankAdamW]:
    """Weights and optimizer after all `gradients`, with the oracle's exact refresh where the options name no other."""
    p = nn.Parameter(weight.detach().clone())
    optimizer = LowRankAdamW([p], **{"proj_refresh": "svd", **options})
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer


# The 8-bit format.


@pytest.mark.parametrize("signed", [True, False])
def test_code_books_are_bitsandbytes(signed):
    assert torch.equal(code_book(signed, CPU).values, create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_every_border_between_entries_and_between_cells_is_found(signed):
    book = code_book(signed, CPU)
    cells = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    borders = torch.cat([cells, book.limits, book.values])
    borders = torch.cat([borders, *(torch.nextafter(borders, torch.tensor(end)) for end in (2.0, -2.0))])
    x = borders[borders.isfinite() & (borders.abs() <= 1) & (borders >= (-1 if signed else 0))]
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)  # so that absmax is 1 in every block
    codes, absmax = quantize(x, signed)
    assert torch.equal(absmax, torch.ones(len(x)))
    assert torch.equal(codes.long(), torch.bucketize(x, book.limits))
    values, chosen = book.values.double(), book.values.double()[codes.long()]
    best = torch.stack([(part.flatten()[:, None] - values).abs().amin(1) for part in x.double().split(64)[:-1]])
    found = (x.double() - chosen).abs()[: best.numel() // 256].view_as(best)
    raised = (
        torch.zeros_like(found, dtype=bool) if signed else ((x > 0) & (codes == 1))[: len(x) // 64 * 64].view_as(best)
    )
    assert (found - best)[~raised].max() < 7e-8  # limits are rounded to fp32


@pytest.mark.parametrize("shape", [(256,), (8, 768), (3, 5, 7), (1,), (1000,)])
@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_reads_our_states_with_zero_difference(shape, signed):
    x = normal(*shape) if signed else normal(*shape) ** 2
    codes, absmax = quantize(x, signed)
    assert codes.shape == x.shape and absmax.shape == (math.ceil(x.numel() / 256),)
    theirs = dequantize_blockwise(codes, absmax=absmax, code=create_dynamic_map(signed), blocksize=256)
    assert torch.equal(theirs.view(shape), dequantize(codes, absmax, signed))
    assert torch.equal(theirs.view(shape).double(), nearest(x.double(), signed).float().double()) or torch.allclose(
        theirs.view(shape).double(), nearest(x.double(), signed), rtol=1e-6, atol=0
    )


def test_error_of_the_format_and_its_zeros():
    x = normal(4096, 64)
    assert (dequantize(*quantize(x)) - x).norm() / x.norm() < 0.012
    assert (dequantize(*quantize(x**2, False), False) - x**2).norm() / (x**2).norm() < 0.0066
    x[:, ::2] = 0
    assert not dequantize(*quantize(x))[:, ::2].any() and not dequantize(*quantize(x**2, False), False)[:, ::2].any()
    faint = torch.tensor([1.0, 1e-9, 1e-30, 0.0])
    assert dequantize(*quantize(faint)).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert torch.equal(dequantize(*quantize(faint, False), False) > 0, faint > 0)
    assert not dequantize(*quantize(torch.zeros(300))).any()
    tiny = torch.full((256,), 1e-42)  # below the smallest normal number: no division by a rounded zero
    assert torch.equal(dequantize(*quantize(tiny)), tiny)


# Without projection.


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_32_bits_without_a_rank_are_torch_adamw(dtype, weight_decay):
    shapes, results = [(7, 5), (64, 80), (3,), ()], []
    for cls, options in ((torch.optim.AdamW, {}), (LowRankAdamW, {"optim_bits": 32})):
        params = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        steps(cls(params, lr=0.01, weight_decay=weight_decay, **options), 10)
        results.append(params)
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < (5e-7 if dtype == torch.float32 else 1e-14)


def test_defaults_are_torch_adamw():
    theirs = torch.optim.AdamW([parameter(2)]).defaults
    ours = LowRankAdamW([parameter(2)]).defaults
    assert {key: ours[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        key: theirs[key] for key in ("lr", "betas", "eps", "weight_decay")
    }


@pytest.mark.parametrize("options", [{}, {"rank": 4}])
def test_the_first_8_bit_step_is_the_32_bit_one(options):
    weight, gradient = normal(64, 96), normal(64, 96, seed=1)
    eight, full = (run(weight, [gradient], lr=1e-3, optim_bits=bits, min_8bit_size=0, **options)[0] for bits in (8, 32))
    assert not torch.equal(weight, full) and (eight - full).abs().max() < 3e-7


@pytest.mark.parametrize("shape", [(64, 96), (1000,), (5, 7, 11)])
def test_8_bit_trajectory_is_the_oracles(shape):
    weight, gradients = normal(*shape), [normal(*shape, seed=t) * 0.1 ** (t % 3) for t in range(8)]
    found, optimizer = run(weight, gradients, lr=0.01, min_8bit_size=0)
    wanted = oracle(weight, gradients, lr=0.01, eight_bit=True)
    full = oracle(weight, gradients, lr=0.01)
    assert (found - wanted).norm() < 1e-3 * (full - weight).norm()  # some code flips by rounding to fp32
    assert (wanted - full).norm() > 3e-3 * (full - weight).norm()  # the test sees quantisation
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_rounded_once(dtype):
    weight, gradient = normal(64, 96).to(dtype), normal(64, 96, seed=1).to(dtype)
    for options in ({"optim_bits": 32}, {"optim_bits": 8}, {"rank": 8}):
        found, optimizer = run(weight, [gradient], lr=0.01, weight_decay=0.3, **options)
        wanted = oracle(weight, [gradient], lr=0.01, weight_decay=0.3, rank=options.get("rank"))
        assert found.dtype == dtype
        exact = (found == wanted.to(dtype)).float().mean()
        assert exact > 0.999, exact  # but for ties
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert {value.dtype for value in state.values() if isinstance(value, torch.Tensor)} <= {
            torch.float32, torch.uint8
        }  # fmt: skip


def test_elements_without_gradient_never_move():
    weight = normal(32, 256)
    gradients = [normal(32, 256, seed=t) for t in range(40)]
    for gradient in gradients:
        gradient[:, ::2] = 0
    found, _ = run(weight, gradients, lr=0.01, weight_decay=0.0)
    assert torch.equal(found[:, ::2], weight[:, ::2]) and (found[:, 1::2] != weight[:, 1::2]).all()


def test_many_tensors_in_one_batch_are_as_each_alone():
    shapes = [(8, 768), (768, 8), (100,), (256,), (3, 3), (300, 301)]
    together = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    alone = copy.deepcopy(together)
    optimizers = [LowRankAdamW([p], min_8bit_size=64) for p in alone]
    optimizer = LowRankAdamW(together, min_8bit_size=64)
    for t in range(4):
        for i, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = normal(*one.shape, seed=10 * t + i)
            other.grad = one.grad.clone()
        optimizer.step()
        for single in optimizers:
            single.step()
    for one, other, single in zip(together, alone, optimizers, strict=True):
        assert (one - other).abs().max() < 1e-7
        assert all(
            torch.equal(value, single.state[other][key])
            for key, value in optimizer.state[one].items()
            if key.startswith("exp_avg") and value.dtype == torch.uint8
        )


@pytest.mark.parametrize("options", [{}, {"optim_bits": 32}, {"rank": 8}])
def test_large_tensors_are_worked_off_in_pieces(options, monkeypatch):
    weight, gradients = normal(60, 100), [normal(60, 100, seed=t) for t in range(3)]
    whole, _ = run(weight, gradients, min_8bit_size=0, **options)
    monkeypatch.setitem(moments.SPAN, "cpu", 512)
    pieces, _ = run(weight, gradients, min_8bit_size=0, **options)
    assert (whole - pieces).abs().max() < 1e-7 and not torch.equal(whole, weight)


def test_parameters_of_any_strides():
    base = normal(96, 64)
    for options in ({}, {"rank": 4}, {"optim_bits": 32}):
        straight = nn.Parameter(base.T.contiguous())
        turned = nn.Parameter(base.clone().T)
        for p in (straight, turned):
            steps(LowRankAdamW([p], lr=0.01, **options), 3)
        assert not turned.is_contiguous() and (straight - turned).abs().max() < 1e-6


# With projection.


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)])
@pytest.mark.parametrize("rank", [1, 4, 12, 50])
def test_projected_trajectory_is_the_oracles(shape, rank):
    weight, gradients = normal(*shape, dtype=F64), [normal(*shape, seed=t, dtype=F64) for t in range(8)]
    found, _ = run(
        weight, gradients, lr=0.01, weight_decay=0.1, rank=rank, update_proj_gap=3, scale=0.25, optim_bits=32
    )
    wanted = oracle(weight, gradients, lr=0.01, weight_decay=0.1, rank=rank, gap=3, scale=0.25)
    assert (found - wanted).abs().max() < 1e-11


def test_projected_8_bit_trajectory_is_the_oracles():
    weight, gradients = normal(24, 300), [normal(24, 300, seed=t) for t in range(8)]
    found, _ = run(weight, gradients, lr=0.01, rank=6, update_proj_gap=5, min_8bit_size=0)
    wanted, full = (
        oracle(weight, gradients, lr=0.01, rank=6, gap=5, eight_bit=eight_bit) for eight_bit in (True, False)
    )
    assert (found - wanted).norm() < 2e-3 * (full - weight).norm() < (wanted - full).norm()


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_a_rank_of_the_short_side_is_adam_in_a_rotated_basis(shape):
    weight, gradients = normal(*shape, dtype=F64), [normal(*shape, seed=t, dtype=F64) for t in range(6)]
    found, optimizer = run(weight, gradients, lr=0.01, weight_decay=0.0, rank=8, update_proj_gap=10**9, optim_bits=32)
    basis = next(iter(optimizer.state.values()))["basis"]
    turn = (lambda x: basis.T @ x) if shape[0] < shape[1] else (lambda x: x @ basis)
    back = (lambda x: basis @ x) if shape[0] < shape[1] else (lambda x: x @ basis.T)
    assert (back(turn(gradients[3])) - gradients[3]).abs().max() < 1e-12
    rotated = nn.Parameter(turn(weight))
    adam = torch.optim.AdamW([rotated], lr=0.01, weight_decay=0.0)
    for gradient in gradients:
        rotated.grad = turn(gradient)
        adam.step()
    assert (back(rotated.detach()) - found).abs().max() < 1e-12


def test_updates_lie_in_the_span_of_the_basis():
    p = parameter(20, 30, dtype=F64)
    optimizer = LowRankAdamW([p], lr=0.01, weight_decay=0.0, rank=3, update_proj_gap=4, optim_bits=32)
    start, ranks = p.detach().clone(), []
    for t in range(8):
        before = p.detach().clone()
        steps(optimizer, 1, t)
        basis = optimizer.state[p]["basis"]
        change = p.detach() - before
        assert (change - basis @ (basis.T @ change)).norm() < 1e-12 * change.norm()
        ranks.append(int(torch.linalg.matrix_rank(p.detach() - start, rtol=1e-9)))
    assert ranks == [3] * 4 + [6] * 4


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
@pytest.mark.parametrize("proj_refresh", ["svd", "randomized", "random"])
@pytest.mark.parametrize("basis_bits", [32, 16])
def test_the_basis_is_orthonormal_and_renewed_exactly_when_due(shape, proj_refresh, basis_bits):
    p = parameter(*shape)
    optimizer = LowRankAdamW([p], rank=4, update_proj_gap=3, proj_refresh=proj_refresh, basis_bits=basis_bits)
    bases = []
    for t in range(7):
        steps(optimizer, 1, t)
        bases.append(optimizer.state[p]["basis"].clone())
        assert bases[-1].shape == (12, 4)
        assert (bases[-1].float().T @ bases[-1].float() - torch.eye(4)).abs().max() < (
            1e-5 if basis_bits == 32 else 0.01
        )
    changed = [not torch.equal(*pair) for pair in pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("shape", "rank", "rows"),
    [((8, 30), 0.5, 4), ((30, 7), 0.5, 3), ((1, 9), 0.5, 1), ((8, 8), 0.9, 7), ((100, 400), 0.29, 29)],
)
def test_a_rank_below_one_is_a_share_of_the_short_side(shape, rank, rows):
    steps(optimizer := LowRankAdamW([p := parameter(*shape)], rank=rank), 1)
    assert optimizer.state[p]["exp_avg"].shape == (rows, max(shape))
    assert optimizer.state[p]["basis"].shape == (min(shape), rows)


@pytest.mark.parametrize("shape", [(8, 768), (768, 8)])
def test_moments_are_stored_direction_by_direction(shape):
    p = parameter(*shape)
    steps(optimizer := LowRankAdamW([p], rank=4, min_8bit_size=0), 1)
    state = optimizer.state[p]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (4, 768)
    assert state["exp_avg_absmax"].shape == (12,)
    assert (read_moment(state, "exp_avg_sq") - ((read_moment(state, "exp_avg") / 0.1) ** 2 * 0.001)).norm() < 0.05 * (
        read_moment(state, "exp_avg_sq").norm()
    )


def test_scale_is_a_learning_rate_of_projected_tensors():
    weight, gradients = normal(12, 20, dtype=F64), [normal(12, 20, seed=t, dtype=F64) for t in range(4)]
    options = dict(weight_decay=0.0, rank=4, optim_bits=32)
    scaled, _ = run(weight, gradients, lr=0.01, scale=0.3, **options)
    faster, _ = run(weight, gradients, lr=0.003, **options)
    assert (scaled - faster).abs().max() < 1e-14
    plain, _ = run(weight[0], [g[0] for g in gradients], lr=0.01, scale=0.3, weight_decay=0.0, rank=4)
    unscaled, _ = run(weight[0], [g[0] for g in gradients], lr=0.01, weight_decay=0.0)
    assert torch.equal(plain, unscaled)  # vectors are not projected


@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("tall", [True, False])
def test_weak_directions_survive_beside_strong_ones(ratio, tall):
    """Energies 1 to `ratio` in 8 directions: the direction-major layout keeps each one's Adam step to a few percent."""
    mix = torch.linalg.qr(normal(24, 8, seed=5)).Q
    energies = ratio ** torch.linspace(0, 1, 8)
    gradients = [mix @ (energies[:, None] * normal(8, 256, seed=t)) for t in range(30)]
    gradients = [gradient.T.contiguous() if tall else gradient for gradient in gradients]
    ends = []
    for bits in (8, 32):
        p = nn.Parameter(torch.zeros(gradients[0].shape))
        optimizer = LowRankAdamW([p], lr=1.0, weight_decay=0.0, rank=8, optim_bits=bits, min_8bit_size=0)
        for gradient in gradients:
            before, p.grad = p.detach().clone(), gradient
            optimizer.step()
        step = (p.detach() - before).T if tall else p.detach() - before
        ends.append(optimizer.state[p]["basis"].T @ step)
    eight, full = ends
    assert eight.abs().max() < 3 and full.abs().max() < 3
    errors = (eight - full).norm(dim=1) / full.norm(dim=1)
    assert errors.max() < 0.05


def test_a_second_moment_beside_a_much_larger_one_does_not_vanish():
    """All scales in one block: without the rounding up of v this makes steps of hundreds."""
    gradients = [normal(1, 256, seed=t) * torch.logspace(0, -5, 256) for t in range(20)]
    found, optimizer = run(torch.zeros(1, 256), gradients, lr=1.0, weight_decay=0.0, min_8bit_size=0)
    assert found.abs().max() < 20 * 3
    assert (next(iter(optimizer.state.values()))["exp_avg_sq"] > 0).all()


@pytest.mark.parametrize("refresh", ["rotate", "reset"])
def test_what_a_refresh_does_with_the_moments(refresh):
    weight, gradients = normal(12, 20, dtype=F64), [normal(12, 20, seed=t, dtype=F64) for t in range(8)]
    found, _ = run(weight, gradients, rank=4, update_proj_gap=3, refresh_moments=refresh, optim_bits=32, lr=0.01)
    assert (found - oracle(weight, gradients, rank=4, gap=3, refresh=refresh, lr=0.01)).abs().max() < 1e-11
    assert (found - oracle(weight, gradients, rank=4, gap=3, lr=0.01)).abs().max() > 1e-3
    eight, _ = run(weight, gradients, rank=4, update_proj_gap=3, refresh_moments=refresh, min_8bit_size=0, lr=0.01)
    assert (eight - found).norm() < 0.1 * (found - weight).norm()


@pytest.mark.parametrize("update", ["apollo", "frugal-sign", "frugal-sgd"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_apollo_and_frugal_are_the_oracles(update, shape):
    weight = normal(*shape, dtype=F64)
    gradients = [normal(*shape, seed=t, dtype=F64) * (1 + t) for t in range(6)]
    options = dict(lr=0.01, rank=3, scale=0.5, update=update)
    found, _ = run(weight, gradients, update_proj_gap=4, optim_bits=32, **options)
    assert (found - oracle(weight, gradients, gap=4, **options)).abs().max() < 1e-11
    assert torch.linalg.matrix_rank(found - weight) == 12


@pytest.mark.parametrize("span", [1 << 16, 512, 256])
def test_apollos_tensors_of_one_batch_are_as_each_alone(span, monkeypatch):
    monkeypatch.setitem(moments.SPAN, "cpu", span)
    shapes = [(12, 20), (20, 12), (8, 30), (40, 9), (9, 40)]
    gradients = [
        [normal(*shape, seed=10 * t + i, dtype=F64) * (1 + t) for t in range(5)] for i, shape in enumerate(shapes)
    ]
    options = dict(lr=0.01, rank=3, update="apollo", update_proj_gap=3, proj_refresh="svd", optim_bits=32)
    together = [parameter(*shape, seed=i, dtype=F64) for i, shape in enumerate(shapes)]
    alone = [run(p.detach(), own, **options)[0] for p, own in zip(together, gradients, strict=True)]
    optimizer = LowRankAdamW(together, **options)
    for t in range(5):
        for p, own in zip(together, gradients, strict=True):
            p.grad = own[t].clone()
        optimizer.step()
    assert all((p - other).abs().max() < 1e-12 for p, other in zip(together, alone, strict=True))


def test_the_randomized_basis_spans_what_the_svd_finds():
    gradient = (
        torch.linalg.qr(normal(60, 60)).Q * (0.7 ** torch.arange(60)) @ torch.linalg.qr(normal(90, 60, seed=1)).Q.T
    )
    exact, fast = (find_basis(gradient, 5, how, seed=0) for how in ("svd", "randomized"))
    assert torch.linalg.svdvals(exact.T @ fast).min() > 0.999
    assert torch.equal(fast, find_basis(gradient, 5, "randomized", seed=0))
    flat = normal(60, 90)  # a spectrum that hardly decays: the subspace is another, what it keeps hardly less
    kept = [
        float((find_basis(flat, 5, how, seed=0).T @ flat).square().sum()) for how in ("svd", "randomized", "random")
    ]
    assert 0.95 * kept[0] < kept[1] <= kept[0] * (1 + 1e-5) and kept[2] < 0.7 * kept[0]


@pytest.mark.parametrize("shape", [(8, 768), (12, 40), (40, 41)])
def test_the_randomized_basis_is_exact_up_to_eight_rows_below_the_short_side(shape):
    gradient = normal(*shape)
    rank = shape[0] - 8 if shape[0] > 8 else 4
    assert torch.equal(*(find_basis(gradient, rank, how, seed=3) for how in ("svd", "randomized")))
    assert not torch.equal(*(find_basis(normal(50, 60), 4, how, seed=3) for how in ("svd", "randomized")))


def test_the_default_refresh_is_the_randomized_one():
    weights = normal(64, 96), [normal(64, 96, seed=t) for t in range(3)]
    ends = {}
    for way in (None, "randomized", "svd"):
        p = nn.Parameter(weights[0].clone())
        optimizer = LowRankAdamW([p], rank=4, update_proj_gap=2, **({"proj_refresh": way} if way else {}))
        for p.grad in weights[1]:
            optimizer.step()
        ends[way] = p.detach()
    assert torch.equal(ends[None], ends["randomized"]) and not torch.equal(ends[None], ends["svd"])


@pytest.mark.parametrize("proj_refresh", ["svd", "randomized", "random"])
def test_the_global_random_state_is_left_alone(proj_refresh):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    steps(LowRankAdamW([parameter(20, 30)], rank=4, proj_refresh=proj_refresh), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_projection_waits_for_a_gradient_that_has_a_direction():
    p = parameter(8, 30)
    start = p.detach().clone()
    optimizer = LowRankAdamW([p], lr=0.01, weight_decay=0.1, rank=2, optim_bits=32)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"] == 0 and (p - start * (1 - 0.001)).abs().max() < 1e-7
    waited = p.detach().clone()
    gradients = [normal(8, 30, seed=t) for t in range(3)]
    for p.grad in gradients:
        optimizer.step()
    assert (p - oracle(waited, gradients, lr=0.01, weight_decay=0.1, rank=2)).abs().max() < 1e-5


def test_a_zero_gradient_at_a_later_refresh_keeps_the_basis():
    p = parameter(8, 30)
    steps(optimizer := LowRankAdamW([p], rank=2, update_proj_gap=2), 2)
    before = optimizer.state[p]["basis"].clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"] == 3 and torch.equal(optimizer.state[p]["basis"], before)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_zero_gradient_at_a_later_refresh_resets_the_moments_all_the_same(bits):
    weight, gradients = normal(8, 300, dtype=F64), [normal(8, 300, seed=t, dtype=F64) for t in range(4)]
    gradients[2] = torch.zeros(8, 300, dtype=F64)
    found, optimizer = run(
        weight, gradients[:3], lr=0.01, weight_decay=0.0, rank=2, update_proj_gap=2, refresh_moments="reset",
        optim_bits=bits, min_8bit_size=0,
    )  # fmt: skip
    (state,) = optimizer.state.values()
    assert not any(read_moment(state, key).any() for key in ("exp_avg", "exp_avg_sq"))
    before, _ = run(
        weight, gradients[:2], lr=0.01, weight_decay=0.0, rank=2, update_proj_gap=2, refresh_moments="reset",
        optim_bits=bits, min_8bit_size=0,
    )  # fmt: skip
    assert torch.equal(found, before)


@pytest.mark.parametrize("options", [{}, {"rank": 4, "proj_refresh": "randomized"}])
def test_pytorchs_defaults_change_nothing(options):
    weight, gradients = normal(16, 64), [normal(16, 64, seed=t) for t in range(2)]
    wanted, _ = run(weight, gradients, min_8bit_size=0, **options)
    dtype = torch.get_default_dtype()
    blockwise.code_book.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found, _ = run(weight, gradients, min_8bit_size=0, **options)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        blockwise.code_book.cache_clear()
    assert torch.equal(found, wanted)


def test_changes_from_outside_survive():
    p = parameter(8, 30)
    steps(optimizer := LowRankAdamW([p], lr=0.0, weight_decay=0.0, rank=2), 2)
    p.data.fill_(7.0)
    steps(optimizer, 1)
    assert (p == 7).all()


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"rank": 4, "update": "apollo"}, {"optim_bits": 32}])
def test_a_learning_rate_of_zero_moves_states_only(options):
    p = parameter(64, 96)
    start = p.detach().clone()
    optimizer = LowRankAdamW([p], lr=0.0, weight_decay=0.0, min_8bit_size=0, **options)
    steps(optimizer, 1)
    first = snapshot(optimizer)
    steps(optimizer, 1, 1)
    assert torch.equal(p, start) and not same(first["state"], optimizer.state_dict()["state"])


# Non-finite gradients.


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"optim_bits": 32}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(options, bad, caplog):
    params = [parameter(64, 96), parameter(10, seed=1)]
    optimizer = LowRankAdamW(params, min_8bit_size=0, **options)
    steps(optimizer, 2)
    before, weights = snapshot(optimizer), [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[3] = bad
    with caplog.at_level(logging.WARNING, "peftx"):
        optimizer.step()
    assert "not finite" in caplog.text and optimizer.skipped_steps == 1
    assert same(optimizer.state_dict()["state"], before["state"])
    assert all(torch.equal(p, weight) for p, weight in zip(params, weights, strict=True))
    fresh = LowRankAdamW([parameter(64, 96), parameter(10, seed=1)], min_8bit_size=0, **options)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped_steps == 1
    steps(optimizer, 1, 2)
    assert not torch.equal(params[0], weights[0])


@pytest.mark.parametrize("options", [
    {}, {"fused": True}, {"optim_bits": 32}, {"rank": 4}, {"rank": 4, "update": "apollo"},
    {"rank": 4, "proj_refresh": "randomized"}, {"rank": 4, "update": "frugal-sign"},
])  # fmt: skip
@pytest.mark.parametrize("size", [1e22, 3e38])
def test_gradients_whose_squares_overflow_leave_weights_and_states_finite(options, size):
    p = nn.Parameter(torch.zeros(16, 512))
    optimizer = LowRankAdamW([p], lr=1e-3, min_8bit_size=0, **options)
    for step in range(4):
        p.grad = normal(16, 512, seed=step).sign()
        p.grad[0] *= size if step < 2 else 1
        optimizer.step()
    assert p.isfinite().all() and 0 < p.abs().max() < 0.02
    assert all(value.isfinite().all() for value in optimizer.state[p].values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {}, {"rank": 4}, {"rank": 4, "update": "apollo"}, {"rank": 4, "proj_refresh": "randomized"},
])  # fmt: skip
def test_autocast_reaches_the_closure_but_not_the_step(options, dtype):
    x = normal(5, 64, dtype=dtype)
    found = []
    for inside in (False, True):
        p = parameter(16, 64, dtype=dtype)
        optimizer = LowRankAdamW([p], lr=0.01, min_8bit_size=0, **options)
        dtypes = set()

        def closure(p=p, dtypes=dtypes, inside=inside):
            mixed = torch.is_autocast_enabled("cpu") or not inside
            p.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                y = nn.functional.linear(x, p)
            dtypes.add(y.dtype)
            y.float().square().mean().backward()

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step(closure)
        assert dtypes == {torch.bfloat16}
        found.append((p.detach(), optimizer.state_dict()["state"]))
    assert same(*found)


def test_large_but_finite_gradients_are_not_skipped():
    p = parameter(64, 64)
    p.grad = torch.full_like(p, 1e19)  # their norm is not a finite fp32 number
    p.grad[0, 0] = 3e38
    optimizer = LowRankAdamW([p], optim_bits=32)
    optimizer.step()
    assert optimizer.skipped_steps == 0 and optimizer.state[p]["step"] == 1


# States: size, kinds, saving.


@pytest.mark.parametrize(("size", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_small_tensors_stay_32_bit(size, dtype):
    steps(optimizer := LowRankAdamW([p := parameter(size)]), 1)
    assert optimizer.state[p]["exp_avg"].dtype == dtype == optimizer.state[p]["exp_avg_sq"].dtype


def test_the_size_after_projection_decides():
    steps(optimizer := LowRankAdamW([p := parameter(8, 768)], rank=4), 1)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert round(state_bytes(optimizer) / p.numel(), 2) == round((8 * 4 * 768 + 4 * 8 * 4) / 6144, 2) == 4.02


@pytest.mark.parametrize("shape", [(8, 768), (768, 768), (100, 30), (5,), (2, 3, 5)])
@pytest.mark.parametrize("rank", [None, 2, 192])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("basis_bits", [32, 16])
def test_state_bytes_are_the_formulas(shape, rank, bits, basis_bits):
    p = parameter(*shape)
    options = dict(rank=rank, optim_bits=bits, min_8bit_size=0, basis_bits=basis_bits)
    optimizer = LowRankAdamW([p], proj_refresh="random", **options)
    steps(optimizer, 1)
    size, basis = p.numel(), 0
    if rank is not None and len(shape) == 2:
        r = min(rank, *shape)
        size, basis = r * max(shape), r * min(shape) * basis_bits // 8
    wanted = basis + (8 * size if bits == 32 else 2 * size + 2 * 4 * math.ceil(size / 256))
    assert state_bytes(optimizer) == wanted
    meta = LowRankAdamW([torch.empty(shape, device="meta", requires_grad=True)], **options)
    meta.allocate_states()
    assert state_bytes(meta) == wanted


def test_the_goals_for_large_matrices():
    sizes = {}
    for rank in (128, None):
        p = torch.empty(4096, 4096, device="meta", requires_grad=True)
        optimizer = LowRankAdamW([p], rank=rank)
        optimizer.allocate_states()
        sizes[rank] = state_bytes(optimizer) / p.numel()
    assert sizes[128] <= 0.30 and sizes[None] <= 2.1


@pytest.mark.parametrize(
    ("options", "size", "saved"),
    [
        ({}, 14_469_742_720, 0.732),
        ({"embedding_bits": 8}, 13_687_406_720, 0.746),
        ({"rank": 1024, "basis_bits": 16}, 6_483_001_472, 0.880),
        ({"rank": 1024, "basis_bits": 16, "embedding_bits": 8}, 5_700_665_472, 0.894),
    ],
)
def test_the_goals_for_llama_7b(options, size, saved):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B
    optimizer = create_optimizer(model, **options)
    optimizer.allocate_states()
    count = sum(p.numel() for p in model.parameters())
    assert state_bytes(optimizer) == size and round(1 - size / (8 * count), 3) == saved


def test_state_bytes_of_other_optimizers():
    p = parameter(64, 96)
    steps(adam := torch.optim.AdamW([p]), 1)
    assert state_bytes(adam) == 8 * p.numel() + 4
    steps(theirs := bitsandbytes.optim.AdamW8bit([p, parameter(64, 96)]), 1)
    assert state_bytes(theirs) == 2 * (2 * p.numel() + 2 * 4 * 24) + 2 * 1024


MIXED = ((64, 96), (96, 64), (8, 16), (7,))


def mixed(dtype: torch.dtype, **options) -> LowRankAdamW:
    params = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(MIXED)]
    groups = [{"params": params[:2], "rank": 4}, {"params": params[2:], "weight_decay": 0.0}]
    return LowRankAdamW(groups, lr=0.01, update_proj_gap=3, min_8bit_size=200, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"update": "apollo", "proj_refresh": "random"}, {"refresh_moments": "reset"}])
def test_resume_is_bit_equal(dtype, options, tmp_path):
    optimizer = mixed(dtype, **options)
    steps(optimizer, 4)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = {type(value) for state in optimizer.state_dict()["state"].values() for value in state.values()}
    assert kinds == {int, torch.Tensor}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = mixed(dtype)  # the options come with the state dict
    others = [p for group in resumed.param_groups for p in group["params"]]
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    resumed.load_state_dict(loaded)
    assert same(resumed.state_dict(), optimizer.state_dict())
    loaded["state"][0]["exp_avg"].zero_()  # nothing is shared
    assert same(resumed.state_dict(), optimizer.state_dict())
    steps(optimizer, 4, 4)
    steps(resumed, 4, 4)
    assert all(torch.equal(p, other) for p, other in zip(params, others, strict=True))
    assert same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_state_dicts_round_trip(flatten):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8)).bfloat16()
        return model, LowRankAdamW(model.parameters(), rank=4, min_8bit_size=200)

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build()
    steps(optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed = build()
    weights = [p.detach().clone() for p in other.parameters()]
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    assert all(torch.equal(p, weight) for p, weight in zip(other.parameters(), weights, strict=True))


def test_accelerate_prepares_an_optimizer_without_state_and_one_with():
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(64, 96)
    optimizer = LowRankAdamW(model.parameters(), rank=4)
    model, prepared = accelerator.prepare(model, optimizer)
    steps(prepared.optimizer, 2)
    before = snapshot(prepared)
    again = accelerator.prepare_optimizer(LowRankAdamW(model.parameters(), rank=4))
    again.load_state_dict(before)
    assert same(again.state_dict(), before)
    accelerator.free_memory()


# What is refused leaves everything as it was.

BROKEN = {
    "missing tensor": lambda d: d["state"][0].pop("exp_avg_absmax"),
    "extra tensor": lambda d: d["state"][0].update(more=torch.zeros(2)),
    "wrong shape": lambda d: d["state"][0].update(basis=torch.zeros(64, 5)),
    "wrong dtype": lambda d: d["state"][0].update(exp_avg=d["state"][0]["exp_avg"].float()),
    "nan": lambda d: d["state"][0]["exp_avg_absmax"].fill_(math.nan),
    "step as bool": lambda d: d["state"][0].update(step=True),
    "step as tensor": lambda d: d["state"][0].update(step=torch.tensor(4)),
    "negative step": lambda d: d["state"][3].update(step=-1),
    "last state broken": lambda d: d["state"][3].pop("step"),
    "no tensor": lambda d: d["state"][0].update(basis=[1.0]),
    "state is no mapping": lambda d: d["state"].update({0: 3}),
    "unknown parameter": lambda d: d["state"].update({17: d["state"][0]}),
    "other rank": lambda d: d["param_groups"][0].update(rank=5),
    "bad option": lambda d: d["param_groups"][1].update(optim_bits=4),
    "group missing": lambda d: d["param_groups"].pop(),
    "group shorter": lambda d: d["param_groups"][1]["params"].pop(),
    "no groups": lambda d: d.pop("param_groups"),
    "no state": lambda d: d.pop("state"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_broken_state_dict_is_refused_and_nothing_changes(damage):
    optimizer = mixed(torch.float32)
    steps(optimizer, 2)
    before = snapshot(optimizer)
    broken = snapshot(optimizer)
    broken["param_groups"][0]["lr"] = 99.0
    damage(broken)
    with pytest.raises(ValueError, match="state|optim_bits"):
        optimizer.load_state_dict(broken)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, bitsandbytes.optim.AdamW8bit])
def test_the_state_dict_of_another_optimizer_is_refused(cls):
    p = parameter(64, 96)
    steps(other := cls([nn.Parameter(p.detach().clone())], lr=0.1), 2)
    optimizer = LowRankAdamW([p], lr=0.01)
    steps(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="another optimizer's"):
        optimizer.load_state_dict(other.state_dict())
    assert same(optimizer.state_dict(), before)


def test_states_of_other_names_are_refused():
    a, b = parameter(8, 8), parameter(8, 8, seed=1)
    saved = LowRankAdamW([("a", a), ("b", b)]).state_dict()
    with pytest.raises(ValueError, match="'a' where the optimizer has 'b'"):
        LowRankAdamW([("b", b), ("a", a)]).load_state_dict(saved)
    LowRankAdamW([a, b]).load_state_dict(saved)


@pytest.mark.parametrize("wrapper", ["_orig_mod.0.weight", "module.0.weight", "0._fsdp_wrapped_module.weight"])
def test_states_of_a_wrapped_model_are_loaded(wrapper):
    saved, bare = LowRankAdamW([(wrapper, parameter(8, 8))]), LowRankAdamW([("0.weight", parameter(8, 8))])
    steps(saved, 1)
    steps(bare, 1)
    for source, target in ((saved, bare), (bare, saved)):
        names = target.param_groups[0]["param_names"]
        target.load_state_dict(source.state_dict())
        assert target.param_groups[0]["param_names"] == names
        assert same(target.state_dict()["state"], source.state_dict()["state"])


def test_hooks_see_the_state_dict_before_the_check_and_the_state_after():
    source = LowRankAdamW([("old", parameter(64, 96))])
    steps(source, 2)
    optimizer, seen = LowRankAdamW([("new", parameter(64, 96))]), []

    def rename(optimizer, state_dict):
        state_dict["param_groups"] = [{**group, "param_names": ["new"]} for group in state_dict["param_groups"]]

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: {**state_dict})
    optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append(snapshot(optimizer)["state"]))
    saved = source.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["param_groups"][0]["param_names"] == ["old"]
    assert len(seen) == 1 and same(seen[0], saved["state"])


def test_numpys_numbers_are_numbers(tmp_path):
    numbers = dict(
        lr=np.float32(0.5), betas=(np.float64(0.5), np.float32(0.75)), rank=np.int64(2), min_8bit_size=np.int32(0)
    )
    optimizer = LowRankAdamW([parameter(8, 300)], **numbers)
    optimizer.add_param_group({"params": [parameter(8, 300)], "scale": np.float32(0.25), "rank": np.float64(0.5)})
    steps(optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    first, second = torch.load(tmp_path / "saved", weights_only=True)["param_groups"]
    assert (first["lr"], first["betas"], first["rank"], second["scale"], second["rank"]) == (
        0.5, (0.5, 0.75), 2, 0.25, 0.5,
    )  # fmt: skip


BAD = [
    *[("lr", bad) for bad in (-1.0, torch.ones(2), torch.tensor(math.nan), torch.tensor(1), "0.1", None)],
    *[("betas", bad) for bad in ((0.9, 1.0), (0.9,), 0.9, (0.9, math.nan), (0.9, 0.99, 0.999))],
    *[("betas", bad) for bad in (("0.9", 0.9), (True, 0.9), {0.9, 0.99}, (0.9, 1.1), (-0.1, 0.9), "ab", None)],
    *[("eps", bad) for bad in (-1e-8, 0.0, 1e-40)],
    *[("weight_decay", bad) for bad in (-0.1, None)],
    *[("rank", bad) for bad in (0, -1, 2.5, 1.0, 0.0, False, True, math.nan, math.inf, "4", (4,))],
    *[("update_proj_gap", bad) for bad in (0, 1.5, 200.0, True, math.inf, None)],
    *[("min_8bit_size", bad) for bad in (-1, 4096.0, True, None)],
    *[("optim_bits", bad) for bad in (4, "8", 8.0, True, None)],
    *[("basis_bits", bad) for bad in (8, 16.0, None)],
    *[(name, bad) for name in ("lr", "eps", "weight_decay", "scale") for bad in (math.nan, math.inf, 1e300)],
    *[(name, bad) for name in ("lr", "eps", "weight_decay", "scale") for bad in (True, "1", 1j)],
    ("scale", -1.0), ("proj_refresh", "qr"), ("proj_refresh", 1), ("refresh_moments", "drop"), ("update", "adam"),
    ("update", None), ("fused", "yes"), ("fused", 1), ("fused", 0.0),
    *[("bf16_stochastic_round", bad) for bad in (1, "yes", None)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}={value}" for name, value in BAD])
def test_bad_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        LowRankAdamW([parameter(4)], **{name: value})
    optimizer = LowRankAdamW([parameter(4)])
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.add_param_group({"params": [parameter(4)], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("name", "value"), [("lr", math.nan), ("betas", (1.0, 0.9)), ("weight_decay", math.inf)])
def test_what_a_schedule_sets_is_refused_before_the_step(name, value):
    params = [parameter(64, 96), parameter(4, seed=1)]
    optimizer = LowRankAdamW([{"params": p} for p in params])
    steps(optimizer, 1)
    before, weights = snapshot(optimizer)["state"], [p.detach().clone() for p in params]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"{name} must be"):
        steps(optimizer, 1, 1)
    assert same(optimizer.state_dict()["state"], before) and same([p.detach() for p in params], weights)


def test_a_smallest_eps_leaves_elements_without_gradient_alone():
    weight, gradient = normal(64), torch.zeros(64)
    found, _ = run(weight, [gradient] * 2, eps=1e-30, weight_decay=0.0)
    assert torch.equal(found, weight)


@pytest.fixture
def process_group():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"rank": 4}])
def test_sharded_parameters_are_refused_when_they_are_given_and_before_the_first_step(options, process_group):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    early = LowRankAdamW(model.parameters(), **options)
    fully_shard(model)
    with pytest.raises(NotImplementedError, match="FSDP2.*Use DDP"):
        LowRankAdamW(model.parameters(), **options)
    early.param_groups[0]["params"] = list(model.parameters())  # what accelerate does with an optimizer made before
    model(torch.ones(2, 16)).sum().backward()
    before = [p.full_tensor().clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match="FSDP2.*Use DDP"):
        early.step()
    assert not early.state
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))


def test_bad_parameters_are_refused():
    p = parameter(4)
    complex_one = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex64"):
        LowRankAdamW([p, complex_one])
    with pytest.raises(ValueError, match="int64"):
        LowRankAdamW([torch.zeros(4, dtype=torch.long)])
    with pytest.raises(ValueError, match="more than once"):
        LowRankAdamW([p, p])
    with pytest.raises(TypeError, match="str"):
        LowRankAdamW(["weight"])
    with pytest.raises(TypeError, match="order"):
        LowRankAdamW([{"params": {p}}])
    optimizer = LowRankAdamW([p])
    for params in ([p], [complex_one], [parameter(3)] * 2):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty"):
        LowRankAdamW([])


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding, p = nn.Embedding(10, 4, sparse=True), parameter(4)
    optimizer = LowRankAdamW([p, embedding.weight])
    (embedding(torch.tensor([1, 2])).sum() + p.sum()).backward()
    start = p.detach().clone()
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()
    assert torch.equal(p, start) and not optimizer.state


def test_an_optimizers_usual_manners():
    p = parameter(8, 8)
    start = p.detach().clone()
    optimizer = LowRankAdamW(iter([p]), lr=torch.tensor(0.01))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss.detach()

    first, second = float(optimizer.step(closure)), float(optimizer.step(closure))
    assert second < first == float((start**2).sum())
    optimizer.zero_grad(set_to_none=True)
    assert p.grad is None
    moved = p.detach().clone()
    assert optimizer.step() is None and torch.equal(p, moved) and optimizer.state[p]["step"] == 2
    q = parameter(3)
    optimizer.add_param_group({"params": q, "lr": 0.1, "rank": 1})
    q.grad = torch.ones(3)
    before = q.detach().clone()
    optimizer.step()
    assert (q - (before * (1 - 0.1 * 0.01) - 0.1)).abs().max() < 1e-6 and torch.equal(p, moved)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    optimizer.step()
    scheduler.step()
    before = q.detach().clone()
    optimizer.step()
    assert torch.equal(q, before)
    copy.deepcopy(optimizer).step()


# What is logged.


def test_one_line_tells_what_became_of_the_tensors(caplog):
    with caplog.at_level(logging.INFO, "peftx"):
        steps(optimizer := mixed(torch.float32), 3)
    (record,) = caplog.records
    found = summarize(optimizer)
    assert record.levelno == logging.INFO
    assert (found.eight_bit, found.full, found.small, found.projected, found.rotated) == (2, 2, 2, 2, 0)
    assert found.bytes == state_bytes(optimizer)
    assert found.adamw_bytes == 8 * sum(math.prod(shape) for shape in MIXED)
    assert "2 tensors with 8-bit states, 2 with 32-bit states (2 of them smaller than min_8bit_size)" in record.message
    assert "min_8bit_size=0" in record.message


def test_a_lora_whose_states_all_stay_32_bit_is_warned_about(caplog):
    steps(LowRankAdamW([parameter(8, 256), parameter(256, 8)]), 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "0 tensors with 8-bit states" in record.message
    caplog.clear()
    with caplog.at_level(logging.INFO, "peftx"):
        steps(LowRankAdamW([parameter(8, 256)], rank=8, optim_bits=32), 1)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "at full rank, which saves nothing" in record.message


# bitsandbytes' kernel, whose CPU version has the same interface as the fused one.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_is_bitsandbytes(dtype):
    ours, theirs = (parameter(64, 96, dtype=dtype) for _ in range(2))
    optimizer = LowRankAdamW([ours], lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6, fused=True)
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)
    for each in (optimizer, reference):
        steps(each, 5)
    state, wanted = optimizer.state[ours], reference.state[theirs]
    assert torch.equal(ours, theirs) and torch.equal(state["exp_avg"], wanted["state1"])
    assert torch.equal(state["exp_avg_sq"], wanted["state2"]) and torch.equal(
        state["exp_avg_absmax"], wanted["absmax1"]
    )
    pure = parameter(64, 96, dtype=dtype)
    steps(LowRankAdamW([pure], lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6), 5)
    start = parameter(64, 96, dtype=dtype)
    assert (pure - ours).double().norm() < 0.02 * (ours - start).double().norm()


def test_the_fused_step_leaves_to_us_what_it_cannot_do(monkeypatch):
    calls = []
    real = fused.bitsandbytes_update()
    monkeypatch.setattr(fused, "bitsandbytes_update", lambda: lambda *args: (calls.append(args), real(*args)))
    small, projected, dense = parameter(8), parameter(64, 96), parameter(96, 64)
    turned = nn.Parameter(normal(96, 64).T)
    double = parameter(64, 96, dtype=F64)
    groups = [{"params": [projected], "rank": 4}, {"params": [small, dense, turned, double]}]
    steps(LowRankAdamW(groups, fused=True), 1)
    assert len(calls) == 1 and calls[0][2].data_ptr() == dense.data_ptr()


def test_bitsandbytes_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    fused.bitsandbytes_update.cache_clear()
    try:
        p = parameter(64, 96)
        steps(LowRankAdamW([p]), 2)
        with pytest.raises(ImportError, match="pip install bitsandbytes"):
            LowRankAdamW([p], fused=True)
    finally:
        fused.bitsandbytes_update.cache_clear()


def test_the_package_is_an_attribute():
    import peftx

    assert peftx.optim is sys.modules["peftx.optim"]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = peftx.nonsense


def test_sharded_parameters_are_refused():
    class Sharded(nn.Parameter):
        device_mesh = None

    with pytest.raises(NotImplementedError, match="DTensor"):
        LowRankAdamW([Sharded(torch.zeros(4))])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"fused": False}])
def test_cuda_walks_the_same_way(options):
    ends = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(normal(128, 96).to(device))
        optimizer = LowRankAdamW([p], lr=1e-3, **options)
        for t in range(10):
            p.grad = normal(128, 96, seed=t).to(device)
            optimizer.step()
        ends.append(p.detach().cpu())
    assert (ends[0] - ends[1]).abs().max() < 1e-3
