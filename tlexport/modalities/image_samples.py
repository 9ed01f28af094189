"""What a reader finds before anything is split, resized or judged: images, labels, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.modalities.image_pixels import Pixels

_SHOWN = 5


@dataclass(frozen=True)
class Arrays:
    """Images of one size that are in memory: uint8 [n, h, w, C] a part, numbered through."""

    parts: tuple[Pixels, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def channels(self) -> int:
        return int(self.parts[0].shape[-1])

    def take(self, rows: NDArray[np.int64]) -> Pixels:
        """The images at `rows`; a whole part in its own order is not copied."""
        start = 0
        for part in self.parts:
            if len(rows) == len(part) and np.array_equal(rows, np.arange(start, start + len(part))):
                return part
            start += len(part)
        bounds = np.cumsum([0, *(len(part) for part in self.parts)])
        out = np.empty((len(rows), *self.parts[0].shape[1:]), np.uint8)
        for part, low, high in zip(self.parts, bounds, bounds[1:], strict=False):
            here = (rows >= low) & (rows < high)
            out[here] = part[rows[here] - low]
        return out


@dataclass(frozen=True)
class Files:
    """Images that are decoded one by one. Each function takes an index from 0 to count - 1.

    `read` gives uint8 [H, W, 1 or 3] or raises CorruptImageError; `channels_at` looks at the header only;
    `identity` changes when the file does.
    """

    count: int
    read: Callable[[int], Pixels]
    channels_at: Callable[[int], int]
    identity: Callable[[int], str]

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Samples:
    """A data set as its reader found it; every sequence has one entry a sample.

    labels: int64 [n], or uint8 0/1 [n, K] for multilabel. splits: train, val or test; None if nothing is stated.
    """

    images: Arrays | Files
    labels: NDArray[Any]
    names: Sequence[str]
    splits: NDArray[np.str_] | None = None
    groups: NDArray[Any] | None = None
    slices: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_order(
    found: Sequence[str], wanted: tuple[str, ...] | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The index of each class name found, and the names to show in that order.

    Without `wanted` names are sorted, as numbers if they all are. `wanted` either names what was found, and so
    fixes the order, or gives names to the labels 0, 1, 2 ... Raises DataError if it does neither.
    """
    numeric = all(name.isascii() and name.isdigit() for name in found)
    ordered = sorted(found, key=int) if numeric else sorted(found)
    if wanted is None:
        return {name: index for index, name in enumerate(ordered)}, tuple(ordered)
    if set(found) <= set(wanted):
        return {name: index for index, name in enumerate(wanted)}, wanted
    if numeric and int(ordered[-1]) < len(wanted):
        return {name: int(name) for name in ordered}, wanted
    unnamed = [name for name in ordered if name not in wanted]
    raise DataError(
        f"data.class_names ({', '.join(wanted)}) has no name for {few(unnamed)}; the data has {few(ordered)}"
    )


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(str(name) for name in names[:_SHOWN]) + more
