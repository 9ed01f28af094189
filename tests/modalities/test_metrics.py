"""Our vectorised metrics against scikit-learn, on the same samples and the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tlexport.errors import DataError
from tlexport.modalities import metrics
from tlexport.modalities.metrics import (
    CLASSIFICATION,
    HIGHER_IS_BETTER,
    METRICS,
    REGRESSION,
    decisions,
    evaluate,
)


def problem(seed: int, n: int, classes: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), random.integers(0, classes, n - classes)]
    logits = random.normal(size=(n, classes)) + 1.5 * (labels[:, None] == np.arange(classes))
    if ties:
        logits = np.round(logits)
    p = np.exp(logits)
    return labels, p / p.sum(axis=1, keepdims=True)


def multilabel(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random((n, classes)) < 0.4).astype(np.uint8)
    labels[0], labels[1] = 0, 1
    return labels, np.round(np.clip(0.3 * labels + 0.7 * random.random((n, classes)), 0, 1), 1)


def sklearn_ece(labels: np.ndarray, p: np.ndarray, w: np.ndarray) -> float:
    """By hand, bin by bin: scikit-learn has none."""
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if w[inside].sum():
            gap = np.average(right[inside], weights=w[inside]) - np.average(
                confidence[inside], weights=w[inside]
            )
            total += abs(gap) * w[inside].sum() / w.sum()
    return total


def reference(name: str, y: np.ndarray, p: np.ndarray, w: np.ndarray) -> float:
    binary, each = p.shape[1] == 2, y[:, None] == np.arange(p.shape[1])
    decided = p.argmax(axis=1)
    return {
        "auc": lambda: (
            sk.roc_auc_score(y, p[:, 1], sample_weight=w)
            if binary
            else np.mean([sk.roc_auc_score(each[:, k], p[:, k], sample_weight=w) for k in range(p.shape[1])])
        ),
        "accuracy": lambda: sk.accuracy_score(y, decided, sample_weight=w),
        "balanced_accuracy": lambda: sk.balanced_accuracy_score(y, decided, sample_weight=w),
        "f1": lambda: sk.f1_score(y, decided, average="binary" if binary else "macro", sample_weight=w),
        "average_precision": lambda: (
            sk.average_precision_score(y, p[:, 1], sample_weight=w)
            if binary
            else sk.average_precision_score(each, p, average="macro", sample_weight=w)
        ),
        "ece": lambda: sklearn_ece(y, p, w),
        "mcc": lambda: sk.matthews_corrcoef(y, decided, sample_weight=w),
        "ks": lambda: several(y, p, lambda t, s: ks_by_hand(t, s, w)),
        "sensitivity_at_90": lambda: several(y, p, lambda t, s: sensitivity_by_hand(t, s, w)),
        "brier": lambda: (
            sk.brier_score_loss(y, p[:, 1], sample_weight=w)
            if binary
            else np.average(((p - each) ** 2).sum(axis=1), weights=w)
        ),
        "log_loss": lambda: sk.log_loss(y, p, sample_weight=w),
    }[name]()


def several(y: np.ndarray, p: np.ndarray, of: Any) -> float:
    """Binary: of class 1; else the mean over classes, one against the rest."""
    if p.shape[1] == 2:
        return float(of(y, p[:, 1]))
    return float(np.mean([of((y == k).astype(int), p[:, k]) for k in range(p.shape[1])]))


def ks_by_hand(y: np.ndarray, score: np.ndarray, w: np.ndarray) -> float:
    gaps = [
        np.average(score[y == 1] <= cut, weights=w[y == 1])
        - np.average(score[y == 0] <= cut, weights=w[y == 0])
        for cut in score
    ]
    return float(np.abs(gaps).max())


def sensitivity_by_hand(y: np.ndarray, score: np.ndarray, w: np.ndarray) -> float:
    fpr, tpr, _ = sk.roc_curve(y, score, sample_weight=w, drop_intermediate=False)
    return float(tpr[fpr <= 0.1 + 1e-12].max())


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_scikit_learn_under_integer_weights(name: str, classes: int, ties: bool) -> None:
    labels, p = problem(classes, 60, classes, ties=ties)
    weights = np.random.default_rng(7).integers(1, 4, (5, 60))
    ours = METRICS[name](labels, p)(weights)
    theirs = [reference(name, labels, p, w) for w in weights]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert len(set(np.round(ours, 9))) > 1, "the weights must matter, or this test shows nothing"


@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans(), st.sampled_from(sorted(CLASSIFICATION)))
@settings(max_examples=60, deadline=None)
def test_a_weight_is_a_repetition(seed: int, classes: int, ties: bool, name: str) -> None:
    labels, p = problem(seed, 24, classes, ties=ties)
    counts = np.random.default_rng(seed).integers(0, 3, 24)
    counts[:classes] = 1
    repeated = np.repeat(np.arange(24), counts)
    weighted = METRICS[name](labels, p)(counts[None])[0]
    plain = METRICS[name](labels[repeated], p[repeated])(np.ones((1, len(repeated))))[0]
    if name == "f1" and np.isnan(weighted):
        return  # a class that is decided for, but only in samples that were not drawn, is unknown to `plain`
    np.testing.assert_allclose(weighted, plain, rtol=1e-9, atol=1e-12)


def test_multilabel_agrees_with_scikit_learn() -> None:
    y, p = multilabel(3, 80, 4)
    w = np.random.default_rng(1).integers(1, 5, (1, 80))
    ours = {name: METRICS[name](y, p)(w)[0] for name in CLASSIFICATION}
    d, w0 = decisions(p, "multilabel"), w[0]
    columns = range(4)
    theirs = {
        "auc": sk.roc_auc_score(y, p, average="macro", sample_weight=w0),
        "accuracy": 1 - sk.hamming_loss(y, d, sample_weight=w0),
        "balanced_accuracy": np.mean(
            [sk.balanced_accuracy_score(y[:, k], d[:, k], sample_weight=w0) for k in columns]
        ),
        "f1": sk.f1_score(y, d, average="macro", sample_weight=w0),
        "average_precision": sk.average_precision_score(y, p, average="macro", sample_weight=w0),
        "brier": np.mean([sk.brier_score_loss(y[:, k], p[:, k], sample_weight=w0) for k in columns]),
        "log_loss": np.mean([sk.log_loss(y[:, k], p[:, k], sample_weight=w0) for k in columns]),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name
    flat = np.stack([1 - p.ravel(), p.ravel()], axis=1)
    confident = np.where(flat[:, :1] == 0.5, [[0.0, 0.5]], flat)  # p = 0.5 is decided as 1
    assert ours["ece"] == pytest.approx(sklearn_ece(y.ravel(), confident, np.repeat(w0, 4)), rel=1e-9)


def test_all_scores_tied_is_half() -> None:
    assert evaluate(np.array([0, 1, 1]), np.full((3, 2), 0.5), "binary")["auc"] == 0.5


def test_undefined_resamples_are_nan_and_the_others_are_not() -> None:
    labels, p = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    values = METRICS["auc"](labels, p)(np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3], [0, 0, 0]]))
    assert np.isnan(values).tolist() == [False, True, True, True]
    assert values[0] == 1.0
    assert np.isnan(METRICS["accuracy"](labels, p)(np.zeros((1, 3))))[0]


def test_one_class_leaves_auc_out_and_keeps_the_rest() -> None:
    found = evaluate(np.zeros(4, int), np.tile([0.8, 0.2], (4, 1)), "binary")
    assert "auc" not in found and "average_precision" not in found
    assert found["accuracy"] == 1.0 and found["balanced_accuracy"] == 1.0


def test_the_better_direction_is_stated_for_every_metric() -> None:
    assert set(HIGHER_IS_BETTER) == set(METRICS)
    labels, good = problem(0, 200, 3, ties=False)
    bad = good[np.random.default_rng(0).permutation(200)]
    better, worse = (evaluate(labels, p, "multiclass") for p in (good, bad))
    variances = np.random.default_rng(1).gamma(2, size=(200, 1))
    better |= evaluate(variances, variances * 1.01, "regression")
    worse |= evaluate(variances, variances[::-1], "regression")
    for name, higher in HIGHER_IS_BETTER.items():
        assert (better[name] > worse[name]) is higher, name


def test_an_unmeasured_label_counts_nowhere() -> None:
    y, p = multilabel(5, 90, 3)
    gaps = np.random.default_rng(2).random(y.shape) < 0.3
    known = np.where(gaps, -1, y.astype(np.int8))
    weights = np.random.default_rng(3).integers(0, 4, (4, 90))
    for name in CLASSIFICATION:
        ours = METRICS[name](known, p)(weights)
        # Whatever stands in a cell that nobody measured, nothing changes.
        np.testing.assert_allclose(
            METRICS[name](known, np.where(gaps, 1 - p, p))(weights), ours, err_msg=name
        )
        assert not np.allclose(METRICS[name](y, p)(weights), ours), f"{name} did not notice the gaps at all"
    w = weights[0]
    auc = [
        sk.roc_auc_score(y[~gaps[:, k], k], p[~gaps[:, k], k], sample_weight=w[~gaps[:, k]]) for k in range(3)
    ]
    assert METRICS["auc"](known, p)(weights)[0] == pytest.approx(np.mean(auc))
    right = (p >= 0.5) == (y > 0)
    assert METRICS["accuracy"](known, p)(weights)[0] == pytest.approx(
        (w[:, None] * right * ~gaps).sum() / (w[:, None] * ~gaps).sum()
    )


@pytest.mark.parametrize("columns", [1, 3])
def test_regression_agrees_with_scikit_learn(columns: int) -> None:
    random = np.random.default_rng(columns)
    y = random.gamma(2, size=(70, columns)) * 1e3
    f = y * random.lognormal(sigma=0.4, size=y.shape)
    weights = random.integers(0, 4, (3, 70))
    for w, row in zip(weights, range(3), strict=True):
        ours = {name: METRICS[name](y, f)(weights)[row] for name in REGRESSION}
        each = range(columns)
        assert ours["rmse"] == pytest.approx(
            np.mean([sk.root_mean_squared_error(y[:, k], f[:, k], sample_weight=w) for k in each])
        )
        assert ours["mae"] == pytest.approx(sk.mean_absolute_error(y, f, sample_weight=w))
        assert ours["r2"] == pytest.approx(sk.r2_score(y, f, sample_weight=w))
        loss = np.average(y / f - np.log(y / f) - 1, weights=w, axis=0)
        assert ours["qlike"] == pytest.approx(loss.mean())


def test_qlike_of_what_is_no_variance_is_an_error() -> None:
    with pytest.raises(DataError, match="1 forecasts and 0 labels"):
        METRICS["qlike"](np.ones((3, 1)), np.array([[1.0], [-1.0], [2.0]]))
    assert "qlike" not in evaluate(np.ones((3, 1)), np.array([[1.0], [-1.0], [2.0]]), "regression")


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, p = problem(4, 50, 3, ties=True)
    weights = np.random.default_rng(2).integers(0, 3, (40, 50))
    whole = {name: METRICS[name](labels, p)(weights) for name in CLASSIFICATION}
    monkeypatch.setattr(metrics, "_CHUNK", 130)
    for name in CLASSIFICATION:
        np.testing.assert_allclose(METRICS[name](labels, p)(weights), whole[name], rtol=1e-12)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_nan_and_misfits_are_errors(name: str) -> None:
    with pytest.raises(DataError, match="1 samples have NaN"):
        METRICS[name](np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]))
    with pytest.raises(DataError, match="do not fit"):
        METRICS[name](np.array([0, 1, 1]), np.full((2, 2), 0.5))
    with pytest.raises(DataError, match="do not fit"):
        METRICS[name](np.array([[0], [1]]), np.full((2, 2), 0.5))
