"""`peftx prune`: choose training samples from lines of JSON."""

import csv
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from ..utils import AUTO_CLASSES, quiet
from .main import OVERWRITE, fail
from .train import data_option

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")


def prune(
    model: Annotated[str, typer.Option(help="What is to be trained, or a smaller relative: folder or hub id.")],
    data: Annotated[Path, typer.Option(help="One JSON object a line; or .json, .csv, .tsv, .parquet.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "--output",
            help="The kept lines, unchanged and in their order; of other data, lines of JSON or .csv.",
        ),
    ],
    keep: Annotated[float, typer.Option(help="Share of the samples, in (0, 1].")] = 0.3,
    method: Annotated[
        str, typer.Option(help="donod, don, nod, loss, el2n, grand, grand_full, ifd or random.")
    ] = "donod",
    don_goal: Annotated[
        str, typer.Option(help="min, or the paper's max, which keeps surprising samples, wrong ones too.")
    ] = "min",
    goal: Annotated[
        str | None,
        typer.Option(
            help="Of the other scores, keep the smallest (min) or largest (max).", show_default="min; ifd: max"
        ),
    ] = None,
    balanced: Annotated[
        bool | None,
        typer.Option("--balanced/--no-balanced", help="Keep the same share of each class.", show_default="classifiers"),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter of the model: folder or hub id.")] = None,
    task: Annotated[
        str | None, typer.Option(help="CAUSAL_LM, SEQ_CLS or SEQ_2_SEQ_LM.", show_default="the model's")
    ] = None,
    prompt: Annotated[str | None, data_option("prompt")] = None,
    answer: Annotated[str | None, data_option("answer")] = None,
    label: Annotated[str | None, data_option("label")] = None,
    max_length: Annotated[int, data_option("max_length")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a forward pass.")] = 8,
    eta: Annotated[float, typer.Option(help="Step of the probe.")] = 1e-3,
    dtype: Annotated[str, data_option("dtype")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="cuda if there is one")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Print so many of the most and the least wanted samples.")] = 3,
    scores: Annotated[Path | None, typer.Option(help="Write indices and scores to this JSON file.")] = None,
    parts: Annotated[
        Path | None,
        typer.Option(help="Folder for the scores while they are made; the same command goes on after a stop."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw kept and dropped samples into this PNG file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Choose the part of a file that is worth training on, by DONOD or one of its baselines.

    Fields are found as by `peftx train`. Of a causal LM only the answer counts.
    """
    try:
        from .. import pruning
        from ..data import text
        from ..files import check_free, claim_file, written
        from ..pruning.columns import columns_beside
        from ..pruning.select import METHODS, check_keep, check_settings

        outputs = {"--out": out, "--scores": scores, "--plot": plot}
        for option, path in outputs.items():
            if path is not None:
                others = {other: value for other, value in outputs.items() if other != option}
                inputs = {"data": data, "model": model, "adapter": adapter, **others}
                claim_file(path, "prune", inputs, overwrite=overwrite, what=option)
        if scores is not None:
            check_free(scores.parent, [columns_beside(scores).name], "prune")
        check_keep(keep)
        ranking: dict[str, Any] = {"method": method, "don_goal": don_goal, "goal": goal}
        check_settings(method, don_goal, goal, pruning.WEIGHTS)
        records, write = rows_of(data, out)
        network, tokenizer, kind = load(model, adapter, task, dtype, device)
        fields: dict[str, Any] = {"prompt": prompt, "answer": answer, "label": label}
        fields["max_length"] = text.longest(max_length, tokenizer, network.config)
        with text.naming(data):
            samples = text.encode(records, tokenizer, kind, label2id=network.config.label2id, **fields)
        found = pruning.score_dataset(
            network,
            samples,
            partial(text.pad, padding=text.padding_of(network, tokenizer)),
            metrics=tuple(dict.fromkeys((*METHODS[method], *pruning.shown_with(method)))),
            batch_size=batch_size,
            eta=eta,
            task=kind,
            seed=seed,
            folder=parts,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept = pruning.select(found, keep, **ranking, balanced=balanced)
        for warning in caught:
            typer.echo(f"peftx: {warning.message}", err=True)
        with written(out, "prune") as draft:
            write(draft, kept)
        if scores:
            key = {
                "data": pruning.fingerprint(records),
                "model": model,
                "settings": {"keep": keep, "eta": eta, "balanced": balanced, **ranking},
            }
            chosen = pruning.Selection(kept, found, key)
            also = written(columns_beside(scores), "prune") if chosen.in_columns else nullcontext()
            with written(scores, "prune") as draft, also as columns:
                chosen.save(draft, columns)
        if plot:
            with written(plot, "prune") as draft:
                pruning.scatter(found, kept, draft, *pruning.axes_of(method, found))
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if error.name == "pyarrow":
            fail(str(error))
        if error.name != "matplotlib":
            raise
        fail("matplotlib is missing, which --plot needs: pip install matplotlib")
    if show:
        wanted = pruning.preference(found, **ranking)
        Console().print(Markdown(pruning.table(found, wanted, records, rows=show)))
    typer.echo(f"Kept {len(kept)} of {len(records)} samples: {out}")


def rows_of(data: Path, out: Path) -> tuple[list[Any], Callable[[Path, list[int]], None]]:
    """The records, and what writes some of them: of lines of JSON the lines as they are, else new ones or CSV.

    Raises:
        ValueError: the data cannot be read, or `out` is of another kind.
        OSError: a file cannot be read.
    """
    from ..data.records import FILES, LINES, read
    from ..data.tables import read_lines

    if data.suffix.lower() in LINES or data.suffix.lower() not in FILES:
        lines, records = read_lines(data)
        return records, lambda path, kept: write_lines(path, [lines[i] for i in kept])
    records = read(str(data))
    if (kind := out.suffix.lower()) in (".csv", ".tsv"):
        return records, lambda path, kept: write_table(
            path, [records[i] for i in kept], "\t" if kind == ".tsv" else ","
        )
    if kind not in LINES:
        raise ValueError(f"--out {out}: of {data.suffix} data name a .jsonl, .csv or .tsv file to write")
    return records, lambda path, kept: write_lines(path, [json.dumps(records[i], ensure_ascii=False) for i in kept])


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")


def write_table(path: Path, records: list[Any], comma: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(
            file, list(dict.fromkeys(name for record in records for name in record)), delimiter=comma
        )
        table.writeheader()
        table.writerows(records)


def load(name: str, adapter: str | None, task: str | None, dtype: str, device: str | None) -> tuple[Any, Any, str]:
    """Model (with its adapter), tokenizer and task."""
    import torch
    import transformers
    from peft import PeftModel

    from ..hub.loading import check_replaced, classes_in, fetch_adapter, read_tensors
    from ..pruning.head import task_of_class
    from ..saved import check_is_model, read_config

    check_is_model(name, "say --model {base} --adapter {adapter}")
    config, classes = transformers.AutoConfig.from_pretrained(name), {}
    if adapter is not None:
        folder = fetch_adapter(adapter)
        saved = read_config(folder, shown=adapter)
        if task is None and saved.task_type in TASKS:
            task = saved.task_type
        classes = classes_in(folder, saved, read_tensors(folder, shown=adapter))
    if task is None:
        architecture = next(iter(config.architectures or ()), "model without an architecture")
        if (task := task_of_class(architecture)) is None:
            raise ValueError(f"cannot tell the task of a {architecture}: --task, one of {', '.join(TASKS)}")
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task}")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    with quiet():
        auto_class = getattr(transformers, AUTO_CLASSES[task])
        network, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **classes)
        if adapter is not None:
            check_replaced(name, saved, report)
            network = PeftModel.from_pretrained(network, adapter)
    if adapter is None and report["missing_keys"]:
        raise ValueError(
            f"{name} has no trained {', '.join(sorted(report['missing_keys']))}: train it for a while first, by "
            "peftx train, and name what that writes by --adapter, since scores of a random layer mean nothing"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return network.to(device), tokenizer, task
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory
        raise ValueError(f"--device {device}: {error}") from None
