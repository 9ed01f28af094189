"""Numbers that figures show and no stage wrote: curves, confusion counts, errors over time, from the outputs themselves.

Labels and outputs as in modalities.metrics: int64 [n] and float32 [n, K] (binary, multiclass), int8 [n, K] with -1 for
what nobody measured and float32 [n, K] (multilabel), float32 [n, K] twice (regression).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Points = list[tuple[float, float]]

VERTICES = 400  # of a drawn curve
GRID = np.linspace(0.0, 1.0, 201)
MOST_CURVES = 100  # classes that a macro average is drawn over


def columns(labels: Array, outputs: Array, task: str) -> list[tuple[Array, Floats]]:
    """For each class or label (of a binary task class 1 alone) whether it is the truth, bool [m], and its score [m].

    Those that are always or never true are left out: they have no curve.
    """
    scores = np.asarray(outputs, np.float64)
    if task == "multilabel":
        known = labels >= 0
        pairs = [(labels[known[:, k], k] > 0, scores[known[:, k], k]) for k in range(labels.shape[1])]
    else:
        classes = [1] if task == "binary" else range(outputs.shape[1])
        pairs = [(labels == k, scores[:, k]) for k in classes]
    return [(truth, score) for truth, score in pairs if truth.any() and not truth.all()]


def roc(truth: Array, score: Floats) -> tuple[Floats, Floats]:
    """False positive rate and true positive rate at each threshold, falling, from (0, 0) to (1, 1)."""
    hits, alarms = _cumulative(truth, score)
    return np.r_[0.0, alarms / alarms[-1]], np.r_[0.0, hits / hits[-1]]


def precision_recall(truth: Array, score: Floats) -> tuple[Floats, Floats]:
    """Recall and precision at each threshold, falling."""
    hits, alarms = _cumulative(truth, score)
    return hits / hits[-1], hits / (hits + alarms)


def mean_roc(pairs: list[tuple[Array, Floats]]) -> Points:
    """The curve of one class, or the mean over classes of the true positive rate at equal false positive rates.

    Vertical averaging (Fawcett 2006, Pattern Recognition Letters 27, section 8.1).
    """
    if len(pairs) == 1:
        return _drawn(*roc(*pairs[0]))
    curves = [np.interp(GRID, *roc(truth, score)) for truth, score in pairs]
    return _drawn(np.r_[0.0, GRID], np.r_[0.0, np.mean(curves, axis=0)])


def mean_precision_recall(pairs: list[tuple[Array, Floats]]) -> Points:
    """The same for precision at equal recall: the best precision among thresholds that reach it."""
    if len(pairs) == 1:
        return _drawn(*precision_recall(*pairs[0]))
    curves = []
    for truth, score in pairs:
        recall, precision = precision_recall(truth, score)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        curves.append(best[np.minimum(np.searchsorted(recall, GRID), len(best) - 1)])
    return _drawn(GRID, np.mean(curves, axis=0))


def confusion(labels: Array, decided: Array, classes: int) -> NDArray[np.int64]:
    """int64 [K, K]: truth down, decision across."""
    flat = np.bincount(labels * classes + decided, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def label_counts(labels: Array, decided: Array) -> NDArray[np.int64]:
    """int64 [K, 4] of a multilabel task: true positives, false positives, false negatives, true negatives."""
    truth, known = labels > 0, labels >= 0
    cells = [truth & (decided > 0), ~truth & (decided > 0), truth & (decided == 0), ~truth & (decided == 0)]
    return np.stack([(cell & known).sum(axis=0) for cell in cells], axis=1).astype(np.int64)


def stated(labels: Array, outputs: Array, task: str) -> tuple[Floats, Array]:
    """Stated probability float64 [m] and whether it came true bool [m], for a reliability diagram.

    Binary: of class 1; multiclass: of the most probable class; multilabel: of every label that was measured.
    """
    probabilities = np.asarray(outputs, np.float64)
    if task == "binary":
        return probabilities[:, 1], labels == 1
    if task == "multiclass":
        return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    known = labels >= 0
    return probabilities[known], labels[known] > 0


def over_time(times: Array, values: Array, bins: int) -> tuple[list[float], list[float]]:
    """Mean of values [n] in up to `bins` spans of time with equally many samples: the middle of each, and the mean."""
    order = np.argsort(times, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    when = times.astype(np.float64)
    return [float(np.median(when[p])) for p in parts], [float(np.mean(values[p])) for p in parts]


def quantiles(one: Array, other: Array, count: int = 200) -> Points:
    """Equal quantiles of two samples, one across and the other upward; on the diagonal they are distributed alike."""
    levels = (np.arange(count) + 0.5) / count
    return list(zip(np.quantile(one, levels).tolist(), np.quantile(other, levels).tolist(), strict=True))


def drawn_rows(n: int, most: int) -> NDArray[np.intp]:
    """Rows to draw of n: all, or `most` of them, always the same."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).permutation(n)[:most])


def _cumulative(truth: Array, score: Floats) -> tuple[Floats, Floats]:
    """True and false positives at each threshold, falling; equal scores are passed at once."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(score[order]) != 0, True])
    hits = np.cumsum(truth[order])[last].astype(np.float64)
    return hits, last + 1.0 - hits


def _drawn(across: Floats, up: Floats) -> Points:
    """As points, thinned to about VERTICES with both ends."""
    rows = np.unique(np.linspace(0, len(across) - 1, min(VERTICES, len(across))).astype(int))
    return list(zip(across[rows].tolist(), up[rows].tolist(), strict=True))
