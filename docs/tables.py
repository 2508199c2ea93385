"""What pages say by `{{ name ... }}`: tables of the registry, the configs' fields, the commands and the results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft

import peftx

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TITLES = {  # how a method is written
    "allora": "ALLoRA",
    "bone": "Bone",
    "compacter": "Compacter",
    "fedsvd": "FedSVD",
    "flora": "FLoRA",
    "gradnormlorp": "GradNormLoRP",
    "loldu": "LoLDU",
    "lora-ggpo": "LoRA-GGPO, LoRA-MGPO",
    "triadaptlora": "TriAdaptLoRA",
}
ALIASES = {"Init(Method|Scheme)": "str", "Number": "number", "Ranks": "int | list[int]", "Names": "list[str] | str"}


# Records


def ours() -> list[Any]:
    """The records of peftx's own methods."""
    return [info for info in peftx.methods() if info.config.__module__.startswith("peftx.")]


def slug(info: Any) -> str:
    """The page of a method: the name of its first variant."""
    return next(iter(info.variants), info.name)


def record(name: str) -> Any:
    return next(info for info in ours() if slug(info) == name)


@cache
def load(name: str) -> Any:
    """benchmarks/results/<name>.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def script(name: str) -> Any:
    """The module benchmarks/<name>.py."""
    folder = ROOT / "benchmarks"
    if str(folder) not in sys.path:  # they import each other
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(*lines: Any) -> str:
    """A Markdown table: the first line holds the heads, right-aligned where they end in `:`."""
    heads, *body = [[str(cell) for cell in line] for line in lines]
    rule = ["---:" if head.endswith(":") else "---" for head in heads]
    cells = [[head.removesuffix(":") for head in heads], rule, *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def shown(share: float) -> str:
    return f"{share:.2f}" if share >= 0.01 else f"{share:.4f}"


def cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


# Methods


def methods() -> str:
    """The registry's table, which `peftx methods --markdown` prints, with links to the pages."""
    from typer.testing import CliRunner

    from peftx.cli import app

    text = CliRunner().invoke(app, ["methods", "--markdown"]).output.strip()
    for info in ours():
        text = text.replace(f"| `{info.config.__name__}` |", f"| [`{info.config.__name__}`]({slug(info)}.md) |")
    return re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", text)


def short_methods() -> str:
    """The README's table: values that a method trains, beside LoRA's on the same layers; its quality on the tasks of
    the leaderboard, beside LoRA's; and what its file becomes."""
    models = load("amd-epyc-fp32")["models"]["llama"]
    lora = models["LoRA"]["trainable"]
    becomes = {"exact": "a LoRA", "dora": "a DoRA", "svd": "a LoRA, cut", "none": "stays attached"}
    lines: list[Any] = [("method", "what it does", "values, LoRA = 1:", "quality beside LoRA's", "exported as")]
    for info in ours():
        name = next(name for name in models if name.split(" r=")[0] == slug(info))
        share = models[name]["trainable"] / lora
        titles = TITLES[slug(info)].split(", ")
        told = [beside(title.lower()) for title in titles]
        lines.append(
            (
                f"[{TITLES[slug(info)]}](docs/methods/{slug(info)}.md)",
                info.summary,
                shown(share),
                told[0] if len(told) == 1 else "; ".join(map(": ".join, zip(titles, told, strict=True))),
                becomes[info.lora_export],
            )
        )
    return rows(*lines)


def abilities(name: str) -> str:
    """What the registry says of a method."""
    info = record(name)
    export = {
        "exact": "as a plain LoRA, with equal outputs",
        "dora": "as a stock DoRA, with equal outputs",
        "svd": "cut to a rank, with the error told",
        "none": "no: it is no change of a weight",
    }
    bits = {variant: ", ".join(f"`{k}={v!r}`" for k, v in kwargs.items()) for variant, kwargs in info.variants.items()}
    variants = ", ".join(f"`{variant}`" + (f" ({text})" if text else "") for variant, text in bits.items())
    return rows(
        ("", TITLES[name]),
        ("config", f"[`peftx.{info.config.__name__}`](../reference/configs.md#peftx.{info.config.__name__})"),
        ("peft type", f"`{info.peft_type.value}`"),
        ("variants in `peftx train` and `compare`", variants),
        ("layers", ", ".join(info.layers)),
        ("starts as the base model", "bit for bit" if info.exact_start else "to about 1e-6"),
        ("merges into the weight", "yes" if info.mergeable else "no"),
        ("exports to LoRA", export[info.lora_export]),
        ("4-bit and 8-bit bases", "yes" if info.quantized else "no"),
        ("several adapters in one batch", "yes" if info.mixed_batches else "no"),
        ("callback", f"`peftx.{info.callback.__name__}`" if info.callback else "none needed"),
        ("learning rate of `peftx train`", f"{info.learning_rate:g}"),
    )


def rates() -> str:
    """The learning rate of each method, and what else a run sets, as the registry has it."""
    lines = [
        (
            f"[{TITLES[slug(info)]}](../methods/{slug(info)}.md)",
            f"{info.learning_rate:g}",
            ", ".join(f"`{name}={value}`" for name, value in info.train_settings.items()),
        )
        for info in ours()
    ]
    return rows(("method", "learning rate:", "and sets"), *lines)


def settings(name: str) -> str:
    """The fields of a config: its own in a table, those that it shares with others folded away."""
    config = getattr(peftx, name)
    base: Any = peftx.AdapterConfig if issubclass(config, peftx.AdapterConfig) else peft.LoraConfig
    unsaid = {f.name for f in dataclasses.fields(peft.PeftConfig)} - {"task_type"}  # filled in by PEFT
    fields = {f.name: f for f in dataclasses.fields(config) if f.name not in unsaid and f.metadata.get("help")}
    own = set(vars(config).get("__annotations__", {})) | (fields.keys() - {f.name for f in dataclasses.fields(base)})
    refused = _refused(config)
    others = [f for field, f in fields.items() if field not in own | refused]
    whose = "every method of this kind" if base is peftx.AdapterConfig else "`peft.LoraConfig`"
    folded = "\n".join(f"    {line}" for line in _fields(others).splitlines())
    text = (
        f'{_fields([f for field, f in fields.items() if field in own])}\n\n??? note "Fields of {whose}"\n\n{folded}\n'
    )
    if refused:
        listed = ", ".join(f"`{field}`" for field in sorted(refused))
        text += f"\nRefused, since the method is a training rule of its own for plain LoRA: {listed}.\n"
    return text


def _refused(config: Any) -> set[str]:
    """Fields of LoRA that a training rule cannot be combined with."""
    if not issubclass(config, peft.LoraConfig):
        return set()
    variants = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    return ({*config.excluded} | variants).difference(config.inherent)


def _fields(fields: list[Any]) -> str:
    lines: list[Any] = [("field", "type", "default", "meaning")]
    for f in sorted(fields, key=lambda f: f.name != "r"):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        kind = str(f.type)
        for alias, meaning in ALIASES.items():
            kind = re.sub(rf"\b{alias}\b", meaning, kind)
        help = _sentence(f.metadata.get("help", ""))
        lines.append((f"`{f.name}`", f"`{kind}`", f"`{default!r}`", cell(help)))
    return rows(*lines)


def _sentence(text: str) -> str:
    """The first sentence of a help text: PEFT's go on for a screen."""
    text = " ".join(text.split())
    found = re.match(r".{20,}?[.!](?= [A-Z`'])", text)
    return found[0] if found and len(text) > 200 else text


# Results


def measured(name: str) -> str:
    """What was measured of a method: speed, memory, size and quality, each from its file of results."""
    info, speed = record(name), load("amd-epyc-fp32")
    models = speed["models"]
    heads = ("", "step, Llama:", "step, BERT:", "memory, Llama:", "memory, BERT:", "trained values, Llama:")
    lines: list[Any] = [heads]
    for row in ["LoRA", *models["llama"]]:
        if (row == "LoRA") is (len(lines) > 1) or (row != "LoRA" and row.split(" r=")[0] not in info.variants):
            continue
        ratios = [models[model][row]["ratios"].get("LoRA", {}) for model in ("llama", "bert")]
        cells = [f"{r.get(what, 1.0):.2f}" for what in ("step", "memory") for r in ratios]
        title = (
            "PEFT LoRA, r=8" if row == "LoRA" else f"`{row.split(' r=')[0]}`" + ", r=".join(["", *row.split(" r=")[1:]])
        )
        lines.append((title, *cells, f"{models['llama'][row]['trainable']:,}"))
    text = f"Time of a training step and peak memory beside PEFT's LoRA on the same layers:\n\n{rows(*lines)}"
    text += (
        "\n\nQuality on the tasks of the [leaderboard](../choosing.md#the-leaderboard), each at the learning rate that "
        "suits it; in brackets, the difference to LoRA with the same seeds and its 95 % interval, `=` where that holds "
        f"0:\n\n{board(*info.variants)}"
    )
    experts = [row for row in load("experts")["rows"] if row["contender"] in info.variants]
    if experts:
        lines = [("experts:", "", "training step:", "decoding:", "peak memory:", "trained values:")]
        known = load("experts")["rows"]
        for row in [r for r in known if r in experts or r["contender"] == "PEFT's LoRA"]:
            numbers = [f"{row[what]:.2f}" for what in ("step", "decode", "peak")]
            lines.append((row["experts"], row["contender"], *numbers, f"{row['trained']:,}"))
        text += f"\n\nA mixture of experts, beside LoRA on attention alone:\n\n{rows(*lines)}"
    return text


def method_table() -> str:
    """All methods beside LoRA: what `python benchmarks/method_table.py` prints."""
    return script("method_table").table(load("amd-epyc-fp32"))


def placed() -> dict[str, dict[tuple[str, str], Any]]:
    """The leaderboard's rows of each task, by method and group (`budget`, `own`), LoRA first; without the one on a
    quantised base."""
    module, found = script("leaderboard"), {}
    for task, results in load("leaderboard")["tasks"].items():
        if task == module.QUANTISED:
            continue
        lines, _ = module.table(results)
        groups: dict[tuple[str, str], str] = {}
        for group in ("budget", "own"):
            for run in results["groups"].get(group, {"runs": []})["runs"]:
                groups.setdefault((run["method"], module.describe(run["method_settings"])), group)
        found[task] = {(line.method, groups[line.method, line.settings]): line for line in lines}
    return found


def board(*names: str) -> str:
    """Quality on every task of the leaderboard, and less LoRA's with the same seeds, of these methods or of all; and
    the size of its first task's adapter with its head. `*` marks those at a size of their own."""
    tasks, module = placed(), script("leaderboard")
    keys = dict.fromkeys(key for lines in tasks.values() for key in lines)
    heads = ["", "values, LoRA = 1:", *(f"{task}, {quality(task)}:" for task in tasks), "file, kB:"]
    lines: list[Any] = [heads]
    for name, group in [key for key in keys if not names or key[0] in ("lora", *names)]:
        first = next(lines_of for lines_of in tasks.values() if (name, group) in lines_of)
        share = first[name, group].trained_values / first["lora", "budget"].trained_values
        cells = []
        for lines_of in tasks.values():
            line = lines_of.get((name, group))
            told = "" if line is None or line.difference is None else f" ({module.told(line.difference)})"
            cells.append("" if line is None else f"{line.quality:.4f}{told}")
        title, kilobytes = f"`{name}`{'' if group == 'budget' else ' *'}", first[name, group].adapter_bytes / 1e3
        lines.append((title, shown(share), *cells, f"{kilobytes:,.0f}"))
    return rows(*lines)


def quality(task: str) -> str:
    return script("leaderboard").quality_of(load("leaderboard")["tasks"][task]["groups"]["budget"]["runs"])[0]


def verdict(task: str, row: Any) -> str:
    """Whether a method is better than LoRA on a task, worse, or not told apart from it."""
    better = (row.difference.mean < 0) is (quality(task) == "loss")
    return "=" if row.difference.holds_zero else "better" if better else "worse"


def beside(name: str) -> str:
    """The verdicts on a method at LoRA's size, or near it."""
    said: dict[str, list[str]] = {"better": [], "worse": [], "=": []}
    for task, lines in placed().items():
        if (row := lines.get((name, "budget"))) and row.difference:
            said[verdict(task, row)].append(task)
    there = {word: tasks for word, tasks in said.items() if tasks}
    if [len(tasks) for tasks in there.values()] == [len(placed())]:
        return f"{next(iter(there))} on all"
    return ", ".join(f"{word} on {listed(tasks)}" for word, tasks in there.items())


def listed(words: list[str]) -> str:
    *most, last = words
    return " and ".join(filter(None, (", ".join(most), last)))


def verdicts() -> str:
    """Every method at LoRA's size, or as near as it comes, by the verdict on it, task by task."""
    lines: list[Any] = [("", "better than LoRA", "not told apart", "worse than LoRA")]
    for task, found in placed().items():
        said: dict[str, list[str]] = {"better": [], "=": [], "worse": []}
        for (name, group), row in found.items():
            if group == "budget" and row.difference:
                said[verdict(task, row)].append(f"`{name}`")
        lines.append((task, *(", ".join(names) for names in said.values())))
    return rows(*lines)


def studies(name: str) -> str:
    """What a method, its variants and the settings that were tried came to on SST-2, and less LoRA's."""
    module, found = script("leaderboard"), load("leaderboard")["tasks"]["sst2"]
    lines, _ = module.table(found, [group for group in found["groups"] if group != "own"])
    known = [line for line in lines if line.method in record(name).variants]
    heads = ("", "settings", "learning rate:", f"sst2, {quality('sst2')}:", "less LoRA's:")
    cells = [
        (
            f"`{line.method}`",
            module.said(line),
            f"{line.learning_rate:g}",
            module.shown(line.quality, line.quality_std),
            module.told(line.difference),
        )
        for line in known
    ]
    return rows(heads, *cells)


def scaled(*names: str) -> str:
    """LoRA and these, of twice its scale, less LoRA with `lora_alpha=16`, on the tasks where that was studied."""
    module, kind = script("leaderboard"), "lora lora_alpha=16"
    tasks = {task: found for task, found in load("leaderboard")["tasks"].items() if kind in found["groups"]}
    cells: dict[tuple[str, str], list[str]] = {}
    for found in tasks.values():
        for line in module.table(found, [kind, "budget"])[0]:
            if line.method in ("lora", *names):
                told = f" ({module.told(line.difference)})" if line.difference else ""
                cells.setdefault((f"`{line.method}`", module.said(line)), []).append(f"{line.quality:.4f}{told}")
    heads = ("", "settings", *(f"{task}, {quality(task)}:" for task in tasks))
    return rows(heads, *((*key, *cells[key]) for key in cells))


def quantised() -> str:
    """Quality on SST-2 as it is and on a 4-bit base, at LoRA's size, and less LoRA's on the same base."""
    module = script("leaderboard")
    lines, _ = module.table(load("leaderboard")["tasks"][module.QUANTISED], ["budget"])
    plain = placed()["sst2"]
    cells = [
        (
            f"`{line.method}`",
            f"{plain[line.method, 'budget'].quality:.4f}",
            module.shown(line.quality, line.quality_std),
            module.told(line.difference),
        )
        for line in lines
    ]
    return rows(("", f"sst2, {quality('sst2')}:", "on a 4-bit base:", "less LoRA's there:"), *cells)


def decoding(*names: str) -> str:
    """Time of a token with the adapter attached, PEFT's LoRA = 1, of these methods: median and quartiles."""
    known, module = load("decoding")["rows"], script("report")
    lines: list[Any] = [("", "attached:", "within `peftx.inference`:")]
    lines += [(f"`{name}`", *(module.ratio(known[name], what) for what in ("decode", "within"))) for name in names]
    return rows(*lines)


def result(name: str) -> str:
    """The tables of benchmarks/results/<name>.md, which their benchmark wrote; headings are made bold."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()
    text = re.sub(r"^#+ (.*)$", r"**\1**", text, flags=re.MULTILINE)
    return re.sub(r"^((?:Settings\(|torch \d|device ).*)$", r"<small>\1</small>", text, flags=re.MULTILINE)


def value(name: str, path: str, form: str = "", factor: str = "1") -> str:
    """One number of benchmarks/results/<name>.json: keys and indices by `/`, `_` for spaces, a format, a factor."""
    found: Any = load(name)
    for key in path.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key if key in found else key.replace("_", " ")]
    return format(found if factor == "1" else found * float(factor), form)


def tabbed(name: str) -> str:
    """`result`, in a tab."""
    return "\n".join(f"    {line}" for line in result(name).splitlines())


def federated_study() -> str:
    return result("federated-study")


def sizes() -> str:
    """Values that each method trains on a Llama, least first."""
    models = load("amd-epyc-fp32")["models"]["llama"]
    known = {"LoRA", *(variant for info in ours() for variant in info.variants)}
    found = {name: row["trainable"] for name, row in models.items() if name.split(" r=")[0] in known}
    lines: list[Any] = [("", "trained values, Llama:", "of LoRA's:")]
    for name, values in sorted(found.items(), key=lambda item: item[1]):
        variant, *rank = name.split(" r=")
        title = "PEFT LoRA, r=8" if name == "LoRA" else ", r=".join((f"`{variant}`", *rank))
        lines.append((title, f"{values:,}", f"{values / models['LoRA']['trainable']:.1%}"))
    return rows(*lines)


# Commands and papers


def commands() -> str:
    """Every command, by Typer's own generator of documentation."""
    import typer
    from typer.cli import get_docs_for_click

    from peftx.cli import app

    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="peftx"), name="peftx")
    for name, command in group.commands.items():  # Typer cuts their summaries to half a line
        text = re.sub(rf"^\* `{name}`: .*$", f"* `{name}`: {command.get_short_help_str(200)}", text, flags=re.MULTILINE)
    return re.sub(r"^# `peftx`\n", "", text)


def paper(name: str) -> str:
    """The row of a method's page in the list of papers."""
    return paper_of(TITLES[name])


def paper_of(*words: str) -> str:
    """The row of the list of papers whose first cell is `words`."""
    lines = (ROOT / "docs" / "reference" / "papers.md").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"| [{' '.join(words)}]")).split("|")[2].strip() + "."


def figure(name: str, *words: str) -> str:
    """A drawing of docs/figures in the colours of the page, with the words below it."""
    text = " ".join(words)
    images = "\n".join(f"![{text}](/docs/figures/{name}-{kind}.svg#only-{kind})" for kind in ("light", "dark"))
    kind = {"overview": "drawn wide", "leaderboard": "drawn wide scrolled"}.get(name, "drawn")
    return f'<figure class="{kind}" markdown>\n{images}\n<figcaption>{text}</figcaption>\n</figure>'


if __name__ == "__main__":
    print(short_methods())
