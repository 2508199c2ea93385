"""Checkpoints of the Trainer: which of them are whole."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..files import Entry

NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*", "global_step*")
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*-optimizer.pt", "global_step*")


def checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the newest first."""
    found = (
        [path for path in folder.iterdir() if path.is_dir() and NAME.fullmatch(path.name)] if folder.is_dir() else []
    )
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def damage(checkpoint: Path, listed: Mapping[str, Entry]) -> str:
    """What is wrong with a checkpoint, so that a training cannot go on from it; "" where it is whole.

    The files that the folder's list names are there in their sizes; weights are safetensors whose headers agree with
    their sizes; the state of the Trainer is JSON; optimizer, schedule and random numbers are archives without an error,
    and load as tensors.
    """
    for name, entry in listed.items():
        inside = name.removeprefix(f"{checkpoint.name}/")
        if inside == name or "bytes" not in entry:
            continue
        path = checkpoint / inside
        if not path.is_file():
            return f"{inside} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{inside} has {path.stat().st_size:,} of {entry['bytes']:,} bytes"
    for what, patterns in (("weights", WEIGHTS), ("state of the optimizer", OPTIMIZER)):
        if not any(path for pattern in patterns for path in checkpoint.glob(pattern)):
            return f"it has no {what}"
    for name in ("trainer_state.json", "scheduler.pt"):
        if not (checkpoint / name).is_file() and not list(checkpoint.glob("global_step*")):
            return f"{name} is missing"
    if not list(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if problem := unreadable(path):
            return f"{path.relative_to(checkpoint)}: {problem}"
    return ""


def unreadable(path: Path) -> str:
    """Why a file of a checkpoint cannot be read; "" where it can."""
    try:
        if path.name == "trainer_state.json":
            return state_problem(json.loads(path.read_text(encoding="utf-8")), path.parent.name)
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            shards = set(found["weight_map"].values()) if path.name.endswith(".index.json") else set()
            missing = [name for name in shards if not (path.parent / name).is_file()]
            return f"{missing[0]} is missing" if missing else ""
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    return f"{bad} in it has another check sum"
            if path.name in ("optimizer.pt", "scheduler.pt"):
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RecursionError:
        return "nested too deeply"
    except Exception as error:  # of JSON, safetensors, zip, pickle, of the disk
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def state_problem(state: Any, name: str) -> str:
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        return "not the state of a Trainer"
    step = int(name.removeprefix("checkpoint-"))
    return "" if state.get("global_step") == step else f"it is of step {state.get('global_step')!r}, not {step}"
