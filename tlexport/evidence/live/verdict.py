"""Whether what a live server answered is what the bundle's model answers: golden samples, batches, a shuffled stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.accuracy import parity as offline
from tlexport.evidence.live import diagnosis, parity, stream
from tlexport.evidence.live.diagnosis import Hypothesis
from tlexport.results import BitParity, Diagnosis, Differences, Misplaced, ServerCheck

METADATA, GOLDEN, STREAM = "metadata", "golden samples", "shuffled stream"
_WORSE = ("pass", "undecided", "fail")

Answers = NDArray[Any]


@dataclass(frozen=True)
class Truth:
    """What the golden samples' answers should be.

    expected: the reference's outputs [n, K]. error: the variant's largest, as verify measured it. own: samples a call ->
    [n, K] from a session of the variant on this machine; empty where there is none, and `why_not` says why.
    decide: outputs -> decisions; None in a regression.
    """

    expected: Answers
    error: float | None
    own: Mapping[int, Answers]
    why_not: str
    decide: Callable[[Answers], NDArray[np.int64]] | None

    @property
    def nearest(self) -> Answers:
        """The session's answers one by one, else the reference's."""
        return self.own.get(1, self.expected)

    @property
    def spread(self) -> float:
        return offline.spread(self.expected)

    @property
    def limit(self) -> float:
        """The largest difference from `expected` that is taken for the same model."""
        return offline.limit(self.error, self.expected)

    @property
    def near(self) -> float:
        """The same from `nearest`: two sessions of one graph differ by rounding."""
        return offline.limit(None if self.own else self.error, self.expected)

    @property
    def wide(self) -> bool:
        return offline.wide(self.error, self.expected)

    def differences(self, answers: Answers, rows: NDArray[np.intp] | None = None) -> Differences:
        """Of answers [m, K] to golden samples `rows` [m], by default all of them in order."""
        expected = self.expected if rows is None else self.expected[rows]
        decided = None
        if self.decide is not None and np.isfinite(answers).all():
            decided = (self.decide(answers), self.decide(expected))
        return parity.differences(answers, expected, self.limit, decided=decided, samples=rows)


@dataclass(frozen=True)
class Seen:
    """What the server answered: golden samples one by one [n, K], in requests of a size, and in the stream. `stated`: what its
    metadata has otherwise than the manifest."""

    golden: Answers
    batches: Mapping[int, Answers]
    streamed: stream.Asked | None
    stated: tuple[str, ...] = ()

    def of_stream(self, truth: Truth) -> Differences | None:
        if self.streamed is None:
            return None
        return truth.differences(np.concatenate(self.streamed.answers), np.concatenate(self.streamed.rows))


@dataclass(frozen=True)
class Verdict:
    """The worst of the checks' verdicts, and the reasons of those that tell why."""

    checks: tuple[ServerCheck, ...]
    verdict: Literal["pass", "fail", "undecided"]
    reason: str
    diagnosis: Diagnosis | None
    misplaced: tuple[Misplaced, ...]


def judged(truth: Truth, seen: Seen, hypotheses: Callable[[], Iterable[Hypothesis]]) -> Verdict:
    """hypotheses: asked for only where the golden answers are not the model's."""
    with np.errstate(invalid="ignore"):
        unlike = not np.abs(seen.golden - truth.nearest).max() <= truth.near
    found = diagnosis.diagnose(seen.golden, truth.nearest, hypotheses(), truth.near) if unlike else None
    misplaced = _misplaced(truth, seen.streamed)
    stated = _check(METADATA, f"the server states: {'; '.join(seen.stated)}" if seen.stated else "")
    alone = _alone(truth, truth.differences(seen.golden), found, unlike=unlike)
    batches = [
        _together(
            batch_name(size),
            f"in requests of {size} samples",
            of,
            truth.own.get(size),
            truth.differences(of),
            truth,
        )
        for size, of in seen.batches.items()
    ]
    streamed = _streamed(truth, seen, misplaced)
    checks = (stated, alone, *batches, *streamed)
    worst = max((check.verdict for check in checks), key=_WORSE.index)
    # Where single samples are answered otherwise, so are batches, which tells nothing more.
    telling = checks if alone.verdict != "fail" else (stated, alone, *(streamed if misplaced else ()))
    reason = "; ".join(check.reason for check in telling if check.verdict == worst != "pass")
    return Verdict(checks, worst, reason, found, misplaced)


def batch_name(size: int | str) -> str:
    return f"requests of {size} samples"


def _alone(truth: Truth, golden: Differences, found: Diagnosis | None, *, unlike: bool) -> ServerCheck:
    """Of the golden samples one by one. Within a wide limit a known mistake is still one: its answers are those of the session
    with the mistake.
    """
    if found is not None and (golden.over or found.verdict == "named"):
        return _check(GOLDEN, f"{_told(golden, truth)}: {found.says}; {found.advice}")
    if golden.over:
        return _check(
            GOLDEN,
            f"{_told(golden, truth)}, and so do this machine's session's: it is this model, which computes otherwise on such a "
            "machine than where it was verified; build it for this one",
        )
    if not truth.wide or (truth.own and not unlike):
        return _check(GOLDEN, "")
    why = (
        "the session here answers otherwise"
        if truth.own
        else f"no session here answers beside it ({truth.why_not})"
    )
    return ServerCheck(name=GOLDEN, verdict="undecided", reason=f"{_vague(truth)}, and {why}")


def _streamed(truth: Truth, seen: Seen, misplaced: tuple[Misplaced, ...]) -> list[ServerCheck]:
    """Nothing where no stream was asked for."""
    differences = seen.of_stream(truth)
    if differences is None or seen.streamed is None:
        return []
    if not misplaced:
        answers = np.concatenate(seen.streamed.answers)
        own = truth.nearest[np.concatenate(seen.streamed.rows)] if truth.own else None
        return [_together(STREAM, "in the shuffled stream", answers, own, differences, truth)]
    first = misplaced[0]
    reason = (
        f"{len(misplaced)} requests of the stream got answers to other samples, the first of them (request {first.request}) "
        f"asked {list(first.sent)} and was answered {list(first.answered)}"
    )
    return [_check(STREAM, reason)]


def _together(
    name: str, where: str, answers: Answers, own: Answers | None, of: Differences, truth: Truth
) -> ServerCheck:
    """Of samples asked together, answers [m, K]; own: this machine's session's to the same, None where there is none."""
    if of.over:
        return _check(name, f"{where}: {_told(of, truth)}")
    if not truth.wide or own is None or (apart := float(np.abs(answers - own).max())) <= truth.near:
        return _check(name, "")
    reason = f"{where}: {_vague(truth)}, and the session here answers otherwise, by up to {apart:.3g}"
    return ServerCheck(name=name, verdict="undecided", reason=reason)


def _vague(truth: Truth) -> str:
    return (
        f"verify measured an error of {truth.error:.3g} for the variant, so that nearly any answer is within the limit "
        f"({truth.limit:.3g}, spread {truth.spread:.3g})"
    )


def _check(name: str, wrong: str) -> ServerCheck:
    return ServerCheck(name=name, verdict="fail" if wrong else "pass", reason=wrong)


def bits(truth: Truth, seen: Seen) -> tuple[BitParity, ...]:
    """Each batch size against the session at the same one, and what is not identical against it at the others."""
    told = []
    for size, answers in {1: seen.golden, **seen.batches}.items():
        if size not in truth.own:
            continue
        left = ~parity.identical(answers, truth.own[size])
        identical, others = int((~left).sum()), {}
        for other in sorted(truth.own.keys() - {size}):
            same = left & parity.identical(answers, truth.own[other])
            if same.any():
                others[str(other)] = int(same.sum())
                left &= ~same
        told.append(BitParity(batch=size, answers=len(answers), identical=identical, at_other_batch=others))
    return tuple(told)


def indistinct(truth: Truth) -> int:
    return parity.indistinct(truth.nearest, truth.near)


def _misplaced(truth: Truth, streamed: stream.Asked | None) -> tuple[Misplaced, ...]:
    if streamed is None:
        return ()
    found = (
        parity.misplaced(index, rows, answers, truth.nearest, truth.near)
        for index, (rows, answers) in enumerate(zip(streamed.rows, streamed.answers, strict=True))
    )
    return tuple(of for of in found if of is not None)


def _told(of: Differences, truth: Truth) -> str:
    if of.not_finite:
        return f"golden samples {', '.join(map(str, of.not_finite))} are answered with values that are not finite"
    if not of.over:
        return f"answers differ from the reference by up to {of.max_abs_error:.3g}, which the variant's own error would allow"
    return (
        f"{of.over} of {of.samples} answers differ from the reference by more than {truth.limit:.3g}, the most by "
        f"{of.max_abs_error:.3g} (sample {of.worst_sample})"
    )
