"""Tables: a row a sample, one or several label columns, everything else features unless it is left out by name.

The graph takes the cells as they are (`tabular_schema.Schema.describe`): imputation, scaling and category codes are in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError, LeakageError
from tlexport.modalities import splits, tables, tabular_report, tabular_schema
from tlexport.modalities.dataset import DataReport, Dataset, Duplicate, Split
from tlexport.modalities.metrics import HIGHER_IS_BETTER, METRICS
from tlexport.modalities.tabular_schema import samples

if TYPE_CHECKING:
    import polars as pl

__all__ = ["HIGHER_IS_BETTER", "METRICS", "load", "samples"]

_LISTED = 1000
_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}.*)?$")
_SHOWN = 5


def load(
    data: recipe.Data,
    *,
    task: str,
    seed: int,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read, check, split and encode. Raises DataError or LeakageError for what a person has to decide or repair."""
    frame = tables.read(data.path, data.table.missing)
    target = _target(frame, data, task)
    frame, problems = _labelled(frame, target, data)
    labels, names, found = _labels(frame, target, data, task)
    groups = _text(frame, data.table.group)
    rows, origin = _divided(frame, labels, groups, data, seed)
    schema = tabular_schema.infer(frame, data.table, target, rows["train"])
    features, texts = schema.encode(frame)
    problems += _texts(texts, len(frame), data)
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in features]
    rows, twins, shared = _duplicates(rows, hashes, data)
    made = {name: _split(features, labels, groups, rows[name]) for name in splits.NAMES}
    counts = {name: tabular_report.counts(split.labels, names, found) for name, split in made.items()}
    if found in ("binary", "multiclass"):
        _require_trained(counts)
    report = DataReport(
        source=data.path,
        samples={name: len(split) for name, split in made.items()},
        counts=counts,
        split_origin=origin,
        groups={n: len(np.unique(s.groups)) for n, s in made.items() if s.groups is not None} or None,
        duplicates=twins[:_LISTED],
        problems=(*problems, *tabular_report.shifts(schema, made)),
        leaks=(*shared, *tabular_report.giveaways(schema, made["train"], names, found)),
        sha256=tabular_report.fingerprint(made),
        notes=tuple(tabular_report.notes(schema, made, names, found)),
    )
    pretraining = task == "pretrain"
    return Dataset(
        **(made if not pretraining else {name: _unlabelled(split) for name, split in made.items()}),
        task="pretrain" if pretraining else found,
        class_names=() if pretraining else names,
        preprocessing=schema,
        report=report,
    )


def _target(frame: pl.DataFrame, data: recipe.Data, task: str) -> tuple[str, ...]:
    named = data.table.target
    target = () if named is None else (named,) if isinstance(named, str) else tuple(named)
    if not target and task != "pretrain":
        raise DataError(f"data.table.target is not set; the columns are: {', '.join(frame.columns)}")
    if absent := [name for name in target if name not in frame.columns]:
        raise DataError(
            f"there is no column {', '.join(map(repr, absent))}; the columns are: {', '.join(frame.columns)}"
        )
    if len(set(target)) < len(target):
        raise DataError(f"data.table.target names a column twice: {', '.join(target)}")
    return target


def _require_trained(counts: dict[str, dict[str, int]]) -> None:
    """Raise DataError for a class that is asked for without having been taught."""
    for name in ("val", "test"):
        strange = [label for label, count in counts[name].items() if count and not counts["train"][label]]
        if strange:
            raise DataError(
                f"{name} has rows of {tabular_schema.some(strange)} and train has none; add some to train, "
                "or draw new splits with data.resplit=true"
            )
    if absent := [label for label, count in counts["train"].items() if not count]:
        raise DataError(
            f"there is no row of {tabular_schema.some(absent)} to train on; leave it out of data.class_names, or add some"
        )


def _labelled(
    frame: pl.DataFrame, target: tuple[str, ...], data: recipe.Data
) -> tuple[pl.DataFrame, list[str]]:
    """Rows that have a label, and what is said of those that have none."""
    import polars as pl

    if not target:
        return frame, []
    unlabelled = frame.select(pl.all_horizontal(pl.col(name).is_null() for name in target)).to_series()
    count = int(unlabelled.sum())
    if not count:
        return frame, []
    told = f"{count} of {len(frame)} rows have no label, the first is row {int(np.flatnonzero(unlabelled)[0]) + 2}"
    _allow(count, len(frame), data, told)
    return frame.filter(~unlabelled), [f"{told}; they were left out"]


def _allow(count: int, total: int, data: recipe.Data, told: str) -> None:
    allowed = data.max_corrupt if data.max_corrupt >= 1 else data.max_corrupt * total
    if count > allowed:
        raise DataError(
            f"{told}; data.max_corrupt={data.max_corrupt:g} allows {int(allowed)}: repair them, or allow more"
        )


def _labels(
    frame: pl.DataFrame, target: tuple[str, ...], data: recipe.Data, task: str
) -> tuple[NDArray[Any], tuple[str, ...], str]:
    """Labels, their names and the task. Two values are binary: the later in order is class 1, unless class_names says."""
    if not target:
        return np.zeros(len(frame), np.int64), (), "pretrain"
    numbers = {name: tables.numbers_of(frame[name]) for name in target}
    numeric = not any(texts for _, texts in numbers.values())
    if len(target) > 1 or task == "multilabel":
        values = np.stack([found for found, _ in numbers.values()], axis=1)
        flags = numeric and bool(np.isin(values[np.isfinite(values)], (0, 1)).all())
        if flags and task != "regression":
            return np.where(np.isnan(values), -1, values).astype(np.int8), target, "multilabel"
        return _values(values, target), target, "regression"
    cells = frame[target[0]]
    known = [str(cell) for cell in cells.to_list()]
    distinct = sorted(set(known), key=lambda text: (len(text), text) if numeric else (0, text))
    if task == "regression" or (task in ("auto", "pretrain") and numeric and len(distinct) > 20):
        return _values(numbers[target[0]][0][:, None], target), target, "regression"
    names = data.class_names or tuple(distinct)
    if strange := sorted(set(distinct) - set(names)):
        raise DataError(
            f"{target[0]} has classes that data.class_names does not: {', '.join(strange[:_SHOWN])}"
        )
    if len(names) < 2:
        raise DataError(f"{target[0]} has one class only ({names[0]}); a classifier needs at least two")
    if task == "binary" and len(names) != 2:
        raise DataError(
            f"task=binary, but {target[0]} has {len(names)} classes ({', '.join(names[:_SHOWN])})"
        )
    places = {name: index for index, name in enumerate(names)}
    labels = np.array([places[text] for text in known], np.int64)
    return labels, names, "binary" if len(names) == 2 else "multiclass"


def _values(values: NDArray[np.float64], target: tuple[str, ...]) -> NDArray[np.float32]:
    if broken := int((~np.isfinite(values)).any(axis=1).sum()):
        raise DataError(
            f"{broken} rows have no number in {', '.join(target)}; a regression needs one in each"
        )
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if broken := int((~np.isfinite(found)).any(axis=1).sum()):
        raise DataError(
            f"{broken} rows have a value of {', '.join(target)} beyond float32 (3e38); choose another unit"
        )
    return found


def _divided(
    frame: pl.DataFrame, labels: NDArray[Any], groups: NDArray[Any] | None, data: recipe.Data, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, str]]:
    strata = labels if labels.dtype.kind in "iu" and labels.ndim == 1 else np.zeros(len(labels), np.int64)
    fractions = (data.split.val, data.split.test)
    if data.split.folds:
        rows, origin = splits.folded(strata, data.split.folds, data.split.fold, fractions[0], seed, groups)
    elif data.split.by == "time":
        if not data.table.time:
            raise DataError("data.split.by=time needs data.table.time, the column to order rows by")
        rows, origin = splits.ordered(_moments(frame, data.table.time), fractions)
    else:
        stated = None if data.resplit else _stated(frame, data.table.split)
        rows, origin = splits.divide(strata, stated, groups, fractions, seed)
    if data.limit:
        rows = {name: of[splits.subset(strata[of], data.limit, seed)] for name, of in rows.items()}
    if data.train_size:
        train = rows["train"]
        rows = {**rows, "train": train[splits.subset(strata[train], data.train_size, seed)]}
    if empty := [name for name, of in rows.items() if not len(of)]:
        raise DataError(f"no rows are left for {', '.join(empty)}")
    return rows, origin


def _text(frame: pl.DataFrame, column: str | None) -> NDArray[np.str_] | None:
    if column is None:
        return None
    if column not in frame.columns:
        raise DataError(f"there is no column {column!r}; the columns are: {', '.join(frame.columns)}")
    if lacking := frame[column].null_count():
        raise DataError(
            f"{lacking} of {len(frame)} rows have no {column!r}, by which the rows are split; fill it in"
        )
    return np.array([str(value) for value in frame[column].to_list()])


def _stated(frame: pl.DataFrame, column: str | None) -> NDArray[np.str_] | None:
    texts = _text(frame, column)
    if texts is None:
        return None
    found = [splits.ALIASES.get(text.strip().lower(), "") for text in texts]
    if strange := sorted({str(text) for text, name in zip(texts, found, strict=True) if not name}):
        raise DataError(
            f"the column {column!r} must say train, val or test; it has: {tabular_schema.some(strange)}"
        )
    return np.array(found)


def _moments(frame: pl.DataFrame, column: str) -> NDArray[Any]:
    """What rows are ordered by: numbers, or texts whose order is that of time."""
    texts = _text(frame, column)
    assert texts is not None
    numbers, strange = tables.numbers_of(frame[column])
    if not strange and np.isfinite(numbers).all():
        return numbers
    if other := [text for text in texts if not _ISO_DATE.match(text)]:
        raise DataError(
            f"data.split.by=time orders rows by numbers or ISO dates (2024-01-31, 2024-01-31 18:00), and {column!r} has: "
            f"{tabular_schema.some(list(dict.fromkeys(map(str, other))))}"
        )
    return texts.astype(object)  # numpy has no minimum of its own texts


def _texts(texts: dict[str, tuple[int, str]], total: int, data: recipe.Data) -> list[str]:
    told = []
    for name, (count, first) in texts.items():
        found = (
            f"{count} of {total} cells of the numeric column {name!r} are no numbers, the first: {first!r}"
        )
        _allow(count, total, data, f"{found} (or name it in data.table.categorical)")
        told.append(f"{found}; they count as missing")
    return told


def _duplicates(
    rows: dict[str, NDArray[np.int64]], hashes: list[bytes], data: recipe.Data
) -> tuple[dict[str, NDArray[np.int64]], tuple[Duplicate, ...], tuple[str, ...]]:
    """Rows of val and test whose features also stand in train, and what was done about those of test."""
    of = {name: [hashes[row] for row in part] for name, part in rows.items()}
    twins = tuple(
        Duplicate(split=name, name=f"row {rows[name][here] + 2}", train=f"row {rows['train'][there] + 2}")
        for name in ("test", "val")
        for here, there in splits.shared_with(of[name], of["train"])
    )
    in_test = [twin for twin in twins if twin.split == "test"]
    if not in_test:
        return rows, twins, ()
    told = f"{len(in_test)} test rows have the same features as a train row, the first: {in_test[0].name} = {in_test[0].train}"
    if data.duplicates == "fail":
        raise LeakageError(f"{told}; remove them, or leave them out of test with data.duplicates=drop")
    if data.duplicates == "drop":
        known = set(of["train"])
        kept = rows["test"][[value not in known for value in of["test"]]]
        return {**rows, "test": kept}, twins, (f"{told}; they were left out of test",)
    return rows, twins, (f"{told}; data.duplicates=drop leaves them out of test",)


def _split(
    features: NDArray[np.float32],
    labels: NDArray[Any],
    groups: NDArray[np.str_] | None,
    rows: NDArray[np.int64],
) -> Split:
    return Split(
        inputs=features[rows],
        labels=labels[rows],
        groups=None if groups is None else groups[rows],
        names=tuple(f"row {row + 2}" for row in rows),  # as an editor counts, below the header
    )


def _unlabelled(split: Split) -> Split:
    return Split(split.inputs, np.zeros(len(split), np.int64), split.groups, split.names)
