"""reference/: what every later stage judges by, copied out of the data once so that no stage needs the data again.

inputs.npy       the test split as the graph takes it: [n, ...], or structured with a field an input
labels.npy       as in dataset.Split
outputs.npy      float32 [n, K]: what the reference serves for the test split
groups.npy       int64 [n], where samples of one group are not independent
calibration.npy  training samples, as inputs.npy
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.modalities.dataset import Dataset, Split
from tlexport.run import replacing

_ROWS = 256  # prepared at a time, so that a large split does not fill the memory


def keep(
    folder: Path, data: Dataset, outputs: NDArray[Any], *, samples: int, seed: int, fields: Sequence[str] = ()
) -> None:
    """Write the folder, whole or not at all. `samples` training rows are drawn for calibration.

    `fields` keeps only these inputs of a structured data set; a single one becomes a plain array.
    """
    with replacing(folder) as partial:
        partial.mkdir()
        _write(partial / "inputs.npy", data.test, np.arange(len(data.test)), fields)
        np.save(partial / "outputs.npy", outputs.astype(np.float32, copy=False), allow_pickle=False)
        np.save(partial / "labels.npy", np.asarray(data.test.labels), allow_pickle=False)
        if data.test.groups is not None:
            groups = np.unique(np.asarray(data.test.groups), return_inverse=True)[1]
            np.save(partial / "groups.npy", groups.astype(np.int64), allow_pickle=False)
        drawn = np.random.default_rng(seed).permutation(len(data.train))[:samples]
        _write(partial / "calibration.npy", data.train, np.sort(drawn), fields)


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
