"""Figures with a mark a variant: drops beside the gate, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from tlexport.evidence.report.figures import axes
from tlexport.evidence.report.figures.axes import AXIS, LABELS, ROW, WIDTH, verdict_kind


def dot_intervals(rows: Sequence[Mapping[str, object]], gate: float | None) -> str:
    """One row a variant: the drop with its interval, and the line it must stay left of.

    rows: name, drop, drop_low, drop_high (numbers or None), verdict.
    """
    drawn = [(row, values) for row in rows if (values := axes.numbers(row, "drop_low", "drop", "drop_high"))]
    if not drawn:
        return ""
    spread = [value for _, values in drawn for value in values] + [0.0] + ([gate] if gate is not None else [])
    x = axes.linear(min(spread), max(spread), LABELS, WIDTH - 30)
    bottom = ROW * len(drawn)
    parts = [axes.line(x(0), 0, x(0), bottom, "axis")]
    for index, (row, (low, drop, high)) in enumerate(drawn):
        y = ROW * index + ROW / 2
        kind = verdict_kind(str(row.get("verdict", "")))
        title = f"{row['name']}: drop {drop:.4f} [{low:.4f}, {high:.4f}]"
        mark = axes.line(x(low), y, x(high), y, kind)
        mark += f'<circle class="{kind}" cx="{x(drop):.1f}" cy="{y}" r="4"/>'
        parts += [axes.row_name(str(row["name"]), y), f"<g><title>{escape(title)}</title>{mark}</g>"]
    if gate is not None:
        parts.append(axes.line(x(gate), 0, x(gate), bottom, "gate"))
    label = (
        "drop against the reference; dashed: the gate" if gate is not None else "drop against the reference"
    )
    parts += axes.axis(x, axes.numbered(axes.ticks(min(spread), max(spread))), bottom, label)
    return axes.svg(bottom + AXIS, parts, "drop of each variant with its interval")


def front(points: Sequence[Mapping[str, object]], gate: float | None, across: str) -> str:
    """One mark a candidate: time across, drop at worst upward, the area its size; those on the Pareto front are named.

    The line is the front of drop and time alone. `across` says what time is.
    points: name, time, drop_high, size_bytes (numbers or None), verdict, front (bool).
    """
    drawn = [(p, v) for p in points if (v := axes.numbers(p, "time", "drop_high", "size_bytes")) and v[0] > 0]
    if not drawn:
        return ""
    drops = [v[1] for _, v in drawn] + [0.0] + ([gate] if gate is not None else [])
    times, largest = axes.Extent.of((v[0] for _, v in drawn), log=True), max(v[2] for _, v in drawn)
    assert times is not None
    height, right = 300, WIDTH - 150
    x, down = times.scale(70, right), axes.linear(min(drops), max(drops), height - AXIS - 10, 24)
    parts = [axes.text(4, 12, "drop at worst", "start")]
    for value in axes.ticks(min(drops), max(drops), 5):
        parts.append(axes.line(70, down(value), right, down(value), "grid"))
        parts.append(axes.text(64, down(value) + 4, f"{value:g}", "end"))
    if gate is not None:
        parts.append(axes.line(70, down(gate), right, down(gate), "gate"))
    joined = _staircase([(v[0], v[1]) for p, v in drawn if p.get("front")])
    if len(joined) > 1:
        path = " ".join(f"{x(time):.1f},{down(drop):.1f}" for time, drop in joined)
        parts.append(f'<polyline class="curve" fill="none" points="{path}"/>')
    taken: list[tuple[float, float]] = []
    for point, (time, drop, size) in sorted(drawn, key=lambda one: -one[1][2]):
        parts.append(_mark(point, (x(time), down(drop)), (time, drop, size), largest))
        if point.get("front"):
            place = _free((x(time) + 3 + 7 * math.sqrt(size / max(largest, 1)) + 5, down(drop) + 4), taken)
            taken.append(place)
            parts.append(axes.text(*place, str(point["name"]), "start"))
    parts += axes.axis(x, axes.numbered(times.ticks(9)), height - AXIS, across)
    return axes.svg(height, parts, "drop and time of every candidate")


def _mark(
    point: Mapping[str, object], at: tuple[float, float], values: tuple[float, ...], largest: float
) -> str:
    time, drop, size = values
    kind = verdict_kind(str(point.get("verdict", "")))
    title = f"{point['name']}: {time:.3g} ms, drop at worst {drop:.4f}, {size / 1e6:.1f} MB"
    radius = 3 + 7 * math.sqrt(size / max(largest, 1))
    circle = (
        f'<circle class="{kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:.1f}" fill-opacity="0.45"/>'
    )
    return f"<g><title>{escape(title)}</title>{circle}</g>"


def _staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line below and left of which there is no point."""
    corners: list[tuple[float, float]] = []
    for time, drop in sorted(points):
        if not corners or drop < corners[-1][1]:
            corners += [*([(time, corners[-1][1])] if corners else []), (time, drop)]
    return corners


def _free(place: tuple[float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The place for a name, moved up where another name stands."""
    x, y = place
    while any(abs(y - other) < 13 and abs(x - beside) < 170 for beside, other in taken):
        y -= 13
    return x, y
