"""The difference of two paired proportions: what so many harmful and mended decisions say about the population.

Tango 1998, Statistics in Medicine 17, 891-908: a score test that holds where few decisions change or none, which is where
a bootstrap sees no spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

_NORMAL = NormalDist()
_STEPS = 60  # halvings of the interval: to 1e-18 of it


def p_value(harmful: int, mended: int, n: int, limit: float) -> float:
    """One-sided, of H0: the share of harmful less the share of mended decisions is `limit` or more in the population.

    harmful, mended: decisions of `n` independent samples that became wrong, and right. limit: between -1 and 1.
    """
    _require(harmful, mended, n)
    return 1.0 if limit <= -1 else 0.0 if limit >= 1 else _NORMAL.cdf(_score(harmful, mended, n, limit))


def interval(harmful: int, mended: int, n: int, confidence: float) -> tuple[float, float]:
    """The differences that the score test does not reject at two-sided `confidence`."""
    _require(harmful, mended, n)
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    estimate = (harmful - mended) / n
    low = _crossing(lambda limit: _score(harmful, mended, n, limit) - z, -1.0, estimate)
    high = _crossing(lambda limit: _score(harmful, mended, n, limit) + z, estimate, 1.0)
    return low, high


def _score(harmful: int, mended: int, n: int, limit: float) -> float:
    """The estimate's distance from `limit` in standard errors under it (Tango 1998, equations 3 to 5); falls with `limit`."""
    distance = harmful - mended - n * limit
    b = -harmful - mended + (2 * n - harmful + mended) * limit
    c = -mended * limit * (1 - limit)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (
        4 * n
    )  # of mended decisions, as likely as `limit` allows
    variance = n * (2 * share + limit * (1 - limit))
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function passes zero between `low` and `high`; an end where it does not."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _require(harmful: int, mended: int, n: int) -> None:
    if min(harmful, mended) < 0 or harmful + mended > n or n < 1:
        raise ValueError(f"{harmful} harmful and {mended} mended decisions of {n}")
