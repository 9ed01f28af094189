"""Percentiles of timed calls, each with an interval that holds for any distribution, or withheld.

Two levels of support: a bound at 95% by order statistics (299 calls for p99), below which a value is withheld, and MLPerf's
stricter rule (270336 calls for p99), above which a value may be quoted without its interval.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.timings import Percentile

Floats = NDArray[np.float64]

MLPERF_CONFIDENCE = 0.99
MLPERF_MARGIN = 1 / 20  # of the tail beyond the percentile
MLPERF_ROUNDED_TO = 2**13
BATCHES = 10
LEVELS = (0.5, 0.75, 0.9, 0.95)  # where calls are asked how alike neighbours are, beside the quantile itself


def percentile(seconds: Floats, q: float, confidence: float = 0.95) -> Percentile:
    """The q-quantile of times [n] in seconds.

    The interval has an upper end only if q^n <= 1 - confidence. Below that (299 calls for p99, 29 for p90, 5 for
    p50, at 95%) nothing bounds the quantile, so it is withheld. Calls are taken as independent; slow drifts make
    the true interval wider.
    """
    bounds = bounds_of(seconds, q, confidence)
    if bounds is None:
        return _told(seconds, q, confidence, reason=_too_few(len(seconds), q, confidence))
    value = 1e3 * float(np.quantile(seconds, q))
    return _told(seconds, q, confidence, value_ms=value, low_ms=1e3 * bounds[0], high_ms=1e3 * bounds[1])


def queued_percentile(seconds: Floats, q: float, confidence: float = 0.95) -> Percentile:
    """The q-quantile of latencies [n] in seconds, in the order of their scheduled starts, of requests that queue.

    Neighbours in a queue wait alike, so n of them say as little as n / inflation() independent ones; the interval's ends are
    the quantiles at which so many draws would bound q (Clopper and Pearson 1934). Where so few cannot bound it above, the value
    is that of this run alone and has no upper end. In M/M/1 and M/D/1 queues of known quantiles and loads of 0.3 to 0.9
    at most 7% of the runs state an interval of the 99% quantile that misses it (nominal: 5%); tests repeat this.
    """
    from scipy.special import betaincinv

    n, error = len(seconds), 1 - confidence
    if n == 0 or q**n > error:
        return _told(seconds, q, confidence, reason=_too_few(n, q, confidence))
    worth = n / inflation(seconds, q, confidence)
    inside = worth * q
    ordered = np.sort(seconds)
    low = betaincinv(inside, worth - inside + 1, error / 2)
    high, reason = None, ""
    if q**worth <= error:
        level = betaincinv(inside + 1, worth - inside, 1 - error / 2)
        high = 1e3 * float(ordered[min(n - 1, math.ceil(level * n))])
    else:
        reason = (
            f"no upper bound: {n} requests that queue are worth {worth:.0f} independent ones of the "
            f"{_needed(q, confidence)} that a bound at {100 * confidence:g}% needs"
        )
    return _told(
        seconds, q, confidence, worth=worth, reason=reason, value_ms=1e3 * float(np.quantile(seconds, q)),
        low_ms=1e3 * float(ordered[max(0, math.floor(low * n) - 1)]), high_ms=high,
    )  # fmt: skip


def inflation(series: Floats, q: float, confidence: float = 0.95) -> float:
    """How many times the variance of an empirical quantile's level exceeds that of independent values; at least 1.

    Non-overlapping batch means (Schmeiser 1982, Batch size effects in the analysis of simulation output) of whether a value
    is below the quantile (Heidelberger and Lewis 1984, Quantile estimation in dependent sequences), widened for the few
    batches by Student's t. Asked at LEVELS too, and the largest counts: a run that saw few slow spells
    shows at its own far quantile neither how slow they are nor how long they last.
    """
    from scipy.special import ndtri, stdtrit

    few = stdtrit(BATCHES - 1, (1 + confidence) / 2) / ndtri((1 + confidence) / 2)
    size = len(series) // BATCHES
    if size < 1:
        return float(len(series))
    found = [1.0]
    for value in np.quantile(series, (*LEVELS, q)):
        below = series <= value
        share = below.mean()
        if 0 < share < 1:
            means = below[: size * BATCHES].reshape(BATCHES, size).mean(axis=1)
            spread = ((means - share) ** 2).sum() / (BATCHES - 1)
            found.append(float(few**2 * size * spread / (share * (1 - share))))
    return max(found)


def mlperf_count(q: float) -> int:
    """Calls that MLPerf asks for before a q-quantile is quoted: 8192 for p50, 24576 for p90, 270336 for p99.

    n = z^2 q (1 - q) / margin^2 at 99% confidence with a margin of a twentieth of the tail, rounded up to a multiple of
    2^13 (MLPerf Inference Rules, appendix on the number of queries; Reddi et al. 2020, section 4.3).
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + MLPERF_CONFIDENCE) / 2))
    needed = z**2 * q * (1 - q) / (MLPERF_MARGIN * (1 - q)) ** 2
    return math.ceil(needed / MLPERF_ROUNDED_TO) * MLPERF_ROUNDED_TO


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


def _told(times: Floats, q: float, confidence: float, **known: Any) -> Percentile:
    strict, has = mlperf_count(q), len(times)
    note = f"p{100 * q:g} by MLPerf's rule needs {strict} calls and has {has}: quote it with its interval"
    values = {"value_ms": None, "low_ms": None, "high_ms": None} | known
    supported = has >= strict and not values.get("reason")
    return Percentile(
        q=q, count=has, confidence=confidence, supported=supported, note="" if has >= strict else note, **values
    )  # fmt: skip


def _needed(q: float, confidence: float) -> int:
    return math.ceil(math.log(1 - confidence) / math.log(q))


def _too_few(count: int, q: float, confidence: float) -> str:
    return f"{count} calls; p{100 * q:g} needs {_needed(q, confidence)} for a bound at {100 * confidence:g}%"
