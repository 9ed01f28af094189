"""Whether a live server's answers are the model's: against the reference's outputs, and bit by bit against a local session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.results import Differences, Misplaced
from tlexport.tensors import TensorSpec

MOST_TOLD = 10


def differences(
    answers: NDArray[Any],
    expected: NDArray[Any],
    limit: float,
    *,
    decided: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    samples: NDArray[np.intp] | None = None,
) -> Differences:
    """The server's answers [n, K] held against the reference's outputs [n, K] to the same samples.

    decided: the decisions [n] or [n, L] from both, answers' first. samples: int [n], the golden sample each row is of;
    without it row k is of sample k. Values that are not finite count as over the limit. Raises ValueError if shapes differ.
    """
    if answers.shape != expected.shape or not len(answers):
        raise ValueError(f"answers {answers.shape} cannot be held against {expected.shape}")
    rows = np.arange(len(answers)) if samples is None else samples
    answers, expected = answers.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(answers).reshape(len(answers), -1).all(axis=1)
    with np.errstate(invalid="ignore"):
        error = np.abs(answers - expected).reshape(len(answers), -1).max(axis=1)
    known = error[finite]
    over = ~finite | (np.nan_to_num(error, nan=np.inf) > limit)
    worst = int(np.where(finite, error, np.inf).argmax())
    flips = None
    if decided is not None:
        flips = int((decided[0] != decided[1]).reshape(len(answers), -1).any(axis=1).sum())
    return Differences(
        samples=len(answers),
        limit=limit,
        max_abs_error=float(known.max()) if len(known) else None,
        median_abs_error=float(np.median(known)) if len(known) else None,
        rms_error=float(np.sqrt(np.mean((answers - expected)[finite] ** 2))) if len(known) else None,
        over=int(over.sum()),
        worst_sample=int(rows[worst]),
        not_finite=tuple(sorted({int(row) for row in rows[~finite]}))[:MOST_TOLD],
        flips=flips,
    )


def identical(answers: NDArray[Any], local: NDArray[Any]) -> NDArray[np.bool_]:
    """[n]: whether a row has the same bits as the local session's; a NaN is equal to the same NaN."""
    if answers.shape != local.shape or answers.dtype != local.dtype:
        return np.zeros(len(answers), bool)
    one, other = (np.ascontiguousarray(of).view(np.uint8).reshape(len(of), -1) for of in (answers, local))
    same: NDArray[np.bool_] = (one == other).all(axis=1)
    return same


def misplaced(
    request: int, rows: NDArray[np.intp], answers: NDArray[Any], expected: NDArray[Any], limit: float
) -> Misplaced | None:
    """Whether the answers [b, K] to golden samples `rows` [b] are right ones to other samples.

    expected: the reference's outputs [n, K] to all golden samples. None where they are as they should be, or no sample's:
    the latter is a difference and no exchange. Samples whose outputs are alike within `limit` cannot be told apart.
    """
    with np.errstate(invalid="ignore"):
        error = (
            np.abs(answers[:, None].astype(np.float64) - expected[None])
            .reshape(len(rows), len(expected), -1)
            .max(axis=2)
        )
    own = error[np.arange(len(rows)), rows]
    if not (own > limit).any():
        return None
    nearest = np.where(own <= limit, rows, error.argmin(axis=1))
    if (error[np.arange(len(rows)), nearest] > limit).any():
        return None
    return Misplaced(request=request, sent=tuple(map(int, rows)), answered=tuple(map(int, nearest)))


def indistinct(expected: NDArray[Any], limit: float) -> int:
    """Pairs of golden samples whose outputs [n, K] differ by no more than the limit: an exchange of them shows nowhere."""
    flat = expected.reshape(len(expected), -1).astype(np.float64)
    apart = np.abs(flat[:, None] - flat[None]).max(axis=2)
    return int((apart[np.triu_indices(len(flat), 1)] <= limit).sum())


def metadata(
    stated: Sequence[tuple[str, str, tuple[int, ...]]], specs: Sequence[TensorSpec], what: str
) -> list[str]:
    """What a server says of its tensors, (name, numpy's dtype, shape with -1 for any size), that the manifest has otherwise.

    what: `input` or `output`. A batch dimension that the server leaves out, as Triton may, or fixes is told too.
    """
    held = {name: (dtype, shape) for name, dtype, shape in stated}
    wrong = [
        f"{what} {spec.name!r} is not there (the server has: {', '.join(held) or 'none'})"
        for spec in specs
        if spec.name not in held
    ]
    for spec in specs:
        if spec.name not in held:
            continue
        dtype, shape = held[spec.name]
        if dtype != spec.dtype:
            wrong.append(f"{what} {spec.name!r} is {dtype}, and {spec.dtype} in the manifest")
        wanted = tuple(-1 if isinstance(side, str) else side for side in spec.shape)
        if len(shape) != len(wanted) or any(
            side != own and side != -1 for side, own in zip(shape, wanted, strict=True)
        ):
            wrong.append(f"{what} {spec.name!r} is {list(shape)}, and {list(wanted)} in the manifest")
    if what == "input":
        wrong += [
            f"input {name!r} is asked for, and the model has none of that name"
            for name in held
            if name not in {spec.name for spec in specs}
        ]
    return wrong
