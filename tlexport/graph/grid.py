"""The 8-bit grids that values are put on, and the intervals they cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

Flavour = Literal["trt", "cpu", "fp8"]

LARGEST_FP8 = 448.0  # of E4M3; beyond it there is only NaN

DEAD = 1e-12  # a largest magnitude below this is taken for zero; a scale made of it would underflow


class Range(NamedTuple):
    """The interval a tensor is quantised over."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Grid:
    """Real value = scale * (stored - zero_point); scalars, or vectors [channels] along `axis`."""

    scale: np.ndarray  # float32
    zero_point: np.ndarray  # int8, uint8, int32 or float8 E4M3, which is the stored values' type
    axis: int | None = None

    def quantise(self, values: np.ndarray, largest: float) -> np.ndarray:
        """Constants onto a grid whose zero point is 0, clipped to plus and minus `largest`; halves go to even."""
        shape = (
            [1] * values.ndim
            if self.axis is None
            else [-1 if d == self.axis else 1 for d in range(values.ndim)]
        )
        steps = values.astype(np.float64) / self.scale.astype(np.float64).reshape(shape)
        if np.issubdtype(self.zero_point.dtype, np.integer):
            steps = np.rint(steps)
        return np.clip(steps, -largest, largest).astype(self.zero_point.dtype)


@dataclass(frozen=True)
class Weights:
    """What constant factors are stored as, symmetric around zero."""

    dtype: type
    largest: float


FP8_WEIGHTS = Weights(ml_dtypes.float8_e4m3fn, LARGEST_FP8)


def of_activation(interval: Range, flavour: Flavour) -> Grid:
    """The grid of an activation with this range: `trt` symmetric S8, `cpu` U8 with a zero point, `fp8` E4M3."""
    if flavour == "fp8":
        return Grid(scale_of(interval.magnitude, LARGEST_FP8), np.zeros((), ml_dtypes.float8_e4m3fn))
    return _symmetric(interval) if flavour == "trt" else _asymmetric(interval)


def scale_of(magnitude: np.ndarray | float, levels: float) -> np.ndarray:
    """Magnitude / levels; 1 where there is nothing to represent, since a scale may be neither 0 nor infinite."""
    return np.where(np.asarray(magnitude) < DEAD, 1.0, np.asarray(magnitude) / levels).astype(np.float32)


def _symmetric(interval: Range) -> Grid:
    return Grid(scale_of(interval.magnitude, 127), np.zeros((), np.int8))


def _asymmetric(interval: Range) -> Grid:
    """U8 over the interval widened to hold 0, which must be exact: padding and ReLU produce it."""
    low, high = min(interval.low, 0.0), max(interval.high, 0.0)
    scale = scale_of(high - low, 255)
    return Grid(scale, np.asarray(np.clip(np.rint(-low / scale), 0, 255), np.uint8))
