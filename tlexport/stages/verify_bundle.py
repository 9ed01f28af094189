"""verify_bundle: may a bundle be trusted, and what of it can be loaded on this machine? Nothing of it is loaded to find out."""

from __future__ import annotations

from pathlib import Path

from tlexport.bundle import preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import PreflightError
from tlexport.results import VerifyBundleResult


def run(bundle: Path, *, trust: Trust = NOBODY, target: str | None = None) -> VerifyBundleResult:
    """Check the bundle, and the fit of every target or of one. Raises RecipeError for a target that it does not hold."""
    return preflight.report(bundle, trust, target)


def failure(result: VerifyBundleResult) -> PreflightError | None:
    """The error that the refusals amount to: against the bundle, or against everything that was asked to be loaded."""
    if result.refusals:
        return PreflightError(result.bundle, result.refusals)
    if any(not fit.refusals for fit in result.targets.values()):
        return None
    refused = tuple(refusal for fit in result.targets.values() for refusal in fit.refusals)
    return PreflightError(result.bundle, refused) if refused else None
