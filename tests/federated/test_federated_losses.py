"""Every causal and masked language model of transformers: shifted labels, accumulated batches, gradients by record."""

import re

import peft
import pytest
import torch
import transformers
from language_models import build, names
from transformers.pytorch_utils import Conv1D

pytest.importorskip("opacus")

from peftx.compression import hooks
from peftx.federated.dpsgd import SampleLoss
from peftx.federated.local import LocalSettings, train_local
from peftx.federated.privacy import DPSpec
from peftx.losses import UNSHIFTED, shifts_labels, supervised

CLIP = 1e-3


def rows(count: int = 5, length: int = 9) -> list[dict]:
    """Records of which each has another number of labels, and which do not begin with one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (count, length), generator=generator)
    labels = torch.randint(3, 60, (count, length), generator=generator)
    for row, line in enumerate(labels):
        line[:row] = -100
    labels[0, 2:] = -100
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def stacked(data: list[dict]) -> dict:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def adapted(name: str, family: str) -> tuple[peft.PeftModel, dict[str, torch.nn.Parameter]]:
    """A model with a LoRA on every linear layer that its loss depends on, and the B of those; float64 where it can."""
    model = build(name, family)
    linear = [key for key, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    head = model.get_output_embeddings()
    linear = [key for key in linear if model.get_submodule(key) is not head and not key.endswith("out_proj")]
    targets = "|".join(map(re.escape, linear))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).double().train()
    trained = {key: p for key, p in model.named_parameters() if "lora_B" in key}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    try:
        loss = model(**stacked(rows())).loss
    except Exception:  # kernels that know no float64
        loss = model.float()(**stacked(rows())).loss
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for (key, parameter), gradient in zip(list(trained.items()), found, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
            del trained[key]
    return model, trained


def gradients(model, trained, batch) -> torch.Tensor:
    model.train()
    found = torch.autograd.grad(model(**batch).loss, list(trained.values()), allow_unused=True)
    pairs = zip(found, trained.values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def moved(model, trained, settings, **given) -> torch.Tensor:
    """What one step of gradient descent subtracts; the model is as before."""
    before = {key: p.detach().clone() for key, p in trained.items()}
    model.eval()
    try:
        train_local(model, rows(), None, settings, **given)
        return torch.cat([(before[key] - p.detach()).flatten() for key, p in trained.items()])
    finally:
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(before[key])


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def check_accumulation(model, trained) -> None:
    """Physical batches of any size, also those without a label, give the gradient of the whole."""
    whole = gradients(model, trained, stacked(rows()))
    assert whole.abs().max() > 0
    tolerance = 1e-12 if whole.dtype == torch.float64 else 1e-4
    for size in (1, 2):
        plain = LocalSettings(1, 5, 1.0, max_grad_norm=None, max_physical_batch=size)
        error = off(moved(model, trained, plain), whole)
        single = 1e-5 if model(**stacked(rows())).loss.dtype == torch.float32 else tolerance  # the loss's own rounding
        assert error <= max(tolerance, single), f"{error:.1e} at max_physical_batch={size}"


def check_privacy(model, trained) -> str:
    """Clipped gradients are those of one record at a time, or the model is refused; says which."""
    wanted = 0
    for row in rows():
        own = gradients(model, trained, stacked([row]))
        if torch.isfinite(own).all():  # no label is left in some
            wanted = wanted + own * min(1.0, CLIP / (float(own.norm()) + 1e-6)) / 5
    try:
        found = moved(model, trained, LocalSettings(1, 5, 1.0), privacy=DPSpec(noise_multiplier=0, max_grad_norm=CLIP))
    except Exception as error:  # Opacus' own, too: refused is refused
        return f"{type(error).__name__}: {error}"
    assert off(found, wanted) <= (1e-4 if wanted.dtype == torch.float64 else 1e-2)
    return ""


# Class, family, whether labels are shifted, and a word of why differential privacy refuses it.
KNOWN = [
    ("GPT2LMHeadModel", "causal", True, ""),
    ("OpenAIGPTLMHeadModel", "causal", True, ""),
    ("CTRLLMHeadModel", "causal", True, ""),
    ("BertLMHeadModel", "causal", True, ""),
    ("LlamaForCausalLM", "causal", True, ""),
    ("XLNetLMHeadModel", "causal", False, "rows for 5 records"),
    ("XLMWithLMHeadModel", "causal", False, ""),
    ("BartForCausalLM", "causal", False, ""),
    ("ProphetNetForCausalLM", "causal", False, "no loss per record is known"),
    ("OPTForCausalLM", "causal", True, "rows for 5 records"),
    ("BertForMaskedLM", "masked", False, ""),
    ("DistilBertForMaskedLM", "masked", False, ""),
    ("FlaubertWithLMHeadModel", "masked", False, ""),
    ("T5ForConditionalGeneration", "paired", False, ""),
    ("MarianMTModel", "paired", False, ""),
]


@pytest.mark.parametrize(("name", "family", "shifted", "refused"), KNOWN, ids=[row[0] for row in KNOWN])
def test_language_models(name, family, shifted, refused):
    model, trained = adapted(name, family)
    assert shifts_labels(model) == shifted == shifts_labels(model.get_base_model())
    check_accumulation(model, trained)
    said = check_privacy(model, trained)
    assert refused in said and bool(said) == bool(refused), said


def test_tokens_as_many_as_records_do_not_pass_for_them():
    """XLNet's layers see tokens first: of 9 records of 9 tokens Opacus would clip tokens."""
    model, trained = adapted("XLNetLMHeadModel", "causal")
    before = {key: p.detach().clone() for key, p in trained.items()}
    with pytest.raises(ValueError, match="saw 9 rows for 1 record"):
        train_local(model, rows(9, 9), None, LocalSettings(2, 9, 1.0), privacy=DPSpec(noise_multiplier=1.0, delta=1e-3))
    assert all(torch.equal(p, before[key]) for key, p in trained.items())


@pytest.mark.parametrize("shifted", [True, False])
def test_a_batch_without_labels_has_no_share(shifted):
    """Its own mean is NaN; where labels are shifted a row with only its first one has none."""
    model, trained = adapted(*(("GPT2LMHeadModel", "causal") if shifted else ("BertForMaskedLM", "masked")))
    data = rows(6)
    for row in data[:4]:
        row["labels"][1 if shifted else 0 :] = -100
    whole = gradients(model, trained, stacked(data[4:]))
    before = {key: p.detach().clone() for key, p in trained.items()}
    plain = LocalSettings(1, 6, 1.0, max_grad_norm=None, max_physical_batch=1)
    result = train_local(model, data, None, plain)
    found = torch.cat([(before[key] - p.detach()).flatten() for key, p in trained.items()])
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(before[key])
        assert result.loss == pytest.approx(float(model(**stacked(data)).loss), rel=1e-5)
    assert off(found, whole) < 1e-5
    with pytest.raises(ValueError, match="No record of 3 steps has a label"):
        train_local(model, data[:4], None, LocalSettings(3, 2, 1.0))
    alone = train_local(model, [*data[:1], data[5]], None, LocalSettings(4, 1, 1e-3))  # steps, not batches, without
    assert alone.loss > 0 and all(torch.isfinite(p).all() for p in trained.values())


@pytest.mark.parametrize(
    ("labels", "config", "count"),
    [
        (torch.tensor([0, -100, 2]), {"num_labels": 3}, 2),
        (torch.tensor([-100, 3, 5]), {"num_labels": 1}, 3),  # a number to predict like any other
        (torch.rand(3, 2), {"num_labels": 2}, 3),
        (torch.tensor([[0, 1], [1, 1], [0, 0]]), {"num_labels": 2, "problem_type": "regression"}, 3),
    ],
)
def test_records_of_a_classifier_are_counted(labels, config, count):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=64, **config))
    assert supervised(model, {"labels": labels}) == count


def test_labels_that_come_shifted_are_counted_as_they_are():
    model = build("GPT2LMHeadModel")
    labels = torch.tensor([[3, 4, 5], [6, -100, -100]])
    assert supervised(model, {"labels": labels}) == 2
    assert supervised(model, {"labels": labels, "shift_labels": labels}) == 4


def test_subclasses_shift_as_their_parents_do():
    class Mine(transformers.XLNetLMHeadModel):
        pass

    assert not shifts_labels(Mine(build("XLNetLMHeadModel").config))
    assert hooks.shifts_labels is shifts_labels  # compression counts by the same function
    assert all(hasattr(transformers, name) or name.startswith("Moshi") for name in UNSHIFTED)


def test_no_loss_per_record_for_heads_of_two_losses():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    with pytest.raises(ValueError, match="No per-record loss is known for BertForPreTraining"):
        SampleLoss(transformers.BertForPreTraining(transformers.BertConfig(hidden_size=12, num_hidden_layers=1)))
    assert SampleLoss(transformers.GPT2LMHeadModel(config)).shifted


@pytest.mark.slow
def test_all_language_models_of_transformers(request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes a minute: run with -m slow")
    done, private, wrong = set(), set(), {}
    for family, name in names():
        try:
            model, trained = adapted(name, family)
            assert trained and gradients(model, trained, stacked(rows())).isfinite().all()
        except Exception:  # no such small model, or one that needs more than token ids
            continue
        try:
            check_accumulation(model, trained)
            done.add(name)
            if not check_privacy(model, trained):
                private.add(name)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong
    assert len(done) > 120 and len(private) > 80
