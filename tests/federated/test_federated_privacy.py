"""Local training of a federated client, with and without Opacus' differential privacy."""

import dataclasses
import json
import math
import random
import warnings

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import SMALL, tiny_model
from torch import nn
from transformers import DataCollatorForSeq2Seq

import peftx

pytest.importorskip("opacus")

from opacus.accountants import PRVAccountant

from peftx.adapters.lora import low_rank
from peftx.federated import local, privacy
from peftx.federated.accounting import BudgetExceeded, epsilon_spent
from peftx.federated.dpsgd import SampleLoss, attached
from peftx.federated.local import LocalSettings, train_local
from peftx.federated.privacy import DPSpec, check_private
from peftx.tuners import fedsvd

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
MODES = ("hooks", "ghost")


def client(
    kind: str = "bert", method: str = "FEDSVD", std: float = 0.3, dropout: float = 0.0, **config
) -> peft.PeftModel:
    """A model whose lora_B weights, of a size that matters, train; in evaluation mode."""
    model = tiny_model(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = dropout
        if isinstance(module, nn.Linear) and kind == "bert":
            module.weight.data *= 10  # a fresh BERT is next to constant
    make = {"FEDSVD": peftx.FedSVDConfig, "LORA": peft.LoraConfig}[method]
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": TARGETS[kind], "task_type": TASKS[kind], "modules_to_save": [], **config}
    model = peft.get_peft_model(model, make(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=generator)
    return model


def rows(kind: str = "bert", n: int = 12, length: int = 7) -> list[dict]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, low=1, high=64):
        return torch.randint(low, high, shape, generator=generator)

    if kind == "bert":
        return [dict(input_ids=draw(length), labels=draw(low=0, high=3)) for _ in range(n)]
    return [dict(input_ids=draw(length), labels=draw(length)) for _ in range(n)]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


SETTINGS = LocalSettings(steps=3, batch_size=4)
LOUD = DPSpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", noise_seed=3)


# Per-sample gradients


@pytest.mark.parametrize("kind, method", [("bert", "FEDSVD"), ("bert", "LORA"), ("llama", "FEDSVD"), ("t5", "LORA")])
def test_sample_gradients_are_those_of_one_sample_at_a_time(kind, method):
    model, data = client(kind, method).double(), rows(kind, 5)
    wanted = []
    for row in data:
        batch = {name: value[None] for name, value in row.items()}
        loss = model(**batch).loss  # the model's own loss of one record
        wanted.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    model.train()
    before = trained(model)
    spec = DPSpec(noise_multiplier=0.0, max_grad_norm=0.05)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with attached(model, optimizer, spec, 0.0, samples=5, batch_size=5, steps=1, seeds=(0, 1)) as private:
        forward = local._forward(model, lambda _: {k: torch.stack([row[k] for row in data]) for k in data[0]}, range(5))
        private.criterion(*forward()).backward()
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            expected = torch.stack([gradients[number] for gradients in wanted])
            assert (parameter.grad_sample - expected).abs().max() <= 1e-6
        assert {n for n, p in model.named_parameters() if getattr(p, "grad_sample", None) is not None} == before.keys()
        private.optimizer.step()
    norms = torch.stack([torch.cat([g.flatten() for g in gradients]).norm() for gradients in wanted])
    assert (norms > 0.05).all()  # every record is clipped
    for number, (name, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
        mean = sum(g[number] * 0.05 / (norm + 1e-6) for g, norm in zip(wanted, norms, strict=True)) / 5
        assert torch.allclose(parameter, before[name] - mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_moves_the_factors_by_the_clip_at_most(mode):
    model, clip = client().double(), 1e-3
    before = trained(model)
    settings = LocalSettings(steps=1, batch_size=1, learning_rate=1.0)
    train_local(model, rows(n=1), None, settings, privacy=DPSpec(noise_multiplier=0, max_grad_norm=clip, mode=mode))
    moved = torch.cat([(before[name] - value).flatten() for name, value in trained(model).items()]).norm()
    assert 0.99 * clip < moved <= clip * (1 + 1e-6)


def test_a_record_is_averaged_over_its_own_tokens():
    """The model's loss is over all tokens of a batch: there, one record would change the scale of the others."""
    model, data = client("llama"), rows("llama", 3)
    data[0]["labels"][2:] = -100
    data[1]["labels"][:] = -100
    logits = model(torch.stack([row["input_ids"] for row in data])).logits
    labels = torch.stack([row["labels"] for row in data])
    criterion = SampleLoss(model)
    criterion.reduction = "none"
    losses = criterion(logits, labels)
    for i in (0, 2):
        own = model(input_ids=data[i]["input_ids"][None], labels=labels[i : i + 1]).loss
        assert torch.allclose(losses[i], own, rtol=1e-5)
    assert losses[1] == 0
    assert torch.equal(criterion(logits[:1], labels[:1]), losses[:1])  # whoever else is there


@pytest.mark.parametrize(
    "config, labels",
    [
        (dict(num_labels=1), torch.randn(3)),
        (dict(num_labels=2, problem_type="regression"), torch.randn(3, 2)),
        (dict(num_labels=3), torch.tensor([0, 2, 1])),
        (dict(num_labels=3), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
    ],
)
def test_losses_of_classifiers(config, labels, tokens):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, max_position_embeddings=64, **config)
    model = transformers.BertForSequenceClassification(config).eval()
    criterion = SampleLoss(model)
    found = criterion(model(tokens).logits, labels)
    assert torch.allclose(found, model(tokens, labels=labels).loss)
    criterion.reduction = "none"
    assert criterion(model(tokens).logits, labels).shape == (3,)


def test_losses_of_a_tagger(tokens):
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, num_labels=3)).eval()
    labels = tokens % 3
    assert torch.allclose(SampleLoss(model)(model(tokens).logits, labels), model(tokens, labels=labels).loss)


def test_no_loss_for_other_heads():
    with pytest.raises(ValueError, match="BertForQuestionAnswering"):
        SampleLoss(transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL)))


def test_the_fast_path_steps_aside_for_opacus_and_comes_back(monkeypatch):
    model, calls = client(), []
    monkeypatch.setattr(fedsvd, "low_rank", lambda *args, **kwargs: calls.append(1) or low_rank(*args, **kwargs))
    batch = rows()[0]["input_ids"][None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with attached(model.train(), optimizer, LOUD, 1.0, samples=4, batch_size=2, steps=1, seeds=(0, 1)):
        model(batch)
        assert not calls
    model(batch)
    assert len(calls) == 4  # two layers, query and value
    lora_B = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B["default"]
    lora_B.register_backward_hook(lambda *_: None).remove()  # refused where a trace is left


# Draws and noise


class Counted(list):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("mode", MODES)
def test_empty_draws_are_noised_and_counted(mode):
    model, data, history, empty = client(), Counted(rows(n=40)), [], 0
    spec = DPSpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", mode=mode, noise_seed=0)
    for turn in range(8):  # one step each, so that the very first draw of a loader is empty too
        before, data.reads = trained(model), 0
        settings = LocalSettings(steps=1, batch_size=1)
        result = train_local(model, data, None, settings, privacy=spec, history=history, round=turn)
        history = result.history
        assert history == [[1.0, 1 / 40, turn + 1]]
        assert all((before[name] != value).all() for name, value in trained(model).items())
        empty += data.reads == 0
    assert 0 < empty < 8


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hooks_ghost_and_physical_batches_agree(kind):
    results = []
    for mode, physical in [("hooks", None), ("hooks", 2), ("ghost", None), ("ghost", 1)]:
        model, data = client(kind), Counted(rows(kind, 9))
        settings = LocalSettings(steps=8, batch_size=3, max_physical_batch=physical)
        spec = DPSpec(noise_multiplier=0.5, delta=1e-3, max_grad_norm=0.1, accountant="rdp", mode=mode, noise_seed=5)
        train_local(model, data, None, settings, privacy=spec)
        results.append((trained(model), data.reads))
    assert len({reads for _, reads in results}) == 1
    assert distance(results[0][0], trained(client(kind))) > 1e-2
    assert all(distance(results[0][0], other) <= 1e-6 for other, _ in results[1:])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("mode", MODES)
def test_without_noise_clip_and_draws_it_is_plain_training(kind, mode):
    settings = LocalSettings(steps=3, batch_size=12, learning_rate=0.1, max_grad_norm=None)
    plain, private = client(kind), client(kind)
    train_local(plain, rows(kind), None, settings)
    train_local(private, rows(kind), None, settings, privacy=DPSpec(noise_multiplier=0, max_grad_norm=1e6, mode=mode))
    assert distance(trained(plain), trained(client(kind))) > 1e-3
    assert distance(trained(plain), trained(private)) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_overflows_does_not_show(mode):
    """Clipped, infinity is NaN, which a server that makes a word overflow would see."""
    models, data = [client(), client()], rows(n=4)
    for row in data:
        row["input_ids"].clamp_(max=62)
    data[2]["input_ids"][3] = 63
    for model in models:
        model.get_input_embeddings().weight.data[63] = math.inf
    spec = DPSpec(noise_multiplier=0.0, mode=mode)
    train = lambda model, data, lr, spec: train_local(
        model, data, None, LocalSettings(steps=1, batch_size=4, learning_rate=lr), privacy=spec
    )
    before = trained(models[0])
    if mode == "ghost":
        with pytest.raises(ValueError, match="not finite"):
            train(models[0], data, 1.0, spec)
        assert same(before, trained(models[0]))
    else:
        train(models[0], data, 1.0, spec)
        train(models[1], [*data[:2], data[3]], 0.75, spec)
        assert distance(before, trained(models[0])) > 1e-3
        assert distance(*map(trained, models)) <= 1e-6


def noise_energy(model, spec, eta: float, rounds: int) -> tuple[float, float]:
    """Mean ||B' A' - B A||^2 of a noise-only step with deviation `eta`, measured and by the closed form."""
    data = rows("llama", 2)
    for row in data:
        row["labels"][:] = -100  # no gradient: noise alone
    start = trained(model)
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    pairs = [(factors[name.replace("lora_B", "lora_A")], B) for name, B in factors.items() if "lora_B" in name]
    before = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
    settings = LocalSettings(steps=1, batch_size=2, learning_rate=eta * 2 / spec.max_grad_norm)  # lr C / batch = eta
    measured = 0.0
    for turn in range(rounds):
        train_local(model, data, None, settings, privacy=spec, round=turn)
        measured += sum(
            float((B @ A - b @ a).detach().square().sum()) for (A, B), (a, b) in zip(pairs, before, strict=True)
        )
        with torch.no_grad():
            for name, value in start.items():
                factors[name].copy_(value)
    wanted = 0.0
    for a, b in before:
        (r, d_in), d_out = a.shape, len(b)
        wanted += d_out * eta**2 * float(a.square().sum())
        if "lora_A" in spec.also_train:
            wanted += d_in * eta**2 * float(b.square().sum()) + r * d_out * d_in * eta**4
    return measured / rounds, wanted


def test_noise_of_the_update_has_its_closed_form():
    """Of B alone it is linear in eta^2; of A and B there is a product, which takes over as eta grows."""
    ratios = []
    for eta in (0.05, 0.5):
        energies = []
        for also in ((), ("lora_A",)):
            model = client("llama", "LORA", std=0.05, r=16, target_modules="all-linear")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(any(part in name for part in ("lora_B", *also)))
            spec = DPSpec(noise_multiplier=1, accountant="rdp", delta=1e-3, also_train=also, noise_seed=1)
            measured, wanted = noise_energy(model, spec, eta, rounds=12)
            assert measured == pytest.approx(wanted, rel=0.05)
            energies.append(measured)
        ratios.append(energies[1] / energies[0])
    assert ratios[1] > 5 * ratios[0]


def test_the_mean_is_over_the_expected_batch():
    """Opacus takes int(49 * (1 / 49)) = 0 for it."""
    model = client().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    with attached(model, optimizer, LOUD, 1.0, samples=49, batch_size=1, steps=1, seeds=(0, 1)) as private:
        assert private.optimizer.expected_batch_size == 1
        assert private.draws.sample_rate == 1 / 49
    with attached(model, optimizer, LOUD, 1.0, samples=10, batch_size=4, steps=1, seeds=(0, 1)) as private:
        assert private.optimizer.expected_batch_size == pytest.approx(10 / 3)


# The accountant


def test_rounds_cost_what_one_accountant_says():
    model, history = client(), None
    spec = DPSpec(noise_multiplier=1.0, delta=1e-3, noise_seed=0)
    for turn in range(3):
        result = train_local(model, rows(), None, SETTINGS, privacy=spec, history=history, round=turn)
        history = json.loads(json.dumps(result.history))
    one = PRVAccountant()
    for _ in range(9):
        one.step(noise_multiplier=1.0, sample_rate=1 / 3)
    assert history == [[1.0, 1 / 3, 9]]
    assert result.epsilon == pytest.approx(one.get_epsilon(1e-3), abs=1e-9)
    assert epsilon_spent(history, 1e-3) == result.epsilon
    assert epsilon_spent([[1.0, 1 / 3, 4], [1.0, 1 / 3, 5]], 1e-3) == result.epsilon
    assert epsilon_spent(history, 1e-3, "rdp") > result.epsilon


def test_a_restart_from_json_changes_nothing():
    through, restarted = client(), client()
    first = train_local(through, rows(), None, SETTINGS, privacy=LOUD)
    second = train_local(through, rows(), None, SETTINGS, privacy=LOUD, history=first.history, round=1)
    saved = json.dumps(train_local(restarted, rows(), None, SETTINGS, privacy=LOUD).history)
    again = train_local(restarted, rows(), None, SETTINGS, privacy=LOUD, history=json.loads(saved), round=1)
    assert again == second and same(trained(through), trained(restarted))
    assert first.history == [[1.0, 1 / 3, 3]]  # not the second round's


def test_a_round_beyond_the_budget_is_refused():
    model, history = client(), []
    spec = DPSpec(epsilon=6.0, delta=1e-3, accountant="rdp", noise_seed=0)
    for turn in range(2):
        result = train_local(model, rows(), None, SETTINGS, privacy=spec, history=history, total_steps=6, round=turn)
        history = result.history
    assert 5.99 <= result.epsilon <= 6.0
    assert history == [[spec.solve(1 / 3, 6), 1 / 3, 6]]
    before = state(model)
    with pytest.raises(BudgetExceeded, match=r"above the target 6: .*trained its share"):
        train_local(model, rows(), None, SETTINGS, privacy=spec, history=history, total_steps=6, round=2)
    assert unchanged(before, state(model))
    assert history == [[spec.solve(1 / 3, 6), 1 / 3, 6]]


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Of the Gaussian mechanism with sensitivity 1 (arXiv 1805.06530, theorem 8)."""
    phi = lambda t: math.erfc(-t / math.sqrt(2)) / 2
    return phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)


def test_epsilon_at_the_edges():
    assert epsilon_spent([], 1e-5) == 0.0
    assert epsilon_spent([[1.0, 0.5, 0]], 1e-5) == 0.0
    assert epsilon_spent([[1.0, 0.5, 3], [0, 0.5, 1]], 1e-5) == math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = epsilon_spent([[2.0, 1, 4]], 1e-5)  # q = 1: the Gaussian mechanism with sigma / sqrt(4) = 1
    assert gaussian_delta(full, 1.0) <= 1e-5 < gaussian_delta(full - 0.03, 1.0)
    assert DPSpec(noise_multiplier=0.7).solve(0.1, 10) == 0.7


@pytest.mark.parametrize(
    "history, message",
    [
        ([[1.0, 0.5]], "must be"),
        ([3], "must be"),
        ([[-1.0, 0.5, 3]], "noise multiplier"),
        ([[math.nan, 0.5, 3]], "noise multiplier"),
        ([[1.0, 1.5, 3]], "sample rate"),
        ([[1.0, 0.0, 3]], "sample rate"),
        ([[1.0, 0.5, 3.5]], "number of steps"),
        ([[1.0, 0.5, -3]], "number of steps"),
    ],
)
def test_a_broken_history_is_refused(history, message):
    with pytest.raises(ValueError, match=message):
        epsilon_spent(history, 1e-5)
    model = client()
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        train_local(model, rows(), None, SETTINGS, privacy=LOUD, history=history)
    assert same(before, trained(model))


# Refusals


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(), "either `epsilon`"),
        (dict(epsilon=1.0, noise_multiplier=1.0), "either `epsilon`"),
        (dict(epsilon=0.0), "`epsilon` must"),
        (dict(epsilon=-1.0), "`epsilon` must"),
        (dict(epsilon=math.inf), "`epsilon` must"),
        (dict(epsilon="6"), "`epsilon` must"),
        (dict(noise_multiplier=-0.1), "`noise_multiplier` must"),
        (dict(noise_multiplier=math.nan), "`noise_multiplier` must"),
        (dict(epsilon=1.0, delta=0.0), "`delta` must"),
        (dict(epsilon=1.0, delta=1.0), "`delta` must"),
        (dict(epsilon=1.0, max_grad_norm=0), "`max_grad_norm` must"),
        (dict(epsilon=1.0, max_grad_norm=math.inf), "`max_grad_norm` must"),
        (dict(epsilon=1.0, accountant="gdp"), "`accountant` must"),
        (dict(epsilon=1.0, mode="ew"), "`mode` must"),
        (dict(epsilon=1.0, also_train="classifier"), "tuple of names"),
    ],
)
def test_specs_that_say_nothing_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DPSpec(**kwargs)


def test_noise_is_not_solved_for_nonsense():
    for rate in (0.0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="sample rate"):
            DPSpec(epsilon=1.0).solve(rate, 10)
    with pytest.raises(ValueError, match="epsilon_spent|`delta`"):
        epsilon_spent([[1.0, 0.5, 1]], 2.0)
    with pytest.raises(ValueError, match="`accountant` must"):
        epsilon_spent([[1.0, 0.5, 1]], 1e-5, "moments")


def test_opacus_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(privacy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"peftx\[federated\]"):
        DPSpec(epsilon=1.0)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(steps=0),
        dict(batch_size=0),
        dict(batch_size=2.5),
        dict(max_physical_batch=0),
        dict(learning_rate=0),
        dict(learning_rate=math.nan),
        dict(max_grad_norm=-1),
        dict(weight_decay=-1),
        dict(optimizer="lion"),
        dict(optimizer=["sgd"]),
        dict(learning_rate="0.5"),
        dict(learning_rate=True),
        dict(weight_decay=math.inf),
        dict(seed="x"),
        dict(lr_scheduler_type=None),
    ],
)
def test_settings_out_of_range_are_refused(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"^{name} must"):
        LocalSettings(**kwargs)


def batch_norm(model):
    model.base_model.model.extra = nn.BatchNorm1d(4).requires_grad_(False)


def classifier(model):
    model.base_model.model.classifier.weight.requires_grad_()


def lora_A(model):
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_()


def nothing(model):
    model.requires_grad_(False)


def tied(model):
    layers = model.base_model.model.bert.encoder.layer
    layers[1].attention.self.query.lora_B = layers[0].attention.self.query.lora_B


def views(model):
    one, two = (layer.attention.self.query.lora_B["default"].weight for layer in model.bert.encoder.layer)
    two.data = one.data


def accumulated(model):
    next(p for p in model.parameters() if p.requires_grad).grad = torch.zeros(())[None, None].expand(16, 4)


def checkpointing(model):
    model.gradient_checkpointing_enable()


def observed(model):
    from opacus.grad_sample import GradSampleHooks

    GradSampleHooks(model)


def merged(model):
    model.merge_adapter()


@pytest.mark.parametrize(
    "harm, message",
    [
        (batch_norm, "extra` is a BatchNorm"),
        (classifier, r"classifier.*weight` would too.*also_train"),
        (lora_A, r"lora_A.default.weight` would too"),
        (nothing, "No tensor"),
        (tied, "tied"),
        (views, "tied"),
        (accumulated, "accumulated by the caller"),
        (checkpointing, "gradient_checkpointing_disable"),
        (observed, "attached to the model already"),
        (merged, "merged or disabled"),
    ],
)
def test_models_without_privacy_are_refused(harm, message):
    model = client(method="LORA")
    harm(model)
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        train_local(model, rows(), None, SETTINGS, privacy=LOUD)
    assert same(before, trained(model)) and not model.training


def test_modules_to_save_train_where_they_are_listed():
    model = client(method="LORA", modules_to_save=["classifier"])
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.requires_grad_()
    with pytest.raises(ValueError, match="modules_to_save"):
        train_local(model, rows(), None, SETTINGS, privacy=LOUD)
    with pytest.raises(ValueError, match="nothing that is trainable: score"):
        DP = DPSpec(noise_multiplier=1.0, also_train=("classifier", "score"))
        train_local(model, rows(), None, SETTINGS, privacy=DP)
    results = []
    for mode in MODES:
        spec = DPSpec(noise_multiplier=0.1, accountant="rdp", also_train=("classifier",), noise_seed=0, mode=mode)
        model = client(method="LORA", modules_to_save=["classifier"])
        model.base_model.model.classifier.modules_to_save["default"].requires_grad_()
        before = trained(model)
        train_local(model, rows(), None, SETTINGS, privacy=spec)
        results.append(trained(model))
        assert all((before[name] != value).any() for name, value in results[-1].items()) and len(before) == 6
    assert distance(*results) <= 1e-6


def test_modules_without_sample_gradients_are_refused():
    model = client("llama", "LORA", target_modules=["embed_tokens"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_embedding_B" in name)
    spec = DPSpec(noise_multiplier=1.0, also_train=("lora_embedding_B",))
    with pytest.raises(ValueError, match="no per-sample gradients"):
        check_private(model, spec)


@pytest.mark.parametrize("spec", [None, LOUD])
def test_data_without_rows_or_labels_is_refused(spec):
    model = client()
    before = state(model)
    with pytest.raises(ValueError, match="dataset is empty"):
        train_local(model, [], None, SETTINGS, privacy=spec)
    unlabelled = [dict(input_ids=row["input_ids"]) for row in rows()]
    with pytest.raises(ValueError, match="gave no `labels`, only 'input_ids'"):
        train_local(model, unlabelled, None, SETTINGS, privacy=spec)
    assert unchanged(before, state(model))


def test_data_that_cannot_be_private_is_refused():
    model = client("llama")
    before = state(model)
    with pytest.raises(ValueError, match=r"`delta` 0.5 is above 1 / 12"):
        train_local(model, rows("llama"), None, SETTINGS, privacy=DPSpec(noise_multiplier=1.0, delta=0.5))

    def packed(features):
        return {name: torch.cat([row[name] for row in features])[None] for name in features[0]}

    with pytest.raises(ValueError, match=r"batch of 1 from \d+ rows.*no packing"):
        train_local(model, rows("llama"), packed, SETTINGS, privacy=LOUD)
    assert unchanged(before, state(model))


class Flattened(nn.Module):
    """Tokens as rows, as some models have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("records", [1, 12])
def test_layers_that_do_not_see_records_are_refused(mode, records):
    """Opacus would clip every token by itself: the noise would be too small for a record."""
    base = tiny_model("bert")
    for layer in base.bert.encoder.layer:
        layer.output.dense = Flattened(layer.output.dense)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["inner"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = state(model)
    spec = DPSpec(noise_multiplier=1.0, accountant="rdp", mode=mode)
    with pytest.raises(ValueError, match=rf"saw {7 * records} rows for {records} records"):
        train_local(model, rows(n=records), None, LocalSettings(steps=1), privacy=spec)
    assert unchanged(before, state(model))


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_not_used_are_refused(mode):
    model = client(method="LORA")
    model.base_model.model.spare = model.base_model.model.bert.encoder.layer[1]
    model.base_model.model.bert.encoder.layer = model.base_model.model.bert.encoder.layer[:1]
    before = trained(model)
    spec = DPSpec(noise_multiplier=1.0, accountant="rdp", mode=mode)
    with pytest.raises(ValueError, match=r"spare.*took no part"):
        train_local(model, rows(), None, LocalSettings(steps=1, batch_size=12), privacy=spec)
    assert same(before, trained(model))


# Training without differential privacy


def test_plain_training_is_a_plain_loop():
    model, oracle = client(std=1.0), client(std=1.0)
    settings = LocalSettings(steps=3, batch_size=12, learning_rate=0.5, max_grad_norm=0.01)
    result = train_local(model, rows(), None, settings)
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    parameters, losses = [p for p in oracle.parameters() if p.requires_grad], []
    for _ in range(3):
        loss = oracle(**batch).loss
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.01
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.5 * gradient * 0.01 / norm
    assert distance(trained(model), trained(oracle)) <= 1e-6
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (result.samples, result.steps, result.epsilon, result.history) == (12, 3, None, [])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_physical_batches_are_accumulated_exactly(kind):
    data, results = rows(kind, 8), []
    for number, row in enumerate(data):
        if kind == "llama":
            row["labels"][: number % 5] = -100
    for physical in (None, 3):
        model = client(kind).double()
        settings = LocalSettings(
            steps=4, batch_size=6, optimizer="adamw", learning_rate=1e-2, max_physical_batch=physical
        )
        result = train_local(model, data, None, settings)
        results.append((trained(model), result.loss))
    assert distance(results[0][0], results[1][0]) <= 1e-9
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


def test_rows_are_shuffled_pass_after_pass():
    steps = list(local._shuffled(5, LocalSettings(steps=7, batch_size=2), seed=0))
    assert [len(step) for step in steps] == [2, 2, 1, 2, 2, 1, 2]
    first, second = ([row for step in one for row in step] for one in (steps[:3], steps[3:6]))
    assert sorted(first) == sorted(second) == list(range(5)) and first != second


def test_the_schedule_starts_anew_every_round():
    """A linear schedule over one step of SGD has its full rate; the next round has it again."""
    model = client()
    settings = LocalSettings(steps=1, batch_size=12, max_grad_norm=1e-3, learning_rate=1.0, lr_scheduler_type="linear")
    for turn in range(2):
        before = trained(model)
        train_local(model, rows(), None, settings, round=turn)
        moved = torch.cat([(before[name] - value).flatten() for name, value in trained(model).items()]).norm()
        assert moved == pytest.approx(1e-3, rel=1e-2)


def test_a_collator_of_transformers():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    data = [{"input_ids": list(range(1, n)), "labels": list(range(1, n))} for n in (4, 7, 5, 9)]
    for spec in (None, LOUD):
        model = client("llama")
        before = trained(model)
        train_local(model, data, DataCollatorForSeq2Seq(tokenizer), LocalSettings(steps=2, batch_size=2), privacy=spec)
        assert distance(before, trained(model)) > 1e-4


# Whatever else there is stays as it was


def state(model: nn.Module) -> dict:
    """Everything a caller could notice: tensors, attributes, hooks, modes, gradients, global generators."""
    modules = dict(model.named_modules())
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "parameters": {name: (sorted(vars(p)), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._backward_hooks), m._is_full_backward_hook)
            for name, m in modules.items()
        },
        "torch": torch.get_rng_state().clone(),
        "others": (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]),
    }


def unchanged(before: dict, after: dict, but: tuple[str, ...] = ()) -> bool:
    return all(
        same(before[key], after[key])
        if key == "tensors"
        else torch.equal(before[key], after[key])
        if key == "torch"
        else before[key] == after[key]
        for key in before
        if key not in but
    )


PRIVACY = [None, LOUD, DPSpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", mode="ghost", noise_seed=3)]


@pytest.mark.parametrize("spec", PRIVACY, ids=["plain", *MODES])
@pytest.mark.parametrize("method", ["FEDSVD", "LORA"])
def test_nothing_else_is_disturbed(spec, method, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = client(method=method, dropout=0.1)
    model.base_model.model.bert.encoder.layer[1].train()  # modes of a caller who knows why
    with torch.no_grad():
        model(rows()[0]["input_ids"][None], labels=rows()[0]["labels"])  # transformers settles its problem type
    before = state(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_local(model, rows(), None, SETTINGS, privacy=spec)
    assert unchanged(before, state(model), but=("tensors",))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not same(before["tensors"], state(model)["tensors"])
    assert not any(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spec", PRIVACY, ids=["plain", *MODES])
def test_an_error_on_the_way_undoes_the_round(spec):
    model, calls = client(dropout=0.1), []

    def failing(features):
        calls.append(len(features))
        if len(calls) == 3:
            raise OSError("disk gone")
        return transformers.default_data_collator(features)

    before = state(model)
    with pytest.raises(OSError, match="disk gone"):
        train_local(model, rows(), failing, LocalSettings(steps=9, batch_size=4), privacy=spec)
    assert unchanged(before, state(model))
    train_local(model, rows(), None, SETTINGS, privacy=spec)  # and it can go on
    assert not same(before["tensors"], state(model)["tensors"])


@pytest.mark.parametrize("spec", PRIVACY, ids=["plain", *MODES])
def test_a_round_is_repeatable(spec):
    def run(round=0, node=0, seed=42, privacy=spec):
        model = client(dropout=0.1)
        torch.seed()  # the global generators have no say
        train_local(model, rows(), None, LocalSettings(3, 4, seed=seed), privacy=privacy, round=round, node=node)
        return trained(model)

    first = run()
    assert same(first, run())
    assert not same(first, run(round=1)) and not same(first, run(node=1)) and not same(first, run(seed=1))
    if spec is not None:
        secret = dataclasses.replace(spec, noise_seed=None)
        assert not same(run(privacy=secret), run(privacy=secret))


def test_quantised_bases_train_privately():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    for layer in model.model.layers:
        old = layer.self_attn.q_proj
        layer.self_attn.q_proj = bnb.nn.Linear4bit(16, 16, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.self_attn.q_proj.load_state_dict(old.state_dict())
        layer.self_attn.q_proj.to("cpu")
    model = peft.get_peft_model(model, peftx.FedSVDConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = trained(model)
    result = train_local(model, rows("llama"), None, SETTINGS, privacy=LOUD)
    assert result.history == [[1.0, 1 / 3, 3]]
    assert set(before) == set(trained(model)) and all(".lora_B." in name for name in before)
    assert distance(before, trained(model)) > 1e-3
