"""The p-value that comes with an interval's limit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from tlexport.evidence.accuracy.bootstrap import Floats, Interval, Metric, paired_bootstrap

RESAMPLES = 1000


def mean_of(values: Floats) -> Metric:
    return lambda weights: weights @ values / weights.sum(axis=1)


def interval(
    drops: Floats, *, limit: float | None, resamples: int = RESAMPLES, confidence=0.95, seed=0
) -> Interval:
    """Of the mean of per-sample drops [n]."""
    return paired_bootstrap(
        mean_of(drops),
        mean_of(np.zeros(len(drops))),
        len(drops),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        limit=limit,
    )


@pytest.mark.parametrize(("n", "resamples", "method"), [(300, 20_000, "bca"), (1001, 1000, "percentile")])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_p_is_the_tail_at_which_the_upper_end_is_the_limit(
    n: int, resamples: int, method: str, confidence: float
) -> None:
    drops = np.random.default_rng(0).exponential(size=n) ** 2  # skewed: z0 and a are not 0
    high = interval(drops, limit=None, resamples=resamples, confidence=confidence).high
    found = interval(drops, limit=high, resamples=resamples, confidence=confidence)
    assert found.method == method
    # The level is known to one resample; here the tail moves by less than four times what the level moves.
    assert found.p == pytest.approx((1 - confidence) / 2, abs=4 / resamples)


def test_p_falls_as_the_limit_rises_and_is_never_zero() -> None:
    drops = np.random.default_rng(1).normal(0.1, 1, size=400)
    limits = np.linspace(-0.4, 0.6, 11)
    found = [interval(drops, limit=limit).p for limit in limits]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99 and found[-1] == 1 / (RESAMPLES + 1)
    assert interval(drops, limit=None).p is None


def test_a_drop_at_the_limit_is_rejected_as_often_as_the_level_says() -> None:
    """True drop at the limit: p <= 0.025 in 2.5% of 400 sets. Of Bin(400, 0.025), P(> 20) = 0.2%."""
    rng = np.random.default_rng(2)
    runs, rejected = 400, 0
    for seed in range(runs):
        found = interval(rng.normal(0.02, 0.2, size=200), limit=0.02, resamples=400, seed=seed)
        rejected += found.p <= 0.025
    assert binom.sf(20, runs, 0.025) < 0.003
    assert 1 <= rejected <= 20


def test_a_rounding_does_not_decide() -> None:
    """Five of a thousand samples: 0.865 - 0.86 is a rounding more than 0.005, and 0.005 * 1.0 is not."""
    drops = (np.arange(1000) < 5).astype(float)
    near = [interval(drops, limit=0.005 + shift).p for shift in (-1e-15, 0.0, 1e-15)]
    assert len(set(near)) == 1 and 0.3 < near[0] < 0.7
    assert interval(drops, limit=0.0049).p > near[0] > interval(drops, limit=0.0051).p


def test_nothing_but_a_constant_is_as_sure_as_the_estimate() -> None:
    same = np.full(50, 0.125)
    for limit, p in ((0.1, 1.0), (0.125, 1.0), (0.125 + 1e-15, 1.0), (0.2, 0.0)):
        found = interval(same, limit=limit)
        assert found.method == "constant" and found.p == p


def test_few_flips_leave_the_limit_undecided_where_the_exact_test_does() -> None:
    """Two harmful flips in 300 against 0.02: P(Bin(300, 0.02) <= 2) = 6%; the percentile method alone would say 0.4%."""
    drops = (np.arange(300) < 2).astype(float)
    exact = binom.cdf(2, 300, 0.02)
    found = interval(drops, limit=0.02, resamples=4000)
    plain = interval(drops, limit=0.02, resamples=299)  # fewer than samples: no jackknife
    assert found.method == "bca" and plain.method == "percentile"
    assert plain.p < found.p < exact and math.isclose(exact, 0.06, abs_tol=0.003)


@pytest.mark.parametrize("n", [300, 1000, 1500])
def test_more_flips_are_never_more_sure_and_p_agrees_with_the_interval(n: int) -> None:
    """Harmful flips of n against 0.01. Where many resamples are at the limit itself, `high` is it for a range of p."""
    p = []
    for count in range(1, 20):
        found = interval((np.arange(n) < count).astype(float), limit=0.01)
        p.append(found.p)
        if abs(found.high - 0.01) > 0.5 / n:
            assert (found.p <= 0.025) == (found.high < 0.01)
    # Near the floor two neighbours differ by what one resample in a thousand makes of them.
    assert all(later >= earlier - 0.005 for earlier, later in itertools.pairwise(p))
    assert p[-1] > 0.5


def test_few_flips_beyond_the_reach_of_all_resamples_are_sure() -> None:
    """One in a thousand against 0.01: no resample has ten of it. P(Bin(1000, 0.01) <= 1) = 0.05%."""
    assert interval((np.arange(1000) < 1).astype(float), limit=0.01).p == 1 / (RESAMPLES + 1)
