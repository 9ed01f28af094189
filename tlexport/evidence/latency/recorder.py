"""One candidate's calls while they are being timed, and what the clock itself costs.

Where the clock would be more than a small share of a call, several calls are timed as one sample: the sample is then their
mean, and a percentile is one of means, which says less about single slow calls.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat

import numpy as np

from tlexport.evidence.latency import stationarity

Call = Callable[[], object]

WARMUP_VALUE_NS = 1e6
WARMUP_GROWTH = 1.25  # between two looks: the more values there are, the less one more tells
GAUGED = 3  # calls that say how long one is
CLOCK_READINGS = 2001


def clock_ns() -> float:
    """What the timing shows for a call that does nothing, in nanoseconds: the median of 2001."""
    recorder = Recorder(lambda: None, began=0.0)
    return float(np.median([recorder.timed()[1] for _ in range(CLOCK_READINGS)]))


class Recorder:
    """`ns` and `started` hold the counted samples, each of `calls_per_sample` calls."""

    def __init__(self, call: Call, began: float) -> None:
        self.call = call
        self.began = began
        self.ns: list[float] = []
        self.started: list[float] = []
        self.calls_per_sample = 1
        self.warmup_calls = 0
        self.stationary = False
        self.dropped = ""

    def warm_up(self, limit_s: float) -> float:
        """Call until the times stand still (stationarity.settled), or the time is up; returns the last half's median in ns a call.

        The first call is outside the limit, as it may compile; with a limit of 0 it is the only one. Short calls are taken
        together, so that a value lasts WARMUP_VALUE_NS: clock rates and caches settle in milliseconds, however many
        calls fit into one.
        """
        first = self.timed()[1]
        if limit_s <= 0:
            self.warmup_calls = 1
            return first
        deadline = time.perf_counter() + limit_s
        self.warmup_calls = 1 + GAUGED
        quick = float(np.median([self.timed()[1] for _ in range(GAUGED)]))
        self.calls_per_sample = max(1, math.ceil(WARMUP_VALUE_NS / max(quick, 1.0)))
        values: list[float] = []
        look = stationarity.LEAST
        while time.perf_counter() < deadline and not self.stationary:
            values.append(self.timed()[1] / self.calls_per_sample)
            self.warmup_calls += self.calls_per_sample
            if len(values) >= look:
                self.stationary = stationarity.settled(np.array(values))
                look = math.ceil(WARMUP_GROWTH * look)
        self.calls_per_sample = 1
        return float(np.median(values[len(values) // 2 :] or [quick]))

    def share_clock(self, median_ns: float, clock: float, share: float) -> None:
        """Time so many calls together that the clock is at most `share` of a sample."""
        self.calls_per_sample = max(1, math.ceil(clock / (share * max(median_ns - clock, 1.0))))

    def block(self, settle: int, settle_s: float, counted: int) -> None:
        """`counted` samples after at least `settle` calls and, where there are any, at least `settle_s` of them."""
        until = time.perf_counter() + settle_s * bool(settle)
        for _ in range(settle):
            self.call()
        while time.perf_counter() < until:
            self.call()
        for _ in range(counted):
            start, elapsed = self.timed()
            self.ns.append(elapsed / self.calls_per_sample)
            self.started.append(start / 1e9 - self.began)

    def timed(self) -> tuple[int, int]:
        """When a sample began and how long it took, in ns."""
        call, times = self.call, repeat(None, self.calls_per_sample)
        start = time.perf_counter_ns()
        for _ in times:
            call()
        return start, time.perf_counter_ns() - start


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection inside a timed call; as it was afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
