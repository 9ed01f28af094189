"""Decisions that change: how many, how many of them for the worse, and how many there may be in the population."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


class Flips(BaseModel):
    """Test samples whose decision differs from the reference's; `harmful + harmless == count`."""

    model_config = ConfigDict(frozen=True)

    count: int
    samples: int
    share: float
    harmful: int  # fewer right decisions than the reference
    harmless: int
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
