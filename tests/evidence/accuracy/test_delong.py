from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from tlexport.errors import DataError
from tlexport.evidence.accuracy.bootstrap import paired_bootstrap
from tlexport.evidence.accuracy.delong import delong, delong_macro
from tlexport.modalities import metrics


def case(n: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    scores = np.round(rng.normal(size=n) + positive, 1)  # ties
    return positive, scores, np.round(scores + noise * rng.normal(size=n), 1)


def by_definition(positive: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Drop and its standard error from the kernel over all pairs (DeLong 1988, eq. 4 to 6)."""

    def kernel(s: np.ndarray) -> np.ndarray:
        x, y = s[positive][:, None], s[~positive]
        return (x > y) + (x == y) / 2

    a, b = kernel(first), kernel(second)
    s10 = np.cov(a.mean(axis=1), b.mean(axis=1))
    s01 = np.cov(a.mean(axis=0), b.mean(axis=0))
    s = s10 / a.shape[0] + s01 / a.shape[1]
    return a.mean() - b.mean(), np.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])


def test_it_is_delongs_by_definition() -> None:
    positive, first, second = case(150, 0.5, 0)
    found = delong(positive, first, second, 0.95)
    drop, se = by_definition(positive, first, second)
    assert (found.drop, found.se) == (pytest.approx(drop), pytest.approx(se))
    assert found.reference == pytest.approx(roc_auc_score(positive, first))
    assert found.variant == pytest.approx(roc_auc_score(positive, second))
    assert found.high - found.drop == pytest.approx(1.959964 * se) == pytest.approx(found.drop - found.low)


def test_equal_ranks_are_no_difference() -> None:
    positive, first, _ = case(100, 0, 1)
    found = delong(positive, first, 3 * first - 7, 0.95)
    assert (found.se, found.p, found.low, found.high) == (0.0, 1.0, 0.0, 0.0)
    apart = delong(positive, positive * 1.0, ~positive * 1.0, 0.95)  # all right against all wrong
    assert (apart.drop, apart.se, apart.p) == (1.0, 0.0, 0.0)


def test_false_alarms_and_coverage() -> None:
    """Two equally noisy copies of a score: 500 runs at 5%, of Bin(500, 0.05) P(< 12) and P(> 40) are below 0.2%."""
    rng, runs, alarms, covered = np.random.default_rng(2), 500, 0, 0
    assert binom.cdf(11, runs, 0.05) < 0.002 and binom.sf(40, runs, 0.05) < 0.002
    for _ in range(runs):
        positive = rng.random(200) < 0.5
        scores = rng.normal(size=200) + positive
        found = delong(
            positive, scores + 0.5 * rng.normal(size=200), scores + 0.5 * rng.normal(size=200), 0.95
        )
        alarms += found.p < 0.05
        covered += found.low <= 0 <= found.high
    assert 12 <= alarms <= 40 and covered == runs - alarms


def test_a_planted_loss_is_seen() -> None:
    positive, first, second = case(2000, 1.5, 3)
    found = delong(positive, first, second, 0.95)
    assert found.p < 1e-6 and found.low > 0


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores)
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_macro_average_agrees_with_the_metric_and_the_bootstrap(task: str) -> None:
    rng = np.random.default_rng(4)
    n, classes = 600, 2 if task == "binary" else 4
    if task == "multilabel":
        labels = (rng.random((n, classes)) < 0.3).astype(np.int8)
        scores = (
            rng.normal(size=(n, classes)) + labels + rng.normal(size=(n, 1))
        )  # labels depend on each other
        labels[rng.random((n, classes)) < 0.2] = -1
        first, second = (1 / (1 + np.exp(-s)) for s in (scores, scores + 0.8 * rng.normal(size=scores.shape)))
    else:
        labels = rng.integers(classes, size=n)
        scores = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
        first, second = softmax(scores), softmax(scores + 0.8 * rng.normal(size=scores.shape))
    found = delong_macro(labels, first, second, task, 0.95)
    once = np.ones((1, n))
    assert found.reference == pytest.approx(metrics.auc(labels, first)(once)[0])
    assert found.variant == pytest.approx(metrics.auc(labels, second)(once)[0])
    resampled = paired_bootstrap(
        metrics.auc(labels, first), metrics.auc(labels, second), n, resamples=2000, confidence=0.95, seed=0
    )
    # The spread of 2000 resamples is known to 1.6% (1 / sqrt(2 * 2000)); an end of the interval to about 5%.
    assert found.high - found.low == pytest.approx(resampled.high - resampled.low, rel=0.12)


def test_a_sample_shown_ten_times_is_one_sample() -> None:
    positive, first, second = case(80, 0.5, 5)
    once = delong(positive, first, second, 0.95)
    tenfold = (np.repeat(values, 10) for values in (positive, first, second))
    groups = np.repeat(np.arange(80), 10)
    positive, first, second = tenfold
    grouped = delong(positive, first, second, 0.95, groups=groups)
    blind = delong(positive, first, second, 0.95)
    assert grouped.drop == pytest.approx(once.drop)
    assert grouped.se == pytest.approx(once.se, rel=0.02)
    assert blind.se == pytest.approx(once.se / np.sqrt(10), rel=0.03)


def test_a_class_without_samples_is_named() -> None:
    labels, outputs = np.array([0, 1, 0, 1]), np.full((4, 3), 1 / 3)
    with pytest.raises(DataError, match="AUC of 'bird' is undefined: 0 positives and 4 negatives"):
        delong_macro(labels, outputs, outputs, "multiclass", 0.95, names=("cat", "dog", "bird"))
    with pytest.raises(DataError, match="2 positives and 0 negatives"):
        delong(np.ones(2, bool), np.zeros(2), np.zeros(2), 0.95)
