"""What pretraining has seen, so that fine-tuning can tell whether its test samples were among it.

`seen.npy` beside a pretrained checkpoint holds a 64-bit hash of every sample's inputs, sorted: uint64 [n]. No sample can be
read back from it. Where samples have times, `seen.json` holds the last one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.modalities.dataset import Split
from tlexport.run import read_json, replacing, write_json

Hashes = NDArray[np.uint64]

HASHES, TIMES = "seen.npy", "seen.json"
_ROWS = 4096


@dataclass(frozen=True)
class Seen:
    """What a pretrained run learned from."""

    hashes: Hashes  # sorted
    until: np.datetime64 | None

    def shared(self, split: Split) -> NDArray[np.bool_]:
        """[n]: samples that were seen, or whose inputs end no later than the last moment that was."""
        found = np.isin(hashes(split), self.hashes)
        if self.until is not None and split.times is not None:
            found = found | (split.times <= self.until)
        return np.asarray(found, np.bool_)


def write(folder: Path, *splits: Split) -> None:
    """Record the splits' samples in a checkpoint's folder."""
    with replacing(folder / HASHES) as partial, partial.open("wb") as handle:
        np.save(handle, np.unique(np.concatenate([hashes(split) for split in splits])), allow_pickle=False)
    times = [split.times.max() for split in splits if split.times is not None and len(split)]
    write_json(folder / TIMES, {"until": str(max(times)) if times else None})


def read(weights: Path) -> Seen | None:
    """The record of a pretrained run or its checkpoint; None where `weights` is neither."""
    folder = weights / "checkpoint" if (weights / "checkpoint").is_dir() else weights
    if not (folder / HASHES).is_file():
        return None
    until = read_json(folder / TIMES)["until"] if (folder / TIMES).is_file() else None
    known: Hashes = np.load(folder / HASHES, allow_pickle=False)
    return Seen(known, np.datetime64(until) if until else None)


def hashes(split: Split) -> Hashes:
    """uint64 [n] of each sample's key, or of its prepared inputs where it has none (BLAKE2b, 8 bytes)."""
    if split.keys is not None:
        return np.array([_hash(key.encode()) for key in split.keys], np.uint64)
    found = np.empty(len(split), np.uint64)
    for start in range(0, len(split), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(split)))
        batch: NDArray[Any] = np.ascontiguousarray(split.batch(rows))
        content = batch.reshape(len(rows), -1).view(np.uint8).reshape(len(rows), -1)
        for row, sample in zip(rows, content, strict=True):
            found[row] = _hash(sample.data)
    return found


def _hash(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
