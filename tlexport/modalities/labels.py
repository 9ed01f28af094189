"""What tables and molecules have in common: label columns, rows that are left out, rows on both sides of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError, LeakageError
from tlexport.modalities import splits, tables
from tlexport.modalities.dataset import UNKNOWN, Duplicate, Split

if TYPE_CHECKING:
    import polars as pl

Rows = dict[str, NDArray[np.int64]]

_SHOWN = 5
_VALUES = 20  # a column with more distinct numbers than so is a value to predict, not a class


def target(frame: pl.DataFrame, named: str | tuple[str, ...] | None, key: str, task: str) -> tuple[str, ...]:
    """The label columns that the recipe names under `key`. Raises DataError if there are none, or not in the table."""
    columns = () if named is None else (named,) if isinstance(named, str) else tuple(named)
    if not columns and task != "pretrain":
        raise DataError(f"{key} is not set; the columns are: {', '.join(frame.columns)}")
    if absent := [name for name in columns if name not in frame.columns]:
        raise DataError(
            f"there is no column {', '.join(map(repr, absent))}; the columns are: {', '.join(frame.columns)}"
        )
    if len(set(columns)) < len(columns):
        raise DataError(f"{key} names a column twice: {', '.join(columns)}")
    return columns


def unlabelled(frame: pl.DataFrame, target: tuple[str, ...]) -> NDArray[np.bool_]:
    """[n]: rows without any label."""
    import polars as pl

    if not target:
        return np.zeros(len(frame), bool)
    return frame.select(pl.all_horizontal(pl.col(name).is_null() for name in target)).to_series().to_numpy()


def allow(count: int, total: int, data: recipe.Data, told: str) -> None:
    """Raise DataError saying `told` if more of the data is unusable than `data.max_corrupt` allows."""
    allowed = data.max_corrupt if data.max_corrupt >= 1 else data.max_corrupt * total
    if count > allowed:
        raise DataError(
            f"{told}; data.max_corrupt={data.max_corrupt:g} allows {int(allowed)}: repair them, or allow more"
        )


def read(
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
            return np.where(np.isnan(values), UNKNOWN, values).astype(np.int8), target, "multilabel"
        return _values(values, target), target, "regression"
    cells = frame[target[0]]
    known = [str(cell) for cell in cells.to_list()]
    distinct = sorted(set(known), key=lambda text: (len(text), text) if numeric else (0, text))
    if task == "regression" or (task in ("auto", "pretrain") and numeric and len(distinct) > _VALUES):
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


def strata(labels: NDArray[Any]) -> NDArray[np.int64]:
    """What a draw is stratified by: the class where a row has one, else nothing."""
    classes = labels.dtype.kind in "iu" and labels.ndim == 1
    return labels if classes else np.zeros(len(labels), np.int64)


def fewer(rows: Rows, strata: NDArray[np.int64], data: recipe.Data, seed: int) -> Rows:
    """`data.limit` and `data.train_size` applied. Raises DataError if a split is left empty."""
    if data.limit:
        rows = {name: of[splits.subset(strata[of], data.limit, seed)] for name, of in rows.items()}
    if data.train_size:
        train = rows["train"]
        rows = {**rows, "train": train[splits.subset(strata[train], data.train_size, seed)]}
    if empty := [name for name, of in rows.items() if not len(of)]:
        raise DataError(f"no rows are left for {', '.join(empty)}")
    return rows


def text(frame: pl.DataFrame, column: str | None) -> NDArray[np.str_] | None:
    """A column's cells as text. Raises DataError if there is no such column."""
    if column is None:
        return None
    if column not in frame.columns:
        raise DataError(f"there is no column {column!r}; the columns are: {', '.join(frame.columns)}")
    if lacking := frame[column].null_count():
        raise DataError(
            f"{lacking} of {len(frame)} rows have no {column!r}, by which the rows are split; fill it in"
        )
    return np.array([str(value) for value in frame[column].to_list()])


def stated(frame: pl.DataFrame, column: str | None) -> NDArray[np.str_] | None:
    """train, val or test of each row. Raises DataError for any other word."""
    texts = text(frame, column)
    if texts is None:
        return None
    found = [splits.ALIASES.get(word.strip().lower(), "") for word in texts]
    if strange := sorted({str(word) for word, name in zip(texts, found, strict=True) if not name}):
        raise DataError(f"the column {column!r} must say train, val or test; it has: {tables.some(strange)}")
    return np.array(found)


def require_trained(counts: dict[str, dict[str, int]]) -> None:
    """Raise DataError for a class that is asked for without having been taught."""
    for name in ("val", "test"):
        strange = [label for label, count in counts[name].items() if count and not counts["train"][label]]
        if strange:
            raise DataError(
                f"{name} has rows of {tables.some(strange)} and train has none; add some to train, "
                "or draw new splits with data.resplit=true"
            )
    if absent := [label for label, count in counts["train"].items() if not count]:
        raise DataError(
            f"there is no row of {tables.some(absent)} to train on; leave it out of data.class_names, or add some"
        )


def duplicates(
    rows: Rows, contents: Sequence[Any], names: Sequence[str], data: recipe.Data, told: str
) -> tuple[Rows, tuple[Duplicate, ...], tuple[str, ...]]:
    """Rows of val and test whose contents also stand in train, and what was done about those of test.

    `told` says it in words, for instance `test rows have the same features as a train row`. Raises LeakageError if
    `data.duplicates` is fail.
    """
    of = {name: [contents[row] for row in part] for name, part in rows.items()}
    twins = tuple(
        Duplicate(split=name, name=names[rows[name][here]], train=names[rows["train"][there]])
        for name in ("test", "val")
        for here, there in splits.shared_with(of[name], of["train"])
    )
    in_test = [twin for twin in twins if twin.split == "test"]
    if not in_test:
        return rows, twins, ()
    told = f"{len(in_test)} {told}, the first: {in_test[0].name} = {in_test[0].train}"
    if data.duplicates == "fail":
        raise LeakageError(f"{told}; remove them, or leave them out of test with data.duplicates=drop")
    if data.duplicates == "drop":
        known = set(of["train"])
        kept = rows["test"][[value not in known for value in of["test"]]]
        return {**rows, "test": kept}, twins, (f"{told}; they were left out of test",)
    return rows, twins, (f"{told}; data.duplicates=drop leaves them out of test",)


def counts(labels: NDArray[Any], names: tuple[str, ...], task: str) -> dict[str, int]:
    """Samples of each class, positives of each label; nothing for values."""
    if task in ("regression", "pretrain"):
        return {}
    found = (labels > 0).sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    return {name: int(count) for name, count in zip(names, found, strict=True)}


def imbalance(labels: NDArray[Any], names: tuple[str, ...], task: str) -> list[str]:
    """A note where a class is rarer than half its even share of the training labels, or a label rarer than 5%."""
    if task == "multilabel":
        measured = np.maximum((labels >= 0).sum(axis=0), 1)
        shares = (labels > 0).sum(axis=0) / measured
        rare = int(shares.argmin())
        told = f"labels are imbalanced: {names[rare]} is {shares[rare]:.1%} of train where it was measured"
        return [f"{told} (transfer.balance)"] if shares[rare] < 0.05 else []
    if task not in ("binary", "multiclass"):
        return []
    shares = np.bincount(labels, minlength=len(names)) / len(labels)
    rare = int(shares.argmin())
    told = f"classes are imbalanced: {names[rare]} is {shares[rare]:.1%} of train (transfer.balance)"
    return [told] if shares[rare] < 0.5 / len(names) else []


def fingerprint(made: dict[str, Split]) -> str:
    """SHA-256 of every split's inputs, labels and groups, in order."""
    whole = hashlib.sha256()
    for name, split in made.items():
        whole.update(f"{name} {len(split)}\n".encode())
        whole.update(np.ascontiguousarray(split.inputs).tobytes())
        whole.update(np.ascontiguousarray(split.labels).tobytes())
        whole.update("\0".join(split.groups if split.groups is not None else ()).encode())
    return whole.hexdigest()
