"""Figures of answers held against the truth: training curves, ROC, reliability, scatter, lines over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tlexport.evidence.report.figures import axes
from tlexport.evidence.report.figures.axes import Extent, Frame, Points

UNIT = Extent(0.0, 1.0)
FEW = 250  # points of a scatter that do not hide each other


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
    """A dot a point on equal axes with the diagonal; logarithmic where all are positive and span three decades.

    Many points are drawn faintly, so that their density shows.
    """
    every = [value for point in points for value in point]
    positive = bool(every) and min(every) > 0 and max(every) > 1e3 * min(every)
    extent = Extent.of(every, log=positive)
    if extent is None:
        return ""
    frame = Frame(extent, extent, across=across, up=up, size=(axes.PANEL, 340))
    frame.dots(points, f"faint {kind}" if len(points) > FEW else kind)
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
