"""The operating point: at which probability a decision is made, chosen on validation samples and then frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.results import Decision

Floats = NDArray[np.float64]

HALF = 0.5
# Shares of counts that differ by less are equal.
ROUNDING = 1e-12


def choose(
    labels: NDArray[Any],
    probabilities: NDArray[Any],
    task: str,
    rule: str,
    value: float,
    *,
    names: Sequence[str] = (),
) -> Decision:
    """The decision by one of RULES, or `half`: 0.5, and of several classes the most probable one.

    labels: int [n], or [n, K] of multilabel with -1 unmeasured. probabilities: float [n, K]. value: of the rule; `half`
    and `youden` have none. names: of the labels, for errors. Thresholds are midway between neighbouring scores, so
    that a rounding does not change a decision.
    Raises DataError if no threshold reaches the value, or there is no positive or no negative to choose by;
    ValueError for a rule that does not exist or that the task does not have.
    """
    if rule == "half":
        return _half(task, np.shape(probabilities)[1])
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r}; there are half, {', '.join(RULES)}")
    if task not in ("binary", "multilabel"):
        raise ValueError(
            f"rule {rule!r} needs a task of yes or no, not {task}; use half: the most probable class"
        )
    scores = np.asarray(probabilities, np.float64)
    if task == "binary":
        columns = [("", labels == 1, scores[:, 1])]
    else:
        columns = []
        for k in range(labels.shape[1]):
            known = labels[:, k] >= 0
            name = f" of {names[k]!r}" if k < len(names) else f" of label {k}"
            columns.append((name, labels[known, k] > 0, scores[known, k]))
    thresholds = tuple(_threshold(Curve.of(*column), rule, value) for column in columns)
    return Decision(rule=WORDS[rule].format(value=value), thresholds=thresholds, samples=len(labels))


def decide(probabilities: NDArray[Any], task: str, decision: Decision) -> NDArray[np.int64]:
    """[n] classes, or [n, K] 0/1 of a multilabel task, from probabilities float [n, K]. Compared in float64."""
    if decision.thresholds is None:
        most_probable: NDArray[np.int64] = np.argmax(probabilities, axis=1).astype(np.int64)
        return most_probable
    scores = np.asarray(probabilities, np.float64)
    if task == "binary":
        return (scores[:, 1] >= decision.thresholds[0]).astype(np.int64)
    return (scores >= np.asarray(decision.thresholds)).astype(np.int64)


def _half(task: str, columns: int) -> Decision:
    if task == "multiclass":
        return Decision(rule="the most probable class", thresholds=None)
    return Decision(rule="0.5", thresholds=(HALF,) * (1 if task == "binary" else columns))


@dataclass(frozen=True)
class Curve:
    """What each threshold [m], rising, does to the validation samples: from deciding for all to deciding for none."""

    name: str
    thresholds: Floats
    hits: Floats  # positives decided for
    alarms: Floats  # negatives decided for
    positives: int
    negatives: int

    @classmethod
    def of(cls, name: str, positive: NDArray[np.bool_], scores: Floats) -> Curve:
        """positive bool [n], scores float64 [n] of 0..1."""
        positives, negatives = int(positive.sum()), int((~positive).sum())
        if not positives or not negatives:
            raise DataError(
                f"no threshold{name} can be chosen on {positives} positives and {negatives} negatives; use a "
                "larger validation split, or the rule half"
            )
        values, which = np.unique(scores, return_inverse=True)
        hits = np.bincount(which, weights=positive)
        alarms = np.bincount(which, weights=~positive)
        between = (values[1:] + values[:-1]) / 2
        # A score of 1 cannot be excluded by a probability.
        above = [(values[-1] + 1) / 2] if values[-1] < 1 else []
        kept = slice(None, len(values) + len(above))
        return cls(
            name,
            np.r_[values[0] / 2, between, above],
            np.r_[positives, positives - np.cumsum(hits)][kept],
            np.r_[negatives, negatives - np.cumsum(alarms)][kept],
            positives,
            negatives,
        )

    @property
    def sensitivity(self) -> Floats:
        return self.hits / self.positives

    @property
    def specificity(self) -> Floats:
        return 1 - self.alarms / self.negatives

    @property
    def precision(self) -> Floats:
        """0 where nothing is decided for: no threshold is chosen for that."""
        return self.hits / np.maximum(self.hits + self.alarms, 1)

    @property
    def share(self) -> Floats:
        return (self.hits + self.alarms) / (self.positives + self.negatives)


# Rule -> [m] which thresholds are best, from the curve and the rule's value; the first of the best is taken.
RULES: dict[str, Callable[[Curve, float], Floats]] = {
    "youden": lambda curve, _: curve.sensitivity + curve.specificity,
    "sensitivity": lambda curve, value: np.where(
        _reached(curve.sensitivity, value), curve.thresholds, np.nan
    ),
    "specificity": lambda curve, value: np.where(
        _reached(curve.specificity, value), -curve.thresholds, np.nan
    ),
    "precision": lambda curve, value: np.where(_reached(curve.precision, value), -curve.thresholds, np.nan),
    "share": lambda curve, value: -np.abs(curve.share - value),
    "cost": lambda curve, value: -(value * (curve.positives - curve.hits) + curve.alarms),
}
WORDS = {
    "youden": "largest sensitivity + specificity - 1",
    "sensitivity": "largest threshold with a sensitivity of at least {value:g}",
    "specificity": "smallest threshold with a specificity of at least {value:g}",
    "precision": "smallest threshold with a precision of at least {value:g}",
    "share": "decides for about {value:g} of the samples",
    "cost": "least cost, a miss at {value:g} times a false alarm",
}


def _reached(shares: Floats, value: float) -> NDArray[np.bool_]:
    return np.asarray(shares >= value - ROUNDING)


def _threshold(curve: Curve, rule: str, value: float) -> float:
    merit = RULES[rule](curve, value)
    if np.isnan(merit).all():
        reachable = float(getattr(curve, rule).max())
        raise DataError(
            f"no threshold{curve.name} has a {rule} of {value:g} on the {curve.positives + curve.negatives} "
            f"validation samples; the largest reachable is {reachable:.4g}"
        )
    return float(curve.thresholds[np.flatnonzero(merit >= np.nanmax(merit) - ROUNDING)[0]])
