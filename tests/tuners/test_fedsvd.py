"""FedSVD against its formulas: the refactorisation against dense SVDs, the server's averages against dense products."""

import copy
import math
import subprocess
import sys
import time
import weakref

import peft
import pytest
import torch
from conftest import MLP, logits, tiny_model, tuner_layers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import peftx
from peftx import federated

BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def factors(d_out, d_in, r, dtype=torch.float32, seed=0, rank=None):
    """A (r, d_in) and B (d_out, r); B of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r, d_in), (d_out, r)))
    if rank is not None:
        B = B[:, :rank] @ torch.randn(rank, r, generator=generator, dtype=torch.float64)
    return A.to(dtype), B.to(dtype)


def skewness(A):
    return (A @ A.T - torch.eye(len(A), dtype=A.dtype)).abs().max()


def rank(*matrices):
    return int(torch.linalg.matrix_rank(torch.cat(matrices).double(), rtol=1e-5))


def fedsvd(model, std=0.1, config=peftx.FedSVDConfig, **kwargs):
    """`model` with an adapter whose B is not zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config(**{"r": 4, **kwargs})).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += std * torch.randn_like(parameter)
    return model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Refactorisation


@given(
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 40),
    r=st.integers(1, 12),
    lost=st.integers(0, 12),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@example(d_out=300, d_in=20, r=8, lost=0, size=1.0, dtype=torch.float32, seed=0)  # tall
@example(d_out=20, d_in=300, r=8, lost=0, size=1.0, dtype=torch.float32, seed=0)  # wide
@example(d_out=64, d_in=64, r=1, lost=0, size=1.0, dtype=torch.float32, seed=0)
@example(d_out=12, d_in=12, r=12, lost=0, size=1.0, dtype=torch.float32, seed=0)
@example(d_out=32, d_in=32, r=8, lost=5, size=1.0, dtype=torch.float32, seed=0)
@settings(deadline=None, max_examples=60)
def test_refactorisation_is_the_singular_value_decomposition_of_the_product(d_out, d_in, r, lost, size, dtype, seed):
    r = min(r, d_out, d_in)
    A, B = factors(d_out, d_in, r, dtype, seed, rank=max(1, r - lost))
    B *= size
    before = A.clone(), B.clone()
    new_A, new_B = federated.refactorize(A, B)
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])
    assert (new_A.dtype, new_A.shape, new_B.dtype, new_B.shape) == (dtype, A.shape, dtype, B.shape)

    exact = dtype == torch.float64
    product = B.double() @ A.double()
    assert (new_B.double() @ new_A.double() - product).norm() <= (1e-12 if exact else 1e-5) * product.norm()
    assert skewness(new_A) <= (1e-12 if exact else 1e-5)
    gram = new_B.T @ new_B
    assert (gram - gram.diag().diag()).abs().max() <= 1e-5 * gram.max()
    S = new_B.norm(dim=0)
    assert (S.diff() <= 1e-6 * S[0]).all()
    torch.testing.assert_close(S, torch.linalg.svdvals(product)[:r].to(dtype), rtol=1e-5, atol=1e-5 * float(S[0]))
    assert (new_A.gather(1, new_A.abs().argmax(1, keepdim=True)) > 0).all()
    assert rank(A, new_A) == rank(A) == r  # the row space is the old one, also where B lacks rank


@pytest.mark.parametrize("shape", [(64, 48, 8), (48, 64, 8), (16, 16, 16), (30, 20, 1)])
def test_refactorising_twice_is_once(shape):
    once = federated.refactorize(*factors(*shape))
    twice = federated.refactorize(*once)
    for first, second in zip(once, twice, strict=True):
        assert (first - second).norm() <= 1e-4 * first.norm()


def test_a_layer_that_learnt_nothing_keeps_its_row_space():
    A, B = factors(24, 32, 8)
    new_A, new_B = federated.refactorize(A, torch.zeros_like(B))
    assert not new_B.any() and skewness(new_A) <= 1e-5 and rank(A, new_A) == 8


def test_dependent_rows_of_a():
    A, B = factors(24, 32, 8)
    A[3], A[5] = A[1], 2 * A[1] - A[0]
    new_A, new_B = federated.refactorize(A, B)
    assert skewness(new_A) <= 1e-5 and (new_B @ new_A - B @ A).norm() <= 1e-5 * (B @ A).norm()
    assert rank(A) == 6 and rank(A, new_A) == 8  # all of the old row space is in the new one
    for zero_A, any_B in ((torch.zeros_like(A), B), (torch.zeros_like(A), torch.zeros_like(B))):
        new_A, new_B = federated.refactorize(zero_A, any_B)
        assert skewness(new_A) <= 1e-5 and not new_B.any()


def test_plain_sgd_does_not_notice_a_refactorisation():
    """A rotation of an orthonormal A, which FedSVD's docstring says; Adam's steps depend on it."""
    torch.manual_seed(0)
    A, B = federated.refactorize(torch.randn(3, 9).double(), torch.randn(7, 3).double())
    B = B + 0.3 * torch.randn(7, 3).double()  # what clients have trained
    target = torch.randn(7, 9).double()

    def products(turn, optimizer, lr):
        a, b, seen = A, B, []
        for _ in range(4):
            if turn:
                a, b = federated.refactorize(a, b)
            b = b.clone().requires_grad_()
            step = optimizer([b], lr)
            for _ in range(3):
                step.zero_grad()
                (b @ a - target).square().sum().backward()
                torch.nn.utils.clip_grad_norm_([b], 1.0)
                step.step()
            b = b.detach()
            seen.append(b @ a)
        return torch.stack(seen)

    torch.testing.assert_close(products(True, torch.optim.SGD, 0.1), products(False, torch.optim.SGD, 0.1))
    adam = [products(turn, torch.optim.Adam, 0.1) for turn in (True, False)]
    assert (adam[0] - adam[1]).abs().max() > 1e-2


def test_stacked_layers_are_refactorised_as_one_by_one():
    pairs = [factors(24, 32, 4, seed=seed) for seed in range(3)]
    A, B = federated.refactorize(*(torch.stack(both) for both in zip(*pairs, strict=True)))
    for i, pair in enumerate(pairs):
        torch.testing.assert_close((A[i], B[i]), federated.refactorize(*pair), rtol=1e-4, atol=1e-5)


def test_half_precision_comes_back_in_single():
    A, B = (factor.bfloat16() for factor in factors(24, 32, 4))
    new_A, new_B = federated.refactorize(A, B)
    assert new_A.dtype == new_B.dtype == torch.float32 and skewness(new_A) <= 1e-5
    torch.testing.assert_close(new_B @ new_A, B.float() @ A.float(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(federated.refactorize(A, B)[1], new_B)


def test_without_the_sign_rule_the_product_is_the_same():
    A, B = factors(24, 32, 4)
    (A0, B0), (A1, B1) = federated.refactorize(A, B, sign_fix=False), federated.refactorize(A, B)
    torch.testing.assert_close(A0.abs(), A1.abs())
    torch.testing.assert_close(B0 @ A0, B1 @ A1)


@pytest.mark.parametrize(
    "A, B, message",
    [
        (torch.ones(2, 8), torch.ones(8, 3), "Expected A"),
        (torch.ones(8, 2), torch.ones(8, 2), "Expected A"),
        (torch.ones(8), torch.ones(8), "Expected A"),
        (torch.ones(2, 2, 8), torch.ones(3, 8, 2), "Expected A"),
        (torch.ones(9, 8), torch.ones(20, 9), "r=9 must be .* 8 -> 20"),
        (torch.ones(9, 20), torch.ones(8, 9), "r=9 must be .* 20 -> 8"),
        (torch.ones(0, 8), torch.ones(8, 0), "r=0 must be"),
        (torch.full((2, 8), float("nan")), torch.ones(8, 2), "A has values that are not finite"),
        (torch.ones(2, 8), torch.full((8, 2), float("inf")), "B has values that are not finite"),
        (torch.full((2, 8), 1e30), torch.full((8, 2), 1e30), "overflows"),
        (torch.ones(2, 8, dtype=torch.int64), torch.ones(8, 2), "floating-point"),
    ],
)
def test_what_cannot_be_refactorised_is_refused(A, B, message):
    with pytest.raises(ValueError, match=message):
        federated.refactorize(A, B)


@pytest.mark.slow
def test_another_process_gives_the_same_bits_and_needs_no_engine(tmp_path):
    inputs = dict(zip("AB", factors(96, 64, 8), strict=True))
    save_file(inputs, tmp_path / "inputs.safetensors")
    script = """
import sys, torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from peftx import federated
assert not {"flwr", "opacus", "ray"} & set(sys.modules), "imported before it is needed"
given = load_file("inputs.safetensors")
A, B = federated.refactorize(given["A"], given["B"])
save_file({"A": A, "B": B}, "outputs.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    found = load_file(tmp_path / "outputs.safetensors")
    A, B = federated.refactorize(**inputs)
    assert torch.equal(found["A"], A) and torch.equal(found["B"], B)


def test_nothing_of_the_size_of_the_weight_is_allocated():
    d, r = 4096, 16
    A, B = factors(d, d, r)
    federated.refactorize(A[:, :64], B[:64])  # what is loaded at a first call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        federated.refactorize(A, B)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 2 * d * r * 4 <= peak < 10 * (2 * d) * r * 4
    start = time.process_time()
    federated.refactorize(A, B)
    assert time.process_time() - start < 0.1  # some 3 ms; the dense decomposition takes a minute


# The adapter


def test_a_starts_orthonormal_if_asked_and_the_model_as_its_base(tokens):
    base = tiny_model("llama")
    model = fedsvd(copy.deepcopy(base), std=0, init_a="orthonormal", target_modules="all-linear")
    plain = fedsvd(copy.deepcopy(base), std=0, target_modules="all-linear")
    assert torch.equal(logits(model, tokens), logits(base, tokens))
    for name, layer in tuner_layers(model).items():
        A, kaiming = (m.lora_A["default"].weight.detach() for m in (layer, tuner_layers(plain)[name]))
        assert skewness(A) <= 1e-5 < skewness(kaiming) and rank(A, kaiming) == 4  # no randomness of its own
    deltas = []
    for start in ("kaiming", "orthonormal"):  # a start with a random B keeps its product
        torch.manual_seed(0)
        config = peftx.FedSVDConfig(r=4, init_a=start, init_lora_weights=False, target_modules=["lin0"])
        deltas.append(peft.get_peft_model(MLP(), config).base_model.model.lin0.get_delta_weight("default"))
    torch.testing.assert_close(*deltas)


def test_an_orthonormal_a_is_sqrt_3_larger_than_loras():
    norms = {}
    for start in ("kaiming", "orthonormal"):
        torch.manual_seed(0)
        config = peftx.FedSVDConfig(r=16, init_a=start, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(1024, 64)), config)
        norms[start] = model.base_model.model[0].lora_A["default"].weight.norm().item()
    assert norms["orthonormal"] == pytest.approx(4, rel=1e-5)
    assert norms["orthonormal"] / norms["kaiming"] == pytest.approx(math.sqrt(3), rel=0.02)


def only_b(model, adapter="default"):
    """Whether exactly the B of one adapter are trained."""
    names = {name for name, _ in model.named_parameters() if f"lora_B.{adapter}" in name}
    return bool(names) and trained(model) == names


def test_a_stays_frozen_whatever_peft_is_asked(tmp_path):
    model = fedsvd(MLP(), target_modules=["lin0", "lin1"])
    config = model.peft_config["default"]
    assert only_b(model)
    model.train()
    assert only_b(model)
    model.add_adapter("other", config)
    assert only_b(model)
    model.set_adapter("other")
    assert only_b(model, "other")
    model.base_model.set_adapter(["default", "other"])
    assert all("lora_B" in name for name in trained(model)) and len(trained(model)) == 4
    model.set_adapter("default")
    model.set_requires_grad(["default", "other"])
    assert all("lora_B" in name for name in trained(model)) and len(trained(model)) == 4
    model.set_requires_grad(["other"], False)
    assert only_b(model)
    with model.disable_adapter():
        assert not any("lora_A" in name for name in trained(model))
    assert only_b(model)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert only_b(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert only_b(model)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "linear")
    assert only_b(model)
    model.set_adapter("sum")
    assert only_b(model, "sum")
    model.set_adapter("default")
    assert only_b(copy.deepcopy(model))
    for adapter in ("other", "sum"):
        model.delete_adapter(adapter)
    assert only_b(model)
    model.save_pretrained(tmp_path)
    assert only_b(peft.PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=True))
    assert not trained(peft.PeftModel.from_pretrained(MLP(), tmp_path))
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    assert not any("lora_A" in name for name in trained(model))
    model.set_adapter("loaded")
    assert only_b(model, "loaded")
    head = fedsvd(MLP(), target_modules=["lin0"], modules_to_save=["head"])
    head.save_pretrained(tmp_path)
    for model in (head, peft.PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=True)):
        assert {name.rsplit(".", 3)[1] for name in trained(model)} == {"lora_B", "modules_to_save"}


def test_a_stays_frozen_in_transformers_own_adapter_interface(tmp_path):
    model = tiny_model("llama")
    config = peftx.FedSVDConfig(r=4, target_modules=["q_proj"])
    model.add_adapter(config, adapter_name="first")
    model.add_adapter(config, adapter_name="second")
    assert only_b(model, "second")
    model.set_adapter("first")
    assert only_b(model, "first")
    model.disable_adapters()
    model.enable_adapters()
    assert only_b(model, "first")
    model.save_pretrained(tmp_path)
    model = tiny_model("llama")
    model.load_adapter(str(tmp_path), "loaded", is_trainable=True)
    assert only_b(model, "loaded")
    assert all(".q_proj.lora_B" in key for key in federated.client_state(model, "loaded"))


@pytest.mark.parametrize("watched", ["", "lora_A", "lora_B"])
def test_not_even_a_thawed_a_is_trained(mlp, watched):
    model = fedsvd(mlp, target_modules=["lin0"]).requires_grad_(True)
    layer, calls = model.base_model.model.lin0, []
    if watched:
        getattr(layer, watched)["default"].register_forward_hook(lambda *args: calls.append(args))
    A = layer.lora_A["default"].weight
    before = A.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()
    assert A.grad is None and torch.equal(A, before) and len(calls) == bool(watched)


@pytest.mark.parametrize("input_gradient", [False, True])
def test_no_product_is_spent_on_a_gradient_of_a(input_gradient):
    n, d_in, d_out, r = 6, 40, 30, 4
    model = fedsvd(nn.Sequential(nn.Linear(d_in, d_out)), target_modules=["0"])
    y = model(torch.randn(n, d_in, requires_grad=input_gradient))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    of_b, of_x = 2 * n * d_out * r, 2 * n * (d_out * r + r * d_in) + 2 * n * d_in * d_out
    assert counter.get_total_flops() == of_b + input_gradient * of_x


@pytest.mark.parametrize("base", [nn.Linear(7, 5), Conv1D(5, 7)], ids=str)
def test_forward_and_gradients_are_loras(base):
    model = fedsvd(nn.Sequential(base), r=3, lora_alpha=6, target_modules=["0"]).double()
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, g = (torch.randn(2, 4, d, dtype=torch.float64) for d in (7, 5))
    x.requires_grad_()
    y = model(x)
    W = base.weight.detach() if isinstance(base, nn.Linear) else base.weight.detach().T
    torch.testing.assert_close(y, x @ (W + 2 * B @ A).T + base.bias)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ (W + 2 * B @ A))
    torch.testing.assert_close(B.grad, 2 * torch.einsum("bto,bti,ri->or", g, x, A))


def test_opacus_sees_every_sample_and_b_only(tokens):
    hooks = pytest.importorskip("opacus.grad_sample").GradSampleHooks
    labels = torch.tensor([0, 2, 1])
    model = fedsvd(tiny_model("bert"), **{**BERT, "task_type": None}).train()  # Opacus looks in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients(rows):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(input_ids=tokens[rows]).logits, labels[rows], reduction="sum")
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = [gradients(slice(i, i + 1)) for i in range(3)]  # by the fast path
    watched = hooks(model, batch_first=True, loss_reduction="sum")
    total = gradients(slice(None))
    found = {name: p.grad_sample for name, p in model.named_parameters() if getattr(p, "grad_sample", None) is not None}
    watched.cleanup()
    assert found.keys() == wanted[0].keys() == trained(model) and all("lora_B" in name for name in found)
    for name, samples in found.items():
        torch.testing.assert_close(samples, torch.stack([one[name] for one in wanted]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total[name], samples.sum(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"refactorize_every": -1}, "`refactorize_every` must be at least 0"),
        ({"refactorize_warmup": -1}, "`refactorize_warmup` must be at least 0"),
        ({"refactorize_every": 1.0}, "`refactorize_every` must be of type int"),
        ({"refactorize_every": True}, "`refactorize_every` must be of type int"),
        ({"refactorize_warmup": "1"}, "`refactorize_warmup` must be of type int"),
        ({"init_a": "zeros"}, "`init_a` must be of type"),
        ({"use_dora": True}, "`use_dora=True` cannot be combined"),
        ({"lora_bias": True}, "`lora_bias=True` cannot be combined"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        peftx.FedSVDConfig(**kwargs)


@pytest.mark.parametrize(
    "module, error, message",
    [
        (nn.Embedding(9, 6), TypeError, "FEDSVD cannot adapt the module '1': Embedding is not supported"),
        (nn.Conv2d(3, 4, 3), TypeError, "FEDSVD cannot adapt the module '1': Conv2d is not supported"),
        (nn.Linear(8, 3), ValueError, "FEDSVD cannot adapt the module '1': r=4 is above the layer's shorter side, 3"),
        (nn.Linear(3, 8), ValueError, "FEDSVD cannot adapt the module '1': r=4 is above the layer's shorter side, 3"),
    ],
)
def test_layers_that_do_not_fit_are_refused_and_the_model_left_alone(module, error, message):
    model = nn.Sequential(nn.Linear(8, 8), module)
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, peftx.FedSVDConfig(r=4, target_modules=["0", "1"]))
    assert list(model.state_dict()) == keys and type(model[0]) is nn.Linear
    fitting = peftx.FedSVDConfig(r=4, rank_pattern={"1": 3}, target_modules=["0", "1"])
    if isinstance(module, nn.Linear):
        assert len(tuner_layers(peft.get_peft_model(model, fitting))) == 2


# Rounds


@pytest.mark.parametrize("config", [peftx.FedSVDConfig, peft.LoraConfig])
def test_refactorising_a_model_leaves_its_function(tokens, tmp_path, config):
    model = fedsvd(tiny_model("llama"), config=config, target_modules="all-linear", rank_pattern={"v_proj": 2})
    wanted, parameters = logits(model, tokens), dict(model.named_parameters())
    deltas = {name: layer.get_delta_weight("default") for name, layer in tuner_layers(model).items()}
    values = federated.refactorize_model(model)
    assert values.keys() == deltas.keys()
    for name, layer in tuner_layers(model).items():
        assert skewness(layer.lora_A["default"].weight.detach()) <= 1e-5
        singular = torch.linalg.svdvals(deltas[name])[: layer.r["default"]] / layer.scaling["default"]
        torch.testing.assert_close(values[name], singular.detach(), rtol=1e-4, atol=1e-6)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=1e-5, atol=1e-5)
    turned = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path), tokens), turned)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_stock_peft_computes_the_same_after_a_refactorisation(tokens, tmp_path):
    model = fedsvd(tiny_model("bert"), **BERT)
    wanted = logits(model, tokens)
    model.base_model.refactorize()
    assert peftx.export_lora(model, tmp_path / "lora") == dict.fromkeys(tuner_layers(model), 0.0)
    tiny_model("bert").save_pretrained(tmp_path / "base")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    script = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("base"), "lora").eval()
with torch.no_grad():
    found = model(input_ids=load_file("tokens.safetensors")["tokens"]).logits
assert "peftx" not in sys.modules
save_file({"logits": found}, "found.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    found = load_file(tmp_path / "found.safetensors")["logits"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_refactorisation_at_multiples_of_the_period_after_the_warm_up(mlp):
    model = fedsvd(mlp, refactorize_every=2, refactorize_warmup=2, target_modules=["lin0", "lin1"])
    B = model.base_model.model.lin0.lora_B["default"].weight
    turned = []
    for server_round in range(1, 9):
        with torch.no_grad():
            B += 0.1
        before = copy.deepcopy(federated.global_state(model))
        values = model.base_model.update_basis(server_round)
        after = federated.global_state(model)
        assert bool(values) != all(torch.equal(after[key], before[key]) for key in after)
        turned += [server_round] * bool(values)
        assert model.base_model.update_basis(server_round) == {}  # once for each round
        assert all(torch.equal(value, after[key]) for key, value in federated.global_state(model).items())
    assert turned == [4, 6, 8] == [t for t in range(1, 9) if federated.is_due(t, every=2, warmup=2)]


def test_period_zero_is_ffa_lora(mlp):
    model = fedsvd(mlp, refactorize_every=0, target_modules=["lin0"])
    before = federated.global_state(model)
    assert all(model.base_model.update_basis(t) == {} for t in range(1, 9))
    assert not any(federated.is_due(t, every=0) for t in range(1, 9))
    assert all(torch.equal(value, before[key]) for key, value in federated.global_state(model).items())


def test_only_what_can_be_refactorised_is_and_nothing_by_half(mlp):
    model = fedsvd(mlp, target_modules=["lin0", "lin1"])
    with pytest.raises(ValueError, match=r"no LoRA adapter 'other'; its adapters are \['default'\]"):
        federated.refactorize_model(model, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into 2 layers"):
        model.base_model.refactorize()
    model.unmerge_adapter()
    before = federated.global_state(model)
    model.base_model.model.lin1.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lin1: B has values that are not finite"):
        model.base_model.refactorize()
    assert torch.equal(federated.global_state(model)["lin0.lora_A"], before["lin0.lora_A"])
    model.add_adapter("other", peftx.FedSVDConfig(r=2, target_modules=["lin0"]))
    assert model.base_model.refactorize("other").keys() == {"lin0"}
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        model.base_model.refactorize()
    for base, config in (
        (nn.Linear(8, 8), peft.LoraConfig(r=2, use_dora=True, target_modules=["0"])),
        (nn.Linear(8, 8), peft.LoraConfig(r=2, lora_bias=True, target_modules=["0"])),
        (nn.Linear(8, 8), peftx.GradNormLoRPConfig(r=4, target_modules=["0"])),
        (nn.Linear(8, 8), peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])),
        (nn.Embedding(8, 8), peft.LoraConfig(r=2, target_modules=["0"])),
        (nn.Conv2d(3, 4, 3), peft.LoraConfig(r=2, target_modules=["0"])),
    ):
        model = peft.get_peft_model(nn.Sequential(base), config)
        with pytest.raises(ValueError, match="'default' is no plain LoRA of a linear layer in '0'"):
            federated.client_state(model)


# What is sent


def local_steps(model, tokens, labels, lr=0.5, steps=3):
    """One client's round: SGD on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(input_ids=tokens).logits, labels).backward()
        optimizer.step()


def client(tokens, seed, model=None):
    """A model after one client's round."""
    model = model or fedsvd(tiny_model("bert"), **{**BERT, "task_type": None})
    local_steps(model, tokens.roll(seed, 0), torch.tensor([0, 1, seed % 3]))
    return model


def test_one_round_of_a_client_changes_and_sends_b_only(tokens):
    model = fedsvd(tiny_model("bert"), **{**BERT, "task_type": None})
    before = copy.deepcopy(model.state_dict())
    client(tokens, 1, model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "lora_B" in key}
    state = federated.client_state(model)
    layers = tuner_layers(model)
    assert set(state) == {f"{name}.lora_B" for name in layers}
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in state.values())
    sent = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert sent == 4 * sum(layer.out_features * layer.r["default"] for layer in layers.values())
    for name, layer in layers.items():  # copies
        assert torch.equal(state[f"{name}.lora_B"], layer.lora_B["default"].weight)
        assert state[f"{name}.lora_B"].data_ptr() != layer.lora_B["default"].weight.data_ptr()
        assert not state[f"{name}.lora_B"].requires_grad
    assert set(federated.client_state(model, factors="AB")) == set(federated.global_state(model))


def test_one_client_is_training_without_a_federation(tokens):
    alone = fedsvd(tiny_model("bert"), **{**BERT, "task_type": None})
    server = federated.global_state(alone)
    model = fedsvd(tiny_model("bert"), std=3, **{**BERT, "task_type": None})  # its own B do not matter
    for seed in range(2):
        federated.load_global(model, server)
        server |= federated.average_B(server, [(7, federated.client_state(client(tokens, seed, model)))])
        client(tokens, seed, alone)
    assert all(torch.equal(value, server[key]) for key, value in federated.global_state(alone).items())


def replies_of(state, number=4, factors="B", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            10 * k + 3,
            {
                key: value + torch.randn(value.shape, generator=generator)
                for key, value in state.items()
                if key[-1] in factors
            },
        )
        for k in range(number)
    ]


def a_state(r=4, sizes=(("a", 20, 30), ("b.c", 16, 12))):
    return {
        f"{name}.lora_{which}": tensor
        for seed, (name, d_out, d_in) in enumerate(sizes)
        for which, tensor in zip("AB", factors(d_out, d_in, r, seed=seed), strict=True)
    }


def weights_of(replies, weighting):
    n = torch.tensor([float(examples) if weighting == "examples" else 1.0 for examples, _ in replies]).double()
    return n / n.sum()


def mean_product(state, replies, weighting, name):
    """sum w_k B_k A_k, dense, in float64."""
    return sum(
        w * tensors[f"{name}.lora_B"].double() @ tensors.get(f"{name}.lora_A", state[f"{name}.lora_A"]).double()
        for w, (_, tensors) in zip(weights_of(replies, weighting), replies, strict=True)
    )


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_averaging_b_averages_the_products_in_any_order(weighting):
    state = a_state()
    replies = replies_of(state)
    mean = federated.average_B(state, iter(replies), weighting)
    backwards = federated.average_B(state, replies[::-1], weighting)
    assert set(mean) == {"a.lora_B", "b.c.lora_B"} and mean["a.lora_B"].dtype == torch.float32
    for name in ("a", "b.c"):
        wanted = mean_product(state, replies, weighting, name)
        found = mean[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        torch.testing.assert_close(mean[f"{name}.lora_B"], backwards[f"{name}.lora_B"], rtol=1e-6, atol=1e-6)
        updates = [
            w * (t[f"{name}.lora_B"] - state[f"{name}.lora_B"])
            for w, (_, t) in zip(weights_of(replies, weighting), replies, strict=True)
        ]  # the reference's form
        torch.testing.assert_close(mean[f"{name}.lora_B"], (state[f"{name}.lora_B"] + sum(updates)).float())


def test_replies_are_taken_one_at_a_time():
    class Tracked(dict):
        pass

    state, alive = a_state(), weakref.WeakSet()

    def arriving():
        for examples, tensors in replies_of(state, 8):
            reply = Tracked(tensors)
            reply.__class__.__hash__ = object.__hash__
            alive.add(reply)
            assert len(alive) <= 3
            yield examples, reply
            del reply

    federated.average_B(state, arriving())


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_methods_that_train_a_too(weighting):
    state = a_state()
    replies = replies_of(state, factors="AB")
    fedit = federated.average_AB(state, replies, weighting)
    flex = federated.flexlora(state, replies, weighting)
    fedex, residual = federated.fedex_lora(state, replies, weighting)
    stacked = federated.flora(state, replies, weighting)
    assert fedit.keys() == flex.keys() == fedex.keys() == state.keys()
    for name in ("a", "b.c"):
        key_A, key_B = f"{name}.lora_A", f"{name}.lora_B"
        w, wanted = weights_of(replies, weighting), mean_product(state, replies, weighting, name)
        for key in (key_A, key_B):
            mean = sum(weight * tensors[key].double() for weight, (_, tensors) in zip(w, replies, strict=True))
            torch.testing.assert_close(fedit[key], mean.float())
            torch.testing.assert_close(fedex[key], mean.float())
        U, S, Vh = torch.linalg.svd(wanted)
        best = U[:, :4] * S[:4] @ Vh[:4]
        assert (flex[key_B].double() @ flex[key_A].double() - best).norm() <= 1e-5 * best.norm()
        assert skewness(flex[key_A]) <= 1e-5 and flex[key_A].dtype == torch.float32
        B, A = residual[name]
        product = fedex[key_B] @ fedex[key_A]
        assert (product.double() - wanted).norm() > 0.1 * wanted.norm()  # what FedIT loses
        assert (product + B @ A - wanted).norm() <= 1e-5 * wanted.norm()
        B, A = stacked[name]
        assert A.shape == (16, state[key_A].shape[1]) and (B @ A - wanted).norm() <= 1e-5 * wanted.norm()


def test_where_all_share_a_the_other_methods_coincide():
    state = a_state()
    replies = [
        (n, {**{key: value for key, value in state.items() if key.endswith("A")}, **tensors})
        for n, tensors in replies_of(state)
    ]
    b_only = federated.average_B(state, [(n, {k: v for k, v in t.items() if k.endswith("B")}) for n, t in replies])
    fedex, residual = federated.fedex_lora(state, replies)
    flex = federated.flexlora(state, replies)
    for name in ("a", "b.c"):
        A, B = state[f"{name}.lora_A"], b_only[f"{name}.lora_B"]
        torch.testing.assert_close(fedex[f"{name}.lora_B"], B)
        torch.testing.assert_close(fedex[f"{name}.lora_A"], A)
        assert (residual[name][0] @ residual[name][1]).norm() <= 1e-6 * (B @ A).norm()
        torch.testing.assert_close(flex[f"{name}.lora_B"] @ flex[f"{name}.lora_A"], B @ A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fedex_lora_computes_with_the_mean_of_the_products(kind, tokens):
    model = fedsvd(tiny_model(kind), config=peft.LoraConfig, lora_alpha=12, target_modules="all-linear")
    state = federated.global_state(model)
    replies = [(n, {k: 0.2 * v for k, v in t.items()}) for n, t in replies_of(state, 3, "AB")]
    mean, residual = federated.fedex_lora(state, replies)
    exact = copy.deepcopy(model)
    for name, layer in tuner_layers(exact).items():
        delta = 3 * mean_product(state, replies, "examples", name).float()
        base = layer.get_base_layer()
        base.weight.data += delta.T if isinstance(base, Conv1D) else delta
        layer.lora_B["default"].weight.data.zero_()
    federated.load_global(model, mean)
    federated.fold(model, residual)
    torch.testing.assert_close(logits(model, tokens), logits(exact, tokens), rtol=1e-3, atol=1e-4)


def test_a_product_that_does_not_fit_is_not_folded_in(mlp):
    model = fedsvd(mlp, target_modules=["lin0", "lin1"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = torch.ones(16, 2), torch.ones(2, 12)
    for bad, message in (
        ({"lin0": good, "lin9": good}, "lin9: not an adapted, unquantised linear layer"),
        ({"lin0": good, "lin1": (torch.ones(8, 2), torch.ones(3, 16))}, "lin1: found shapes"),
        ({"lin0": (good[0] * float("nan"), good[1])}, "lin0: .*not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            federated.fold(model, bad)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_server_without_a_model_refactorises_as_one_with_it(mlp):
    model = fedsvd(mlp, target_modules=["lin0", "lin1"])
    state = federated.global_state(model)
    kept = copy.deepcopy(state)
    turned, values = federated.refactorize_state(state)
    assert all(torch.equal(value, kept[key]) for key, value in state.items()) and list(turned) == list(state)
    found = federated.refactorize_model(model)
    torch.testing.assert_close(federated.global_state(model), turned, rtol=0, atol=0)
    torch.testing.assert_close(found, values, rtol=0, atol=0)
    for bad, message in (
        ({"lin0.lora_A": state["lin0.lora_A"]}, "lin0.lora_B: missing"),
        ({**state, "lin7.lora_B": torch.ones(2, 2)}, "lin7.lora_B: unexpected"),
        ({**state, "lin0.lora_B": state["lin0.lora_B"] * float("nan")}, "lin0: B has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            federated.refactorize_state(bad)


def spoilt(state, change):
    """A state that does not fit, and what is said about it."""
    key, other = "lin0.lora_B", {**state}
    if change == "missing":
        del other[key]
        return other, f"{key}: missing"
    if change == "no dict":
        return list(state.values()), "expected a dict of tensors, got list"
    other[{"extra": "lin9.lora_B", "orthonormal": "lin0.lora_A"}.get(change, key)] = {
        "extra": torch.ones(2, 2),
        "shape": torch.ones(1, 4),
        "transposed": state[key].T,
        "dtype": state[key].double(),
        "pickle": [1.0],
        "nan": state[key] * float("nan"),
        "inf": state[key] / 0,
        "orthonormal": state.get("lin0.lora_A", torch.ones(4, 12)) + 1e-2,
    }[change]
    message = {
        "extra": "lin9.lora_B: unexpected",
        "shape": r"found shape \(1, 4\), expected \(16, 4\)",
        "transposed": r"found shape \(4, 16\), expected \(16, 4\)",
        "dtype": "found dtype torch.float64, expected torch.float32",
        "pickle": "found list, expected a tensor",
        "nan": "not finite",
        "inf": "not finite",
        "orthonormal": "lin0.lora_A: its rows are not orthonormal",
    }[change]
    return other, message


CHANGES = ["missing", "no dict", "extra", "shape", "transposed", "dtype", "pickle", "nan", "inf"]


@pytest.mark.parametrize("change", [*CHANGES, "orthonormal"])
def test_a_state_that_does_not_fit_is_refused_whole(mlp, change):
    model = fedsvd(mlp, target_modules=["lin0", "lin1"])
    federated.refactorize_model(model)
    state, before = federated.global_state(model), copy.deepcopy(model.state_dict())
    federated.load_global(model, {key: value.clone() for key, value in state.items()}, orthonormal=True)
    state = {key: 0.999999 * value for key, value in state.items()}
    bad, message = spoilt(state, change)
    with pytest.raises(ValueError, match=f"(?s)nothing was loaded.*{message}"):
        federated.load_global(model, bad, orthonormal=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("change", CHANGES)
def test_a_reply_that_does_not_fit_is_refused(mlp, change):
    model = fedsvd(mlp, target_modules=["lin0", "lin1"])
    state, B = federated.global_state(model), federated.client_state(model)
    bad, message = spoilt(B, change)
    with pytest.raises(ValueError, match=f"(?s)Reply 1 does not fit.*{message}"):
        federated.average_B(state, [(1, B), (1, bad)])


@pytest.mark.parametrize("examples", [0, -1, True, 1.0, float("nan"), "3", None])
def test_only_a_count_of_examples_is_one(examples):
    state = a_state()
    ((_, B),) = replies_of(state, 1)
    with pytest.raises(ValueError, match="Reply 0: the number of examples must be a positive int"):
        federated.average_B(state, [(examples, B)])
    mean = federated.average_B(state, [(examples, B)], "uniform")
    assert all(torch.equal(value, B[key]) for key, value in mean.items())


def test_averages_say_what_they_lack():
    state = a_state()
    with pytest.raises(ValueError, match="There is no reply"):
        federated.average_B(state, [])
    with pytest.raises(ValueError, match="`weighting` must be"):
        federated.average_B(state, replies_of(state), "samples")
    with pytest.raises(ValueError, match="lora_A: unexpected"):  # A is the server's
        federated.average_B(state, [(1, state)])
    with pytest.raises(ValueError, match="`factors` must be"):
        federated.client_state(fedsvd(MLP(), target_modules=["lin0"]), factors="C")


def test_states_reach_adapters_of_any_dtype_and_only_their_factors(mlp):
    model = fedsvd(mlp, target_modules=["lin0"])
    state = federated.global_state(model)
    A = model.base_model.model.lin0.lora_A["default"].weight.detach().clone()
    federated.load_global(model, {"lin0.lora_B": torch.ones(16, 4)}, factors="B")
    assert torch.equal(model.base_model.model.lin0.lora_A["default"].weight, A)
    half = fedsvd(MLP().half(), target_modules=["lin0"])
    peft.tuners.tuners_utils.cast_adapter_dtype(half, "default", False)
    half.base_model.model.lin0.lora_B.half()
    federated.load_global(half, state)
    assert federated.client_state(half)["lin0.lora_B"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"lin0.lora_B: overflows torch\.float16"):
        federated.load_global(half, {**state, "lin0.lora_B": torch.full((16, 4), 1e6)})
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        federated.load_global(model, state)


@pytest.mark.parametrize("eta", [1e-3, 0.1])
def test_noise_of_the_product_follows_its_closed_form(eta):
    d_out, d_in, r, draws = 24, 40, 4, 400
    A, B = factors(d_out, d_in, r, torch.float64)
    noise = torch.Generator().manual_seed(1)
    E_A, E_B = (eta * torch.randn((draws, *f.shape), generator=noise, dtype=torch.float64) for f in (A, B))
    b_only = (E_B @ A).square().sum((1, 2)).mean()
    both = ((B + E_B) @ (A + E_A) - B @ A).square().sum((1, 2)).mean()
    of_B = d_out * eta**2 * A.square().sum()
    of_both = of_B + d_in * eta**2 * B.square().sum() + r * d_out * d_in * eta**4
    torch.testing.assert_close((b_only, both), (of_B, of_both), rtol=0.05, atol=0)


@pytest.mark.parametrize("name, needs", [("FedSVDStrategy", "flwr"), ("DPSpec", "opacus")])
def test_a_missing_engine_is_named_with_the_way_to_get_it(monkeypatch, name, needs):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {needs!r}", name=f"{needs}.part")

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        federated.nothing  # noqa: B018
    monkeypatch.setattr(federated.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"peftx.federated.{name} needs {needs}: pip install 'peftx\[federated\]'"):
        getattr(federated, name)
