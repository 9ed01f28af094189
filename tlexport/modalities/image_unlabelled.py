"""Images that nobody labelled, prepared as a bundle's manifest says: what a finished model is asked about."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.modalities import image_arrays, image_sources, image_store
from tlexport.modalities.dataset import DataWarning
from tlexport.modalities.image_decode import SUFFIXES
from tlexport.modalities.image_preprocessing import Preprocessing
from tlexport.modalities.image_samples import few

ACCEPTED = f"accepted: an image ({', '.join(SUFFIXES)}, .dcm), a folder of images, or a .npz with images"


def samples(path: str, preprocessing: Mapping[str, Any]) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Names and uint8 [n, C, S, S] of an image, of all images below a folder, or of a .npz's arrays.

    Raises DataError for what is no such thing, and for each file that cannot be read; files that are no images are told.
    """
    prepare = Preprocessing.described(preprocessing)
    source = Path(path).expanduser()
    if source.suffix.lower() == ".npz" and source.is_file():
        names, arrays = image_arrays.read_unlabelled(source)
        return tuple(names), np.concatenate([prepare.batch(part) for part in arrays.parts])
    files = _found(source)
    _check_memory(len(files), prepare)
    read = image_sources.files_of(files, prepare.dicom)
    stored = image_store.store(read, np.arange(len(files)), prepare, "", None)
    if stored.corrupt:
        listed = few(list(stored.corrupt.values()))
        raise DataError(
            f"{len(stored.corrupt)} of {len(files)} files cannot be read: {listed}; repair or remove them"
        )
    root = source if source.is_dir() else source.parent
    return tuple(file.relative_to(root).as_posix() for file in files), prepare.batch(stored.images)


def _found(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source} does not exist ({ACCEPTED})")
    images, others = image_sources.walk(source)
    if not images:
        raise DataError(f"{source} holds no image, and {len(others)} other files ({ACCEPTED})")
    if others:
        told = f"{len(others)} files are no images and were passed over, the first: {others[0].name}"
        warnings.warn(told, DataWarning, stacklevel=3)
    return images


def _check_memory(count: int, prepare: Preprocessing) -> None:
    import psutil

    needed = 2 * count * prepare.channels * prepare.image_size**2  # as decoded, and as the graph takes them
    free = int(psutil.virtual_memory().available * image_arrays.MEMORY_SHARE)
    if needed > free:
        raise DataError(
            f"{count} images take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory can be used; "
            "give them in several folders, one call each"
        )
