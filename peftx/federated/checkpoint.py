"""A strategy's state on disk: tensors in safetensors, the rest in strategy.json beside them."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import beside
from .checks import AuditEntry, Rejected, check_count, check_keys, check_state
from .state import layer_names

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a strategy goes on from: the `state` that is sent (fp32, by name), after `round` rounds of `method`."""

    method: str
    round: int
    refactorized: bool
    state: Mapping[str, Tensor]
    audit: list[AuditEntry]


def write_text(path: Path, text: str) -> None:
    """Writes a file that nobody finds half of, also after a power failure."""
    with beside(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the pair; the old one stays until the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = f"state-{checkpoint.round}.safetensors"
    with beside(folder / tensors) as draft:
        save_file({name: value.contiguous() for name, value in checkpoint.state.items()}, draft)
    known = {
        "format": FORMAT,
        "method": checkpoint.method,
        "round": checkpoint.round,
        "refactorized": checkpoint.refactorized,
        "state": tensors,
        "audit": [asdict(entry) for entry in checkpoint.audit],
    }
    write_text(folder / "strategy.json", json.dumps(known, indent=1))
    for old in (*folder.glob("state-*.safetensors"), *folder.glob(".state-*.part")):  # the latter of a killed process
        if old.name != tensors:
            old.unlink()


def read(folder: Path, method: str) -> Checkpoint:
    """Reads what `write` wrote; files are not trusted.

    Raises:
        ValueError: no checkpoint of this method there, or a damaged one, or a state that clients would refuse.
    """
    try:
        known = json.loads((folder / "strategy.json").read_text(encoding="utf-8"))
        if known["format"] != FORMAT or known["method"] != method:
            raise ValueError(f"it is of method {known['method']!r} in format {known['format']}")
        check_count("round", known["round"], 0)
        if not isinstance(known["refactorized"], bool):
            raise ValueError(f"refactorized is {known['refactorized']!r}")
        audit = [_entry(entry) for entry in known["audit"]]
        with safe_open(folder / Path(known["state"]).name, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if odd := [name for name, value in state.items() if value.dtype != torch.float32]:
            raise ValueError(f"{odd[0]!r} is {state[odd[0]].dtype}, not torch.float32")
        factors = {name: value for name, value in state.items() if ".residual_" not in name}
        layers = layer_names(factors)
        check_keys(state.keys() - factors.keys(), [n for n in state if n.rpartition(".residual_")[0] in layers])
        check_state(state, orthonormal=known["refactorized"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"no checkpoint to resume {method} from in {folder}: {error}") from error
    return Checkpoint(method, known["round"], known["refactorized"], state, audit)


def _entry(entry: Mapping[str, Any]) -> AuditEntry:
    found = AuditEntry(**entry)
    if type(found.round) is not int or type(found.node) is not int or not isinstance(found.reason, str):
        raise Rejected(f"an audit entry is {entry!r:.100}")
    return found
