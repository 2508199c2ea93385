"""A picture of an adapter: the norms of its deltas by layer and module."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ..files import beside, writing
from ..utils import plain
from .inspect import AdapterReport


def heat_map(report: AdapterReport, path: str | os.PathLike) -> None:
    """Draws the norms of all deltas, by layer and module, into a PNG file. Needs matplotlib.

    Raises:
        ValueError: the adapter has no modules (prompt tuning).
    """
    from matplotlib.figure import Figure

    if not report.modules:
        raise ValueError(f"{report.method} changes no module: there are no norms to draw.")
    cells = {(layer, kind): module.norm for module in report.modules for layer, kind in [place(module.name)]}
    if len(cells) < len(report.modules):  # several stacks of layers, as of an encoder and a decoder
        cells = {(layer, kind): module.norm for module in report.modules for layer, kind in [place(module.name, True)]}
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = torch.full((len(layers), len(kinds)), float("nan"))
    rows, columns = ({value: i for i, value in enumerate(values)} for values in (layers, kinds))
    for (layer, kind), norm in cells.items():
        grid[rows[layer], columns[kind]] = norm
    labels = [plain(kind) for kind in kinds]
    labels = [label if len(label) <= 60 else f"...{label[-57:]}" for label in labels]
    size = (min(40, 2.5 + 0.7 * len(kinds)), min(60, 1.8 + 0.3 * len(layers) + 0.05 * max(map(len, labels))))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")  # where a layer lacks a module
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis")
    every = max(1, -(-len(labels) // 120)), max(1, -(-len(layers) // 250))  # of more there is no room for a name
    axes.set_xticks(range(0, len(kinds), every[0]), labels[:: every[0]], rotation=45, ha="right", parse_math=False)
    names = [str(layer) if layer >= 0 else "-" for layer in layers]
    axes.set_yticks(range(0, len(layers), every[1]), names[:: every[1]])
    axes.set_ylabel("layer")
    delta = all(module.is_delta for module in report.modules)
    figure.colorbar(image, ax=axes, label="norm of the weight delta" if delta else "norm of the adapter's tensors")
    axes.set_title(plain(report.method), parse_math=False)
    with writing(path), beside(Path(path)) as draft:
        figure.savefig(draft, format="png", dpi=120)


def place(name: str, whole: bool = False) -> tuple[int, str]:
    """Layer (-1: none) and kind of a module: `model.layers.3.self_attn.q_proj` is (3, "self_attn.q_proj").

    With `whole`, the kind names the stack of layers too, `model.layers.*.self_attn.q_proj`.
    """
    match = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", name)
    if match is None:
        return -1, name
    before, after = name[: match.start()], name[match.end() :]
    if whole:
        return int(match[1]), ".".join(part for part in (before, "*", after) if part)
    return int(match[1]), after or before
