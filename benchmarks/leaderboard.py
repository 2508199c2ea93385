"""Which method? Every one at the learning rate that suits it, over several seeds, beside PEFT's LoRA; on four tasks.

`peftx compare` does the work: five learning rates by factors of three around a method's own (three of a language
model), and further ones while the best is at an end, one run each on a validation part. The best is chosen, or, of an
accuracy, the nearest to the method's own that is within a standard error of the best. Then come the runs that count,
with that rate. The test part is read by these alone. Steps, batches, schedule and the head's rate are equal; scale and
optimizer are each method's own. On SST-2 every variant takes part, elsewhere the first of each method, and LoRA-MGPO.
SST-2 is also learnt on a 4-bit base (`sst2-4bit`).

    python benchmarks/leaderboard.py path/to/data --smollm2 path/to/SmolLM2-135M-Instruct
    python benchmarks/leaderboard.py path/to/data --tasks sst2 --groups budget own
    python benchmarks/leaderboard.py --own mine path/to/model train.jsonl test.jsonl --kind SEQ_CLS
    python benchmarks/leaderboard.py --report

The data folder has sst2/{train,test}.tsv (`sentence<TAB>label`), gsm8k/{train,test}.jsonl and selfinstruct/*.jsonl; the
docstrings of Python's library and the MiniLM encoder come with `peftx[demo]`. A stopped run goes on where it stopped:
the comparisons are in `--work`, a folder each. What is done is in results/leaderboard.{json,md,png}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from report import ratio
from rich.console import Console

import peftx
from peftx.data import records
from peftx.demo import data as demo_data
from peftx.demo import model as encoder
from peftx.train.comparison import Outcome, compare
from peftx.train.intervals import t_interval
from peftx.train.methods import NATIVE_RATE, find
from peftx.train.report import Row, describe, notes, quality_of, rows, shown, spread, told
from peftx.train.settings import CompareSettings

RESULTS = Path(__file__).parent / "results" / "leaderboard.json"
Pairs = list[dict[str, str]]
Entries = dict[str, dict[str, Any]]
SPLIT = 0  # seed of every split and selection
NATIVE = ("lora", "dora", "miss", "full")
LARGER = {"compacter": {"reduction_factor": 8, "phm_rank": 4}}  # it has no rank: as large as is sensible
Study = tuple[str, dict[str, Any]]
# What papers or their code have otherwise than our defaults, or leave open: a comparison each
OPEN: tuple[Study, ...] = (
    ("allora", {"eta": 1.0}),
    ("allora", {"eta": 4.0}),
    ("allora", {"eta": 8.0}),
    ("compacter", {"phm_bias": True}),
    ("gradnormlorp", {"lora_alpha": 16, "lora_dropout": 0.1}),
    ("lora-mgpo", {"mgpo_rho": 0.0005}),
    ("lora-mgpo", {"mgpo_rho": 0.05}),
    ("triadaptlora", {"orth_reg_weight": 0.5}),
)
SCALED: tuple[Study, ...] = (("lora", {"lora_alpha": 16}),)  # the scale of LoRA-GGPO, LoRA-MGPO and TriAdaptLoRA


@dataclass(frozen=True)
class Task:
    """What is learnt, from what, and for how long.

    `read` gives the samples to train on and the test samples; `training` are fields of TrainingArguments.
    """

    about: str
    read: Callable[[argparse.Namespace], tuple[Pairs, Pairs]] | None  # None: the files of `--own`
    model: str
    seeds: int
    training: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: str = "auto"
    every_variant: bool = False
    studies: tuple[Study, ...] = ()


def sst2(args: argparse.Namespace) -> tuple[Pairs, Pairs]:
    def read(name: str) -> Pairs:
        lines = [line.rsplit("\t", 1) for line in (args.data / "sst2" / f"{name}.tsv").read_text().splitlines()]
        return [{"text": text, "label": ("negative", "positive")[int(label)]} for text, label in lines]

    return read("train"), by_length(read("test"))


def docstrings(args: argparse.Namespace) -> tuple[Pairs, Pairs]:
    data = demo_data.load(encoder.tokenizer(encoder.default_folder()))
    names = data["train"].features["label"].names
    train, test = ([{"text": row["text"], "label": names[row["label"]]} for row in part] for part in data.values())
    return train, test


def gsm8k(args: argparse.Namespace) -> tuple[Pairs, Pairs]:
    def read(name: str, count: int) -> Pairs:
        found = records.read(str(args.data / "gsm8k" / f"{name}.jsonl"))
        pairs = [{"prompt": row["question"], "completion": row["answer"]} for row in found]
        return random.Random(SPLIT).sample(short(pairs, args), count)

    return read("train", 600), by_length(read("test", 120))


def selfinstruct(args: argparse.Namespace) -> tuple[Pairs, Pairs]:
    pairs = []
    paths = sorted((args.data / "selfinstruct").glob("*.jsonl"))
    for row in [row for path in paths for row in records.read(str(path))]:
        first = row["instances"][0]
        pairs.append(
            {"prompt": "\n".join(filter(None, (row["instruction"], first["input"]))), "completion": first["output"]}
        )
    pairs = short(pairs, args)
    random.Random(SPLIT).shuffle(pairs)
    return pairs[90:], by_length(pairs[:90])


def by_length(pairs: Pairs) -> Pairs:
    """So that batches carry little padding."""
    return sorted(pairs, key=lambda pair: len("".join(pair.values())))


def short(pairs: Pairs, args: argparse.Namespace) -> Pairs:
    """Those that need not be cut."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.smollm2)
    return [pair for pair in pairs if len(tokenizer("\n".join(pair.values()))["input_ids"]) <= LENGTH - 24]


LENGTH = 152
ENCODER = {"max_steps": 100, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64}
QUANTISED = "sst2-4bit"
CLASSIFIER: dict[str, Any] = {
    "options": {"task": "SEQ_CLS", "max_length": 64, "head_learning_rate": NATIVE_RATE},
    "model": "encoder",
    "seeds": 5,
}
WRITER: dict[str, Any] = {
    "options": {"task": "CAUSAL_LM", "max_length": LENGTH, "dtype": "float32"},
    "model": "smollm2",
    "seeds": 3,
    "rates": "auto:3",
    "studies": SCALED,
}
WRITER_STEPS = {"max_steps": 80, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8, "bf16": True}
TASKS = {
    "sst2": Task(
        "SST-2, sentiment of a sentence in two classes, MiniLM (22M)",
        sst2,
        training=ENCODER,
        **CLASSIFIER,
        every_variant=True,
        studies=OPEN + SCALED,
    ),
    QUANTISED: Task(
        "SST-2 as above, on a 4-bit base (NF4), at the first of each method's variants",
        sst2,
        training=ENCODER,
        rates="auto:3",
        **CLASSIFIER | {"seeds": 3, "options": CLASSIFIER["options"] | {"load_in_4bit": True}},
    ),
    "docstrings": Task(
        "docstrings of Python's library in eight families, MiniLM (22M) in bfloat16",
        docstrings,
        training=ENCODER | {"bf16": True},
        studies=SCALED,
        **CLASSIFIER,
    ),
    "gsm8k": Task(
        "GSM8K, worked answers to questions of arithmetic, SmolLM2-135M-Instruct, loss per token of the answer",
        gsm8k,
        training=WRITER_STEPS,
        **WRITER,
    ),
    "selfinstruct": Task(
        "self-instruct's human-written instructions, SmolLM2-135M-Instruct, loss per token of the answer",
        selfinstruct,
        training=WRITER_STEPS,
        **WRITER,
    ),
}


def contenders(every_variant: bool) -> list[str]:
    """PEFT's own and every variant of peftx's; or of a method's variants the first, and LoRA-MGPO, a method too."""
    variants = [list(info.variants) for info in peftx.methods() if info.config.__module__.startswith("peftx.")]
    return [
        *NATIVE,
        *(name for names in variants for i, name in enumerate(names) if every_variant or not i or name == "lora-mgpo"),
    ]


def groups(task: Task, kind: str, budget: Mapping[str, Any]) -> dict[str, Entries]:
    """The entries of each comparison of a kind, by its name.

    `budget` are the settings of the runs at equal budget: those at a size of their own are run where it differs, and
    what is studied has them too.
    """
    names = contenders(task.every_variant)
    if kind == "budget":
        return {kind: {name: dict(LARGER.get(name, {})) for name in names}}
    if kind == "own":
        return {kind: {name: {} for name in names if name in budget and differs(name, budget[name])}}
    return {
        f"{name} {describe(setting)}": {name: {**budget[name], **setting}}
        for name, setting in task.studies
        if name in budget
    }


def differs(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether these settings make another size than the method's defaults: more than one rank of eight."""
    method = find(name)
    if method.config is None:
        return False
    defaults = {f.name: f.default for f in dataclasses.fields(method.config)} | dict(method.settings)
    sizes = [(value, defaults[setting]) for setting, value in settings.items() if type(value) is int]
    return any(max(pair) > 1.25 * min(pair) for pair in sizes)


def run(task: Task, folder: Path, group: str, entries: Entries, args: argparse.Namespace) -> Outcome:
    """One comparison, or what is left of it. A task's files are written beside its folder; one's own are read there."""
    if task.read is None:
        files = dict(zip(("data", "eval_data"), map(Path, args.own[2:]), strict=True))
    else:
        files = {"data": folder.parent / "train.jsonl", "eval_data": folder.parent / "test.jsonl"}
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path, pairs in zip(files.values(), task.read(args), strict=True):  # `compare` refuses others than before
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    model = {"encoder": encoder.default_folder(), "smollm2": args.smollm2}.get(task.model, task.model)
    training = {**task.training, "disable_tqdm": True, "use_cpu": args.jobs > 1 or not torch.cuda.is_available()}
    settings = CompareSettings(
        model=str(model),
        output=str(folder),
        methods=entries,  # type: ignore[arg-type]
        equal="budget" if group == "budget" else "none",
        seeds=task.seeds if args.seeds is None else args.seeds,
        learning_rates=task.rates if args.rates is None else args.rates,
        jobs=args.jobs,
        training=training | ({} if args.steps is None else {"max_steps": args.steps}),
        **{key: str(path) for key, path in files.items()},
        **task.options,
    )
    console = Console(stderr=True)

    def watch(what: str, number: int, count: int) -> None:
        console.print(f"{folder.parent.name}, {group}: {what} ({number} of {count})", highlight=False)

    return compare(settings, watch)


def record(outcome: Outcome, folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a comparison: every run, without its history, and what `before` has of methods that had no part
    in it, by as many steps on as many samples."""
    choices = json.loads((folder / "results.json").read_text()).get("choices", [])
    there = {one["method"] for one in outcome.runs} | {*outcome.failures}

    def kept(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in one.items() if key not in ("history", "labels", "model")} for one in runs]

    told = {"notes": outcome.notes, "failures": outcome.failures}
    alike = [(one["steps"], one["samples"]) for one in outcome.runs]
    others = [
        one
        for one in before.get("runs", [])
        if one["method"] not in there and (not alike or (one["steps"], one["samples"]) in alike)
    ]
    return {**told, "runs": kept(outcome.runs) + others, "choices": kept(choices)}


# The report


def table(found: Mapping[str, Any], kinds: Sequence[str] = ("budget", "own")) -> tuple[list[Row], list[Any]]:
    """A task's rows of these groups, and their runs: LoRA first."""
    runs = [one for kind in kinds if kind in found["groups"] for one in found["groups"][kind]["runs"]]
    return rows(runs) if runs else [], runs


def studies(found: Mapping[str, Any]) -> tuple[list[Row], list[Any]]:
    """LoRA, the studied methods as they are, and with the settings that are tried."""
    every = found["groups"]
    names = {one["method"] for kind in every if kind not in ("budget", "own") for one in every[kind]["runs"]}
    if not names:
        return [], []
    there = [one for one in every["budget"]["runs"] if one["method"] in ("lora", *names)]
    there += [one for one in every.get("own", {"runs": []})["runs"] if one["method"] in names]
    there += [one for kind in every if kind not in ("budget", "own") for one in every[kind]["runs"]]
    return rows(there), there


def of(row: Row, runs: Sequence[Mapping[str, Any]], what: str) -> dict[int, float]:
    """By seed."""
    return {
        one["seed"]: one[what]
        for one in runs
        if (one["method"], describe(one["method_settings"])) == (row.method, row.settings)
    }


def memory(row: Row, runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation of the peaks, in MB."""
    mean, std = spread([peak / 1e6 for peak in of(row, runs, "peak_memory").values()])
    return f"{mean:,.0f}" + ("" if std is None else f" ± {std:.0f}")


def steps(row: Row, first: Row, runs: Sequence[Mapping[str, Any]]) -> str:
    """The step's time, LoRA's with the same seed = 1: mean with its 95 % interval."""
    base, own = (of(which, runs, "step_seconds") for which in (first, row))
    interval = t_interval([own[seed] / base[seed] for seed in own if seed in base])
    return "" if interval is None else f"{interval.mean:.2f} ± {interval.high - interval.mean:.2f}"


def decoding() -> dict[str, Any]:
    path = RESULTS.with_name("decoding.json")
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def said(row: Row) -> str:
    """The settings, without those that the method's name stands for."""
    return row.settings.removeprefix(describe(find(row.method).settings)).removeprefix(", ")


def page(lines: list[Row], runs: list[Any]) -> str:
    """One table, as Markdown."""
    name, _ = quality_of(runs)
    first = {"lora": "LoRA"}.get(lines[0].method, lines[0].method)
    decode = {key.lower(): ratio(value, "decode") for key, value in decoding().items()} | {"full": "1.00"}
    heads = [
        "method",
        "settings",
        "lr",
        "values",
        f"test {name}",
        f"less {first}'s",
        f"step / {first}",
        "memory, MB",
        "decoding",
        "file, kB",
    ]
    body = [
        [
            row.method,
            said(row),
            f"{row.learning_rate:g}",
            f"{row.trained_values:,}",
            shown(row.quality, row.quality_std),
            told(row.difference),
            steps(row, lines[0], runs),
            memory(row, runs),
            decode.get(row.method, ""),
            f"{row.adapter_bytes / 1e3:,.0f}",
        ]
        for row in lines
    ]
    rule = ["---", "---", *["---:"] * (len(heads) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *body])


def markdown(results: Mapping[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in results["about"].items())
    parts = [about + "\n\n" + " ".join(READ.split())]
    for name, found in results["tasks"].items():
        lines, runs = table(found)
        every = [one for group in found["groups"].values() for one in (*group["runs"], *group["choices"])]
        hours = sum(one["train_seconds"] for one in every) / 3600
        remarks = dict.fromkeys(note for group in found["groups"].values() for note in group["notes"])
        remarks |= {
            f"{who} did not run: {why}": None for g in found["groups"].values() for who, why in g["failures"].items()
        }
        cost = f" Steps: {runs[0]['steps']}; {len(every)} trainings, {hours:.1f} hours of them." if runs else ""
        parts.append(f"## {name}\n\n{found['about']}.{cost}")
        parts += [page(lines, runs)] if runs else []
        parts.append("\n".join(f"- {note}" for note in [*(notes(lines, runs)[:1] if runs else []), *remarks]))
        if (tried := studies(found))[0]:
            parts.append(f"{STUDIED}:\n\n{page(*tried)}")
    return "\n\n".join(parts) + "\n"


STUDIED = "Settings that papers or their code have otherwise or leave open, and LoRA at twice its scale"
READ = """Rates are chosen on a validation part, by one run each: of a loss the best, of an accuracy the nearest to the
method's own within a standard error of the best. The test part is read once. `less LoRA's`: with the same seed, mean
with the 95 % interval over the seeds (Student's t); `=` where it holds 0, and these seeds do not tell the two apart. Of
twenty rows that equal LoRA, one is expected to be told apart by chance. Settings name the rank at which a method trains
as many values as LoRA at r=8; the defaults hold where there are none. `step / LoRA`: CPU time with the same seed, mean
and 95 % interval; two runs share the machine. `memory`: peak of the process above its start, mean ± standard deviation.
`decoding`: one token at a time with the adapter attached, LoRA = 1, median and quartiles, from results/decoding.md."""


def picture(results: Mapping[str, Any], path: Path) -> None:
    """Quality against trained values and step time, a row of axes each task."""
    from matplotlib.figure import Figure

    tasks = {name: table(found) for name, found in results["tasks"].items()}
    tasks = {name: pair for name, pair in tasks.items() if pair[0]}
    if not tasks:
        return
    names = list(dict.fromkeys(row.method for lines, _ in tasks.values() for row in lines))
    figure = Figure(figsize=(13, 4.2 * len(tasks)), layout="constrained")
    import matplotlib

    palette = matplotlib.colormaps["tab20"]
    for pair, (task, (lines, runs)) in zip(
        figure.subplots(len(tasks), 2, squeeze=False, sharey="row"), tasks.items(), strict=True
    ):
        quality, more = quality_of(runs)
        for axes, cost in zip(pair, ("trained_values", "step"), strict=True):
            for row in lines:
                colour = palette(names.index(row.method) % 20)
                mark = "D" if names.index(row.method) >= 20 else "s" if row.method in NATIVE else "o"
                axes.errorbar(
                    getattr(row, cost),
                    row.quality,
                    yerr=row.quality_std,
                    fmt=mark,
                    color=colour,
                    capsize=2,
                    label=row.method,
                )
            axes.axhline(lines[0].quality, color="grey", linestyle="--", linewidth=0.8, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        pair[0].set_xscale("log")
        pair[0].set_title(task, loc="left")
        pair[0].set(xlabel="trained values", ylabel=f"test {quality}" + ("" if more else ", less is better"))
        pair[1].set(xlabel="step time / LoRA's")
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def save(results: Mapping[str, Any], path: Path) -> None:
    ours = [name for name in TASKS if name in results["tasks"]]  # in this order, whichever ran first
    results = {**results, "tasks": {name: results["tasks"][name] for name in dict.fromkeys([*ours, *results["tasks"]])}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1, default=str) + "\n")
    draft.replace(path)
    path.with_suffix(".md").write_text(markdown(results))
    picture(results, path.with_suffix(".png"))


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, Task]]:
    if args.own:
        name, model, *_ = args.own
        training = {"max_steps": 150, "per_device_train_batch_size": 8}
        options = {"max_length": 256, "task": args.kind, "head_learning_rate": NATIVE_RATE}
        yield name, Task(f"{name}, {model}", None, model, 3, training, options)
        return
    for name in args.tasks:
        if TASKS[name].model == "smollm2" and args.smollm2 is None:
            raise SystemExit(f"task {name} needs --smollm2, a folder of SmolLM2-135M-Instruct or of another causal LM")
        if args.data is None and name != "docstrings":
            raise SystemExit(f"task {name} needs the folder with the data")
        yield name, TASKS[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("data", type=Path, nargs="?", help="folder with sst2, gsm8k and selfinstruct")
    option("--smollm2", type=Path, help="folder of a causal LM with a chat template")
    option("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    option("--own", nargs=4, metavar=("NAME", "MODEL", "TRAIN", "TEST"), help="a task of your own: two .jsonl files")
    option("--kind", help="its task, SEQ_CLS or CAUSAL_LM; default: the model's own")
    option("--groups", nargs="+", default=["budget", "own", "studies"], choices=["budget", "own", "studies"])
    option("--methods", nargs="+", choices=contenders(True), help="lora is always there. Default: all")
    option("--seeds", type=int, help="default: 5 of an encoder, 3 of a language model")
    option("--rates", help="learning rates, by comma; default: see above")
    option("--steps", type=int, help="default: the task's")
    option("--jobs", type=int, default=2, help="runs at a time")
    option("--work", type=Path, default=Path("outputs/leaderboard"))
    option("--out", type=Path, help=f"default: {RESULTS.name} of results; with --own, of the folder --work")
    option("--report", action="store_true", help="only table and picture, from the results file")
    args = parser.parse_args()
    for name in ("seeds", "steps", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.out = args.out or (args.work / RESULTS.name if args.own else RESULTS)
    try:
        results = json.loads(args.out.read_text()) if args.out.exists() else {"about": {}, "tasks": {}}
    except ValueError as error:
        raise SystemExit(f"{args.out} is no results file ({error}): move it away, or name another by --out") from None
    for name, task in () if args.report else chosen(args):
        found = results["tasks"].setdefault(name, {"about": task.about, "groups": {}})
        for kind in args.groups:
            sizes = {
                one["method"]: one["method_settings"] for one in found["groups"].get("budget", {"runs": []})["runs"]
            }
            for group, entries in groups(task, kind, sizes).items():
                if args.methods:
                    entries = {key: entries[key] for key in entries if key in (*NATIVE[:1], *args.methods)}
                if not entries:
                    continue
                folder = args.work / name / re.sub(r"[^\w.]+", "-", group)
                outcome = run(task, folder, group, entries, args)
                found["groups"][group] = record(outcome, folder, found["groups"].get(group, {}))
                results["about"] = {name: version(name) for name in ("torch", "transformers", "peft")}
                results["about"] |= {"peftx": peftx.__version__, "date": time.strftime("%Y-%m-%d")}
                save(results, args.out)
    if not results["tasks"]:
        raise SystemExit(f"{args.out} holds no results: run a task first")
    if args.report:
        save(results, args.out)
    print(markdown(results))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # of data, model or results that are others than they should be
        raise SystemExit(f"leaderboard: {error}") from None
