"""How long a call takes: candidates take turns in one process, and what the timed calls allow to be said.

A closed loop: the next call starts when the last one returned. It says what one client sees on an otherwise
idle machine, not how long a request waits under load. Calls must be synchronous: a CUDA runner waits for its
stream.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tlexport.evidence.latency import histogram, stationarity
from tlexport.evidence.latency.quantiles import Floats, bounds_of, percentile
from tlexport.evidence.latency.recorder import Call, Recorder, clock_ns, collector_off
from tlexport.timings import Latency, Percentile

__all__ = [
    "Call",
    "Latency",
    "Percentile",
    "Schedule",
    "Speedup",
    "Throughput",
    "Timed",
    "clock_ns",
    "interleave",
    "percentile",
    "speedup",
    "summary",
    "throughput",
]

MIN_BLOCKS = 8
SCREEN_CONFIDENCE = 0.95


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Schedule(Frozen):
    """In which turns candidates are timed, and when it is enough."""

    block: int = Field(default=10, ge=1, description="consecutive calls of a candidate in one round")
    settle: int = Field(
        default=2,
        ge=0,
        description="first calls of a block, not counted: they wash out the last one's threads and caches",
    )
    settle_s: float = Field(
        default=0.002, ge=0, description="and for at least so long, so that short calls settle too"
    )
    clock_share: float | None = Field(
        default=0.01,
        gt=0,
        description="largest share of a sample that reading the clock may take: shorter calls are timed several at once",
    )
    warmup_s: float = Field(
        default=5.0, ge=0, description="longest warm-up of a candidate after its first call"
    )
    screen: int = Field(default=3, ge=1, description="rounds after which slow candidates are dropped")
    drop_ratio: float | None = Field(
        default=2.0, gt=1, description="times the best's median; None: nobody is dropped"
    )
    budget_s: float | None = Field(
        default=None,
        gt=0,
        description="after the warm-ups; stop after the last whole round that fits (one always runs)",
    )

    @model_validator(mode="after")
    def _counts_something(self) -> Schedule:
        if self.settle >= self.block:
            raise ValueError(f"settle ({self.settle}) must be smaller than block ({self.block})")
        return self

    @property
    def counted(self) -> int:
        """Calls of a block that count."""
        return self.block - self.settle


TURNS = Schedule()
LARGE_BATCH_TURNS = Schedule(block=5, settle=1, warmup_s=1.0, drop_ratio=None, budget_s=20.0)


class Timed(dict[str, Floats]):
    """Candidate -> seconds a call of every counted sample [n], in the order made, and what else was seen of it."""

    def __init__(self, recorders: Mapping[str, Recorder], clock_ns: float) -> None:
        super().__init__({name: np.array(r.ns, dtype=np.float64) / 1e9 for name, r in recorders.items()})
        self.clock_ns = clock_ns  # what timing a call that does nothing shows
        # How many calls a sample is the mean of: 1 but for calls of a few microseconds.
        self.calls_per_sample = {name: r.calls_per_sample for name, r in recorders.items()}
        # When each sample started, in seconds since the timing began.
        self.started = {name: np.array(r.started, dtype=np.float64) for name, r in recorders.items()}
        self.warmup_calls = {name: r.warmup_calls for name, r in recorders.items()}
        # Those whose warm-up ended because its time was up, not because times stood still.
        self.unsettled = tuple(name for name, r in recorders.items() if not r.stationary)
        # Those not measured to the end, and why.
        self.dropped = {name: r.dropped for name, r in recorders.items() if r.dropped}

    def followed_by(self, later: Timed) -> Timed:
        """Both, whose starts count from the same moment; no candidate is in both."""
        both = Timed({}, max(self.clock_ns, later.clock_ns))
        both.update(self | later)
        both.calls_per_sample = self.calls_per_sample | later.calls_per_sample
        both.started = self.started | later.started
        both.warmup_calls = self.warmup_calls | later.warmup_calls
        both.unsettled = self.unsettled + later.unsettled
        both.dropped = self.dropped | later.dropped
        return both


class Speedup(Frozen):
    """How many times the variant's median goes into the reference's, over `count` calls of each."""

    ratio: float
    low: float | None
    high: float | None
    confidence: float
    count: int
    method: Literal["block bootstrap", "order statistics"]


class Throughput(Frozen):
    """Items a second at one batch size; the interval is withheld (None) where there are too few blocks."""

    batch: int
    items_per_s: float
    low: float | None
    high: float | None
    confidence: float
    count: int


def interleave(
    candidates: Mapping[str, Call],
    *,
    samples: int,
    seed: int,
    protected: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
    schedule: Schedule = TURNS,
    began: float | None = None,
) -> Timed:
    """Time the candidates in turns, so that a drift of the machine meets all alike; `samples` counted samples each.

    A sample is one call, or the mean of so many that reading the clock takes at most `schedule.clock_share` of it.

    Every round gives each candidate, in a new random order, one block of calls. A candidate that is clearly
    too slow after `schedule.screen` rounds is not measured further, unless it is `protected`: it keeps the
    samples it has. The i-th sample of every candidate belongs to the same round.
    progress: called with (rounds done, rounds at most) after each round.
    began: the moment of time.perf_counter that starts count from; by default this call's own.
    """
    unknown = set(protected) - set(candidates)
    if not candidates or unknown or samples < 1:
        raise ValueError(f"nothing to time, or protected names that are no candidates: {sorted(unknown)}")
    began = time.perf_counter() if began is None else began
    total = math.ceil(samples / schedule.counted)
    rng = np.random.default_rng(seed)
    recorders = {name: Recorder(call, began) for name, call in candidates.items()}
    active = list(recorders)
    with collector_off():
        clock = clock_ns()
        for recorder in recorders.values():
            median = recorder.warm_up(schedule.warmup_s)
            if schedule.clock_share is not None:
                recorder.share_clock(median, clock, schedule.clock_share)
        deadline = math.inf if schedule.budget_s is None else time.perf_counter() + schedule.budget_s
        for turn in range(total):
            round_began = time.perf_counter()
            for index in rng.permutation(len(active)):
                left = samples - turn * schedule.counted
                counted = min(schedule.counted, left)
                recorders[active[index]].block(schedule.settle, schedule.settle_s, counted)
            if turn + 1 == schedule.screen and schedule.drop_ratio is not None:
                active = _screened(recorders, active, protected, schedule.drop_ratio)
            if progress:
                progress(turn + 1, total)
            # Only what this round allocated: a full collection takes longer than a round.
            gc.collect(0)
            now = time.perf_counter()
            if now + (now - round_began) > deadline:
                break
    return Timed(recorders, clock)


def summary(seconds: Floats, *, batch: int = 1) -> Latency:
    """Describe times [n >= 1] in seconds, in the order made, of calls that answer `batch` items each."""
    return Latency(
        count=len(seconds),
        p50=percentile(seconds, 0.5),
        p90=percentile(seconds, 0.9),
        p99=percentile(seconds, 0.99),
        mean_ms=1e3 * float(seconds.mean()),
        min_ms=1e3 * float(seconds.min()),
        max_ms=1e3 * float(seconds.max()),
        throughput_per_s=batch / float(seconds.mean()),
        histogram=histogram.encode(seconds),
        drift=stationarity.drift(seconds),
    )


def speedup(
    reference: Floats,
    variant: Floats,
    *,
    block: int = TURNS.counted,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Speedup:
    """The ratio of medians of times [n] and [m] in seconds, over the calls that both have, from one interleave().

    Calls within a block are alike, so whole rounds of `block` calls are resampled, the same for both. Below
    MIN_BLOCKS rounds the medians' order-statistic intervals are divided instead, which is wider but holds.
    """
    count = min(len(reference), len(variant))
    if count == 0:
        raise ValueError("no calls to compare")
    slow, fast = reference[:count], variant[:count]
    low: float | None
    high: float | None
    rounds = _blocks(count, block)
    if enough := len(rounds) >= MIN_BLOCKS:
        drawn = [np.concatenate([rounds[i] for i in row]) for row in _rows(len(rounds), resamples, seed)]
        low, high = _ends([np.median(slow[calls]) / np.median(fast[calls]) for calls in drawn], confidence)
    else:
        low, high = _divided(slow, fast, confidence)
    return Speedup(
        ratio=float(np.median(slow) / np.median(fast)),
        low=low,
        high=high,
        confidence=confidence,
        count=count,
        method="block bootstrap" if enough else "order statistics",
    )


def throughput(
    candidates: Mapping[str, Call],
    batch: int,
    *,
    seed: int,
    samples: int = 32,
    confidence: float = 0.95,
    schedule: Schedule = LARGE_BATCH_TURNS,
) -> dict[str, Throughput]:
    """Items a second of each candidate, whose call answers `batch` items, timed in turns.

    The interval resamples whole rounds and is withheld below MIN_BLOCKS of them.
    """
    timed = interleave(candidates, samples=samples, seed=seed, schedule=schedule)
    return {name: _rate(seconds, batch, schedule, confidence, seed) for name, seconds in timed.items()}


def _rate(seconds: Floats, batch: int, schedule: Schedule, confidence: float, seed: int) -> Throughput:
    rounds = _blocks(len(seconds), schedule.counted)
    low = high = None
    if len(rounds) >= MIN_BLOCKS:
        drawn = [np.concatenate([rounds[i] for i in row]) for row in _rows(len(rounds), 1000, seed)]
        low, high = _ends([batch / seconds[calls].mean() for calls in drawn], confidence)
    rate = batch / float(seconds.mean())
    return Throughput(
        batch=batch, items_per_s=rate, low=low, high=high, confidence=confidence, count=len(seconds)
    )


def _blocks(count: int, block: int) -> list[np.ndarray]:
    """The calls of each round, as indices."""
    return [np.arange(start, min(start + block, count)) for start in range(0, count, block)]


def _rows(units: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(units, size=(resamples, units))


def _ends(values: list[float], confidence: float) -> tuple[float, float]:
    """The central `confidence` share of bootstrap values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _divided(slow: Floats, fast: Floats, confidence: float) -> tuple[float | None, float | None]:
    """Bounds of a ratio of medians from each median's own, which share the error (Bonferroni)."""
    each = 1 - (1 - confidence) / 2
    above, below = bounds_of(slow, 0.5, each), bounds_of(fast, 0.5, each)
    if above is None or below is None:
        return None, None
    return above[0] / below[1], above[1] / below[0] if below[0] else None


def _screened(
    recorders: Mapping[str, Recorder], active: list[str], protected: Collection[str], ratio: float
) -> list[str]:
    """Who stays: those whose median may, by its interval, be within `ratio` of the best's."""
    times = {name: np.array(recorders[name].ns, dtype=np.float64) / 1e6 for name in active}
    bounds = {name: bounds_of(times[name], 0.5, SCREEN_CONFIDENCE) for name in active}
    medians = {name: float(np.median(times[name])) for name in active}
    best = min(active, key=medians.__getitem__)
    fastest = bounds[best]
    for name, found in bounds.items():
        if name in protected or found is None or fastest is None or found[0] <= ratio * fastest[1]:
            continue
        recorders[name].dropped = (
            f"median {medians[name]:.3g} ms after {len(times[name])} calls, more than {ratio:g} times "
            f"the {medians[best]:.3g} ms of {best}"
        )
    return [name for name in active if not recorders[name].dropped]
