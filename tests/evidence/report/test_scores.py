"""Curves and counts against scikit-learn, on random answers with ties."""

from __future__ import annotations

import numpy as np
import pytest

from tlexport.evidence.report import scores

metrics = pytest.importorskip("sklearn.metrics")


def drawn(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = rng.random(n) < 0.3
    return truth, np.round(rng.normal(size=n) + truth, 1)  # rounding makes ties


def test_roc_and_its_area() -> None:
    truth, score = drawn()
    across, up = scores.roc(truth, score)
    assert metrics.auc(across, up) == pytest.approx(metrics.roc_auc_score(truth, score), abs=1e-12)
    want = metrics.roc_curve(truth, score, drop_intermediate=False)
    assert np.allclose(across, want[0]) and np.allclose(up, want[1])


def test_precision_against_recall() -> None:
    truth, score = drawn()
    recall, precision = scores.precision_recall(truth, score)
    want_precision, want_recall, _ = metrics.precision_recall_curve(truth, score)
    assert np.allclose(recall, want_recall[:-1][::-1]) and np.allclose(precision, want_precision[:-1][::-1])


def test_the_mean_curve_of_one_class_is_its_own_and_of_two_lies_between() -> None:
    truth, score = drawn()
    one = np.array(scores.mean_roc([(truth, score)]))
    better, worse = (truth, score + 2.0 * truth), (truth, -score)
    both = np.array(scores.mean_roc([better, worse]))
    assert len(one) <= scores.VERTICES and np.all(np.diff(one, axis=0) >= 0)
    high, low = (np.interp(both[1:, 0], *scores.roc(*pair)) for pair in (better, worse))
    assert np.allclose(both[1:, 1], (high + low) / 2, atol=1e-9)
    precision = np.array(scores.mean_precision_recall([better, worse]))
    assert np.all((precision >= 0) & (precision <= 1))


def test_classes_without_both_kinds_have_no_curve() -> None:
    labels, made = np.array([0, 0, 2]), np.full((3, 3), 1 / 3)
    assert len(scores.columns(labels, made, "multiclass")) == 2
    assert len(scores.columns(np.array([1, 1]), np.full((2, 2), 0.5), "binary")) == 0
    unknown = np.array([[1, -1], [0, -1], [-1, 0]], np.int8)
    (pair,) = scores.columns(unknown, np.full((3, 2), 0.5), "multilabel")
    assert pair[0].tolist() == [True, False]


def test_confusion_counts() -> None:
    rng = np.random.default_rng(4)
    labels, decided = rng.integers(4, size=(2, 500))
    assert np.array_equal(scores.confusion(labels, decided, 4), metrics.confusion_matrix(labels, decided))


def test_what_is_stated_and_whether_it_came_true() -> None:
    made = np.array([[0.2, 0.8], [0.6, 0.4]])
    said, right = scores.stated(np.array([1, 1]), made, "binary")
    assert said.tolist() == [0.8, 0.4] and right.tolist() == [True, True]
    said, right = scores.stated(np.array([1, 1]), made, "multiclass")
    assert said.tolist() == [0.8, 0.6] and right.tolist() == [True, False]
    said, right = scores.stated(np.array([[1, -1], [0, 1]]), made, "multilabel")
    assert said.tolist() == [0.2, 0.6, 0.4] and right.tolist() == [True, False, True]


def test_spans_of_time_hold_equally_many_samples_in_order() -> None:
    days = np.datetime64("2020-01-01") + np.array([9, 0, 5, 1])
    when, means = scores.over_time(days, np.array([4.0, 1.0, 3.0, 1.0]), 2)
    assert means == [1.0, 3.5] and when == sorted(when)


def test_equal_samples_have_equal_quantiles() -> None:
    values = np.random.default_rng(5).normal(size=1000)
    points = np.array(scores.quantiles(values, values[::-1]))
    assert np.array_equal(points[:, 0], points[:, 1]) and len(points) == 200
    assert len(scores.drawn_rows(10, 20)) == 10 and len(set(scores.drawn_rows(99, 20).tolist())) == 20
