"""Data sets by name: `medmnist/<name>[_64|_128|_224]` and `torchvision/<Dataset>`, downloaded where there is a network.

Files go to $TLEXPORT_DATA, or ~/.cache/tlexport. What was put there by hand is used as it is.
torchvision reads CIFAR's own format, which is a pickle, only after comparing its MD5 with the published one.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import http.client
import inspect
import os
import socket
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.modalities.image_arrays import integer_labels, read_npz
from tlexport.modalities.image_decode import from_pillow
from tlexport.modalities.image_pixels import Pixels
from tlexport.modalities.image_samples import Arrays, Files, Samples
from tlexport.modalities.medmnist_sets import SETS, SIZES
from tlexport.run import replacing, storage_errors

MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{name}.npz?download=1"
TIMEOUT = 20.0  # seconds without a byte
MAX_BYTES = 32 << 30  # the largest set, pathmnist_224, has 12.6 GB
_SPLIT_NAMES = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


def home() -> Path:
    """Where downloaded data is kept."""
    return Path(os.environ.get("TLEXPORT_DATA") or "~/.cache/tlexport").expanduser()


def read_medmnist(name: str) -> Samples:
    """One of the twelve 2D sets of MedMNIST v2, at 28 pixels or the size in its name."""
    base, _, size = name.partition("_")
    known = [f"{key}{suffix}" for key in SETS for suffix in ("", *(f"_{s}" for s in SIZES[1:]))]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean medmnist/{near[0]}?" if near else ""
        raise DataError(
            f"no set medmnist/{name}{hint} (sets: {', '.join(SETS)}; each also with _64, _128, _224)"
        )
    path = home() / "medmnist" / f"{name}.npz"
    download(MEDMNIST_URL.format(name=name), path, SETS[base].md5[SIZES.index(int(size or 28))])
    samples = read_npz(path)
    return Samples(**{**vars(samples), "class_names": SETS[base].classes})


def download(url: str, target: Path, md5: str, limit: int = MAX_BYTES) -> None:
    """Fetch `url` to `target` unless that file is there; progress goes to standard error.

    The file takes its name only once it is complete and its MD5 is right. Raises DataError that names the file
    to put there by hand where the network does not give it, StorageError if it cannot be written.
    """
    if target.is_file():
        return
    try:
        with replacing(target) as partial:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, partial.open("wb") as out:
                found = _copy(response, out, target.name, limit)
            if found != md5:
                raise DataError(
                    f"{url} arrived with MD5 {found}, and {md5} was expected: damaged or altered; try again"
                )
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"cannot download {url} ({reason}); download it where there is a network and put it at {target}"
        ) from error


def _copy(response: Any, out: Any, name: str, limit: int) -> str:
    """Copy a response in blocks; returns the MD5 of what came."""
    total = int(response.headers.get("Content-Length") or 0)
    whole = hashlib.md5(usedforsecurity=False)
    done = shown = 0
    while block := response.read(1 << 20):
        done += len(block)
        if max(done, total) > limit:
            raise DataError(f"{name} is larger than the {limit / 2**30:.1f} GiB that are downloaded")
        whole.update(block)
        out.write(block)
        if total and done * 10 // total > shown:
            shown = done * 10 // total
            print(f"{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", file=sys.stderr)
    if done < total:
        raise http.client.IncompleteRead(b"", total - done)
    return whole.hexdigest()


def read_torchvision(name: str) -> Samples:
    """A classification set of torchvision.datasets, by its class's name; its own splits are kept."""
    import torchvision

    kind = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or not inspect.isclass(kind):
        near = difflib.get_close_matches(name, torchvision.datasets.__all__, n=1)
        hint = f"; did you mean torchvision/{near[0]}?" if near else ""
        raise DataError(f"torchvision {torchvision.__version__} has no data set {name!r}{hint}")
    parts = _parts(kind, name)
    if not parts:
        raise DataError(f"torchvision/{name} has no training split that could be found")
    stated = list(parts) != [""]
    counts = [len(part) for part in parts.values()]
    labels = [integer_labels(_labels(part, name), f"torchvision/{name}") for part in parts.values()]
    if len({part.shape[1:] for part in labels}) > 1:
        raise DataError(f"torchvision/{name}: the splits differ in their labels")
    classes = getattr(next(iter(parts.values())), "classes", None)
    return Samples(
        images=_images(list(parts.values()), name),
        labels=np.concatenate(labels),
        names=[f"{split or name}/{i}" for split, n in zip(parts, counts, strict=True) for i in range(n)],
        splits=np.repeat(list(parts), counts) if stated else None,
        class_names=tuple(map(_plain, classes)) if isinstance(classes, (list, tuple)) and classes else None,
    )


def _plain(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, (list, tuple)) else str(name)


def _parts(kind: Any, name: str) -> dict[str, Any]:
    """Split -> data set, by what the constructor takes: `train=`, `split=`, or neither (one pool, split '')."""
    parameters = inspect.signature(kind.__init__).parameters
    choices: dict[str, list[dict[str, Any]]] = {"": [{}]}
    if "train" in parameters:
        choices = {"train": [{"train": True}], "test": [{"train": False}]}
    elif "split" in parameters:
        choices = {split: [{"split": value} for value in names] for split, names in _SPLIT_NAMES.items()}
    parts = {}
    for split, arguments in choices.items():
        made = (
            part for chosen in arguments if (part := _construct(kind, name, parameters, chosen)) is not None
        )
        part = next(made, None)
        if part is not None:
            parts[split] = part
    return parts if "train" in parts or "" in parts else {}


def _construct(kind: Any, name: str, parameters: Any, chosen: dict[str, Any]) -> Any | None:
    """The data set, downloaded if need be; None if it has no such split."""
    root = home() / "torchvision"
    arguments = {**({"root": root} if "root" in parameters else {}), **chosen}
    if "download" in parameters:
        arguments["download"] = True
    try:
        with storage_errors(root), _patient(), contextlib.redirect_stdout(sys.stderr):
            root.mkdir(parents=True, exist_ok=True)
            return kind(**arguments)
    except ValueError as error:
        if "Unknown value" in str(error):
            return None
        raise DataError(f"torchvision/{name} cannot be read: {error}") from error
    except TypeError as error:
        raise DataError(f"torchvision/{name} needs arguments that a recipe cannot give ({error})") from error
    except (OSError, RuntimeError, http.client.HTTPException, ImportError) as error:
        raise DataError(f"torchvision/{name} cannot be had: {_wanted(error, root)}") from error


def _wanted(error: BaseException, root: Path) -> str:
    """What torchvision was fetching when it failed, read from the frames of the error: it does not say itself."""
    reason = " ".join(str(error).split())[:200]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        here = frame.f_locals
        url = here.get("url")
        folder = getattr(here.get("self"), "raw_folder", None)
        file = here.get("fpath") or (folder and here.get("filename") and Path(folder) / here["filename"])
        if url and file:
            return f"{reason}; download {url} where there is a network and put it at {file}"
    return f"{reason}; torchvision looks for its files in {root}"


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """torchvision opens connections without a timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _labels(part: Any, name: str) -> NDArray[Any]:
    """Labels from the data set's own list where it agrees with its first sample, else sample by sample."""
    first = np.asarray(part[0][1])
    for attribute in _LABEL_ATTRIBUTES:
        listed = getattr(part, attribute, None)
        if listed is not None and len(listed) == len(part):
            labels = np.asarray(listed)
            if labels.dtype.kind in "iu" and np.array_equal(labels[0], first):
                return labels
    if first.dtype.kind not in "biu" or first.ndim > 1:
        raise DataError(
            f"torchvision/{name} is no classification set: a label of it is {type(part[0][1]).__name__}"
        )
    return np.stack([np.asarray(part[index][1]) for index in range(len(part))])


def _images(parts: list[Any], name: str) -> Arrays | Files:
    """Kept as they are where the set holds them as one array; else decoded once, resized and stored."""
    held = [_held(part) for part in parts]
    if all(array is not None for array in held):
        return Arrays(tuple(array for array in held if array is not None))
    bounds = np.cumsum([0, *(len(part) for part in parts)])

    def read(index: int) -> Pixels:
        part = int(np.searchsorted(bounds, index, side="right")) - 1
        return from_pillow(parts[part][index - int(bounds[part])][0])

    probe = {index: read(index).shape[-1] for index in range(min(16, int(bounds[-1])))}
    channels = max(probe.values())
    import torchvision

    return Files(
        count=int(bounds[-1]),
        read=read,
        channels_at=lambda index: channels,
        identity=lambda index: f"torchvision {torchvision.__version__} {name} {index}",
    )


def _held(part: Any) -> Pixels | None:
    """A set's own array as uint8 [n, h, w, C], if it has one that looks like its first image."""
    data = getattr(part, "data", None)
    if data is None or not hasattr(data, "shape") or len(data) != len(part):
        return None
    array = np.asarray(data)
    if array.dtype != np.uint8:
        return None
    layouts: list[Callable[[], Pixels]] = [
        lambda: array[..., None] if array.ndim == 3 else array,
        lambda: np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array,
    ]
    first = from_pillow(part[0][0])
    return next((laid for layout in layouts if np.array_equal((laid := layout())[0], first)), None)
