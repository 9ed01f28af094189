"""A table's columns, inferred once and then frozen: what a client must send, and what a changed table is told."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tlexport.errors import DataError
from tlexport.modalities.tables import numbers_of
from tlexport.recipe import Table

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float32]

UNKNOWN = -1.0  # a category that training never saw
FEW_VALUES = 10  # a column with at most so many different cells is no identifier
_SHOWN = 5


class Column(BaseModel):
    """One feature. `vocabulary`: categories by falling frequency; `numbers`: they are numbers and are sent as such."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["numeric", "categorical"]
    vocabulary: tuple[str, ...] = ()
    numbers: bool = False

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
            "numeric": "the number itself",
            "categorical": "the number itself where the vocabulary holds numbers, else the place in the vocabulary "
            "counted from 0; any other value is -1",
            **self.model_dump(mode="json"),
        }

    def encode(self, frame: pl.DataFrame) -> tuple[Floats, dict[str, tuple[int, str]]]:
        """float32 [n, F], and numeric columns with text: name -> (cells taken for missing, the first of them).

        Raises DataError naming the columns that the table lacks.
        """
        lacking = [column.name for column in self.columns if column.name not in frame.columns]
        if lacking:
            strange = [name for name in frame.columns if name not in self._known()]
            also = f"; it has columns that training did not have: {some(strange)}" if strange else ""
            raise DataError(f"the table lacks {len(lacking)} columns of the schema: {some(lacking)}{also}")
        features = np.empty((len(frame), len(self.columns)), np.float32)
        wrong: dict[str, tuple[int, str]] = {}
        for index, column in enumerate(self.columns):
            features[:, index], broken = _encoded(column, frame[column.name])
            if broken:
                wrong[column.name] = broken
        return features, wrong

    def _known(self) -> set[str]:
        return {column.name for column in self.columns} | set(self.excluded) | set(self.target)


def infer(frame: pl.DataFrame, table: Table, target: tuple[str, ...], train: NDArray[np.int64]) -> Schema:
    """Kinds and vocabularies from the training rows alone. Raises DataError if a column named is not there."""
    roles = {role: getattr(table, role) for role in ("group", "time", "split") if getattr(table, role)}
    named = [*table.numeric, *table.categorical, *table.exclude, *roles.values()]
    if absent := [name for name in named if name not in frame.columns]:
        raise DataError(f"data.table names {some(absent)}; the table has: {', '.join(frame.columns)}")
    excluded = dict.fromkeys(table.exclude, "named in data.table.exclude")
    excluded |= {name: f"data.table.{role}" for role, name in roles.items()}
    columns = []
    for name in frame.columns:
        if name in target or name in excluded:
            continue
        found = _column(frame[name][train.tolist()], table)
        if isinstance(found, str):
            excluded[name] = found
        else:
            columns.append(found)
    if not columns:
        raise DataError(
            f"no column is left to learn from ({'; '.join(f'{k}: {v}' for k, v in excluded.items())})"
        )
    return Schema(columns=tuple(columns), target=target, excluded=excluded, missing=table.missing)


def some(names: list[str] | tuple[str, ...]) -> str:
    """The first five, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _column(series: pl.Series, table: Table) -> Column | str:
    """The column, or why it is of no use."""
    name = series.name
    present = series.drop_nulls()
    if not len(present):
        return "empty in train"
    numbers, strange = numbers_of(series)
    finite = numbers[np.isfinite(numbers)]
    if name in table.numeric or (len(finite) >= 0.5 * len(present) and name not in table.categorical):
        return _numeric(name, np.unique(finite), len(series))
    counts = Counter(str(value) for value in present.to_list())
    if len(counts) == len(series) and len(series) > FEW_VALUES:
        return "looks like an identifier: every row has another text"
    if len(counts) == 1 and len(present) == len(series):
        return "constant in train"
    frequent = tuple(value for value, _ in counts.most_common(table.max_categories))
    return Column(name=name, kind="categorical", vocabulary=frequent, numbers=not strange)


def _numeric(name: str, values: NDArray[np.float64], rows: int) -> Column | str:
    whole = len(values) == rows > FEW_VALUES and bool((values == np.round(values)).all())
    # A row counter's numbers lie as dense as the rows; amounts that happen to be all different do not.
    if whole and (values[-1] - values[0]) / len(values) < 5:
        return "looks like an identifier: whole numbers that count up, each once"
    return "constant in train" if len(values) <= 1 else Column(name=name, kind="numeric")


def _encoded(column: Column, series: pl.Series) -> tuple[Floats, tuple[int, str] | None]:
    """float32 [n]; and how many cells of a numeric column are text, with the first."""
    if column.kind == "numeric":
        numbers, strange = numbers_of(series)
        numbers[~np.isfinite(numbers)] = np.nan
        with np.errstate(over="ignore"):
            encoded = numbers.astype(np.float32)
        return encoded, (len(strange), strange[0]) if strange else None
    codes = dict(zip(column.vocabulary, column.codes(), strict=True))
    if column.numbers:
        # 1, 1.0 and 01 are the same category.
        codes |= {repr(float(value)): code for value, code in codes.items()}
    cells = (None if cell is None else str(cell) for cell in series.to_list())
    found = [np.nan if cell is None else _code(cell, codes, column.numbers) for cell in cells]
    return np.array(found, np.float32), None


def _code(cell: str, codes: dict[str, float], numbers: bool) -> float:
    if cell in codes or not numbers:
        return codes.get(cell, UNKNOWN)
    try:
        return codes.get(repr(float(cell)), UNKNOWN)
    except ValueError:
        return UNKNOWN
