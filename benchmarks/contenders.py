"""Who competes in step_time.py, and one contender at work inside its own process."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

# What every process would otherwise repeat on the terminal:
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import psutil
import torch
from peft import LoraConfig, MissConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerState,
)

import peftx

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"llama": "all-linear", "bert": r".*\.encoder\.layer\..*\.(query|key|value|dense)"}


@dataclass(frozen=True)
class Setup:
    """What all contenders of a comparison share. A batch is 8 x 128 tokens, in the small setup 2 x 16."""

    model: str
    small: bool
    device: str
    dtype: str
    threads: int

    def build(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        """A frozen model with random weights, without dropout, and a batch for it."""
        batch, length = (2, 16) if self.small else (8, 128)
        width, layers, vocabulary = (64, 2, 128) if self.small else (512, 8, 8192)
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": vocabulary}
        torch.manual_seed(0)
        ids = torch.randint(vocabulary, (batch, length))
        if self.model == "llama":
            model, labels = LlamaForCausalLM(LlamaConfig(intermediate_size=3 * width, **sizes)), ids
        else:
            dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = BertForSequenceClassification(BertConfig(intermediate_size=4 * width, **sizes, **dropout))
            labels = torch.arange(batch) % 2
        model.requires_grad_(False).train().to(self.device, DTYPES[self.dtype])
        return model, {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}


def yardsticks(model: str) -> dict[str, PeftConfig | None]:
    """What the others are compared to: the frozen model (no config) and PEFT's LoRA."""
    return {"floor": None, "LoRA": LoraConfig(r=8, target_modules=TARGETS[model])}


def references(model: str) -> dict[str, PeftConfig]:
    """Other methods of PEFT's own."""
    dora = LoraConfig(r=8, use_dora=True, target_modules=TARGETS[model])
    return {"PEFT DoRA": dora, "PEFT MiSS": MissConfig(r=8, target_modules=TARGETS[model])}


def variants(model: str, chosen: Iterable[str] | None, rank: int) -> dict[str, PeftConfig]:
    """Every registered variant, or those chosen by its name or its method's, at r = `rank` and at its own r."""
    found = {}
    for info in peftx.methods():
        for variant, kwargs in info.variants.items():
            if chosen is not None and not {info.name, variant} & set(chosen):
                continue
            own = info.config(**kwargs, target_modules=TARGETS[model])
            ranks = [getattr(own, name) for name in info.rank_fields if hasattr(own, name)]
            if not ranks:
                found[variant] = own
            for r in dict.fromkeys((rank, ranks[-1])) if ranks else ():
                settings = {**kwargs, **dict.fromkeys(info.rank_fields, r), "target_modules": TARGETS[model]}
                found[f"{variant} r={r}"] = info.config(**settings)
    return found


def laps(phases: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Seconds that each phase took: CPU time of this process; on a GPU, time between events on its stream."""
    if device == "cpu":
        marks = [time.process_time()]
        for phase in phases:
            phase()
            marks.append(time.process_time())
        return [end - start for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for phase, event in zip(phases, events[1:], strict=True):
        phase()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def allocated_peak(step: Callable[[], object], device: str) -> int:
    """Most bytes of tensors that `step` holds at one time, beyond those alive before it; exact on either device."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def settle(device: str) -> int:
    """Gives freed memory back, restarts the count of the process's peak, and returns the bytes it has now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux
    return psutil.Process().memory_info().rss


def process_peak(device: str) -> int:
    """Most bytes the process had since `settle`: reserved on the GPU, or resident (without Linux: since it started)."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(found[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def nbytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def held(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return nbytes(model.parameters()) + nbytes(model.buffers())


def structure(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """The type of every module, the shape and dtype of every tensor: models that agree here run the same operations."""
    tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()]
    return [(name, type(module)) for name, module in model.named_modules()] + tensors


class Contender:
    """A model with an adapter and its optimizer; without a config, the frozen model down to its input gradients."""

    def __init__(self, setup: Setup, config: PeftConfig | None) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.model, self.batch = setup.build()
        self.optimizer: torch.optim.Optimizer | None = None
        self.model.enable_input_require_grads()
        self.step()  # loads libraries and makes workspaces, which belong to the bare model
        self.bare, self.bare_structure = settle(setup.device), structure(self.model)
        self.facts: dict[str, Any] = {"trainable": 0, "saved": 0, "held": 0, "merged": None}
        if config is not None:
            self.model.disable_input_require_grads()
            self._adapt(config)
        settle(setup.device)
        for _ in range(2):
            self.step()

    def _adapt(self, config: PeftConfig) -> None:
        bare = held(self.model)
        self.model = get_peft_model(self.model, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.facts["trainable"] = sum(p.numel() for p in trained)
        self.facts["saved"] = nbytes(get_peft_model_state_dict(self.model).values())
        self.facts["held"] = held(self.model) - bare
        callback = next((i.callback for i in peftx.methods() if type(config) is i.config), None) or TrainerCallback
        self.callback, self.state = callback(), TrainerState(max_steps=1000)
        self.tell("on_train_begin")

    def tell(self, event: str) -> None:
        """Tells the method's callback, as `Trainer` would."""
        args = SimpleNamespace(output_dir="", resume_from_checkpoint=None)
        getattr(self.callback, event)(args, self.state, None, model=self.model, optimizer=self.optimizer)

    def step(self) -> list[float]:
        """Seconds of forward, backward and optimizer."""
        return laps((self._forward, self._backward, self._update), self.setup.device)

    def _forward(self) -> None:
        dtype = DTYPES[self.setup.dtype]
        with torch.autocast(self.setup.device, dtype, enabled=dtype != torch.float32):
            self.loss = self.model(**self.batch).loss

    def _backward(self) -> None:
        self.loss.backward()
        del self.loss

    def _update(self) -> None:
        if self.optimizer is not None:
            self.tell("on_pre_optimizer_step")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.tell("on_step_end")

    def finish(self) -> dict[str, Any]:
        """Counts, peak bytes above the bare model, and whether merging gives back the bare model's structure."""
        self.facts["resident"] = process_peak(self.setup.device) - self.bare
        states = self.optimizer.state.values() if self.optimizer else ()
        kept = self.facts["held"] + nbytes(value for state in states for value in state.values())
        self.facts["memory"] = kept + allocated_peak(self.step, self.setup.device)
        if self.optimizer is not None:
            with suppress(NotImplementedError):
                self.facts["merged"] = structure(self.model.merge_and_unload()) == self.bare_structure
        return self.facts


_contender: Contender


def start(setup: Setup, config: PeftConfig | None) -> None:
    """Makes this process's contender. The process ends with its parent, however that ends."""
    global _contender
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    _contender = Contender(setup, config)


def ask(request: str) -> Any:
    """Calls a method of this process's contender."""
    return getattr(_contender, request)()
