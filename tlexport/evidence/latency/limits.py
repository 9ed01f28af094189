"""Whether a percentile is within a limit, and where that cannot be told, what would tell."""

from __future__ import annotations

from typing import Literal

from tlexport.timings import Percentile


def side(found: Percentile, limit_ms: float) -> Literal["within", "over", "undecided"]:
    """On which side of a limit a percentile is for sure: its whole interval has to be there."""
    if found.low_ms is not None and found.low_ms > limit_ms:
        return "over"
    return "within" if found.high_ms is not None and found.high_ms <= limit_ms else "undecided"


def told(found: Percentile) -> str:
    """`p99 1.2 ms (1.1 to 1.4)`, or why there is none."""
    name = f"p{100 * found.q:g}"
    if found.value_ms is None or found.low_ms is None:
        return f"{name} withheld: {found.reason}"
    if found.high_ms is None:
        return f"{name} {found.value_ms:.4g} ms, at least {found.low_ms:.4g} ({found.reason})"
    return f"{name} {found.value_ms:.4g} ms ({found.low_ms:.4g} to {found.high_ms:.4g})"


def needs(found: Percentile, limit_ms: float) -> str:
    """What would decide: the half-width shrinks with the square root of the count."""
    if found.value_ms is None or found.low_ms is None or found.high_ms is None:
        return "measure longer (--seconds, --samples)"
    gap = abs(found.value_ms - limit_ms)
    if not gap:
        return "no count would tell: it sits on the limit"
    half = (found.high_ms - limit_ms) if found.value_ms < limit_ms else (limit_ms - found.low_ms)
    return f"needs about {found.count * max(1.1, ((half + gap) / gap) ** 2):.2g} calls (has {found.count})"
