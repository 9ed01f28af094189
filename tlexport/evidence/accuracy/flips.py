"""Decisions that change: how many, how many of them for the worse, and how many there may be in the population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

# An error that no sample has shown is taken to be at most so many times the largest that one has.
SAFETY = 3.0
# Margins just at the boundary are taken to be at most so many times as dense as among the nearest samples.
DENSER = 2.0
# The nearest samples, from which that density is read: a twentieth, and enough to count.
NEAREST, NEAREST_SHARE = 10, 0.05


class Flips(BaseModel):
    """Test samples whose decision differs from the reference's; `harmful + harmless == count`."""

    model_config = ConfigDict(frozen=True)

    count: int
    samples: int
    share: float
    harmful: int  # fewer right decisions than the reference
    harmless: int  # all others
    mended: int  # of these, more right decisions than the reference
    upper: float  # bound on the share in the population, see `flip_bound`
    confidence: float


def between(
    reference: NDArray[Any], variant: NDArray[Any], labels: NDArray[Any], *, confidence: float = 0.95
) -> Flips:
    """Compare decisions [n] (classes) or [n, K] (one per label) with the reference's and with the truth.

    A sample flips if any of its decisions changes. The bound treats samples as independent.
    """
    if (
        not reference.shape == variant.shape == labels.shape
        or reference.ndim not in (1, 2)
        or not len(labels)
    ):
        raise ValueError(
            f"decisions and labels must be [n] or [n, K] alike, got {reference.shape}, {variant.shape} and "
            f"{labels.shape}"
        )
    n = len(labels)
    changed = (reference != variant).reshape(n, -1).any(axis=1)
    right_before = (reference == labels).reshape(n, -1).sum(axis=1)
    right_after = (variant == labels).reshape(n, -1).sum(axis=1)
    count, harmful = int(changed.sum()), int((right_after < right_before).sum())
    return Flips(
        count=count,
        samples=n,
        share=count / n,
        harmful=harmful,
        harmless=count - harmful,
        mended=int((right_after > right_before).sum()),
        upper=flip_bound(count, n, confidence),
        confidence=confidence,
    )


def flip_bound(count: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound on the share of flips in the population, after `count` in `n` independent
    samples.

    Clopper and Pearson 1934. With none seen it is about 3/n at 95%: what an interval [0, 0] cannot say.
    """
    from scipy.special import betaincinv

    if not 0 <= count <= n or n < 1:
        raise ValueError(f"{count} flips in {n} samples")
    return 1.0 if count == n else float(betaincinv(count + 1, n - count, confidence))


def mcnemar(harmful: int, mended: int) -> float:
    """Two-sided exact mid-p value of "as many decisions are harmed as mended" in independent samples.

    Fagerland, Lydersen and Laake 2013, The McNemar test for binary matched-pairs data, BMC Medical Research
    Methodology 13:91, section "mid-p": P(X <= k) twice, less P(X = k), X ~ Bin(harmful + mended, 1/2), k the
    smaller number. 1 where nothing is harmed or mended.
    """
    from scipy.stats import binom

    fewer, total = min(harmful, mended), harmful + mended
    return float(min(1.0, 2 * binom.cdf(fewer, total, 0.5) - binom.pmf(fewer, total, 0.5)))


def mcnemar_worse(harmful: int, mended: int) -> float:
    """One-sided exact mid-p value of "no more decisions are harmed than mended"; `mcnemar` is its two-sided counterpart."""
    half = mcnemar(harmful, mended) / 2
    return half if harmful > mended else 1 - half if mended else 1.0


def unseen(
    reference: NDArray[Any],
    variant: NDArray[Any],
    task: str,
    count: int,
    n: int,
    confidence: float,
    thresholds: Sequence[float] | None = None,
) -> float:
    """One-sided upper bound on the share of flips in the population, after `count` in these `n` samples.

    reference, variant: probabilities float [n, K] of both. thresholds: as in results.Decision.

    `flip_bound` knows only the count: 3/n where none was seen. Then the outputs say more, under two assumptions:
    an error in the population is at most SAFETY times the largest seen here, so only a sample whose margin is below
    r = SAFETY * error can flip; and margins below r are at most DENSER times as dense as those below h, where h is
    the margin of the sample that a twentieth of all (at least ten) lie at or below. If k of n do, the share of margins below r is
    at most DENSER * r / h * flip_bound(k, n). The smaller of both bounds is returned.
    """
    return min(
        flip_bound(count, n, confidence),
        _near_boundary(reference, variant, task, count, n, confidence, thresholds),
    )


def p_unseen(
    reference: NDArray[Any],
    variant: NDArray[Any],
    task: str,
    count: int,
    n: int,
    confidence: float,
    limit: float,
    thresholds: Sequence[float] | None = None,
) -> float:
    """One-sided p-value of "the share of flips in the population is at the limit or beyond", as in `unseen`.

    P(Bin(n, limit) <= count); 0 where the outputs themselves bound the share below the limit (at this confidence).
    """
    from scipy.stats import binom

    if limit <= 0:
        return 1.0
    if _near_boundary(reference, variant, task, count, n, confidence, thresholds) < limit:
        return 0.0
    return float(binom.cdf(count, n, min(limit, 1.0)))


def _near_boundary(
    reference: NDArray[Any],
    variant: NDArray[Any],
    task: str,
    count: int,
    n: int,
    confidence: float,
    thresholds: Sequence[float] | None,
) -> float:
    """Bound on the share of samples whose margin an error of SAFETY times the largest seen could cross; 1 if none holds."""
    if not len(reference) == len(variant) == n:
        raise ValueError(f"outputs of {len(reference)} and {len(variant)} samples, {n} are judged")
    if count or n < NEAREST:
        return 1.0
    margins, error = _margins(reference, variant, task, thresholds)
    nearest = np.partition(margins, rank := max(NEAREST, math.ceil(NEAREST_SHARE * n)) - 1)[rank]
    reach = SAFETY * error
    if reach >= nearest:
        return 1.0
    near = flip_bound(int((margins <= nearest).sum()), n, confidence)
    return min(1.0, DENSER * float(reach / nearest) * near)


def _margins(
    reference: NDArray[Any], variant: NDArray[Any], task: str, thresholds: Sequence[float] | None
) -> tuple[NDArray[np.float64], float]:
    """[n] how far the reference's score is from its decision's boundary, and the largest change of such a distance."""
    before, after = np.asarray(reference, np.float64), np.asarray(variant, np.float64)
    if task == "multiclass":
        top = before.argmax(axis=1)[:, None]
        lead, still = (_lead(scores, top) for scores in (before, after))
        return lead, float(np.abs(still - lead).max())
    if task == "binary":
        before, after = before[:, 1:], after[:, 1:]
    boundary = np.asarray([0.5] if thresholds is None else thresholds, np.float64)
    return np.abs(before - boundary).min(axis=1), float(np.abs(after - before).max())


def _lead(scores: NDArray[np.float64], top: NDArray[np.intp]) -> NDArray[np.float64]:
    """[n] by how much the class `top` [n, 1] leads the best of the others; negative where it is behind."""
    others = scores.copy()
    np.put_along_axis(others, top, -np.inf, axis=1)
    lead: NDArray[np.float64] = np.take_along_axis(scores, top, axis=1)[:, 0] - others.max(axis=1)
    return lead
