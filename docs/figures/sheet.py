"""What figures are drawn with: blocks, arrows and words, in the colours of a light or a dark page."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

COLOURS = {
    "light": dict(ink="#2b2f3a", soft="#79808f", frozen="#d9dde5", trained="#5468d4", shade="#aab4ee", page="#ffffff"),
    "dark": dict(ink="#e3e6ee", soft="#9aa2b4", frozen="#4a5063", trained="#8c9bff", shade="#56629c", page="#1e2129"),
}


def settings(kind: str) -> dict[str, Any]:
    return {
        "svg.hashsalt": "peftx",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "mathtext.fontset": "dejavusans",
        "text.color": COLOURS[kind]["ink"],
        "hatch.linewidth": 0.6,
    }


class Sheet:
    """A drawing area in units of inches, y upwards. `at` makes a part of it with an origin and a scale of its own."""

    def __init__(self, width: float, height: float, kind: str) -> None:
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self.colours, self.dark = COLOURS[kind], kind == "dark"
        self.width, self.height = width, height
        self.x = self.y = 0.0
        self.scale = 1.0

    def at(self, x: float, y: float, scale: float = 1.0) -> Sheet:
        part = object.__new__(Sheet)
        part.__dict__.update(self.__dict__)
        part.x, part.y, part.scale = self.x + x * self.scale, self.y + y * self.scale, self.scale * scale
        return part

    def _point(self, x: float, y: float) -> tuple[float, float]:
        return self.x + x * self.scale, self.y + y * self.scale

    def _style(self, kind: str) -> dict[str, Any]:
        c = self.colours
        return {
            "frozen": dict(facecolor=c["frozen"], edgecolor="none"),
            "trained": dict(facecolor=c["trained"], edgecolor="none"),
            "shade": dict(facecolor=c["shade"], edgecolor="none"),
            "made": dict(facecolor="none", edgecolor=c["soft"], linewidth=1.0),
            "dashed": dict(facecolor="none", edgecolor=c["soft"], linewidth=1.0, linestyle=(0, (3, 2))),
        }[kind]

    def ink(self, kind: str) -> str:
        return self.colours["page"] if kind == "trained" else self.colours["ink"]

    def block(self, x: float, y: float, w: float, h: float, kind: str = "frozen", text: str = "", **more: Any) -> None:
        """A rectangle with its lower left corner at (x, y)."""
        self.axes.add_patch(Rectangle(self._point(x, y), w * self.scale, h * self.scale, **self._style(kind), **more))
        if text:
            self.word(x + w / 2, y + h / 2, text, color=self.ink(kind))

    def box(self, x: float, y: float, w: float, h: float, kind: str = "made", text: str = "", **more: Any) -> None:
        """A rectangle with round corners: something that acts."""
        shape = FancyBboxPatch(
            self._point(x, y), w * self.scale, h * self.scale, boxstyle=f"round,pad=0,rounding_size={0.07 * self.scale}"
        )
        shape.set(**self._style(kind))
        self.axes.add_patch(shape)
        if text:
            self.word(x + w / 2, y + h / 2, text, color=self.ink(kind), **more)

    def shape(self, points: list[tuple[float, float]], kind: str = "trained", text: str = "") -> None:
        self.axes.add_patch(Polygon([self._point(*p) for p in points], closed=True, **self._style(kind)))
        if text:
            x, y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
            self.word(x, y, text, color=self.ink(kind))

    def word(self, x: float, y: float, text: str, size: float = 10, **more: Any) -> None:
        more = {"ha": "center", "va": "center", "color": self.colours["ink"]} | more
        self.axes.text(*self._point(x, y), text, fontsize=size * self.scale, **more)

    def note(self, x: float, y: float, text: str, size: float = 8, **more: Any) -> None:
        self.word(x, y, text, size, **({"color": self.colours["soft"]} | more))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, **more: Any) -> None:
        style = dict(arrowstyle="-|>", mutation_scale=9 * self.scale, linewidth=1.1, color=self.colours["soft"])
        curve = f"arc3,rad={bend}"
        self.axes.add_patch(
            FancyArrowPatch(
                self._point(*start), self._point(*end), connectionstyle=curve, shrinkA=0, shrinkB=0, **(style | more)
            )
        )

    def line(self, xs: list[float], ys: list[float], **more: Any) -> None:
        points = [self._point(x, y) for x, y in zip(xs, ys, strict=True)]
        style = dict(color=self.colours["soft"], linewidth=1.1)
        self.axes.plot([p[0] for p in points], [p[1] for p in points], **(style | more))
