"""Mistakes with molecules: structured [n] with `tokens` int32, `fingerprint` uint8, `descriptors` float32, or tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.live.mistakes import Mistake, Samples


def known(inputs: tuple[str, ...]) -> tuple[Mistake, ...]:
    """For graphs of these inputs."""
    changes: dict[str, list[tuple[str, str, Callable[[NDArray[Any]], NDArray[Any]]]]] = {
        "tokens": [
            (
                "padding before the tokens",
                "fill up behind the tokens",
                _padded_left,
            ),
            ("tokens in reverse order", "send the tokens in the order of the SMILES", _reversed),
            (
                "token numbers one too high",
                "a token's number is its place in the vocabulary, from 0",
                partial(_moved, step=1),
            ),
            (
                "token numbers one too low",
                "a token's number is its place in the vocabulary, from 0",
                partial(_moved, step=-1),
            ),
            ("no tokens: padding alone", "send the tokens", np.zeros_like),
        ],
        "fingerprint": [
            (
                "a fingerprint of bits for one of counts",
                "use GetCountFingerprint",
                lambda x: np.minimum(x, 1),
            ),
            ("no fingerprint: zeros", "send the fingerprint", np.zeros_like),
        ],
        "descriptors": [
            (
                "missing descriptors as zeros",
                "send NaN where a descriptor is not finite",
                lambda x: np.nan_to_num(x, nan=0.0),
            ),
            ("no descriptors: zeros", "send the descriptors", np.zeros_like),
            (
                "descriptors in reverse order",
                "send the descriptors in the manifest's order",
                lambda x: x[:, ::-1],
            ),
        ],
    }
    return tuple(
        Mistake(says, advice, partial(_changed, field=field, of=of))
        for field in inputs
        for says, advice, of in changes.get(field, ())
    )


def _changed(samples: Samples, field: str, of: Callable[[NDArray[Any]], NDArray[Any]]) -> Samples:
    if samples.dtype.names is None:
        return np.ascontiguousarray(of(samples))
    made = samples.copy()
    made[field] = of(samples[field])
    return made


def _padded_left(tokens: NDArray[Any]) -> NDArray[Any]:
    """What is filled up at the end, with the last value of the longest tail, comes first."""
    made = np.empty_like(tokens)
    for row, own in enumerate(tokens):
        changes = np.flatnonzero(own != own[-1])
        length = int(changes[-1]) + 1 if len(changes) else 0
        made[row] = np.concatenate([own[length:], own[:length]])
    return made


def _reversed(tokens: NDArray[Any]) -> NDArray[Any]:
    """The tokens alone: the padding stays behind them."""
    return _padded_left(tokens)[:, ::-1]


def _moved(tokens: NDArray[Any], step: int) -> NDArray[Any]:
    return np.where(tokens == tokens[:, -1:], tokens, np.maximum(tokens + step, 0))
