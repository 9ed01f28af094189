"""The report's figures: inline SVG made of lines and text, coloured by the page's style sheet.

Text is escaped here; numbers that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Scale = Callable[[float], float]

WIDTH = 760
LABELS = 200  # room for a row's name, left of the plot
ROW = 26
AXIS = 34


def dot_intervals(rows: Sequence[Mapping[str, object]], gate: float | None) -> str:
    """One row a variant: the drop with its interval, and the line it must stay left of.

    rows: name, drop, drop_low, drop_high (numbers or None), verdict.
    """
    drawn = [(row, values) for row in rows if (values := _numbers(row, "drop_low", "drop", "drop_high"))]
    if not drawn:
        return ""
    spread = [value for _, values in drawn for value in values] + [0.0] + ([gate] if gate is not None else [])
    x = _linear(min(spread), max(spread), LABELS, WIDTH - 30)
    parts = [_line(x(0), 0, x(0), ROW * len(drawn), "axis")]
    for index, (row, (low, drop, high)) in enumerate(drawn):
        y = ROW * index + ROW / 2
        kind = verdict_kind(str(row.get("verdict", "")))
        title = f"{row['name']}: drop {drop:.4f} [{low:.4f}, {high:.4f}]"
        mark = (
            _line(x(low), y, x(high), y, kind) + f'<circle class="{kind}" cx="{x(drop):.1f}" cy="{y}" r="4"/>'
        )
        parts += [_row_name(str(row["name"]), y), f"<g><title>{escape(title)}</title>{mark}</g>"]
    if gate is not None:
        parts += [_line(x(gate), 0, x(gate), ROW * len(drawn), "gate")]
    parts += _axis(
        x, _ticks(min(spread), max(spread)), ROW * len(drawn), "drop against the reference; dashed: the gate"
    )
    return _svg(ROW * len(drawn) + AXIS, parts, "drop of each variant with its interval")


def front(points: Sequence[Mapping[str, object]], gate: float | None, across: str) -> str:
    """One mark a candidate: time across, drop at worst upward, the area its size; those on the Pareto front are joined.

    points: name, time, drop_high, size_bytes (numbers or None), verdict, front (bool). `across` says what time is.
    """
    drawn = [(p, v) for p in points if (v := _numbers(p, "time", "drop_high", "size_bytes")) and v[0] > 0]
    if not drawn:
        return ""
    height, drops = 300, [v[1] for _, v in drawn] + [0.0] + ([gate] if gate is not None else [])
    times, largest = [v[0] for _, v in drawn], max(v[2] for _, v in drawn)
    linear = _linear(math.log10(min(times)), math.log10(max(times)), 70, WIDTH - 150)
    down = _linear(min(drops), max(drops), height - AXIS - 10, 16)
    parts: list[str] = []
    for value in _ticks(min(drops), max(drops), 5):
        parts += [
            _line(70, down(value), WIDTH - 150, down(value), "grid"),
            _text(64, down(value) + 4, f"{value:g}", "end"),
        ]
    if gate is not None:
        parts.append(_line(70, down(gate), WIDTH - 150, down(gate), "gate"))
    best = sorted((linear(math.log10(v[0])), down(v[1])) for p, v in drawn if p.get("front"))
    if len(best) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in best)
        parts.append(f'<polyline class="curve" fill="none" points="{path}"/>')
    for point, (time, drop, size) in drawn:
        x, y, radius = linear(math.log10(time)), down(drop), 3 + 7 * math.sqrt(size / max(largest, 1))
        kind = verdict_kind(str(point.get("verdict", "")))
        title = f"{point['name']}: {time:.3g} ms, drop at worst {drop:.4f}, {size / 1e6:.1f} MB"
        parts.append(
            f"<g><title>{escape(title)}</title>"
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill-opacity="0.45"/></g>'
        )
        if point.get("front"):
            parts.append(_text(x + radius + 4, y + 4, str(point["name"]), "start"))
    scale: Scale = lambda ms: linear(math.log10(ms))  # noqa: E731
    parts += _axis(scale, _log_ticks(min(times), max(times)), height - AXIS, across)
    return _svg(height, parts, "drop and time of every candidate")


def latency_strips(samples: Mapping[str, Sequence[float]]) -> str:
    """One row a variant on a logarithmic axis: every timed call as a tick, the median as a bar."""
    rows = {
        name: sorted(ms for ms in values if math.isfinite(ms) and ms > 0) for name, values in samples.items()
    }
    rows = {name: values for name, values in rows.items() if values}
    if not rows:
        return ""
    low, high = min(v[0] for v in rows.values()), max(v[-1] for v in rows.values())
    linear = _linear(math.log10(low), math.log10(high), LABELS, WIDTH - 30)

    def x(ms: float) -> float:
        return linear(math.log10(ms))

    parts = []
    for index, (name, values) in enumerate(rows.items()):
        y = ROW * index + ROW / 2
        ticks = "".join(f"M{x(ms):.1f} {y - 6}v12" for ms in values)
        median = x(values[len(values) // 2])
        parts += [
            _row_name(name, y),
            f'<path class="calls" d="{ticks}"/>',
            _line(median, y - 9, median, y + 9, "median"),
        ]
    parts += _axis(
        x, _log_ticks(low, high), ROW * len(rows), "milliseconds a call, each tick one call; bar: median"
    )
    return _svg(ROW * len(rows) + AXIS, parts, "latency of every timed call by variant")


def curve(points: Sequence[tuple[float, float | None]], title: str) -> str:
    """A small panel: one quantity over epochs, its last value written at the end."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return ""
    width, height = 370, 170
    xs, ys = [x for x, _ in known], [y for _, y in known]
    across = _linear(min(xs), max(xs), 50, width - 60)
    down = _linear(min(ys), max(ys), height - AXIS - 6, 14)
    path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in known)
    parts = [f'<polyline class="curve" fill="none" points="{path}"/>']
    for value in _ticks(min(ys), max(ys), 3):
        parts += [
            _line(50, down(value), width - 60, down(value), "grid"),
            _text(44, down(value) + 4, f"{value:g}", "end"),
        ]
    whole = [tick for tick in _ticks(min(xs), max(xs), 5) if tick == int(tick)]
    parts += _axis(across, whole, height - AXIS, f"{title}, by epoch")
    parts += [f'<circle class="end" cx="{across(xs[-1]):.1f}" cy="{down(ys[-1]):.1f}" r="3"/>',
              _text(across(xs[-1]) + 7, down(ys[-1]) + 4, f"{ys[-1]:.4g}", "start")]  # fmt: skip
    return _svg(height, parts, title, width)


def timeline(points: Sequence[Mapping[str, object]], unit: str, title: str) -> str:
    """One mark a recording in the order made, with its range; the dashed line is at the first, the baseline.

    points: label, value, low, high (numbers), verdict.
    """
    drawn = [(point, values) for point in points if (values := _numbers(point, "low", "value", "high"))]
    if not drawn:
        return ""
    height, ends = 260, [value for _, values in drawn for value in values]
    across = _linear(0, len(drawn) - 1, 70, WIDTH - 30)
    down = _linear(min(ends), max(ends), height - AXIS - 6, 24)
    parts = [_text(70, 14, title, "start")]
    for value in _ticks(min(ends), max(ends), 5):
        parts += [
            _line(70, down(value), WIDTH - 30, down(value), "grid"),
            _text(64, down(value) + 4, f"{value:g}", "end"),
        ]
    first = down(drawn[0][1][1])
    parts.append(_line(70, first, WIDTH - 30, first, "gate"))
    for index, (point, (low, value, high)) in enumerate(drawn):
        x, kind = across(index), verdict_kind(str(point.get("verdict", "")))
        told = f"{point['label']}: {value:.4g} {unit} [{low:.4g}, {high:.4g}], {point.get('verdict', '')}"
        mark = _line(x, down(low), x, down(high), kind)
        mark += f'<circle class="{kind}" cx="{x:.1f}" cy="{down(value):.1f}" r="4"/>'
        parts.append(f"<g><title>{escape(told)}</title>{mark}</g>")
    labels = f"{drawn[0][0]['label']} to {drawn[-1][0]['label']}; {unit}: median and range of the sessions"
    parts.append(_text((70 + WIDTH - 30) / 2, height - 10, labels, "middle"))
    return _svg(height, parts, title)


STANDALONE = (
    "text{font:12px system-ui,sans-serif;fill:#333}line{stroke:#333}.grid{stroke:#ddd}.gate{stroke:#555;stroke-dasharray:5 4}"
    "line.pass{stroke:#1a7f37}circle.pass{fill:#1a7f37}line.fail{stroke:#c0392b}circle.fail{fill:#c0392b}"
    "line.other{stroke:#8a6d00}circle.other{fill:#8a6d00}"
)


def standalone(svg: str) -> str:
    """A figure as a file of its own: with the name space and the colours that a page would give it."""
    head, _, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STANDALONE}</style>{rest}\n' if svg else ""


def verdict_kind(verdict: str) -> str:
    """The style class of a verdict: `pass`, `fail`, or `other` ("compiled, not run here" is neither)."""
    return next((kind for kind in ("pass", "fail") if verdict.startswith(kind)), "other")


def _svg(height: float, parts: list[str], label: str, width: int = WIDTH) -> str:
    size = f'viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _linear(low: float, high: float, start: float, stop: float) -> Scale:
    """Maps [low, high] to [start, stop] with a little air; a single value lands in the middle."""
    air = 0.04 * (high - low) or max(abs(low), 1.0) * 0.5
    low, high = low - air, high + air
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(f * power for f in (1, 2, 5, 10) if span / (f * power) <= count)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high], or its ends where there are none."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high]
    return inside or [low, high]


def _axis(x: Scale, ticks: Sequence[float], y: float, label: str) -> list[str]:
    """Ticks with numbers below `y`, and what the axis means."""
    marks = [
        _line(x(value), y, x(value), y + 4, "axis") + _text(x(value), y + 16, f"{value:.3g}", "middle")
        for value in ticks
    ]
    span = (x(ticks[0]) + x(ticks[-1])) / 2 if ticks else WIDTH / 2
    return [*marks, _text(span, y + 31, label, "middle")]


def _row_name(name: str, y: float) -> str:
    shown = name if len(name) <= 30 else name[:29] + "…"
    return _text(LABELS - 12, y + 4, shown, "end")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _numbers(row: Mapping[str, object], *keys: str) -> tuple[float, ...] | None:
    """The row's values under `keys`, or None if one is missing or not finite."""
    values = [row.get(key) for key in keys]
    if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return tuple(float(value) for value in values)  # type: ignore[arg-type]
    return None
