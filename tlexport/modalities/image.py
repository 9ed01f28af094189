"""Images: from `data.path` to three splits of uint8 pixels with labels, and a report of all that was found.

    data = load(recipe.data, task=recipe.task, seed=recipe.seed, cache=run / "cache")
    batch = data.preprocessing.batch(data.train.images[rows])    # uint8 [B, C, S, S], what the graph takes

Sets that come as arrays stay at their own size and are resized a batch at a time; files are decoded and resized
once. Either way the pixels of `batch` are those of `preprocessing.apply` on the decoded image, bit for bit.
In a binary task class 1 is the positive one: the second of `data.class_names`, or of the sorted names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError, LeakageError
from tlexport.modalities import dataset, image_sources, image_store, splits
from tlexport.modalities.dataset import Corrupt, Duplicate
from tlexport.modalities.image_preprocessing import Preprocessing
from tlexport.modalities.image_report import ImageReport, class_counts, fingerprint
from tlexport.modalities.image_samples import Files, Samples, few
from tlexport.modalities.image_unlabelled import samples
from tlexport.modalities.metrics import HIGHER_IS_BETTER, METRICS

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "ImageData",
    "ImageReport",
    "Preprocessing",
    "Split",
    "load",
    "samples",
]

Progress = Callable[[int, int], None]
_LISTED = 1000  # names that a report holds of ignored files and of duplicates


@dataclass(frozen=True, kw_only=True)
class Split(dataset.Split):
    """`inputs` are uint8 [n, h, w, C] as stored; `batch` makes of them what the graph takes, uint8 [B, C, S, S]."""

    preprocessing: Preprocessing

    @property
    def images(self) -> NDArray[np.uint8]:
        return self.inputs

    def batch(self, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
        return self.preprocessing.batch(self.inputs[rows])


@dataclass(frozen=True)
class ImageData(dataset.Dataset):
    """A data set of images that is ready to train on."""

    train: Split
    val: Split
    test: Split
    preprocessing: Preprocessing
    report: ImageReport


@dataclass(frozen=True)
class _Pixels:
    """By split: rows among the samples, images, content hashes. And what could not be read."""

    rows: dict[str, NDArray[np.int64]]
    images: dict[str, NDArray[np.uint8]]
    hashes: dict[str, list[bytes]]
    corrupt: tuple[Corrupt, ...] = ()


def load(
    data: recipe.Data, *, task: str, seed: int, cache: Path | None, progress: Progress | None = None
) -> ImageData:
    """Read, check, split, decode. `cache` is a directory for decoded files (None: keep them in memory).

    `progress` gets (files done, files in all) while files are decoded. Raises DataError or LeakageError for
    all that a person has to decide or repair, NotInstalledError for DICOM without pydicom.
    """
    samples = image_sources.read(data)
    if absent := set(data.slices) - set(samples.slices):
        raise DataError(
            f"data.slices names {', '.join(sorted(absent))}, and {data.path} has no columns; only a CSV manifest has"
        )
    labels, class_names, task = _classes(samples, data, task)
    rows, origin = _divided(samples, labels, data, seed)
    _check_classes(rows, labels, class_names)
    preprocessing = _preprocessing(samples, rows, data)
    pixels = _pixels(samples, rows, preprocessing, data, cache, progress)
    duplicates = _duplicates(pixels, samples)
    pixels, dropped = _resolve_duplicates(pixels, duplicates, data.duplicates)
    _check_classes(pixels.rows, labels, class_names)
    made = {name: _split(samples, labels, pixels, name, preprocessing) for name in splits.NAMES}
    groups = {name: len(np.unique(split.groups)) for name, split in made.items() if split.groups is not None}
    report = ImageReport(
        source=data.path,
        samples={name: len(split) for name, split in made.items()},
        counts={name: class_counts(split.labels, class_names) for name, split in made.items()},
        split_origin=origin,
        groups=groups or None,
        channels=preprocessing.channels,
        stored_size=(made["train"].images.shape[1], made["train"].images.shape[2]),
        corrupt=pixels.corrupt,
        ignored=samples.ignored[:_LISTED],
        ignored_count=len(samples.ignored),
        duplicates=duplicates[:_LISTED],
        duplicates_count={name: sum(d.split == name for d in duplicates) for name in ("val", "test")},
        dropped=dropped,
        problems=_broken(pixels.corrupt),
        leaks=_shared(duplicates, dropped),
        sha256=fingerprint({n: (pixels.hashes[n], s.labels, s.groups) for n, s in made.items()}),
        notes=(*samples.notes, *_unseen(made, class_names)),
    )
    return ImageData(**made, task=task, class_names=class_names, preprocessing=preprocessing, report=report)


def _classes(samples: Samples, data: recipe.Data, task: str) -> tuple[NDArray[Any], tuple[str, ...], str]:
    """Labels, class names and task that agree with each other. Raises DataError if they cannot."""
    labels = samples.labels
    if task == "multilabel" and labels.ndim == 1:
        raise DataError(
            f"task=multilabel, but {data.path} has one class a sample; give labels 0/1 [n, K], "
            "several label columns, or classes joined by |"
        )
    if task in ("binary", "multiclass") and labels.ndim == 2:
        if (labels.sum(axis=1) != 1).any():
            raise DataError(
                f"task={task}, but {data.path} has samples with no label or several; use task=multilabel"
            )
        labels = labels.argmax(axis=1).astype(np.int64)
    seen = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    if seen > max(len(labels), len(data.class_names or samples.class_names or ())) and labels.ndim == 1:
        raise DataError(
            f"{data.path} has labels up to {seen - 1} in {len(labels)} samples; classes count from 0"
        )
    names = data.class_names or samples.class_names or tuple(str(index) for index in range(seen))
    if len(names) < seen:
        raise DataError(
            f"{data.path} has labels up to {seen - 1}, so data.class_names needs {seen}, not {len(names)}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"class names must differ, got {few(names)}")
    if len(names) < 2 and labels.ndim == 1:
        raise DataError(f"{data.path} has one class only ({names[0]}); a classifier needs at least two")
    if task == "binary" and len(names) != 2:
        raise DataError(
            f"task=binary, but {data.path} has {len(names)} classes ({few(names)}); use task=multiclass"
        )
    if task == "auto":
        task = "multilabel" if labels.ndim == 2 else "binary" if len(names) == 2 else "multiclass"
    return labels, names, task


def _divided(
    samples: Samples, labels: NDArray[Any], data: recipe.Data, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, str]]:
    stated = None if data.resplit else samples.splits
    fractions = (data.split.val, data.split.test)
    if sum(fractions) >= 1:
        raise DataError(f"data.split.val + data.split.test is {sum(fractions):g}; nothing is left for train")
    rows, origin = splits.divide(labels, stated, samples.groups, fractions, seed)
    if data.limit:
        rows = {name: of[splits.subset(labels[of], data.limit, seed)] for name, of in rows.items()}
    if data.train_size:
        train = rows["train"]
        rows["train"] = train[splits.subset(labels[train], data.train_size, seed)]
    return rows, origin


def _check_classes(
    rows: dict[str, NDArray[np.int64]], labels: NDArray[Any], class_names: tuple[str, ...]
) -> None:
    """Raise DataError if a split is empty, or a class is not in train."""
    empty = [name for name, of in rows.items() if not len(of)]
    if empty:
        raise DataError(f"no samples are left for {few(empty)}")
    counts = {name: class_counts(labels[of], class_names) for name, of in rows.items()}
    absent = [name for name in class_names if not counts["train"][name]]
    elsewhere = [name for name in absent if counts["val"][name] or counts["test"][name]]
    if elsewhere:
        raise DataError(
            f"val or test has samples of {few(elsewhere)}, and train has none; add some to train, "
            "or draw new splits with data.resplit=true"
        )
    if absent:
        raise DataError(f"there is no sample of {few(absent)} to train on; remove the class or add samples")


def _preprocessing(samples: Samples, rows: dict[str, NDArray[np.int64]], data: recipe.Data) -> Preprocessing:
    channels: int | None = data.channels
    if channels is None:
        images = samples.images
        every = np.concatenate(list(rows.values()))
        channels = image_store.channels(images, every) if isinstance(images, Files) else images.channels()
    return Preprocessing(image_size=data.image_size, channels=channels, resize=data.resize, dicom=data.dicom)


def _pixels(
    samples: Samples,
    rows: dict[str, NDArray[np.int64]],
    preprocessing: Preprocessing,
    data: recipe.Data,
    cache: Path | None,
    progress: Progress | None,
) -> _Pixels:
    if not isinstance(samples.images, Files):
        images = {name: samples.images.take(of) for name, of in rows.items()}
        return _Pixels(rows, images, {name: splits.content_hashes(of) for name, of in images.items()})
    every = np.concatenate([rows[name] for name in splits.NAMES])
    settings = data.dicom.model_dump_json()
    stored = image_store.store(samples.images, every, preprocessing, settings, cache, progress)
    corrupt = tuple(
        Corrupt(name=samples.names[every[position]], reason=reason)
        for position, reason in stored.corrupt.items()
    )
    _check_corrupt(corrupt, len(every), data)
    lengths = [len(rows[name]) for name in splits.NAMES]
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[stored.kept], minlength=len(lengths))
    stops = np.cumsum(counts)
    where = {name: slice(stop - n, stop) for name, n, stop in zip(splits.NAMES, counts, stops, strict=True)}
    return _Pixels(
        rows={name: every[stored.kept[part]] for name, part in where.items()},
        images={name: stored.images[part] for name, part in where.items()},
        hashes={name: stored.hashes[part] for name, part in where.items()},
        corrupt=corrupt,
    )


def _check_corrupt(corrupt: tuple[Corrupt, ...], count: int, data: recipe.Data) -> None:
    allowed = data.max_corrupt if data.max_corrupt >= 1 else data.max_corrupt * count
    if len(corrupt) > allowed:
        listed = "; ".join(f"{file.name} ({file.reason})" for file in corrupt[:5])
        raise DataError(
            f"{len(corrupt)} of {count} files cannot be read, and data.max_corrupt={data.max_corrupt:g} allows "
            f"{int(allowed)}: {listed}{' ...' if len(corrupt) > 5 else ''}; repair or remove them, or allow more"
        )


def _duplicates(pixels: _Pixels, samples: Samples) -> tuple[Duplicate, ...]:
    train = pixels.rows["train"]
    return tuple(
        Duplicate(split=name, name=samples.names[pixels.rows[name][here]], train=samples.names[train[there]])
        for name in ("test", "val")
        for here, there in splits.shared_with(pixels.hashes[name], pixels.hashes["train"])
    )


def _resolve_duplicates(
    pixels: _Pixels, duplicates: tuple[Duplicate, ...], choice: str
) -> tuple[_Pixels, int]:
    """As `data.duplicates` asks: report, fail, or leave the test images out; how many were left out."""
    pairs = [f"{found.name} = {found.train}" for found in duplicates if found.split == "test"]
    if choice == "report" or not pairs:
        return pixels, 0
    if choice == "fail":
        raise LeakageError(
            f"{len(pairs)} test images are also in train: {few(pairs)}; remove them, "
            "or leave them out of test with data.duplicates=drop"
        )
    known = set(pixels.hashes["train"])
    keep = np.array([value not in known for value in pixels.hashes["test"]])
    kept = replace(
        pixels,
        rows={**pixels.rows, "test": pixels.rows["test"][keep]},
        images={**pixels.images, "test": pixels.images["test"][keep]},
        hashes={**pixels.hashes, "test": [v for v in pixels.hashes["test"] if v not in known]},
    )
    return kept, len(pairs)


def _broken(corrupt: tuple[Corrupt, ...]) -> tuple[str, ...]:
    if not corrupt:
        return ()
    first = corrupt[0]
    return (f"{len(corrupt)} unreadable files were left out, the first: {first.name} ({first.reason})",)


def _shared(duplicates: tuple[Duplicate, ...], dropped: int) -> tuple[str, ...]:
    in_test = [twin for twin in duplicates if twin.split == "test"]
    if not in_test:
        return ()
    done = "they were left out of test" if dropped else "data.duplicates=drop leaves them out of test"
    return (f"{len(in_test)} test images are also in train, the first: {in_test[0].name}; {done}",)


def _unseen(made: dict[str, Split], class_names: tuple[str, ...]) -> list[str]:
    """What a reader of the metrics should know: classes that are never asked for."""
    notes = []
    for name, split in made.items():
        counts = class_counts(split.labels, class_names)
        absent = [label for label in class_names if not counts[label]]
        if absent:
            notes.append(f"{name} has no sample of {few(absent)}")
    return notes


def _split(
    samples: Samples, labels: NDArray[Any], pixels: _Pixels, name: str, preprocessing: Preprocessing
) -> Split:
    rows = pixels.rows[name]
    return Split(
        preprocessing=preprocessing,
        inputs=pixels.images[name],
        labels=labels[rows],
        groups=None if samples.groups is None else samples.groups[rows].astype(np.str_),
        names=tuple(samples.names[row] for row in rows),
        slices={name: of[rows] for name, of in samples.slices.items()},
    )
