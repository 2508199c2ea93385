"""Stochastic rounding of bf16 weights: its law against exact neighbours, every path of a step, resume to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

from peftx.optim import LowRankAdamW, moments
from peftx.optim.rounding import seed_of, write

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest bf16 number of at most x and the smallest of at least x, in fp64, stepped to from the nearest."""
    near = x.to(BF16)
    below = torch.where(near.double() > x.double(), torch.nextafter(near, torch.full_like(near, -math.inf)), near)
    above = torch.where(near.double() < x.double(), torch.nextafter(near, torch.full_like(near, math.inf)), near)
    return below.double(), above.double()


def rounded(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    write(found := torch.empty(x.shape, dtype=BF16), x, seed)
    return found


@pytest.mark.parametrize("value", [1.0001, -1.0001, 0.9999, -3.14159, 1e-3, 7.7e33, -1.234e-39, 255.5])
def test_a_number_becomes_one_of_its_neighbours_by_its_distance(value):
    count = 200_000
    x = torch.full((count,), value)
    below, above = (bound[0].item() for bound in neighbours(x[:1]))
    found = rounded(x).double()
    assert set(found.tolist()) == {below, above}
    share, wanted = (found == above).double().mean().item(), (x[0].item() - below) / (above - below)
    assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / count)


def test_the_law_has_no_exception_among_all_lower_halves():
    lower = torch.arange(1 << 16, dtype=torch.int32)
    x = (0x3F80_0000 + lower).view(torch.float32).expand(64, -1).contiguous()
    up = (rounded(x).double() > 1).double()
    wanted = lower.double() / 65536
    variance = wanted * (1 - wanted) / 64
    assert not up[:, 0].any()  # a bf16 number stays itself
    assert ((up.mean(0) - wanted).square().sum() / variance.sum()).item() == pytest.approx(1, abs=0.05)
    assert abs(up.mean() - 0.5) < 5 * 0.5 / math.sqrt(x.numel())


def test_what_has_no_two_neighbours_is_rounded_to_the_nearest():
    largest = torch.finfo(BF16).max
    x = torch.tensor([math.inf, -math.inf, largest, -largest, 3.3895e38, 3.4e38, 0.0, -0.0, 1.5])
    for seed in range(8):
        assert torch.equal(rounded(x, seed), x.to(BF16)) and rounded(x, seed)[7].signbit()
    payload = torch.tensor([0x7FFF_FFFF, 0x7F80_0001, -1], dtype=torch.int32).view(torch.float32)
    assert all(rounded(payload, seed).isnan().all() for seed in range(8))  # a carry must not make a number of it


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5), (0,)])
def test_any_shape_and_any_strides(shape):
    x = normal(*shape)
    below, above = neighbours(x)
    found = rounded(x).double()
    assert ((found == below) | (found == above)).all()
    x = normal(30, 7).T
    onto = torch.empty(30, 7, dtype=BF16).T
    write(onto, x, 3)
    below, above = neighbours(x)
    assert ((onto == below) | (onto == above)).all()


def test_without_a_seed_and_for_other_dtypes_it_is_the_nearest():
    x = normal(500)
    for dtype, seed in ((BF16, None), (torch.float16, 1), (torch.float32, 1)):
        write(onto := torch.empty(500, dtype=dtype), x, seed)
        assert torch.equal(onto, x.to(dtype))


def test_seeds_depend_on_every_number_and_their_order():
    found = {seed_of(a, b) & 0xFFFF_FFFF for a in range(300) for b in range(300)}
    assert len(found) > 90_000 - 10  # two collisions are expected among as many random words of 32 bits
    assert seed_of(1, 2) != seed_of(2, 1) and seed_of(0) != seed_of(0, 0) and 0 <= seed_of(7) < 1 << 64


# Steps.

PATHS = {
    "8-bit": {},
    "32-bit": {"optim_bits": 32},
    "fused": {"fused": True},
    "projected": {"rank": 4},
    "projected 32-bit": {"rank": 4, "optim_bits": 32},
    "apollo": {"rank": 4, "update": "apollo", "proj_refresh": "random"},
    "frugal": {"rank": 4, "update": "frugal-sign", "refresh_moments": "reset"},
}
SHAPES = ((64, 96), (96, 64), (64, 96), (30,), (5, 6, 7))


def params(dtype: torch.dtype = BF16, turned: bool = False) -> list[nn.Parameter]:
    found = [normal(*shape, seed=i).to(BF16).to(dtype) for i, shape in enumerate(SHAPES)]
    found[1] = found[1].T.contiguous().T if turned else found[1]
    return [nn.Parameter(p) for p in found]


def steps(optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    for t in range(start, start + count):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = normal(*p.shape, seed=1000 * t + i).to(BF16).to(p.dtype)
        optimizer.step()


def adamw(params: list[nn.Parameter], stochastic: bool = True, **options) -> LowRankAdamW:
    options = {"lr": 1e-3, "min_8bit_size": 200, "weight_decay": 0.1, **options}
    return LowRankAdamW(params, bf16_stochastic_round=stochastic, **options)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_step_ends_on_a_neighbour_of_the_fp32_step_and_is_right_in_the_mean(options, turned, monkeypatch):
    monkeypatch.setitem(moments.SPAN, "cpu", 2048)  # in pieces, too
    ours, exact = params(turned=turned), params(torch.float32, turned)
    steps(adamw(ours, **options), 1)
    steps(adamw(exact, **options), 1)
    errors = []
    for p, q in zip(ours, exact, strict=True):
        below, above = neighbours(q.detach())
        width = torch.where(above > below, above - below, 1)
        slack = 1e-4 * width  # fp32 sums in another order
        assert ((p.double() >= below - slack) & (p.double() <= above + slack)).all()
        errors.append(((p.double() - q.double()) / width).flatten())
    error = torch.cat(errors).detach()
    assert abs(error.mean()) < 5 * 0.5 / math.sqrt(len(error)) and error.abs().max() > 0.6  # the nearest: at most 0.5


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_a_weight_of_one_moves_at_a_small_rate(options):
    """As fp32's does; rounded to the nearest, it stays where it is for ever."""
    ends = {}
    for name, dtype, stochastic in (("exact", torch.float32, False), ("nearest", BF16, False), ("ours", BF16, True)):
        p = nn.Parameter(torch.ones(64, 96, dtype=dtype))
        optimizer = adamw([p], stochastic, lr=1e-4, weight_decay=0.0, **options)
        for _ in range(40):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[name] = p.detach().double()
    moved = 1 - ends["exact"]
    assert moved.mean() > 5e-5
    assert (ends["nearest"] == 1).all()
    spread = math.sqrt(moved.mean().item() / 256 / p.numel())  # of the mean of variables of two values, 1 / 256 apart
    assert (1 - ends["ours"]).mean().item() == pytest.approx(moved.mean().item(), abs=6 * spread)


def test_decay_alone_is_stochastic_too():
    p = nn.Parameter(torch.ones(64, 96, dtype=BF16))
    optimizer = adamw([p], rank=4, lr=1e-3, weight_decay=0.1)
    for _ in range(50):
        p.grad = torch.zeros_like(p)  # no direction yet: the projection waits
        optimizer.step()
    assert (1 - p.double()).mean().item() == pytest.approx(50e-4, rel=0.1)
    assert not torch.equal(p[:32], p[32:])


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_it_goes_on_to_the_bit_after_a_resume_and_leaves_the_global_generator_alone(options, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    whole = adamw(params(), **options)
    steps(whole, 3)
    half = [p.detach().clone() for p in whole.param_groups[0]["params"]]
    torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
    steps(whole, 3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    resumed = adamw([nn.Parameter(p) for p in half], stochastic=False)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(resumed, 3, 3)
    pairs = zip(resumed.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert resumed.param_groups[0]["rounded_steps"] == 6


def test_noise_differs_from_step_to_step_and_from_tensor_to_tensor():
    """Or errors of equal sign would add up."""
    tensors = [nn.Parameter(torch.ones(64, 64, dtype=BF16)) for _ in range(2)]
    optimizer = adamw(tensors, lr=1e-3, weight_decay=0.0)
    seen = []
    for _ in range(2):
        for p in tensors:
            p.data.fill_(1)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [(p.detach() < 1).double().flatten() for p in tensors]
    correlation = torch.corrcoef(torch.stack(seen)) - torch.eye(4)
    assert correlation.abs().max() < 5 / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_untouched_by_the_option(dtype):
    plain, ours = params(dtype), params(dtype)
    steps(adamw(plain, False), 3)
    steps(adamw(ours), 3)
    assert all(torch.equal(p, q) for p, q in zip(plain, ours, strict=True))


def test_by_default_bf16_is_rounded_to_the_nearest():
    ours, exact = params(), params(torch.float32)
    steps(LowRankAdamW(ours, optim_bits=32), 1)
    steps(LowRankAdamW(exact, optim_bits=32), 1)
    assert all(torch.equal(p, q.to(BF16)) for p, q in zip(ours, exact, strict=True))


def test_state_dicts_from_before_the_option_are_loaded():
    optimizer = adamw(params(), stochastic=False)
    steps(optimizer, 1)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["bf16_stochastic_round"], group["rounded_steps"]
    for stochastic in (False, True):  # the file says nothing about it, so what is asked for now holds
        fresh = adamw(params(), stochastic)
        fresh.load_state_dict(old)
        (group,) = fresh.param_groups
        assert (group["bf16_stochastic_round"], group["rounded_steps"]) == (stochastic, 0)
        steps(fresh, 1, 1)
        assert fresh.param_groups[0]["rounded_steps"] == int(stochastic)


def test_a_skipped_step_draws_nothing():
    ours, twin = params(), params()
    first, second = adamw(ours), adamw(twin)
    for p in ours:
        p.grad = torch.full_like(p, math.nan)
    first.step()
    steps(first, 2)
    steps(second, 2)
    assert all(torch.equal(p, q) for p, q in zip(ours, twin, strict=True))
