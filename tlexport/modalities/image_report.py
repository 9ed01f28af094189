"""What a run remembers of its data: counts, origins, what was broken or doubled. Names of files, never pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.modalities.dataset import DataReport


class ImageReport(DataReport):
    """What else is known of images."""

    channels: int
    stored_size: tuple[int, int]  # height, width
    ignored: tuple[str, ...]  # the first 1000 files that are no images
    ignored_count: int
    duplicates_count: dict[str, int]  # val, test -> images that are also in train
    dropped: int  # test images left out because of that


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
