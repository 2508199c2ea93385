"""`peftx run`: any Python program, with the methods registered."""

import sys
from typing import Annotated

import typer

from .. import launch
from .main import fail

# All behind the program's name is the program's. Who is at the shell does not come here but for --help: `launch`.
SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="PROGRAM [ARGUMENTS]...", help="A script, a console script of this environment, or a module."
        ),
    ],
) -> None:
    """Run a Python program with the methods of peftx registered, in it and in the Python programs that it starts.

    `peftx run train.py --lr 1e-3`, `peftx run trl sft --config sft.yaml`, `peftx run -m package.module`; under
    `accelerate launch -m peftx run train.py` and `torchrun -m peftx run train.py`, or the other way round. Exit code,
    arguments, `__main__` and signals are the program's. Python processes started with -I, -E or -S, by another
    environment or on another machine are left out.
    """
    try:
        command = [sys.executable, *launch.arguments(words)]
        code = launch.call(command, launch.environment())
    except launch.UnknownProgram as error:
        fail(str(error))
    raise typer.Exit(code)
