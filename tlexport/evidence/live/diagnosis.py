"""Which mistake a server's answers look like: a hypothesis is what it would have answered by one.

The answers of every hypothesis come from the local session or from its outputs; the server is not asked again. A mistake is
named where its answers are the server's within the limit. It is suspected where it explains most of the difference and its
answers go with the server's sample by sample: by a permutation test (Fisher 1935; Good 2005, section 1.1) of which answer
belongs to which sample, since answers that say nothing of their sample are near to many mistakes'. Otherwise none is: to
accuse nothing is right where nothing known fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.live.mistakes import NEVER, PRECISE
from tlexport.results import Diagnosis, Suspect

Floats = NDArray[np.float64]

ALIKE = 5  # so many suspects are told
ALL_BUT = 0.99  # share of the difference that a mistake explains whose answers are the server's
STILL = 1e-3  # spread of answers, as a share of the reference's, below which they are one and the same
CHANCE = 0.01  # that a server whose answers have nothing to do with their samples is suspected of anything
PERMUTATIONS = 4999
NEAR = 0.05  # a difference of at most this share of the outputs' spread is a small one


@dataclass(frozen=True)
class Hypothesis:
    """`outputs` [n, K]: what the server would answer by this mistake. `least`: as of a Mistake.

    `restored` [n, K], where there is one: the server's answers with the mistake undone, held against `outputs` in their place.
    """

    says: str
    advice: str
    outputs: NDArray[Any]
    least: float = PRECISE
    restored: NDArray[Any] | None = None


def diagnose(
    answers: NDArray[Any], own: NDArray[Any], hypotheses: Iterable[Hypothesis], limit: float
) -> Diagnosis:
    """Name the mistake that the server's `answers` [n, K] look like; `own` [n, K] are the local session's right ones.

    limit: largest difference that is taken for none. Hypotheses that would change no answer are left out: nothing tells
    them. Those that fit equally well are told together, the first one given first.
    """
    answers, own = np.asarray(answers, np.float64), np.asarray(own, np.float64)
    given = list(hypotheses)
    suspects = [found for of in given if (found := _suspect(answers, own, of, limit)) is not None]
    fitting = sorted(
        (of for of in suspects if of.fits), key=lambda of: round((of.max_abs_error or 0.0) / limit, 2)
    )
    near = sorted((of for of in suspects if not of.fits), key=lambda of: -of.explained)
    told = tuple([*fitting, *near][:ALIKE])
    if fitting:
        alike = f" ({len(fitting) - 1} others fit, too)" if len(fitting) > 1 else ""
        return Diagnosis(
            verdict="named", says=fitting[0].says + alike, advice=fitting[0].advice, suspects=told
        )
    tried = sum(of.least < NEVER for of in given)
    if near and near[0].p is not None and near[0].p * tried <= CHANCE:
        first = near[0]
        says = f"probably {first.says}: it explains {first.explained:.0%} of the difference"
        return Diagnosis(verdict="suspected", says=says, advice=first.advice, suspects=told)
    return Diagnosis(verdict="unknown", says=_unknown(answers, own), advice=_ADVICE, suspects=told)


_ADVICE = "see what lies between the client and the model: decoding, resizing, an ensemble or transformer, the deployed file's SHA-256"


def _suspect(answers: Floats, own: Floats, of: Hypothesis, limit: float) -> Suspect | None:
    """The hypothesis with its numbers; None if it changes nothing, or explains too little."""
    outputs = np.asarray(of.outputs, np.float64)
    seen = answers if of.restored is None else of.restored
    if outputs.shape != answers.shape or (of.restored is None and _distance(outputs, own) <= limit):
        return None
    error, explained = _distance(seen, outputs), _explained(answers, own, seen - outputs)
    fits = error <= limit and explained >= ALL_BUT
    if not fits and not _near(of, error, explained, float(np.ptp(own, axis=0).max())):
        return None
    return Suspect(
        says=of.says,
        advice=of.advice,
        explained=explained,
        max_abs_error=error if np.isfinite(error) else None,
        fits=fits,
        p=None if fits else _by_chance(answers, outputs),
    )


def _near(of: Hypothesis, error: float, explained: float, spread: float) -> bool:
    """Whether it may be suspected. What is repeated exactly leaves no more than another precision would; a rough one may."""
    if of.least >= NEVER or explained < of.least:
        return False
    return of.least < PRECISE or error <= NEAR * spread


def _explained(answers: Floats, own: Floats, left: Floats) -> float:
    """Share of the squared difference between the server and the model that a hypothesis explains, which leaves `left`."""
    if not np.isfinite(answers).all():
        return 1.0 if np.isfinite(left[np.isfinite(answers)]).all() else 0.0
    if not np.isfinite(left).all():
        return 0.0
    total = float(((answers - own) ** 2).sum())
    return 1 - float((left**2).sum()) / total if total else 0.0


def _by_chance(answers: Floats, outputs: Floats) -> float | None:
    """How often outputs in another order are as near to the answers: the p of a permutation test. None: not finite."""
    if not (np.isfinite(answers).all() and np.isfinite(outputs).all()):
        return None
    apart = ((answers[:, None] - outputs[None]) ** 2).reshape(len(answers), len(answers), -1).sum(axis=2)
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(len(answers)), (PERMUTATIONS, 1)), axis=1)
    near = apart[np.arange(len(answers)), orders].sum(axis=1) <= np.trace(apart) * (1 + 1e-9)
    return float((1 + near.sum()) / (1 + PERMUTATIONS))


def _distance(one: Floats, other: Floats) -> float:
    """The largest difference; values that are not finite must stand at the same places, else it is infinite."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    alike = (np.isnan(one) & np.isnan(other)) | (one == other)
    apart = np.where(alike, 0.0, apart)
    return float(np.inf if np.isnan(apart).any() else apart.max(initial=0.0))


def _unknown(answers: Floats, own: Floats) -> str:
    none = "none of the known mistakes fits"
    if not np.isfinite(answers).all():
        return f"{none}; answers are not finite"
    spread = float(np.ptp(own, axis=0).max())
    if len(answers) > 1 and float(np.ptp(answers, axis=0).max()) <= STILL * spread:
        return f"{none}; every answer is the same, as if the inputs did not reach the model"
    if _distance(answers, own) <= NEAR * spread:
        return (
            f"{none}; the difference is small ({_distance(answers, own):.3g}, {_distance(answers, own) / spread:.2%} of the "
            "outputs' spread): another precision, another kernel or a nearby version of the model rather than its inputs"
        )
    return none
