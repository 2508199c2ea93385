"""`peftx prune`: choose training samples from lines of JSON."""

import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from ..utils import AUTO_CLASSES, quiet
from .main import fail
from .train import data_option

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")


def prune(
    model: Annotated[str, typer.Option(help="What is to be trained, or a smaller relative: folder or hub id.")],
    data: Annotated[Path, typer.Option(help="One JSON object a line.")],
    out: Annotated[Path, typer.Option(help="The kept lines, unchanged and in their order.")],
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
    max_length: Annotated[int, data_option("max_length")] = 1024,
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
) -> None:
    """Choose the part of a JSONL file that is worth training on, by DONOD or one of its baselines.

    Fields are found: messages; prompt and completion; question and answer; instruction, input and output; or text. Of a
    classifier: text and label. Of a causal LM only the answer counts.
    """
    try:
        from .. import pruning
        from ..data import text
        from ..pruning.select import METHODS, check_keep, check_settings

        for option, path in (("--out", out), ("--scores", scores), ("--plot", plot)):
            if path is not None and path.resolve() == data.resolve():
                raise ValueError(f"{option} {path} is the data itself, which is never changed")
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option} {path}: there is no folder {path.parent}")
        check_keep(keep)
        ranking: dict[str, Any] = {"method": method, "don_goal": don_goal, "goal": goal}
        check_settings(method, don_goal, goal, pruning.WEIGHTS)
        lines, records = text.read_lines(data)
        network, tokenizer, kind = load(model, adapter, task, dtype, device)
        fields: dict[str, Any] = {"prompt": prompt, "answer": answer, "label": label}
        fields["max_length"] = text.longest(max_length, tokenizer, network.config)
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
        out.write_text("".join(f"{lines[i]}\n" for i in kept), encoding="utf-8", newline="")
        if scores:
            key = {
                "data": pruning.fingerprint(lines),
                "model": model,
                "settings": {"keep": keep, "eta": eta, "balanced": balanced, **ranking},
            }
            pruning.Selection(kept, found, key).save(scores)
        if plot:
            pruning.scatter(found, kept, plot, *pruning.axes_of(method))
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
    typer.echo(f"Kept {len(kept)} of {len(lines)} samples: {out}")


def load(name: str, adapter: str | None, task: str | None, dtype: str, device: str | None) -> tuple[Any, Any, str]:
    """Model (with its adapter), tokenizer and task."""
    import torch
    import transformers
    from peft import PeftModel

    from ..pruning.head import task_of_class

    config = transformers.AutoConfig.from_pretrained(name)
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
        network, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if adapter is None and report["missing_keys"]:
        raise ValueError(
            f"{name} has no trained {', '.join(sorted(report['missing_keys']))}: train it for a while first, "
            "since scores of a random layer mean nothing"
        )
    if adapter is not None:
        network = PeftModel.from_pretrained(network, adapter)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return network.to(device), tokenizer, task
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory
        raise ValueError(f"--device {device}: {error}") from None
