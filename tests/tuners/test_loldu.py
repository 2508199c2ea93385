"""The invariants of LoLDU, against a textbook elimination and the dense formula, in float64."""

import copy
import typing

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import peftx
from peftx.tuners.loldu import InitMethod, LoLDU, LoLDULayer, ldu, start

INIT_METHODS = typing.get_args(InitMethod)
TARGETS = ["lin0", "lin1"]


def elimination(weight):
    """Gaussian elimination with partial pivoting, step by step: (P L, d, U) with W = P L diag(d) U."""
    schur, k = weight.clone(), min(weight.shape)
    L, U = torch.zeros(len(weight), k, dtype=weight.dtype), torch.zeros(k, weight.shape[1], dtype=weight.dtype)
    used = torch.zeros(len(weight), dtype=torch.bool)
    for i in range(k):
        column = schur[:, i].abs().masked_fill(used, -1)
        row = int(column.argmax())
        used[row] = True
        U[i] = schur[row]
        L[:, i] = (schur[:, i] / schur[row, i]).masked_fill(used, 0)
        L[row, i] = 1
        schur = schur - torch.outer(L[:, i], U[i])
        schur[used] = 0
    d = U.diagonal().clone()
    return L, d, U / d[:, None]


def layer(in_features=12, out_features=10, seed=0, trained=True, **kwargs):
    """A LoLDU layer in float64, with z and sigma moved away from their start."""
    torch.manual_seed(seed)
    base = nn.Linear(in_features, out_features, dtype=torch.float64)
    adapted = LoLDULayer(base, "default", peftx.LoLDUConfig(**{"r": 4, **kwargs}))
    if trained:
        adapted.adapters["default"].z.data += torch.randn(adapted.adapters["default"].z.shape, dtype=torch.float64)
        adapted.adapters["default"].sigma.data += 0.5
    return adapted


def dense_oracle(adapted, z, sigma):
    """W + PL diag(sigma z - sigma_0 z_0) U from the step-by-step elimination."""
    r = len(z)
    L, _, U = elimination(adapted.base_layer.weight.detach())
    return (
        adapted.base_layer.weight.detach() + L[:, :r] @ torch.diag(sigma * z - adapted.adapters["default"].c0) @ U[:r]
    )


@given(out=st.integers(1, 9), n=st.integers(1, 9), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_panel_factorisation_is_the_leading_part_of_the_whole(out, n, data):
    r = data.draw(st.integers(1, min(out, n)))
    weight = torch.randn(out, n, dtype=torch.float64)
    L, d, U = elimination(weight)
    found = ldu(weight, r)
    torch.testing.assert_close(found.PL, L[:, :r], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.d, d[:r], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.U, U[:r], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("out, n", [(40, 40), (40, 24), (24, 40)])
def test_agrees_with_lapacks_full_lu_and_reconstructs_at_full_rank(out, n):
    weight, k = torch.randn(out, n, dtype=torch.float64), min(out, n)
    P, L, U = torch.linalg.lu(weight)
    found = ldu(weight, k)
    torch.testing.assert_close(found.PL, P @ L)
    torch.testing.assert_close(found.d, U.diagonal())
    torch.testing.assert_close((found.PL * found.d) @ found.U, weight)
    torch.testing.assert_close(found.U.diagonal(), torch.ones(k, dtype=torch.float64))
    assert found.PL.abs().max() <= 1


def singular(kind):
    torch.manual_seed(0)
    weight = torch.randn(8, 6, dtype=torch.float64)
    if kind == "zero":
        weight.zero_()
    elif kind == "rank 2":
        weight = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    elif kind == "zero column":
        weight[:, 0] = 0
    elif kind == "zero row":
        weight[3] = 0
    else:
        weight[:, 1] = weight[:, 0]
    return weight


@pytest.mark.parametrize("kind", ["zero", "rank 2", "zero column", "zero row", "equal columns"])
def test_singular_weights_are_safe(kind):
    weight = singular(kind)
    found = ldu(weight, 6)
    assert all(torch.isfinite(part).all() for part in found)
    torch.testing.assert_close((found.PL * found.d) @ found.U, weight)
    base = nn.Linear(6, 8, dtype=torch.float64)
    base.weight.data = weight
    adapted = LoLDULayer(base, "default", peftx.LoLDUConfig(r=6))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(adapted(x), base(x))
    adapted.adapters["default"].z.data += 1
    assert torch.isfinite(adapted(x)).all()


@pytest.mark.parametrize("alpha", [None, 1, 7.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init_method", INIT_METHODS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_starts_exactly_as_the_base(mlp, init_method, dtype, alpha, autocast_adapter_dtype):
    mlp = mlp.to(dtype)
    x = torch.randn(5, 12, dtype=dtype)
    y = mlp(x)
    config = peftx.LoLDUConfig(r=5, alpha=alpha, init_method=init_method, target_modules=TARGETS)
    model = peft.get_peft_model(mlp, config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert torch.equal(model(x), y)
    for module in model.modules():
        if isinstance(module, LoLDULayer):
            assert torch.count_nonzero(module.adapters["default"].coefficients()) == 0


def test_start_follows_its_definition():
    torch.manual_seed(0)
    d = torch.randn(20000, dtype=torch.float64) * 3 + 1
    mean, std = d.mean(), d.std()
    z = {method: start(d, method) for method in INIT_METHODS}
    assert torch.equal(z["lu"], d)
    assert torch.equal(z["constant"], torch.full_like(d, mean.item()))
    assert torch.equal(z["ones"], torch.ones_like(d)) and torch.equal(z["zeros"], torch.zeros_like(d))
    assert z["uniform"].abs().max() <= mean.abs() / 2 and z["uniform"].std().item() == pytest.approx(
        mean.abs().item() / 12**0.5, rel=0.05
    )
    assert z["normal"].mean().item() == pytest.approx(mean.item(), abs=0.1)
    assert z["normal"].std().item() == pytest.approx(std.item(), rel=0.05)
    assert z["s_uniform"].abs().max() <= 1 and z["s_uniform"].std().item() == pytest.approx(3**-0.5, rel=0.05)
    assert z["s_normal"].std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("r, tokens", [(1, 6), (4, 6), (10, 6), (10, 4000)])
def test_forward_and_gradients_equal_the_dense_formula(r, tokens):
    adapted = layer(r=r)  # the last case takes the dense path
    assert adapted.adapters["default"].prefers_dense(tokens) == (tokens == 4000)
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(tokens, 10, dtype=torch.float64) / tokens
    z, sigma = adapted.adapters["default"].z, adapted.adapters["default"].sigma
    y = adapted(x)
    found = torch.autograd.grad(y, [x, z, sigma], g)

    L, _, U = elimination(adapted.base_layer.weight.detach())
    weight = dense_oracle(adapted, z.detach(), sigma.detach())
    torch.testing.assert_close(y, x @ weight.T + adapted.base_layer.bias)
    t = ((x @ U[:r].T) * (g @ L[:, :r])).sum(0)  # the closed form of the spec
    torch.testing.assert_close(found[0], g @ weight)
    torch.testing.assert_close(found[1], sigma * t)
    torch.testing.assert_close(found[2], (t @ z)[None])


def test_paths_agree(monkeypatch):
    adapted, x = layer(r=10), torch.randn(7, 12, dtype=torch.float64)
    outputs = []
    for dense in (False, True):
        monkeypatch.setattr(LoLDU, "prefers_dense", lambda *_, dense=dense: dense)
        outputs.append(adapted(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("train_sigma", [True, False])
def test_trains_r_plus_one_parameters_and_freezes_the_rest(mlp, train_sigma):
    model = peft.get_peft_model(mlp, peftx.LoLDUConfig(r=5, train_sigma=train_sigma, target_modules=TARGETS))
    assert model.get_nb_trainable_parameters()[0] == 2 * (5 + train_sigma)
    model.set_adapter("default")  # which would make everything trainable again
    assert model.get_nb_trainable_parameters()[0] == 2 * (5 + train_sigma)
    model(torch.randn(3, 12)).sum().backward()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == ({"z", "sigma"} if train_sigma else {"z"})
    assert not any(b.requires_grad for _, b in model.named_buffers())


def test_delta_has_rank_r_and_only_sigma_z_enters():
    adapted, x = layer(r=3), torch.randn(5, 12, dtype=torch.float64)
    assert torch.linalg.matrix_rank(adapted.adapters["default"].delta_weight()) == 3
    y = adapted(x)
    adapted.adapters["default"].z.data *= 4
    adapted.adapters["default"].sigma.data /= 4
    torch.testing.assert_close(adapted(x), y)


def test_merge_unmerge_and_lora_factors():
    adapted, x = layer(r=4).float(), torch.randn(5, 12)
    before, y = adapted.base_layer.weight.clone(), adapted(x)
    A, B = adapted.lora_factors("default")
    torch.testing.assert_close(y, adapted.base_layer(x) + x @ A.T @ B.T)
    adapted.merge(safe_merge=True)
    torch.testing.assert_close(adapted(x), y, rtol=0, atol=1e-5)
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, before, rtol=0, atol=1e-6)


def deltas_after_training(base, init_method, steps=15):
    torch.manual_seed(1)
    config = peftx.LoLDUConfig(r=4, init_method=init_method, train_sigma=False, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (12, 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    for _ in range(steps):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [m.adapters["default"].delta_weight().detach() for m in model.modules() if isinstance(m, LoLDULayer)]


def test_the_start_of_z_is_irrelevant_without_sigma_and_decay(mlp):
    mlp = mlp.double()
    wanted = deltas_after_training(mlp, "lu")
    assert max(delta.abs().max() for delta in wanted) > 1e-2
    for init_method in INIT_METHODS:
        for mine, theirs in zip(deltas_after_training(mlp, init_method), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("save_projection", [False, True])
@pytest.mark.parametrize("init_method", INIT_METHODS)
def test_round_trip_with_another_seed_is_exact(mlp, tmp_path, init_method, save_projection):
    base, x = copy.deepcopy(mlp), torch.randn(5, 12)
    config = peftx.LoLDUConfig(
        r=4, alpha=3, init_method=init_method, save_projection=save_projection, target_modules=TARGETS
    )
    model = peft.get_peft_model(mlp, config)
    for name, parameter in model.named_parameters():
        if "loldu" in name:
            parameter.data += 0.1
    y = model(x)
    model.save_pretrained(tmp_path)
    saved = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    projection = {"PL", "U"} if save_projection else set()
    assert saved == {"z", "sigma", "c0", "rows", "pivots", "sketch"} | projection
    torch.manual_seed(99)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, adapter_name="other"
        )
        assert torch.equal(loaded(x), y)


def test_another_base_is_refused_unless_the_projection_was_saved(mlp, tmp_path):
    torch.manual_seed(5)
    other = type(mlp)().eval()
    x = torch.randn(5, 12)
    for save_projection in (False, True):
        folder = tmp_path / str(save_projection)
        config = peftx.LoLDUConfig(r=4, save_projection=save_projection, target_modules=TARGETS)
        model = peft.get_peft_model(copy.deepcopy(mlp), config)
        for name, parameter in model.named_parameters():
            if "loldu" in name:
                parameter.data += 0.1
        model.save_pretrained(folder)
        if save_projection:
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(other), folder)
            for name in TARGETS:
                mine, theirs = (getattr(m.base_model.model, name).get_delta_weight("default") for m in (loaded, model))
                torch.testing.assert_close(mine, theirs)
        else:
            before = other(x)
            with pytest.raises(ValueError, match=r"lin0: .*factorises otherwise.*save_projection=True"):
                peft.PeftModel.from_pretrained(other, folder)
            assert type(other.lin0) is nn.Linear and torch.equal(other(x), before)


@pytest.mark.parametrize("r", [9, 100])
def test_a_rank_above_the_width_is_refused(mlp, r):
    before = list(mlp.named_modules())
    with pytest.raises(ValueError, match=rf"'lin1'.*r={r}.* = 8"):
        peft.get_peft_model(mlp, peftx.LoLDUConfig(r=r, target_modules=["lin1"]))
    assert [name for name, _ in mlp.named_modules()] == [name for name, _ in before]
    model = peft.get_peft_model(
        mlp, peftx.LoLDUConfig(r=12, rank_pattern={"lin1": 8}, alpha_pattern={"lin1": 4}, target_modules=TARGETS)
    )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoLDULayer)}
    assert [len(m.adapters["default"].z) for m in layers.values()] == [12, 8]
    assert [m.adapters["default"].sigma.item() for m in layers.values()] == [1.0, 0.5]


def test_a_second_adapter_factorises_the_unmerged_weight():
    adapted, x = layer(r=4), torch.randn(5, 12, dtype=torch.float64)
    wanted = ldu(adapted.base_layer.weight, 3)
    y = adapted(x)
    adapted.merge()
    adapted.update_layer("second", peftx.LoLDUConfig(r=3))
    torch.testing.assert_close(adapted.adapters["second"].PL, wanted.PL)
    torch.testing.assert_close(adapted.adapters["second"].U, wanted.U)
    adapted.unmerge()
    base = adapted.base_layer(x)
    adapted.adapters["second"].z.data += 1
    adapted.set_adapter("second")
    second = adapted(x)
    torch.testing.assert_close(second, base + x @ adapted.adapters["second"].delta_weight().T)
    adapted.set_adapter(["default", "second"])
    torch.testing.assert_close(adapted(x), y + second - base)
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), adapted.base_layer(x))


def test_meta_weights_are_refused_with_the_reason():
    with torch.device("meta"):
        base = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="meta device"):
        LoLDULayer(base, "default", peftx.LoLDUConfig(r=2))


@pytest.mark.parametrize("field, value", [("init_method", "svd"), ("train_sigma", 1), ("alpha", "8"), ("r", 2.0)])
def test_config_refuses_wrong_values(field, value):
    with pytest.raises(TypeError, match=rf"LoLDUConfig: .*{field}"):
        peftx.LoLDUConfig(**{field: value})


# Files of one base in several dtypes


def in_dtype(base, kind):
    """The same base with other weights: rounded, or quantised by bitsandbytes."""
    if isinstance(kind, torch.dtype):
        return copy.deepcopy(base).to(kind)
    model = copy.deepcopy(base)
    for name in TARGETS:
        setattr(model, name, bnb_linear(getattr(model, name), kind))
    return model


def bnb_linear(dense, kind):
    bnb = pytest.importorskip("bitsandbytes")
    size = dense.in_features, dense.out_features
    new = (
        bnb.nn.Linear4bit(*size, quant_type="nf4")
        if kind == "nf4"
        else bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
    )
    new.load_state_dict(dense.state_dict())
    return new.to("cpu")


def wide():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("lin0", nn.Linear(128, 192))
    model.add_module("lin1", nn.Linear(192, 64))
    return model.eval()


KINDS = [torch.float32, torch.float16, torch.bfloat16, "int8", "nf4"]
BOUNDS = {torch.float32: 1e-6, torch.float16: 0.01, torch.bfloat16: 0.05, "int8": 0.2, "nf4": 0.9}


@pytest.mark.parametrize("served", KINDS, ids=str)
@pytest.mark.parametrize("trained", KINDS, ids=str)
def test_a_file_serves_the_same_base_in_another_dtype(trained, served, tmp_path):
    model = peft.get_peft_model(in_dtype(wide(), trained), peftx.LoLDUConfig(r=16, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".z"):
            parameter.data += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(in_dtype(wide(), served), tmp_path)
    for name in TARGETS:
        theirs, mine = (m.base_model.model.get_submodule(name).get_delta_weight("default") for m in (model, loaded))
        bound = BOUNDS[served] + BOUNDS[trained]
        assert (mine - theirs).norm() <= bound * theirs.norm()
        if trained == served == torch.float32:
            assert torch.equal(mine, theirs)
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(in_dtype(wide(), served), tmp_path / "again")
    for name in TARGETS:
        mine, theirs = (m.base_model.model.get_submodule(name).get_delta_weight("default") for m in (again, loaded))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("change", ["other", "shuffled", "negated", "scaled"])
def test_other_weights_are_no_other_dtype(change, tmp_path):
    base = wide()
    peft.get_peft_model(copy.deepcopy(base), peftx.LoLDUConfig(r=16, target_modules=TARGETS)).save_pretrained(tmp_path)
    with torch.no_grad():
        weight = base.lin1.weight
        if change == "other":
            weight.normal_(std=weight.std())
        elif change == "shuffled":
            weight.copy_(weight[torch.randperm(64)])
        else:
            weight *= -1 if change == "negated" else 1.5
    before = base.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(ValueError, match=r"lin1: .*factorises otherwise"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16, "nf4"], ids=str)
def test_a_fine_tuned_base_is_another_one_at_any_rank(r, served, tmp_path):
    base = wide()
    peft.get_peft_model(copy.deepcopy(base), peftx.LoLDUConfig(r=r, target_modules=TARGETS)).save_pretrained(tmp_path)
    torch.manual_seed(2)
    with torch.no_grad():
        for module in base:  # NF4 alone moves the weights by 9 %
            noise = torch.randn_like(module.weight) * module.weight.std()
            module.weight += noise * (0.45 if served == "nf4" else 0.06)
    with pytest.raises(ValueError, match="factorises otherwise.*it is another model"):
        peft.PeftModel.from_pretrained(in_dtype(base, served), tmp_path)


def test_a_rounding_that_the_rank_does_not_bear_is_told_from_another_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("lin0", nn.Linear(192, 192))
    config = peftx.LoLDUConfig(r=192, target_modules=["lin0"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    quantised = nn.Sequential()
    quantised.add_module("lin0", bnb_linear(base.lin0, "nf4"))
    with pytest.raises(ValueError, match="factorises otherwise.*it is the same weight.*192 pivots.*save_projection"):
        peft.PeftModel.from_pretrained(quantised, tmp_path)
    peft.PeftModel.from_pretrained(in_dtype(base, torch.bfloat16), tmp_path)


def changed(folder, change, **kwargs):
    """The file of an adapter on `lin0` with one of its tensors changed."""
    config = peftx.LoLDUConfig(r=3, target_modules=["lin0"], **kwargs)
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("lin0", nn.Linear(12, 16))
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = {key.rpartition(".")[2]: tensor for key, tensor in load_file(path).items()}
    change(tensors)
    save_file({f"base_model.model.lin0.loldu_adapter.{name}": t.contiguous() for name, t in tensors.items()}, path)
    return base


NAN = float("nan")
HOSTILE = {
    "rows twice": ("rows", lambda t: torch.tensor([0, 0, 1])),
    "rows beyond": ("rows", lambda t: torch.tensor([0, 1, 99])),
    "rows negative": ("rows", lambda t: torch.tensor([-1, 0, 1], dtype=torch.int32)),
    "rows huge": ("rows", lambda t: t.long() + 2**40),
    "rows as floats": ("rows", lambda t: t + 0.5),
    "rows as bools": ("rows", lambda t: torch.tensor([True, False, True])),
    "rows too many": ("rows", lambda t: torch.arange(4)),
    "rows in a matrix": ("rows", lambda t: t[None]),
    "pivots nan": ("pivots", lambda t: t * NAN),
    "pivots whole": ("pivots", lambda t: t.int()),
    "pivots too few": ("pivots", lambda t: t[:2]),
    "pivots huge": ("pivots", lambda t: t * 1e30),
    "pivots negated": ("pivots", lambda t: -t),
    "sketch nan": ("sketch", lambda t: t * NAN),
    "sketch short": ("sketch", lambda t: t[:5]),
    "sketch coarse": ("sketch", lambda t: torch.cat([-t[:-1], torch.tensor([1e30])])),
    "checksum": ("checksum", lambda t: torch.tensor([NAN])),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_values_are_refused_and_the_model_is_as_it_was(kind, low_cpu_mem_usage, tmp_path):
    name, change = HOSTILE[kind]

    def apply(tensors):
        tensors[name] = change(tensors.get(name))
        if name == "checksum":
            for other in ("rows", "pivots", "sketch"):
                del tensors[other]

    base = changed(tmp_path, apply)
    weight = base.lin0.weight.detach().clone()
    with pytest.raises(ValueError, match=f"lin0.*{name}|lin0: The base weight factorises otherwise"):
        peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(base.lin0) is nn.Linear and torch.equal(base.lin0.weight, weight) and base.lin0.weight.requires_grad


@pytest.mark.parametrize("save_projection", [False, True])
def test_a_file_from_before_the_sketch_loads(save_projection, tmp_path):
    base = changed(tmp_path, lambda tensors: tensors.pop("sketch"), save_projection=save_projection)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert any(key.endswith(".sketch") for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))


def test_given_rows_make_the_factors_of_their_order():
    weight = torch.randn(9, 7, dtype=torch.float64)
    own = ldu(weight, 4)
    again = ldu(weight, 4, own.rows)
    for mine, theirs in zip(own, again, strict=True):
        torch.testing.assert_close(mine, theirs)
    other = ldu(weight, 4, own.rows.flip(0))  # any order of the same rows spans the same
    torch.testing.assert_close((other.PL * other.d) @ other.U, (own.PL * own.d) @ own.U)


def test_only_the_panel_is_converted():
    weight = torch.randn(64, 512).to(torch.bfloat16)
    seen = []
    original = torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        if result.dtype == torch.float64:
            seen.append(result.numel())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", watched)
        LoLDULayer(nn.Linear(512, 64).to(torch.bfloat16), "default", peftx.LoLDUConfig(r=4))
    assert seen and sum(seen) <= 4 * (64 + 512) + 64
    assert weight.dtype == torch.bfloat16
