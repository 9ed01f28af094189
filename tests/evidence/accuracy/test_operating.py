from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from tlexport.errors import DataError
from tlexport.evidence.accuracy.operating import RULES, WORDS, choose, decide
from tlexport.results import Decision


def two(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], axis=1).astype(np.float32)


def case(n: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(np.int64)
    return labels, two(1 / (1 + np.exp(-(rng.normal(size=n) + 2 * labels - 1.5))))


def rates(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float]:
    decided = probabilities[:, 1].astype(float) >= threshold
    positive = labels == 1
    return {
        "sensitivity": decided[positive].mean(),
        "specificity": (~decided[~positive]).mean(),
        "precision": positive[decided].mean() if decided.any() else 0.0,
        "share": decided.mean(),
    }


def others(probabilities: np.ndarray) -> np.ndarray:
    """One threshold between any two scores, and the ends."""
    p = np.unique(probabilities[:, 1].astype(float))
    return np.r_[p[0] / 2, (p[1:] + p[:-1]) / 2, (p[-1] + 1) / 2]


def test_every_rule_has_its_words() -> None:
    assert list(WORDS) == list(RULES)


@pytest.mark.parametrize("value", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("rule", ["sensitivity", "specificity", "precision"])
def test_the_value_is_reached_and_by_no_better_threshold(rule: str, value: float) -> None:
    labels, probabilities = case()
    found = choose(labels, probabilities, "binary", rule, value)
    (threshold,) = found.thresholds
    assert rates(labels, probabilities, threshold)[rule] >= value and found.samples == 500
    reaching = [t for t in others(probabilities) if rates(labels, probabilities, t)[rule] >= value]
    assert threshold == pytest.approx(max(reaching) if rule == "sensitivity" else min(reaching))


def test_youden_is_the_roc_curves() -> None:
    labels, probabilities = case()
    (threshold,) = choose(labels, probabilities, "binary", "youden", 0).thresholds
    alarms, hits, _ = roc_curve(labels, probabilities[:, 1], drop_intermediate=False)
    found = rates(labels, probabilities, threshold)
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx((hits - alarms).max())


@pytest.mark.parametrize("value", [0.01, 0.2, 0.75])
def test_share_is_met_to_one_sample(value: float) -> None:
    labels, probabilities = case()
    (threshold,) = choose(labels, probabilities, "binary", "share", value).thresholds
    assert rates(labels, probabilities, threshold)["share"] == pytest.approx(value, abs=0.5 / 500)


@pytest.mark.parametrize("value", [0.01, 1.0, 20.0])
def test_no_threshold_costs_less(value: float) -> None:
    labels, probabilities = case()

    def cost(threshold: float) -> float:
        decided = probabilities[:, 1].astype(float) >= threshold
        return value * (~decided & (labels == 1)).sum() + (decided & (labels == 0)).sum()

    found = choose(labels, probabilities, "binary", "cost", value)
    assert cost(found.thresholds[0]) == pytest.approx(min(map(cost, others(probabilities))))
    assert found.rule == f"least cost, a miss at {value:g} times a false alarm"


def test_a_dear_miss_lowers_the_threshold() -> None:
    labels, probabilities = case()
    (cheap,), (dear,) = (choose(labels, probabilities, "binary", "cost", v).thresholds for v in (0.2, 20))
    assert dear < cheap


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rounding_flips_nothing(rule: str) -> None:
    labels, probabilities = case()
    decision = choose(labels, probabilities, "binary", rule, 0.5)
    shaken = probabilities + np.random.default_rng(1).uniform(-1e-7, 1e-7, size=probabilities.shape)
    decided = decide(probabilities, "binary", decision)
    assert (decided == decide(shaken, "binary", decision)).all() and decided.dtype == np.int64


def test_neighbouring_float32_scores_are_told_apart() -> None:
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    probabilities = np.array([[0.7, low], [0.7, high]], np.float32)
    decision = choose(np.array([0, 1]), probabilities, "binary", "youden", 0)
    assert decide(probabilities, "binary", decision).tolist() == [0, 1]


def test_each_label_has_its_own_threshold_and_unmeasured_ones_do_not_count() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((400, 3)) < 0.4).astype(np.int8)
    probabilities = 1 / (1 + np.exp(-(rng.normal(size=(400, 3)) + 2 * labels - [0, 1, 3])))
    labels[::3, 1] = -1
    found = choose(labels, probabilities, "multilabel", "sensitivity", 0.9)
    known = labels[:, 1] >= 0
    one = two(probabilities[known, 1].astype(np.float32))
    alone = choose(labels[known, 1].astype(np.int64), one, "binary", "sensitivity", 0.9)
    assert len(found.thresholds) == 3 and found.thresholds[1] == pytest.approx(alone.thresholds[0], abs=1e-6)
    assert found.thresholds[0] > found.thresholds[1] > found.thresholds[2]
    decided = decide(probabilities, "multilabel", found)
    assert decided.shape == (400, 3) and (decided[:, 2] == (probabilities[:, 2] >= found.thresholds[2])).all()


def test_half_is_the_most_probable_class_of_several() -> None:
    several = np.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]])
    found = choose(np.array([0, 1]), several, "multiclass", "half", 0)
    assert found == Decision(rule="the most probable class", thresholds=None)
    assert decide(several, "multiclass", found).tolist() == [1, 0]
    assert choose(np.array([0, 1]), several[:, :2], "binary", "half", 0).thresholds == (0.5,)
    assert choose(np.zeros((2, 3)), several, "multilabel", "half", 0).thresholds == (0.5,) * 3


def test_what_cannot_be_reached_says_what_can() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 0])
    p = two(np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9]))
    with pytest.raises(
        DataError,
        match=r"no threshold has a precision of 0.9 on the 7 validation samples; .* reachable is 0.75",
    ):
        choose(labels, p, "binary", "precision", 0.9)
    certain = two(np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 1.0]))
    with pytest.raises(DataError, match=r"specificity of 1 .* reachable is 0.75"):
        choose(labels, certain, "binary", "specificity", 1.0)
    with pytest.raises(DataError, match="of 'edema' can be chosen on 0 positives and 2 negatives"):
        choose(np.array([[0], [0]]), p[:2, 1:], "multilabel", "youden", 0, names=["edema"])


def test_rules_that_do_not_exist_are_named() -> None:
    labels, p = case()
    with pytest.raises(ValueError, match="no rule 'f1'; there are half, youden, sensitivity"):
        choose(labels, p, "binary", "f1", 0)
    with pytest.raises(ValueError, match="not multiclass; use half"):
        choose(labels, p, "multiclass", "youden", 0)
