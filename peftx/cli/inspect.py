"""`peftx inspect`: what an adapter file is."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from ..utils import plain, quiet
from .main import OVERWRITE, fail

if TYPE_CHECKING:
    from ..hub import AdapterReport
    from ..hub.tensors import AdaptedModule

MANY = 40  # modules that have a line each

Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the repository on the Hub.", show_default="main")
]
Subfolder = Annotated[
    str | None, typer.Option(help="Of the folder or repository, where the adapter is.", show_default="none")
]


def inspect(
    path: Annotated[str, typer.Argument(help="Folder of a saved adapter, or its id on the Hub.")],
    load: Annotated[
        bool, typer.Option("--load", help="Put it on its base model too: does it fit? Gives the norms of all deltas.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Folder or id of the base model; implies --load.", show_default="the adapter's")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the norms by layer and module into this PNG file.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help=f"A line for each module, also where there are more than {MANY} of them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Tell what an adapter is: method, ranks, norms, sizes, and whether it loads. Nothing in it is executed.

    Exit code 1 where something is wrong with it.
    """
    from .. import hub
    from ..files import claim_file, written

    try:
        if plot is not None:
            inputs = {"adapter": Path(path, subfolder or ""), "base_model": base_model}
            claim_file(plot, "inspect", inputs, overwrite=overwrite, what="--plot")
        with quiet():
            report = hub.inspect_adapter(path, load=load, base_model=base_model, revision=revision, subfolder=subfolder)
            if plot is not None:
                with written(plot, "inspect") as draft:
                    hub.heat_map(report, draft)
    except (ValueError, OSError, NotImplementedError) as error:
        fail(plain(" ".join(str(error).split())))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        fail("matplotlib is missing, which --plot needs: pip install matplotlib")
    except MemoryError:
        raise
    except Exception as error:  # of PEFT, of transformers, over files that nobody has checked
        told = plain(" ".join(str(error).split()))
        fail(f"{plain(path)} cannot be read as an adapter ({type(error).__name__}: {told})")
    if as_json:
        typer.echo(json.dumps(numbered(dataclasses.asdict(report)), indent=1, default=str))
    else:
        show(report, layers)
    if report.problems:
        raise typer.Exit(1)


def numbered(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: numbered(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [numbered(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(report: "AdapterReport", layers: bool = False) -> None:
    console = Console(markup=False, emoji=False, highlight=False)
    method = f"{report.method}, known by {report.known_by or 'neither PEFT nor peftx'}"
    ranks = Counter("none" if module.rank is None else module.rank for module in report.modules)
    facts = {
        "method": f"{method} {report.paper}".strip(),
        "base model": report.base_model or "not named",
        "task": report.task_type or "not named",
        "modules": str(len(report.modules)),
        "rank": ", ".join(f"{rank} ({count})" if len(ranks) > 1 else f"{rank}" for rank, count in ranks.most_common())
        or "none",
        "values": ", ".join([f"{report.parameters:,}", *(f"{n:,} {dtype}" for dtype, n in report.dtypes.items())]),
        "bytes": f"{report.nbytes:,}",
        "also in the file": ", ".join(f"{name} ({n:,})" for name, n in report.others.items()) or "nothing",
        "loads": loads(report),
    }
    sheet = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        sheet.add_row(name, plain(value))
    console.print(sheet)
    if report.modules:
        delta = all(module.is_delta for module in report.modules)
        norm = "norm of the delta" if delta else "norm of its tensors"
        right = (Column(head, justify="right") for head in ("rank", "values", norm))
        table = Table("module", *right, box=box.SIMPLE_HEAD)
        for group in groups(report.modules, layers):
            name = group[0].name if len(group) == 1 else f"{len(group)} x {group[0].name.rpartition('.')[2]}"
            norms = [f"{end([module.norm for module in group]):.4g}" for end in (min, max)]
            values = f"{sum(module.parameters for module in group):,}"
            rank = "-" if group[0].rank is None else str(group[0].rank)
            table.add_row(plain(name), rank, values, " to ".join(dict.fromkeys(norms)))
        console.print(table)
        if len(report.modules) > MANY and not layers:
            console.print("one line for each: --layers")
    for problem in report.problems:
        console.print(plain(f"problem: {problem}"), soft_wrap=True)


def groups(modules: Sequence["AdaptedModule"], layers: bool) -> list[list["AdaptedModule"]]:
    """One group for each module, or for those of one last name and one rank where they are many."""
    if layers or len(modules) <= MANY:
        return [[module] for module in modules]
    found: dict[Any, list[AdaptedModule]] = {}
    for module in modules:
        found.setdefault((module.name.rpartition(".")[2], module.rank), []).append(module)
    return list(found.values())


def loads(report: "AdapterReport") -> str:
    if report.problems:
        return "no: see below"
    return "yes, it was loaded" if report.loaded else "as far as the file says (--load tries it)"
