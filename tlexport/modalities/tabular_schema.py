"""A table's columns, inferred once and then frozen: what a client must send, and what a changed table is told."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from tlexport.errors import DataError
from tlexport.modalities import tables
from tlexport.modalities.dataset import DataWarning
from tlexport.modalities.tables import numbers_of
from tlexport.recipe import Table

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float32]

UNKNOWN = -1.0  # a category that training never saw
FEW_VALUES = 10  # a column with at most so many different cells is no identifier


class Column(BaseModel):
    """One feature. `vocabulary`: categories by falling frequency; `numbers`: they are numbers and are sent as such."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["numeric", "categorical"]
    vocabulary: tuple[str, ...] = ()
    numbers: bool = False
    unknown: float = UNKNOWN  # stands for any other category; not one of the codes

    def codes(self) -> tuple[float, ...]:
        """What stands for each category in the graph's input."""
        return tuple(
            float(value) if self.numbers else float(index) for index, value in enumerate(self.vocabulary)
        )


class Schema(BaseModel):
    """The features in the graph's order, and what was left out and why."""

    model_config = ConfigDict(frozen=True)

    columns: tuple[Column, ...]
    target: tuple[str, ...]
    excluded: dict[str, str]
    missing: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        return {
            "input": "features float32 [n, columns], in this order; a missing value is NaN",
            "numeric": "the number itself; of a Parquet date or datetime days since 1970-01-01 UTC, of a duration seconds",
            "categorical": "the number itself where the vocabulary holds numbers, else the place in the vocabulary "
            "counted from 0; any other value is `unknown`",
            **self.model_dump(mode="json"),
        }

    def encode(self, frame: pl.DataFrame) -> tuple[Floats, dict[str, tuple[int, str]]]:
        """float32 [n, F], and numeric columns with other cells: name -> (cells taken for missing, the first of them).

        Raises DataError naming the columns that the table lacks.
        """
        lacking = [column.name for column in self.columns if column.name not in frame.columns]
        if lacking:
            strange = self.strange(frame)
            also = f"; it has columns that training did not have: {tables.some(strange)}" if strange else ""
            raise DataError(
                f"the table lacks {len(lacking)} columns of the schema: {tables.some(lacking)}{also}"
            )
        features = np.empty((len(frame), len(self.columns)), np.float32)
        wrong: dict[str, tuple[int, str]] = {}
        for index, column in enumerate(self.columns):
            features[:, index], broken = _encoded(column, frame[column.name])
            if broken:
                wrong[column.name] = broken
        return features, wrong

    def strange(self, frame: pl.DataFrame) -> list[str]:
        """Columns of the table that training did not have; they are not looked at."""
        return [name for name in frame.columns if name not in self._known()]

    def _known(self) -> set[str]:
        return {column.name for column in self.columns} | set(self.excluded) | set(self.target)


def samples(path: str, preprocessing: Mapping[str, Any]) -> tuple[tuple[str, ...], Floats]:
    """Names and float32 [n, F] of a table's rows, encoded by the schema that `Schema.describe` described.

    Raises DataError naming the columns that the table lacks or that hold text instead of numbers; categories that
    training never saw and columns that it did not have are told.
    """
    try:
        schema = Schema.model_validate({key: preprocessing[key] for key in Schema.model_fields})
    except (KeyError, ValidationError) as error:
        raise DataError(
            f"this is no schema of a table that this version of tlexport knows: {error}"
        ) from error
    frame = tables.read(path, schema.missing)
    features, texts = schema.encode(frame)
    if texts:
        found = "; ".join(
            f"{name!r} in {count} rows, the first: {first!r}" for name, (count, first) in texts.items()
        )
        raise DataError(
            f"numeric columns hold what is no number: {found}; repair the cells, or leave them empty for missing"
        )
    for told in _new(schema, frame, features):
        warnings.warn(told, DataWarning, stacklevel=2)
    return tuple(f"row {row + 2}" for row in range(len(frame))), features


def _new(schema: Schema, frame: pl.DataFrame, features: Floats) -> Iterator[str]:
    if strange := schema.strange(frame):
        yield f"{len(strange)} columns that training did not have were not looked at: {tables.some(strange)}"
    for index, column in enumerate(schema.columns):
        if column.kind == "numeric":
            continue
        rows = np.flatnonzero(features[:, index] == column.unknown)
        if len(rows):
            yield (
                f"{len(rows)} of {len(frame)} rows have a category in {column.name!r} that training never saw, "
                f"the first: {str(frame[column.name][int(rows[0])])!r}"
            )


def infer(frame: pl.DataFrame, table: Table, target: tuple[str, ...], train: NDArray[np.int64]) -> Schema:
    """Kinds and vocabularies from the training rows alone. Raises DataError if a column named is not there."""
    roles = {role: getattr(table, role) for role in ("group", "time", "split") if getattr(table, role)}
    named = [*table.numeric, *table.categorical, *table.exclude, *roles.values()]
    if absent := [name for name in named if name not in frame.columns]:
        raise DataError(f"data.table names {tables.some(absent)}; the table has: {', '.join(frame.columns)}")
    excluded = dict.fromkeys(table.exclude, "named in data.table.exclude")
    excluded |= {name: f"data.table.{role}" for role, name in roles.items()}
    columns = []
    rows = train.tolist()
    for name in frame.columns:
        if name in target or name in excluded:
            continue
        found = _column(frame[name][rows], table)
        if isinstance(found, str):
            excluded[name] = found
        else:
            columns.append(found)
    if not columns:
        why = "; ".join(f"{name}: {reason}" for name, reason in excluded.items())
        raise DataError(
            f"no column is left to learn from ({why or 'the table holds nothing but its labels'})"
        )
    return Schema(columns=tuple(columns), target=target, excluded=excluded, missing=table.missing)


def _column(series: pl.Series, table: Table) -> Column | str:
    """The column, or why it is of no use."""
    name = series.name
    if not tables.holds_values(series):
        return f"holds {series.dtype} cells, not numbers or texts"
    present = series.drop_nulls()
    if not len(present):
        return "empty in train"
    numbers, strange = numbers_of(present)
    finite = numbers[np.isfinite(numbers)]
    if name in table.numeric and not len(finite):
        raise DataError(
            f"data.table.numeric names {name!r}, which holds no number; the first cell: {present[0]!r}"
        )
    if name in table.numeric or (len(strange) <= 0.5 * len(present) and name not in table.categorical):
        return _numeric(name, np.unique(finite), len(series))
    # Large whole numbers may be one and the same float32; they are told apart as texts.
    as_numbers = len(finite) == len(present) and _distinct(np.unique(finite))
    counts = Counter(map(_plain, finite.tolist()) if as_numbers else map(str, present.to_list()))
    if len(counts) == len(series) and len(series) > FEW_VALUES:
        return "looks like an identifier: every row has another text"
    if len(counts) == 1 and len(present) == len(series):
        return "constant in train"
    frequent = tuple(value for value, _ in counts.most_common(table.max_categories))
    made = Column(name=name, kind="categorical", vocabulary=frequent, numbers=as_numbers)
    free = next(-float(k) for k in itertools.count(1) if -float(k) not in made.codes())
    return made.model_copy(update={"unknown": free})


def _plain(number: float) -> str:
    """1, 1.0 and 01 are the same category, and it is written 1."""
    return repr(number).removesuffix(".0")


def _distinct(values: NDArray[np.float64]) -> bool:
    with np.errstate(over="ignore"):
        return len(np.unique(values.astype(np.float32))) == len(values)


def _numeric(name: str, values: NDArray[np.float64], rows: int) -> Column | str:
    whole = len(values) == rows > FEW_VALUES and bool((values == np.round(values)).all())
    # A row counter's numbers lie as dense as the rows; amounts that happen to be all different do not.
    if whole and (values[-1] - values[0]) / len(values) < 5:
        return "looks like an identifier: whole numbers that count up, each once"
    return "constant in train" if len(values) <= 1 else Column(name=name, kind="numeric")


def _encoded(column: Column, series: pl.Series) -> tuple[Floats, tuple[int, str] | None]:
    """float32 [n]; and how many cells of a numeric column are no finite float32, with the first."""
    numbers, _ = numbers_of(series)
    missing = series.is_null().to_numpy()
    if column.kind == "numeric":
        with np.errstate(over="ignore"):
            encoded = numbers.astype(np.float32)
        broken = np.flatnonzero(~np.isfinite(encoded) & ~missing)
        encoded[broken] = np.nan
        return encoded, (len(broken), str(series[int(broken[0])])) if len(broken) else None
    if column.numbers:
        encoded = np.where(np.isin(numbers, column.codes()), numbers, column.unknown).astype(np.float32)
    else:
        codes = dict(zip(column.vocabulary, column.codes(), strict=True))
        cells = (codes.get(str(cell), column.unknown) for cell in series.to_list())
        encoded = np.fromiter(cells, np.float32, len(series))
    encoded[missing] = np.nan
    return encoded, None
