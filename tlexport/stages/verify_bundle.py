"""verify_bundle: may a bundle be trusted, and what of it can be loaded on this machine? Nothing of it is loaded to find out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tlexport.bundle import preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import PreflightError
from tlexport.evidence.junit import Case
from tlexport.results import VerifyBundleResult


def run(bundle: Path, *, trust: Trust = NOBODY, target: str | None = None) -> VerifyBundleResult:
    """Check the bundle and, if nothing speaks against it, the fit of every target or of one.

    Raises RecipeError for a target that it does not hold.
    """
    return preflight.report(bundle, trust, target)


def failure(result: VerifyBundleResult) -> PreflightError | None:
    """The error that the refusals amount to: against the bundle, or against everything that was asked to be loaded."""
    if result.refusals:
        return PreflightError(result.bundle, result.refusals)
    if any(fit.loadable for fit in result.targets.values()):
        return None
    refused = tuple(refusal for fit in result.targets.values() for refusal in fit.refusals)
    return PreflightError(result.bundle, refused) if refused else None


def cases(result: VerifyBundleResult) -> Iterator[Case]:
    """For a JUnit file: the bundle, its signature if one was checked, and each target.

    A target is skipped where the bundle is refused, or where another one can be loaded here instead.
    """
    name = result.name or result.bundle
    apart = [refusal.reason for refusal in result.refusals if refusal.kind != "signature"]
    yield _case(f"{name}: as packaged", apart, "fail")
    if result.signature in ("verified", "refused"):
        signed = [refusal.reason for refusal in result.refusals if refusal.kind == "signature"]
        yield _case(f"{name}: signature", signed, "fail")
    missed: Literal["skipped", "fail"] = (
        "skipped" if any(fit.loadable for fit in result.targets.values()) else "fail"
    )
    for target, fit in result.targets.items():
        if fit.loadable is None:
            yield _case(f"{name}: {target}", ["not looked at: the bundle is refused"], "skipped")
        else:
            yield _case(f"{name}: {target}", [refusal.reason for refusal in fit.refusals], missed)


def _case(name: str, reasons: Sequence[str], verdict: Literal["skipped", "fail"]) -> Case:
    return Case("verify-bundle", name, verdict if reasons else "pass", "; ".join(reasons))
