"""`peftx compare`: several methods on the same data."""

import typer

from ..train.settings import CompareSettings
from .train import with_options


@with_options(CompareSettings, "seed", "method_settings")
def compare(settings: CompareSettings) -> None:
    """Train several methods on the same data, at equal rank or number of values, and set them side by side.

    Methods of `all` that do not fit the model are left out. With --learning-rates the rate of each is chosen on a part
    of the training data, by one run a rate; what is reported is measured on the held-out samples, which no choice has
    seen. Differences to the first method are paired by seed, with 95 % intervals. Written to the output folder: a table
    (results.md, results.csv), a picture of quality against values, memory and step time (pareto.png), all numbers
    (results.json), and the adapters. Started again, it goes on where it stopped.
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
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        width = max(len(line[0]) for line in body)
        for head in heads:
            text = head in ("method", "settings")
            least = width if head == "method" else None  # the others may break between a number and its deviation
            lines = head.replace(" ", "\n").replace("/\n", "/ ")
            table.add_column(lines, justify="left" if text else "right", overflow="fold", min_width=least)
        for line in body:
            table.add_row(*line)
        Console().print(table)
        for note in [*report.notes(found, outcome.runs), *outcome.notes]:
            typer.echo(note)
        typer.echo(f"Written: {', '.join(str(path) for path in outcome.paths)}")
    if outcome.failures:
        raise typer.Exit(1)
