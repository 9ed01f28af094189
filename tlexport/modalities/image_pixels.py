"""What every reader of images shares: the form of pixels, the bound on their number, and what a damaged file raises."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # Pillow's own threshold: a quarter of a GiB as RGB


class CorruptImageError(DataError):
    """One file cannot be read as an image; a loader may count it and go on."""


def stretch(values: NDArray[Any], ignore: NDArray[np.bool_] | None = None) -> Pixels:
    """Map the smallest value to 0 and the largest to 255, rounding; values marked in `ignore` do not count.

    Raises CorruptImageError if a value is NaN or infinite.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise CorruptImageError("holds NaN or infinite values")
    counted = values[~ignore] if ignore is not None and not ignore.all() else values
    low, high = counted.min(), counted.max()
    if high == low:
        return np.zeros(values.shape, np.uint8)
    scaled: Pixels = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return scaled


def check_size(width: int, height: int) -> None:
    """Raise CorruptImageError if an image is empty or beyond MAX_PIXELS, before its pixels are unpacked."""
    if width < 1 or height < 1:
        raise CorruptImageError(f"has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise CorruptImageError(f"is {width} x {height} pixels, more than the {MAX_PIXELS} that are read")
