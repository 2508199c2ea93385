"""All that a GPU changes, in one command of at most eight minutes on one card, and one table of it.

Parts: `dense`, a step in bf16 of every method at r = 8, decoding and peak memory on a Llama of 1B's shape; `experts`,
the same on four layers of Qwen3-30B-A3B's shape with `target_parameters`; `optimizer`, 8-bit steps beside
bitsandbytes' kernels, embeddings included; `4-bit`, on an nf4 base of eight layers; `compile`, compiled steps on two
layers. Weights are random.

    python benchmarks/gpu.py                # writes results/gpu-<card>.md and .json
    python benchmarks/gpu.py --parts dense --minutes 3 --methods bone loldu
    python benchmarks/gpu.py --dry          # tiny, also on a CPU: shows that everything runs; writes nothing

Every part is a process of its own with a share of the time that is left: what fails, hangs or comes too late is told in
the table and does not end the run. Within a part all contenders stand on one copy of the base weights and take turns,
in random order. A time is that between CUDA events (CPU time without a card), a ratio the median over rounds of the
contender's time by the yardstick's in the same round: PEFT's LoRA r = 8, for experts LoRA on attention alone, for
optimizers bitsandbytes' AdamW8bit. Training runs under bf16 autocast, decoding without, at batch 1. Memory is the peak
of a step above model, adapter and states; for optimizers, of bf16 tensors, the bytes of their states.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import Contender, Setup, allocated_peak, laps, settle, variants, yardsticks
from peft import PeftConfig
from race import LATE, Clock, Race, first_line
from step_time import RESULTS, device_name

import peftx
from peftx.optim import LowRankAdamW, create_optimizer, state_bytes

SHARES = {"dense": 0.34, "experts": 0.24, "optimizer": 0.08, "4-bit": 0.14, "compile": 0.2}  # of the whole time
STEPPED = 0.8  # of a part's time, when decoding has to begin
GRACE = 8.0  # seconds between the last thing a part begins and its end by force
PACKAGES = ("torch", "transformers", "peft", "peftx", "bitsandbytes")


# Models.


class Racer(Contender):
    """An adapter, with its optimizer, on base weights that it shares with the others."""

    def __init__(self, base: Any, batch: dict[str, Any], config: PeftConfig, device: str, then: Any = None) -> None:
        quantised = [
            module.quant_state for module in base.modules() if getattr(module, "quant_state", None) is not None
        ]
        shared = {id(found): found for found in [*base.parameters(), *base.buffers(), *quantised]}
        before = fingerprint(base)
        self.setup, self.batch = Setup("llama", False, device, "bf16", torch.get_num_threads()), batch
        self.model, self.facts = copy.deepcopy(base, shared), {}
        self._adapt(config)
        if then:
            then(self.model)
        self.step()
        if fingerprint(base) != before:
            raise RuntimeError("wrote to the base weights, which all contenders share")

    def whole_step(self) -> float:
        return sum(self.step())

    def peak(self) -> int:
        return allocated_peak(self.step, self.setup.device)

    def decode(self, tokens: int) -> float:
        """Seconds a token, of `tokens` one by one after a prompt of eight."""
        self.model.eval()
        settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        prompt = self.batch["input_ids"][:1, :8]
        with torch.no_grad():
            (spent,) = laps((lambda: self.model.generate(input_ids=prompt, **settings),), self.setup.device)
        return spent / tokens


def fingerprint(base: torch.nn.Module) -> list[float]:
    """Sums over every 97th element of each tensor."""
    return torch.stack([p.detach().flatten()[::97].double().sum() for p in base.parameters()]).tolist()


def frozen(kind: str, race: Race, layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of random bf16 weights and a batch of 4 x 256 tokens; dry, all of it tiny."""
    if kind == "llama":  # Llama-3.2-1B
        sizes = dict(
            hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64
        )
        sizes |= dict(vocab_size=128_256, tie_word_embeddings=True)
        tiny = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        make = transformers.LlamaConfig
    else:  # Qwen3-30B-A3B, but for the vocabulary
        sizes = dict(hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4)
        sizes |= dict(head_dim=128, intermediate_size=6144, num_experts=128, num_experts_per_tok=8, vocab_size=32_768)
        tiny = dict(hidden_size=64, moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        tiny |= dict(intermediate_size=64, num_experts=4, num_experts_per_tok=2)
        make = transformers.Qwen3MoeConfig
    if race.dry:
        sizes |= {**tiny, "vocab_size": 128}
    config = make(**sizes, num_hidden_layers=1 if race.dry else layers)
    torch.manual_seed(0)
    with torch.device(race.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.randint(config.vocab_size, (2, 16) if race.dry else (4, 256))
    return model.requires_grad_(False).train(), {"input_ids": ids, "labels": ids}


def methods(chosen: list[str] | None, again: bool = True) -> dict[str, PeftConfig]:
    """PEFT's LoRA, and again to show the noise, and every variant of ours at r = 8."""
    found = {"LoRA": yardsticks("llama")["LoRA"]}
    found |= {"LoRA again": yardsticks("llama")["LoRA"]} if again else {}
    ours = variants("llama", chosen, 8).items()
    return found | {
        name.removesuffix(" r=8"): config for name, config in ours if name.endswith(" r=8") or " r=" not in name
    }


def on_model(race: Race, base: Any, batch: dict[str, Any], configs: dict[str, tuple[Any, Any]]) -> None:
    """Steps, peaks and decoding of `configs`: config, what is done to the model then. The first is the yardstick."""
    first = next(iter(configs))
    for name, (config, then) in configs.items():
        race.enter(name, lambda config=config, then=then: Racer(base, batch, config, race.device, then))
    for name, racer in race.alive.items():
        race.rows[name]["trained"] = racer.facts["trainable"]
    race.run("step", Racer.whole_step, first, STEPPED)
    race.compare("memory", Racer.peak, first)
    race.run("decoding", lambda racer: racer.decode(3 if race.dry else 16), first)


def dense(race: Race, chosen: list[str] | None) -> None:
    base, batch = frozen("llama", race, layers=16)
    on_model(race, base, batch, {name: (config, None) for name, config in methods(chosen).items()})


def experts(race: Race, chosen: list[str] | None) -> None:
    from experts import contenders

    base, batch = frozen("qwen3-moe", race, layers=4)
    on_model(race, base, batch, contenders(chosen))


def four_bit(race: Race, chosen: list[str] | None) -> None:
    import bitsandbytes

    base, batch = frozen("llama", race, layers=8)
    linears = [(name, m) for name, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in linears:
        sizes = linear.in_features, linear.out_features
        layer = bitsandbytes.nn.Linear4bit(
            *sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        layer.weight = weight.to(race.device)  # which quantises
        base.model.set_submodule(name, layer)
    base.is_loaded_in_4bit = True
    del linears, linear, weight
    settle(race.device)
    on_model(race, base, batch, {name: (config, None) for name, config in methods(chosen, again=False).items()})


def compiled(race: Race, chosen: list[str] | None) -> None:
    base, batch = frozen("llama", race, layers=2)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256  # one a contender
    breaks = torch._dynamo.utils.counters["graph_break"]

    def make(name: str, config: PeftConfig) -> Racer:
        racer, before, begin = Racer(base, batch, config, race.device), sum(breaks.values()), time.time()
        racer.model.compile(backend="aot_eager" if race.dry else "inductor")
        racer.step()
        race.note(name, f"{sum(breaks.values()) - before} graph breaks, {time.time() - begin:.0f} s to compile")
        return racer

    for name, config in methods(chosen, again=False).items():
        race.enter(name, lambda config=config: Racer(base, batch, config, race.device), STEPPED)
        both = f"{name}, compiled"
        race.enter(both, lambda both=both, config=config: make(both, config), STEPPED, most=0.6)
    race.run("step", Racer.whole_step, "LoRA")
    race.compare("memory", Racer.peak, "LoRA")


# Optimizers.

ADAMS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "bitsandbytes AdamW8bit": lambda params, **options: bitsandbytes_8bit(params, **options),
    "torch AdamW": lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
    "peftx, 8-bit": lambda params, **options: LowRankAdamW(params, min_8bit_size=0, **options),
    "peftx, 8-bit, fused=False": lambda params, **options: LowRankAdamW(
        params, min_8bit_size=0, fused=False, **options
    ),
    "peftx, 8-bit, bf16_stochastic_round": lambda params, **options: LowRankAdamW(
        params, min_8bit_size=0, bf16_stochastic_round=True, **options
    ),
    "peftx, 32-bit": lambda params, **options: LowRankAdamW(params, optim_bits=32, **options),
}


def bitsandbytes_8bit(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, min_8bit_size=0, **options)


class Stepper:
    """An optimizer of bf16 tensors of its own, with gradients that all of one table share."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], gradients: list[torch.Tensor]) -> None:
        params = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        self.optimizer, self.device = make(params, lr=1e-4, weight_decay=0.0), gradients[0].device.type
        self.step()

    def step(self) -> float:
        (spent,) = laps((self.optimizer.step,), self.device)
        return spent


def optimizers(race: Race, chosen: list[str] | None) -> None:
    tables = {
        "LoRA r=8": [(8, 2048), (2048, 8), (8, 2048), (8192, 8)] * 32,
        "dense": [(2048, 2048)] * 4 + [(8192, 2048)] * 2,
        "embedding": [(128_256, 2048)],
    }
    for table, shapes in tables.items():
        shapes = [tuple(min(n, 64) for n in shape) for shape in shapes[:4]] if race.dry else shapes
        draw = torch.Generator(race.device).manual_seed(0)
        gradients = [torch.randn(shape, generator=draw, device=race.device).bfloat16() for shape in shapes]
        for name, make in ADAMS.items():
            race.enter(f"{table}: {name}", lambda make=make, gradients=gradients: Stepper(make, gradients), 0.9)
        first = f"{table}: {next(iter(ADAMS))}"
        race.run("step", Stepper.step, first, 0.9)
        race.compare("memory", lambda stepper: state_bytes(stepper.optimizer), first)
        race.alive.clear()
        del gradients
        settle(race.device)
    rare = {name: ADAMS[name] for name in ("torch AdamW", "bitsandbytes AdamW8bit")}
    for bits in (8, 32):
        rare[f"peftx, embedding_bits={bits}"] = lambda model, bits=bits, **options: create_optimizer(
            model, options.pop("lr"), min_8bit_size=0, embedding_bits=bits, **options
        )
    for name, make in rare.items():
        row = f"rare rows: {name}"
        moved = race.guarded(row, race.clock.left(), lambda make=make, name=name: rare_rows(make, name, race))
        if moved is not None:
            race.note(row, f"the farthest value of a rare row moved by {moved:.3g} in 200 steps of 1e-3")
    race.report(list(race.rows.values()))


def rare_rows(make: Callable[..., torch.optim.Optimizer], name: str, race: Race) -> float:
    """How far an embedding's rows go whose small gradients come every 20th step, in blocks with rows of every step."""
    draw = torch.Generator(race.device).manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 16)).to(race.device)
    (p,) = model.parameters()
    before = p.detach().clone()
    optimizer = make(model if name.startswith("peftx") else [p], lr=1e-3, weight_decay=0.0)
    for step in range(200):
        p.grad = torch.randn(p.shape, generator=draw, device=race.device)
        p.grad[::16] *= 1e-3 * (step % 20 == 0)
        optimizer.step()
    return float((p.detach() - before)[::16].abs().max())


PARTS: dict[str, Callable[[Race, list[str] | None], None]] = {
    "dense": dense,
    "experts": experts,
    "optimizer": optimizers,
    "4-bit": four_bit,
    "compile": compiled,
}


# The run.


def here(part: str, until: float, args: argparse.Namespace, into: Path | None = None) -> dict[str, Any]:
    """Runs a part in this process; what it has found so far is in `into` whenever that exists."""
    outcome: dict[str, Any] = {"rows": [], "note": ""}

    def report(rows: list[dict[str, Any]]) -> None:
        outcome["rows"] = rows
        if into is not None:
            beside = into.with_suffix(".new")
            beside.write_text(json.dumps(outcome))
            beside.replace(into)

    transformers.utils.logging.set_verbosity_error()
    race = Race(Clock(until), report, args.dry)
    outcome["device"] = device_name(race.device)
    try:
        PARTS[part](race, args.methods)
    except Exception as error:
        outcome["note"] = f"failed: {type(error).__name__}: {first_line(str(error))}"
    report(list(race.rows.values()))
    return outcome


def apart(part: str, until: float, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a part in a process of its own, which is ended by force soon after its time."""
    with tempfile.TemporaryDirectory() as folder:
        into, errors = Path(folder) / "rows.json", Path(folder) / "errors"
        command = [sys.executable, __file__, "--part", part, "--until", str(until), "--into", str(into)]
        command += ["--dry"] if args.dry else []
        command += ["--methods", *args.methods] if args.methods is not None else []
        ended = ""
        with errors.open("w") as stream:  # a pipe could be held open by compilers that outlive the process
            try:
                code = subprocess.run(
                    command, stdout=subprocess.DEVNULL, stderr=stream, timeout=until - time.time() + GRACE
                ).returncode
                ended = f"failed: ended with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                ended = "failed: ended by force when its time was over"
        outcome = json.loads(into.read_text()) if into.exists() else {"rows": [], "note": ""}
        if ended:
            last = (errors.read_text(errors="replace").strip().splitlines() or [""])[-1]
            outcome["note"] = "; ".join(filter(None, [outcome["note"], ended, last and first_line(last)]))
        return outcome


def everything(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All parts, one after the other; time that one leaves over is shared by those behind it."""
    end, found = time.time() + 60 * args.minutes, {}
    for place, part in enumerate(args.parts):
        left = end - time.time()
        own = left * SHARES[part] / sum(SHARES[other] for other in args.parts[place:])
        begin = time.time()
        if own < 2 * GRACE:
            found[part] = {"rows": [], "note": LATE}
        else:
            print(f"{part}: at most {own:.0f} s", file=sys.stderr, flush=True)
            found[part] = (here if args.dry else apart)(part, begin + own - GRACE, args)
        found[part]["seconds"] = round(time.time() - begin, 1)
    return found


def markdown(parts: dict[str, dict[str, Any]]) -> str:
    """One table of all parts. Memory: of a step's peak, for optimizers of their states."""
    lines = [
        "| part | | step | decoding | memory | step, ms | token, ms | MiB | trained | |",
        "| --- | --- |" + 7 * " ---: |" + " --- |",
    ]
    forms = {
        "step": ".3f",
        "decoding": ".2f",
        "memory": ".2f",
        "step ms": ".2f",
        "decoding ms": ".1f",
        "memory MiB": ",.0f",
        "trained": ",",
    }
    for part, outcome in parts.items():
        late = [row["contender"] for row in outcome["rows"] if row.get("note") == LATE]
        for row in outcome["rows"]:
            if row["contender"] not in late:
                cells = [f"{row[key]:{form}}" if key in row else "" for key, form in forms.items()]
                lines.append(f"| {' | '.join([part, row['contender'], *cells, row.get('note', '')])} |")
        notes = [
            outcome["note"],
            f"{LATE}: {', '.join(late)}" if late else "",
            "" if outcome["rows"] else "nothing ran",
        ]
        if any(notes):
            lines.append(f"| {part} |{'  |' * 8} {'; '.join(filter(None, notes))} |")
    return "\n".join(lines)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted({name for info in peftx.methods() for name in (info.name, *info.variants)})
    option = parser.add_argument
    option("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="default: all")
    option("--methods", nargs="*", choices=known, help="names of methods or variants; default: all")
    option("--minutes", type=float, default=8.0, help="for everything; default: 8")
    option("--dry", action="store_true", help="tiny, in this process, also on a CPU; fails where anything did")
    option("--out", type=Path, help="folder of the table; default: results/ beside this file, with --dry none")
    for hidden in ("--part", "--until", "--into"):
        option(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry shows on a CPU that everything runs")
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    return args


def main() -> int:
    args = arguments()
    if args.part:
        here(args.part, float(args.until), args, Path(args.into))
        return 0
    begin = time.time()
    parts = everything(args)
    about = {
        "device": next((found["device"] for found in parts.values() if "device" in found), "unknown"),
        "dry": args.dry,
        **{name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "seconds": round(time.time() - begin),
    }
    page = f"{', '.join(f'{key} {value}' for key, value in about.items())}\n\n{markdown(parts)}\n"
    print(page)
    if (folder := args.out or (None if args.dry else RESULTS)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "-", f"gpu {about['device']}".lower()).strip("-")
        (folder / f"{stem}.md").write_text(page)
        (folder / f"{stem}.json").write_text(json.dumps({"about": about, "parts": parts}, indent=1))
    notes = [row.get("note", "") for found in parts.values() for row in [*found["rows"], found]]
    return int(args.dry and any(note.startswith(("failed", "skipped")) for note in notes))


if __name__ == "__main__":
    sys.exit(main())
