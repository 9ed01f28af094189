"""Figures of timed calls: how they are distributed, and when they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from tlexport.evidence.report.figures import axes
from tlexport.evidence.report.figures.axes import AXIS, LABELS, WIDTH, Extent

BINS = 90
TALL = 34  # pixels of a row
RIGHT = WIDTH - 30
DRAWN = 1500  # marks a variant in a time line
QUANTILES = (0.5, 0.9, 0.99)
BEYOND = 10  # calls that are slower than a quantile that is drawn


def histograms(samples: Mapping[str, Sequence[float]], kinds: Mapping[str, str]) -> str:
    """One row a variant on one logarithmic axis: a histogram of its calls in ms, with bars at the quantiles of `samples`.

    p90 and p99 are drawn only where enough calls are beyond them to be seen: 10.
    """
    rows = _finite(samples)
    extent = Extent.of((ms for values in rows.values() for ms in values), log=True)
    if extent is None:
        return ""
    x = extent.scale(LABELS, RIGHT)
    width = (RIGHT - LABELS) / BINS
    parts = []
    for index, (name, values) in enumerate(rows.items()):
        base = TALL * (index + 1) - 4
        counts = [0] * BINS
        for ms in values:
            counts[min(BINS - 1, max(0, int((x(ms) - LABELS) / width)))] += 1
        tallest = max(counts)
        bars = "".join(
            f"M{LABELS + i * width:.1f} {base}v{-(TALL - 10) * count / tallest:.1f}h{width:.1f}V{base}z"
            for i, count in enumerate(counts)
            if count
        )
        marks = "".join(
            axes.line(x(at), base - TALL + 8, x(at), base + 3, "median" if q == 0.5 else "quantile")
            for q in QUANTILES
            if q == 0.5 or round((1 - q) * len(values), 6) >= BEYOND
            for at in (values[min(len(values) - 1, math.ceil(q * len(values)) - 1)],)
        )
        title = f"{name}: {len(values)} calls, median {values[(len(values) - 1) // 2]:.4g} ms"
        bars = f'<path class="bars {kinds.get(name, "other")}" d="{bars}"/>'
        parts += [
            axes.row_name(name, base - TALL / 2 + 5),
            axes.line(LABELS, base, RIGHT, base, "grid"),
            f"<g><title>{escape(title)}</title>{bars}{marks}</g>",
        ]
    bottom = TALL * len(rows) + 2
    parts += axes.axis(x, axes.numbered(extent.ticks(9)), bottom, "milliseconds a call, logarithmic")
    return axes.svg(bottom + AXIS, parts, "latency of every variant: histograms")


def time_lines(
    samples: Mapping[str, Sequence[float]], started: Mapping[str, Sequence[float]], kinds: Mapping[str, str]
) -> str:
    """One panel a variant: when a call started (s since the timing began) across, how long it took (ms) upward."""
    rows = {
        name: [
            (s, ms) for s, ms in zip(started[name], values, strict=True) if ms > 0 and math.isfinite(s + ms)
        ]
        for name, values in samples.items()
        if name in started and len(started[name]) == len(values)
    }
    rows = {name: points for name, points in rows.items() if points}
    across = Extent.of(s for points in rows.values() for s, _ in points)
    if across is None:
        return ""
    x, tall = across.scale(LABELS, RIGHT), 52
    parts = []
    for index, (name, points) in enumerate(rows.items()):
        top, base = tall * index + 6, tall * (index + 1) - 6
        own = Extent.of((ms for _, ms in points), log=True)
        assert own is not None
        y = own.scale(base, top)
        marks = axes.dots([(x(s), y(ms)) for s, ms in _thinned(points)], f"small {kinds.get(name, 'other')}")
        parts += [
            axes.row_name(name, (top + base) / 2 - 6),
            axes.text(
                LABELS - 12, (top + base) / 2 + 12, f"{own.low:.3g} to {own.high:.3g} ms", "end", "faint"
            ),
            axes.line(LABELS, base + 2, RIGHT, base + 2, "grid"),
            f"<g><title>{escape(name)}</title>{marks}</g>",
        ]
    bottom = tall * len(rows)
    parts += axes.axis(x, axes.numbered(across.ticks(9)), bottom, "seconds since the timing began")
    return axes.svg(bottom + AXIS, parts, "latency of every variant over time")


def _finite(samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    rows = {n: sorted(ms for ms in values if math.isfinite(ms) and ms > 0) for n, values in samples.items()}
    return {name: values for name, values in rows.items() if values}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about DRAWN points in order: of each stretch of time the shortest, the middle and the longest call."""
    if len(points) <= DRAWN:
        return list(points)
    size = math.ceil(3 * len(points) / DRAWN)
    kept = []
    for start in range(0, len(points), size):
        ordered = sorted(points[start : start + size], key=lambda point: point[1])
        kept += [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    return kept
