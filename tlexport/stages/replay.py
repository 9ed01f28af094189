"""replay: a bundle's golden samples through every variant that runs here, held against the reference's answers to them.

The day's question: is what runs on this machine still the model that was validated? Hashes say that the files are; this says
that the answers are. The verdict of verify, which saw the whole test split, is told again beside it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tlexport.backends import registry
from tlexport.bundle import golden, manifest, preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import (
    BundleError,
    CompileError,
    ExportError,
    GateError,
    NotInstalledError,
    TlexportError,
    UndecidedError,
)
from tlexport.evidence.accuracy import operating, parity
from tlexport.progress import Progress
from tlexport.results import Refusal, Replayed, ReplayResult

TIMEOUT = 3600.0


def run(bundle: Path, progress: Progress, *, trust: Trust = NOBODY) -> ReplayResult:
    """Check the bundle, then run what may and can run here. Raises PreflightError if the bundle is not as packaged or its
    signature does not hold. A variant that answers otherwise has the verdict `fail`, one that cannot run here `not run here`,
    and code that nobody vouches for `not trusted`.
    """
    document, refused = preflight.by_target(bundle, trust=trust)
    _, expected = golden.load(bundle, document)
    found: dict[str, Replayed] = {}
    with progress.bar("replaying golden samples") as step:
        for done, target in enumerate(document.targets, start=1):
            found[target] = _replayed(bundle, document, target, expected, refused[target])
            step(done, len(document.targets), target)
    return ReplayResult(
        bundle=str(bundle),
        name=document.name,
        metric=document.metric,
        reference=document.reference,
        samples=len(expected),
        decision=document.decision,
        targets=found,
    )


def failure(result: ReplayResult) -> TlexportError | None:
    """The error that the verdicts amount to: one that answers otherwise, code that could run and that nobody vouches for, or
    nothing that could be asked.
    """
    failed = {t: own.reason for t, own in result.targets.items() if own.verdict == "fail"}
    if failed:
        return GateError("; ".join(f"{target}: {why}" for target, why in failed.items()))
    untrusted = {t: own.reason for t, own in result.targets.items() if own.verdict == "not trusted"}
    if untrusted:
        return BundleError("; ".join(f"{target}: {why}" for target, why in untrusted.items()))
    if all(own.verdict != "pass" for own in result.targets.values()):
        return UndecidedError("; ".join(f"{target}: {own.reason}" for target, own in result.targets.items()))
    return None


def _replayed(
    bundle: Path,
    document: manifest.Manifest,
    target: str,
    expected: np.ndarray,
    refused: tuple[Refusal, ...],
) -> Replayed:
    variant = document.targets[target].variant
    known = Replayed(
        variant=variant,
        verdict="not run here",
        reason="",
        limit=parity.limit(variant.max_abs_error, expected),
    )
    if refused:
        unfit = [reason for reason in refused if not reason.untrusted]
        verdict = "not run here" if unfit else "not trusted"
        reasons = "; ".join(reason.reason for reason in unfit or refused)
        return known.model_copy(update={"verdict": verdict, "reason": reasons})
    try:
        device = registry.device(variant.backend, target)
    except (NotInstalledError, CompileError) as error:
        return known.model_copy(update={"reason": str(error)})
    try:
        outputs = _answers(bundle, document, target, device)
        measured = parity.compare(expected, outputs)
    except (CompileError, ExportError) as error:
        return known.model_copy(update={"verdict": "fail", "reason": " ".join(str(error).split())})
    flips = None
    if document.task != "regression":
        before, after = (operating.decide(of, document.task, document.decision) for of in (expected, outputs))
        flips = int((before != after).reshape(len(expected), -1).any(axis=1).sum())
    reason = parity.disagreement(expected, outputs, variant.max_abs_error, variant.usual_error)
    return known.model_copy(
        update={
            "verdict": "fail" if reason else "pass",
            "reason": reason,
            "max_abs_error": measured.max_abs_error,
            "flips": flips,
        }
    )


def _answers(bundle: Path, document: manifest.Manifest, target: str, device: str) -> np.ndarray:
    """float32 [n, K], from a child process."""
    entry = document.targets[target]
    with tempfile.TemporaryDirectory() as folder:
        answered = Path(folder) / "outputs.npy"
        registry.predict(
            entry.variant.backend,
            bundle / entry.file,
            bundle / golden.INPUTS,
            answered,
            input_names=tuple(spec.name for spec in document.inputs),
            batch_size=document.batch.max,
            device=device,
            timeout=TIMEOUT,
        )
        outputs: np.ndarray = np.load(answered, allow_pickle=False)
        return outputs
