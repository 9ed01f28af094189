"""The figure of a baseline's history, and a figure as a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tlexport.evidence.report.figures import axes
from tlexport.evidence.report.figures.axes import WIDTH, Extent, Frame

STANDALONE = (
    "text{font:12px system-ui,sans-serif;fill:#333}line{stroke:#333}.grid{stroke:#ddd}.gate{stroke:#555;stroke-dasharray:5 4}"
    "line.pass{stroke:#1a7f37}circle.pass{fill:#1a7f37}line.fail{stroke:#c0392b}circle.fail{fill:#c0392b}"
    "line.other{stroke:#8a6d00}circle.other{fill:#8a6d00}"
)


def timeline(points: Sequence[Mapping[str, object]], unit: str, title: str) -> str:
    """One mark a recording in the order made, with its range; the dashed line is at the first, the baseline.

    points: label, value, low, high (numbers), verdict.
    """
    drawn = [(point, found) for point in points if (found := axes.numbers(point, "low", "value", "high"))]
    extent = Extent.of(value for _, found in drawn for value in found)
    if extent is None:
        return ""
    labels = f"{drawn[0][0]['label']} to {drawn[-1][0]['label']}; median and range of the sessions"
    frame = Frame(
        Extent(0, len(drawn) - 1), extent, across=labels, up=f"{title}, {unit}", size=(WIDTH, 260), marks={}
    )
    first = drawn[0][1][1]
    frame.segment((0, first), (len(drawn) - 1, first), "gate")
    for index, (point, (low, value, high)) in enumerate(drawn):
        kind = axes.verdict_kind(str(point.get("verdict", "")))
        told = f"{point['label']}: {value:.4g} {unit} [{low:.4g}, {high:.4g}], {point.get('verdict', '')}"
        x = frame.x(index)
        mark = axes.line(x, frame.y(low), x, frame.y(high), kind)
        mark += f'<circle class="{kind}" cx="{x:.1f}" cy="{frame.y(value):.1f}" r="4"/>'
        frame.parts.append(f"<g><title>{escape(told)}</title>{mark}</g>")
    return frame.svg(title)


def standalone(svg: str) -> str:
    """A figure as a file of its own: with the name space and the colours that a page would give it."""
    head, _, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STANDALONE}</style>{rest}\n' if svg else ""
