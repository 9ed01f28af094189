"""What all figures are made of: scales, ticks, a frame with axes, and the SVG around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Scale = Callable[[float], float]
Points = Sequence[tuple[float, float]]

WIDTH = 760
LABELS = 200  # room for a row's name, left of the plot
ROW = 26
AXIS = 36
PANEL = 360  # width of a panel that stands beside another


@dataclass(frozen=True)
class Extent:
    """The values that an axis spans. `log`: all are above 0, and equal ratios are equally long."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, log: bool = False) -> Extent | None:
        """From the least to the largest finite value; None if there is none."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        return cls(min(known), max(known), log) if known else None

    def scale(self, start: float, stop: float, air: float = 0.04) -> Scale:
        if not self.log:
            return linear(self.low, self.high, start, stop, air)
        inner = linear(math.log10(self.low), math.log10(self.high), start, stop, air)
        return lambda value: inner(math.log10(value))

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        found = log_ticks(self.low, self.high)
        decades = [value for value in found if f"{value:.0e}".startswith("1")]
        return decades if len(found) > count and len(decades) > 1 else found

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)


class Frame:
    """A panel with a grid and two axes. Draw with the values' own numbers. `marks` stand across instead of numbers."""

    def __init__(
        self,
        x: Extent,
        y: Extent,
        *,
        across: str,
        up: str,
        size: tuple[int, int] = (PANEL, 300),
        air: float = 0.04,
        marks: Mapping[float, str] | None = None,
    ) -> None:
        self.width, self.height = size
        self.x_extent, self.y_extent = x, y
        self.left, self.right, self.top, self.bottom = 52.0, self.width - 14.0, 24.0, self.height - AXIS - 2.0
        self.x = x.scale(self.left, self.right, air)
        self.y = y.scale(self.bottom, self.top, air)
        self.parts: list[str] = []
        for value in y.ticks(5):
            self.parts.append(line(self.left, self.y(value), self.right, self.y(value), "grid"))
            self.parts.append(text(self.left - 7, self.y(value) + 4, short(value), "end"))
        told = numbered(x.ticks(max(3, self.width // 75))) if marks is None else marks
        self.parts += axis(self.x, told, self.bottom, across)
        self.parts.append(text(4, 12, up, "start"))

    def line(self, points: Points, kind: str, title: str = "") -> None:
        """Joined points; where one is not finite it is left out."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points if self._holds(x, y))
        told = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<polyline class="{kind}" fill="none" points="{path}">{told}</polyline>')

    def dots(self, points: Points, kind: str) -> None:
        """A round mark a point, all in one path."""
        self.parts.append(dots([(self.x(x), self.y(y)) for x, y in points if self._holds(x, y)], kind))

    def segment(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        self.parts.append(line(self.x(start[0]), self.y(start[1]), self.x(end[0]), self.y(end[1]), kind))

    def svg(self, label: str) -> str:
        return svg(self.height, self.parts, label, self.width)

    def _holds(self, x: float, y: float) -> bool:
        return self.x_extent.holds(x) and self.y_extent.holds(y)


def svg(height: float, parts: Sequence[str], label: str, width: int = WIDTH) -> str:
    wide = ' class="wide"' if width > PANEL + 20 else ""
    size = f'viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}"'
    return f'<svg {size}{wide} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def linear(low: float, high: float, start: float, stop: float, air: float = 0.04) -> Scale:
    """Maps [low, high] to [start, stop] with a little air; a single value lands in the middle."""
    room = air * (high - low) if high > low else max(abs(low), 1.0) * 0.5
    low, high = low - room, high + room
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(f * power for f in (1, 2, 5, 10) if span / (f * power) <= count)
    first, last = math.ceil(round(low / step, 9)), math.floor(round(high / step, 9))
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; within less than a decade round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high]
    return inside if len(inside) > 3 else ticks(low, high)


def axis(x: Scale, marks: Mapping[float, str], y: float, label: str) -> list[str]:
    """Ticks with words below `y`, and what the axis means."""
    drawn = [
        line(x(v), y, x(v), y + 4, "axis") + text(x(v), y + 16, words, "middle") for v, words in marks.items()
    ]
    span = (x(min(marks)) + x(max(marks))) / 2 if marks else WIDTH / 2
    return [*drawn, text(span, y + 32, label, "middle")]


def numbered(values: Iterable[float]) -> dict[float, str]:
    """Each tick with its number."""
    return {value: short(value) for value in values}


def short(value: float) -> str:
    """A tick's number: `0.25`, `1200`, `3e-05`."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}"


def row_name(name: str, y: float) -> str:
    shown = name if len(name) <= 30 else name[:29] + "…"
    return text(LABELS - 12, y + 4, shown, "end")


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dots(points: Points, kind: str) -> str:
    """Round marks at pixels."""
    marks = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return f'<path class="dots {kind}" d="{marks}"/>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def numbers(row: Mapping[str, object], *keys: str) -> tuple[float, ...] | None:
    """The row's values under `keys`, or None if one is missing or not finite."""
    values = [row.get(key) for key in keys]
    if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return tuple(float(value) for value in values)  # type: ignore[arg-type]
    return None


def verdict_kind(verdict: str) -> str:
    """The style class of a verdict: `pass`, `fail`, or `other` ("compiled, not run here" is neither)."""
    return next((kind for kind in ("pass", "fail") if verdict.startswith(kind)), "other")
