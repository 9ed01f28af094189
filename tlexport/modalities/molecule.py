"""Molecules: a SMILES a row of a table, one or several label columns; splits hold whole scaffolds.

The graph takes token numbers, a fingerprint and descriptors; how a SMILES becomes them is
`molecule_preparation.Preparation.describe`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import labels, splits, tables
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities import molecule_preparation as preparation
from tlexport.modalities import molecule_tokenizer as tokenizer
from tlexport.modalities.dataset import Corrupt, DataReport, Dataset, Split
from tlexport.modalities.metrics import HIGHER_IS_BETTER, METRICS
from tlexport.modalities.molecule_preparation import Preparation
from tlexport.run import replacing

if TYPE_CHECKING:
    import polars as pl

__all__ = ["HIGHER_IS_BETTER", "METRICS", "load", "samples"]

COLUMNS = ("smiles", "mol", "SMILES", "Smiles", "canonical_smiles")  # looked for where none is named
LINES = (".smi", ".smiles", ".txt")  # a SMILES a line, perhaps a name after it
_LISTED = 1000
_SHOWN = 5
_STEP = 64  # rows from one progress report to the next


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


def load(
    data: recipe.Data,
    *,
    task: str,
    seed: int,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read, check, split and encode. Raises DataError or LeakageError for what a person has to decide or repair, and
    NotInstalledError without RDKit.

    Pretraining needs tokens alone, so nothing else is computed for it.
    """
    chemistry.require()
    frame = tables.read(data.path, data.table.missing)
    column = smiles_column(frame, data.molecule.smiles)
    target = labels.target(frame, data.molecule.target, "data.molecule.target", task)
    draft = _draft(column, target, data, pretraining=task == "pretrain")
    with chemistry.quiet():
        table = _usable(frame, column, target, draft, data)
        values, names, found = labels.read(table.frame, target, data, task)
        scaffolds = _scaffolds(table.smiles, data.split, found)
        rows, origin = _divided(table.frame, values, scaffolds, data, seed)
        told = "test molecules are also in train"
        rows, twins, shared = labels.duplicates(rows, table.smiles, table.names(), data, told)
        prepared = _frozen(draft, [table.smiles[row] for row in rows["train"]])
        inputs = _encoded(prepared, table.smiles, rows, cache, progress)
    made = {name: _split(table, values, scaffolds, rows[name], inputs[name]) for name in splits.NAMES}
    report = DataReport(
        source=data.path,
        samples={name: len(split) for name, split in made.items()},
        counts={name: labels.counts(split.labels, names, found) for name, split in made.items()},
        split_origin=origin,
        groups={n: len(np.unique(s.groups)) for n, s in made.items() if s.groups is not None} or None,
        corrupt=table.corrupt,
        duplicates=twins[:_LISTED],
        problems=(*table.problems, *_repeated(table, values)),
        leaks=shared,
        sha256=labels.fingerprint(made),
        notes=tuple(_notes(prepared, table, made, names, found)),
    )
    pretraining = task == "pretrain"
    return Dataset(
        **(made if not pretraining else {name: _unlabelled(split) for name, split in made.items()}),
        task="pretrain" if pretraining else found,
        class_names=() if pretraining else names,
        preprocessing=prepared,
        report=report,
    )


def samples(path: str, preprocessing: Mapping[str, Any]) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Names and graph inputs ([n], structured with a field an input) of unlabelled molecules, by a frozen description.

    `path` is a table with the description's column of SMILES, or a file of one SMILES a line. Raises DataError naming
    what is missing or cannot be read.
    """
    chemistry.require()
    prepared = preparation.from_description(preprocessing)
    names, cells = _cells(path, prepared)
    with chemistry.quiet():
        read, wrong = _read(cells, prepared)
        if wrong:
            told = "; ".join(f"{names[row]}: {reason}" for row, reason in [*wrong.items()][:_SHOWN])
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise DataError(f"{len(wrong)} of {len(cells)} molecules of {path} cannot be read: {told}{more}")
        return names, prepared.encode(read)


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


def _cells(path: str, prepared: Preparation) -> tuple[tuple[str, ...], list[str | None]]:
    if path.endswith(LINES):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error})") from error
        cut = [line.split(maxsplit=1) for line in lines if line.strip()]
        named = (of[1] if len(of) > 1 else f"molecule {place + 1}" for place, of in enumerate(cut))
        return tuple(named), [of[0] for of in cut]
    frame = tables.read(path, prepared.missing)
    cells = frame[smiles_column(frame, prepared.smiles)].to_list()
    return tuple(f"row {place + 2}" for place in range(len(cells))), cells


def _draft(column: str, target: tuple[str, ...], data: recipe.Data, *, pretraining: bool) -> Preparation:
    """All of the preparation but the vocabulary, which the training split decides."""
    content, padding = (None, 0)
    if data.molecule.tokenizer:
        content, padding = tokenizer.hugging_face(data.molecule.tokenizer)
    return Preparation(
        smiles=column,
        target=target,
        missing=data.table.missing,
        vocabulary=() if content else preparation.SPECIAL,
        length=data.molecule.max_length,
        bits=0 if pretraining else preparation.BITS,
        descriptors=() if pretraining else chemistry.DESCRIPTORS,
        rdkit=chemistry.version(),
        tokenizer=content,
        padding=padding,
    )


def _frozen(draft: Preparation, train: list[str]) -> Preparation:
    return (
        draft if draft.tokenizer else draft.model_copy(update={"vocabulary": preparation.vocabulary(train)})
    )


def _usable(
    frame: pl.DataFrame, column: str, target: tuple[str, ...], draft: Preparation, data: recipe.Data
) -> Table:
    """Rows with a readable molecule and a label. Raises DataError if more are left out than the recipe allows."""
    smiles, reasons = _read(frame[column].to_list(), draft)
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


def _read(cells: Sequence[str | None], prepared: Preparation) -> tuple[list[str], dict[int, str]]:
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
    found = {}
    for name in target:
        numbers, texts = tables.numbers_of(frame[name])
        present = frame[name].is_not_null().to_numpy()
        if not texts or len(texts) > 0.5 * present.sum():
            continue  # numbers alone, or the names of classes
        for row, text in zip(np.flatnonzero(present & np.isnan(numbers)), texts, strict=True):
            found[int(row)] = f"no number in {name}: {text!r}"
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


def _scaffolds(smiles: Sequence[str], split: recipe.SplitFractions, task: str) -> NDArray[np.str_] | None:
    """[n] of scaffolds, "" without rings; None in pretraining that has no use for them."""
    if task == "pretrain" and split.by == "random":
        return None
    return np.array([chemistry.scaffold(own) for own in smiles])


def _divided(
    frame: pl.DataFrame,
    values: NDArray[Any],
    scaffolds: NDArray[np.str_] | None,
    data: recipe.Data,
    seed: int,
) -> tuple[labels.Rows, dict[str, str]]:
    """By scaffold unless the recipe says random, or names a column that states the split (`data.table.split`)."""
    strata, split = labels.strata(values), data.split
    fractions = (split.val, split.test)
    stated = None if data.resplit else labels.text(frame, data.table.split)
    if split.by == "time":
        raise DataError("data.split.by=time: molecules have no time; use scaffold or random")
    by_scaffold = split.by != "random" and scaffolds is not None
    if split.folds:
        groups = scaffolds if by_scaffold else None
        rows, origin = splits.folded(strata, split.folds, split.fold, split.val, seed, groups)
    elif by_scaffold and stated is None:
        assert scaffolds is not None
        rows, origin = splits.largest_first(scaffolds, fractions)
    else:
        rows, origin = splits.divide(strata, stated, None, fractions, seed)
    told = " of one scaffold (Bemis-Murcko)" if by_scaffold and stated is None else ""
    return labels.fewer(rows, strata, data, seed), {name: text + told for name, text in origin.items()}


def _encoded(
    prepared: Preparation,
    smiles: Sequence[str],
    rows: labels.Rows,
    cache: Path | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, NDArray[Any]]:
    """Inputs of each split, from the cache if exactly these molecules were prepared in exactly this way."""
    wanted = [smiles[row] for part in rows.values() for row in part]
    known = hashlib.sha256("\n".join([repr(prepared.describe()), *wanted]).encode()).hexdigest()[:16]
    path = None if cache is None else cache / f"molecules-{known}.npy"
    if path is not None and path.is_file():
        whole = np.load(path, allow_pickle=False)
    else:
        whole = prepared.encode(wanted, progress)
        if path is not None:
            with replacing(path) as partial, partial.open("wb") as handle:
                np.save(handle, whole, allow_pickle=False)
    ends = np.cumsum([len(part) for part in rows.values()])[:-1]
    return dict(zip(rows, np.split(whole, ends), strict=True))


def _split(
    table: Table,
    values: NDArray[Any],
    scaffolds: NDArray[np.str_] | None,
    rows: NDArray[np.int64],
    inputs: NDArray[Any],
) -> Split:
    """Molecules of one scaffold are one group; those without rings have nothing in common, so each is its own."""
    keys = tuple(table.smiles[row] for row in rows)
    groups = None
    if scaffolds is not None:
        groups = np.array([scaffolds[row] or key for row, key in zip(rows, keys, strict=True)])
    names = table.names()
    return Split(inputs, values[rows], groups, tuple(names[row] for row in rows), keys=keys)


def _unlabelled(split: Split) -> Split:
    return Split(split.inputs, np.zeros(len(split), np.int64), split.groups, split.names, keys=split.keys)


def _repeated(table: Table, values: NDArray[Any]) -> list[str]:
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


def _notes(
    prepared: Preparation, table: Table, made: Mapping[str, Split], names: tuple[str, ...], task: str
) -> list[str]:
    notes = []
    if made["train"].groups is not None:
        scaffolds = {
            name: len(np.unique(split.groups)) for name, split in made.items() if split.groups is not None
        }
        counts = ", ".join(f"{name} {count}" for name, count in scaffolds.items())
        notes.append(f"scaffolds (a molecule without rings counts as its own): {counts}")
    if mixed := sum("." in smiles for smiles in table.smiles):
        notes.append(f"{mixed} salts or mixtures are kept whole, every part of them")
    if not prepared.tokenizer:
        known = set(prepared.vocabulary)
        strange = Counter(
            token
            for name in ("val", "test")
            for key in made[name].keys or ()
            for token in chemistry.tokens(key)
            if token not in known
        )
        notes.append(f"{len(known) - len(preparation.SPECIAL)} kinds of tokens in train")
        if strange:
            notes.append(
                f"{len(strange)} kinds of tokens are in val or test alone: {', '.join(sorted(strange)[:_SHOWN])}"
            )
    if task == "multilabel":
        notes.append(
            f"{float((made['train'].labels < 0).mean()):.1%} of the labels in train were not measured"
        )
    return notes + labels.imbalance(made["train"].labels, names, task)
