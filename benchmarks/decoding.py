"""What an attached adapter costs where users wait: decoding, batches of several adapters, and operations a layer.

The model has the shape of SmolLM2-135M and random weights, or is any other (`--model`); fp32, adapters on all linear
layers, r = 8. In one process with one thread the contenders take turns on the same base weights; a ratio to PEFT's LoRA
is the median over rounds of CPU times in one round, in brackets its quartiles.

- decode: tokens one at a time, batch 1, from a prompt of 8; plainly, and within `peftx.inference`.
- mixed: the same with 8 rows, each with an adapter of its own (`adapter_names`).
- short step: forward and backward in training on 2 x 128 tokens, where what does not shrink with the batch shows.
- operations: of one linear layer with its adapter, forward and backward, as torch's profiler counts them; views and
  allocations are none. On a GPU they are launches. GGPO's and MGPO's are those of a perturbed step, with a layer's
  share of the statistics that they take of 30 layers of one shape at once.

    python benchmarks/decoding.py                                     # all; some 15 minutes
    python benchmarks/decoding.py --methods bone allora --rounds 5 --save
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import contenders
import torch
import transformers
from peft import LoraConfig, get_peft_model
from report import RESULTS, publish, ratio
from rich.console import Console
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

import peftx

YARDSTICK, LAYERS = "LoRA", 30
PARTS = ("decode", "within", "mixed", "mixed within", "short step", "operations")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIEWS = {
    *("alias", "as_strided", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "expand_as"),
    *("narrow", "new_empty", "new_empty_strided", "permute", "resolve_conj", "resolve_neg", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "to", "transpose", "unfold", "unsqueeze", "view", "view_as", "_unsafe_view"),
    *("lift_fresh", "_reshape_alias", "item", "_local_scalar_dense", "is_nonzero", "result_type", "set_", "unbind"),
    *("flatten", "mT", "movedim", "numpy_T", "promote_types", "reshape", "unflatten", "fill_", "zero_"),
}


def base(folder: str | None, small: bool) -> Any:
    if folder:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    width, layers = (64, 2) if small else (576, LAYERS)
    sizes = dict(hidden_size=width, intermediate_size=width // 3 * 8, num_hidden_layers=layers)
    heads = dict(num_attention_heads=width // 64, num_key_value_heads=max(1, width // 192), vocab_size=4096)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, head_dim=64))


def configs(chosen: list[str] | None) -> dict[str, Any]:
    """The yardstick, PEFT's DoRA, and every variant of peftx, or those chosen, at r = 8."""
    contenders.TARGETS["llama"] = TARGETS
    found = {YARDSTICK: LoraConfig(r=8, target_modules=TARGETS)}
    if not chosen or "dora" in chosen:
        found["DoRA"] = LoraConfig(r=8, use_dora=True, target_modules=TARGETS)
    ours = contenders.variants("llama", chosen, 8).items()
    return found | {
        name.removesuffix(" r=8"): config for name, config in ours if name.endswith(" r=8") or "r=" not in name
    }


@torch.no_grad()
def stir(model: Any) -> None:
    """Moves the adapters off their start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def build(root: Any, config: Any, adapters: int = 1) -> Any:
    """`root` with adapters; its weights are shared."""
    shared = {id(parameter): parameter for parameter in root.parameters()}
    model = get_peft_model(copy.deepcopy(root, shared), copy.deepcopy(config), adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", copy.deepcopy(config))
    stir(model)
    return model.eval()


def generate(model: Any, rows: int, tokens: int, **kwargs: Any) -> float:
    ids = torch.arange(8).repeat(rows, 1)
    begin = time.process_time()
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **kwargs,
        )
    return time.process_time() - begin


def ratios(calls: dict[str, Callable[[], float]], rounds: int, label: str) -> dict[str, list[float]]:
    """By contender, its ratio to the yardstick in each round."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds), label, console=Console(stderr=True), transient=True):
        for name, call in calls.items():
            times[name].append(call())
    return {
        name: [ours / theirs for ours, theirs in zip(spent, times[YARDSTICK], strict=True)]
        for name, spent in times.items()
    }


def decoding(root: Any, found: dict[str, Any], rounds: int, tokens: int, within: bool) -> dict[str, list[float]]:
    models = {name: build(root, config) for name, config in found.items()}
    with ExitStack() as stack:
        for name, model in models.items():
            if within and name not in (YARDSTICK, "DoRA"):
                stack.enter_context(peftx.inference(model))
        calls = {name: lambda model=model: generate(model, 1, tokens) for name, model in models.items()}
        return ratios(calls, rounds, "within peftx.inference" if within else "decode")


def mixed(root: Any, found: dict[str, Any], rounds: int, tokens: int, within: bool) -> dict[str, list[float]]:
    names, calls = [f"a{i}" for i in range(8)], {}
    with ExitStack() as stack:
        for name, config in found.items():
            if name == "DoRA":  # PEFT refuses it in such a batch
                continue
            model = build(root, config, adapters=8)
            if within and name != YARDSTICK:
                stack.enter_context(peftx.inference(model))
            calls[name] = lambda model=model: generate(model, 8, tokens // 4, adapter_names=names)
        return ratios(calls, rounds, "mixed, within" if within else "mixed")


def short(root: Any, found: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    ids, calls = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0)), {}
    for name, config in found.items():
        model = build(root, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        if hasattr(model.base_model, "attach_optimizer"):
            model.base_model.attach_optimizer(optimizer)

        def step(model: Any = model, optimizer: Any = optimizer) -> float:
            begin = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            if hasattr(model.base_model, "update_ggpo_stats"):
                model.base_model.update_ggpo_stats()
            optimizer.step()
            optimizer.zero_grad()
            return time.process_time() - begin

        calls[name] = step
    return ratios(calls, rounds, "short step")


def operations(config: Any) -> float:
    """Of one linear layer with its adapter, forward and backward; of GGPO perturbed, with a layer's share of what the
    update of the statistics of all layers takes, which are of one shape here."""
    torch.manual_seed(0)
    root = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=1, vocab_size=64
        )
    )
    config = copy.deepcopy(config)
    config.target_modules = ["q_proj"]
    model = get_peft_model(root, config)
    stir(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ruled = hasattr(model.base_model, "update_ggpo_stats")
    if ruled:
        model.base_model.attach_optimizer(optimizer)
    layers = [block.self_attn.q_proj for block in model.base_model.model.model.layers]
    x = torch.randn(32, 64, requires_grad=True)

    def step() -> None:
        for layer in layers:
            layer(x).backward(torch.ones(32, 64))
            x.grad = None
        if ruled:
            model.base_model.update_ggpo_stats()

    for _ in range(2):
        step()
        optimizer.step()
        optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    leaves = [event for event in found.events() if event.name.startswith("aten::") and is_leaf(event)]
    count = sum(event.name.removeprefix("aten::") not in {*VIEWS, "ones"} for event in leaves)
    return round(count / LAYERS, 1)


def is_leaf(event: Any) -> bool:
    """Whether it calls nothing but views."""
    return all(child.name.removeprefix("aten::") in VIEWS and is_leaf(child) for child in event.cpu_children)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | decoding | within `peftx.inference` | mixed batch | within it | step of 256 tokens | operations |"]
    lines.append("| --- " + "| ---: " * 6 + "|")
    for name, row in rows.items():
        cells = (ratio(row, key) if key in row else "-" for key in PARTS[:-1])
        lines.append(
            f"| {name} | {' | '.join(cells)} | {row.get('operations', '-'):{'g' if 'operations' in row else ''}} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; default: random weights")
    parser.add_argument("--methods", nargs="*", help="names of methods or variants; default: all")
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9, help="of each contender; default: 9")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a round; default: 16")
    parser.add_argument("--small", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--save", action="store_true", help="write results/decoding.md and .json beside this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=r".*(is_gradient_checkpointing|Already found a `peft_config`)")
    found, root = configs(args.methods), base(args.model, args.small)
    rows: dict[str, dict[str, Any]] = {name: {} for name in found}
    parts = {
        "decode": lambda: decoding(root, found, args.rounds, args.tokens, within=False),
        "within": lambda: decoding(root, found, args.rounds, args.tokens, within=True),
        "mixed": lambda: mixed(root, found, args.rounds, args.tokens, within=False),
        "mixed within": lambda: mixed(root, found, args.rounds, args.tokens, within=True),
        "short step": lambda: short(root, found, args.rounds),
        "operations": lambda: {name: operations(config) for name, config in found.items()},
    }
    if args.save and {*args.parts} != {*PARTS}:  # the others stay as they were
        saved = json.loads((RESULTS / "decoding.json").read_text())["rows"]
        rows |= {name: dict(saved.get(name, {})) for name in found}
    for part in args.parts:
        for name, value in parts[part]().items():
            if isinstance(value, list):
                low, _, high = quantiles(value, n=4, method="inclusive")
                rows[name] |= {part: median(value), f"{part} quartiles": [low, high]}
            else:
                rows[name][part] = value
    model = Path(args.model).name if args.model else "random"
    publish("decoding", rows, markdown(rows), "PEFT's LoRA", args.save, rounds=args.rounds, model=model)


if __name__ == "__main__":
    main()
