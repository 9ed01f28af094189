"""Slower or not: from the medians of rounds (two builds side by side) or of sessions (a build and a stored baseline).

The interval is two-sided at `confidence`; a build fails if its lower end is beyond the limit, passes if its upper end is
within, and is undecided in between. So where nothing changed and nothing is tolerated, (1 - confidence) / 2 of the gates
are false alarms, 2.5% at 95%: bench/gate.py measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tlexport.results import GateVerdict

Floats = NDArray[np.float64]
Reading = Literal["pass", "fail", "undecided"]

CONFIDENCE = 0.95
TOLERANCE = 0.05  # of the latency: what a user's machine, left alone, does not reach by itself
FEWEST_SESSIONS = 5
# The machine may be so much slower or faster than when the baseline was recorded, and times still be compared.
CONTROL_LIMIT = 0.10
# What occasions on one machine differ by beyond what their sessions show, as a standard deviation of log time, until a history
# tells better; it weighs as much as PRIOR_FREEDOM accepted runs.
PRIOR_BETWEEN, PRIOR_FREEDOM = 0.005, 4
RATIO = "ratio of median latency, new over old"
BEYOND_KNOWLEDGE = 100  # times the samples at hand: farther than an extrapolation by 1/sqrt(n) can be trusted


class Session(BaseModel):
    """A process that loaded the artifact anew: its median time, and that of the fixed workload timed between its calls."""

    model_config = ConfigDict(frozen=True)

    seconds: float = Field(gt=0)
    control: float = Field(gt=0, description="seconds of the fixed workload")


def side_by_side(
    old: Floats, new: Floats, *, name: str, against: str, tolerance: float, confidence: float = CONFIDENCE
) -> GateVerdict:
    """Compare medians [R] in seconds of R rounds, in each of which both builds were loaded anew and took turns.

    The estimate is the pseudo-median of the rounds' log ratios and its interval that of the signed-rank test (Hollander,
    Wolfe and Chicken 2014, Nonparametric Statistical Methods, section 3.3): exact for any noise, as the order within a round is
    drawn at random. On the same rounds, a percentile bootstrap of 8 to 20 raises twice as many false alarms as it states
    (bench/gate.py). Undecided below the 6 rounds that a 95% interval needs.
    """
    ratios = np.log(np.asarray(new, np.float64) / np.asarray(old, np.float64))
    interval = signed_rank(ratios, confidence)
    return _verdict(interval, tolerance, confidence, name, against, len(ratios), "rounds")


def against_baseline(
    occasions: Sequence[Sequence[Session]],
    new: Sequence[Session],
    *,
    name: str,
    against: str,
    tolerance: float,
    confidence: float = CONFIDENCE,
) -> GateVerdict:
    """Compare sessions with those of the baseline, occasions[0]; the others are accepted runs since then.

    What differs between processes is not seen within one, so a session counts once, however many calls it made (Kalibera
    and Jones 2013, Rigorous Benchmarking in Reasonable Time). The sessions' log medians are compared at equal speed of the
    control (`adjusted`); if that speed itself has moved by more than CONTROL_LIMIT, nothing is said about the model.

    Raises ValueError below FEWEST_SESSIONS on either side.
    """
    if min(len(occasions[0]), len(new)) < FEWEST_SESSIONS:
        raise ValueError(
            f"{len(occasions[0])} and {len(new)} sessions; at least {FEWEST_SESSIONS} of each are needed"
        )
    interval = adjusted([*occasions, new], confidence)
    verdict = _verdict(interval, tolerance, confidence, name, against, len(new), "sessions")
    moved = machine_moved(occasions[0], new, confidence)
    return (
        verdict.model_copy(update={"verdict": "undecided", "needed": None, "reason": moved})
        if moved
        else verdict
    )


def machine_moved(old: Sequence[Session], new: Sequence[Session], confidence: float = CONFIDENCE) -> str:
    """How the machine's speed differs, if the control's ratio is surely beyond CONTROL_LIMIT (Welch's t of its logarithms)."""
    before, after = (np.log([session.control for session in of]) for of in (old, new))
    estimate, low, high = welch(before, after, confidence)
    if low > math.log1p(CONTROL_LIMIT) or high < -math.log1p(CONTROL_LIMIT):
        share = math.expm1(abs(estimate))
        how = "slower" if estimate > 0 else "faster"
        return (
            f"undecided: the machine is {share:.0%} {how} than when the baseline was recorded (by the fixed workload); "
            "measure when it is as it was, or record anew with --save-baseline"
        )
    return ""


def signed_rank(values: Floats, confidence: float) -> tuple[float, float, float]:
    """Pseudo-median of values [n] and its exact interval; infinite ends where n is too small for one."""
    n = len(values)
    first, second = np.triu_indices(n)
    walsh = np.sort((values[first] + values[second]) / 2)
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):
        ways[rank:] += ways[:-rank].copy()
    below = np.cumsum(ways / 2.0**n)  # P(rank sum <= k)
    cut = int(np.searchsorted(below, (1 - confidence) / 2, side="right"))
    if cut == 0:
        return float(np.median(walsh)), -math.inf, math.inf
    return float(np.median(walsh)), float(walsh[cut - 1]), float(walsh[-cut])


def welch(old: Floats, new: Floats, confidence: float) -> tuple[float, float, float]:
    """Difference of means, new minus old, with Welch's interval."""
    from scipy.special import stdtrit

    parts = np.array([old.var(ddof=1) / len(old), new.var(ddof=1) / len(new)])
    variance, difference = float(parts.sum()), float(new.mean() - old.mean())
    if variance == 0:
        return difference, difference, difference
    freedom = variance**2 / float(parts[0] ** 2 / (len(old) - 1) + parts[1] ** 2 / (len(new) - 1))
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(variance)
    return difference, difference - half, difference + half


def adjusted(occasions: Sequence[Sequence[Session]], confidence: float) -> tuple[float, float, float]:
    """Log ratio of the last occasion over the first, at equal speed of the control, and its interval.

    Analysis of covariance: log time = occasion + slope x log control, the slope within occasions, so that a model that does
    not share the control's ups and downs is not burdened with them. The variance that occasions have beyond their sessions'
    enters twice, once for each end: a prediction interval, its degrees of freedom after Satterthwaite. It is the accepted runs'
    between baseline and new one (by the method of moments), moderated by PRIOR_BETWEEN as in Smyth 2004, Linear Models and
    Empirical Bayes Methods, section 3: alone, few runs say little. They widen the interval and leave its middle, so that many
    small losses add up and show.
    """
    from scipy.special import stdtrit

    effects, covariance, freedom = _fitted(occasions)
    difference = float(effects[-1] - effects[0])
    variance = float(covariance[-1, -1] + covariance[0, 0] - 2 * covariance[0, -1])
    between, runs = _between(effects[:-1], covariance[:-1, :-1])
    weight = PRIOR_FREEDOM + runs
    moderated = (PRIOR_FREEDOM * PRIOR_BETWEEN**2 + runs * between) / weight
    whole = variance + 2 * moderated
    found = whole**2 / (variance**2 / freedom + (2 * moderated) ** 2 / weight)
    half = float(stdtrit(found, (1 + confidence) / 2)) * math.sqrt(whole)
    return difference, difference - half, difference + half


def _between(effects: Floats, covariance: Floats) -> tuple[float, int]:
    """Variance of occasions' effects [k] beyond their sampling covariance [k, k], and its degrees of freedom."""
    count = len(effects)
    if count < 2:
        return 0.0, 0
    sampling = (np.trace(covariance) - covariance.sum() / count) / (count - 1)
    return max(0.0, float(effects.var(ddof=1) - sampling)), count - 1


def _fitted(occasions: Sequence[Sequence[Session]]) -> tuple[Floats, Floats, int]:
    """Each occasion's effect [K], their covariance [K, K] and its degrees of freedom."""
    times = np.log([session.seconds for of in occasions for session in of])
    control = np.log([session.control for of in occasions for session in of])
    belongs = np.repeat(np.arange(len(occasions)), [len(of) for of in occasions])
    design = (belongs[:, None] == np.arange(len(occasions))).astype(np.float64)
    within = control - design @ (design.T @ control / design.sum(axis=0))
    if np.abs(within).max() > 1e-9:  # a control that stands still has no slope
        design = np.column_stack([design, control - control.mean()])
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ times
    freedom = len(times) - design.shape[1]
    residual = times - design @ found
    covariance = inverse * float(residual @ residual) / freedom
    count = len(occasions)
    return found[:count], covariance[:count, :count], freedom


def needed(value: float, low: float, high: float, limit: float, count: int) -> int | None:
    """About how many units would decide, the interval shrinking with 1/sqrt(n); None if no reasonable number would."""
    distance = abs(value - limit)
    half = value - low if value > limit else high - value
    if not math.isfinite(half) or half >= math.sqrt(BEYOND_KNOWLEDGE) * distance:
        return None
    wanted = count * (half / distance) ** 2
    power = 10.0 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return max(round(math.ceil(wanted / power) * power), count + 1)


def reading(low: float, high: float, limit: float) -> Reading:
    return "fail" if low > limit else "pass" if high <= limit else "undecided"


def _verdict(
    interval: tuple[float, float, float],
    tolerance: float,
    confidence: float,
    name: str,
    against: str,
    count: int,
    unit: Literal["rounds", "sessions"],
) -> GateVerdict:
    """`interval`: log ratio, its lower and its upper end."""
    value, low, high = interval
    limit = math.log1p(tolerance)
    verdict = reading(low, high, limit)
    more = needed(value, low, high, limit, count) if verdict == "undecided" else None
    known = math.isfinite(low)
    ends = f" ({math.exp(low):.3f} to {math.exp(high):.3f})" if known else ""
    reason = (
        f"{name}: {math.exp(value):.3f}{ends} times the latency of {against}, tolerated {1 + tolerance:g}"
    )
    if verdict == "undecided":
        reason += f": undecided after {count} {unit}, " + (
            f"about {more} would tell"
            if more
            else "more of them would not tell"
            if known
            else "too few for an interval"
        )
    return GateVerdict(
        gate="latency",
        name=name,
        against=against,
        measure=RATIO,
        verdict=verdict,
        value=math.exp(value),
        low=math.exp(low) if known else None,
        high=math.exp(high) if known else None,
        confidence=confidence,
        tolerance=tolerance,
        limit=1 + tolerance,
        count=count,
        unit=unit,
        needed=more,
        reason=reason,
    )
