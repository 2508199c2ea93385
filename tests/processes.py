"""Two processes of one test: gloo on this machine, under torch.multiprocessing."""

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist


def join(rank: int, folder: Path | str) -> None:
    """Makes this the process `rank` of two; they meet in a file of `folder`."""
    faulthandler.enable()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(folder, 'store')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))


def leave() -> NoReturn:
    """Ends the process, which has written what it has to say. Left to end by itself it has hung or crashed, once in
    some forty runs: torch joins gloo's threads while it holds the lock of Python that they wait for."""
    sys.stderr.flush()
    os._exit(0)
