"""Drawings of the guides."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from sheet import Sheet

sys.path.append(str(Path(__file__).parents[1]))
import tables


def road(s: Sheet) -> None:
    """What happens to an adapter, from left to right."""
    steps = [("get_peft_model", "a peftx config"), ("Trainer, TRL", "as with LoRA"), ("save, push", "safetensors")]
    for i, (title, under) in enumerate(steps):
        x = 0.05 + i * 1.72
        s.box(x, 0.55, 1.42, 0.62, "shade" if i == 0 else "made", title, size=10.5)
        s.note(x + 0.71, 0.36, under, size=9.5)
        if i < 2:
            s.arrow((x + 1.42, 0.86), (x + 1.72, 0.86))
    ends = [("PeftModel", "with peftx"), ("plain LoRA", "stock PEFT, engines"), ("merged model", "nothing attached")]
    for i, (title, under) in enumerate(ends):
        y = 1.32 - i * 0.62
        s.box(5.3, y, 1.3, 0.38, "made", title, size=10.5)
        s.note(6.68, y + 0.19, under, size=9.5, ha="left")
        s.arrow((4.91, 0.86), (5.3, y + 0.19))


def pruning(s: Sheet) -> None:
    """Score, choose, train."""
    for i in range(10):
        s.block(0.2, 0.25 + i * 0.13, 0.9, 0.1, "frozen")
    s.note(0.65, 0.1, "samples")
    s.arrow((1.2, 0.85), (1.85, 0.85))
    s.note(1.52, 1.0, "one pass")
    s.line([2.0, 2.0, 3.6], [1.55, 0.3, 0.3])
    s.note(2.8, 0.13, "NOD: how far the head would move")
    s.note(1.9, 1.62, "DON: how its norm would change", ha="left")
    points = [(0.15, 0.12), (0.28, 0.28), (0.2, 0.42), (0.42, 0.2), (0.6, 0.5), (0.75, 0.4), (0.9, 0.75)]
    for i, (x, y) in enumerate([*points, (1.1, 0.6), (1.25, 1.0), (1.45, 0.9)]):
        s.block(2.0 + x, 0.3 + y, 0.09, 0.09, "trained" if i < 4 else "frozen")
    s.arrow((3.75, 0.85), (4.3, 0.85))
    for i in range(4):
        s.block(4.4, 0.62 + i * 0.13, 0.9, 0.1, "trained")
    s.note(4.85, 0.45, "kept")


def compression(s: Sheet) -> None:
    """A weight and its two factors."""
    s.block(0.5, 0.35, 1.1, 1.1, "frozen", "$W$")
    s.word(1.95, 0.9, "$\\approx$", 13)
    s.block(2.3, 0.35, 0.4, 1.1, "trained", "up")
    s.block(2.85, 1.05, 1.1, 0.4, "trained", "down")
    for i, h in enumerate([0.5, 0.2, 0.35, 0.1, 0.42, 0.28, 0.15, 0.3]):
        s.block(2.85 + i * 1.1 / 8, 0.35, 1.1 / 8 - 0.02, h, "shade")
    s.note(3.4, 0.17, "what each input matters (Fisher)")


def experts(s: Sheet) -> None:
    """Tokens, routed, meet thin factors."""
    for i in range(6):
        s.block(0.2, 0.25 + i * 0.2, 0.5, 0.14, "frozen")
    s.note(0.45, 0.1, "tokens")
    routes = [0, 2, 0, 3, 2, 0]
    for e in range(4):
        y = 0.22 + e * 0.33
        s.block(2.0, y, 0.55, 0.26, "frozen", "")
        s.word(2.27, y + 0.13, f"$W_{e + 1}$", 8)
        used = e in routes
        s.block(2.75, y, 0.1, 0.26, "trained" if used else "dashed")
        s.block(2.95, y + 0.16, 0.55, 0.1, "trained" if used else "dashed")
    for i, e in enumerate(routes):
        s.arrow((0.75, 0.32 + i * 0.2), (1.95, 0.35 + e * 0.33), linewidth=0.8)
    s.note(3.65, 0.95, "factors act on the tokens\nthat an expert got;\nno expert's delta is built", ha="left")


def optimizer(s: Sheet) -> None:
    """A gradient, projected, and moments of 8 bits."""
    s.block(0.3, 0.35, 1.1, 1.1, "frozen", "gradient")
    s.arrow((1.5, 0.9), (2.1, 0.9))
    s.note(1.8, 1.05, "project")
    s.block(2.2, 0.72, 1.1, 0.36, "trained", "rank r")
    s.arrow((3.4, 0.9), (3.9, 0.9))
    for i in range(3):
        for j in range(8):
            s.block(4.0 + j * 0.12, 0.72 + i * 0.12, 0.1, 0.1, "shade")
    s.note(4.45, 0.52, "moments, 8 bits each")


def leaderboard(s: Sheet) -> None:
    """Each method less LoRA on each task, with 95 % intervals, of benchmarks/results/leaderboard.json."""
    tasks = tables.placed()
    keys = [key for key in dict.fromkeys(key for lines in tasks.values() for key in lines) if key != ("lora", "budget")]
    left, bottom, gap = 1.85, 0.42, 0.25
    width = (s.width - left - 0.1) / len(tasks) - gap
    step = (s.height - bottom - 0.45) / len(keys)
    for i, (name, group) in enumerate(keys):
        s.word(
            left - 0.15, bottom + (len(keys) - i - 0.5) * step, name + ("" if group == "budget" else "*"), 8, ha="right"
        )
    for column, (task, lines) in enumerate(tasks.items()):
        start, loss = left + column * (width + gap), tables.quality(task) == "loss"
        found = {key: line.difference for key, line in lines.items() if line.difference is not None}
        ends = [abs(end) for one in found.values() for end in (one.low, one.high)]
        reach = statistics.quantiles(ends, n=10)[-1] * 1.1  # a wider interval is cut off
        middle, unit = start + width / 2, width / 2 / reach
        s.line([middle, middle], [bottom, bottom + len(keys) * step], linestyle=(0, (3, 3)))
        s.note(middle, s.height - 0.2, f"{task}, {'loss' if loss else 'accuracy'}", 9)
        tick = float(f"{reach * 0.8:.1g}")
        for end in (-tick, tick):
            s.note(middle + end * unit, bottom - 0.15, f"{-end if loss else end:+g}")
        for i, key in enumerate(keys):
            if (one := found.get(key)) is None:
                continue
            y, sign = bottom + (len(keys) - i - 0.5) * step, -1 if loss else 1
            mean, *ends = (max(-reach, min(reach, sign * value)) for value in (one.mean, one.low, one.high))
            kind = "frozen" if one.holds_zero else "trained"
            s.line(
                [middle + end * unit for end in ends],
                [y, y],
                color=s.colours["soft" if one.holds_zero else kind],
                linewidth=2,
            )
            if abs(mean) < reach:
                s.block(middle + mean * unit - 0.04, y - 0.04, 0.08, 0.08, kind)
            else:  # it is further away
                s.word(
                    middle + mean * unit,
                    y,
                    "◂" if mean < 0 else "▸",
                    9,
                    color=s.colours["soft" if one.holds_zero else kind],
                )
    s.note(
        left + (s.width - left) / 2,
        0.1,
        "less LoRA's, same seeds: better to the right; coloured where the interval leaves out 0"
        + ("; * at its own size" if any(group == "own" for _, group in keys) else ""),
    )


DRAWINGS = {
    "road": (road, (8.15, 1.8)),
    "pruning": (pruning, (5.6, 1.8)),
    "compression": (compression, (4.6, 1.75)),
    "experts": (experts, (5.6, 1.7)),
    "optimizer": (optimizer, (5.2, 1.75)),
    "leaderboard": (leaderboard, (8.6, 6.4)),
}
