"""reference/: what every later stage judges by, copied out of the data once so that no stage needs the data again.

inputs.npy       the test split as the graph takes it: [n, ...], or structured with a field an input
labels.npy       as in dataset.Split
outputs.npy      float32 [n, K]: what the reference serves for the test split
groups.npy       int64 [n], where samples of one group are not independent
names.npy        str [n]: what a person calls each sample
times.npy        datetime64[D] [n], where there is time
slices.npz       column -> str [n]: the part that each sample belongs to
calibration.npy  training samples, as inputs.npy; calibration-labels.npy are theirs
validation/      inputs, labels, outputs, groups of validation samples: what a search may look at, so that test stays unseen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.modalities.dataset import Split
from tlexport.run import replacing

_ROWS = 256  # prepared at a time, so that a large split does not fill the memory


@dataclass(frozen=True)
class Judged:
    """Samples with what the reference serves for them, float32 [n, K]."""

    split: Split
    outputs: NDArray[Any]


def keep(
    folder: Path,
    test: Judged,
    train: Split,
    *,
    samples: int,
    seed: int,
    validation: Judged | None = None,
    fields: Sequence[str] = (),
) -> None:
    """Write the folder, whole or not at all. `samples` rows of `train` are drawn for calibration.

    `fields` keeps only these inputs of a structured data set; a single one becomes a plain array.
    """
    with replacing(folder) as partial:
        _judged(partial, test, fields)
        rows = drawn(train, samples, seed)
        _write(partial / "calibration.npy", train, rows, fields)
        labels = np.asarray(train.labels)[rows]
        np.save(partial / "calibration-labels.npy", labels, allow_pickle=False)
        if validation is not None:
            _judged(partial / "validation", validation, fields)


def drawn(split: Split, samples: int, seed: int) -> NDArray[np.intp]:
    """Rows of at most so many samples, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(len(split))[:samples])


def _judged(folder: Path, judged: Judged, fields: Sequence[str]) -> None:
    folder.mkdir()
    split = judged.split
    _write(folder / "inputs.npy", split, np.arange(len(split)), fields)
    np.save(folder / "outputs.npy", judged.outputs.astype(np.float32, copy=False), allow_pickle=False)
    np.save(folder / "labels.npy", np.asarray(split.labels), allow_pickle=False)
    np.save(folder / "names.npy", np.array(split.names, np.str_), allow_pickle=False)
    if split.times is not None:
        np.save(folder / "times.npy", split.times, allow_pickle=False)
    if split.slices:
        np.savez(folder / "slices.npz", allow_pickle=False, **split.slices)
    if split.groups is not None:
        groups = np.unique(np.asarray(split.groups), return_inverse=True)[1]
        np.save(folder / "groups.npy", groups.astype(np.int64), allow_pickle=False)


def _write(path: Path, split: Split, rows: NDArray[np.intp], fields: Sequence[str]) -> None:
    array: NDArray[Any] | None = None
    for start in range(0, len(rows), _ROWS):
        batch = _only(split.batch(rows[start : start + _ROWS]), fields)
        if array is None:
            shape = (len(rows), *batch.shape[1:])
            array = np.lib.format.open_memmap(path, mode="w+", dtype=batch.dtype, shape=shape)
        array[start : start + _ROWS] = batch
    assert isinstance(array, np.memmap)
    array.flush()


def _only(batch: NDArray[Any], fields: Sequence[str]) -> NDArray[Any]:
    if not fields or batch.dtype.names is None:
        return batch
    if len(fields) == 1:
        return np.ascontiguousarray(batch[fields[0]])
    kept = np.empty(len(batch), [(name, batch.dtype[name]) for name in fields])
    for name in fields:
        kept[name] = batch[name]
    return kept
