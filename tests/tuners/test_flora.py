"""The invariants of FLoRA, against the explicit Tucker sum and PyTorch's own layers, in float64. What holds for every
method (merging, quantised bases, files) is tested for FLoRA's linear layers with the others'."""

import copy
import itertools
import json
import warnings

import peft
import pytest
import torch
import transformers
from conftest import MLP
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftx
from peftx.adapters.sites import ConvSite, EmbeddingSite, LinearSite
from peftx.tuners.flora import Flora, FloraLayer, lora_pair, mode_ranks, start

# i, o and the kernel's axes, as in the paper: core abcde, factors ia ob pc qd te
EINSUM = {2: "ab,ia,ob->oi", 3: "abc,ia,ob,pc->oip", 4: "abcd,ia,ob,pc,qd->oipq", 5: "abcde,ia,ob,pc,qd,te->oipqt"}
NAMES = ("A", "B", "K", "L", "M")
PATHS = {"dense": (True, None), "reduced": (False, (0, 1)), "direct": (False, (1, 0))}


def factors(layer, name="default"):
    adapter = layer.adapters[name]
    return [getattr(adapter, n).detach() for n in NAMES if hasattr(adapter, n)]


def oracle(layer, scale, name="default"):
    """The delta as one sum, (out, in, kernel axes); of an embedding (d, V)."""
    parts = factors(layer, name)
    return scale * torch.einsum(EINSUM[len(parts)], layer.adapters[name].G.detach(), *parts)


def adapt(base, seed=0, **kwargs):
    """A FLoRA layer around `base` in float64 whose delta is not zero."""
    torch.manual_seed(seed)
    config = peftx.FloraConfig(**{"r": 2, "init_weights": False, **kwargs})
    return FloraLayer(base.double().requires_grad_(False), "default", config).double()


LAYERS = {
    "Linear": lambda: (nn.Linear(12, 10), torch.randn(3, 5, 12)),
    "Conv1D": lambda: (Conv1D(10, 12), torch.randn(3, 5, 12)),
    "Embedding": lambda: (nn.Embedding(20, 6), torch.randint(20, (3, 5))),
    "Conv1d": lambda: (nn.Conv1d(6, 8, 3, padding=1), torch.randn(3, 6, 9)),
    "Conv2d": lambda: (nn.Conv2d(6, 8, (3, 2), stride=2), torch.randn(3, 6, 9, 8)),
    "Conv2d 1x1": lambda: (nn.Conv2d(6, 8, 1), torch.randn(3, 6, 5, 4)),
    "Conv2d patches": lambda: (nn.Conv2d(3, 8, 4, stride=4), torch.randn(2, 3, 8, 8)),
    "Conv2d groups": lambda: (nn.Conv2d(6, 8, 3, groups=2, bias=False), torch.randn(3, 6, 7, 7)),
    "Conv2d depthwise": lambda: (nn.Conv2d(6, 6, 7, padding=3, groups=6), torch.randn(2, 6, 8, 8)),
    "Conv3d": lambda: (nn.Conv3d(4, 6, (2, 3, 2), padding=1), torch.randn(2, 4, 4, 5, 4)),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    """A base layer and an input, in float64."""
    torch.manual_seed(0)
    base, x = LAYERS[request.param]()
    return base.double(), x.double() if x.is_floating_point() else x


def dense(base, delta):
    """A copy of `base` with the delta, (out, in, ...), in its weight."""
    base = copy.deepcopy(base).requires_grad_()
    base.weight.data += delta.T if isinstance(base, (Conv1D, nn.Embedding)) else delta
    return base


def force(monkeypatch, path):
    """Makes convolutions take one of their three paths."""
    is_dense, costs = PATHS[path]
    default = Flora.prefers_dense
    monkeypatch.setattr(
        Flora, "prefers_dense", lambda self, n: is_dense if isinstance(self.site, ConvSite) else default(self, n)
    )
    if costs:
        monkeypatch.setattr(ConvSite, "_costs", lambda *_: costs)


# The delta


def test_delta_is_the_tucker_sum(layer):
    adapted = adapt(layer[0], scale=0.7)
    delta = adapted.adapters["default"].delta_weight().detach()
    torch.testing.assert_close(delta, oracle(adapted, 0.7), rtol=0, atol=1e-12)
    stored = adapted.get_delta_weight("default")
    assert stored.shape == layer[0].weight.shape and stored.dtype == torch.float64


@given(modes=st.lists(st.integers(1, 5), min_size=2, max_size=5), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_lora_pair_of_any_core_is_its_delta(modes, data):
    ranks = [data.draw(st.integers(1, size)) for size in modes]
    G = torch.randn(ranks, dtype=torch.float64)
    parts = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(modes, ranks, strict=True)]
    down, up = lora_pair(G, *parts)
    delta = torch.einsum(EINSUM[len(modes)], G, *parts)
    torch.testing.assert_close(torch.tensordot(up, down, 1), delta)
    assert up.shape[1] == len(down) <= min(ranks[1], G.numel() // ranks[1])


def test_multilinear_rank_is_that_of_the_core():
    adapted = adapt(nn.Conv2d(9, 11, (4, 3)), r=[3, 4, 2, 1])
    delta = adapted.adapters["default"].delta_weight().detach().transpose(0, 1)
    unfoldings = [delta.movedim(mode, 0).flatten(1) for mode in range(4)]
    assert [int(torch.linalg.matrix_rank(unfolding)) for unfolding in unfoldings] == [3, 4, 2, 1]


def test_gauge_freedom(layer):
    adapted = adapt(layer[0])
    delta = adapted.adapters["default"].delta_weight().detach()
    for mode, name in enumerate(NAMES[: len(factors(adapted))]):
        factor, core = getattr(adapted.adapters["default"], name), adapted.adapters["default"].G
        Q = torch.randn(factor.shape[1], factor.shape[1], dtype=torch.float64)
        factor.data = factor.data @ Q
        core.data = torch.tensordot(torch.linalg.inv(Q), core.data, ([1], [mode])).movedim(0, mode)
    torch.testing.assert_close(adapted.adapters["default"].delta_weight().detach(), delta)


def test_an_identity_core_is_lora():
    adapted = adapt(nn.Linear(12, 10), r=3)
    adapted.adapters["default"].G.data = torch.eye(3, dtype=torch.float64)
    lora = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(adapted.base_layer)), peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"])
    ).double()
    lora.base_model.model[0].lora_A["default"].weight.data = adapted.adapters["default"].A.T
    lora.base_model.model[0].lora_B["default"].weight.data = adapted.adapters["default"].B.data
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), lora(x))


@pytest.mark.parametrize("config, factor", [({"scale": 3}, 3), ({"alpha": 6}, 2), ({"alpha": 6, "r": [2, 4]}, 1.5)])
def test_the_constant_is_scale_or_alpha_over_rank(config, factor):
    for base, default in ((nn.Linear(12, 10), 1.0), (nn.Conv2d(4, 6, 3), 4.0)):
        torch.testing.assert_close(
            adapt(base, r=3).adapters["default"].delta_weight(), oracle(adapt(base, r=3), default)
        )
        adapted = adapt(base, **{"r": 3, **config})
        delta = adapted.adapters["default"].delta_weight()
        torch.testing.assert_close(delta, oracle(adapted, factor))
        twice = adapt(base, **{"r": 3, **{name: 2 * value if name != "r" else value for name, value in config.items()}})
        torch.testing.assert_close(
            twice.adapters["default"].delta_weight(), 2 * adapted.adapters["default"].delta_weight()
        )


# The forward


@pytest.mark.parametrize("path", PATHS)
def test_forward_gradients_and_merge_equal_the_dense_layer(monkeypatch, layer, path):
    base, x = layer
    if not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and path != "direct":
        pytest.skip("only convolutions choose between these forward paths")
    force(monkeypatch, path)
    adapted = adapt(base, scale=0.5)
    wanted = dense(base, oracle(adapted, 0.5))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    assert len(parameters) == 1 + len(factors(adapted))
    y = adapted(x)
    torch.testing.assert_close(y, wanted(x), rtol=0, atol=1e-12)

    g = torch.randn_like(y)
    found = torch.autograd.grad(y, parameters, g)
    weight_grad = torch.autograd.grad(wanted(x), wanted.weight, g)[0]
    weight_grad = weight_grad.T if isinstance(base, (Conv1D, nn.Embedding)) else weight_grad
    parts = [p.detach().clone().requires_grad_() for p in parameters]
    delta = 0.5 * torch.einsum(EINSUM[len(parts) - 1], *parts)
    for mine, theirs in zip(found, torch.autograd.grad(delta, parts, weight_grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)

    before = base.weight.detach().clone()
    adapted.merge(safe_merge=True)
    torch.testing.assert_close(adapted(x), y, rtol=0, atol=1e-12)
    adapted.unmerge()
    torch.testing.assert_close(base.weight.detach(), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@given(
    groups=st.sampled_from([1, 2, 8]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    dilation=st.sampled_from([1, 2]),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    kernel=st.sampled_from([1, 3, (3, 2), (1, 5)]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_every_kind_of_convolution(path, groups, kernel, padding, stride, **options):
    if padding == "same":
        stride = 1
    base = nn.Conv2d(8, 16, kernel, stride=stride, padding=padding, groups=groups, **options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(monkeypatch, path)
        adapted = adapt(base, r=[4, 3], scale=0.5)
        x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
        wanted = dense(base, oracle(adapted, 0.5))(x)
        torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-11)
        torch.testing.assert_close(adapted(x[0]), wanted[0], rtol=0, atol=1e-11)  # without a batch axis
        last = adapted(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, wanted, rtol=0, atol=1e-11)
        assert adapted(x[:0]).shape == (0, *wanted.shape[1:])


def test_the_cheapest_path_is_taken(monkeypatch):
    calls = []
    convolve = ConvSite.project
    monkeypatch.setattr(
        ConvSite, "project", lambda self, x, w, b=None: calls.append(w.shape) or convolve(self, x, w, b)
    )

    def weights(*args, r=4, size=16, **kwargs):
        calls.clear()
        adapt(nn.Conv2d(*args, **kwargs), r=r)(torch.randn(8, args[0], size, size, dtype=torch.float64))
        return [tuple(shape) for shape in calls]

    assert weights(64, 64, 3, padding=1) == [(4, 4, 3, 3)]  # channels reduced first
    assert weights(64, 64, 1) == [(4, 64, 1, 1)]  # by the convolution itself
    assert weights(64, 64, 4, stride=4) == [(4, 64, 4, 4)]
    assert weights(64, 64, 7, padding=3, groups=64) == [(64, 1, 7, 7)]  # the adapted weight in one convolution
    assert weights(8, 8, 3, r=8, size=32) == [(8, 8, 3, 3)]
    with torch.no_grad():
        assert adapt(nn.Linear(64, 64), r=32).adapters["default"].prefers_dense(10**4)
        assert not adapt(nn.Linear(64, 64), r=4).adapters["default"].prefers_dense(10**4)


def test_gradients_are_those_of_finite_differences():
    adapted, x = adapt(nn.Conv2d(4, 6, 3, groups=2, padding=1)), torch.randn(2, 4, 4, 3, dtype=torch.float64)
    names, values = zip(*((n, p) for n, p in adapted.named_parameters() if "flora" in n), strict=True)

    def output(x, *values):
        return torch.func.functional_call(adapted, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *values))


def test_dropout_acts_in_training_only():
    for base, x in (make() for make in LAYERS.values()):
        x = x.double() if x.is_floating_point() else x
        plain, dropping = (adapt(base, flora_dropout=p) for p in (0.0, 0.5))
        assert torch.equal(dropping.eval()(x), plain.eval()(x)) and torch.equal(plain.train()(x), plain.eval()(x))
        dropping.train()
        delta = (plain(x) - base(x)).detach()
        torch.manual_seed(0)
        noisy = torch.stack([(dropping(x) - base(x)).detach() for _ in range(300)])
        assert not torch.allclose(noisy[0], noisy[1])
        spread = noisy.std(0) / len(noisy) ** 0.5
        assert ((noisy.mean(0) - delta).abs() <= 6 * spread + 1e-9).all()  # the base path drops nothing
        dropping.enable_adapters(False)
        assert torch.equal(dropping(x), base(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_base_keeps_fp32_adapters(layer, autocast):
    base, x = layer
    dtype = torch.float32 if autocast else torch.bfloat16
    model = nn.Sequential(copy.deepcopy(base).to(dtype))
    model = peft.get_peft_model(model, peftx.FloraConfig(r=2, target_modules=["0"], scale=1, init_weights=False))
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
        y.float().sum().backward()
    adapted = model.base_model.model[0]
    assert y.dtype == adapted.base_layer(x).dtype if not autocast else torch.bfloat16
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


def test_embeddings_are_scaled_as_gemma_scales_them_and_keep_the_padding_row():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = Gemma3TextScaledWordEmbedding(20, 6, padding_idx=3, embed_scale=2.5).double()
    adapted, x = adapt(base, r=3), torch.tensor([[3, 0, 7], [7, 3, 3]])
    y = adapted(x)
    torch.testing.assert_close(y, dense(base, oracle(adapted, 1.0))(x))
    assert torch.equal(y[x == 3], base(x)[x == 3]) and not torch.allclose(y[x == 7], base(x)[x == 7])
    y.sum().backward()
    assert not adapted.adapters["default"].A.grad[3].any()
    assert torch.equal(adapted(torch.tensor(7)), y[0, 2])
    with pytest.raises(TypeError, match="'0'.*max_norm"):
        peft.get_peft_model(
            nn.Sequential(nn.Embedding(9, 9, max_norm=1.0)), peftx.FloraConfig(r=2, target_modules=["0"])
        )


# The start


def test_starts_exactly_as_the_base_and_moves_the_core_first(layer):
    base, x = layer
    for scheme, dtype in itertools.product(("paper", "lora_like", "gaussian"), (torch.float64, torch.bfloat16)):
        model = nn.Sequential(copy.deepcopy(base).to(dtype))
        x = x.to(dtype) if x.is_floating_point() else x
        y = model(x)
        model = peft.get_peft_model(model, peftx.FloraConfig(r=2, init_scheme=scheme, target_modules=["0"]))
        assert torch.equal(model(x), y)
        model(x).float().square().sum().backward()
        moving = {
            name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert moving == {"G"}


@pytest.mark.parametrize("size, rank", [(4000, 16), (400, 100)])
def test_factors_start_as_their_schemes_say(size, rank):
    torch.manual_seed(0)
    assert start(size, rank, "paper", 1).std().item() == pytest.approx((2 * rank) ** -0.5, rel=0.05)
    assert start(size, rank, "gaussian", 1).std().item() == pytest.approx(0.02, rel=0.05)
    uniform = start(size, rank, "lora_like", 25)
    assert uniform.abs().max() <= 0.2 and uniform.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)
    adapted = FloraLayer(nn.Linear(size, 2000), "default", peftx.FloraConfig(r=[rank, 50], init_scheme="lora_like"))
    bounds = [tensor.abs().max().item() for tensor in factors(adapted)]
    assert bounds == pytest.approx([size**-0.5, 50**-0.5], rel=0.01)  # as nn.Linear starts: the width that is read


# The ranks


@pytest.mark.parametrize("base, ranks, count", [
    (lambda: nn.Linear(12, 10), [3, 4], 12 * 3 + 10 * 4 + 12),
    (lambda: nn.Conv1d(6, 8, 5), [3, 4, 2], 6 * 3 + 8 * 4 + 5 * 2 + 24),
    (lambda: nn.Conv3d(4, 6, (2, 3, 4)), [2, 2, 1, 3, 2], 8 + 12 + 2 + 9 + 8 + 24),
    (lambda: nn.Embedding(50, 6), [3, 2], 150 + 12 + 6),
    (lambda: nn.Conv2d(1536, 1536, 7), [16, 16, 2, 2], 50_204),  # the spec's example; PEFT's LoRA r=16: 1,228,800
])  # fmt: skip
def test_trains_as_many_values_as_the_formula_says(base, ranks, count):
    model = peft.get_peft_model(nn.Sequential(base()), peftx.FloraConfig(r=ranks, target_modules=["0"]))
    assert model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("r", [4, 16, 32])
def test_linear_layers_train_r_squared_more_than_lora(r):
    with torch.device("meta"):  # the authors' LLaMA-7B: +2.6k, +41k, +164k in 160 modules
        config = transformers.LlamaConfig(num_hidden_layers=1)
        models = [transformers.LlamaForCausalLM(config) for _ in range(2)]
        targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
        configs = (c(r=r, target_modules=targets) for c in (peftx.FloraConfig, peft.LoraConfig))
        flora, lora = (peft.get_peft_model(m, c) for m, c in zip(models, configs, strict=True))
    assert flora.get_nb_trainable_parameters()[0] - lora.get_nb_trainable_parameters()[0] == 5 * r * r


@pytest.mark.parametrize("config, modes, groups, wanted", [
    ({"r": 8}, (12, 10), 1, (8, 8)),
    ({"r": 8}, (64, 32, 7, 1), 1, (8, 8, 2, 1)),
    ({"r": 8}, (3, 32, 7, 7), 1, (3, 8, 2, 2)),  # colours
    ({"r": 8}, (1, 32, 7, 7), 32, (1, 8, 2, 2)),  # depthwise
    ({"r": [16, 16, 2, 2]}, (1, 32, 7, 7), 32, (1, 16, 2, 2)),  # the paper's example on ConvNeXt
    ({"r": [4, 8], "r_spatial": 3}, (64, 32, 7, 1), 1, (4, 8, 3, 1)),
    ({"r": [4, 8], "r_spatial": [7, 1]}, (64, 32, 7, 1), 1, (4, 8, 7, 1)),
])  # fmt: skip
def test_ranks_of_the_modes(config, modes, groups, wanted):
    assert mode_ranks(peftx.FloraConfig(**config), modes, groups) == wanted


@pytest.mark.parametrize("base, config, message", [
    (nn.Linear(12, 4), {"r": 8}, r"r=\[8, 8\] is larger .*in 12, out 4"),
    (nn.Linear(4, 12), {"r": [8, 8]}, r"r=\[8, 8\] is larger .*in 4, out 12"),
    (nn.Embedding(5, 12), {"r": 8}, "larger .*in 5, out 12"),
    (nn.Conv2d(3, 4, 3), {"r": 8}, r"larger .*in 3, out 4, kernel axis 0 3, kernel axis 1 3\)"),
    (nn.Conv2d(3, 16, 3), {"r": [8, 8]}, "larger .*in 3, out 16"),
    (nn.Conv2d(8, 8, 3), {"r": [2, 2, 4, 2]}, r"r=\[2, 2, 4, 2\] is larger"),
    (nn.Conv2d(8, 8, 3), {"r": 2, "r_spatial": [2, 4]}, "larger"),
    (nn.Conv2d(8, 8, 3), {"r": 2, "r_spatial": [2]}, r"3 ranks for a weight with 4 modes \(in 8, out 8, kernel"),
    (nn.Linear(8, 8), {"r": [2, 2, 2, 2]}, r"4 ranks for a weight with 2 modes \(in 8, out 8\)"),
])  # fmt: skip
def test_ranks_that_do_not_fit_are_refused(base, config, message):
    model = nn.Sequential(nn.Linear(16, 16), base)
    config = {"rank_pattern": {"0": 1}, **config}
    with pytest.raises(ValueError, match=f"FLORA cannot adapt the module '1': .*{message}.*rank_pattern"):
        peft.get_peft_model(model, peftx.FloraConfig(**config, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
    model = peft.get_peft_model(model, peftx.FloraConfig(r=config["r"], rank_pattern={"1": 2}, target_modules=["1"]))
    assert isinstance(model.base_model.model[1], FloraLayer)


@pytest.mark.parametrize("error, config, message", [
    (TypeError, {"init_scheme": "xavier"}, "FloraConfig: `init_scheme` must be .*paper.*lora_like.*gaussian.*'xavier'"),
    (TypeError, {"r": 2.0}, "`r` must be of type"),
    (TypeError, {"r": None}, "`r` must be of type"),
    (TypeError, {"r": True}, "`r` must be of type"),
    (TypeError, {"r": [2, "2"]}, "`r` must be of type"),
    (TypeError, {"scale": "4"}, "`scale` must be of type"),
    (ValueError, {"r": 0}, "`r` must be a positive integer"),
    (ValueError, {"r": [2]}, "`r` must be a positive integer or a list of at least 2"),
    (ValueError, {"r": [2, 0]}, "`r` must be"),
    (ValueError, {"r_spatial": 0}, "`r_spatial` must be"),
    (ValueError, {"r_spatial": []}, "`r_spatial` must be"),
    (ValueError, {"r": [2, 2, 2], "r_spatial": 2}, "both give the ranks of the kernel"),
    (ValueError, {"scale": 1, "alpha": 1}, "give one of them"),
    (ValueError, {"flora_dropout": 1.0}, r"`flora_dropout` must be in \[0, 1\)"),
])  # fmt: skip
def test_config_refuses_wrong_values(error, config, message):
    with pytest.raises(error, match=message):
        peftx.FloraConfig(**config)


@pytest.mark.parametrize("base", [nn.ConvTranspose2d(4, 4, 3), nn.LayerNorm(4), nn.Bilinear(4, 4, 4)])
def test_other_layers_are_refused(base):
    with pytest.raises(TypeError, match=f"'0': {type(base).__name__} is not supported, only .*nn.Conv3d, .* are"):
        peft.get_peft_model(nn.Sequential(base), peftx.FloraConfig(r=2, target_modules=["0"]))


# As LoRA


def as_lora(base, adapted, **kwargs):
    """PEFT's LoRA on `base` with the exported factors."""
    A, B = adapted.lora_factors("default")
    config = peft.LoraConfig(r=len(A), lora_alpha=len(A), target_modules=["0"], **kwargs)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).double()
    (lora,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    if isinstance(base, nn.Embedding):
        lora.lora_embedding_A["default"].data, lora.lora_embedding_B["default"].data = A, B
    else:
        lora.lora_A["default"].weight.data = A
        lora.lora_B["default"].weight.data = B.view(lora.lora_B["default"].weight.shape)
    return model


@pytest.mark.parametrize("r", [[2, 4], [4, 2], [3, 3]])
def test_exported_lora_computes_the_same_unmerged_and_merged(layer, r):
    base, x = layer
    if getattr(base, "groups", 1) > 1:
        pytest.skip("PEFT has no exact LoRA for this convolution; its refusal has a test of its own")
    if getattr(base, "in_channels", 4) < 4:
        r = [3, 4]
    adapted = adapt(base, r=r, scale=0.5)
    adapted.set_scale("default", 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about fan_in_fan_out
        model = as_lora(base, adapted)
    y = adapted(x)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


@pytest.mark.parametrize("options, reason", [
    ({"groups": 2}, "groups=2.*every input channel to every group"),
    ({"dilation": 2}, r"dilation=\(2, 2\).*ignores the dilation"),
    ({"padding_mode": "reflect", "padding": 1}, "padding_mode='reflect'.*ignores the padding_mode"),
])  # fmt: skip
def test_convolutions_that_peft_s_lora_cannot_follow_are_refused(options, reason):
    adapted = adapt(nn.Conv2d(4, 6, 3, **options))
    with pytest.raises(NotImplementedError, match=f"FLORA has no exact LoRA form.*{reason}.*merge_and_unload"):
        adapted.lora_factors("default")


# Models


class Net(nn.Module):
    """Every kind of layer: an embedding, a dilated convolution along the tokens, images through 2-d ones, a head."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8, padding_idx=0)
        self.seq = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding="same", padding_mode="reflect", groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(20, 4)

    def forward(self, ids, images):
        words = self.seq(self.emb(ids).transpose(1, 2)).mean(-1)
        images = self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(images))))).mean((-2, -1))
        return self.head(torch.cat([words, images], -1))


TARGETS = ["emb", "seq", "stem", "depthwise", "pointwise"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids, images = torch.randint(20, (4, 7), generator=generator), torch.randn(4, 3, 12, 12, generator=generator)
    return {"ids": ids, "images": images}


def flora(net, *names, **kwargs):
    """The net with random adapters, the last of them active."""
    for seed, name in enumerate(names or ("default",)):
        torch.manual_seed(seed)
        options = {"r": 2 + seed, "scale": 1, "init_weights": False, "target_modules": TARGETS, **kwargs}
        config = peftx.FloraConfig(**options)
        if seed:
            net.add_adapter(name, config)
        else:
            net = peft.get_peft_model(net, config, adapter_name=name)
        net.set_adapter(name)
    return net.eval()


def test_save_and_load(net, batch, tmp_path):
    base, model = copy.deepcopy(net), flora(net, rank_pattern={"stem": [3, 4, 1, 3], "seq": 1}, init_scheme="gaussian")
    assert model.base_model.model.stem.adapters["default"].G.shape == (3, 4, 1, 3)
    assert model.base_model.model.seq.adapters["default"].G.shape == (1, 1, 2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]["stem"] == [3, 4, 1, 3]
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(**batch), model(**batch)) and not torch.allclose(loaded(**batch), base(**batch))


def test_several_adapters_merge_unmerge_and_delete(net, batch):
    base, model = copy.deepcopy(net), flora(net, "one", "two")
    outputs = {"two": model(**batch)}
    model.set_adapter("one")
    outputs["one"] = model(**batch)
    both = copy.deepcopy(base)
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        getattr(both, name).weight.data += sum(layer.get_delta_weight(adapter) for adapter in ("one", "two")).detach()
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(model(**batch), both(**batch))
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(merged(**batch), both(**batch))
    model.merge_adapter()
    torch.testing.assert_close(model(**batch), both(**batch))
    model.unmerge_adapter()
    for name in TARGETS:
        found = getattr(model.base_model.model, name).base_layer.weight
        torch.testing.assert_close(found, getattr(base, name).weight, rtol=0, atol=1e-6)
    model.delete_adapter("one")
    model.set_adapter("two")
    torch.testing.assert_close(model(**batch), outputs["two"])
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch), base(**batch))


def test_mixed_batches(net, batch):
    base, model = copy.deepcopy(net), flora(net, "one", "two")
    names = ["two", "__base__", "one", "two"]
    mixed = model(**batch, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        wanted = base(**batch) if name == "__base__" else model(**batch)
        torch.testing.assert_close(mixed[row], wanted[row])


def test_deepcopy_is_independent(net, batch):
    model = flora(net)
    y, twin = model(**batch), copy.deepcopy(model)
    assert torch.equal(twin(**batch), y)
    for name, parameter in twin.named_parameters():
        parameter.data += 0.1 * name.endswith(".G")
    assert torch.equal(model(**batch), y) and not torch.allclose(twin(**batch), y)


def test_observed_convolutions_are_called(net, batch):
    # Hooks on a base layer (offloading, statistics) must fire even where its weight could be used directly.
    model = flora(net)
    y, seen = model(**batch), []
    for name in TARGETS:
        getattr(model.base_model.model, name).base_layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(model(**batch), y)
    assert sorted(seen) == sorted(TARGETS)


def test_a_convnext_from_a_config_trains_and_merges():
    # Depthwise convolutions, on which the reference cannot run; images have 3 channels, less than r.
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    model = transformers.ConvNextForImageClassification(config)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    kinds = {(m.groups, m.in_channels) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert {(8, 8), (16, 16), (1, 3)} <= kinds
    targets = r".*(dwconv|pwconv\d|patch_embeddings|downsampling_layer\.1)"
    model = peft.get_peft_model(model, peftx.FloraConfig(r=8, target_modules=targets, modules_to_save=["classifier"]))
    layers = [m for m in model.modules() if isinstance(m, FloraLayer)]
    assert sum(isinstance(m.site, ConvSite) for m in layers) == len(convolutions) and len(layers) > len(convolutions)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(20):
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(layer.adapters["default"].G.any() for layer in layers)
    logits = model.eval()(pixel_values=images).logits
    torch.testing.assert_close(model.merge_and_unload()(pixel_values=images).logits, logits, rtol=1e-4, atol=1e-4)


def test_layers_are_wrapped_by_their_kind():
    kinds = {nn.Linear: LinearSite, nn.Embedding: EmbeddingSite, nn.Conv1d: ConvSite, nn.Conv3d: ConvSite}
    for base, site in kinds.items():
        adapted = adapt(base(4, 4) if base in (nn.Linear, nn.Embedding) else base(4, 4, 3))
        assert type(adapted) is FloraLayer and type(adapted.site) is site
    wrapped = peft.get_peft_model(MLP(), peftx.FloraConfig(r=2, target_modules=["lin0"])).lin0
    assert isinstance(wrapped, FloraLayer) and type(wrapped).__name__ == "FloraLinear"
