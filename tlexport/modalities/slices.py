"""Columns by which drops are told apart (`data.slices`): for each sample the part that it belongs to, as a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError

MOST = 50  # parts of a column: with more, few hold enough samples to say anything
MISSING = "missing"
_QUARTERS = (0.25, 0.5, 0.75)

Slices = dict[str, NDArray[np.str_]]


def read(wanted: Iterable[str], known: Sequence[str], cells: Callable[[str], Sequence[Any]]) -> Slices:
    """Column -> part of each row [n]. `cells` gives a column's values, None or an empty text where there is none.

    Raises DataError for a column that is not there or has too many different texts.
    """
    if absent := [name for name in wanted if name not in known]:
        raise DataError(
            f"data.slices names {', '.join(map(repr, absent))}, and the columns are: {', '.join(known)}"
        )
    return {name: parts(name, cells(name)) for name in wanted}


def parts(column: str, cells: Sequence[Any]) -> NDArray[np.str_]:
    """Texts as they are; a column of more than 50 different numbers in quarters of the rows: `<=34`, `34 to 51` ..."""
    texts = ["" if cell is None else str(cell).strip() for cell in cells]
    if len(set(texts)) <= MOST:
        return np.array([text or MISSING for text in texts], dtype=np.str_)
    numbers = np.array([_number(text) for text in texts])
    if strange := [text for text, number in zip(texts, numbers, strict=True) if text and np.isnan(number)]:
        raise DataError(
            f"data.slices names {column!r}, which has {len(set(texts))} different texts, {strange[0]!r} among them; "
            f"at most {MOST}, or numbers, can be told apart"
        )
    edges = np.unique(np.quantile(numbers[np.isfinite(numbers)], _QUARTERS))
    names = [f"<={edges[0]:g}", *(f"{low:g} to {high:g}" for low, high in _pairs(edges)), f">{edges[-1]:g}"]
    found = np.array(names)[np.searchsorted(edges, np.nan_to_num(numbers, nan=0.0))]
    return np.where(np.isnan(numbers), MISSING, found).astype(np.str_)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _pairs(edges: NDArray[Any]) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
