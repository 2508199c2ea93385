"""`peftx export`: a saved adapter for tools that do not know peftx."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils import plain, quiet
from .inspect import Revision, Subfolder
from .main import OVERWRITE, fail


class Target(str, Enum):
    lora = "lora"
    miss = "miss"
    merged = "merged"
    gguf = "gguf"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter, or its id on the Hub.")],
    out: Annotated[Path, typer.Argument(help="New folder to write to.")],
    to: Annotated[
        Target,
        typer.Option(
            help="A plain LoRA (or DoRA), PEFT's MiSS (from Bone), the base model with all merged in, or LoRA in GGUF."
        ),
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
        Dtype | None,
        typer.Option(help="Of the weights, merged or in GGUF.", show_default="the base model's; in GGUF float32"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write an adapter as a plain LoRA for stock PEFT or vLLM, or for llama.cpp; as MiSS; or merged into its base."""
    if rank is not None and to not in (Target.lora, Target.gguf):
        fail(f"--rank is for --to lora and --to gguf, not for --to {to.value}")
    if dtype is not None and to not in (Target.merged, Target.gguf):
        fail(f"--dtype is for --to merged and --to gguf, not for --to {to.value}")
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
                settings: dict[str, Any] = {"rank": rank, "base_model": base_model, **where}
                if to is Target.gguf:
                    errors = hub.export_gguf(adapter, out, dtype=wanted or torch.float32, **settings)
                else:
                    errors = hub.export_lora(adapter, out, **settings)
                worst = max(errors, key=errors.__getitem__, default="")
                lost = f"largest relative error {errors[worst]:.2g}, of {worst}" if errors.get(worst) else "exact"
                reader = "llama.cpp" if to is Target.gguf else "stock PEFT"
                typer.echo(f"LoRA adapter of {len(errors)} modules for {reader}, {lost}: {out}")
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        fail(plain(" ".join(str(error).split())))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of PEFT, of transformers, over files that nobody has checked
        told = plain(" ".join(str(error).split()))
        fail(f"{plain(adapter)} cannot be exported ({type(error).__name__}: {told}): see `peftx inspect` on it")
