"""One drawing for each method, and the one that shows them all."""

from __future__ import annotations

import random

from sheet import Sheet

SIDE = 1.1  # of a weight
SIZE = (5.2, 1.75)


def weight(s: Sheet, x: float, text: str = "$W$") -> None:
    s.block(x, 0.35, SIDE, SIDE, "frozen", text)


def plus(s: Sheet, x: float, sign: str = "+") -> None:
    s.word(x, 0.35 + SIDE / 2, sign, 13)


def factors(s: Sheet, x: float, b: str = "trained", a: str = "trained", gap: float = 0.1) -> float:
    """B (tall) and A (wide), r = 0.24; returns where A ends."""
    s.block(x, 0.35, 0.24, SIDE, b, "$B$")
    s.block(x + 0.24 + gap, 0.35 + SIDE - 0.24, SIDE, 0.24, a, "$A$")
    return x + 0.24 + gap + SIDE


def allora(s: Sheet) -> None:
    weight(s, 0.5)
    plus(s, 1.85)
    end = factors(s, 2.1)
    rows = [0.3, 0.62, 0.2, 0.5, 0.8, 0.36]
    h = SIDE / len(rows)
    for i, norm in enumerate(rows):
        s.block(end + 0.55, 0.35 + i * h + 0.02, 0.25 + 0.75 * (1 - norm), h - 0.04, "shade")
    s.note(2.8, 0.78, "gradient", ha="center")
    s.arrow((end + 0.45, 0.62), (2.45, 0.62))
    s.note(end + 0.75, 0.17, "rows that grew slow down")


def bone(s: Sheet) -> None:
    weight(s, 0.9)
    plus(s, 2.25)
    w = SIDE / 4
    for i in range(4):
        s.block(2.5 + i * w, 0.35, w - 0.02, SIDE, "trained" if i == 0 else "shade", "$D$")
    s.note(2.5 + SIDE / 2, 0.17, "one block, repeated along the input")


def compacter(s: Sheet) -> None:
    s.box(0.1, 0.65, 0.95, 0.55, "frozen", "module")
    s.arrow((1.05, 0.92), (1.62, 0.92))
    s.word(1.3, 1.08, "$h$")
    s.shape([(1.62, 0.45), (1.62, 1.4), (2.2, 1.12), (2.2, 0.72)], "trained", "down")
    s.arrow((2.2, 0.92), (2.4, 0.92))
    s.box(2.4, 0.74, 0.36, 0.36, "made", "$\\varphi$")
    s.arrow((2.76, 0.92), (2.96, 0.92))
    s.shape([(2.96, 0.72), (2.96, 1.12), (3.54, 1.4), (3.54, 0.45)], "trained", "up")
    s.arrow((3.54, 0.92), (3.82, 0.92))
    s.word(3.95, 0.92, "+", 13)
    s.line([1.3, 1.3, 3.95, 3.95], [0.92, 0.22, 0.22, 0.74])
    s.arrow((4.08, 0.92), (4.55, 0.92))
    for i in range(3):
        s.block(2.42 + 0.06 * i, 1.42 - 0.06 * i, 0.22, 0.22, "trained" if i == 2 else "shade")
    s.note(2.9, 1.5, "one rule for all", ha="left")


def fedsvd(s: Sheet) -> None:
    for i in range(3):
        x = 0.25 + i * 0.78
        s.box(x, 0.2, 0.62, 0.7, "made")
        s.block(x + 0.08, 0.28, 0.12, 0.54, "trained")
        s.block(x + 0.27, 0.7, 0.28, 0.12, "frozen")
        s.note(x + 0.41, 0.42, "$B_k$")
        s.arrow((x + 0.31, 0.9), (1.34, 1.3))
    s.box(1.0, 1.3, 0.68, 0.32, "made", "mean", size=9)
    s.arrow((1.68, 1.46), (2.6, 1.46))
    s.note(2.14, 1.58, "SVD")
    s.block(2.75, 0.86, 0.2, 0.76, "shade", "")
    s.word(2.85, 1.24, "$B'$", 9)
    s.block(3.05, 1.42, 0.95, 0.2, "shade", "")
    s.word(3.52, 1.52, "$A'$", 9)
    s.note(3.52, 1.24, "orthonormal rows")
    s.arrow((3.3, 0.95), (2.5, 0.6), bend=-0.25)
    s.note(3.55, 0.66, "next round", ha="center")


def flora(s: Sheet) -> None:
    weight(s, 0.5)
    plus(s, 1.85)
    s.block(3.2, 0.72, 0.42, 0.42, "trained", "$G$")
    s.block(2.15, 0.72, 0.95, 0.42, "trained", "$A$ input")
    s.block(3.72, 0.72, 0.95, 0.42, "trained", "$B$ output")
    s.block(3.2, 1.24, 0.42, 0.36, "trained", "$K$")
    s.block(3.2, 0.26, 0.42, 0.36, "trained", "$L$")
    s.note(3.72, 1.42, "kernel height", ha="left")
    s.note(3.72, 0.44, "kernel width", ha="left")


def gradnormlorp(s: Sheet) -> None:
    s.block(0.35, 0.35, 0.14, SIDE, "trained")
    s.word(0.42, 0.35 + SIDE / 2, "$m$", color=s.ink("trained"))
    s.word(0.68, 0.35 + SIDE / 2, "$\\cdot$", 14)
    s.line([0.86, 0.8, 0.8, 0.86], [0.3, 0.3, 1.5, 1.5])
    weight(s, 0.9)
    plus(s, 2.15)
    end = factors(s, 2.3)
    s.line([end + 0.06, end + 0.12, end + 0.12, end + 0.06], [0.3, 0.3, 1.5, 1.5])
    s.note(2.2, 0.17, "each row to length 1")
    s.arrow((end + 0.25, 0.62), (2.65, 0.62))
    s.note(3.1, 0.78, "projected gradient")
    for i in range(2):
        for j in range(4):
            s.block(end + 0.35 + 0.15 * j, 0.48 + 0.15 * i, 0.12, 0.12, "shade")
    s.note(end + 0.64, 0.9, "8-bit\nmoments", size=7.5)


def loldu(s: Sheet) -> None:
    weight(s, 0.5)
    plus(s, 1.85)
    x, r = 2.15, 0.42
    s.shape([(x, 0.35), (x, 0.35 + SIDE), (x + r, 0.35 + SIDE - r), (x + r, 0.35)], "frozen", "")
    s.word(x + 0.2, 0.72, "$PL$", 9)
    for i in range(5):
        d = r / 5
        s.block(x + 0.62 + i * d, 0.35 + SIDE - (i + 1) * d, d, d, "trained")
    s.note(x + 0.62 + r / 2, 0.86, "trained", size=7.5)
    u = x + 1.24
    s.shape(
        [(u, 0.35 + SIDE), (u + SIDE, 0.35 + SIDE), (u + SIDE, 0.35 + SIDE - r), (u + r, 0.35 + SIDE - r)], "frozen"
    )
    s.word(u + 0.72, 0.35 + SIDE - r / 2, "$U$", 9)
    s.note(x + 1.1, 0.17, "lower, diagonal and upper of $W$ itself")


def lora_ggpo(s: Sheet) -> None:
    weight(s, 0.4)
    plus(s, 1.7)
    end = factors(s, 1.9)
    plus(s, end + 0.2)
    draw, n = random.Random(3), 11
    d = SIDE / n
    for i in range(n):
        spread = 0.25 + 0.75 * draw.random()
        for j in range(n):
            alpha = min(1.0, abs(draw.gauss(0, 0.5)) * spread)
            s.block(end + 0.4 + j * d, 0.35 + i * d, d, d, "trained", alpha=alpha)
    s.note(end + 0.4 + SIDE / 2, 0.17, "in training only")


def triadaptlora(s: Sheet) -> None:
    weight(s, 0.3)
    plus(s, 1.6)
    x, r, top = 1.8, 0.5, 0.35 + SIDE
    s.block(x, 0.35, r, SIDE, "trained", "$B$")
    c = x + r + 0.12
    s.shape([(c, top), (c, top - r), (c + r, top - r)], "trained")
    s.shape([(c, top), (c + r, top), (c + r, top - r)], "shade")
    s.word(c + 0.15, top - 0.36, "$L$", 9, color=s.ink("trained"))
    s.word(c + 0.36, top - 0.15, "$U$", 9)
    s.line([c, c + r + 0.14, c + r + 0.14], [top - r - 0.14, top - r - 0.14, top], linestyle=(0, (3, 2)))
    s.note(c + 0.3, top - r - 0.3, "one rank more", size=7.5)
    a = c + r + 0.3
    s.block(a, top - r, SIDE, r, "trained", "$A$")
    s.note(a + 0.1, 0.42, "$\\|L+U\\|$ grew most? it gets the rank", size=7.5)


SINGLE = {
    "allora": allora,
    "bone": bone,
    "compacter": compacter,
    "fedsvd": fedsvd,
    "flora": flora,
    "gradnormlorp": gradnormlorp,
    "loldu": loldu,
    "lora-ggpo": lora_ggpo,
    "triadaptlora": triadaptlora,
}
NAMES = ["ALLoRA", "Bone", "Compacter", "FedSVD", "FLoRA", "GradNormLoRP", "LoLDU", "LoRA-GGPO", "TriAdaptLoRA"]


def overview(s: Sheet) -> None:
    """All methods, three in a row."""
    for i, (drawing, name) in enumerate(zip(SINGLE.values(), NAMES, strict=True)):
        part = s.at(0.15 + (i % 3) * 3.55, 3.62 - (i // 3) * 1.62, 0.66)
        part.word(2.5, 1.98, name, 14, weight="bold")
        drawing(part)
    s.block(3.45, 0.06, 0.2, 0.13, "frozen")
    s.note(3.75, 0.12, "frozen", ha="left")
    s.block(4.75, 0.06, 0.2, 0.13, "trained")
    s.note(5.05, 0.12, "trained", ha="left")
    s.block(6.05, 0.06, 0.2, 0.13, "shade")
    s.note(6.35, 0.12, "follows from it", ha="left")


DRAWINGS = {name: (drawing, SIZE) for name, drawing in SINGLE.items()} | {"overview": (overview, (10.7, 5.1))}
