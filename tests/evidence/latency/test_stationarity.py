"""When the warm-up ends, on traces of known shape; every trace is tried with many seeds."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from tlexport.evidence.latency import stationarity
from tlexport.evidence.latency.recorder import WARMUP_GROWTH, Recorder
from tlexport.evidence.latency.stationarity import drift, settled, trend, truncation

SEEDS = range(40)
CALLS = np.arange(4000)


def stop(times: np.ndarray) -> int | None:
    """After how many values the warm-up would end; None: not within these."""
    look = stationarity.LEAST
    while look <= len(times):
        if settled(times[:look]):
            return look
        look = math.ceil(WARMUP_GROWTH * look)
    return None


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.03, len(CALLS))


def stops(shape: np.ndarray) -> list[int | None]:
    return [stop(shape + noise(seed)) for seed in SEEDS]


def test_what_stands_still_from_the_beginning_stops_at_once() -> None:
    found = stops(np.ones(len(CALLS)))
    assert np.median(found) == stationarity.LEAST and max(found) <= 2 * stationarity.LEAST
    assert stop(np.ones(100)) == stationarity.LEAST, "without noise, too"


def test_an_exponential_decay_is_waited_for() -> None:
    """Six times as slow at first, a time constant of 30 calls: 2% remain after 30 ln(5 / 0.02) = 166."""
    found = stops(1 + 5 * np.exp(-CALLS / 30))
    assert min(found) > 166 and max(found) < 1500
    cuts = [truncation((1 + 5 * np.exp(-CALLS / 30) + noise(seed))[:1000]) for seed in SEEDS]
    assert min(cuts) > 100 and max(cuts) < 300


@pytest.mark.parametrize("early", [2.0, 0.5])
def test_a_step_is_cut_off(early: float) -> None:
    found = stops(np.where(CALLS < 30, early, 1.0))
    assert min(found) > 40, "the step is in the first look"
    assert max(found) <= 160
    assert {truncation((np.where(CALLS < 30, early, 1.0) + noise(seed))[:200]) for seed in SEEDS} <= set(
        range(28, 45)
    )


def test_a_steady_drift_never_stops() -> None:
    assert set(stops(1 + 0.01 * CALLS)) == {None}


def test_interruptions_do_not_hold_it_up() -> None:
    found = [
        stop(1 + noise(s) + 10 * (np.random.default_rng(100 + s).random(len(CALLS)) < 0.03)) for s in SEEDS
    ]
    assert max(found) <= 4 * stationarity.LEAST
    skewed = [stop(np.random.default_rng(s).gamma(2, 0.5, len(CALLS))) for s in SEEDS]
    assert max(skewed) <= 4 * stationarity.LEAST


def test_a_trend_is_told_and_chance_is_not() -> None:
    rng = np.random.default_rng(1)
    # 1000 series of 20 without a trend: the level is 5%, the standard error of its share 0.7%.
    assert np.mean([trend(rng.normal(size=20)) < 0.05 for _ in range(1000)]) == pytest.approx(0.05, abs=0.021)
    assert trend(np.arange(20.0)) < 1e-6 and trend(np.ones(20)) == 1.0
    assert trend(np.arange(20.0)) == trend(np.exp(np.arange(20.0))), "only the order counts"


def test_drift_of_what_was_counted_is_told_where_it_matters() -> None:
    assert sum(bool(drift(1 + noise(seed)[:300])) for seed in SEEDS) <= 2
    rising = 1 + 0.001 * CALLS[:300] + noise(1)[:300]
    assert drift(rising).startswith("not stationary: the median rose by 2")
    assert "fell" in drift(rising[::-1].copy())
    assert drift(1 + 0.00003 * CALLS) != "", "12% over 4000 calls"
    assert drift(1 + 0.000005 * CALLS) == "", "2% are certain and do not matter"
    assert drift(rising[:39]) == "", "too few to say"


def test_a_warm_up_without_end_is_marked() -> None:
    calls = iter(range(10**6))
    never = Recorder(lambda: time.sleep(1e-4 * next(calls)), began=0.0)
    never.warm_up(0.5)
    assert not never.stationary and never.warmup_calls > 1
