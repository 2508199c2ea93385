"""Fisher sums in TRL's trainers, against explicit gradients in float64."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import SMALL, tiny_model, words

import peftx
from peftx.compression import Statistics, target_layers
from peftx.compression.statistics import FILE_NAME
from peftx.utils import innermost

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.trl
COUNT = 10
EXACT: dict[str, Any] = dict(what="fisher", directions=None, max_samples=None)
Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def samples(masked: bool = True, count: int = COUNT) -> list[dict[str, list[int]]]:
    """Rows of different lengths; the labels of most begin in the middle, and one row has none."""
    draw, found = torch.Generator().manual_seed(0), []
    for i in range(count):
        ids = torch.randint(1, 64, (3 + int(torch.randint(0, 9, (), generator=draw)),), generator=draw).tolist()
        prompt = 0 if not masked else len(ids) if i == 4 else i % (len(ids) - 1)
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def still(model: Any) -> Any:
    """Without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def adapted(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    names = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[kind]
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    return peft.get_peft_model(still(tiny_model(kind)), config)


def explicit(model: Any, groups: list[list[dict]], count: int | None = None) -> Sums:
    """Row sums of the squared gradient of each group's summed loss, in float64, a sample at a time without padding."""
    model = copy.deepcopy(model).double().eval()
    layers = target_layers(model)
    for layer in layers.values():
        innermost(layer).weight.requires_grad_()
    squares: dict[str, Any] = dict.fromkeys(layers, 0)
    for group in groups:
        model.zero_grad()
        for row in group:
            labels = torch.tensor([row["labels"]])
            if (labels[:, 1:] != -100).any():
                loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
                (loss * (labels[:, 1:] != -100).sum()).backward()
        for name, layer in layers.items():
            grad = innermost(layer).weight.grad
            if grad is not None:
                grad = grad.T if type(innermost(layer)).__name__ == "Conv1D" else grad
                squares[name] = squares[name] + grad.double().square()
    count = count or sum(any(label != -100 for label in row["labels"][1:]) for group in groups for row in group)
    return {name: (square.sum(0) / count, square.sum(1) / count) for name, square in squares.items()}


def difference(found: Statistics, wanted: Sums) -> float:
    assert list(found) == list(wanted)
    worst = 0.0
    for name, layer in found.items():
        for mine, theirs in zip((layer.fisher_in, layer.fisher_out), wanted[name], strict=True):
            assert theirs.max() > 0 and mine.shape == theirs.shape
            worst = max(worst, float((mine - theirs).abs().max() / theirs.max()))
    return worst


def prepared(run: Any) -> list[list[dict]]:
    """The sequences of each row that the trainer made of its data."""
    rows = []
    for row in run.train_dataset:
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        keys = ("input_ids", "labels") if "labels" in row else ("input_ids", "input_ids")
        rows.append(
            [
                {"input_ids": row["input_ids"][a : a + n], "labels": row[keys[1]][a : a + n]}
                for a, n in zip(starts, lengths, strict=True)
            ]
        )
    return rows


def sft(
    folder: Path,
    callback: Any,
    model: Any,
    data: Any = None,
    kind: Any = trl.SFTTrainer,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "max_length": None,
    }
    run = kind(
        model,
        trl.SFTConfig(str(folder), **{**defaults, **options}),
        train_dataset=datasets.Dataset.from_list(data or samples()),
        processing_class=tokenizer or words(),
        callbacks=[callback],
    )
    run.remove_callback(transformers.PrinterCallback)
    return run


ROADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 1e-3},
    "checkpointing": {"gradient_checkpointing": True},
    "re-entrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "padding free": {"padding_free": True, "gradient_accumulation_steps": 2},
    "8 bits": {"optim": "adamw_bnb_8bit"},
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("estimator", ["per_sample", "per_batch"])
def test_sums_are_those_of_explicit_gradients(estimator: str, road: str, tmp_path: Path) -> None:
    model, data = adapted(), samples()
    pairs = [data[i : i + 2] for i in range(0, COUNT, 2)]
    wanted = explicit(model, [[row] for row in data] if estimator == "per_sample" else pairs)
    callback = peftx.FisherCallback(estimator, **EXACT)
    sft(tmp_path, callback, model, **ROADS[road]).train()
    assert callback.statistics.samples == COUNT - 1  # one has no label
    assert difference(callback.statistics, wanted) < 1e-4
    assert difference(Statistics.load(tmp_path / FILE_NAME), wanted) < 1e-4


def test_heads_that_only_see_labelled_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's do on a GPU."""
    import trl.trainer.utils as utilities

    monkeypatch.setattr(utilities, "_use_triton", lambda device: True)
    callback = peftx.FisherCallback("per_sample", **EXACT)
    sft(tmp_path, callback, adapted(), gradient_accumulation_steps=3).train()
    assert difference(callback.statistics, explicit(adapted(), [[row] for row in samples()])) < 1e-4


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos> "
    "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def text(count: int, draw: torch.Generator) -> str:
    return " ".join(f"w{int(i)}" for i in torch.randint(1, 63, (count,), generator=draw))


def conversations() -> list[dict]:
    draw = torch.Generator().manual_seed(3)
    parts = [(text(2 + i % 3, draw), text(1 + i % 5, draw), text(2, draw), text(3, draw)) for i in range(8)]
    return [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(some)]}
        for some in parts
    ]


def questions() -> list[dict]:
    draw = torch.Generator().manual_seed(4)
    return [{"prompt": text(2 + i % 3, draw) + " ", "completion": text(1 + i % 5, draw)} for i in range(8)]


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "language modeling": (lambda: [{"text": f"{row['prompt']}{row['completion']}"} for row in questions()], {}),
    "completion only": (questions, {"gradient_accumulation_steps": 2}),
    "whole text of questions": (questions, {"completion_only_loss": False}),
    "assistant only": (conversations, {"assistant_only_loss": True}),
    "packing": (samples, {"packing": True, "max_length": 24, "gradient_accumulation_steps": 2}),
    "packing, wrapped": (samples, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding free": (samples, {"padding_free": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_form_of_data(kind: str, form: str, tmp_path: Path) -> None:
    """What counts as a sample is what the trainer made of the data: packed rows are taken apart."""
    data, options = FORMS[form]
    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    for estimator in ("per_sample", "per_batch"):
        model = adapted(kind)
        callback = peftx.FisherCallback(estimator, **EXACT)
        before = copy.deepcopy(model)  # TRL's head knows the model that it was put on
        run = sft(tmp_path, callback, model, data(), tokenizer=tokenizer, **options)
        rows = prepared(run)
        joined = [[row for some in rows[i : i + 2] for row in some] for i in range(0, len(rows), 2)]
        single = [[row] for some in rows for row in some]
        wanted = explicit(before, single if estimator == "per_sample" else joined)
        run.train()
        assert difference(callback.statistics, wanted) < 1e-4
        assert callback.statistics.samples == sum(
            any(label != -100 for label in row["labels"][1:]) for some in rows for row in some
        )
    if form == "packing":
        assert max(map(len, rows)) > 2


@pytest.mark.parametrize("form", ["language modeling", "packing"])
def test_a_pass_after_training(form: str, tmp_path: Path) -> None:
    data, options = FORMS[form]
    model, before = adapted(), adapted()
    callback = peftx.FisherCallback("per_sample", "calibration", batch_size=3, **EXACT)
    run = sft(tmp_path, callback, model, data(), label_smoothing_factor=0.1, **options)
    run.train()
    assert difference(callback.statistics, explicit(before, [[row] for some in prepared(run) for row in some])) < 1e-4


def test_weights_that_train(tmp_path: Path) -> None:
    """Also those of the head, whose weight TRL reads itself."""
    model, data = tiny_model("llama"), samples()
    groups = [data[i : i + 2] for i in range(0, COUNT, 2)]
    callback = peftx.FisherCallback(**EXACT, exclude_modules=["lm_head"])
    sft(tmp_path, callback, tiny_model("llama")).train()
    assert difference(callback.statistics, explicit(model, groups)) < 1e-4
    callback = peftx.FisherCallback(**EXACT, target_modules=["q_proj", "lm_head"])
    sft(tmp_path, callback, tiny_model("llama")).train()
    assert [name.rpartition(".")[2] for name in callback.statistics] == ["q_proj", "q_proj", "lm_head"]
    double = copy.deepcopy(model).double()
    squares: Any = 0
    for group in groups:
        double.zero_grad()
        for row in group:
            labels = torch.tensor([row["labels"]])
            if (labels[:, 1:] != -100).any():
                loss = double(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
                (loss * (labels[:, 1:] != -100).sum()).backward()
        squares = squares + double.lm_head.weight.grad.square()
    found = callback.statistics["lm_head"]
    torch.testing.assert_close(found.fisher_in, squares.sum(0) / (COUNT - 1), rtol=1e-4, atol=1e-7)


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    def train(*callbacks: Any) -> dict[str, torch.Tensor]:
        model = adapted()
        options: dict[str, Any] = {"learning_rate": 0.1, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
        run = sft(tmp_path, transformers.TrainerCallback(), model, **options, num_train_epochs=2)
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
        return {name: part.detach() for name, part in model.named_parameters()}

    without = train()
    callback = peftx.FisherCallback(when="train")
    found = train(callback)
    assert all(torch.equal(found[name], without[name]) for name in without)
    assert callback.statistics.samples == 2 * (COUNT - 1)


# Refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": "dft"}, "tokens do not count alike"),
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
    ],
)
def test_other_losses_are_refused_before_the_first_step(options: dict, reason: str, tmp_path: Path) -> None:
    run = sft(tmp_path, peftx.FisherCallback(), adapted(), **options)
    with pytest.raises(ValueError, match=rf"{reason}.*when='calibration'"):
        run.train()
    assert run.state.global_step == 0


def test_a_frozen_head_is_refused(tmp_path: Path) -> None:
    run = sft(tmp_path, peftx.FisherCallback(target_modules=["lm_head", "q_proj"]), adapted())
    with pytest.raises(ValueError, match=r"reads the weight of lm_head without calling it.*exclude_modules"):
        run.train()


class Uneven(trl.SFTTrainer):
    """A loss of one's own, of the fused log-probabilities."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs, fused_lm_head=True)
        return -(outputs.log_probs * torch.linspace(0.5, 1, outputs.log_probs.shape[1])).sum()


def test_a_loss_of_ones_own_is_seen(tmp_path: Path) -> None:
    run = sft(tmp_path, peftx.FisherCallback(), adapted(), kind=Uneven)
    with pytest.raises(ValueError, match="does not weigh all tokens alike"):
        run.train()
    assert run.state.global_step == 0 and not any(module._forward_hooks for module in run.model.modules())


def pairs() -> list[dict[str, str]]:
    return [{key: f"w{i} w{j}" for j, key in enumerate(("prompt", "chosen", "rejected"), 2)} for i in range(1, 9)]


@pytest.mark.parametrize("when", ["last_epoch", "calibration"])
@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward", "GRPO", "RLOO"])
def test_trainers_for_preferences_and_rewards_are_refused(name: str, when: str, tmp_path: Path) -> None:
    data = pairs()
    model: Any = adapted()
    more: dict[str, Any] = {}
    if name == "KTO":
        data = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(data)]
    if name == "Reward":
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)
        )
    if name in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
        data = [{"prompt": row["prompt"]} for row in data]
    arguments = getattr(trl, f"{name}Config")(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    run = getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=words(),
        callbacks=[peftx.FisherCallback(when=when)],
        **more,
    )
    with pytest.raises(ValueError, match=f"the loss of {name}Trainer is one over preferences.*compression.collect"):
        run.train()
    assert run.state.global_step == 0
