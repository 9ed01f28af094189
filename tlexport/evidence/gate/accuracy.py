"""Less accurate or not: a new build's answers held against an old one's, on the same samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.accuracy import bootstrap, flips
from tlexport.evidence.gate.rule import needed, reading
from tlexport.results import GateVerdict


def compare(
    old: bootstrap.Metric,
    new: bootstrap.Metric,
    n: int,
    *,
    name: str,
    against: str,
    metric: str,
    tolerance: float,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    sign: float = 1.0,
    groups: NDArray[Any] | None = None,
    mcnemar_p: float | None = None,
) -> GateVerdict:
    """Old minus new on n samples, by the paired bootstrap (`old`, `new`, `sign` and `groups` as there).

    Fails if the interval's lower end is above `tolerance` (in the metric's unit), passes if its upper end is not: then the new
    build is not inferior by more than that. `mcnemar_p`: where the metric counts right decisions, the one-sided test of
    the same drop (`worse`); a build fails only if it agrees, because with few changed decisions the bootstrap alone is too bold.
    Raises DataError where the metric is undefined.
    """
    drop = bootstrap.paired_bootstrap(
        old, new, n, resamples=resamples, confidence=confidence, seed=seed, sign=sign, groups=groups
    )
    low, high = (
        end if abs(end - tolerance) > bootstrap.ROUNDING else tolerance for end in (drop.low, drop.high)
    )
    verdict, told = reading(low, high, tolerance), ""
    more = needed(drop.estimate, low, high, tolerance, n) if verdict == "undecided" else None
    if verdict == "undecided":
        told = f"about {more} would tell" if more else "more of them would hardly tell"
    if verdict == "fail" and mcnemar_p is not None and mcnemar_p > (1 - confidence) / 2:
        verdict, told = "undecided", f"too few decisions changed (McNemar's p {mcnemar_p:.2g})"
    reason = f"{name}: {metric} drop {drop.estimate:.4g} ({low:.4g} to {high:.4g}) against {against}, tolerated {tolerance:g}"
    if verdict == "undecided":
        reason += f": undecided on {n} samples, {told}"
    return GateVerdict(
        gate="accuracy",
        name=name,
        against=against,
        measure=f"drop of {metric}, old minus new",
        verdict=verdict,
        value=drop.estimate,
        low=low,
        high=high,
        confidence=confidence,
        tolerance=tolerance,
        limit=tolerance,
        count=n,
        unit="samples",
        needed=more,
        reason=reason,
    )


def worse(old_right: NDArray[np.bool_], new_right: NDArray[np.bool_]) -> float:
    """McNemar's exact one-sided mid-p of as many decisions [n] lost as mended, for more lost; 1 where none changed."""
    return flips.mcnemar_worse(int(np.sum(old_right & ~new_right)), int(np.sum(new_right & ~old_right)))
