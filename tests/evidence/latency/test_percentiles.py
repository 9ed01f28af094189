from __future__ import annotations

import numpy as np
import pytest

from tlexport.evidence.latency.closed_loop import percentile, speedup, summary


@pytest.mark.parametrize(("q", "needed"), [(0.99, 299), (0.9, 29), (0.5, 5)])
def test_a_percentile_is_withheld_one_sample_too_early(q: float, needed: int) -> None:
    times = np.random.default_rng(0).gamma(4.0, size=needed)
    found = percentile(times, q)
    assert found.value_ms is not None and found.count == needed and not found.reason
    assert found.low_ms <= found.value_ms <= found.high_ms == pytest.approx(1e3 * times.max())
    withheld = percentile(times[:-1], q)
    assert withheld.value_ms is withheld.low_ms is withheld.high_ms is None
    assert withheld.reason == f"{needed - 1} calls; p{100 * q:g} needs {needed} for a bound at 95%"


def test_no_samples_withhold() -> None:
    assert percentile(np.array([]), 0.5).reason.startswith("0 calls")


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.5, 100), (0.9, 29), (0.9, 300), (0.99, 299), (0.99, 1000)])
def test_intervals_hold_at_least_as_often_as_promised_for_a_skewed_law(q: float, n: int) -> None:
    """Exponential times, whose quantiles are known; 1000 repetitions have a standard error of 0.7%."""
    rng = np.random.default_rng(1)
    truth = -np.log(1 - q)
    found = [percentile(rng.exponential(1e-3, size=n), q) for _ in range(1000)]
    covered = np.mean([p.low_ms <= truth <= p.high_ms for p in found])
    assert covered >= 0.95 - 3 * 0.007


def test_intervals_narrow_with_more_samples() -> None:
    rng = np.random.default_rng(2)
    few, many = (percentile(rng.exponential(size=n), 0.5) for n in (50, 5000))
    assert many.high_ms - many.low_ms < 0.2 * (few.high_ms - few.low_ms)


def test_a_single_stall_shows_in_the_maximum_and_not_in_the_median() -> None:
    times = np.full(300, 0.005)
    times[137] = 0.8
    found = summary(times)
    assert found.max_ms == found.p99.high_ms == 800.0
    assert found.min_ms == found.p50.value_ms == found.p90.value_ms == 5.0
    assert found.mean_ms == pytest.approx((299 * 5 + 800) / 300)
    assert found.throughput_per_s == pytest.approx(1000 / found.mean_ms)
    assert summary(times, batch=8).throughput_per_s == pytest.approx(8000 / found.mean_ms)


def test_a_summary_survives_json_with_withheld_values() -> None:
    found = summary(np.linspace(1, 2, 40))
    assert found.p99.value_ms is None and type(found).model_validate_json(found.model_dump_json()) == found


def test_speedup_of_like_candidates_holds_one_and_of_unlike_ones_does_not() -> None:
    rng = np.random.default_rng(3)
    times = rng.gamma(50, 0.2, size=304)
    same = speedup(times, rng.gamma(50, 0.2, size=304))
    twice = speedup(times, rng.gamma(50, 0.1, size=304))
    assert same.low < 1 < same.high
    assert 1.8 < twice.low < 2 < twice.high < 2.2
    assert (twice.count, twice.method) == (304, "block bootstrap")


def test_speedup_is_wide_where_blocks_differ_more_than_calls() -> None:
    """Calls of a block share its conditions: 304 of them are worth far fewer."""
    rng = np.random.default_rng(4)
    uneven = np.repeat(rng.gamma(20, 0.5, size=38), 8)
    steady = np.full(304, 10.0)
    within, across = speedup(uneven, steady), speedup(rng.permutation(uneven), steady)
    assert within.high - within.low > 1.5 * (across.high - across.low)


def test_speedup_of_a_dropped_variant_uses_the_calls_both_have() -> None:
    rng = np.random.default_rng(5)
    early, late = 10 + rng.random(24), 90 + rng.random(240)  # the machine slowed down after the variant left
    found = speedup(np.concatenate([early, late]), 40 + rng.random(24))
    assert (found.count, found.method) == (24, "order statistics")
    assert 0.2 < found.low < found.ratio < found.high < 0.3


def test_speedup_with_too_few_calls_states_no_interval_and_without_any_refuses() -> None:
    short = np.array([1.0, 2.0])
    assert speedup(short, short).low is None and speedup(short, short).ratio == 1.0
    with pytest.raises(ValueError, match="no calls"):
        speedup(short, short[:0])
