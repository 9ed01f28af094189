"""A table's rows as molecules: which can be used, which are left out and why, and which are the same one twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import labels, tables
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities.dataset import Corrupt
from tlexport.modalities.molecule_preparation import Preparation

if TYPE_CHECKING:
    import polars as pl

COLUMNS = ("smiles", "mol", "SMILES", "Smiles", "canonical_smiles")  # looked for where none is named
_LISTED = 1000


@dataclass(frozen=True)
class Table:
    """Rows that can be used: the place of each in the file, its canonical SMILES, and what was left out."""

    frame: pl.DataFrame
    places: NDArray[np.int64]
    smiles: tuple[str, ...]
    corrupt: tuple[Corrupt, ...]
    problems: tuple[str, ...]

    def names(self) -> list[str]:
        return [f"row {place + 2}" for place in self.places]  # as an editor counts, below the header


def smiles_column(frame: pl.DataFrame, named: str | None) -> str:
    """The column of SMILES. Raises DataError listing the columns if it is not there."""
    found = [name for name in ((named,) if named else COLUMNS) if name in frame.columns]
    if not found:
        wanted = (
            f"named {named!r}"
            if named
            else f"of SMILES ({', '.join(COLUMNS[:2])}; data.molecule.smiles names it)"
        )
        raise DataError(f"there is no column {wanted}; the columns are: {', '.join(frame.columns)}")
    return found[0]


def usable(
    frame: pl.DataFrame, column: str, target: tuple[str, ...], draft: Preparation, data: recipe.Data
) -> Table:
    """Rows with a readable molecule and a label. Raises DataError if more are left out than the recipe allows."""
    smiles, reasons = read(frame[column].to_list(), draft)
    unlabelled = np.flatnonzero(labels.unlabelled(frame, target))
    reasons |= {int(row): "no label" for row in unlabelled} | _strange(frame, target)
    problems = _told(reasons, len(frame))
    labels.allow(len(reasons), len(frame), data, "; ".join(problems))
    places = np.array([row for row in range(len(frame)) if row not in reasons], np.int64)
    if not len(places):
        raise DataError(f"no row of {data.path} can be used; {'; '.join(problems)}")
    corrupt = tuple(Corrupt(name=f"row {row + 2}", reason=reasons[row]) for row in sorted(reasons))
    kept = frame[places.tolist()] if reasons else frame
    told = tuple(f"{problem}; left out" for problem in problems)
    return Table(kept, places, tuple(smiles[row] for row in places), corrupt[:_LISTED], told)


def read(cells: Sequence[str | None], prepared: Preparation) -> tuple[list[str], dict[int, str]]:
    """Canonical SMILES ("" where there is none), and for these rows why."""
    number = prepared.numbers()
    found, wrong = [], {}
    for row, cell in enumerate(cells):
        smiles = ""
        try:
            smiles = chemistry.canonical(_stripped(cell))
            if (count := len(number(smiles))) > prepared.length:
                raise ValueError(f"too long: {count} tokens, the most is {prepared.length}")
        except ValueError as error:
            wrong[row] = str(error)
        found.append(smiles)
    return found, wrong


def _stripped(cell: str | None) -> str:
    if cell is None or not str(cell).strip():
        raise ValueError("no SMILES")
    return str(cell).strip()


def _strange(frame: pl.DataFrame, target: tuple[str, ...]) -> dict[int, str]:
    """Rows whose label is text in a column of numbers."""
    found: dict[int, str] = {}
    for name in target:
        texts = set(tables.numbers_of(frame[name])[1])
        cells = [None if cell is None else str(cell) for cell in frame[name].to_list()]
        strange = [row for row, cell in enumerate(cells) if cell in texts]
        if len(strange) > 0.5 * (len(cells) - cells.count(None)):
            continue  # the names of classes
        found |= {row: f"no number in {name}: {cells[row]!r}" for row in strange}
    return found


def _told(reasons: Mapping[int, str], total: int) -> list[str]:
    """A line a kind of reason: how many rows, and the first of them."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for row in sorted(reasons):
        kinds[reasons[row].partition(":")[0]].append(row)
    return [
        f"{len(rows)} of {total} rows have a problem: {reasons[rows[0]]} (row {rows[0] + 2}, the first)"
        for rows in kinds.values()
    ]


def repeated(table: Table, values: NDArray[Any]) -> list[str]:
    """Molecules in several rows, and whether these agree."""
    of: dict[str, list[int]] = defaultdict(list)
    for row, smiles in enumerate(table.smiles):
        of[smiles].append(row)
    repeated = [rows for rows in of.values() if len(rows) > 1]
    if not repeated:
        return []
    names = table.names()
    contrary = [rows for rows in repeated if _disagree(values[rows])]
    told = f"{len(repeated)} molecules stand in {sum(map(len, repeated))} rows"
    if not contrary:
        return [f"{told}, always with the same label"]
    first = ", ".join(names[row] for row in contrary[0])
    return [f"{told}; {len(contrary)} of them with different labels, the first: {first}"]


def _disagree(values: NDArray[Any]) -> bool:
    if values.dtype == np.int8:  # several labels: only what was measured can disagree
        return bool(((values == 1).any(axis=0) & (values == 0).any(axis=0)).any())
    return len(np.unique(values, axis=0)) > 1
