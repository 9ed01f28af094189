"""Decode every file once, resize it, and keep the result as one uint8 array on disk.

    cache/images/  pixels.npy   uint8 [n, S, S, C], memory-mapped when it is used
                   index.json   the key it was made for, which files are in it, which are corrupt, a checksum

The key covers each file's path, size and time, and every setting that changes a pixel. A store with another key,
or one whose contents do not have its checksum, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tlexport import cores
from tlexport.errors import StorageError
from tlexport.modalities.image_pixels import CorruptImageError, Pixels
from tlexport.modalities.image_preprocessing import Preprocessing
from tlexport.modalities.image_samples import Files
from tlexport.modalities.splits import content_hashes
from tlexport.run import replacing, write_json

VERSION = 1
_CHUNK = 256
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stored:
    """images: uint8 [n, S, S, C]; kept: their positions among the rows asked for; corrupt: position -> reason."""

    images: Pixels
    kept: NDArray[np.int64]
    corrupt: dict[int, str]
    hashes: list[bytes]


def store(
    files: Files,
    rows: NDArray[np.int64],
    preprocessing: Preprocessing,
    settings: str,
    cache: Path | None,
    progress: Progress | None = None,
) -> Stored:
    """The files at `rows`, in that order, without those that cannot be read; in memory if `cache` is None.

    `settings` is whatever else changes a pixel. `progress` gets (files done, files in all).
    """
    if cache is None:
        images, corrupt = _into_memory(files, rows, preprocessing, progress)
        return Stored(images, _without(len(rows), corrupt), corrupt, content_hashes(images))
    folder = cache / "images"
    key = _key(files, rows, preprocessing, settings)
    found = _reuse(folder, key, len(rows))
    if found is None:
        with replacing(folder) as partial:
            _write(partial, key, _decoded(files, rows, preprocessing, progress), preprocessing, len(rows))
        found = _reuse(folder, key, len(rows))
        if found is None:
            raise StorageError(
                f"{folder} does not read back as it was written; the disk or its driver is at fault"
            )
    return found


def channels(files: Files, rows: NDArray[np.int64]) -> int:
    """3 if any image has colour, else 1, from the headers; a file with a broken one does not count here."""

    def look(row: int) -> int:
        try:
            return files.channels_at(int(row))
        except CorruptImageError:
            return 0

    with _silenced(), ThreadPoolExecutor(cores.usable()) as pool:
        return 3 if 3 in pool.map(look, rows) else 1


def _key(files: Files, rows: NDArray[np.int64], preprocessing: Preprocessing, settings: str) -> str:
    whole = hashlib.sha256(json.dumps([VERSION, preprocessing.describe(), settings]).encode())
    for row in rows:
        whole.update(files.identity(int(row)).encode() + b"\n")
    return whole.hexdigest()


def _reuse(folder: Path, key: str, count: int) -> Stored | None:
    """The store in `folder`, or None if it is another one or damaged."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["key"] != key:
            return None
        images: Pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
        corrupt = {int(row): str(reason) for row, reason in index["corrupt"].items()}
        hashes = content_hashes(images)
        intact = index["sha256"] == _checksum(hashes) and len(images) == count - len(corrupt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Stored(images, _without(count, corrupt), corrupt, hashes) if intact else None


def _write(
    folder: Path,
    key: str,
    decoded: Iterator[Pixels | CorruptImageError],
    preprocessing: Preprocessing,
    count: int,
) -> None:
    """Plain writes, because a full disk under a memory map would kill the process without a word."""
    folder.mkdir()
    corrupt: dict[int, str] = {}
    hashes: list[bytes] = []
    with (folder / "pixels.npy").open("wb") as out:
        _header(out, preprocessing, count)
        for position, image in enumerate(decoded):
            if isinstance(image, CorruptImageError):
                corrupt[position] = str(image)
            else:
                out.write(image.tobytes())
                hashes += content_hashes(image[None])
        out.seek(0)
        _header(out, preprocessing, len(hashes))
    write_json(folder / "index.json", {"key": key, "corrupt": corrupt, "sha256": _checksum(hashes)})


def _header(out: IO[bytes], preprocessing: Preprocessing, count: int) -> None:
    """numpy pads the header so that its length does not depend on the first dimension."""
    shape = (count, preprocessing.image_size, preprocessing.image_size, preprocessing.channels)
    npy.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _into_memory(
    files: Files, rows: NDArray[np.int64], preprocessing: Preprocessing, progress: Progress | None
) -> tuple[Pixels, dict[int, str]]:
    size = preprocessing.image_size
    images = np.empty((len(rows), size, size, preprocessing.channels), np.uint8)
    corrupt: dict[int, str] = {}
    kept = 0
    for position, image in enumerate(_decoded(files, rows, preprocessing, progress)):
        if isinstance(image, CorruptImageError):
            corrupt[position] = str(image)
        else:
            images[kept] = image
            kept += 1
    return images[:kept], corrupt


def _decoded(
    files: Files, rows: NDArray[np.int64], preprocessing: Preprocessing, progress: Progress | None
) -> Iterator[Pixels | CorruptImageError]:
    """Each row's image [S, S, C] or the reason why there is none, in order; Pillow decodes outside Python's lock."""

    def one(row: int) -> Pixels | CorruptImageError:
        try:
            return preprocessing.square(files.read(int(row)))
        except CorruptImageError as error:
            return error

    with _silenced(), ThreadPoolExecutor(cores.usable()) as pool:
        for start in range(0, len(rows), _CHUNK):
            yield from pool.map(one, rows[start : start + _CHUNK])
            if progress is not None:
                progress(min(start + _CHUNK, len(rows)), len(rows))


@contextmanager
def _silenced() -> Iterator[None]:
    """pydicom's warnings quote header values, which may be a patient's; what matters is raised as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _without(count: int, corrupt: dict[int, str]) -> NDArray[np.int64]:
    return np.array([position for position in range(count) if position not in corrupt], np.int64)


def _checksum(hashes: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()
