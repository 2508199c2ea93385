"""A chat model before and after a minute of fine-tuning: `peftx demo --llm`.

SmolLM2-135M-Instruct turns notes into JSON (`notes`). It is asked in words for what it shall do, before and after.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

import peftx

from ..files import claim
from ..utils import quiet
from . import weights
from .errors import DemoError
from .model import load
from .notes import KEYS, TASK, TEST, TRAIN, right
from .recorder import Recorder, Watch

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# settings and learning rate; as small as still learns the task
METHODS: dict[str, tuple[type[Any], dict[str, Any], float]] = {
    "bone": (peftx.BoneConfig, {"r": 1, "target_modules": ["v_proj"]}, 2e-3),
    "loldu": (peftx.LoLDUConfig, {"r": 64, "target_modules": ["v_proj", "o_proj", "down_proj"]}, 1e-2),
    "lora": (LoraConfig, {"r": 1, "target_modules": ["v_proj"]}, 2e-3),
}
EPOCHS = 4.0
BATCH = 4
TOLERANCE = 1e-3  # of logits of some tens
NEW_TOKENS = 48
PLAIN = "plain-lora"


@dataclass(frozen=True)
class Options:
    """What the user chooses; no model means the one that is fetched."""

    output: Path
    model: Path | None = None
    method: str = "bone"
    epochs: float = EPOCHS
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Answers are those to the held-out notes; differences are the largest between the logits of
    the wanted answers, for the adapter loaded, exported and merged."""

    options: Options
    before: list[str]
    after: list[str]
    adapter_parameters: int
    model_parameters: int
    adapter_bytes: int
    exported_bytes: int | None  # None for what is a LoRA already
    differences: dict[str, float]
    same_predictions: bool
    loss_before: float
    loss_after: float
    losses: list[float] = field(repr=False)
    step_seconds: list[float] = field(repr=False)

    @property
    def title(self) -> str:
        """The method's name as people write it."""
        return METHODS[self.options.method][0].__name__.removesuffix("Config").replace("Lora", "LoRA")

    @property
    def equal(self) -> bool:
        return self.same_predictions and self.differences["loaded"] == 0 and max(self.differences.values()) <= TOLERANCE

    def right(self, answers: list[str]) -> int:
        """Fields that are as they should be, of `fields`."""
        return sum(right(answer, wanted) for answer, (_, wanted) in zip(answers, TEST, strict=True))

    @property
    def fields(self) -> int:
        return len(TEST) * len(KEYS)


def check(options: Options, overwrite: bool = False) -> None:
    """A `DemoError` for what the user has to change first."""
    if options.method not in METHODS:
        raise DemoError(f"with --llm, --methods is one of {', '.join(METHODS)}, got {options.method}")
    if not 0 < options.epochs < float("inf"):
        raise DemoError(f"epochs must be a positive number, got {options.epochs}")
    if options.model is not None and not (options.model / "config.json").is_file():
        raise DemoError(f"no model in {options.model}: expected a folder with config.json, weights and a tokenizer")
    if options.model is None:
        weights.check()
    try:
        claim(options.output, "demo", {"model": options.model}, overwrite=overwrite)
    except (ValueError, OSError) as error:
        raise DemoError(f"cannot write to the folder {options.output}: {error}") from error


def chat_model(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32, and its tokenizer."""
    if folder is not None:
        tokenizer = load(AutoTokenizer, folder)
        if not tokenizer.chat_template:
            raise DemoError(f"the tokenizer in {folder} has no chat template: name the folder of a chat model")
        return load(AutoModelForCausalLM, folder, dtype=torch.float32), tokenizer
    place = weights.fetch()
    with contextlib.redirect_stderr(io.StringIO()):  # the bar of the GGUF's reader
        tokenizer = load(AutoTokenizer, place, gguf_file=weights.GGUF)
        read = load(AutoModelForCausalLM, place, gguf_file=weights.GGUF, dtype=torch.float32)
    config = read.config  # a model read from GGUF counts as quantised, though its weights are fp32
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.name_or_path = model.config._name_or_path = HUB_ID
    return model, tokenizer


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """PEFT asks the Hub for the config of a base model whose name is an id, when an adapter is saved; not here."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def run(options: Options, watch: Watch = lambda *_: None) -> Outcome:
    """The whole demo; the adapter is written to `options.output/<method>`."""
    check(options)
    folder = options.output / options.method
    transformers.set_seed(options.seed)
    with offline():
        base, tokenizer = chat_model(options.model)
        bench = Bench(tokenizer)
        before, (_, loss_before) = bench.answers(base), bench.forced(base)
        make, settings, rate = METHODS[options.method]
        model = get_peft_model(base, make(task_type=TaskType.CAUSAL_LM, **settings))
        recorder = bench.fit(model, options, rate, watch)
        after, (trained, loss_after) = bench.answers(model), bench.forced(model)
        model.save_pretrained(str(folder))
        places = {"loaded": folder}
        if make is not LoraConfig:
            peftx.export_lora(model, folder / PLAIN)
            places = {"exported": folder / PLAIN, **places}
        values, everything = model.get_nb_trainable_parameters()
        logits = {}
        for how, place in places.items():
            base = model.unload()
            model = PeftModel.from_pretrained(base, place)
            logits[how] = bench.forced(model)[0]
        logits["merged"] = bench.forced(model.merge_and_unload())[0]
    return Outcome(
        options,
        before,
        after,
        adapter_parameters=values,
        model_parameters=everything - values,
        adapter_bytes=weights_in(folder),
        exported_bytes=weights_in(folder / PLAIN) if "exported" in places else None,
        differences={how: (found - trained).abs().max().item() for how, found in logits.items()},
        same_predictions=all(torch.equal(found.argmax(-1), trained.argmax(-1)) for found in logits.values()),
        loss_before=loss_before,
        loss_after=loss_after,
        losses=recorder.losses,
        step_seconds=recorder.seconds,
    )


def weights_in(folder: Path) -> int:
    """Bytes of a saved adapter."""
    return sum(file.stat().st_size for file in folder.glob("adapter_model.*"))


@dataclass(frozen=True)
class Bench:
    """Questions and answers for a tokenizer's model."""

    tokenizer: PreTrainedTokenizerBase

    def prompt(self, note: str) -> list[int]:
        messages = [{"role": "system", "content": TASK}, {"role": "user", "content": note}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def sample(self, note: str, answer: str) -> dict[str, list[int]]:
        """The loss is that of the answer."""
        asked = self.prompt(note)
        said = self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}

    @property
    def collate(self) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(self.tokenizer)

    @torch.inference_mode()
    def answers(self, model: Any) -> list[str]:
        """To the held-out notes, greedily."""
        model.eval()
        found = []
        for note, _ in TEST:  # one by one: the answers of some models change with the padding of a batch
            asked = torch.tensor([self.prompt(note)], device=model.device)
            said = model.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
            found.append(str(self.tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)))
        return found

    @torch.inference_mode()
    def forced(self, model: Any) -> tuple[torch.Tensor, float]:
        """Logits (tokens, vocabulary) where the wanted answers to the held-out notes are predicted, and their loss."""
        model.eval()
        batch = self.collate([self.sample(*pair) for pair in TEST]).to(model.device)
        out = model(**batch)
        return out.logits[:, :-1][batch["labels"][:, 1:] != -100].float().cpu(), out.loss.item()

    def fit(self, model: PeftModel, options: Options, rate: float, watch: Watch) -> Recorder:
        recorder = Recorder(options.method, watch)
        arguments = TrainingArguments(
            output_dir=str(options.output / options.method),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            weight_decay=0.0,
            warmup_steps=0.05,
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        samples = [self.sample(*pair) for pair in TRAIN]
        trainer = Trainer(model, arguments, self.collate, samples, callbacks=[recorder])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return recorder
