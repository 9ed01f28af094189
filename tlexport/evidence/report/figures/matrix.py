"""The confusion matrix as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tlexport.evidence.report.figures import axes

Counts = Sequence[Sequence[int]]

LEFT, TOP = 96.0, 40.0
UPRIGHT = 4  # classes whose names fit below their columns unturned
SMALL = 34  # pixels of a square that needs small numbers


def confusion(counts: Counts, names: Sequence[str], title: str, before: Counts | None = None) -> str:
    """A square a pair: rows are the truth, columns the decision, darker is a larger share of the row.

    counts: int [K][K]. With `before` a cell that differs from it is framed and says by how much.
    """
    side = max(24.0, min(74.0, 330.0 / len(names)))
    edge = LEFT + side * len(names)
    size = "tiny" if side < SMALL else ""
    parts = [
        axes.text(LEFT, 14, title, "start", "strong"),
        axes.text(LEFT, 31, "decision →", "start"),
        axes.text(LEFT - 8, 31, "truth ↓", "end"),
    ]
    for i, row in enumerate(counts):
        middle = TOP + side * (i + 0.5) + 4
        parts.append(axes.text(LEFT - 8, middle, clipped(names[i], 14), "end", size))
        parts.append(_below(LEFT + side * (i + 0.5), edge - LEFT + TOP, names, i, size))
        for j, count in enumerate(row):
            change = 0 if before is None else count - before[i][j]
            told = f"{names[i]} decided as {names[j]}: {count}" + (f" ({change:+d})" if change else "")
            square = _square(
                (LEFT + side * j, TOP + side * i), side, (i == j, count / max(1, sum(row))), change
            )
            words = _words((LEFT + side * (j + 0.5), middle), (count, change), i == j, size)
            parts.append(f"<g><title>{escape(told)}</title>{square}{words}</g>")
    lower = 26 if len(names) <= UPRIGHT else 62
    width = max(int(edge) + 44, int(LEFT) + 7 * len(title))
    return axes.svg(edge - LEFT + TOP + lower, parts, f"confusion matrix: {title}", width)


def _square(corner: tuple[float, float], side: float, what: tuple[bool, float], change: int) -> str:
    right, share = what
    kind = f"cell {'right' if right else 'wrong'}{' changed' if change else ''}"
    inner = side - 1.5
    return (
        f'<rect class="{kind}" x="{corner[0]:.1f}" y="{corner[1]:.1f}" width="{inner:.1f}" height="{inner:.1f}" '
        f'fill-opacity="{0.06 + 0.5 * share if share else 0:.2f}"/>'
    )


def _words(at: tuple[float, float], numbers: tuple[int, int], right: bool, size: str) -> str:
    """The count, and below it by how much it changed; an empty square says nothing."""
    count, change = numbers
    x, y = at
    if not count and not change:
        return ""
    if not change:
        return axes.text(x, y, str(count), "middle", f"count {size}".strip())
    kind = "better" if (change > 0) == right else "worse"
    first = axes.text(x, y - 5, str(count), "middle", f"count {size}".strip())
    return first + axes.text(x, y + (5 if size else 9), f"{change:+d}", "middle", f"{kind} {size}".strip())


def _below(x: float, y: float, names: Sequence[str], index: int, size: str) -> str:
    """A column's name below it, turned where there are many."""
    if len(names) <= UPRIGHT:
        return axes.text(x, y + 16, clipped(names[index], 12), "middle", size)
    kind = f' class="{size}"' if size else ""
    turned = f'transform="rotate(35 {x:.1f} {y + 12:.1f})"'
    words = escape(clipped(names[index], 10))
    return f'<text{kind} x="{x:.1f}" y="{y + 12:.1f}" text-anchor="start" {turned}>{words}</text>'


def clipped(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
