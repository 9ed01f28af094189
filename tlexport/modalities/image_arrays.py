"""Readers of images that come as arrays: .npz in MedMNIST's layout, and scikit-learn's digits.

    {train,val,test}_images   [n, h, w] grey or [n, h, w, 3] RGB (or [n, h, w, 1]); val may be valid, validation
    {train,val,test}_labels   [n] or [n, 1] of classes 0, 1, 2 ..., or 0/1 [n, K] for multilabel
    {train,val,test}_groups   [n] strings or integers, optional: all splits have it or none
or images, labels and groups without a prefix, to be split by a seed. uint8 is taken as it is. Other types must
lie between 0 and 255; floats within 0 and 1 are scaled by 255, with all splits looked at together.

A file is checked against what its headers claim before its contents are unpacked, and nothing is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.modalities.image_pixels import Pixels
from tlexport.modalities.image_samples import Arrays, Samples, few
from tlexport.modalities.splits import ALIASES

MEMORY_SHARE = 0.8  # of what is free: the rest is for the training


def read_npz(path: Path) -> Samples:
    """Raises DataError for everything that is not as the module's text says."""
    with _opened(path) as archive:
        members = _headers(path, archive)
        prefixes = [name for name in (*ALIASES, "") if f"{name}_images".lstrip("_") in members]
        if not prefixes or ("" not in prefixes and "train" not in prefixes):
            held = few([f"{name} {list(shape)}" for name, (shape, _) in members.items()]) or "nothing"
            raise DataError(f"{path} has no train_images or images; it holds {held}")
        prefixes = [name for name in prefixes if name] or [""]
        wanted = {
            kind: [key for name in prefixes if (key := f"{name}_{kind}".lstrip("_")) in members]
            for kind in ("images", "labels", "groups")
        }
        _check_keys(path, prefixes, wanted)
        _check_memory(path, [members[key] for keys in wanted.values() for key in keys])
        arrays = {key: _array(path, archive, key) for keys in wanted.values() for key in keys}
    images = _pixels(path, {key: arrays[key] for key in wanted["images"]})
    for kind in ("labels", "groups"):
        for key, of in zip(wanted[kind], wanted["images"], strict=False):
            if len(arrays[key]) != len(arrays[of]):
                raise DataError(f"{path}: {key} has {len(arrays[key])} entries for {len(arrays[of])} {of}")
    counts = [len(part) for part in images]
    return Samples(
        images=Arrays(images),
        labels=_joined_labels(path, {key: arrays[key] for key in wanted["labels"]}),
        names=[f"{name or 'image'}/{i}" for name, n in zip(prefixes, counts, strict=True) for i in range(n)],
        splits=None if prefixes == [""] else np.repeat([ALIASES[name] for name in prefixes], counts),
        groups=np.concatenate([arrays[key].ravel().astype(str) for key in wanted["groups"]])
        if wanted["groups"]
        else None,
        notes=_notes({key: arrays[key] for key in wanted["images"]}),
    )


def read_unlabelled(path: Path) -> tuple[list[str], Arrays]:
    """Names and images of all arrays `images`, `train_images` ... in the file; labels are not looked at. Raises DataError."""
    with _opened(path) as archive:
        members = _headers(path, archive)
        keys = [name for name in members if name == "images" or name.endswith("_images")]
        if not keys:
            raise DataError(
                f"{path} has no images or <name>_images; it holds {few(list(members)) or 'nothing'}"
            )
        _check_memory(path, [members[key] for key in keys])
        arrays = {key: _array(path, archive, key) for key in keys}
    names = [f"{key.removesuffix('s')}/{row}" for key in keys for row in range(len(arrays[key]))]
    return names, Arrays(_pixels(path, arrays))


def read_digits() -> Samples:
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return Samples(
        images=Arrays((pixels,)),
        labels=digits.target.astype(np.int64),
        names=[f"digits/{index}" for index in range(len(pixels))],
        class_names=tuple(str(name) for name in digits.target_names),
    )


def integer_labels(labels: NDArray[Any], what: str) -> NDArray[Any]:
    """Classes as int64 [n], or 0/1 as uint8 [n, K]. Raises DataError for anything else; `what` names the array."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "biuf":
        raise DataError(
            f"{what} is {labels.dtype} {list(labels.shape)}; expected integers [n], [n, 1] or [n, K]"
        )
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError(f"{what} holds NaN or infinity in {int((~np.isfinite(labels)).sum())} places")
        if (labels != np.rint(labels)).any():
            raise DataError(f"{what} holds fractions, for instance {labels[labels != np.rint(labels)][0]:g}")
    if labels.size and labels.min() < 0:
        raise DataError(
            f"{what} holds negative values, for instance {int(labels.min())}; classes count from 0"
        )
    if labels.ndim == 1:
        return labels.astype(np.int64)
    if labels.size and labels.max() > 1:
        raise DataError(
            f"{what} has {labels.shape[1]} columns and so must be 0 or 1, but holds {int(labels.max())}"
        )
    return labels.astype(np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{path} is damaged, incomplete or no .npz: {error}; make or copy it again"
        ) from error


def _headers(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Member -> shape and dtype, after checking that the member is as large as its header claims."""
    found = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as stream:
            try:
                shape, dtype = _header(stream)
            except ValueError as error:
                raise DataError(f"{path}: {info.filename} is no array ({error})") from error
            if dtype.hasobject:
                raise DataError(
                    f"{path}: {name} holds Python objects, which could run code when read; save it as a plain array"
                )
            claimed = math.prod(shape) * dtype.itemsize + stream.tell()
            if claimed != info.file_size:
                raise DataError(
                    f"{path}: {name} claims {list(shape)} {dtype}, {claimed} bytes, and has {info.file_size}"
                )
        found[name] = shape, dtype
    return found


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _check_keys(path: Path, prefixes: list[str], wanted: dict[str, list[str]]) -> None:
    for kind in ("labels", "groups"):
        lacking = [name for name in prefixes if f"{name}_{kind}".lstrip("_") not in wanted[kind]]
        if lacking and (kind == "labels" or wanted[kind]):
            names = few([f"{name}_{kind}".lstrip("_") for name in lacking])
            raise DataError(f"{path} lacks {names} (it has {few(wanted['images'] + wanted[kind])})")
    splits = [ALIASES[name] for name in prefixes if name]
    if len(set(splits)) < len(splits):
        raise DataError(f"{path} has two arrays for one split: {few(wanted['images'])}; keep one of them")


def _check_memory(path: Path, members: list[tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
    import psutil

    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in members)
    free = int(psutil.virtual_memory().available * MEMORY_SHARE)
    if needed > free:
        raise DataError(
            f"{path} unpacks to {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory can be used; "
            "use a smaller image size or an image folder, which is kept on disk"
        )


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        try:
            array: NDArray[Any] = npy.read_array(stream, allow_pickle=False)
            stream.read(1)  # reaching the end makes zipfile compare the checksum
        except ValueError as error:
            raise DataError(
                f"{path}: {name} cannot be read ({error}); make or copy the file again"
            ) from error
    return array


def _pixels(path: Path, arrays: dict[str, NDArray[Any]]) -> tuple[Pixels, ...]:
    """Every part as uint8 [n, h, w, C]."""
    parts = {key: array[..., None] if array.ndim == 3 else array for key, array in arrays.items()}
    for key, array in parts.items():
        if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
            raise DataError(
                f"{path}: {key} is {list(arrays[key].shape)}; expected [n, h, w] grey or [n, h, w, 3] RGB, channels last"
            )
        if array.dtype.kind not in "uif":
            raise DataError(f"{path}: {key} is {array.dtype}; expected uint8, or numbers from 0 to 255")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{path}: {key} has NaN or infinity in {_bad_images(array)} images")
    shapes = {array.shape[1:] for array in parts.values()}
    if len(shapes) > 1:
        raise DataError(
            f"{path}: the splits differ in image shape: {few([str(list(s)) for s in sorted(shapes)])}"
        )
    if all(array.dtype == np.uint8 for array in parts.values()):
        return tuple(parts.values())
    low, high = min(a.min() for a in parts.values()), max(a.max() for a in parts.values())
    if low < 0 or high > 255:
        raise DataError(
            f"{path}: pixels reach from {low:g} to {high:g}; expected 0 to 255, or floats from 0 to 1"
        )
    unit = high <= 1 and all(array.dtype.kind == "f" for array in parts.values())
    return tuple(np.rint(array * (255 if unit else 1)).astype(np.uint8) for array in parts.values())


def _notes(arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    scaled = [f"{key} was {array.dtype}" for key, array in arrays.items() if array.dtype != np.uint8]
    return (f"pixels were rounded to 8 bits: {few(scaled)}",) if scaled else ()


def _bad_images(array: NDArray[Any]) -> int:
    return int((~np.isfinite(array)).reshape(len(array), -1).any(axis=1).sum())


def _joined_labels(path: Path, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    parts = {key: integer_labels(array, f"{path}: {key}") for key, array in arrays.items()}
    if len({part.shape[1:] for part in parts.values()}) > 1:
        shapes = few([f"{key} {list(part.shape)}" for key, part in parts.items()])
        raise DataError(f"{path}: the splits differ in their labels: {shapes}")
    return np.concatenate(list(parts.values()))
