"""gate: a build held against another one, or against a stored baseline. It measures and decides; nothing of a run is changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlexport.backends import isolation
from tlexport.errors import GateError, LatencyGateError, UndecidedError
from tlexport.evidence import machine
from tlexport.evidence.gate import outputs, rule, sessions, store
from tlexport.evidence.report.figures import history
from tlexport.progress import Progress
from tlexport.results import GateResult, GateVerdict
from tlexport.run import versions, write_text

SESSIONS = 10
SECONDS = 30.0  # of measuring, where nobody says otherwise
ALLOWANCE_S = 600.0  # for one child beyond its measuring: a large engine takes minutes to load
START_SHARE = 0.5  # of a session's time that its process may take to start and load


def beside(
    build: sessions.Build,
    other: sessions.Build,
    progress: Progress,
    *,
    path: Path,
    against: Path,
    tolerance: float = rule.TOLERANCE,
    seconds: float = SECONDS,
    seed: int = 0,
) -> GateResult:
    """Time `build` and `other` in turns in one fresh process for at most about `seconds`, and compare their medians."""
    began = time.monotonic()
    with progress.bar("gate: both builds in turns", still=True) as step:
        old, new = isolation.call(
            sessions.rounds,
            *(other, build, seconds, seed),
            timeout=seconds + ALLOWANCE_S,
            what=f"timing {build.name} beside {other.name}",
            progress=lambda phase, share: step(share * seconds, round(seconds), phase),
        )
    name = build.name if build.name == other.name else f"{build.name} (then {other.variant})"
    verdict = rule.side_by_side(
        np.array(old), np.array(new), name=name, against=str(against), tolerance=tolerance
    )
    return GateResult(
        path=str(path),
        against=str(against),
        verdicts=(verdict,),
        new_ms=_ms(new),
        old_ms=_ms(old),
        machine=_fingerprint(),
        seconds=time.monotonic() - began,
    )


def against_baseline(
    build: sessions.Build,
    progress: Progress,
    *,
    path: Path,
    file: Path,
    tolerance: float = rule.TOLERANCE,
    seconds: float = SECONDS,
    seed: int = 0,
) -> GateResult:
    """Measure as many sessions as the baseline in `file` has and compare; the run is added to its history.

    Without a baseline of this build on such a machine the verdict is `undecided`, before anything is measured.
    Raises StorageError if the file is broken or not ours.
    """
    began = time.monotonic()
    held, subject, here = store.opened(file), _subject(build), _fingerprint()
    try:
        past = store.history(held.records(), subject, here)
    except UndecidedError as error:
        verdict = _nothing(build, str(file), tolerance, str(error))
        return GateResult(path=str(path), against=str(file), verdicts=(verdict,), machine=here)
    baseline = past[0]
    measured = _sessions(build, len(baseline.sessions), seconds, seed, progress)
    verdict = rule.against_baseline(
        [record.sessions for record in past if record.kind == "baseline" or record.verdict == "pass"],
        measured,
        name=build.name,
        against=f"the baseline of {baseline.recorded}",
        tolerance=tolerance,
    )
    update = {
        "kind": "run",
        "verdict": verdict.verdict,
        "value": verdict.value,
        "low": verdict.low,
        "high": verdict.high,
    }
    held.append(_record(build, subject, here, measured).model_copy(update=update))
    return GateResult(
        path=str(path),
        against=str(file),
        verdicts=(verdict,),
        **_times(measured, baseline.sessions),
        machine=here,
        seconds=time.monotonic() - began,
    )


def save_baseline(
    build: sessions.Build,
    progress: Progress,
    *,
    path: Path,
    file: Path,
    seconds: float = SECONDS,
    seed: int = 0,
) -> GateResult:
    """Measure SESSIONS sessions and make them the baseline in `file` from now on."""
    began = time.monotonic()
    held, here = store.opened(file), _fingerprint()
    held.records()  # a broken file is found before the measuring
    measured = _sessions(build, SESSIONS, seconds, seed, progress)
    held.append(_record(build, _subject(build), here, measured))
    return GateResult(
        path=str(path),
        against=str(file),
        saved=True,
        **_times(measured, ()),
        machine=here,
        seconds=time.monotonic() - began,
    )


def failure(result: GateResult) -> GateError | None:
    """The error, with its exit code, that the verdicts amount to; a gate that fails goes before one that is undecided."""
    for verdict, kind in (("fail", GateError), ("undecided", UndecidedError)):
        found = [of for of in result.verdicts if of.verdict == verdict]
        if found and verdict == "fail" and all(of.gate == "latency" for of in found):
            kind = LatencyGateError
        if found:
            return kind("; ".join(of.reason for of in found))
    return None


def write(
    result: GateResult,
    *,
    markdown: Path | None,
    tracker: Path | None,
    append: bool = False,
) -> None:
    """The result for machines that read it. `append`: the markdown is added to what is there, as a job's summary wants it."""
    if markdown and append:
        with markdown.open("a", encoding="utf-8") as handle:
            handle.write(outputs.markdown(result))
    elif markdown:
        write_text(markdown, outputs.markdown(result))
    if tracker:
        write_text(tracker, outputs.tracker(result))


def write_history(build: sessions.Build, file: Path, out: Path) -> None:
    """Draw what `file` holds of this build on this machine since its baseline, as an SVG of its own."""
    past = store.history(store.opened(file).records(), _subject(build), _fingerprint())
    points = [
        {
            "label": record.recorded,
            "value": 1e3 * float(np.median([session.seconds for session in record.sessions])),
            "low": 1e3 * min(session.seconds for session in record.sessions),
            "high": 1e3 * max(session.seconds for session in record.sessions),
            "verdict": record.verdict or "pass",
        }
        for record in past
    ]
    write_text(
        out,
        history.standalone(history.timeline(points, "ms", f"{_subject(build)}: median latency by recording")),
    )


def _sessions(
    build: sessions.Build, count: int, seconds: float, seed: int, progress: Progress
) -> tuple[rule.Session, ...]:
    """`count` fresh processes, one after the other."""
    each = seconds / count * (1 - START_SHARE)
    found = []
    with progress.bar("gate: sessions", still=True) as step:
        for index in range(count):
            found.append(
                isolation.call(
                    sessions.session,
                    *(build, each, seed + index),
                    timeout=each + ALLOWANCE_S,
                    what=f"timing {build.name}",
                )
            )
            step(index + 1, count)
    return tuple(found)


def _subject(build: sessions.Build) -> store.Subject:
    return store.Subject(model=build.model, variant=build.variant, batch=build.batch, threads=build.threads)


def _fingerprint() -> dict[str, Any]:
    return store.fingerprint(machine.describe(), versions())


def _record(
    build: sessions.Build, subject: store.Subject, here: dict[str, Any], measured: tuple[rule.Session, ...]
) -> store.Record:
    return store.Record(
        kind="baseline",
        recorded=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        subject=subject,
        machine=here,
        sha256=build.sha256,
        sessions=measured,
    )


def _nothing(build: sessions.Build, against: str, tolerance: float, why: str) -> GateVerdict:
    """The verdict where there is nothing to compare with."""
    return GateVerdict(
        gate="latency",
        name=build.name,
        against=against,
        measure=rule.RATIO,
        verdict="undecided",
        value=None,
        low=None,
        high=None,
        confidence=rule.CONFIDENCE,
        tolerance=tolerance,
        limit=1 + tolerance,
        count=0,
        unit="sessions",
        reason=why,
    )


def _times(new: Sequence[rule.Session], old: Sequence[rule.Session]) -> dict[str, tuple[float, ...]]:
    return {
        "new_ms": _ms([session.seconds for session in new]),
        "old_ms": _ms([session.seconds for session in old]),
        "new_control_ms": _ms([session.control for session in new]),
        "old_control_ms": _ms([session.control for session in old]),
    }


def _ms(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(1e3 * value for value in seconds)
