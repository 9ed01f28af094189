"""Readers of folders and CSV manifests, and the choice of reader by `data.path`.

Image folder, either of
    train/<class>/... [val|valid|validation/<class>/...] [test/<class>/...]
    <class>/...
Images may lie in subfolders of a class. Hidden files are passed over; other files that are no images are
ignored and counted. Links to files are followed, links to folders are not.

CSV manifest: a header row, then one row an image; the columns are named by `data.manifest`. One label column
holds a class name, or several joined by `|`; several label columns hold 0 or 1 each and give their names to the
labels. The optional split column says train, val (valid, validation) or test in every row.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import slices
from tlexport.modalities.image_arrays import read_digits, read_npz
from tlexport.modalities.image_catalogs import read_medmnist, read_torchvision
from tlexport.modalities.image_decode import channels_of, decode, is_image
from tlexport.modalities.image_samples import Files, Samples, class_order, few
from tlexport.modalities.splits import ALIASES

LAYOUTS = (
    "accepted: train/ val/ test/ folders of class folders, one folder of class folders, a .npz with "
    "train_images and train_labels (val_, test_ alike) or images and labels, a .csv manifest, "
    "torchvision/<Dataset>, medmnist/<name>, sklearn/digits"
)


def read(data: recipe.Data) -> Samples:
    """Find the samples that `data.path` names. Raises DataError where it names nothing readable."""
    path = Path(data.path).expanduser()
    collection, _, name = data.path.partition("/")
    if not path.exists():
        if collection == "medmnist":
            return read_medmnist(name)
        if collection == "torchvision":
            return read_torchvision(name)
        if data.path == "sklearn/digits":
            return read_digits()
        raise DataError(_missing(path))
    if path.is_dir():
        return _read_folder(path, data)
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, data)
    raise DataError(f"data.path {path} is a {path.suffix or 'nameless kind of'} file; {LAYOUTS}")


def _missing(path: Path) -> str:
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    wanted = path.relative_to(folder).parts[0] if path != folder else path.name
    near = difflib.get_close_matches(
        wanted, sorted(entry.name for entry in folder.iterdir()), n=1, cutoff=0.5
    )
    hint = f"; did you mean {folder / near[0]}?" if near else ""
    return f"data.path {path} does not exist{hint} ({LAYOUTS})"


def _read_folder(root: Path, data: recipe.Data) -> Samples:
    folders = _subfolders(root)
    stated = {name: ALIASES[name.lower()] for name in folders if name.lower() in ALIASES}
    if "train" in stated.values():
        strangers = [name for name in folders if name not in stated]
        if strangers:
            raise DataError(
                f"{root} has train/ beside folders that are no splits: {few(strangers)}; {LAYOUTS}"
            )
        if len(set(stated.values())) < len(stated):
            raise DataError(f"{root} has two folders for one split: {', '.join(stated)}; keep one of them")
        parts = {split: root / name for name, split in stated.items()}
    elif folders and not stated:
        parts = {"": root}
    else:
        raise DataError(f"{root} has no layout that is known: it holds {_holds(root)}; {LAYOUTS}")
    return _class_folders(root, parts, data)


def _class_folders(root: Path, parts: dict[str, Path], data: recipe.Data) -> Samples:
    """`parts`: split (empty: none stated) -> the folder that holds its class folders."""
    files: list[Path] = []
    ignored: list[Path] = []
    classes: list[str] = []
    splits: list[str] = []
    empty: list[str] = []
    for split, folder in parts.items():
        if not _subfolders(folder):
            raise DataError(f"{folder} has no class folders: it holds {_holds(folder)}; {LAYOUTS}")
        for name in _subfolders(folder):
            images, others = walk(folder / name)
            ignored += others
            files += images
            classes += [name] * len(images)
            splits += [split] * len(images)
            if not images:
                empty.append((folder / name).relative_to(root).as_posix())
    if empty:
        raise DataError(f"{root} has class folders without an image: {few(empty)}; fill or remove them")
    index, names = class_order(sorted(set(classes)), data.class_names)
    return Samples(
        images=files_of(files, data.dicom),
        labels=np.array([index[name] for name in classes], np.int64),
        names=[file.relative_to(root).as_posix() for file in files],
        splits=np.array(splits) if "" not in parts else None,
        class_names=names,
        ignored=tuple(file.relative_to(root).as_posix() for file in ignored),
    )


def _subfolders(folder: Path) -> list[str]:
    hidden = (".", "__MACOSX")
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(hidden)
    )


def walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images below a folder, and the files there that are none; both sorted."""
    found: list[Path] = []
    for here, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(here) / name for name in names if not name.startswith(".")]
    found.sort()
    images = [file for file in found if is_image(file)]
    return images, sorted(set(found) - set(images))


def _holds(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    readable = [name for name in names if name.endswith((".npz", ".csv"))]
    return few(readable + [name for name in names if name not in readable]) if names else "nothing"


def files_of(files: Sequence[Path], dicom: recipe.Dicom) -> Files:
    def identity(index: int) -> str:
        status = files[index].stat()
        return f"{files[index].absolute()}\0{status.st_size}\0{status.st_mtime_ns}"

    return Files(
        count=len(files),
        read=lambda index: decode(files[index], dicom),
        channels_at=lambda index: channels_of(files[index]),
        identity=identity,
    )


def _read_csv(path: Path, data: recipe.Data) -> Samples:
    header, rows = _rows(path)
    columns = data.manifest
    labels = (columns.label,) if isinstance(columns.label, str) else columns.label
    split = _optional(path, header, columns.split, "split")
    group = _optional(path, header, columns.group, "group")
    absent = [name for name in (columns.image, *labels) if name not in header]
    if absent:
        raise DataError(
            f"{path} has no column {few(absent)} (its columns: {few(header)}); name them with "
            "data.manifest.image=... and data.manifest.label=..."
        )
    root = Path(columns.root).expanduser() if columns.root else path.parent
    files = [root / row[columns.image] for row in rows]
    missing = [row[columns.image] for row, file in zip(rows, files, strict=True) if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} images of {path} are not in {root}: {few(missing)}; "
            "correct the paths, or name their folder with data.manifest.root=..."
        )
    truth, names = _csv_labels(path, rows, labels, data)
    return Samples(
        images=files_of(files, data.dicom),
        labels=truth,
        names=[row[columns.image] for row in rows],
        splits=np.array([_split_of(path, row[split], n) for n, row in enumerate(rows, 2)]) if split else None,
        groups=np.array([row[group] for row in rows]) if group else None,
        slices=slices.read(data.slices, header, lambda name: [row[name] for row in rows]),
        class_names=names,
    )


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, strict=True)
            rows = list(reader)
            header = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV in UTF-8: {error}") from error
    ragged = [n for n, row in enumerate(rows, 2) if None in row or None in row.values()]
    if ragged:
        raise DataError(
            f"{path} has rows with more or fewer cells than the header: row {few(list(map(str, ragged)))}"
        )
    if not rows:
        raise DataError(f"{path} has no rows below its header")
    return header, [{key: value.strip() for key, value in row.items()} for row in rows]


def _optional(path: Path, header: list[str], column: str | None, what: str) -> str | None:
    """A column that may be absent, unless the recipe names it itself."""
    if column is None or column in header:
        return column
    if column != recipe.Manifest.model_fields[what].default:
        raise DataError(f"{path} has no {what} column {column!r} (its columns: {few(header)})")
    return None


def _split_of(path: Path, value: str, row: int) -> str:
    split = ALIASES.get(value.lower())
    if split is None:
        raise DataError(f"{path} row {row}: the split is {value!r}; it must be train, val or test")
    return split


def _csv_labels(
    path: Path, rows: list[dict[str, str]], columns: tuple[str, ...], data: recipe.Data
) -> tuple[np.ndarray, tuple[str, ...]]:
    if len(columns) > 1:
        wrong = [n for n, row in enumerate(rows, 2) if any(row[name] not in ("0", "1") for name in columns)]
        if wrong:
            raise DataError(
                f"{path}: label columns must hold 0 or 1; row {few(list(map(str, wrong)))} does not"
            )
        names = data.class_names or columns
        return np.array([[int(row[name]) for name in columns] for row in rows], np.uint8), names
    cells = [[part.strip() for part in row[columns[0]].split("|") if part.strip()] for row in rows]
    found = sorted({part for cell in cells for part in cell})
    if not found:
        raise DataError(f"{path}: the label column {columns[0]!r} is empty")
    index, names = class_order(found, data.class_names)
    if any("|" in row[columns[0]] for row in rows):
        truth = np.zeros((len(rows), len(names)), np.uint8)
        for row, cell in enumerate(cells):
            truth[row, [index[part] for part in cell]] = 1
        return truth, names
    unlabelled = [str(n) for n, cell in enumerate(cells, 2) if not cell]
    if unlabelled:
        raise DataError(f"{path}: no label in row {few(unlabelled)}")
    return np.array([index[cell[0]] for cell in cells], np.int64), names
