"""Names, types and shapes of a graph's inputs and outputs, and the batch sizes an engine is built for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST_BATCH = 1 << 16


class TensorSpec(BaseModel):
    """One input or output. A dimension is an int or the name of a symbolic one (`"batch"`)."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str  # numpy's name: uint8, float32 ...
    shape: tuple[int | str, ...]

    def at(self, batch: int) -> tuple[int, ...]:
        """The concrete shape with every symbolic dimension set to `batch`."""
        return tuple(batch if isinstance(d, str) else d for d in self.shape)


class Profile(BaseModel):
    """Batch sizes an engine accepts (`min` to `max`) and is tuned for (`opt`)."""

    model_config = ConfigDict(frozen=True)

    min: int = 1
    opt: int = 1
    max: int = Field(64, le=LARGEST_BATCH)

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(
                f"a profile needs 1 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}"
            )
        return self


def named(inputs: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Input name -> contiguous array [n, ...], of a plain array (one name) or a structured one (a field a name).

    A structured array may hold more fields than are named. Raises ValueError if a name has no field.
    """
    fields = inputs.dtype.names
    if fields is None and len(names) == 1:
        return {names[0]: np.ascontiguousarray(inputs)}
    if fields is None or not set(names) <= set(fields):
        raise ValueError(
            f"inputs hold {', '.join(fields or ('one plain array',))}; wanted: {', '.join(names)}"
        )
    return {name: np.ascontiguousarray(inputs[name]) for name in names}


def first(samples: Path, names: Sequence[str], size: int) -> dict[str, NDArray[Any]]:
    """Input name -> contiguous array [size, ...]: the first samples of a .npy file, repeated where it holds fewer."""
    return filled(np.load(samples, mmap_mode="r", allow_pickle=False), names, size)


def filled(samples: NDArray[Any], names: Sequence[str], size: int) -> dict[str, NDArray[Any]]:
    """The same of an array that is at hand."""
    return named(np.resize(np.array(samples[:size]), (size, *samples.shape[1:])), names)
