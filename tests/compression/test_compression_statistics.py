"""Row sums of squared gradients against explicit per-sample autograd, by every road that leads to them."""

import copy
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import SMALL, Case, tiny_model
from conftest import adapted as with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import join, leave
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peftx.compression import collect, compress
from peftx.compression.callback import FisherCallback
from peftx.compression.hooks import Collector
from peftx.compression.layers import shape_of, signature, target_layers
from peftx.compression.statistics import FILE_NAME, Statistics
from peftx.compression.sums import square_sums
from peftx.utils import base_of, innermost

SHARED = Path(__file__).parents[3] / "shared" / "data"
COUNT = 10
Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def samples(kind: str = "llama", count: int = COUNT) -> list[dict[str, Any]]:
    """Rows of different lengths; labels, most of them with a masked start, or a class."""
    draw, found = random.Random(0), []
    for i in range(count):
        ids = [draw.randrange(1, 64) for _ in range(draw.randrange(3, 12))]
        prompt = draw.randrange(len(ids) - 1)
        found.append({"input_ids": ids, "labels": i % 3 if kind in CLASSIFIERS else [-100] * prompt + ids[prompt:]})
    return found


CLASSIFIERS = ("bert", "albert", "bert with dropout")


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    def padded(columns: list, filling: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in columns], True, filling)

    ids, labels = ([row[key] for row in rows] for key in ("input_ids", "labels"))
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "albert":  # one layer, called twice
        config = transformers.AlbertConfig(**SMALL, embedding_size=8, max_position_embeddings=64, num_labels=3)
        return transformers.AlbertForSequenceClassification(config).eval()
    if kind == "bert with dropout":
        return tiny_model("bert").train()
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
        return transformers.MixtralForCausalLM(config).eval()
    return tiny_model(kind)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def adapted(kind: str, **config: Any) -> nn.Module:
    """A frozen model under a LoRA that does something, on query and value only."""
    names = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
    config = {"target_modules": names.get(kind), "init_lora_weights": False, **config}
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(kind), peft.LoraConfig(**config)).eval()


def matrix(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if isinstance(innermost(layer), Conv1D) else weight


def supervised(model: nn.Module, labels: torch.Tensor) -> int:
    shifted = labels.ndim == 2 and not model.config.is_encoder_decoder
    return int(((labels[:, 1:] if shifted else labels) != -100).sum())


def explicit(model: nn.Module, groups: list[list[dict]]) -> Sums:
    """Both row sums of the squared gradient of each group's summed loss, per sample, by autograd of a thawed copy."""
    model = copy.deepcopy(model)
    layers = target_layers(model)
    for layer in layers.values():
        innermost(layer).weight.requires_grad_()
    squares: dict[str, Any] = dict.fromkeys(layers, 0)
    for group in groups:
        batch = pad(group)
        model.zero_grad()
        (model(**batch).loss * supervised(base_of(model), batch["labels"])).backward()
        for name, layer in layers.items():
            squares[name] = squares[name] + matrix(layer, innermost(layer).weight.grad).double().square()
    count = sum(map(len, groups))
    return {name: (square.sum(0) / count, square.sum(1) / count) for name, square in squares.items()}


def difference(found: Statistics, wanted: Sums | Statistics) -> float:
    """Greatest difference of a layer's sums, relative to their greatest entry."""
    assert list(found) == list(wanted)
    worst = 0.0
    for name, layer in found.items():
        other = wanted[name]
        pair = (other.fisher_in, other.fisher_out) if isinstance(wanted, Statistics) else other
        for mine, theirs in zip((layer.fisher_in, layer.fisher_out), pair, strict=True):
            assert theirs.max() > 0 and mine.shape == theirs.shape
            worst = max(worst, float((mine - theirs).abs().max() / theirs.max()))
    return worst


def one_by_one(kind: str) -> list[list[dict]]:
    return [[sample] for sample in samples(kind)]


# The formula


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99)
)
def test_square_sums(rows: int, length: int, into: int, out: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, into, dtype=torch.float64, generator=generator)
    g = torch.randn(rows, length, out, dtype=torch.float64, generator=generator)
    squares = torch.einsum("nto,nti->noi", g, x).square().sum(0)
    for way in ("gram", "blocked", None):
        found = square_sums(x, g, way=way, block=block)
        torch.testing.assert_close(found["fisher_in"], squares.sum(0))
        torch.testing.assert_close(found["fisher_out"], squares.sum(1))
        assert list(square_sums(x, g, ["fisher_out"], way, block)) == ["fisher_out"]


# Without a Trainer


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5", "albert"])
def test_collect_is_per_sample_autograd(kind: str) -> None:
    model = small(kind).double()
    wanted = explicit(model, one_by_one(kind))
    by_size = [collect(model, samples(kind), pad, batch_size=size, progress=False) for size in (1, 4, 10)]
    for found in by_size:
        assert difference(found, wanted) < 1e-6
        assert (found.samples, found.tokens) == (COUNT, sum(len(row["input_ids"]) for row in samples(kind)))
    whole = collect(model, samples(kind), pad, estimator="per_batch", batch_size=4, progress=False)
    data = samples(kind)
    assert difference(whole, explicit(model, [data[:4], data[4:8], data[8:]])) < 1e-6
    assert difference(whole, wanted) > 1e-3
    single = collect(model, data, pad, estimator="per_batch", batch_size=1, progress=False)
    assert difference(single, wanted) < 1e-6


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_frozen_layers_under_adapters_are_all_seen(kind: str) -> None:
    model = adapted(kind).double()
    wanted = explicit(model, one_by_one(kind))
    assert len(wanted) == {"bert": 12, "llama": 14}[kind]
    assert difference(collect(model, samples(kind), pad, progress=False), wanted) < 1e-6
    with Collector(model, target_layers(model)) as collector:  # in a loop of one's own
        for start in (0, 5):
            model(**pad(samples(kind)[start : start + 5])).loss.backward()
    assert difference(collector.statistics(), wanted) < 1e-6


def test_sums_under_an_adapter_are_those_of_the_merged_model(mergeable: Case) -> None:
    """What is factorised is the merged weight, and an adapter's output has its gradient, however the adapter works."""
    model = with_adapter(tiny_model("llama").double(), mergeable, "default", "other")
    data = samples(count=3)
    found = collect(model, data, pad, progress=False)
    wanted = explicit(model.merge_and_unload(), [[row] for row in data])
    assert len(wanted) == 14 and difference(found, wanted) < 1e-4


def test_sums_under_dora_and_beside_a_module_that_trains_whole() -> None:
    model = adapted("llama", use_dora=True, modules_to_save=["lm_head"], target_modules="all-linear").double()
    found = collect(model, samples(), pad, progress=False)
    assert difference(found, explicit(model.merge_and_unload(), one_by_one("llama"))) < 1e-4


def test_model_in_another_precision() -> None:
    wanted = collect(tiny_model("llama").double(), samples(), pad, progress=False)
    assert 1e-8 < difference(collect(tiny_model("llama"), samples(), pad, progress=False), wanted) < 1e-4
    assert difference(collect(tiny_model("llama").bfloat16(), samples(), pad, progress=False), wanted) < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        found = collect(tiny_model("llama"), samples(), pad, progress=False)
    assert 1e-5 < difference(found, wanted) < 0.2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "not re-entrant"])
@pytest.mark.parametrize("estimator", ["per_sample", "per_batch"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "all weights"])
def test_gradient_checkpointing(frozen: bool, estimator: str, reentrant: bool) -> None:
    def run(checkpointing: bool) -> Statistics:
        model = adapted("llama") if frozen else tiny_model("llama")
        model = without_dropout(model).train()
        base = base_of(model)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        what = ("fisher", "abs", "gram")
        with Collector(model, target_layers(model), what=what, estimator=estimator) as collector:
            for start in (0, 5):
                model(**pad(samples()[start : start + 5]), use_cache=False).loss.backward()
        return collector.statistics()

    found, wanted = run(True), run(False)
    assert difference(found, wanted) < 1e-6
    assert (found.samples, found.tokens) == (wanted.samples, wanted.tokens)
    for name in found:
        torch.testing.assert_close(found[name].abs_mean, wanted[name].abs_mean)
        torch.testing.assert_close(found[name].gram, wanted[name].gram)


class Checkpointed(nn.Module):
    """Three blocks in a checkpoint each, perhaps all the same."""

    def __init__(self, shared: bool, reentrant: bool, trains: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(1 if shared else 3)])
        self.requires_grad_(trains)
        self.settings, self.times = {"use_reentrant": reentrant}, 3 if shared else 1

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        for layer in [*self.layers] * self.times:
            x = torch.utils.checkpoint.checkpoint(layer, x, **self.settings) if self.settings else layer(x)
        return transformers.utils.ModelOutput(loss=(x.sum(-1) * labels).sum(1).mean())


@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "not re-entrant"])
@pytest.mark.parametrize("estimator", ["per_sample", "per_batch"])
@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
def test_shared_layers_in_checkpoints(trains: bool, estimator: str, reentrant: bool) -> None:
    batch = {"x": torch.randn(2, 5, 4, requires_grad=True), "labels": torch.randn(2, 5)}
    found = []
    for checkpointing in (True, False):
        model = Checkpointed(True, reentrant, trains)
        model.settings = model.settings if checkpointing else {}
        with Collector(model, target_layers(model), estimator=estimator) as collector:
            model(**batch).loss.backward()
        found.append(collector.statistics())
    assert difference(*found) < 1e-6
    model = Checkpointed(True, reentrant, True)
    squares: Any = 0
    for rows in [slice(0, 1), slice(1, 2)] if estimator == "per_sample" else [slice(0, 2)]:
        loss = model(**{key: part[rows] for key, part in batch.items()}).loss * (rows.stop - rows.start)
        squares = squares + torch.autograd.grad(loss, model.layers[0][0].weight)[0].square() if not reentrant else 0
    if not reentrant:  # whose gradients cannot be asked for
        assert difference(found[0], {"layers.0.0": (squares.sum(0) / 2, squares.sum(1) / 2)}) < 1e-6


def test_checkpointing_still_frees_activations() -> None:
    """What the hooks keep is dropped and made again, like everything else inside a checkpoint."""
    model, inside = Checkpointed(False, False), []
    for i in range(3):
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)
        block[2].register_forward_pre_hook(lambda _, args: inside.append(StorageWeakRef(args[0].untyped_storage())))
        model.layers[i] = block
    with Collector(model, target_layers(model)) as collector:
        loss = model(x=torch.randn(2, 5, 4, requires_grad=True), labels=torch.ones(2, 5)).loss
        assert len(inside) == 3 and all(storage.expired() for storage in inside)
        loss.backward()
    assert len(collector.statistics()) == 6


def test_activations_against_direct_computation() -> None:
    model = tiny_model("llama").double()
    found = collect(model, samples(), pad, what=("abs", "gram"), batch_size=4, progress=False)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for name, layer in target_layers(model).items():
        layer.register_forward_hook(lambda _, args, out, name=name: rows[name].append(args[0].detach()[0]))
    for sample in samples():
        model(**pad([sample]))
    for name, layer in found.items():
        x = torch.cat(rows[name])
        assert len(x) == found.tokens
        torch.testing.assert_close(layer.abs_mean, x.abs().mean(0))
        torch.testing.assert_close(layer.gram, x.T @ x / len(x))
        assert layer.fisher_in is None and layer.fisher_out is None


def test_activations_of_an_encoder_and_its_decoder() -> None:
    """Padding is told from the right mask, also where both sides are equally long."""
    model = tiny_model("t5").double()
    data = samples("llama")
    for row in data:
        row["labels"] = row["labels"][: random.Random(len(row["labels"])).randrange(1, len(row["labels"]))]
        row["labels"] = [i if i >= 0 else 1 for i in row["labels"]]
    data[0]["labels"] = [3] * max(len(row["input_ids"]) for row in data)
    assert len({row.shape[1] for row in pad(data).values()}) == 1
    whole, single = (collect(model, data, pad, what="abs", batch_size=size, progress=False) for size in (10, 1))
    for name in whole:
        torch.testing.assert_close(whole[name].abs_mean, single[name].abs_mean, rtol=1e-6, atol=1e-9)


def test_directions_are_unbiased() -> None:
    model = tiny_model("llama")
    exact = collect(model, samples(), pad, progress=False)
    runs = [collect(model, samples(), pad, directions=8, batch_size=5, seed=seed, progress=False) for seed in range(20)]
    again = collect(model, samples(), pad, directions=8, batch_size=5, seed=0, progress=False)
    assert difference(again, runs[0]) == 0 < difference(runs[1], runs[0])
    for side in ("fisher_in", "fisher_out"):
        ratios = torch.cat(
            [
                torch.stack([getattr(run[name], side) for run in runs]).mean(0) / getattr(exact[name], side)
                for name in exact
            ]
        )
        assert abs(ratios.mean() - 1) < 0.03 and ratios.std() < 0.2  # sqrt(2 / (8 * 20)) = 0.11 at most, a batch


class Flat(nn.Module):
    """As some models do: the layer sees no sequences, only rows."""

    def __init__(self, shuffled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)])
        self.head, self.extra = nn.Linear(4, 3), int(shuffled)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = nn.functional.one_hot(input_ids, 4).to(self.head.weight)
        flat = x.reshape(-1, 4)
        flat = torch.cat([flat, flat[: self.extra]])
        for layer in self.layers:
            flat = flat + layer(flat)
        x = flat[: input_ids.numel()].reshape(x.shape)
        loss = nn.functional.cross_entropy(self.head(x.mean(1)), labels)
        return transformers.utils.ModelOutput(loss=loss)


def flat_batch(rows: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 4, (100, 5), generator=torch.Generator().manual_seed(0))[rows]
    return {"input_ids": ids, "labels": torch.tensor(rows) % 3}


def test_flattened_activations() -> None:
    wanted = collect(Flat().double(), range(12), flat_batch, batch_size=1, progress=False)
    found = collect(Flat().double(), range(12), flat_batch, batch_size=4, progress=False)
    assert len(found) == 4 and difference(found, wanted) < 1e-12
    with pytest.raises(
        ValueError, match=r"layers\.\d\.2 takes activations \(21, 6\) in a batch of 4 samples.*batches of 1"
    ):
        collect(Flat(shuffled=True), range(12), flat_batch, batch_size=4, progress=False)
    collect(Flat(shuffled=True), range(12), flat_batch, batch_size=4, estimator="per_batch", progress=False)


@pytest.mark.skipif(not (SHARED / "stories260k").exists(), reason="needs the shared stories260K")
def test_on_a_real_language_model() -> None:
    folder = SHARED / "stories260k" / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()[:6]
    data = []
    for line in lines:
        ids = tokenizer.encode(json.loads(line)["question"]).ids[:60]
        data.append({"input_ids": ids, "labels": ids})
    found = collect(model, data, pad, batch_size=3, progress=False)
    assert difference(found, explicit(model, [[row] for row in data])) < 1e-6
    found.check(model)


# Nothing is disturbed


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
def test_nothing_is_disturbed(fails: bool) -> None:
    model = adapted("llama", modules_to_save=["lm_head"]).train()
    model.base_model.model.model.layers[0].eval()
    model(**pad(samples())).loss.backward()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    grads = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    rng = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    if fails:
        data = [*samples(), {"input_ids": [1, 99], "labels": [1, 1]}]
        with pytest.raises(IndexError):
            collect(model, data, pad, progress=False)
    else:
        collect(model, samples(), pad, what=("fisher", "abs", "gram"), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    for parameter, before in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (before is None) and (before is None or torch.equal(parameter.grad, before))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert rng[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(rng[2], torch.get_rng_state())
    assert hooks(model) == 0


def hooks(model: nn.Module) -> int:
    on_modules = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return sum(on_modules) + sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


def test_samples_are_drawn_by_the_seed() -> None:
    model = tiny_model("bert")

    def run(**options: Any) -> Statistics:
        return collect(model, samples("bert"), pad, max_samples=4, progress=False, **options)

    first, same, other = run(), run(), run(seed=1)
    assert first.samples == 4
    assert difference(same, first) == 0 < difference(other, first)


def test_samples_without_a_label_do_not_count() -> None:
    data = samples()
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in data[:3]]
    model = tiny_model("llama").double()
    wanted = collect(model, data, pad, progress=False)
    for size in (1, 4):
        found = collect(model, [*silent, *data], pad, batch_size=size, progress=False)
        assert found.samples == COUNT and difference(found, wanted) < 1e-6


# Which layers


def test_target_layers() -> None:
    assert len(target_layers(tiny_model("bert"))) == 12  # no pooler, no classifier
    assert len(target_layers(tiny_model("bert"), "all-linear")) == 13
    assert list(target_layers(adapted("bert"))) == list(target_layers(tiny_model("bert")))
    model = tiny_model("llama")
    assert list(target_layers(model, ["q_proj"])) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert list(target_layers(model, r".*\.1\..*q_proj")) == ["model.layers.1.self_attn.q_proj"]
    assert len(target_layers(model, exclude_modules=["q_proj"])) == 12
    assert len(target_layers(model, exclude_modules=r".*layers\.0\..*")) == 7
    assert "lm_head" in target_layers(model, ["lm_head"])
    assert all(shape_of(layer) == (16, 64) for layer in target_layers(tiny_model("gpt2"), ["mlp.c_proj"]).values())
    found = target_layers(small("mixtral"))
    assert not any(name.endswith(".gate") or "lora" in name for name in found)
    assert [name for name in found if "experts" in name] == [
        f"model.layers.{i}.mlp.experts.{part}" for i in (0, 1) for part in ("gate_up_proj", "down_proj")
    ]
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))
    tied.tie_weights()
    with pytest.raises(ValueError, match="lm_head shares its weight with model.embed_tokens.weight"):
        target_layers(tied, ["lm_head"])
    tied.model.layers[1].self_attn.q_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    assert len(target_layers(tied)) == 12
    with pytest.raises(ValueError, match="has no layer"):
        target_layers(model, ["nothing"])
    with pytest.raises(ValueError, match="has no layer"):
        target_layers(nn.Linear(2, 2))


def test_modules_that_peft_trains_whole_are_no_layers() -> None:
    model = adapted("bert", modules_to_save=["classifier"])
    assert not any("classifier" in name for name in target_layers(model))


# Files


def test_file_round_trip(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    found = collect(model, samples(), pad, what=("fisher", "abs", "gram"), progress=False)
    found.save(tmp_path / "deep" / FILE_NAME)
    again = Statistics.load(tmp_path / "deep" / FILE_NAME)
    assert list(again) == list(found) and len(again) == 8
    for attribute in ("samples", "tokens", "estimator", "model"):
        assert getattr(again, attribute) == getattr(found, attribute)
    for name in found:
        assert again[name].shape == found[name].shape == shape_of(target_layers(model)[name])
        for field in ("fisher_in", "fisher_out", "abs_mean", "gram", "signature"):
            torch.testing.assert_close(getattr(again[name], field), getattr(found[name], field), rtol=0, atol=0)
    assert again[name].fisher_in.dtype == torch.float64
    again.check(model)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [FILE_NAME]


def header(**changes: Any) -> Any:
    def change(tensors: dict, metadata: dict) -> None:
        facts = json.loads(metadata["statistics"])
        metadata["statistics"] = json.dumps({**facts, **changes})

    return change


def tensor(field: str, value: Any) -> Any:
    def change(tensors: dict, metadata: dict) -> None:
        key = next(key for key in tensors if key.endswith(field))
        made = value(tensors[key]) if callable(value) else value
        tensors.pop(key) if made is None else tensors.update({key: made})

    return change


FORGED = {
    "no statistics": (lambda tensors, metadata: metadata.clear(), "format None"),
    "no JSON": (lambda tensors, metadata: metadata.update(statistics="{"), "holds no statistics"),
    "no samples": (header(samples=0), "samples must be a positive integer, got 0"),
    "samples in words": (header(samples="10"), "samples must be a positive integer"),
    "estimator": (header(estimator="guess"), "unknown estimator 'guess'"),
    "model": (header(model=3), "names no model"),
    "no layers": (header(shapes={}), "or no layers"),
    "shapes": (header(shapes=[]), "or no layers"),
    "negative shape": (header(shapes={"a": [-1, 2]}), "cannot have the shape"),
    "shape": (header(shapes={"a": 7}), "holds no statistics"),
    "names": (header(shapes={"a": [2, 2]}), "unknown tensor"),
    "unknown tensor": (lambda tensors, metadata: tensors.update(extra=torch.ones(1)), "unknown tensor 'extra'"),
    "no signature": (tensor(".signature", None), "has no signature"),
    "length": (tensor(".fisher_in", lambda t: t[:-1].clone()), "fisher_in must be"),
    "dtype": (tensor(".fisher_in", lambda t: t.float()), "of torch.float32"),
    "NaN": (tensor(".fisher_out", lambda t: t * float("nan")), "fisher_out is not finite"),
    "negative": (tensor(".fisher_in", lambda t: -t), "negative entry"),
    "gram": (tensor(".gram", lambda t: t + torch.rand(t.shape) * t.max()), "gram is not symmetric"),
    "diagonal": (tensor(".gram", lambda t: -t), "negative entry"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / FILE_NAME
    found = collect(tiny_model("bert"), samples("bert"), pad, what=("fisher", "gram"), progress=False)
    found.save(path)
    return path


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_files(forgery: str, saved: Path, tmp_path: Path) -> None:
    change, reason = FORGED[forgery]
    tensors = load_file(saved)
    found = Statistics.load(saved)
    facts = {key: getattr(found, key) for key in ("samples", "tokens", "estimator", "model")}
    shapes = {name: list(layer.shape) for name, layer in found.items()}
    metadata = {"format": "peftx.statistics.1", "statistics": json.dumps({**facts, "shapes": shapes})}
    save_file(tensors, tmp_path / "same", metadata)
    Statistics.load(tmp_path / "same")
    change(tensors, metadata)
    save_file(tensors, tmp_path / "forged", metadata)
    with pytest.raises(ValueError, match=f"forged holds no statistics of peftx.*{reason}|{reason}.*collect them again"):
        Statistics.load(tmp_path / "forged")


def test_other_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(saved.read_bytes()[:-50])
    (tmp_path / "text").write_text("statistics")
    (tmp_path / "folder").mkdir()
    for name in ("cut", "text", "folder"):
        with pytest.raises(ValueError, match=f"{name} holds no statistics"):
            Statistics.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none")


def test_statistics_of_another_model(saved: Path) -> None:
    found = Statistics.load(saved)
    model = tiny_model("bert")
    found.check(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
    found.check(model)  # fine-tuned
    with pytest.raises(ValueError, match="no linear layer of that name"):
        found.check(tiny_model("llama"))
    torch.manual_seed(7)
    other = transformers.BertForSequenceClassification(model.config)
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.attention.self.query correlates by .* another model"):
        found.check(other)
    model.bert.encoder.layer[1].output.dense = nn.Linear(33, 16)
    with pytest.raises(ValueError, match=r"layer.1.output.dense is \(16, 32\) in the statistics and \(16, 33\)"):
        found.check(model)


# Inside a Trainer


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def trainer(
    folder: Path, *callbacks: Any, model: Any = None, kind: str = "llama", count: int = COUNT, **options: Any
) -> Trainer:
    model = tiny_model(kind) if model is None else model
    data = samples(kind, count)
    run = Trainer(model, arguments(folder, **options), pad, data, data[:3], callbacks=list(callbacks))
    run.remove_callback(transformers.PrinterCallback)
    return run


ROADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 1e-3},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "bf16": {"bf16": True},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "road"),
    [
        *(("llama", road) for road in ROADS),
        *((kind, road) for kind in ("bert", "t5") for road in ("plain", "accumulation")),
        *(pytest.param("mixtral", road, marks=pytest.mark.slow) for road in ("accumulation", "checkpointing", "bf16")),
    ],
)
def test_training_gives_what_a_pass_does(kind: str, road: str, tmp_path: Path) -> None:
    """With a learning rate of 0 and no dropout the sums of an epoch are those of the model as it is."""
    options = ROADS[road]
    model = without_dropout(small(kind))
    wanted = collect(model, samples(kind), pad, progress=False)
    callback = FisherCallback("per_sample", what="fisher", directions=None, max_samples=None)
    trainer(tmp_path, callback, model=model, kind=kind, **options).train()
    found = callback.statistics
    assert found is not None and found.samples == COUNT
    assert hooks(model) == (road == "checkpointing")  # of the Trainer's, on the embeddings
    assert difference(found, wanted) < (0.1 if road == "bf16" else 1e-4)
    again = Statistics.load(tmp_path / FILE_NAME)
    assert difference(again, found) == 0 and again.samples == found.samples


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("frozen", [True, False], ids=["adapters", "all weights"])
@pytest.mark.slow
def test_training_is_the_same_bit_for_bit(kind: str, frozen: bool, tmp_path: Path) -> None:
    def train(*callbacks: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny_model(kind)
        if frozen:
            names = {"gpt2": ["c_attn"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[kind]
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, fan_in_fan_out=kind == "gpt2"))
        options = {"learning_rate": 0.1, "optim": "adamw_torch", "num_train_epochs": 2}
        trainer(tmp_path, *callbacks, model=model, kind=kind, gradient_accumulation_steps=2, **options).train()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    without = train()
    for estimator in ("per_batch", "per_sample"):
        callback = FisherCallback(estimator, "train", what=("fisher", "abs"), directions=2 if frozen else None)
        found = train(callback)
        assert callback.statistics is not None and callback.statistics.samples == 2 * COUNT
        assert all(torch.equal(found[name], without[name]) for name in without)
    assert (
        any((without[name] != value).any() for name, value in tiny_model(kind).named_parameters() if name in without)
        or frozen
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "albert"])
def test_batch_estimator_reads_the_gradient_of_weights_that_train(kind: str) -> None:
    found = []
    for trains in (True, False):
        model = small(kind).double()
        for layer in target_layers(model).values():
            layer.weight.requires_grad_(trains)
        with Collector(model, target_layers(model), estimator="per_batch") as collector:
            for start in (0, 4):
                model(**pad(samples(kind)[start : start + 4])).loss.backward()
        found.append(collector.statistics())
    assert difference(*found) < 1e-9
    assert difference(found[0], explicit(model, [samples(kind)[:4], samples(kind)[4:8]])) < 1e-6


@pytest.mark.slow
def test_which_steps_count(tmp_path: Path) -> None:
    def collected(**options: Any) -> int:
        callback = FisherCallback(**options)
        trainer(tmp_path, callback, num_train_epochs=3, gradient_accumulation_steps=2).train()
        return callback.statistics.samples

    assert collected() == COUNT  # 3 steps an epoch: of 4, 4 and 2 samples
    assert collected(when="train") == 3 * COUNT
    assert collected(max_samples=2) == 2  # the last step
    assert collected(max_samples=6) == 6
    assert collected(max_samples=9) == COUNT
    assert collected(when="train", max_samples=5) == 8  # steps are whole
    assert collected(every=2) == 6
    assert collected(every=2, max_samples=4) == 4
    assert collected(when="calibration") == COUNT
    assert collected(when="calibration", max_samples=3) == 3


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(samples() * 10)


def streaming(folder: Path, *callbacks: Any) -> Trainer:
    run = Trainer(tiny_model("llama"), arguments(folder, max_steps=6), pad, Stream(), callbacks=list(callbacks))
    run.remove_callback(transformers.PrinterCallback)
    return run


def test_a_stream_is_collected_on_in_its_last_steps(tmp_path: Path) -> None:
    callback = FisherCallback(max_samples=5)
    streaming(tmp_path, callback).train()
    assert callback.statistics.samples == 6
    run = streaming(tmp_path, FisherCallback(when="calibration"))
    with pytest.raises(ValueError, match="has no length and indices"):
        run.train()
    assert run.state.global_step == 0


def test_the_default_needs_nothing_but_to_be_passed(tmp_path: Path) -> None:
    model = adapted("bert")
    callback = FisherCallback()
    trainer(tmp_path, callback, model=model, kind="bert", learning_rate=0.1).train()
    small, report = compress(model, callback.statistics, keep=0.7, progress=False)
    assert len(report.layers) == 12 and small(**pad(samples("bert"))).loss.isfinite()
    assert FisherCallback(what="abs").what == ("abs",)


def test_no_training_is_lost_to_its_statistics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers").propagate = logging.getLogger("peftx").propagate = True
    callback = FisherCallback(max_samples=2)
    with caplog.at_level("WARNING"):
        run = streaming(tmp_path, callback, Stop())  # and so is the extra pass
        run.train()
    assert callback.statistics is None and hooks(run.model) == 0
    assert "has no statistics: a Stream has no length" in caplog.text


def test_calibration_is_a_pass_over_the_trained_model(tmp_path: Path) -> None:
    callback = FisherCallback("per_sample", "calibration", what="fisher", directions=None, output="sums.safetensors")
    model = adapted("bert", lora_dropout=0.5)
    trainer(tmp_path, callback, model=model, kind="bert", learning_rate=0.1).train()
    assert difference(callback.statistics, collect(model, samples("bert"), pad, progress=False)) < 1e-6
    assert Statistics.load(tmp_path / "sums.safetensors").samples == COUNT


class Break(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_hooks_go_with_a_training_that_fails(tmp_path: Path) -> None:
    callback = FisherCallback(when="train")
    run = trainer(tmp_path, callback, Break(), gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert hooks(run.model) == 0 and callback.statistics is None
    run.remove_callback(Break)
    run.train()
    assert callback.statistics.samples == COUNT


def test_training_that_ends_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers").propagate = logging.getLogger("peftx").propagate = True
    callback = FisherCallback()
    with caplog.at_level("WARNING"):
        trainer(tmp_path, callback, Stop(), num_train_epochs=3).train()
    assert callback.statistics.samples == COUNT
    assert "training ended before step 10" in caplog.text


def test_resumed_training_says_what_it_misses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = logging.getLogger("peftx").propagate = True
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    trainer(tmp_path, **options).train()
    transformers.logging.set_verbosity_warning()
    for step, count, said in ((4, 10, False), (8, 4, True)):
        callback = FisherCallback()
        with caplog.at_level("WARNING"):
            trainer(tmp_path, callback, **options).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert callback.statistics.samples == count
        assert ("sums start anew" in caplog.text) == said


def test_loss_scaling_of_fp16() -> None:
    """A GradScaler multiplies the loss, and leaves out steps with infinite gradients; so do the sums."""
    model = tiny_model("llama")
    wanted = collect(model, samples(), pad, progress=False)
    collector = Collector(model, target_layers(model))
    with collector:
        for start, factor in ((0, 2.0**16), (0, float("inf")), (5, 2.0**4)):
            (model(**pad(samples()[start : start + 5])).loss * factor).backward()
    assert collector.totals.dropped == 1
    assert difference(collector.statistics(), wanted) < 1e-4


# Two processes

SHARES = [("llama", "train"), ("mixtral", "train"), ("bert", "train"), ("bert", "calibration")]


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    transformers.logging.set_verbosity_error()
    for kind, when in SHARES:
        callback = FisherCallback("per_sample", when, what=("fisher", "gram"), directions=None, max_samples=None)
        model = without_dropout(small(kind))
        options = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
        trainer(folder / f"{kind} {when}", callback, model=model, kind=kind, count=8, **options).train()
        callback.statistics.save(folder / f"{kind} {when} {rank}")
    leave()


@pytest.mark.slow
def test_two_processes_add_up(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(tmp_path,), nprocs=2)
    for kind, when in SHARES:
        model = without_dropout(small(kind))
        wanted = collect(model, samples(kind, 8), pad, what=("fisher", "gram"), progress=False)
        first, second = (Statistics.load(tmp_path / f"{kind} {when} {rank}") for rank in range(2))
        assert difference(first, second) == 0
        assert (first.samples, first.tokens) == (wanted.samples, wanted.tokens)
        assert difference(first, wanted) < 1e-4
        for name in wanted:
            torch.testing.assert_close(first[name].gram, wanted[name].gram)
        assert (tmp_path / f"{kind} {when}" / FILE_NAME).exists()


# Bad input


def test_bad_data() -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="the model is compiled"):
        collect(torch.compile(model, backend="eager"), samples("bert"), pad, progress=False)

    def run(data: Any, collator: Any = pad, **options: Any) -> Statistics:
        return collect(model, data, collator, progress=False, **options)

    with pytest.raises(ValueError, match="the data set is empty"):
        run([])
    with pytest.raises(ValueError, match="has no length and indices"):
        run(iter(samples("bert")))
    with pytest.raises(ValueError, match="max_samples must be"):
        run(samples("bert"), max_samples=0)

    def without_labels(rows: list) -> dict:
        return {key: part for key, part in pad(rows).items() if key != "labels"}

    with pytest.raises(ValueError, match="gives no loss.*put labels into the batch"):
        run(samples("bert"), without_labels)
    assert run(samples("bert"), without_labels, what="abs").samples == COUNT  # needs none
    with pytest.raises(ValueError, match="no sample with a label"):
        collect(tiny_model("llama"), [{"input_ids": [1, 2], "labels": [-100, -100]}], pad, progress=False)

    def packed(rows: list) -> dict:
        return {**pad(rows), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}

    row = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [1, 2, 3, 4, 5, 6]}]
    with pytest.raises(ValueError, match="packing"):
        collect(tiny_model("llama"), row, packed, progress=False)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="gradients of bert.* are not finite"):
        run(samples("bert"))
    with pytest.raises(ValueError, match="gram of bert.* is not finite"):
        run(samples("bert"), what="gram")


def test_layers_that_take_no_part(caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.MultiheadAttention(4, 1, batch_first=True)])
            self.extra = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            x = self.extra[0](self.layers[0](x, x, x)[0])
            return transformers.utils.ModelOutput(loss=(x.sum(-1).mean(1) * labels).mean())

    def batch(rows: list) -> dict:
        return {"x": torch.ones(len(rows), 3, 4), "labels": torch.ones(len(rows))}

    logging.getLogger("peftx").propagate = True
    with caplog.at_level("WARNING"):
        found = collect(Mixed(), range(4), batch, progress=False)
    assert list(found) == ["extra.0.0"] and found.samples == 4
    assert "1 of 2 layers took part in no forward or backward pass" in caplog.text and "0.out_proj" in caplog.text
    with pytest.raises(ValueError, match="1 of 1 layers took part in no"):
        collect(Mixed(), range(4), batch, what="abs", target_modules=["out_proj"], progress=False)


def test_bad_settings() -> None:
    for options, reason in (
        ({"when": "now"}, "when must be one of"),
        ({"estimator": "guess"}, "estimator must be one of per_sample, per_batch"),
        ({"what": ("hessian",)}, "what='hessian' cannot be collected"),
        ({"what": ()}, "what= says what to collect"),
        ({"directions": 0}, "directions must be"),
        ({"every": 0}, "every must be a whole number, at least 1"),
        ({"max_samples": 0}, "max_samples must be a whole number"),
    ):
        with pytest.raises(ValueError, match=reason):
            FisherCallback(**options)


def test_trainings_that_cannot_be_collected_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label smoothing.*when='calibration'"):
        trainer(tmp_path, FisherCallback(), label_smoothing_factor=0.1).train()
    with pytest.raises(ValueError, match="torch_compile"):
        trainer(tmp_path, FisherCallback(), torch_compile=True).train()
    run = trainer(tmp_path, FisherCallback())
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    with pytest.raises(ValueError, match="compute_loss_func"):
        run.train()
    with pytest.raises(ValueError, match="has no layer"):
        trainer(tmp_path, FisherCallback(target_modules=["nothing"])).train()

    class Custom(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(**inputs).logits.sum()

    options = arguments(tmp_path, num_train_epochs=3)
    run = Custom(tiny_model("llama"), options, pad, samples(), callbacks=[FisherCallback()])
    with pytest.raises(ValueError, match="not come from the model's own loss"):
        run.train()
    assert hooks(run.model) == 0 and run.state.global_step == 0  # not in the last epoch


@pytest.mark.parametrize("bits", [4, 8])
def test_reading_a_quantised_weight_leaves_the_layer_usable(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.nn.Linear(64, 32, bias=False)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
    places = torch.linspace(0, 32 * 64 - 1, 64, dtype=torch.float64).round().long()
    for _ in range(2):
        read = signature(layer)
        torch.testing.assert_close(read, dense.weight.detach().flatten()[places], atol=0.03, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, atol=2e-2, rtol=0)
