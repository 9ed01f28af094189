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
from tlexport.errors import DataError
from tlexport.modalities import labels, slices, splits, tables, tabular_report, tabular_schema
from tlexport.modalities.dataset import DataReport, Dataset, Split
from tlexport.modalities.metrics import HIGHER_IS_BETTER, METRICS
from tlexport.modalities.tabular_schema import samples

if TYPE_CHECKING:
    import polars as pl

__all__ = ["HIGHER_IS_BETTER", "METRICS", "load", "samples"]

_LISTED = 1000
_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}.*)?$")


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
    target = labels.target(frame, data.table.target, "data.table.target", task)
    frame, problems = _labelled(frame, target, data)
    values, names, found = labels.read(frame, target, data, task)
    groups = labels.text(frame, data.table.group)
    sliced = slices.read(data.slices, frame.columns, lambda name: frame[name].to_list())
    rows, origin = _divided(frame, values, groups, data, seed)
    schema = tabular_schema.infer(frame, data.table, target, rows["train"])
    features, texts = schema.encode(frame)
    problems += _texts(texts, len(frame), data)
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in features]
    row_names = [f"row {row + 2}" for row in range(len(frame))]  # as an editor counts, below the header
    told = "test rows have the same features as a train row"
    rows, twins, shared = labels.duplicates(rows, hashes, row_names, data, told)
    made = {name: _split(features, values, groups, sliced, rows[name]) for name in splits.NAMES}
    counts = {name: labels.counts(split.labels, names, found) for name, split in made.items()}
    if found in ("binary", "multiclass"):
        labels.require_trained(counts)
    report = DataReport(
        source=data.path,
        samples={name: len(split) for name, split in made.items()},
        counts=counts,
        split_origin=origin,
        groups={n: len(np.unique(s.groups)) for n, s in made.items() if s.groups is not None} or None,
        duplicates=twins[:_LISTED],
        problems=(*problems, *tabular_report.shifts(schema, made)),
        leaks=(*shared, *tabular_report.giveaways(schema, made["train"], names, found)),
        sha256=labels.fingerprint(made),
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


def _labelled(
    frame: pl.DataFrame, target: tuple[str, ...], data: recipe.Data
) -> tuple[pl.DataFrame, list[str]]:
    """Rows that have a label, and what is said of those that have none."""
    unlabelled = labels.unlabelled(frame, target)
    if not (count := int(unlabelled.sum())):
        return frame, []
    told = f"{count} of {len(frame)} rows have no label, the first is row {int(np.flatnonzero(unlabelled)[0]) + 2}"
    labels.allow(count, len(frame), data, told)
    return frame.filter(~unlabelled), [f"{told}; they were left out"]


def _divided(
    frame: pl.DataFrame, targets: NDArray[Any], groups: NDArray[Any] | None, data: recipe.Data, seed: int
) -> tuple[labels.Rows, dict[str, str]]:
    strata = labels.strata(targets)
    fractions = (data.split.val, data.split.test)
    if data.split.folds:
        rows, origin = splits.folded(strata, data.split.folds, data.split.fold, fractions[0], seed, groups)
    elif data.split.by == "time":
        if not data.table.time:
            raise DataError("data.split.by=time needs data.table.time, the column to order rows by")
        rows, origin = splits.ordered(_moments(frame, data.table.time), fractions)
    else:
        stated = None if data.resplit else labels.stated(frame, data.table.split)
        rows, origin = splits.divide(strata, stated, groups, fractions, seed)
    return labels.fewer(rows, strata, data, seed), origin


def _moments(frame: pl.DataFrame, column: str) -> NDArray[Any]:
    """What rows are ordered by: numbers, or texts whose order is that of time."""
    texts = labels.text(frame, column)
    assert texts is not None
    numbers, strange = tables.numbers_of(frame[column])
    if not strange and np.isfinite(numbers).all():
        return numbers
    if other := [text for text in texts if not _ISO_DATE.match(text)]:
        raise DataError(
            f"data.split.by=time orders rows by numbers or ISO dates (2024-01-31, 2024-01-31 18:00), and {column!r} has: "
            f"{tables.some(list(dict.fromkeys(map(str, other))))}"
        )
    return texts.astype(object)  # numpy has no minimum of its own texts


def _texts(texts: dict[str, tuple[int, str]], total: int, data: recipe.Data) -> list[str]:
    told = []
    for name, (count, first) in texts.items():
        found = (
            f"{count} of {total} cells of the numeric column {name!r} are no numbers, the first: {first!r}"
        )
        labels.allow(count, total, data, f"{found} (or name it in data.table.categorical)")
        told.append(f"{found}; they count as missing")
    return told


def _split(
    features: NDArray[np.float32],
    values: NDArray[Any],
    groups: NDArray[np.str_] | None,
    sliced: slices.Slices,
    rows: NDArray[np.int64],
) -> Split:
    return Split(
        inputs=features[rows],
        labels=values[rows],
        groups=None if groups is None else groups[rows],
        names=tuple(f"row {row + 2}" for row in rows),
        slices={name: of[rows] for name, of in sliced.items()},
    )


def _unlabelled(split: Split) -> Split:
    return Split(split.inputs, np.zeros(len(split), np.int64), split.groups, split.names)
