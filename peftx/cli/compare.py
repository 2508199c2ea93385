"""`peftx compare`: several methods on the same data."""

import typer

from ..train.settings import CompareSettings
from .train import with_options


@with_options(CompareSettings, "seed", "method_settings")
def compare(settings: CompareSettings) -> None:
    """Train several methods on the same data, at equal rank or number of values, and set them side by side.

    Written to the output folder: a table (results.md, results.csv), a picture of quality against values, memory and
    step time (pareto.png), all numbers (results.json), and the adapters. Started again, it goes on where it stopped.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..train import comparison, report

    def watch(name: str, number: int, count: int) -> None:
        typer.echo(f"[{number}/{count}] {name}", err=True)

    outcome = comparison.compare(settings, watch)
    for name, reason in outcome.failures.items():
        typer.echo(f"peftx: {name} did not run: {reason}", err=True)
    if outcome.runs:
        found = report.rows(outcome.runs)
        heads, body = report.cells(found, outcome.runs)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
        table.caption = "\n".join([*report.notes(found, outcome.runs), *outcome.notes])
        for head in heads:
            table.add_column(head, justify="left" if head in ("method", "settings") else "right")
        for line in body:
            table.add_row(*line)
        Console().print(table)
        typer.echo(f"Written: {', '.join(str(path) for path in outcome.paths)}")
    if outcome.failures:
        raise typer.Exit(1)
