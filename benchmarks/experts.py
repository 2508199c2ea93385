"""What adapters on the fused experts of a mixture of experts cost: a training step, decoding, memory, trained values.

A Qwen3-MoE with random weights (hidden 512, 4 layers, 4 experts a token, width 384 each, fp32). The numbers of experts
differ, the work of a token does not. Contenders, r = 8 everywhere: LoRA on attention alone, the yardstick; PEFT's LoRA
on attention and experts; the same after `peftx.fast_experts`; and every method of peftx that reaches experts.

In one process with one thread the contenders take turns; a ratio is the median over rounds of CPU times in one round.
Peak memory is that of the tensors that a training step makes, counted by torch's profiler.

Of LoRA-GGPO, which experts refuse, there is a bound: the step with nothing more than the draws of its noise.

    python benchmarks/experts.py                       # 8, 32 and 128 experts; some 20 minutes
    python benchmarks/experts.py --experts 8 --rounds 3 --save
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import peft
import torch
import transformers
from report import publish
from rich.console import Console
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

import peftx

YARDSTICK = "LoRA, attention"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = 12  # decoded


def base(experts: int, small: bool) -> Any:
    torch.manual_seed(0)
    width = 64 if small else 512
    config = transformers.Qwen3MoeConfig(
        hidden_size=width,
        intermediate_size=width,
        moe_intermediate_size=width * 3 // 4,
        num_hidden_layers=2 if small else 4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        vocab_size=512 if small else 8192,
        num_experts=experts,
        num_experts_per_tok=4,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def contenders(chosen: list[str] | None) -> dict[str, tuple[Any, Callable[[Any], Any] | None]]:
    """Configs by name, and what is done to the model then."""
    lora = dict(r=8, lora_alpha=8, task_type="CAUSAL_LM", target_modules=ATTENTION)
    both = {**lora, "target_parameters": EXPERTS}
    found: dict[str, tuple[Any, Callable[[Any], Any] | None]] = {
        YARDSTICK: (peft.LoraConfig(**lora), None),
        "PEFT's LoRA": (peft.LoraConfig(**both), None),
        "PEFT's LoRA, fast_experts": (peft.LoraConfig(**both), peftx.fast_experts),
    }
    for info in peftx.methods():
        for name, settings in info.variants.items():
            if not info.experts or (chosen and name not in chosen and info.name not in chosen):
                continue
            fields = info.config.__dataclass_fields__
            size = {field: 8 for field in ("r", "init_r", "target_r") if field in fields}
            size |= {"lora_alpha": 8} if "lora_alpha" in fields and name != "allora" else {}
            targets = dict(task_type="CAUSAL_LM", target_modules=ATTENTION, target_parameters=EXPERTS)
            try:
                found[name] = info.config(**{**size, **settings, **targets}), None
            except (ValueError, NotImplementedError):
                continue  # a mode without a form for experts
    return found


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> float:
    begin = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - begin


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor) -> float:
    model.eval()
    begin = time.process_time()
    model.generate(input_ids=ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    spent = time.process_time() - begin
    model.train()
    return spent


def noise(model: Any) -> float:
    """Seconds to draw a normal number for every weight of the experts twice, for the forward and the backward pass."""
    stacks = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    begin = time.process_time()
    for stack in stacks:
        for _ in range(2):
            for weight in stack:
                torch.empty_like(weight).normal_()
    return time.process_time() - begin


def peak(model: Any, optimizer: Any, ids: torch.Tensor) -> int:
    """Bytes of the tensors that live at once within a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(model, optimizer, ids)
    now = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(experts: int, chosen: list[str] | None, rounds: int, small: bool) -> list[dict[str, Any]]:
    batch = torch.randint(0, 512, (2, 16) if small else (4, 128), generator=torch.Generator().manual_seed(0))
    prompt, models, root = batch[:1, :8], {}, base(experts, small)
    shared = [*root.parameters()]  # frozen, so one copy serves all
    for name, (config, then) in contenders(chosen).items():
        try:
            model = peft.get_peft_model(copy.deepcopy(root, {id(p): p for p in shared}), config).train()
        except NotImplementedError:
            continue  # a mode without a form for experts
        if then:
            then(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        step(model, optimizer, batch), decode(model, prompt)
        models[name] = model, optimizer
    steps: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(rounds), f"{experts} experts", console=Console(stderr=True), transient=True):
        for name, (model, optimizer) in models.items():
            steps[name].append(step(model, optimizer, batch))
            decodes[name].append(decode(model, prompt))

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return median(ours / theirs for ours, theirs in zip(times[name], times[YARDSTICK], strict=True))

    draws = median(noise(root) / theirs for theirs in steps[YARDSTICK][:3])
    peaks = {name: peak(model, optimizer, batch) for name, (model, optimizer) in models.items()}
    return [
        {
            "experts": experts,
            "contender": name,
            "step": ratio(steps, name),
            "decode": ratio(decodes, name),
            "peak": peaks[name] / peaks[YARDSTICK],
            "trained": sum(p.numel() for p in models[name][0].parameters() if p.requires_grad),
        }
        for name in models
    ] + [{"experts": experts, "contender": "lora-ggpo, its draws alone", "step": 1 + draws}]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| experts | | training step | decoding | peak memory | trained values |",
        "| ---: | --- " + "| ---: " * 4 + "|",
    ]
    for row in rows:
        numbers = (f"{row[key]:.2f}" if key in row else "" for key in ("step", "decode", "peak"))
        trained = f"{row['trained']:,}" if "trained" in row else ""
        lines.append(f"| {row['experts']} | {row['contender']} | {' | '.join(numbers)} | {trained} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128], help="default: 8 32 128")
    parser.add_argument("--methods", nargs="*", help="names of methods or variants; default: all that reach experts")
    parser.add_argument("--rounds", type=int, default=7, help="of each contender; default: 7")
    parser.add_argument("--small", action="store_true", help="tiny models: shows that everything runs")
    parser.add_argument("--save", action="store_true", help="write results/experts.md and .json beside this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows = [row for experts in args.experts for row in measure(experts, args.methods, args.rounds, args.small)]
    publish("experts", rows, markdown(rows), YARDSTICK, args.save, rounds=args.rounds)


if __name__ == "__main__":
    main()
