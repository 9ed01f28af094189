"""Counts of a tensor's values in bounded memory, and where each method would clip them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tlexport.graph.grid import Flavour, Range

Method = Literal["max", "entropy", "percentile", "mse"]

BINS = 2048
LEVELS = 128  # of |x| in 8 bits with a sign
CANDIDATES = 128  # thresholds that `mse` tries for each bound


class Histogram:
    """Counts of x in 2048 equal bins of |x| from 0 to `limit` for either sign, beside the exact lowest and highest value.

    `limit` starts as the first batch's largest |x|. Where a later one is larger the limit doubles and neighbouring
    bins merge, so that at least half of the bins stay in use and nothing has to be seen twice.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self.limit = 0.0
        self.signed = np.zeros((2, BINS), np.int64)  # counts of x >= 0, then of x < 0

    @property
    def counts(self) -> np.ndarray:
        """Counts of |x|: int64 [2048]."""
        return np.asarray(self.signed.sum(0))

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))

    def observe(self, values: np.ndarray, *, counts: bool) -> bool:
        """Add float32 values of any shape; False if they are not all finite. `counts=False` keeps only the bounds."""
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        if counts:
            self._count(values)
        return True

    def _count(self, values: np.ndarray) -> None:
        if self.largest < np.finfo(np.float32).tiny:
            self.signed[0, 0] += values.size
            return
        if self.limit == 0:
            self.limit = self.largest
        while self.largest > self.limit:
            merged = self.signed.reshape(2, -1, 2).sum(2)
            self.signed = np.concatenate([merged, np.zeros_like(merged)], axis=1)
            self.limit *= 2
        bins = np.abs(values).ravel()
        bins *= BINS / self.limit
        np.minimum(bins, BINS - 1, out=bins)
        places = bins.astype(np.intp)
        places[values.ravel() < 0] += BINS
        self.signed += np.bincount(places, minlength=2 * BINS).reshape(2, BINS)

    def clipped(self, threshold: float) -> Range:
        return Range(max(self.low, -threshold), min(self.high, threshold))


def range_of(histogram: Histogram, method: Method, percentile: float, flavour: Flavour) -> Range:
    """The interval to quantise over; `flavour` says which grid `mse` minimises the error of."""
    if method == "max" or histogram.limit == 0:
        return histogram.clipped(histogram.largest)
    if method == "mse":
        return _least_squares(histogram, flavour)
    width = histogram.limit / BINS
    used = min(BINS, int(histogram.largest / width) + 1)
    counts = histogram.counts[:used].astype(np.float64)
    share = np.cumsum(counts) / counts.sum()
    bins = (
        1 + int(np.searchsorted(share, percentile / 100))
        if method == "percentile"
        else _least_divergent(counts)
    )
    return histogram.clipped(min(bins * width, histogram.largest))


def _least_squares(histogram: Histogram, flavour: Flavour) -> Range:
    """The interval with the least mean squared error of rounding and clipping.

    First one threshold for both signs. The step of a grid with a zero point depends on both bounds, so that there
    each is then searched with the other one held.
    """
    error = _SquaredError(histogram, flavour)
    thresholds = np.linspace(0, histogram.largest, CANDIDATES + 1)[1:]
    both = error.least(np.maximum(histogram.low, -thresholds), np.minimum(histogram.high, thresholds))
    if flavour == "trt" or histogram.low >= 0 or histogram.high <= 0:
        return both
    highs = np.linspace(0, histogram.high, CANDIDATES + 1)[1:]
    upper = error.least(np.full_like(highs, both.low), highs)
    lows = np.linspace(histogram.low, 0, CANDIDATES + 1)[:-1]
    return error.least(lows, np.full_like(lows, upper.high))


class _SquaredError:
    """The error of candidate intervals, with x spread evenly over each bin.

    Bin 0 counts at most what its neighbour does: exact zeros, half of what a ReLU hands on, cost nothing on either grid.
    """

    def __init__(self, histogram: Histogram, flavour: Flavour) -> None:
        self.flavour = flavour
        self.edges = np.arange(BINS + 1) * (histogram.limit / BINS)
        self.mass = histogram.signed.astype(np.float64)
        self.mass[:, 0] = np.minimum(self.mass[:, 0], self.mass[:, 1])

    def least(self, lows: np.ndarray, highs: np.ndarray) -> Range:
        """Of the intervals [lows[i], highs[i]] the one with the least error."""
        upper, lower = np.maximum(highs, 0), np.maximum(-lows, 0)
        if self.flavour == "trt":
            steps = np.maximum(upper, lower) / 127
            below = np.full(len(steps), 128)
        else:
            steps = (upper + lower) / 255
            below = np.rint(lower / steps)  # the zero point is an integer, which moves both bounds
        lower, upper = below * steps, (255 - below) * steps
        errors = self._of(0, upper, steps) + self._of(1, lower, steps)
        best = int(np.argmin(errors))
        return Range(float(lows[best]), float(highs[best]))

    def _of(self, sign: int, bounds: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Sum of squared errors of one sign's values, per candidate: the integral over each bin, times its count.

        With x = step * (n + f), |f| <= 1/2, the integral of (step * f)^2 from 0 to x is step^3 * (n / 12 + f^3 / 3);
        from the bound on, that of (x - bound)^2 is (x - bound)^3 / 3.
        """
        if not self.mass[sign].any():
            return np.zeros(len(bounds))
        step, bound = steps[:, None], bounds[:, None]
        inside = np.minimum(self.edges, bound) / step
        whole = np.rint(inside)
        rounding = step**3 * (whole / 12 + _cube(inside - whole) / 3)
        clipping = _cube(np.maximum(self.edges - bound, 0)) / 3
        return np.asarray(np.diff(rounding + clipping, axis=1) @ self.mass[sign])


def _cube(values: np.ndarray) -> np.ndarray:
    return np.asarray(values * values * values)  # a power takes ten times as long


def _least_divergent(counts: np.ndarray) -> int:
    """How many of the bins [n] to keep so that 128 levels describe the clipped distribution best.

    For every candidate i >= 128: P is the first i bins with all mass beyond added to the last one; Q spreads the mass
    of each of 128 equal groups evenly over the group's non-empty bins. Sums over groups are differences of cumulative
    sums, so that all candidates are judged at once. Bin 0 is given its neighbour's count: zeros cost nothing to
    represent, and after a ReLU they would outweigh everything else.
    """
    counts = counts.copy()
    counts[0] = counts[1] if len(counts) > 1 else counts[0]
    if len(counts) <= LEVELS or not counts.any():
        return len(counts)
    kept = np.arange(LEVELS, len(counts) + 1)
    edges = np.arange(LEVELS + 1) * kept[:, None] // LEVELS
    mass = np.diff(_cumulative(counts)[edges], axis=1)
    filled = np.diff(_cumulative(counts > 0)[edges], axis=1)
    total, inside, last = counts.sum(), _cumulative(counts)[kept], counts[kept - 1]
    beyond = total - inside

    own = _cumulative(_x_log_x(counts))[kept] - _x_log_x(last) + _x_log_x(last + beyond)
    filled[:, -1] += (last == 0) & (beyond > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(np.maximum(mass / filled / inside[:, None], np.finfo(np.float64).tiny))
    mass[:, -1] += beyond
    cross = np.where(mass > 0, mass * log_q, 0).sum(1)
    return int(kept[np.argmin(own - cross)])


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts * np.log(np.maximum(counts, 1)))
