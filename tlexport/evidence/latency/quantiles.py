"""Percentiles of timed calls, each with an interval that holds for any distribution, or withheld."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]


class Percentile(BaseModel):
    """A quantile of the latency and its interval; all three None with a reason where it is withheld."""

    model_config = ConfigDict(frozen=True)

    q: float
    value_ms: float | None
    low_ms: float | None
    high_ms: float | None
    count: int
    confidence: float
    reason: str = ""


def percentile(seconds: Floats, q: float, confidence: float = 0.95) -> Percentile:
    """The q-quantile of times [n] in seconds.

    The interval has an upper end only if q^n <= 1 - confidence. Below that (299 calls for p99, 29 for p90, 5 for
    p50, at 95%) nothing bounds the quantile, so it is withheld. Calls are taken as independent; slow drifts make
    the true interval wider.
    """
    bounds = bounds_of(seconds, q, confidence)
    value = low = high = None
    reason = ""
    if bounds is None:
        needed = math.ceil(math.log(1 - confidence) / math.log(q))
        reason = f"{len(seconds)} calls; p{100 * q:g} needs {needed} for a bound at {100 * confidence:g}%"
    else:
        value, low, high = 1e3 * float(np.quantile(seconds, q)), 1e3 * bounds[0], 1e3 * bounds[1]
    return Percentile(
        q=q,
        value_ms=value,
        low_ms=low,
        high_ms=high,
        count=len(seconds),
        confidence=confidence,
        reason=reason,
    )


def bounds_of(times: Floats, q: float, confidence: float) -> tuple[float, float] | None:
    """The q-quantile's interval from times [n] in any order and unit; None where it has no upper end.

    Two order statistics, X(l) and X(u) with P(l <= Bin(n, q) < u) >= confidence (David and Nagaraja 2003, Order
    Statistics, section 7.1). The upper end takes half of the error where it can and all that it needs where it
    cannot; the lower end takes the rest, or is 0 where that does not suffice, as no time is negative.
    """
    from scipy.special import bdtr

    n, error = len(times), 1 - confidence
    if n == 0 or q**n > error:
        return None
    cumulative = bdtr(np.arange(n), n, q)  # P(Bin <= k)
    upper = min(int(np.searchsorted(cumulative, 1 - error / 2)) + 1, n)
    left = error - (1 - cumulative[upper - 1])
    lower = int(np.searchsorted(cumulative, left, side="right"))
    ordered = np.sort(times)
    return float(ordered[lower - 1]) if lower else 0.0, float(ordered[upper - 1])
