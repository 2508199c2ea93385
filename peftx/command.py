"""What the process of a command does before PEFT is imported, and a library must not.

`peftx run` ends here: its process becomes the program. Other commands leave something out of their output: a remark
that bitsandbytes makes when PEFT imports it, on every CPU without the package `kernels`, before any code of ours could
know.
"""

import logging
import os
import sys
from pathlib import Path

from . import launch

MARK = "PEFTX_COMMAND"  # in the environment of the processes that a command starts
REMARK = "Failed to load CPU gemm_4bit_forward"


def is_command() -> bool:
    """Whether `peftx`, `python -m peftx` or `-m peftx.cli` was started, or one of them started this process."""
    script = bool(sys.argv) and Path(sys.argv[0]).stem == "peftx"
    pairs = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    module = any(pair in (("-m", "peftx"), ("-m", "peftx.cli")) for pair in pairs)
    return script or module or MARK in os.environ


if program := launch.asked(sys.orig_argv):
    launch.become(*program)
if is_command():
    os.environ[MARK] = "1"
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: not str(record.msg).startswith(REMARK))
