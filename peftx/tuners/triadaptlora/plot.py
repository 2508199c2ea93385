"""A picture of the ranks over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_ranks(
    history: Sequence[Mapping[str, Any]], path: str | Path, adapter_name: str | None = None, dpi: int = 150
) -> None:
    """Writes a picture (PNG, or what the suffix of `path` says) of how the rank of each module grew over the steps.

    Args:
        history: `model.base_model.rank_history()`, or a Trainer's `state.log_history`; other entries are ignored.
        path: the file to write.
        adapter_name: which adapter; default: that of the first entry.

    Raises:
        ValueError: `history` says nothing about ranks.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = [e for e in history if "triadaptlora_ranks" in e and e["adapter"] == (adapter_name or e["adapter"])]
    entries = [e for e in entries if e["adapter"] == entries[0]["adapter"]]
    if not entries:
        raise ValueError(
            "The history has no ranks of a TriAdaptLoRA adapter. Pass `model.base_model.rank_history()`, or "
            "`trainer.state.log_history` of a training with `TriAdaptCallback`."
        )
    steps = [e["step"] for e in entries]
    names = list(entries[0]["triadaptlora_ranks"])
    ranks = [[e["triadaptlora_ranks"][name] for e in entries] for name in names]
    end = max([e["step"] for e in history if "step" in e])
    edges = [*steps, max(end, steps[-1] + max(1, steps[-1] // len(steps)))]
    figure = Figure(figsize=(8, 1.5 + 0.2 * len(names)), layout="constrained")
    axes = figure.add_subplot(title="Active rank", xlabel="optimizer step", yticks=[i + 0.5 for i in range(len(names))])
    axes.set_yticklabels(names, fontsize=7)
    mesh = axes.pcolormesh(edges, list(range(len(names) + 1)), ranks, cmap="viridis", vmin=0)
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    figure.savefig(path, dpi=dpi)
