"""Figures of answers held against the truth: training curves, ROC, reliability, scatter, quantiles, confusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from tlexport.evidence.report.figures import axes
from tlexport.evidence.report.figures.axes import Extent, Frame, Points

UNIT = Extent(0.0, 1.0)


def curve(points: Sequence[tuple[float, float | None]], title: str) -> str:
    """A small panel: one quantity over epochs, its last value written at the end."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    across, up = Extent.of(x for x, _ in known), Extent.of(y for _, y in known)
    if across is None or up is None:
        return ""
    frame = Frame(across, up, across="epoch", up=title, size=(axes.PANEL, 190), air=0.12)
    frame.line(known, "curve")
    x, y = frame.x(known[-1][0]), frame.y(known[-1][1])
    frame.parts.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    frame.parts.append(axes.text(x - 6, y - 7, f"{known[-1][1]:.4g}", "end"))
    return frame.svg(title)


def unit_curves(
    curves: Mapping[str, Points], kinds: Mapping[str, str], *, across: str, up: str, guide: Points, label: str
) -> str:
    """Curves within the unit square (ROC, precision against recall), and a dashed guide: what chance would give."""
    frame = Frame(UNIT, UNIT, across=across, up=up, size=(axes.PANEL, 320), air=0.02)
    frame.line(guide, "guide")
    for name, points in curves.items():
        frame.line(points, f"series {kinds[name]}", name)
    return frame.svg(label)


def reliability(bins: Sequence[Mapping[str, float]], kind: str, title: str) -> str:
    """A dot a bin: mean confidence across, share of right ones upward with its interval; on the diagonal nothing is missing.

    bins: confidence, accuracy, accuracy_low, accuracy_high, samples.
    """
    frame = Frame(
        UNIT, UNIT, across="stated probability", up=f"{title}: observed share", size=(axes.PANEL, 320)
    )
    frame.segment((0, 0), (1, 1), "guide")
    for held in bins:
        x = held["confidence"]
        frame.segment((x, held["accuracy_low"]), (x, held["accuracy_high"]), f"whisker {kind}")
    points = [(held["confidence"], held["accuracy"]) for held in bins]
    frame.line(points, f"series thin {kind}")
    frame.dots(points, f"big {kind}")
    return frame.svg(f"reliability diagram of {title}")


def scatter(points: Points, kind: str, *, across: str, up: str, label: str) -> str:
    """A dot a sample on equal axes with the diagonal; logarithmic where all are positive and span three decades."""
    every = [value for point in points for value in point]
    positive = bool(every) and min(every) > 0 and max(every) > 1e3 * min(every)
    extent = Extent.of(every, log=positive)
    if extent is None:
        return ""
    frame = Frame(extent, extent, across=across, up=up, size=(axes.PANEL, 340))
    frame.dots(points, f"faint {kind}")
    frame.segment((extent.low, extent.low), (extent.high, extent.high), "guide")
    return frame.svg(label)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    kinds: Mapping[str, str],
    *,
    across: str,
    up: str,
    marks: Mapping[float, str] | None = None,
) -> str:
    """Lines over a common axis, as wide as the page. `marks`: what to write at these places instead of numbers."""
    every = [point for points in series.values() for point in points]
    x, y = Extent.of(p[0] for p in every), Extent.of(p[1] for p in every)
    if x is None or y is None:
        return ""
    frame = Frame(x, y, across=across, up=up, size=(axes.WIDTH, 260), marks=marks)
    for name, points in series.items():
        frame.line(points, f"series {kinds[name]}", name)
    return frame.svg(up)


def confusion(
    counts: Sequence[Sequence[int]],
    names: Sequence[str],
    title: str,
    before: Sequence[Sequence[int]] | None = None,
) -> str:
    """A square a pair: rows are the truth, columns the decision, darker is a larger share of the row.

    counts: int [K][K]. With `before` a cell that differs from it says by how much.
    """
    side = max(24.0, min(74.0, 330.0 / len(names)))
    left, top = 96.0, 40.0
    width, height = int(left + side * len(names) + 12), top + side * len(names) + 58
    size = "tiny" if side < 34 else ""
    parts = [axes.text(left, 14, title, "start", "strong"), axes.text(left, 31, "decision →", "start")]
    parts.append(axes.text(left - 8, 31, "truth ↓", "end"))
    for i, row in enumerate(counts):
        y, total = top + side * i, max(1, sum(row))
        parts.append(axes.text(left - 8, y + side / 2 + 4, clipped(names[i], 14), "end", size))
        parts.append(
            _below(left + side * (i + 0.5), top + side * len(names) + 12, clipped(names[i], 9), size)
        )
        for j, count in enumerate(row):
            x = left + side * j
            change = 0 if before is None else count - before[i][j]
            told = f"{names[i]} decided as {names[j]}: {count}" + (f" ({change:+d})" if change else "")
            shade = f'fill-opacity="{0.06 + 0.5 * count / total if count else 0:.2f}"'
            kind = "right" if i == j else "wrong"
            rect = f'<rect class="cell {kind}{" changed" if change else ""}" x="{x:.1f}" y="{y:.1f}" '
            rect += f'width="{side:.1f}" height="{side:.1f}" {shade}/>'
            words = axes.text(
                x + side / 2, y + side / 2 + (0 if change else 4), str(count), "middle", f"count {size}"
            )
            if change:
                words += axes.text(x + side / 2, y + side / 2 + 12, f"{change:+d}", "middle", f"delta {size}")
            parts.append(f"<g><title>{escape(told)}</title>{rect}{words if count or change else ''}</g>")
    return axes.svg(height, parts, f"confusion matrix: {title}", width)


def _below(x: float, y: float, words: str, size: str) -> str:
    style = f' class="{size}"' if size else ""
    turned = f'transform="rotate(35 {x:.1f} {y:.1f})"'
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="start" {turned}>{escape(words)}</text>'


def clipped(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
