"""Metrics, prepared once and then evaluated for many rows of sample weights.

A bootstrap resample is a row of counts: how often each sample was drawn. So a metric that takes weights
judges thousands of resamples without touching the samples again:

    of = METRICS["auc"](labels, probabilities)   # sorts once
    values = of(weights)                         # [B, n] -> [B], NaN where the metric is undefined

Shapes and types, everywhere in this module:
    labels         int64 [n] of class indices (binary, multiclass), 0/1 [n, K] (multilabel; -1: not measured, and
                   such a cell counts nowhere), or float [n, K] (regression)
    probabilities  float [n, K]; binary has K = 2, multilabel has one independent probability a label
    values         float [n, K] of a regression
    weights        float or int [B, n], not negative
"""

from __future__ import annotations

from collections.abc import Callable
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
    return _ranked_macro(labels, probabilities, _auc_of_counts)


def average_precision(labels: Array, probabilities: Array) -> Evaluate:
    """Sum over thresholds of precision times the gain in recall; macro for several classes or labels."""
    return _ranked_macro(labels, probabilities, _precision_of_counts)


def ks(labels: Array, probabilities: Array) -> Evaluate:
    """Kolmogorov-Smirnov: the largest gap between the score distributions of positives and negatives; macro."""
    return _ranked_macro(labels, probabilities, _largest_gap)


def sensitivity_at_90(labels: Array, probabilities: Array) -> Evaluate:
    """The largest recall of the positives that leaves a specificity of at least 0.9; macro."""
    return _ranked_macro(labels, probabilities, _recall_at_specificity)


def accuracy(labels: Array, probabilities: Array) -> Evaluate:
    """Share of right decisions; for multilabel the mean over labels (MedMNIST's ACC), not the exact match."""
    labels, probabilities = _checked(labels, probabilities)
    right = decisions(probabilities, _task(labels, probabilities)) == labels
    return _mean(*_cells(right, labels))


def balanced_accuracy(labels: Array, probabilities: Array) -> Evaluate:
    """Mean recall over the classes in `labels`; for multilabel the mean of each label's two recalls."""
    truth, decided, known = _indicators(labels, probabilities)
    if labels.ndim == 2:
        truth, decided = np.hstack([truth, ~truth & known]), np.hstack([decided, ~decided & known])
    present = truth.any(axis=0)
    hits, support = (truth & decided)[:, present], truth[:, present]
    return _rowwise(lambda w: _ratio(w @ hits, w @ support).mean(axis=1), width=hits.shape[1])


def f1(labels: Array, probabilities: Array) -> Evaluate:
    """2TP / (2TP + FP + FN): of class 1 if binary, else the mean over classes in labels or decisions."""
    truth, decided, known = _indicators(labels, probabilities)
    decided = decided & known
    if labels.ndim == 1 and truth.shape[1] == 2:
        truth, decided = truth[:, 1:], decided[:, 1:]
    present = (truth | decided).any(axis=0)
    if not present.any():
        return _mean(np.full(len(labels), np.nan))
    hits, total = 2.0 * (truth & decided)[:, present], (truth.astype(float) + decided)[:, present]
    return _rowwise(lambda w: _ratio(w @ hits, w @ total).mean(axis=1), width=hits.shape[1])


def mcc(labels: Array, probabilities: Array) -> Evaluate:
    """Matthews correlation of decisions and labels; several classes: R_K (Gorodkin 2004, eq. 8); macro over labels.

    0 where all decisions or all labels are the same, as scikit-learn has it.
    """
    labels, probabilities = _checked(labels, probabilities)
    decided = decisions(probabilities, _task(labels, probabilities))
    if labels.ndim == 2:
        columns = [(labels[:, k], decided[:, k], labels[:, k] >= 0) for k in range(labels.shape[1])]
        return _macro([_correlation(np.eye(2)[t.clip(0)], np.eye(2)[d], k) for t, d, k in columns])
    eye = np.eye(probabilities.shape[1])
    return _correlation(eye[labels], eye[decided], np.ones(len(labels), bool))


def ece(labels: Array, probabilities: Array) -> Evaluate:
    """Expected calibration error of the decision, 15 equal bins (lo, hi] (Guo et al. 2017, eq. 3).

    For multilabel each label is a decision of its own, with confidence max(p, 1 - p).
    """
    labels, probabilities = _checked(labels, probabilities)
    right = decisions(probabilities, _task(labels, probabilities)) == labels
    if labels.ndim == 2:
        confidence, known = np.maximum(probabilities, 1 - probabilities), labels >= 0
    else:
        confidence, right = probabilities.max(axis=1)[:, None], right[:, None]
        known = np.ones(right.shape, bool)
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.zeros((len(labels), ECE_BINS))
    np.add.at(gaps, (np.arange(len(labels))[:, None], bins), np.where(known, right - confidence, 0.0))
    cells = known.sum(axis=1).astype(np.float64)
    return _rowwise(lambda w: _ratio(np.abs(w @ gaps).sum(axis=1), w @ cells), width=ECE_BINS)


def brier(labels: Array, probabilities: Array) -> Evaluate:
    """Mean squared error of the probability: of class 1 if binary (0 to 1), summed over classes if multiclass
    (0 to 2, Brier 1950), averaged over labels if multilabel (0 to 1)."""
    truth, _, _ = _indicators(labels, probabilities)
    errors = (np.asarray(probabilities, np.float64) - truth) ** 2
    if labels.ndim == 2:
        return _mean(*_cells(errors, labels))
    return _mean(errors[:, 1] if truth.shape[1] == 2 else errors.sum(axis=1))


def log_loss(labels: Array, probabilities: Array) -> Evaluate:
    """Mean of -ln(probability of the truth), natural logarithm; averaged over labels if multilabel.

    A probability is clipped at 2.2e-16 (float64's epsilon): one certain mistake costs 36, not infinity.
    """
    labels, probabilities = _checked(labels, probabilities)
    if labels.ndim == 2:
        of_truth = np.where(labels > 0, probabilities, 1 - probabilities)
    else:
        of_truth = np.take_along_axis(probabilities, labels[:, None].astype(np.int64), axis=1)
    costs = -np.log(np.clip(of_truth, np.finfo(np.float64).eps, 1.0))
    return _mean(*_cells(costs, labels))


def rmse(labels: Array, values: Array) -> Evaluate:
    """Root of the mean squared error, in the label's unit; mean over several values."""
    labels, values = _paired(labels, values)
    squares = (values - labels) ** 2
    return _rowwise(lambda w: np.sqrt(_ratio(w @ squares, _total(w))).mean(axis=1), width=squares.shape[1])


def mae(labels: Array, values: Array) -> Evaluate:
    """Mean absolute error, in the label's unit; mean over several values."""
    labels, values = _paired(labels, values)
    return _mean(np.abs(values - labels).mean(axis=1))


def r2(labels: Array, values: Array) -> Evaluate:
    """Coefficient of determination, 1 - residual / total sum of squares about the weighted mean; mean over values."""
    labels, values = _paired(labels, values)
    # Shifted by the plain mean: the two sums of the variance would otherwise cancel.
    centred = labels - labels.mean(axis=0)
    squares, own = (values - labels) ** 2, centred**2

    def of(weights: Floats) -> Floats:
        total = weights @ own - (weights @ centred) ** 2 / _total(weights)
        explained: Floats = (1 - _ratio(weights @ squares, total)).mean(axis=1)
        return explained

    return _rowwise(of, width=labels.shape[1])


def qlike(labels: Array, values: Array) -> Evaluate:
    """Mean of y/f - ln(y/f) - 1 of a variance y and its forecast f (Patton 2011, J. Econometrics 160, eq. 24 with b = -2).

    0 is perfect. Raises DataError where either is not positive: the loss has no meaning there.
    """
    labels, values = _paired(labels, values)
    wrong = int((values <= 0).sum()), int((labels <= 0).sum())
    if any(wrong):
        raise DataError(f"QLIKE needs positive variances; {wrong[0]} forecasts and {wrong[1]} labels are not")
    ratio = labels / values
    return _mean((ratio - np.log(ratio) - 1).mean(axis=1))


CLASSIFICATION: dict[str, Metric] = {
    "auc": auc,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "average_precision": average_precision,
    "sensitivity_at_90": sensitivity_at_90,
    "ks": ks,
    "mcc": mcc,
    "ece": ece,
    "brier": brier,
    "log_loss": log_loss,
}
REGRESSION: dict[str, Metric] = {"rmse": rmse, "mae": mae, "r2": r2, "qlike": qlike}
METRICS: dict[str, Metric] = CLASSIFICATION | REGRESSION
_LOWER = ("ece", "brier", "log_loss", "rmse", "mae", "qlike")
HIGHER_IS_BETTER: dict[str, bool] = {name: name not in _LOWER for name in METRICS}
# Errors without an upper limit: a drop is a share of the reference's own.
UNBOUNDED = frozenset({"rmse", "mae", "qlike"})


def evaluate(labels: Array, outputs: Array, task: str) -> dict[str, float]:
    """Each metric of the task on the samples as they are. One that is undefined (AUC of a single class) is left out."""
    known = REGRESSION if task == "regression" else CLASSIFICATION
    if task == "regression" and (np.min(labels) <= 0 or np.min(outputs) <= 0):
        known = {name: metric for name, metric in known.items() if name != "qlike"}
    once = np.ones((1, len(labels)))
    values = {name: float(metric(labels, outputs)(once)[0]) for name, metric in known.items()}
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


def _paired(labels: Array, values: Array) -> tuple[Floats, Floats]:
    """A regression's labels and values, both float64 [n, K]. Raises DataError if they do not fit or are not finite."""
    labels, values = np.asarray(labels, np.float64), np.asarray(values, np.float64)
    if labels.shape != values.shape or labels.ndim != 2 or not len(labels):
        raise DataError(
            f"labels {list(labels.shape)} and values {list(values.shape)} do not fit together; expected [n, K] twice"
        )
    if broken := int((~np.isfinite(values)).any(axis=1).sum()):
        raise DataError(f"{broken} samples have NaN or infinity as a value")
    return labels, values


def _indicators(labels: Array, probabilities: Array) -> tuple[Flags, Flags, Flags]:
    """Truth, decision and whether it was measured, one column a class or label, each bool [n, K]."""
    labels, probabilities = _checked(labels, probabilities)
    decided = decisions(probabilities, _task(labels, probabilities))
    if labels.ndim == 2:
        return labels > 0, decided > 0, labels >= 0
    classes = np.arange(probabilities.shape[1])
    truth: Flags = labels[:, None] == classes
    return truth, decided[:, None] == classes, np.ones(truth.shape, bool)


def _cells(values: Array, labels: Array) -> tuple[Floats, Floats | None]:
    """Per-sample sums of values [n] or [n, K] over measured cells, and how many those are (None: one each)."""
    values = np.asarray(values, np.float64)
    if labels.ndim == 1:
        return values.reshape(len(labels), -1).mean(axis=1), None
    known = labels >= 0
    return np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64)


def _ranked_macro(
    labels: Array, probabilities: Array, summary: Callable[[Floats, Floats], Floats]
) -> Evaluate:
    """One column for binary (class 1), else the mean over classes or labels; unmeasured cells are left out."""
    truth, _, known = _indicators(labels, probabilities)
    scores = np.asarray(probabilities, np.float64)
    first = 1 if labels.ndim == 1 and truth.shape[1] == 2 else 0
    columns = range(first, truth.shape[1])
    return _macro([_ranked(truth[:, k], known[:, k], scores[:, k], summary) for k in columns])


def _ranked(
    truth: Flags, known: Flags, scores: Floats, summary: Callable[[Floats, Floats], Floats]
) -> Evaluate:
    """Sort by falling score once; `summary` gets the positives' and negatives' weight at each score."""
    order = np.argsort(-scores, kind="stable")[known[np.argsort(-scores, kind="stable")]]
    if not len(order):
        return _mean(np.full(len(truth), np.nan))
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


def _largest_gap(positive: Floats, negative: Floats) -> Floats:
    shares = [
        np.cumsum(w, axis=1) / np.where(w.sum(axis=1) > 0, w.sum(axis=1), np.nan)[:, None]
        for w in (positive, negative)
    ]
    return np.asarray(np.abs(shares[0] - shares[1]).max(axis=1), np.float64)


def _recall_at_specificity(positive: Floats, negative: Floats) -> Floats:
    totals = [np.where(w.sum(axis=1) > 0, w.sum(axis=1), np.nan)[:, None] for w in (positive, negative)]
    recall, alarms = np.cumsum(positive, axis=1) / totals[0], np.cumsum(negative, axis=1) / totals[1]
    allowed = np.where(alarms <= 0.1 + 1e-12, recall, 0.0).max(axis=1)
    defined = ~np.isnan(recall[:, -1] + alarms[:, -1])
    return np.asarray(np.where(defined, allowed, np.nan), np.float64)


def _correlation(truth: Floats, decided: Floats, known: Flags) -> Evaluate:
    """R_K of one-hot truth and decision [n, C] over measured samples."""
    truth, decided = truth * known[:, None], decided * known[:, None]
    agreed = (truth * decided).sum(axis=1)
    seen = known.astype(np.float64)

    def of(weights: Floats) -> Floats:
        total, hits = weights @ seen, weights @ agreed
        t, p = weights @ truth, weights @ decided
        covariance = hits * total - (t * p).sum(axis=1)
        spread = (total**2 - (t**2).sum(axis=1)) * (total**2 - (p**2).sum(axis=1))
        defined = np.where(total > 0, 0.0, np.nan)
        found: Floats = np.divide(covariance, np.sqrt(spread), out=defined, where=spread > 1e-9 * total**4)
        return found

    return _rowwise(of, width=truth.shape[1])


def _macro(parts: list[Evaluate]) -> Evaluate:
    return lambda weights: np.mean([part(weights) for part in parts], axis=0)


def _mean(sums: Floats, counts: Floats | None = None) -> Evaluate:
    """Weighted mean of per-sample values, or of sums over `counts` cells each."""
    return _rowwise(lambda w: _ratio(w @ sums, w.sum(axis=1) if counts is None else w @ counts), width=1)


def _total(weights: Floats) -> Floats:
    return np.asarray(weights.sum(axis=1, keepdims=True), np.float64)


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
