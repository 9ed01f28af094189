"""Classification metrics, prepared once and then evaluated for many rows of sample weights.

A bootstrap resample is a row of counts: how often each sample was drawn. So a metric that takes weights
judges thousands of resamples without touching the samples again:

    of = METRICS["auc"](labels, probabilities)   # sorts once
    values = of(weights)                         # [B, n] -> [B], NaN where the metric is undefined

Shapes and types, everywhere in this module:
    labels         int64 [n] of class indices (binary, multiclass), or 0/1 [n, K] (multilabel)
    probabilities  float [n, K]; binary has K = 2, multilabel has one independent probability a label
    weights        float or int [B, n], not negative
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError

Array = NDArray[Any]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Evaluate = Callable[[Array], Floats]
Metric = Callable[[Array, Array], Evaluate]

ECE_BINS = 15
_CHUNK = 1 << 22  # elements of a [rows, n] temporary: 32 MiB


def auc(labels: Array, probabilities: Array) -> Evaluate:
    """Area under the ROC curve, ties counted half (Mann-Whitney); macro one-vs-rest for classes or labels.

    Undefined (NaN) where a class has no positive or no negative sample.
    """
    truth, scores = _one_vs_rest(labels, probabilities)
    return _macro([_ranked(t, s, _auc_of_counts) for t, s in zip(truth.T, scores.T, strict=True)])


def average_precision(labels: Array, probabilities: Array) -> Evaluate:
    """Sum over thresholds of precision times the gain in recall; macro for several classes or labels."""
    truth, scores = _one_vs_rest(labels, probabilities)
    return _macro([_ranked(t, s, _precision_of_counts) for t, s in zip(truth.T, scores.T, strict=True)])


def accuracy(labels: Array, probabilities: Array) -> Evaluate:
    """Share of right decisions; for multilabel the mean over labels (MedMNIST's ACC), not the exact match."""
    labels, probabilities = _checked(labels, probabilities)
    right = decisions(probabilities, _task(labels, probabilities)) == labels
    return _mean(right.reshape(len(labels), -1).mean(axis=1))


def balanced_accuracy(labels: Array, probabilities: Array) -> Evaluate:
    """Mean recall over the classes in `labels`; for multilabel the mean of each label's two recalls."""
    truth, decided = _indicators(labels, probabilities)
    if labels.ndim == 2:
        truth, decided = np.hstack([truth, ~truth]), np.hstack([decided, ~decided])
    present = truth.any(axis=0)
    hits, support = (truth & decided)[:, present], truth[:, present]
    return _rowwise(lambda w: _ratio(w @ hits, w @ support).mean(axis=1), width=hits.shape[1])


def f1(labels: Array, probabilities: Array) -> Evaluate:
    """2TP / (2TP + FP + FN): of class 1 if binary, else the mean over classes in labels or decisions."""
    truth, decided = _indicators(labels, probabilities)
    if labels.ndim == 1 and truth.shape[1] == 2:
        truth, decided = truth[:, 1:], decided[:, 1:]
    present = (truth | decided).any(axis=0)
    if not present.any():
        return _mean(np.full(len(labels), np.nan))
    hits, total = 2.0 * (truth & decided)[:, present], (truth.astype(float) + decided)[:, present]
    return _rowwise(lambda w: _ratio(w @ hits, w @ total).mean(axis=1), width=hits.shape[1])


def ece(labels: Array, probabilities: Array) -> Evaluate:
    """Expected calibration error of the decision, 15 equal bins (lo, hi] (Guo et al. 2017, eq. 3).

    For multilabel each label is a decision of its own, with confidence max(p, 1 - p).
    """
    labels, probabilities = _checked(labels, probabilities)
    right = decisions(probabilities, _task(labels, probabilities)) == labels
    if labels.ndim == 2:
        confidence, columns = np.maximum(probabilities, 1 - probabilities), labels.shape[1]
    else:
        confidence, right, columns = probabilities.max(axis=1)[:, None], right[:, None], 1
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.zeros((len(labels), ECE_BINS))
    np.add.at(gaps, (np.arange(len(labels))[:, None], bins), (right - confidence) / columns)
    return _rowwise(lambda w: _ratio(np.abs(w @ gaps).sum(axis=1), w.sum(axis=1)), width=ECE_BINS)


def brier(labels: Array, probabilities: Array) -> Evaluate:
    """Mean squared error of the probability: of class 1 if binary (0 to 1), summed over classes if multiclass
    (0 to 2, Brier 1950), averaged over labels if multilabel (0 to 1)."""
    truth, _ = _indicators(labels, probabilities)
    errors = (np.asarray(probabilities, np.float64) - truth) ** 2
    binary = labels.ndim == 1 and truth.shape[1] == 2
    per_sample = errors[:, 1] if binary else errors.mean(axis=1) if labels.ndim == 2 else errors.sum(axis=1)
    return _mean(per_sample)


def log_loss(labels: Array, probabilities: Array) -> Evaluate:
    """Mean of -ln(probability of the truth), natural logarithm; averaged over labels if multilabel.

    A probability is clipped at 2.2e-16 (float64's epsilon): one certain mistake costs 36, not infinity.
    """
    labels, probabilities = _checked(labels, probabilities)
    if labels.ndim == 2:
        of_truth = np.where(labels > 0, probabilities, 1 - probabilities)
    else:
        of_truth = np.take_along_axis(probabilities, labels[:, None].astype(np.int64), axis=1)
    return _mean(-np.log(np.clip(of_truth, np.finfo(np.float64).eps, 1.0)).mean(axis=1))


METRICS: dict[str, Metric] = {
    "auc": auc,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "average_precision": average_precision,
    "ece": ece,
    "brier": brier,
    "log_loss": log_loss,
}
HIGHER_IS_BETTER: dict[str, bool] = {name: name not in ("ece", "brier", "log_loss") for name in METRICS}


def evaluate(labels: Array, probabilities: Array, names: Iterable[str] | None = None) -> dict[str, float]:
    """Each metric on the samples as they are. One that is undefined (AUC of a single class) is left out."""
    once = np.ones((1, len(labels)))
    values = {name: float(METRICS[name](labels, probabilities)(once)[0]) for name in names or METRICS}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def decisions(probabilities: Array, task: str) -> NDArray[np.int64]:
    """[n] the most probable class (the first of equals), or [n, K] 0/1 of p >= 0.5 for multilabel."""
    if task == "multilabel":
        return (np.asarray(probabilities) >= 0.5).astype(np.int64)
    most_probable: NDArray[np.int64] = np.argmax(probabilities, axis=1).astype(np.int64)
    return most_probable


def _task(labels: Array, probabilities: Array) -> str:
    if labels.ndim == 2:
        return "multilabel"
    return "binary" if probabilities.shape[1] == 2 else "multiclass"


def _checked(labels: Array, probabilities: Array) -> tuple[Array, Floats]:
    """Both as arrays that fit together. Raises DataError if they do not, or a probability is NaN."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    fits = probabilities.ndim == 2 and len(labels) == len(probabilities) and len(labels) > 0
    if not fits or (labels.ndim == 2 and labels.shape != probabilities.shape) or labels.ndim not in (1, 2):
        raise DataError(
            f"labels {list(labels.shape)} and probabilities {list(probabilities.shape)} do not fit together; "
            "expected [n] or [n, K] and [n, K], n at least 1"
        )
    if np.isnan(probabilities).any():
        raise DataError(f"{int(np.isnan(probabilities).any(axis=1).sum())} samples have NaN as a probability")
    return labels, probabilities


def _indicators(labels: Array, probabilities: Array) -> tuple[Flags, Flags]:
    """Truth and decision as one column a class or label, each bool [n, K]."""
    labels, probabilities = _checked(labels, probabilities)
    decided = decisions(probabilities, _task(labels, probabilities))
    if labels.ndim == 2:
        return labels > 0, decided > 0
    classes = np.arange(probabilities.shape[1])
    return labels[:, None] == classes, decided[:, None] == classes


def _one_vs_rest(labels: Array, probabilities: Array) -> tuple[Flags, Floats]:
    """Truth bool [n, C] and scores [n, C]; C is 1 for binary (class 1), else K."""
    truth, _ = _indicators(labels, probabilities)
    scores = np.asarray(probabilities, np.float64)
    return (truth[:, 1:], scores[:, 1:]) if labels.ndim == 1 and truth.shape[1] == 2 else (truth, scores)


def _ranked(truth: Flags, scores: Floats, summary: Callable[[Floats, Floats], Floats]) -> Evaluate:
    """Sort by falling score once; `summary` gets the positives' and negatives' weight at each score."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positive = truth[order]

    def of(weights: Floats) -> Floats:
        ordered = weights[:, order]
        return summary(
            np.add.reduceat(ordered * positive, starts, axis=1),
            np.add.reduceat(ordered * ~positive, starts, axis=1),
        )

    return _rowwise(of, width=len(truth))


def _auc_of_counts(positive: Floats, negative: Floats) -> Floats:
    """From weights [rows, scores], scores falling: P(a positive scores above a negative), ties half."""
    above = np.cumsum(positive, axis=1) - positive / 2
    return _ratio((negative * above).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))


def _precision_of_counts(positive: Floats, negative: Floats) -> Floats:
    """From weights [rows, scores], scores falling: the step-wise area under precision against recall."""
    hits = np.cumsum(positive, axis=1)
    precision = np.nan_to_num(_ratio(hits, hits + np.cumsum(negative, axis=1)))
    return _ratio((positive * precision).sum(axis=1), hits[:, -1])


def _macro(parts: list[Evaluate]) -> Evaluate:
    return lambda weights: np.mean([part(weights) for part in parts], axis=0)


def _mean(per_sample: Floats) -> Evaluate:
    return _rowwise(lambda w: _ratio(w @ per_sample, w.sum(axis=1)), width=1)


def _rowwise(of: Callable[[Floats], Floats], width: int) -> Evaluate:
    """Apply `of` to as many rows of weights at a time as keep its temporaries small."""

    def evaluate_rows(weights: Array) -> Floats:
        if weights.ndim != 2:
            raise ValueError(f"weights must be [B, n], got {list(weights.shape)}")
        rows = max(1, _CHUNK // max(width, weights.shape[1]))
        parts = [
            of(np.asarray(weights[i : i + rows], np.float64)) for i in range(0, max(len(weights), 1), rows)
        ]
        return np.concatenate(parts)

    return evaluate_rows


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, NaN where the denominator is 0."""
    undefined: Floats = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
