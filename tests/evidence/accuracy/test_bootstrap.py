from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr

from tlexport.errors import DataError
from tlexport.evidence.accuracy import bootstrap
from tlexport.evidence.accuracy.bootstrap import Floats, Metric, paired_bootstrap
from tlexport.evidence.accuracy.flips import between, flip_bound

REPETITIONS = 300
# Three standard errors of a coverage of 0.95 over 300 repetitions are 0.038.
TOLERANCE = 3 * math.sqrt(0.95 * 0.05 / REPETITIONS)


def accuracy(right: np.ndarray) -> Metric:
    """right: bool [n]."""
    return lambda weights: weights @ right.astype(float) / weights.sum(axis=1)


def auc(scores: Floats, positive: np.ndarray) -> Metric:
    """Weighted rank statistic; NaN where a class has no weight. Scores must not tie."""
    order = np.argsort(scores)
    positive = positive[order].astype(float)

    def metric(weights: Floats) -> Floats:
        weights = weights[:, order]
        negatives = weights * (1 - positive)
        wins = (weights * positive * np.cumsum(negatives, axis=1)).sum(axis=1)
        pairs = (weights * positive).sum(axis=1) * negatives.sum(axis=1)
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    return metric


def test_weighted_auc_of_this_test_is_right() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=50), rng.random(50) < 0.4
    pairs = [(p, q) for p in scores[positive] for q in scores[~positive]]
    expected = np.mean([p > q for p, q in pairs])
    assert auc(scores, positive)(np.ones((1, 50)))[0] == pytest.approx(expected)


def test_accuracy_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    n, lost, won = 400, 0.1, 0.1
    covered = 0
    for seed in range(REPETITIONS):
        right = rng.random(n) < 0.8
        change = rng.random(n)
        after = np.where(right, change >= lost, change < won)
        interval = paired_bootstrap(
            accuracy(right), accuracy(after), n, resamples=400, confidence=0.95, seed=seed
        )
        assert interval.method == "bca"
        covered += interval.low <= 0.8 * lost - 0.2 * won <= interval.high
    assert abs(covered / REPETITIONS - 0.95) <= TOLERANCE


def test_auc_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    n, distance, noise = 150, 1.5, 0.6
    true_drop = ndtr(distance / math.sqrt(2)) - ndtr(distance / math.sqrt(2 * (1 + noise**2)))
    covered = 0
    for seed in range(REPETITIONS):
        positive = rng.random(n) < 0.5
        scores = rng.normal(size=n) + distance * positive
        noisy = scores + noise * rng.normal(size=n)
        interval = paired_bootstrap(
            auc(scores, positive), auc(noisy, positive), n, resamples=400, confidence=0.95, seed=seed
        )
        covered += interval.low <= true_drop <= interval.high
    assert abs(covered / REPETITIONS - 0.95) <= TOLERANCE


def test_samples_of_a_group_are_drawn_together() -> None:
    """Ten like samples to a patient: taken as independent they promise far too narrow an interval."""
    rng = np.random.default_rng(3)
    patients, each = 40, 10
    groups = np.repeat(np.arange(patients), each)
    right = np.ones(patients * each, dtype=bool)
    covered = {"grouped": 0, "ungrouped": 0}
    for seed in range(100):
        after = np.repeat(rng.random(patients) >= 0.2, each)
        for name, given in (("grouped", groups), ("ungrouped", None)):
            interval = paired_bootstrap(
                accuracy(right), accuracy(after), len(groups), resamples=300, confidence=0.95, seed=seed, groups=given
            )  # fmt: skip
            covered[name] += interval.low <= 0.2 <= interval.high
    assert covered["grouped"] >= 88  # three standard errors below 95 of 100
    assert covered["ungrouped"] <= 70


def test_a_variant_worse_than_the_margin_is_caught_and_a_like_one_is_not() -> None:
    rng = np.random.default_rng(4)
    n, margin = 600, 0.02
    right = rng.random(n) < 0.95
    worse = right & (rng.random(n) >= 0.06)
    alike = right ^ (rng.random(n) < 0.002)
    bad = paired_bootstrap(accuracy(right), accuracy(worse), n, resamples=2000, confidence=0.95, seed=0)
    good = paired_bootstrap(accuracy(right), accuracy(alike), n, resamples=2000, confidence=0.95, seed=0)
    assert bad.high > bad.low > margin
    assert good.high <= margin
    assert good.low <= 0 <= good.high


def test_a_metric_that_is_better_when_lower_changes_sign() -> None:
    rng = np.random.default_rng(5)
    errors = rng.random(100)

    def mean(values: np.ndarray) -> Metric:
        return lambda weights: weights @ values / weights.sum(axis=1)

    interval = paired_bootstrap(
        mean(errors), mean(errors + 0.1 + 0.01 * rng.random(100)), 100, resamples=300, confidence=0.9, seed=0, sign=-1
    )  # fmt: skip
    assert 0.1 < interval.low <= interval.estimate <= interval.high < 0.11


def test_no_difference_gives_a_constant_and_a_bound_that_still_says_something() -> None:
    right = np.arange(300) % 10 > 0
    interval = paired_bootstrap(accuracy(right), accuracy(right), 300, resamples=200, confidence=0.95, seed=0)
    assert (interval.low, interval.high, interval.method) == (0.0, 0.0, "constant")
    found = between(right, right, np.ones(300, dtype=bool))
    assert found.count == 0 and found.upper == pytest.approx(1 - 0.05 ** (1 / 300))


def test_undefined_resamples_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(6)
    positive = np.arange(60) < 3
    scores = rng.normal(size=60) + positive
    interval = paired_bootstrap(
        auc(scores, positive), auc(rng.normal(size=60), positive), 60, resamples=1000, confidence=0.95, seed=0
    )
    # No positive drawn: (57/60)^60 = 4.6%.
    assert 20 < interval.undefined < 80 and interval.resamples + interval.undefined == 1000
    assert math.isfinite(interval.low) and math.isfinite(interval.high)


def test_a_single_positive_is_an_error_that_says_what_to_do() -> None:
    positive = np.arange(60) < 1
    metric = auc(np.random.default_rng(7).normal(size=60), positive)
    with pytest.raises(DataError, match=r"undefined in \d+ of 500 resamples.*larger test split"):
        paired_bootstrap(metric, metric, 60, resamples=500, confidence=0.95, seed=0)
    nothing = auc(np.arange(60.0), np.zeros(60, dtype=bool))
    with pytest.raises(DataError, match="undefined on the 60 test samples"):
        paired_bootstrap(nothing, nothing, 60, resamples=500, confidence=0.95, seed=0)


def test_one_group_cannot_vouch_for_others() -> None:
    right = np.arange(20) % 2 == 0
    with pytest.raises(DataError, match="only one group"):
        paired_bootstrap(
            accuracy(right), accuracy(~right), 20, resamples=200, confidence=0.95, seed=0, groups=np.zeros(20)
        )


def test_chunks_do_not_change_the_answer_and_large_sets_use_percentiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(8)
    right, after = rng.random(500) < 0.9, rng.random(500) < 0.9

    def interval(resamples: int) -> bootstrap.Interval:
        return paired_bootstrap(
            accuracy(right), accuracy(after), 500, resamples=resamples, confidence=0.95, seed=9
        )

    whole = interval(600)
    monkeypatch.setattr(bootstrap, "CHUNK_BYTES", 8 * 500 * 7)
    assert interval(600) == whole and whole.method == "bca"
    assert interval(499).method == "percentile"


def test_bca_corrects_towards_the_exact_interval_of_a_skewed_share() -> None:
    """Two harmful flips in 300: the exact (Clopper-Pearson) upper end is 2.39%, the plain one 1.7%."""
    right = np.ones(300, dtype=bool)
    after = np.arange(300) >= 2
    interval = paired_bootstrap(
        accuracy(right), accuracy(after), 300, resamples=4000, confidence=0.95, seed=0
    )
    assert interval.high == pytest.approx(flip_bound(2, 300, 0.975), abs=0.004)
    assert interval.high > 0.0185
