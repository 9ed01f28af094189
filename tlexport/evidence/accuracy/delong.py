"""DeLong's test of two AUCs on the same samples.

DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3), with the midranks of Sun and Xu 2014, Fast implementation
of DeLong's algorithm, IEEE Signal Processing Letters 21(11): O(n log n).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tlexport.errors import DataError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Below this a standard error is that of sums in another order.
ROUNDING = 1e-12


class DeLong(BaseModel):
    """Two AUCs and their difference, reference minus variant."""

    model_config = ConfigDict(frozen=True)

    reference: float
    variant: float
    drop: float
    se: float  # standard error of the drop
    low: float
    high: float
    p: float  # two-sided, of no difference


def delong(
    positive: Flags,
    reference: Floats,
    variant: Floats,
    confidence: float,
    *,
    groups: NDArray[Any] | None = None,
) -> DeLong:
    """AUC of scores reference, variant [n] for positive [n]; ties count half. The interval is normal.

    groups: [n], samples that depend on each other: the structural components are then summed by group (Obuchowski
    1997, Biometrics 53(2)).
    Where both rank alike the standard error is 0, p is 1 and the interval is the estimate.
    Raises DataError if there is no positive or no negative.
    """
    return _test([_components(positive, s) for s in (reference, variant)], confidence, groups)


def delong_macro(
    labels: NDArray[Any],
    reference: Floats,
    variant: Floats,
    task: str,
    confidence: float,
    *,
    names: Sequence[str] = (),
    groups: NDArray[Any] | None = None,
) -> DeLong:
    """Of the mean of the one-vs-rest AUCs; probabilities [n, K], labels [n] or, multilabel, [n, K] with -1 unmeasured.

    A sample has a component in each class's AUC; their mean over classes is its component of the macro average, so
    that covariances between classes, of which a sample is a positive in one and a negative in the others, count.
    names: of the classes, for errors. Raises DataError if a class or label has no positive or no negative.
    """
    if task == "multilabel":
        columns = [(k, labels[:, k] > 0, labels[:, k] >= 0) for k in range(labels.shape[1])]
    else:
        classes = (1,) if task == "binary" else range(reference.shape[1])
        columns = [(k, labels == k, np.ones(len(labels), bool)) for k in classes]
    both = []
    for scores in (reference, variant):
        parts = []
        for k, positive, known in columns:
            name = f" of {names[k]!r}" if k < len(names) else f" of class {k}"
            auc, found = _components(positive[known], scores[known, k], name)
            spread = np.zeros(len(labels))
            spread[known] = found
            parts.append((auc, spread))
        both.append(
            (float(np.mean([auc for auc, _ in parts])), np.mean([spread for _, spread in parts], axis=0))
        )
    return _test(both, confidence, groups)


def _components(positive: Flags, scores: Floats, name: str = "") -> tuple[float, Floats]:
    """AUC and what each sample [n] adds to its error, scaled so that the squares' sum is DeLong's variance.

    A positive's structural component V10 is the share of negatives below it, a negative's V01 that of positives
    above it; DeLong's variance is var(V10) / m + var(V01) / n, with m - 1 and n - 1 in the variances.
    """
    from scipy.stats import rankdata

    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        raise DataError(
            f"the AUC{name} is undefined: {m} positives and {n} negatives; use a larger test split"
        )
    scores = np.asarray(scores, np.float64)
    ranks, above, below = rankdata(scores), rankdata(scores[positive]), rankdata(scores[~positive])
    v10 = (ranks[positive] - above) / n
    v01 = 1 - (ranks[~positive] - below) / m
    auc = float(v10.mean())
    found = np.empty(len(scores))
    found[positive] = (v10 - auc) / np.sqrt(m * max(m - 1, 1))
    found[~positive] = (v01 - auc) / np.sqrt(n * max(n - 1, 1))
    return auc, found


def _test(both: Sequence[tuple[float, Floats]], confidence: float, groups: NDArray[Any] | None) -> DeLong:
    (reference, of_reference), (variant, of_variant) = both
    difference = of_reference - of_variant
    if groups is not None:
        summed = np.bincount(np.unique(groups, return_inverse=True)[1], weights=difference)
        difference = np.sqrt(len(summed) / max(len(summed) - 1, 1)) * summed
    drop, se = reference - variant, float(np.sqrt(np.sum(difference**2)))
    normal = NormalDist()
    if se <= ROUNDING:
        se, p = 0.0, float(abs(drop) <= ROUNDING)
    else:
        p = 2 * normal.cdf(-abs(drop) / se)
    half = normal.inv_cdf((1 + confidence) / 2) * se
    return DeLong(
        reference=reference, variant=variant, drop=drop, se=se, low=drop - half, high=drop + half, p=p
    )
