from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from scipy.stats import binomtest

from tlexport.evidence.accuracy import calibration
from tlexport.evidence.accuracy.calibration import debiased_ece, drift, reliability
from tlexport.modalities import metrics
from tlexport.results import CalibrationDrift


def plug_in(confidence: np.ndarray, right: np.ndarray) -> float:
    parts = np.array_split(np.argsort(confidence), 15)
    return sum(abs((right[part] * 1.0 - confidence[part]).sum()) for part in parts) / len(right)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def calibrated(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the probabilities themselves, and the scores."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.normal(size=(n, classes))
    labels = (softmax(scores).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return labels, scores


def of(labels: np.ndarray, first: np.ndarray, second: np.ndarray, task: str, **other) -> CalibrationDrift:
    values = {"resamples": 300, "confidence": 0.95, "seed": 0, **other}
    return drift(labels, first, second, task, **values)


@pytest.mark.parametrize("n", [300, 1000, 5000])
def test_a_calibrated_model_reads_near_zero_where_the_plug_in_does_not(n: int) -> None:
    rng = np.random.default_rng(0)
    found, plain = [], []
    for _ in range(200):
        confidence = rng.uniform(0.5, 1, size=n)
        right = rng.random(n) < confidence
        found.append(debiased_ece(confidence, right))
        plain.append(plug_in(confidence, right))
    # E|N(0, s)| = s sqrt(2 / pi), and the mean of sqrt(c (1 - c)) over 0.5..1 is pi / 8.
    assert np.mean(plain) == pytest.approx(np.sqrt(2 / np.pi) * np.pi / 8 * np.sqrt(15 / n), rel=0.05)
    assert np.mean(found) < 0.3 * np.mean(plain)


@pytest.mark.parametrize(("gap", "n", "off"), [(0.1, 1000, 0.01), (0.05, 5000, 0.004), (0.2, 300, 0.01)])
def test_a_real_gap_is_read_as_it_is(gap: float, n: int, off: float) -> None:
    """`off`: what the estimate may take too much; the mean of 200 runs is known to below 0.002."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        confidence = rng.uniform(0.6, 1, size=n)
        found.append(debiased_ece(confidence, rng.random(n) < confidence - gap))
    assert np.mean(found) == pytest.approx(gap, abs=off)


def test_all_right_and_all_sure_is_no_error() -> None:
    assert debiased_ece(np.ones(50), np.ones(50, bool)) == 0.0
    assert debiased_ece(np.ones(50), np.arange(50) < 25) == pytest.approx(0.5, abs=0.01)


def test_reliability_counts_every_decision_once() -> None:
    rng = np.random.default_rng(2)
    confidence = np.round(rng.uniform(0.5, 1, size=1000), 2)
    right = rng.random(1000) < confidence
    found = reliability(confidence, right, 10)
    assert len(found) == 10 and sum(b.samples for b in found) == 1000
    assert all(a.high < b.low for a, b in itertools.pairwise(found))
    assert sum(b.samples * b.accuracy for b in found) == pytest.approx(right.sum())
    first = found[0]
    expected = binomtest(round(first.accuracy * first.samples), first.samples).proportion_ci(0.95, "wilson")
    assert (first.accuracy_low, first.accuracy_high) == pytest.approx((expected.low, expected.high))
    (alike,) = reliability(np.full(20, 0.9), np.arange(20) < 15)
    assert (alike.samples, alike.accuracy, alike.low, alike.high) == (20, 0.75, 0.9, 0.9)


def test_levels_are_the_estimator_and_the_metric() -> None:
    labels, scores = calibrated(2000, 4, 3)
    first, second = softmax(scores), softmax(1.5 * scores)
    found = of(labels, first, second, "multiclass")
    sure, right, _ = calibration.decided(labels, first, "multiclass")
    assert found.ece_reference == pytest.approx(debiased_ece(sure[:, 0], right[:, 0]))
    once = np.ones((1, 2000))
    assert found.brier_reference == pytest.approx(metrics.brier(labels, first)(once)[0])
    assert found.brier == pytest.approx(metrics.brier(labels, second)(once)[0])
    assert found.brier_drift == pytest.approx(found.brier - found.brier_reference)
    assert found.brier_drift_low < found.brier_drift < found.brier_drift_high


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_tasks_have_the_metrics_brier_score(task: str) -> None:
    rng = np.random.default_rng(4)
    p = rng.random((500, 3))
    labels = (rng.random(p.shape) < p).astype(np.int8)
    labels[rng.random(p.shape) < 0.3] = -1
    if task == "binary":
        labels, p = labels[:, 0].clip(0), np.stack([1 - p[:, 0], p[:, 0]], axis=1)
    found = of(labels, p, p, task)
    assert found.brier == pytest.approx(metrics.brier(labels, p)(np.ones((1, 500)))[0])
    assert (found.ece_drift, found.ece_drift_low, found.ece_drift_high) == (0.0, 0.0, 0.0)
    assert (found.brier_drift_low, found.brier_drift_high) == (0.0, 0.0)


def test_unmeasured_labels_do_not_count() -> None:
    rng = np.random.default_rng(5)
    p = rng.random((400, 2))
    labels = (rng.random(p.shape) < p).astype(np.int8)
    second = p**2
    half = labels.copy()
    half[:, 1] = -1
    alone = of(labels[:, :1], p[:, :1], second[:, :1], "multilabel")
    assert of(half, p, second, "multilabel") == alone != of(labels, p, second, "multilabel")


def test_a_planted_temperature_is_seen_and_its_absence_too() -> None:
    """40 sets of 2000: scores times 1.5 are overconfident by 0.1; scores with a like noise drift nowhere."""
    rng, seen, alarms = np.random.default_rng(6), 0, 0
    for seed in range(40):
        labels, scores = calibrated(2000, 5, seed)
        first = softmax(scores)
        noisy = scores + 0.05 * rng.normal(size=scores.shape)
        hot = of(labels, first, softmax(1.5 * noisy), "multiclass")
        alike = of(labels, first, softmax(noisy), "multiclass")
        seen += hot.ece_drift_low > 0 and hot.brier_drift_low > 0
        alarms += not alike.ece_drift_low <= 0 <= alike.ece_drift_high
    assert seen == 40
    assert alarms <= 6  # P(Bin(40, 0.05) > 6) = 0.3%


def test_whole_groups_are_drawn() -> None:
    labels, scores = calibrated(200, 3, 7)
    first, second = softmax(scores), softmax(1.5 * scores)
    repeated = [np.repeat(values, 10, axis=0) for values in (labels, first, second)]
    once = of(labels, first, second, "multiclass")
    grouped = of(*repeated, "multiclass", groups=np.repeat(np.arange(200), 10))
    blind = of(*repeated, "multiclass")

    def width(found: CalibrationDrift) -> float:
        return found.brier_drift_high - found.brier_drift_low

    assert width(grouped) == pytest.approx(width(once), rel=1e-6)
    assert width(blind) < 0.5 * width(once)


def test_ten_thousand_samples_take_seconds() -> None:
    """Measured at 0.3 s of processor time; the bound leaves room for a slow machine."""
    labels, scores = calibrated(10_000, 10, 8)
    begun = time.process_time()
    of(labels, softmax(scores), softmax(1.1 * scores), "multiclass", resamples=2000)
    assert time.process_time() - begun < 5
