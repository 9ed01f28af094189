"""The 8-bit grids that values are put on, and the intervals they cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Flavour = Literal["trt", "cpu"]

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
    """Real value = scale * (integer - zero_point); scalars, or vectors [channels] along `axis`."""

    scale: np.ndarray  # float32
    zero_point: np.ndarray  # int8, uint8 or int32
    axis: int | None = None

    def quantise(self, values: np.ndarray, largest: int) -> np.ndarray:
        """Constants onto a grid whose zero point is 0, clipped to plus and minus `largest`."""
        shape = (
            [1] * values.ndim
            if self.axis is None
            else [-1 if d == self.axis else 1 for d in range(values.ndim)]
        )
        steps = np.rint(values.astype(np.float64) / self.scale.astype(np.float64).reshape(shape))
        return np.clip(steps, -largest, largest).astype(self.zero_point.dtype)


def of_activation(interval: Range, flavour: Flavour) -> Grid:
    """The grid the flavour puts an activation with this range on: `trt` symmetric S8, `cpu` U8 with a zero point."""
    return _symmetric(interval) if flavour == "trt" else _asymmetric(interval)


def scale_of(magnitude: np.ndarray | float, levels: int) -> np.ndarray:
    """Magnitude / levels; 1 where there is nothing to represent, since a scale may be neither 0 nor infinite."""
    return np.where(np.asarray(magnitude) < DEAD, 1.0, np.asarray(magnitude) / levels).astype(np.float32)


def _symmetric(interval: Range) -> Grid:
    return Grid(scale_of(interval.magnitude, 127), np.zeros((), np.int8))


def _asymmetric(interval: Range) -> Grid:
    """U8 over the interval widened to hold 0, which must be exact: padding and ReLU produce it."""
    low, high = min(interval.low, 0.0), max(interval.high, 0.0)
    scale = scale_of(high - low, 255)
    return Grid(scale, np.asarray(np.clip(np.rint(-low / scale), 0, 255), np.uint8))
