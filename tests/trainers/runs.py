"""Real trainers of TRL on tiny models, with words for text and a chat template made here."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import SMALL, Case, randomize, tiny_model, words

import peftx
import peftx.optim

trl = pytest.importorskip("trl", reason="needs peftx[trl]")
datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w61 {% generation %}{{ m['content'] }} <eos> "
    "{% endgeneration %}{% else %}w60 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w61 {% endif %}"
)
TRAINERS = ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward")
REFERENCES = ("DPO", "KTO", "GRPO", "RLOO")  # compare with what the adapter was
OPTIONS: dict[str, Any] = dict(
    per_device_train_batch_size=2, max_steps=4, learning_rate=0.02, logging_steps=1, save_strategy="no", use_cpu=True
)
OPTIONS |= dict(report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False)
OF_TRAINER: dict[str, dict[str, Any]] = {
    "SFT": {},
    "DPO": {"beta": 0.5},
    "KTO": {},
    "GRPO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
    "RLOO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
    "Reward": {},
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    found = words()
    found.chat_template = TEMPLATE
    return found


def text(length: int, draw: torch.Generator) -> str:
    return " ".join(f"w{int(i)}" for i in torch.randint(1, 60, (length,), generator=draw))


def rows(name: str, count: int = 16, chat: bool = False) -> Any:
    """A data set for the trainer of that name: prompts of 2 to 4 words, answers of 1 to 5."""
    draw, found = torch.Generator().manual_seed(1), []
    for i in range(count):
        prompt, *answers = text(2 + i % 3, draw), text(1 + i % 5, draw), text(1 + (i + 2) % 5, draw)
        if chat:
            parts: Any = [[{"role": "user", "content": prompt}]]
            parts += [[{"role": "assistant", "content": answer}] for answer in answers]
        else:
            parts = [f"{prompt} ", *answers]
        named = dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))
        prompted = {"prompt": named["prompt"]}
        found.append(
            {
                "SFT": {**prompted, "completion": named["chosen"]},
                "KTO": {**prompted, "completion": named["chosen"], "label": i % 2 == 0},
                "GRPO": prompted,
                "RLOO": prompted,
            }.get(name, named)
        )
    return datasets.Dataset.from_list(found)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Of a generated text: more where its words have small numbers."""
    spoken = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(1 / (1 + int(word[1:])) for word in text.split() if word[0] == "w") for text in spoken]


def base(name: str) -> Any:
    """The model for the trainer of that name: a classifier with one output for rewards."""
    if name != "Reward":
        return tiny_model("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config).eval()


def in_four_bits(folder: Path) -> Any:
    """A base that is wide enough for blocks of 64, and for bitsandbytes' kernels on CPUs."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    settings = {**SMALL, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(folder)
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=torch.float32)


def config(case: Case, name: str, **settings: Any) -> Any:
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    return case.config(**{"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": task, **settings})


def trained(case: Case, name: str, **settings: Any) -> peft.PeftModel:
    """A model whose adapter has been trained before, as far as anybody can tell: buffers moved, too."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base(name), config(case, name, **settings))
    randomize(model, case, std=0.05)
    if case.info.name == "triadaptlora":
        grown = model.peft_config["default"]
        grown.total_step = 4
        for step in range(1, 5):
            randomize(model, case, std=0.01, seed=step)
            model.base_model.update_and_grow(step)
        grown.total_step = None
    return model


def make(
    name: str,
    folder: Path | str,
    model: Any,
    data: Any = None,
    *,
    callbacks: Iterable[Any] = (),
    peft_config: Any = None,
    extra: dict[str, Any] | None = None,
    tokens: Any = None,
    **options: Any,
) -> Any:
    more = dict(extra or {})
    if name in ("GRPO", "RLOO"):
        more["reward_funcs"] = reward
    run = getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(str(folder), **{**OPTIONS, **OF_TRAINER[name], **options}),
        train_dataset=rows(name) if data is None else data,
        processing_class=tokens or tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
        **more,
    )
    run.remove_callback(transformers.PrinterCallback)
    return run


def small_states(name: str, run_options: dict[str, Any], model: Any, folder: Path | str, **settings: Any) -> dict:
    """What gives the trainer of that name a `LowRankAdamW`. Two of TRL's take a class, as transformers' does."""
    args = getattr(trl, f"{name}Config")(str(folder), **{**OPTIONS, **OF_TRAINER[name], **run_options})
    if name in ("SFT", "Reward"):
        return peftx.optim.trainer_kwargs(args, **settings)
    return {"optimizers": (peftx.optim.create_optimizer(model, args, **settings), None)}


def driver(case: Case) -> list[Any]:
    """The callback of the method's training rule, where it has one."""
    return [case.info.callback()] if case.info.callback else []


def logged(run: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def values(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_training(run: Any, before: dict[str, torch.Tensor], case: Case, name: str) -> None:
    """The adapter moved, and nothing else: not the base, and not the reference, which is what the adapter was."""
    after = values(run.model)
    assert all(
        torch.equal(tensor, before[key]) for key, tensor in after.items() if key in before and not ours(key, case)
    )
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items() if ours(key, case))
    copies = [key for key in after if key not in before]
    assert bool(copies) == (name in REFERENCES) and all(".ref" in key for key in copies)
    assert all(torch.equal(after[key], before[key.replace(".ref", ".default")]) for key in copies)
    assert all(math.isfinite(number) for number in logged(run))
    if name == "DPO":
        assert logged(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    elif name in REFERENCES:
        assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-6)


def ours(key: str, case: Case) -> bool:
    """Whether a key of a state dict is one of the adapter's, or of a head that trains with it."""
    return case.info.prefix in key or "modules_to_save" in key
