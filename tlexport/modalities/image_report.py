"""What a run remembers of its data: counts, origins, what was broken or doubled. Names of files, never pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


class Corrupt(BaseModel):
    """A file that could not be read, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    reason: str


class Duplicate(BaseModel):
    """An image of val or test whose pixels are also in train."""

    model_config = ConfigDict(frozen=True)

    split: str
    name: str
    train: str


class DataReport(BaseModel):
    """What was found and what was done with it."""

    model_config = ConfigDict(frozen=True)

    source: str
    samples: dict[str, int]  # by split
    counts: dict[str, dict[str, int]]  # split -> class -> samples (positives if multilabel)
    split_origin: dict[str, str]  # split -> given, or how it was drawn
    groups: dict[str, int] | None  # groups in each split
    channels: int
    stored_size: tuple[int, int]  # height, width
    corrupt: tuple[Corrupt, ...]
    ignored: tuple[str, ...]  # the first 1000 files that are no images
    ignored_count: int
    duplicates: tuple[Duplicate, ...]  # the first 1000
    duplicates_count: dict[str, int]  # val, test -> images that are also in train
    dropped: int  # test images left out because of that
    sha256: str  # of the pixels, label and group of every sample, in order
    notes: tuple[str, ...]


def class_counts(labels: NDArray[Any], class_names: tuple[str, ...]) -> dict[str, int]:
    """Class -> samples; for multilabel label -> positives."""
    multilabel = labels.ndim == 2
    counts = (
        labels.astype(np.int64).sum(axis=0) if multilabel else np.bincount(labels, minlength=len(class_names))
    )
    return {name: int(count) for name, count in zip(class_names, counts, strict=False)}


def fingerprint(parts: Mapping[str, tuple[list[bytes], NDArray[Any], NDArray[Any] | None]]) -> str:
    """SHA-256 over each split's name and its (content hashes, labels, groups)."""
    whole = hashlib.sha256()
    for name, (hashes, labels, groups) in parts.items():
        whole.update(f"{name} {len(hashes)}\n".encode())
        whole.update(b"".join(hashes))
        whole.update(labels.astype("<i8").tobytes())
        if groups is not None:
            whole.update("\0".join(map(str, groups)).encode())
    return whole.hexdigest()
