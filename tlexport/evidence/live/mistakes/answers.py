"""Mistakes behind the model: what a server would answer that hands on something else than the model's probabilities or values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.live.diagnosis import Hypothesis
from tlexport.evidence.live.mistakes import NEVER

Floats = NDArray[np.float64]

LEAST_FITTED = 4  # samples from which a scale and a shift can be told: two are always met
SMALLEST = 1e-30  # of a probability whose logarithm is taken


def explanations(
    answers: Floats, own: Floats, task: str, classes: Sequence[str] = ()
) -> Iterator[Hypothesis]:
    """What could have been made of the model's right outputs `own` [n, K]. answers: the server's [n, K]."""
    if task == "regression":
        yield from _values(answers, own)
        return
    yield from _probabilities(answers, own, task)
    yield from _permuted(answers, own, classes)


def _probabilities(answers: Floats, own: Floats, task: str) -> Iterator[Hypothesis]:
    many = task == "multilabel"
    name = "sigmoid" if many else "softmax"
    twice = _sigmoid(own) if many else _softmax(own)
    yield Hypothesis(
        f"{name} applied twice: the probabilities are taken for logits",
        f"leave out the {name} behind the model: the graph ends with one",
        twice,
    )
    with np.errstate(over="ignore"):
        yield Hypothesis(
            "logarithms for probabilities",
            "hand on the graph's output",
            own,
            NEVER,
            np.exp(np.minimum(answers, 1)),
        )
    restored = _sigmoid(answers) if many else _softmax(answers)
    yield Hypothesis(
        f"logits for probabilities: the {name} is missing",
        "deploy the graph of the bundle, which ends with it",
        own, NEVER, restored,
    )  # fmt: skip
    if not many:
        inside = np.clip(answers, SMALLEST, 1 - np.finfo(np.float64).eps)
        yield Hypothesis(
            "one sigmoid a class for the softmax over all",
            "deploy the graph of the bundle, which ends with the softmax",
            own, NEVER, _softmax(np.log(inside) - np.log1p(-inside)),
        )  # fmt: skip
        decided = np.zeros_like(own)
        decided[np.arange(len(own)), own.argmax(axis=1)] = 1
        yield Hypothesis("decisions (0 or 1) for probabilities", "hand on the graph's output", decided)
    yield Hypothesis("percentages for probabilities", "hand on the graph's output", 100 * own)


def _permuted(answers: Floats, own: Floats, classes: Sequence[str]) -> Iterator[Hypothesis]:
    """The classes in the order that fits best, where it is another one."""
    from scipy.optimize import linear_sum_assignment

    if own.shape[1] < 2 or not np.isfinite(answers).all():
        return
    cost = ((own[:, :, None] - answers[:, None, :]) ** 2).sum(axis=0)
    of, at = linear_sum_assignment(cost)
    order = np.empty(len(of), int)
    order[at] = of
    moved = np.flatnonzero(order != np.arange(len(order)))
    if not len(moved):
        return
    names = list(classes) if len(classes) == len(order) else [str(k) for k in range(len(order))]
    told = ", ".join(f"{names[order[k]]} stands where {names[k]} should" for k in moved[:4])
    yield Hypothesis(
        f"permuted classes: {told}{' ...' if len(moved) > 4 else ''}",
        f"list the classes in the manifest's order: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}",
        own[:, order],
        NEVER,
    )


def _values(answers: Floats, own: Floats) -> Iterator[Hypothesis]:
    positive = own.min() > 0
    if positive:
        yield Hypothesis("logarithms for values", "hand on the graph's output", np.log(own))
        yield Hypothesis("square roots for values", "hand on the graph's output", np.sqrt(own))
    with np.errstate(over="ignore"):
        yield Hypothesis("exponentials for values", "hand on the graph's output", np.exp(own))
    if len(own) < LEAST_FITTED or not np.isfinite(answers).all():
        return
    fitted = np.empty_like(own)
    told = []
    for k in range(own.shape[1]):
        x, y = own[:, k], answers[:, k]
        spread = x - x.mean()
        slope = float(spread @ (y - y.mean()) / max(float(spread @ spread), SMALLEST))
        shift = float(y.mean() - slope * x.mean())
        fitted[:, k] = slope * x + shift
        told.append(f"times {slope:.4g} plus {shift:.4g}")
    yield Hypothesis(
        f"another scale: the values {'; '.join(told[:3])}",
        "hand on the graph's output, which is in the label's own unit",
        fitted,
        NEVER,
    )


def _softmax(x: Floats) -> Floats:
    shares: Floats = np.exp(x - x.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))
