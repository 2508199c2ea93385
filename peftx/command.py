"""What the process of a command leaves out of its output, and a library must not: a remark that bitsandbytes makes
when PEFT imports it, on every CPU without the package `kernels`. It is logged before any code of ours could know."""

import logging
import os
import sys
from pathlib import Path

MARK = "PEFTX_COMMAND"  # in the environment of the processes that a command starts
REMARK = "Failed to load CPU gemm_4bit_forward"


def is_command() -> bool:
    """Whether `peftx` or `python -m peftx.cli` was started, or one of them started this process."""
    script = bool(sys.argv) and Path(sys.argv[0]).stem == "peftx"
    module = any(pair == ("-m", "peftx.cli") for pair in zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
    return script or module or MARK in os.environ


if is_command():
    os.environ[MARK] = "1"
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: not str(record.msg).startswith(REMARK))
