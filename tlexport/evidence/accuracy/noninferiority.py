"""Is a variant as good as the reference, worse, or are there too few samples to tell?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tlexport.evidence.accuracy.bootstrap import ROUNDING, Interval


class Judgement(BaseModel):
    """A verdict with its reason."""

    model_config = ConfigDict(frozen=True)

    verdict: Literal["pass", "fail", "undecided"]
    needed: int | None  # samples that would decide, about; None: decided already, or no number would
    reason: str


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: the chance that any of the true hypotheses is rejected is below the level.

    Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6(2).
    In the order given; monotone, at most 1.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def decide(
    interval: Interval,
    limit: float,
    *,
    n: int,
    p_adjusted: float,
    units: int | None = None,
    metric: str = "",
    share_of: float | None = None,
) -> Judgement:
    """Non-inferiority of a drop within `limit` (in the drop's unit), judged on n samples.

    Passes where "the drop is at the limit or beyond" is rejected at half of the interval's error, by `p_adjusted`
    (adjusted for the other variants, and for what unseen flips could do). Fails where the whole interval is beyond
    the limit. Otherwise the samples are too few.
    units: how many groups the samples came in, if in groups. metric: for the reason. share_of: the reference's
    value where the limit is a share of it.
    """
    tail = (1 - interval.confidence) / 2
    stated = f"max_drop {limit:.4g}"
    if share_of:
        stated = f"max_drop {limit / share_of:.4g} of the reference's {share_of:.4g}"
    seen = f"{metric} drop {interval.estimate:.4g}, at worst {interval.high:.4g}".lstrip()
    seen += f" ({100 * interval.confidence:.4g}% interval)"
    if p_adjusted <= tail:
        return Judgement(verdict="pass", needed=None, reason=f"{seen}, within {stated}")
    if interval.low > limit + ROUNDING:
        best = f"{metric} drop {interval.estimate:.4g}, at best {interval.low:.4g}".lstrip()
        reason = f"{best} ({100 * interval.confidence:.4g}% interval), over {stated}"
        return Judgement(verdict="fail", needed=None, reason=reason)
    held = "" if interval.high > limit + ROUNDING else f" at p {p_adjusted:.2g}, adjusted, above {tail:.4g}"
    needed = _needed(interval, limit, n, p_adjusted)
    return Judgement(
        verdict="undecided",
        needed=needed,
        reason=f"{seen} against {stated}: undecided{held}, {_asked(needed, n, units)}",
    )


def _needed(interval: Interval, limit: float, n: int, p_adjusted: float) -> int | None:
    """Samples at which the interval, shrunk with 1/sqrt(n) about its estimate, would end at the limit."""
    distance, tail = limit - interval.estimate, (1 - interval.confidence) / 2
    if abs(distance) <= ROUNDING:
        return None
    if distance < 0:
        return _rounded_up(n * ((interval.estimate - interval.low) / distance) ** 2, n)
    if interval.method == "constant":
        return _for_unseen(limit, n, p_adjusted, tail)
    stricter = min(1.0, (interval.p or p_adjusted) / p_adjusted)  # what the adjustment leaves of the tail
    normal = NormalDist()
    widened = normal.inv_cdf(1 - tail * stricter) / normal.inv_cdf(1 - tail)
    return _rounded_up(n * ((interval.high - interval.estimate) * widened / distance) ** 2, n)


def _for_unseen(limit: float, n: int, p_adjusted: float, tail: float) -> int | None:
    """Samples without a flip that would exclude a share of flips at the limit: (1 - limit)^n, times what Holm made of it."""
    if not 0 < limit < 1:
        return None
    adjustment = max(1.0, p_adjusted / (1 - limit) ** n)
    return _rounded_up(math.log(tail / adjustment) / math.log1p(-limit), n)


def _rounded_up(samples: float, n: int) -> int:
    """To two significant digits, and more than there are."""
    wanted = math.ceil(max(samples, n + 1))
    step = int(10 ** max(0, math.floor(math.log10(wanted)) - 1))
    return -(-wanted // step) * step


def _asked(needed: int | None, n: int, units: int | None) -> str:
    has = f"{n}" if units is None else f"{n} in {units} groups"
    if needed is None:
        return f"no number of samples would tell (has {has})"
    groups = "" if units is None else f" in {_rounded_up(units * needed / n, units)} groups"
    return f"needs about {needed} samples{groups} (has {has})"
