"""Mistakes with tables: float32 [n, columns], a missing value is NaN, a category its code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.live.mistakes import NEVER, Mistake, Samples

LEAST = 0.85  # share that a scaling must explain: a wrong scale moves a table's answers much the same way as another one
MOST_PAIRS = 2048  # of columns that are tried swapped: 64 columns
SCALES = "only an approximation: the training table's mean and spread are not in the bundle, the golden samples' are taken"


def known(names: Sequence[str], categorical: Sequence[bool]) -> tuple[Mistake, ...]:
    """For the columns of these names, in the graph's order."""
    categories = np.array(categorical, bool)
    return (*_missing(categories), *_orders(names), *_scaled(categories), *_codes(categories), *_swaps(names))


def _missing(categories: NDArray[np.bool_]) -> list[Mistake]:
    advice = "send NaN for a missing value: the graph knows what to do with it"
    filled = {"zeros": 0.0, "-1": -1.0, "-999": -999.0}
    found = [
        Mistake(f"missing values as {word}", advice, partial(_filled, value=value))
        for word, value in filled.items()
    ]
    means = Mistake(f"missing values as the column's mean ({SCALES})", advice, _as_means, LEAST)
    return [*found, means] if not categories.all() else found


def _filled(x: Samples, value: float) -> Samples:
    return np.where(np.isnan(x), np.float32(value), x)


def _as_means(x: Samples) -> Samples:
    return np.where(np.isnan(x), _moments(x)[0], x)


def _orders(names: Sequence[str]) -> list[Mistake]:
    advice = (
        f"send the columns in the manifest's order: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
    )
    alphabet = np.argsort(np.array(names), kind="stable")
    orders = {
        "columns in alphabetical order": alphabet,
        "columns in reverse order": np.arange(len(names))[::-1],
        "columns shifted by one to the right, as where a row number is sent first": np.arange(len(names)) - 1,
        "columns shifted by one to the left": (np.arange(len(names)) + 1) % max(1, len(names)),
    }
    found = [Mistake(says, advice, partial(_taken, order=order)) for says, order in orders.items()]
    numbered = Mistake(
        "a row number is sent as the first column, and all others one further", advice, _numbered
    )
    return [*found, numbered]


def _taken(x: Samples, order: NDArray[np.intp]) -> Samples:
    return np.ascontiguousarray(x[:, order])


def _numbered(x: Samples) -> Samples:
    moved = np.roll(x, 1, axis=1)
    moved[:, 0] = np.arange(len(x))
    return moved


def _scaled(categories: NDArray[np.bool_]) -> list[Mistake]:
    advice = "send raw values: the graph scales by itself"
    if categories.all():
        return []

    def numeric(change: Callable[[Samples], Any]) -> Callable[[Samples], Samples]:
        return lambda x: np.where(categories, x, change(x)).astype(np.float32)

    return [
        Mistake(f"standardised twice ({SCALES})", advice, numeric(_standardised), LEAST),
        Mistake(f"scaled to 0-1 before the graph ({SCALES})", advice, numeric(_ranged), LEAST),
        Mistake("numbers cut to whole ones", advice, numeric(np.trunc)),
        Mistake("logarithms for values", advice, numeric(lambda x: np.log1p(np.maximum(x, 0)))),
    ]


def _standardised(x: Samples) -> Samples:
    mean, spread = _moments(x)
    made: Samples = (x - mean) / spread
    return made


def _ranged(x: Samples) -> Samples:
    present = np.where(np.isnan(x), _moments(x)[0], x)
    low, high = present.min(axis=0), present.max(axis=0)
    made: Samples = (x - low) / np.where(high > low, high - low, 1)
    return made


def _moments(x: Samples) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and spread [columns] of what is not missing; 0 and 1 where nothing is or nothing varies."""
    there = ~np.isnan(x)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, x, 0).sum(axis=0) / count
    spread = np.sqrt(np.where(there, (x - mean) ** 2, 0).sum(axis=0) / count)
    return mean.astype(np.float32), np.where(spread > 0, spread, 1).astype(np.float32)


def _codes(categories: NDArray[np.bool_]) -> list[Mistake]:
    advice = "a category's code is its place in the manifest's vocabulary, from 0"
    if not categories.any():
        return []
    steps = {"one too high": 1.0, "one too low": -1.0}
    return [
        Mistake(f"codes of categories {word}", advice, partial(_moved, step=step * categories))
        for word, step in steps.items()
    ]


def _moved(x: Samples, step: NDArray[Any]) -> Samples:
    made: Samples = (x + step).astype(np.float32)
    return made


def _swaps(names: Sequence[str]) -> list[Mistake]:
    pairs = itertools.islice(itertools.combinations(range(len(names)), 2), MOST_PAIRS)
    return [
        Mistake(
            f"columns swapped: {names[a]} and {names[b]}",
            "send the columns in the manifest's order",
            partial(_swapped, pair=(a, b)),
            NEVER,
        )
        for a, b in pairs
    ]


def _swapped(x: Samples, pair: tuple[int, int]) -> Samples:
    made = x.copy()
    made[:, list(pair)] = x[:, list(pair[::-1])]
    return made
