"""The invariants of Compacter, against Kronecker products written from the formula, in float64."""

import copy
import re
from functools import partial

import peft
import pytest
import torch
import transformers
from conftest import MLP, forward, logits, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import peftx
from peftx.tuners.compacter import ACTIVATIONS, COMPACTER, COMPACTER_PLUS_PLUS, CompacterLayer, down_factors, up_factor

TARGETS = ["lin0", "lin1"]
TINY = {"phm_dim": 2, "reduction_factor": 2, "target_modules": TARGETS}


def H(rule, s, t=None):
    """sum_i kron(A_i, s_i t_i), or of full matrices s_i."""
    return sum(
        torch.kron(a, s_i if t is None else s_i @ t_i)
        for a, s_i, t_i in zip(rule, s, s if t is None else t, strict=True)
    )


def oracle(h, rule, p, phi=ACT2FN["gelu_new"]):
    """h + up(phi(down(h))) of one adapter, for its tensors `p` by name ("down_s", ...) and a rule for both sides."""
    rules = [p.get(f"{side}_rule", rule) for side in ("down", "up")]
    down = H(rules[0], p["down_s"], p.get("down_t"))
    up = H(rules[1], p["up_s"], p["up_t"]) if "up_s" in p else H(rules[1], p["up_t"])
    return h + phi(h @ down + p.get("down_bias", 0)) @ up + p.get("up_bias", 0)


def adapted(model=None, std=0.3, seed=0, **config):
    """A small model with a trained adapter, in float64 and in eval mode."""
    torch.manual_seed(seed)
    model = peft.get_peft_model((model or MLP()).double(), peftx.CompacterConfig(**{**TINY, **config}))
    for name, parameter in model.named_parameters():
        if "compacter_" in name:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, CompacterLayer)]


def rule_of(model, name="default"):
    return model.base_model.compacter_rule[name].weight


def tensors_of(layer, name="default"):
    return dict(layer.adapters[name].named_parameters())


def number_trained(model):
    return model.get_nb_trainable_parameters()[0]


# 1, the map


@given(
    n=st.sampled_from([1, 2, 3, 4, 8]),
    p=st.integers(1, 4),
    q=st.integers(1, 4),
    k=st.integers(1, 3),
    batch=st.lists(st.integers(0, 3), max_size=2).map(tuple),
)
@settings(deadline=None, max_examples=60)
def test_both_ends_equal_the_kronecker_sum(n, p, q, k, batch):
    rule, s, t = (torch.randn(n, *shape, dtype=torch.float64) for shape in ((n, n), (p, k), (k, q)))
    x = torch.randn(*batch, n * p, dtype=torch.float64)
    wanted = x @ H(rule, s, t)
    wide, narrow = down_factors(rule, s, t)
    inner = (x.unflatten(-1, (n, -1)) @ wide.T).flatten(-2)
    torch.testing.assert_close(inner @ narrow.T, wanted, rtol=0, atol=1e-10)
    outer = (x @ up_factor(rule, s)).unflatten(-1, (n, -1))
    torch.testing.assert_close((outer @ t.flatten(0, 1)).flatten(-2), wanted, rtol=0, atol=1e-10)


MODES = {
    "published": {},
    "n 4, rank 2": {"phm_dim": 4, "phm_rank": 2},
    "n 8": {"phm_dim": 8, "reduction_factor": 1},
    "full matrices": {"factorized_phm": False},
    "private rules": {"shared_phm_rule": False},
    "PHM-adapter": {"phm_dim": 4, "shared_phm_rule": False, "factorized_phm": False},
    "no biases": {"phm_bias": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_layer_and_gradients_equal_the_formula(mode):
    model = adapted(nn.Sequential(nn.Linear(12, 16)), **{**MODES[mode], "target_modules": ["0"]})
    (layer,) = layers_of(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 16, dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert ("rule" in mode or mode == "PHM-adapter") == (not model.base_model.compacter_rule)
    y = model(x)
    rule = rule_of(model) if model.base_model.compacter_rule else None
    wanted = oracle(layer.base_layer(x), rule, tensors_of(layer))
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    for mine, theirs in zip(
        torch.autograd.grad(y, [x, *trained], g), torch.autograd.grad(wanted, [x, *trained], g), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_non_linearities_are_those_of_transformers(name):
    model, x = adapted(non_linearity=name), torch.randn(3, 12, dtype=torch.float64)
    layer = layers_of(model)[0]
    wanted = oracle(layer.base_layer(x), rule_of(model), tensors_of(layer), ACT2FN[name])
    torch.testing.assert_close(layer(x), wanted)


def test_the_rank_of_a_projection_is_at_most_n_squared_k():
    rule, s, t = torch.randn(4, 4, 4), torch.randn(4, 24, 1), torch.randn(4, 1, 24)
    assert torch.linalg.matrix_rank(H(rule, s, t)) == 16


# 2, the start


def test_starts_as_published():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 2048))
    x, y = torch.randn(50, 64), base(torch.ones(1, 64))
    model = peft.get_peft_model(base, peftx.CompacterConfig(target_modules=["0"]))
    (layer,) = layers_of(model)
    p, rule = tensors_of(layer), rule_of(model)
    assert 0 < (model(torch.ones(1, 64)) - y).abs().max() < 1e-5
    assert rule.shape == (4, 4, 4) and rule.std().item() == pytest.approx(1e-4, rel=0.3)
    for name, shape in {"down_s": (4, 512, 1), "down_t": (4, 1, 16), "up_s": (4, 16, 1), "up_t": (4, 1, 512)}.items():
        bound = (2 * 6 / (shape[1] + shape[2])) ** 0.5  # Xavier with gain sqrt(2), of each matrix by itself
        assert p[name].shape == shape and 0.8 * bound < p[name].abs().max() <= bound
        assert p[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert not p["down_bias"].any() and not p["up_bias"].any()
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))


@pytest.mark.parametrize("options", [{}, {"factorized_phm": False}, {"shared_phm_rule": False}])
def test_identity_starts_exactly_as_the_base_and_trains(mlp, options):
    x = torch.randn(3, 12)
    y = mlp(x)
    model = peft.get_peft_model(mlp, peftx.CompacterConfig(init_weights="identity", **TINY, **options))
    assert torch.equal(model(x), y)
    model(x).square().sum().backward()
    assert all(tensors_of(layer)[name].grad.any() for layer in layers_of(model) for name in ("up_t", "up_bias"))


def test_the_range_of_the_rule_is_chosen(mlp):
    rules = []
    for options in ({"phm_init_range": 3.0}, {"phm_init_range": 0}, {"init_weights": False}):
        model = peft.get_peft_model(copy.deepcopy(mlp), peftx.CompacterConfig(**TINY | {"phm_dim": 4} | options))
        rules.append(rule_of(model).std().item())
    assert rules == [pytest.approx(3, rel=0.3), 0, pytest.approx(1, rel=0.3)]


# 3, the count


@pytest.mark.parametrize("targets", [["lin0"], ["lin0", "lin1"], ["lin0", "lin1", "head"]])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "n 8"])
def test_number_of_trained_parameters(mlp, targets, mode):
    options = {**TINY, "reduction_factor": 1, **MODES[mode], "target_modules": targets} | {"reduction_factor": 1}
    config = peftx.CompacterConfig(**options)
    n, k, wanted = config.phm_dim, config.phm_rank, config.phm_dim**3 * config.shared_phm_rule
    for name in targets:
        d = b = getattr(mlp, name).out_features
        wanted += 2 * k * (d + b) if config.factorized_phm else 2 * d * b // n
        wanted += (d + b) * config.phm_bias + 2 * n**3 * (not config.shared_phm_rule)
    assert number_trained(peft.get_peft_model(mlp, config)) == wanted


@pytest.fixture(scope="module")
def t5_base():
    config = transformers.T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=32100, feed_forward_proj="relu"
    )
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("options", "number", "percent"),
    [
        ({"ffn_only": True}, 57_088, 0.026),
        ({"ffn_only": True, "train_layer_norms": True}, 104_704, 0.047),
        ({"train_layer_norms": True}, 161_728, 0.073),
        (dict(phm_dim=12, shared_phm_rule=False, factorized_phm=False, train_layer_norms=True), 398_976, 0.179),
    ],
    ids=["Compacter++", "Compacter++ and norms", "Compacter and norms", "PHM-adapter and norms"],
)
def test_t5_base_has_the_papers_numbers(t5_base, options, number, percent):
    model = peft.get_peft_model(copy.deepcopy(t5_base), peftx.CompacterConfig(**options))
    assert number_trained(model) == number
    assert 100 * number / 222_882_048 == pytest.approx(percent, abs=5e-4)
    assert all(parameter.is_meta for parameter in model.parameters())


# 4, one rule


def test_all_layers_see_one_rule_whatever_happens_to_the_model(mlp, tmp_path):
    base, x = copy.deepcopy(mlp).double(), torch.randn(3, 12, dtype=torch.float64)
    model = adapted(mlp)
    y = model(x)
    model.save_pretrained(tmp_path)
    torch.save(model, tmp_path / "pickle")
    models = {
        "fresh": model,
        "deepcopy": copy.deepcopy(model),
        "to": copy.deepcopy(model).to(torch.float32).to(torch.float64),
        "half": copy.deepcopy(model).half().double(),
        "loaded": peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        "low_cpu": peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True),
        "pickle": torch.load(tmp_path / "pickle", weights_only=False),
    }
    containers = set()
    for name, twin in models.items():
        rule, layers = rule_of(twin), layers_of(twin)
        rules = [layer.adapters["default"].rules(rule.device) for layer in layers]
        assert all(down is rule and up is rule for down, up in rules), name
        assert sum(p is rule for p in twin.parameters()) == 1 and sum("rule" in k for k in twin.state_dict()) == 1
        containers.add(id(rule))
        before = [layer(torch.ones(1, layer.in_features).double()) for layer in layers]
        assert torch.allclose(twin(x), y, atol={"to": 1e-5, "half": 1e-2}.get(name, 0)), name
        rule.data += 1
        after = [layer(torch.ones(1, layer.in_features).double()) for layer in layers]
        assert not any(torch.allclose(*pair) for pair in zip(before, after, strict=True)), name
    assert len(containers) == len(models)


def test_the_optimizer_and_print_count_the_rule_once():
    model = adapted()
    groups = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).param_groups[0]["params"]
    assert sum(p is rule_of(model) for p in groups) == 1
    assert number_trained(model) == sum(p.numel() for p in {id(p): p for p in groups}.values())


# 5, the file


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_file_has_one_rule_and_six_tensors_a_module(mlp, tmp_path, low_cpu_mem_usage):
    base, x = copy.deepcopy(mlp), torch.randn(3, 12)
    model = adapted(mlp).float()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    names = {f"compacter_adapter.{side}_{part}" for side in ("down", "up") for part in ("s", "t", "bias")}
    keys = {f"base_model.model.{module}.{name}" for module in TARGETS for name in names}
    assert saved.keys() == keys | {"base_model.compacter_rule.weight"}
    loaded = peft.PeftModel.from_pretrained(
        base, tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert torch.equal(loaded(x), model(x))
    assert number_trained(loaded) == number_trained(model) and rule_of(loaded, "other").requires_grad
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "other" / "adapter_model.safetensors")
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rule: {}, r"compacter_rule\.weight: missing, expected shape \(2, 2, 2\)"),
        (lambda rule: {"rule": rule[:1]}, r"compacter_rule\.weight: found shape \(1, 2, 2\), expected \(2, 2, 2\)"),
        (lambda rule: {"rule": rule / 0}, r"compacter_rule\.weight: found values that are not finite"),
        (lambda rule: {"rule": rule.int()}, r"compacter_rule\.weight: found dtype torch.int32"),
        (lambda rule: {"rule": rule, "other_rule": rule + 1}, r"compacter_other_rule\.weight: unexpected"),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_a_faulty_rule_is_refused_and_nothing_changes(mlp, tmp_path, change, message, second):
    base, x = copy.deepcopy(mlp), torch.randn(3, 12)
    model = adapted(mlp).float()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    rule = saved.pop("base_model.compacter_rule.weight")
    save_file({**saved, **{f"base_model.compacter_{k}.weight": v.contiguous() for k, v in change(rule).items()}}, path)
    model, y = (model, model(x)) if second else (base, base(x))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second") if second else peft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(model(x), y)
    assert list(model.base_model.compacter_rule) == ["default"] if second else type(base.lin0) is nn.Linear


def test_a_shared_rule_where_none_belongs_is_refused(mlp, tmp_path):
    base = copy.deepcopy(mlp)
    adapted(mlp).float().save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"shared_phm_rule": true', '"shared_phm_rule": false'))
    with pytest.raises(
        ValueError, match=r"compacter_adapter\.down_rule: missing(.|\n)*compacter_rule\.weight: unexpected"
    ):
        peft.PeftModel.from_pretrained(base, tmp_path)


# 6, its gradient


def test_the_gradient_of_the_rule_is_the_sum_over_its_uses():
    model, x = adapted(target_modules=[*TARGETS, "head"]), torch.randn(5, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    copies = [rule_of(model).detach().clone().requires_grad_() for _ in range(6)]
    h, mlp = x, model.base_model.model
    for i, layer in enumerate((mlp.lin0, mlp.lin1, mlp.head)):
        private = {"down_rule": copies[2 * i], "up_rule": copies[2 * i + 1]}
        h = oracle(layer.base_layer(h), None, tensors_of(layer) | private)
        h = torch.tanh(h) if i < 2 else h
    gradients = torch.autograd.grad(h.square().sum(), copies)
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(rule_of(model).grad, sum(gradients))


# 7, several adapters


def trained_rules(model):
    return {name for name, rule in model.base_model.compacter_rule.items() if rule.weight.requires_grad}


def test_rules_are_trained_frozen_and_deleted_with_their_adapters(mlp, tmp_path):
    model = adapted(mlp)
    x = torch.randn(3, 12, dtype=torch.float64)
    y = model(x)
    model.save_pretrained(tmp_path)
    model.add_adapter("large", peftx.CompacterConfig(**TINY | {"phm_dim": 4}))
    assert trained_rules(model) == {"default"} and rule_of(model, "large").shape == (4, 4, 4)
    assert torch.equal(model(x), y)
    model.set_adapter("large")
    assert trained_rules(model) == {"large"}
    rule_of(model, "large").data += 1
    assert not torch.allclose(model(x), y)
    model.set_adapter("default")
    assert trained_rules(model) == {"default"} and torch.equal(model(x), y)

    model.load_adapter(tmp_path, "loaded")  # for inference: what is trained stays as it was
    assert trained_rules(model) == {"default"}
    model.set_requires_grad("large")
    assert trained_rules(model) == {"default", "large"}
    model.set_requires_grad(["large", "default"], False)
    assert trained_rules(model) == set() and number_trained(model) == 0
    model.base_model.set_adapter(["default", "large"])
    assert trained_rules(model) == {"default", "large"}
    with model.disable_adapter():
        assert trained_rules(model) == set()
    assert trained_rules(model) == {"default", "large"}

    model.delete_adapter("large")
    assert set(model.base_model.compacter_rule) == {"default", "loaded"}
    model.set_adapter("loaded", inference_mode=True)
    assert trained_rules(model) == set() and torch.equal(model(x), y)
    assert not any("large" in key for key in model.state_dict())
    assert number_trained(peft.PeftModel.from_pretrained(MLP().double(), tmp_path)) == 0


def test_an_adapter_that_fails_leaves_no_rule():
    model = adapted(target_modules=["lin0"])
    with pytest.raises(ValueError, match="'lin1'"):
        model.add_adapter("wide", peftx.CompacterConfig(phm_dim=16, reduction_factor=1, target_modules=TARGETS))
    assert list(model.base_model.compacter_rule) == ["default"] and list(model.peft_config) == ["default"]


def test_active_adapters_follow_one_another():
    model = adapted(target_modules=["lin0"])
    model.add_adapter("second", peftx.CompacterConfig(**{**TINY, "phm_dim": 4, "target_modules": ["lin0"]}))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            nn.init.normal_(parameter, std=0.3)
    (layer,), x = layers_of(model), torch.randn(3, 12, dtype=torch.float64)
    model.base_model.set_adapter(["default", "second"])
    wanted = layer.base_layer(x)
    for name in ("default", "second"):
        wanted = oracle(wanted, rule_of(model, name), tensors_of(layer, name))
    torch.testing.assert_close(layer(x), wanted)
    mixed = layer(x, adapter_names=["second", "__base__", "default"])
    rows = [
        oracle(layer.base_layer(x), rule_of(model, name), tensors_of(layer, name)) for name in ("second", "default")
    ]
    torch.testing.assert_close(mixed, torch.stack([rows[0][0], layer.base_layer(x)[1], rows[1][2]]))


@pytest.mark.parametrize("shared", [True, False])
def test_a_rule_that_is_not_learned_stays_frozen(mlp, shared):
    model = peft.get_peft_model(mlp, peftx.CompacterConfig(**TINY, learn_phm=False, shared_phm_rule=shared))
    for change in (lambda: None, partial(model.set_adapter, "default"), partial(model.set_requires_grad, "default")):
        change()
        rules = {name: p.requires_grad for name, p in model.named_parameters() if "_rule" in name}
        assert len(rules) == (1 if shared else 4) and not any(rules.values())
        assert number_trained(model) == 3 * (16 + 8) + 3 * (8 + 4)
    assert sum("_rule" in key for key in peft.get_peft_model_state_dict(model)) == len(rules)


# 8 is in test_layer.py, for every method that cannot be merged; PEFT itself refuses what only it could allow


def test_a_mixed_model_is_refused_and_the_base_is_untouched(mlp):
    x = torch.randn(3, 12)
    y = mlp(x)
    with pytest.raises((NotImplementedError, ValueError), match="'COMPACTER' is not compatible"):
        peft.get_peft_model(mlp, peftx.CompacterConfig(**TINY), mixed=True)
    assert type(mlp.lin0) is nn.Linear and torch.equal(mlp(x), y)


# 9, bad input


@pytest.mark.parametrize("phm_dim", [3, 32])
def test_a_size_that_does_not_divide_is_named(mlp, phm_dim):
    config = peftx.CompacterConfig(**{**TINY, "phm_dim": phm_dim})
    message = (
        rf"COMPACTER cannot adapt the module 'lin0': phm_dim={phm_dim} does not divide d=16, .*; 1, 2, 4, 8, 16 do"
    )
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(mlp, config)
    assert type(mlp.lin0) is nn.Linear


@pytest.mark.parametrize(
    ("options", "b"), [({"phm_dim": 8, "reduction_factor": 4}, 8), ({"reduction_factor": 32}, 2), ({}, 8)]
)
def test_a_bottleneck_is_a_multiple_of_phm_dim(mlp, options, b):
    model = peft.get_peft_model(mlp, peftx.CompacterConfig(**{**TINY, **options}))
    assert model.base_model.model.lin0.adapters["default"].down_bias.shape == (b,)


class Block(nn.Module):
    """Returns a tuple, as a transformer's blocks do."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(12, 16)

    def forward(self, x):
        return self.lin(x), None


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 3), nn.Embedding(8, 4), Block(), nn.LayerNorm(4), nn.GRU(4, 4)]
)
def test_other_layers_are_refused(module):
    kind = type(module).__name__
    with pytest.raises(TypeError, match=rf"COMPACTER cannot adapt the module '1': {kind} is not supported"):
        peft.get_peft_model(
            nn.Sequential(nn.Linear(4, 4), module), peftx.CompacterConfig(**TINY | {"target_modules": ["1"]})
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"phm_dim": 0}, ValueError, "`phm_dim` must be a positive integer, got 0"),
        ({"reduction_factor": -2}, ValueError, "`reduction_factor` must be a positive integer, got -2"),
        ({"phm_rank": 0}, ValueError, "`phm_rank` must be a positive integer, got 0"),
        ({"phm_dim": 2.0}, TypeError, "`phm_dim` must be of type int"),
        ({"reduction_factor": 0.5}, TypeError, "`reduction_factor` must be of type int"),
        ({"ffn_only": 1}, TypeError, "`ffn_only` must be of type bool"),
        ({"dropout": 1.0}, ValueError, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"phm_init_range": -1}, ValueError, "`phm_init_range` must not be negative, got -1"),
        ({"non_linearity": "gelou"}, ValueError, "`non_linearity` must be one of gelu_new, gelu, .* got 'gelou'"),
        ({"init_weights": "zero"}, TypeError, "`init_weights` must be of type .*identity.*, got 'zero'"),
    ],
)
def test_config_refuses_wrong_values(options, error, message):
    with pytest.raises(error, match=message):
        peftx.CompacterConfig(**options)


# 10, placement


def small(kind):
    if kind in ("llama", "bert", "gpt2", "t5"):
        return tiny_model(kind)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    extra = {"opt": dict(ffn_dim=32, word_embed_proj_dim=16), "vit": dict(image_size=16, patch_size=8)}
    config = transformers.AutoConfig.for_model(kind, **sizes | extra.get(kind, {}))
    auto = {
        "opt": "CausalLM",
        "mistral": "CausalLM",
        "qwen2": "CausalLM",
        "qwen3": "CausalLM",
        "vit": "ImageClassification",
    }
    return getattr(transformers, f"AutoModelFor{auto.get(kind, 'SequenceClassification')}").from_config(config).eval()


FAMILIES = [
    "t5",
    "bert",
    "roberta",
    "deberta",
    "deberta-v2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "opt",
    "vit",
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_compacter_plus_plus_is_the_feed_forward_half(kind):
    names = {}
    for ffn_only in (False, True):
        config = peftx.CompacterConfig(ffn_only=ffn_only, phm_dim=2, reduction_factor=2)
        names[ffn_only] = set(peft.get_peft_model(small(kind), config).targeted_module_names)
    both, feed_forward = names[False], names[True]
    blocks = 4 if kind == "t5" else 2
    assert feed_forward < both and len(both) == 2 * len(feed_forward) == 2 * blocks
    assert all(re.search(r"attn|attention", name.lower()) for name in both - feed_forward)
    assert not any(re.search(r"attn|attention|EncDec|pooler|classifier", name, re.I) for name in feed_forward)
    assert not any(re.search(r"EncDec|crossattention|pooler|classifier", name) for name in both)


@pytest.mark.parametrize("ffn_only", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_default_targets_train_and_load(kind, ffn_only, tokens, tmp_path):
    config = peftx.CompacterConfig(ffn_only=ffn_only, phm_dim=2, reduction_factor=2, init_weights=False)
    base = small(kind)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    assert not torch.allclose(logits(model, tokens), logits(base, tokens))
    forward(model, tokens).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path), tokens), logits(model, tokens))


def test_an_output_dense_of_a_cross_attention_is_left_alone():
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        is_decoder=True,
        add_cross_attention=True,
    )
    model = peft.get_peft_model(transformers.BertLMHeadModel(config), peftx.CompacterConfig(reduction_factor=4))
    assert sorted(name.partition("layer.0.")[2] for name in model.targeted_module_names) == [
        "attention.output.dense",
        "output.dense",
    ]


def test_the_older_layout_of_vit_is_matched_too():
    for name, (both, feed_forward) in {
        "vit.encoder.layer.3.attention.output.dense": (True, False),
        "vit.encoder.layer.3.output.dense": (True, True),
        "vit.encoder.layer.3.intermediate.dense": (False, False),
        "layers.3.mlp.fc2": (True, True),
    }.items():
        assert bool(re.fullmatch(COMPACTER["vit"], name)) == both
        assert bool(re.fullmatch(COMPACTER_PLUS_PLUS["vit"], name)) == feed_forward


def test_unknown_models_need_targets(mlp):
    with pytest.raises(ValueError, match="Please specify `target_modules`.* model type 'custom'"):
        peft.get_peft_model(mlp, peftx.CompacterConfig())


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_layers_to_transform_restricts_the_default_targets(kind):
    options = {"phm_dim": 2, "reduction_factor": 2, "ffn_only": True}
    wanted = peft.get_peft_model(small(kind), peftx.CompacterConfig(**options)).targeted_module_names[1:]
    model = peft.get_peft_model(small(kind), peftx.CompacterConfig(**options, layers_to_transform=[1]))
    assert model.targeted_module_names == wanted and len(wanted) == 1


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5", "deberta"])
def test_layer_norms_are_trained_and_saved(kind, tokens, tmp_path):
    base = small(kind)
    norms = [m for m in base.modules() if re.search("layernorm|rmsnorm", type(m).__name__.lower())]
    config = peftx.CompacterConfig(phm_dim=2, reduction_factor=2, ffn_only=True, train_layer_norms=True)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "compacter_" not in name]
    assert len(trained) == sum(1 for norm in norms for _ in norm.parameters()) > 0
    assert all("modules_to_save.default" in name for name in trained)
    for name, parameter in model.named_parameters():
        if name in trained:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens)) and number_trained(loaded) == 0
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, tokens), logits(base, tokens))


# Training


def test_dropout_is_on_the_adapters_output_and_in_training_only():
    model = adapted(dropout=0.25, target_modules=["lin0"])
    (layer,), x = layers_of(model), torch.randn(400, 12, dtype=torch.float64)
    h = layer.base_layer(x)
    wanted = oracle(h, rule_of(model), tensors_of(layer)) - h
    torch.testing.assert_close(layer(x) - h, wanted)
    found = layer.train()(x) - h
    kept = found != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(found[kept], wanted[kept] / 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_trains_from_the_published_start_in_every_precision(mlp, dtype, autocast):
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.randint(4, (64,))
    base = mlp if autocast else mlp.to(dtype)
    model = peft.get_peft_model(base, peftx.CompacterConfig(**TINY | {"target_modules": [*TARGETS, "head"]}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
            loss = F.cross_entropy(model(x if autocast else x.to(dtype)).float(), y)
        loss.backward()
        assert rule_of(model).dtype == rule_of(model).grad.dtype == torch.float32 and rule_of(model).grad.any()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_module_feeds_the_adapter(kind):
    bnb = pytest.importorskip("bitsandbytes")
    make = {"int8": partial(bnb.nn.Linear8bitLt, has_fp16_weights=False), "nf4": bnb.nn.Linear4bit}[kind]
    base = nn.Sequential(make(64, 32)).to("cpu").train()
    x = torch.randn(5, 64)
    model = peft.get_peft_model(
        base, peftx.CompacterConfig(target_modules=["0"], reduction_factor=4, init_weights=False)
    )
    (layer,) = layers_of(model)
    torch.testing.assert_close(model(x), oracle(layer.base_layer(x), rule_of(model), tensors_of(layer)))
