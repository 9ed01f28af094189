from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from tlexport.evidence.accuracy.comparison import Comparison, Rule
from tlexport.evidence.accuracy.slices import drops, slices, worst
from tlexport.modalities import metrics
from tlexport.results import Decision, SliceDrop


def comparison(metric: str, labels: np.ndarray, outputs: np.ndarray, groups=None) -> Comparison:
    higher, unbounded = metrics.HIGHER_IS_BETTER[metric], metric in metrics.UNBOUNDED
    rule = Rule(metrics.METRICS[metric], higher, unbounded, 0.01, confidence=0.95, resamples=2000, seed=0)
    return Comparison(rule, labels, outputs, groups)


def two(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], axis=1).astype(np.float32)


def case(n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, the reference's scores, and the sex of each sample."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(np.int64)
    return labels, rng.normal(size=n) + 2 * labels - 1, np.where(rng.random(n) < 0.3, "F", "M")


def sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-scores))


def test_slices_are_named_and_hold_their_samples() -> None:
    labels = np.array([0, 1, 2, 1])
    found = slices(
        labels, "multiclass", ["cat", "dog", "bird"], np.array([7, 7, 9, 9]), {"sex": np.array(list("FMMF"))}
    )
    assert list(found) == ["class=cat", "class=dog", "class=bird", "group=7", "group=9", "sex=F", "sex=M"]
    assert found["class=dog"].tolist() == [False, True, False, True]
    assert found["group=9"].tolist() == [False, False, True, True]
    assert found["sex=F"].tolist() == [True, False, False, True]


def test_labels_groups_and_values_have_slices_of_their_own() -> None:
    labels = np.array([[1, 0], [-1, 1], [1, 1]], np.int8)
    found = slices(labels, "multilabel", ["a", "b"], np.arange(3), {})
    assert found["label=a"].tolist() == [True, False, True]
    many = slices(np.zeros((51, 1)), "regression", ["y"], np.arange(51), {"year": np.array(["2019"] * 51)})
    assert list(many) == ["year=2019"]


def test_a_planted_drop_is_found_where_it_is_and_comes_first() -> None:
    labels, scores, sex = case()
    rng = np.random.default_rng(1)
    after = two(sigmoid(np.where(sex == "F", scores + 2 * rng.normal(size=2000), scores + 1e-3)))
    columns = {"sex": sex, "site": np.array(["north", "south"])[rng.integers(2, size=2000)]}
    reference = comparison("auc", labels, two(sigmoid(scores)))
    found = drops(reference, after, slices(labels, "binary", ["no", "yes"], None, columns))
    first = found[0]
    assert first.slice == "sex=F" and first == worst(found)
    assert first.drop_low > 0 and first.p < 1e-4 and first.samples == (sex == "F").sum()
    part = np.flatnonzero(sex == "F")
    assert first.reference == pytest.approx(
        metrics.auc(labels[part], reference.outputs[part])(np.ones((1, len(part))))[0]
    )
    male = next(one for one in found if one.slice == "sex=M")
    assert abs(male.drop) < 1e-3 and male.p > 0.5
    assert [one.drop for one in found] == sorted((one.drop for one in found), reverse=True)


def test_a_class_is_compared_by_its_recall_at_the_operating_point() -> None:
    labels, scores, _ = case()
    p = sigmoid(scores)
    after = two(np.where(labels == 1, p * 0.8, p))
    reference = comparison("auc", labels, two(p))
    masks = slices(labels, "binary", ["no", "yes"], None, {})
    for threshold, decision in ((0.5, None), (0.3, Decision(rule="chosen", thresholds=(0.3,)))):
        yes, no = drops(reference, after, masks, decision=decision)
        hit = p[labels == 1]
        assert yes.slice == "class=yes" and yes.note == "one class only: share of right decisions"
        assert yes.reference == pytest.approx((hit >= threshold).mean())
        assert yes.drop == pytest.approx((hit >= threshold).mean() - (0.8 * hit >= threshold).mean())
        assert (no.slice, no.drop, no.p) == ("class=no", 0.0, 1.0)


def test_a_label_is_compared_by_its_recall() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((600, 2)) < 0.4).astype(np.int8)
    p = sigmoid(rng.normal(size=labels.shape) + 2 * labels - 1)
    after = p * np.array([0.7, 1.0])
    masks = slices(labels, "multilabel", ["a", "b"], None, {})
    a, b = drops(comparison("auc", labels, p), after, masks)
    hit = p[labels[:, 0] == 1, 0]
    assert a.slice == "label=a" and a.drop == pytest.approx((hit >= 0.5).mean() - (0.7 * hit >= 0.5).mean())
    assert (b.slice, b.drop) == ("label=b", 0.0)
    judged = drops(comparison("accuracy", labels, p), after, masks)
    assert all(one.note == "" for one in judged)  # the metric itself is defined there


def test_an_error_needs_no_recall() -> None:
    labels, scores, _ = case()
    p = two(sigmoid(scores))
    masks = slices(labels, "binary", ["no", "yes"], None, {})
    found = drops(comparison("log_loss", labels, p), p[:, ::-1], masks)
    assert all(one.note == "" and one.drop_low > 0 for one in found)
    values = scores[:, None]
    over = drops(comparison("rmse", values, values + 1), values + 1.5, {"all": np.ones(2000, bool)})
    assert over[0].drop == pytest.approx(0.5) and over[0].reference == pytest.approx(1.0)


def test_small_and_undefined_slices_come_last_with_a_note() -> None:
    labels, scores, _ = case(400)
    outputs = np.stack([sigmoid(scores + shift) for shift in (-1, 0, 1)], axis=1).astype(np.float32)
    labels = labels.copy()
    labels[:40] = 2
    masks = {"few": np.arange(400) < 29, "two classes": labels < 2, "all": np.ones(400, bool)}
    found = drops(comparison("auc", labels, outputs), outputs, masks)
    assert [one.slice for one in found] == ["all", "few", "two classes"]
    assert found[1].note == "29 samples, fewer than 30" and found[1].drop is None is found[1].p
    assert "undefined on the 360 test samples" in found[2].note
    assert worst(found) is None and drops(comparison("auc", labels, outputs), outputs, {}) == ()
    assert len(drops(comparison("auc", labels, outputs), outputs, masks, minimum=20)[1].note) == 0


def test_a_group_is_judged_by_its_own_samples() -> None:
    labels, scores, _ = case(600)
    groups = np.repeat(np.arange(3), 200)
    rng = np.random.default_rng(3)
    after = two(sigmoid(np.where(groups == 1, rng.normal(size=600), scores)))
    found = drops(
        comparison("auc", labels, two(sigmoid(scores)), groups),
        after,
        slices(labels, "binary", [], groups, {}),
    )
    assert found[0].slice == "group=1" and found[0].drop_low > 0
    assert all(one.note == "within one group" for one in found)


@pytest.mark.parametrize(("metric", "runs"), [("accuracy", 100), ("auc", 100)])
def test_holm_keeps_the_false_alarms_over_many_slices(metric: str, runs: int) -> None:
    """Slices of 100 without a drop, ten a run: at 5%, P(Bin(100, 0.05) > 11) = 0.4%."""
    rng, alarms, unadjusted = np.random.default_rng(4), 0, 0
    for seed in range(runs):
        labels, scores, _ = case(1000, seed)
        reference, after = (two(sigmoid(scores + 0.3 * rng.normal(size=1000))) for _ in range(2))
        of = rng.integers(10, size=1000)
        found = drops(comparison(metric, labels, reference), after, {str(k): of == k for k in range(10)})
        alarms += any(one.p < 0.05 for one in found)
        unadjusted += any(one.drop_low > 0 for one in found)
    assert alarms <= 11 < unadjusted


def test_few_flips_are_judged_exactly() -> None:
    """Six harmful flips of 100 and none mended: half a chance in 2^6, and Holm over the two slices."""
    labels = np.arange(200) % 2
    right = two(np.where(labels == 1, 0.9, 0.1))
    after = np.where((np.arange(200) < 12)[:, None], right[:, ::-1], right)
    masks = {"first": np.arange(200) < 100, "second": np.arange(200) >= 100}
    masks["first"][6:12], masks["second"][6:12] = False, True
    found = drops(comparison("accuracy", labels, right), after, masks)
    assert [one.p for one in found] == pytest.approx([0.5**6, 0.5**6])


def test_many_slices_of_ten_thousand_samples_take_seconds() -> None:
    """Twenty slices, half of them of 9000 samples: measured at 3 s of processor time."""
    labels, scores, _ = case(10_000)
    rng = np.random.default_rng(5)
    columns = {f"c{k}": rng.choice(["x", "y"], p=[0.9, 0.1], size=10_000) for k in range(10)}
    after = two(sigmoid(scores + 0.2 * rng.normal(size=10_000)))
    reference = comparison("auc", labels, two(sigmoid(scores)))
    begun = time.process_time()
    found = drops(reference, after, slices(labels, "binary", [], None, columns))
    assert len(found) == 20 and time.process_time() - begun < 12


def test_parts_keep_what_belongs_to_their_samples() -> None:
    labels, scores, _ = case(50)
    whole = comparison("auc", labels, two(sigmoid(scores)), np.arange(50))
    part = whole.part(np.arange(50) % 2 == 0)
    assert (
        len(part) == 25 and (part.labels == labels[::2]).all() and (part.groups == np.arange(0, 50, 2)).all()
    )
    assert replace(whole, groups=None).part(labels == 1).groups is None
    assert isinstance(
        worst([SliceDrop(slice="a", samples=1, reference=1, drop=0.1, drop_low=0, drop_high=1)]), SliceDrop
    )
