"""`peftx compress`: a fine-tuned model with thinner layers, recovered and measured."""

import copy
import gc
import hashlib
import json
import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from ..utils import AUTO_CLASSES, quiet
from .main import OVERWRITE, fail
from .prune import load
from .train import data_option

KEEPS = (0.9, 0.75, 0.6, 0.5)  # of the picture


def compress(
    model: Annotated[str, typer.Option(help="The fine-tuned model: folder or hub id.")],
    data: Annotated[Path, typer.Option(help="As of `peftx train`, a file: for statistics, recovery and evaluation.")],
    out: Annotated[
        Path, typer.Option("--out", "--output", help="New folder for the model, its tokenizer and its card.")
    ],
    keep: Annotated[float, typer.Option(help="Share of the factorised layers' entries, in (0, 1).")] = 0.6,
    method: Annotated[str, typer.Option(help="fwsvd, svd, asvd or svd-llm.")] = "fwsvd",
    recover_epochs: Annotated[float, typer.Option(min=0, help="Fine-tuning afterwards.")] = 1.0,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to merge first: folder or hub id.")] = None,
    allocation: Annotated[str, typer.Option(help="uniform or global: how ranks are shared out.")] = "uniform",
    side: Annotated[str, typer.Option(help="Fisher information of inputs (in), outputs (out) or both.")] = "in",
    alpha: Annotated[float, typer.Option(help="asvd's exponent.")] = 0.5,
    randomized: Annotated[
        bool | None,
        typer.Option(
            "--randomized/--exact", help="Decompose by random projections.", show_default="large layers of low rank"
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder for statistics and finished layers: after an interruption the run goes on there."),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="File of a FisherCallback or `collect`.", show_default="collected from --data")
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Samples for the statistics.")] = 1024,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out data.", show_default="a part of --data")] = None,
    eval_share: Annotated[float, typer.Option(help="Part of --data that is held out, in (0, 1).")] = 0.1,
    task: Annotated[
        str | None, typer.Option(help="CAUSAL_LM, SEQ_CLS or SEQ_2_SEQ_LM.", show_default="the model's")
    ] = None,
    prompt: Annotated[str | None, data_option("prompt")] = None,
    answer: Annotated[str | None, data_option("answer")] = None,
    label: Annotated[str | None, data_option("label")] = None,
    max_length: Annotated[int, data_option("max_length")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the recovery.")] = 5e-5,
    dtype: Annotated[str, data_option("dtype")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="cuda if there is one")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out part and of the recovery.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Print rank and error of every layer.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw all methods at 90 to 50 % kept into this PNG file: 16 more evaluations.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Make a fine-tuned model smaller: linear layers become products of two thin ones, weighted by Fisher information;
    so do the stacked experts of a mixture.

    Three numbers are printed and written into the card: dense, compressed, and recovered by fine-tuning. Programs load
    the result with AutoModel*.from_pretrained after `import peftx`.
    """
    try:
        from .. import compression
        from ..compression.checks import check_folder
        from ..compression.compress import check_settings
        from ..compression.factorize import METHODS, NEEDS
        from ..data import text
        from ..files import claim, claim_file, drafted, written

        check_settings(keep, method, allocation, side, alpha)
        check_folder("--resume", resume)
        inputs = {"model": model, "data": data, "eval_data": eval_data, "adapter": adapter, "statistics": statistics}
        claim(out, "compress", inputs, overwrite=overwrite, ways="say --overwrite")
        if plot:
            claim_file(plot, "compress", inputs, overwrite=overwrite, what="--plot")
        if learning_rate <= 0:
            raise ValueError(f"--learning-rate must be above 0, got {learning_rate}")
        if plot:
            import matplotlib  # noqa: F401
        known = compression.Statistics.load(statistics) if statistics else None
        if eval_data is None and not 0 < eval_share < 1:
            raise ValueError(f"--eval-share must be in (0, 1), got {eval_share}")
        pages = [(path, _read(path)) for path in (data, eval_data) if path]
        network, tokenizer, kind = load(model, adapter, task, dtype, device)
        fields: dict[str, Any] = {"prompt": prompt, "answer": answer, "label": label}
        fields["label2id"] = network.config.label2id
        fields["max_length"] = text.longest(max_length, tokenizer, network.config)
        parts = []  # all of them, so that a bad record is named by its place in the file
        for path, records in pages:
            with text.naming(path):
                parts.append(text.encode(records, tokenizer, kind, **fields))
        train, test = parts if eval_data else _split(parts[0], eval_share, seed, data)
        pad = partial(text.pad, padding=text.padding_of(network, tokenizer))
        metric = "accuracy" if kind == "SEQ_CLS" else "loss"

        def score(measured: Any) -> float:
            return compression.evaluate(measured, test, pad, batch_size=batch_size, progress=True)[metric]

        options: dict[str, Any] = {"allocation": allocation, "side": side, "alpha": alpha, "randomized": randomized}
        samples = min(max_samples, len(train))
        what = {part for name in (METHODS if plot else (method,)) for part in NEEDS[name]}
        if known is None and what:
            collecting: dict[str, Any] = {"what": sorted(what), "max_samples": samples, "seed": seed}
            weights = [float(part.detach().float().sum()) for part in network.parameters()] if resume else []
            at = _statistics_in(resume, [weights, train, collecting, batch_size])
            known = compression.Statistics.load(at) if at and at.exists() else None
            if known is None:
                known = compression.collect(network, train, pad, batch_size=batch_size, progress=True, **collecting)
                if at:
                    known.save(at)
        scores = {"dense": score(network)}
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, share in product(METHODS, sorted({*KEEPS, keep})) if plot else ():
            trial, report = compression.compress(copy.deepcopy(network), known, keep=share, method=name, **options)
            curves.setdefault(name, []).append((report.kept, score(trial)))
            del trial
            gc.collect()  # a compressed model refers to itself
        small, report = compression.compress(
            network, known, keep=keep, method=method, folder=resume, progress=True, **options
        )
        scores["compressed"] = score(small)
        if recover_epochs:
            training: dict[str, Any] = {"epochs": recover_epochs, "learning_rate": learning_rate, "seed": seed}
            compression.recover(small, train, pad, batch_size=batch_size, progress=True, **training)
            scores["recovered"] = score(small)
        card = compression.card(
            report,
            name=out.name,
            base_model=model,
            loader=AUTO_CLASSES[kind],
            score=f"{metric} on {len(test)} held-out samples",
            scores=scores,
            calibration=f"{known.samples} samples" if known and what else "none",
        )
        with drafted(out, "compress") as draft, quiet():
            small.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            (draft / "README.md").write_text(card, encoding="utf-8")
        if plot:
            recovered = {method: [(report.kept, scores["recovered"])]} if recover_epochs else None
            figure = compression.plot(curves, score=metric, dense=scores["dense"], recovered=recovered)
            with written(plot, "compress") as picture:
                figure.savefig(picture, format="png", dpi=120)
    except (ValueError, OSError, NotImplementedError) as error:
        fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        fail("matplotlib is missing, which --plot needs: pip install matplotlib")
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items())
    for table in [report.table()] * layers + [f"| | {metric} |\n| --- | ---: |\n{rows}"]:
        Console().print(Markdown(table))
    for told in report.told_of_experts() if layers else ():
        typer.echo(told)
    typer.echo(f"{report.summary()}: {out}")


def _statistics_in(folder: Path | None, made_of: list[Any]) -> Path | None:
    """Where statistics of this model and data are kept, or will be."""
    if folder is None:
        return None
    digest = hashlib.blake2b(json.dumps(made_of, default=str).encode(), digest_size=8).hexdigest()
    return folder / f"statistics-{digest}.safetensors"


def _read(path: Path) -> list[Any]:
    """The records of a file; what has no ending that is known is lines of JSON."""
    from ..data.records import FILES, read
    from ..data.tables import read_lines

    return read(str(path)) if path.suffix.lower() in FILES else read_lines(path)[1]


def _split(samples: list[Any], share: float, seed: int, data: Path) -> tuple[list[Any], list[Any]]:
    """Samples to learn from, and held-out ones."""
    random.Random(seed).shuffle(samples)
    held = max(1, round(share * len(samples)))
    if held == len(samples):
        raise ValueError(f"{data} has too few lines to hold some out: name --eval-data")
    return samples[held:], samples[:held]
