"""Whether a series of times stands still: a test that ends the warm-up, and one for what was counted."""

from __future__ import annotations

import math

import numpy as np

from tlexport.evidence.latency.quantiles import Floats

LEAST = 40  # values before anything is said
CLIP = 5.0  # robust standard deviations
LEVEL = 0.05
MATTERS = 0.02  # of the median: less is not worth waiting for
DRIFT_LEVEL = 0.01
DRIFT_MATTERS = 0.05
DRIFT_PARTS = 20


def settled(times: Floats) -> bool:
    """Whether the warm-up is over after these times [n], in the order made, in any unit.

    Two tests, and both must pass. MSER (White 1997, An effective truncation heuristic for bias reduction in simulation
    output; Hoad, Robinson and Davies 2010): the cut that gives the mean of the rest its least standard error lies in
    the first half, or cutting at the half gives the same mean but for MATTERS of it. Mann and Kendall (Mann 1945): what
    follows the cut has no trend, or none that changes it by MATTERS of its median.
    """
    if len(times) < LEAST:
        return False
    half, cut = len(times) // 2, truncation(times)
    if cut > half and abs(_mean(times[half:]) - _mean(times[cut:])) > MATTERS * float(np.median(times)):
        return False
    return not _matters(times[min(cut, half) :], LEVEL, MATTERS)


def truncation(times: Floats) -> int:
    """How many of the first times [n] MSER leaves out: argmin over d of sum((y_i - mean_d)^2, i >= d) / (n - d)^2.

    Times beyond CLIP robust deviations from the median are clipped: an interruption must not look like a beginning.
    """
    clipped, middle = _clipped(times), float(np.median(times))
    left = np.arange(len(times), 0, -1)
    sums, squares = (np.cumsum(part[::-1])[::-1] for part in (clipped - middle, (clipped - middle) ** 2))
    # Rounding leaves a residue where nothing varies; a sum of squares is not negative.
    errors = np.maximum(squares - sums**2 / left, 0.0) / left**2
    # A few values agree by chance: the last tenth is no stretch to judge by.
    return int(np.argmin(errors[: len(times) - max(5, len(times) // 10)]))


def drift(seconds: Floats) -> str:
    """A trend over the counted times [n], in words; empty where there is none, or fewer than 2 * DRIFT_PARTS times.

    Mann and Kendall over the medians of DRIFT_PARTS equal parts. It is only told where the slope (Sen 1968) changes the
    median by DRIFT_MATTERS from the first part to the last: with enough calls anything is significant.
    """
    if len(seconds) < 2 * DRIFT_PARTS:
        return ""
    medians = np.array([np.median(part) for part in np.array_split(seconds, DRIFT_PARTS)])
    if not _matters(medians, DRIFT_LEVEL, DRIFT_MATTERS):
        return ""
    change = _change(medians) / float(np.median(medians))
    return (
        f"not stationary: the median {'rose' if change > 0 else 'fell'} by {abs(change):.0%} from the first calls to the last "
        f"(Mann-Kendall p {trend(medians):.1g})"
    )


def trend(values: Floats) -> float:
    """Two-sided p-value of no trend in values [n] by Mann and Kendall, with ties and a continuity correction."""
    n = len(values)
    score = float(np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0 or score == 0:
        return 1.0
    return math.erfc((abs(score) - 1) / math.sqrt(2 * variance))


def _clipped(times: Floats) -> Floats:
    middle = float(np.median(times))
    spread = 1.4826 * float(np.median(np.abs(times - middle)))
    # A series that is constant but for outliers has no spread; MATTERS then says what is one.
    reach = max(CLIP * spread, MATTERS * abs(middle))
    return np.clip(times, middle - reach, middle + reach)


def _mean(times: Floats) -> float:
    return float(_clipped(times).mean())


def _matters(values: Floats, level: float, share: float) -> bool:
    """A trend that is significant and changes the median by `share` of it."""
    parts = np.array_split(values, min(len(values), 100))  # all pairs of more would take too long
    few = np.array([np.median(part) for part in parts])
    return trend(few) < level and abs(_change(few)) > share * abs(float(np.median(few)))


def _change(values: Floats) -> float:
    """From the first value to the last by Sen's slope: the median slope of all pairs."""
    i, j = np.triu_indices(len(values), 1)
    return float(np.median((values[j] - values[i]) / (j - i))) * (len(values) - 1)
