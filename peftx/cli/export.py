"""`peftx export`: a saved adapter for tools that do not know peftx."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..utils import plain, quiet
from .inspect import Revision, Subfolder
from .main import OVERWRITE, fail


class Target(str, Enum):
    lora = "lora"
    miss = "miss"
    merged = "merged"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter, or its id on the Hub.")],
    out: Annotated[Path, typer.Argument(help="New folder to write to.")],
    to: Annotated[
        Target,
        typer.Option(help="A plain LoRA (or DoRA), PEFT's MiSS (from Bone), or the base model with all merged in."),
    ] = Target.lora,
    rank: Annotated[
        int | None, typer.Option(help="Cut every delta to this rank, with an error.", show_default="exact")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Folder or id of the base model.", show_default="the adapter's")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the merged model's weights.", show_default="the base model's")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write an adapter as a plain LoRA for stock PEFT, vLLM or llama.cpp, as MiSS, or merged into its base model."""
    if rank is not None and to is not Target.lora:
        fail(f"--rank is for --to lora, not for --to {to.value}")
    if dtype is not None and to is not Target.merged:
        fail(f"--dtype is for --to merged, not for --to {to.value}")
    import torch

    from .. import hub
    from ..files import claim

    where = {"revision": revision, "subfolder": subfolder}
    wanted = getattr(torch, dtype.value) if dtype is not None else None
    try:
        inputs = {"adapter": Path(adapter, subfolder or ""), "base_model": base_model}
        claim(out, "export", inputs, overwrite=overwrite, ways="say --overwrite")
        with quiet():
            if to is Target.miss:
                hub.export_miss(adapter, out, **where)
                typer.echo(f"MiSS adapter for stock PEFT: {out}")
            elif to is Target.merged:
                hub.export_merged(adapter, out, dtype=wanted, base_model=base_model, **where)
                typer.echo(f"Merged model: {out}")
            else:
                errors = hub.export_lora(adapter, out, rank=rank, base_model=base_model, **where)
                worst = max(errors, key=errors.__getitem__, default="")
                lost = f"largest relative error {errors[worst]:.2g}, of {worst}" if errors.get(worst) else "exact"
                typer.echo(f"LoRA adapter of {len(errors)} modules for stock PEFT, {lost}: {out}")
    except (ValueError, NotImplementedError, OSError) as error:
        fail(plain(" ".join(str(error).split())))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of PEFT, of transformers, over files that nobody has checked
        told = plain(" ".join(str(error).split()))
        fail(f"{plain(adapter)} cannot be exported ({type(error).__name__}: {told}): see `peftx inspect` on it")
