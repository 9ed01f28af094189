"""Molecules: a SMILES a row of a table, one or several label columns; splits hold whole scaffolds.

The graph takes token numbers, a fingerprint and descriptors; how a SMILES becomes them is
`molecule_preparation.Preparation.describe`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import labels, molecule_table, slices, splits, tables
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities import molecule_preparation as preparation
from tlexport.modalities import molecule_tokenizer as tokenizer
from tlexport.modalities.dataset import DataReport, Dataset, Split
from tlexport.modalities.metrics import HIGHER_IS_BETTER, METRICS
from tlexport.modalities.molecule_preparation import Preparation
from tlexport.modalities.molecule_table import Table
from tlexport.run import replacing

if TYPE_CHECKING:
    import polars as pl

__all__ = ["HIGHER_IS_BETTER", "METRICS", "load", "samples"]

LINES = (".smi", ".smiles", ".txt")  # a SMILES a line, perhaps a name after it
_LISTED = 1000
_SHOWN = 5


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
    column = molecule_table.smiles_column(frame, data.molecule.smiles)
    target = labels.target(frame, data.molecule.target, "data.molecule.target", task)
    draft = _draft(column, target, data, pretraining=task == "pretrain")
    with chemistry.quiet():
        table = molecule_table.usable(frame, column, target, draft, data)
        values, names, found = labels.read(table.frame, target, data, task)
        scaffolds = _scaffolds(table.smiles, data.split, task)
        rows, origin = _divided(table.frame, values, scaffolds, data, seed)
        told = "test molecules are also in train"
        rows, twins, shared = labels.duplicates(rows, table.smiles, table.names(), data, told)
        prepared = _frozen(draft, [table.smiles[row] for row in rows["train"]])
        inputs = _encoded(prepared, table.smiles, rows, cache, progress)
    sliced = slices.read(data.slices, table.frame.columns, lambda name: table.frame[name].to_list())
    made = {name: _split(table, values, scaffolds, sliced, rows[name], inputs[name]) for name in splits.NAMES}
    report = DataReport(
        source=data.path,
        samples={name: len(split) for name, split in made.items()},
        counts={name: labels.counts(split.labels, names, found) for name, split in made.items()},
        split_origin=origin,
        groups={n: len(np.unique(s.groups)) for n, s in made.items() if s.groups is not None} or None,
        corrupt=table.corrupt,
        duplicates=twins[:_LISTED],
        problems=(*table.problems, *molecule_table.repeated(table, values)),
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
        read, wrong = molecule_table.read(cells, prepared)
        if wrong:
            told = "; ".join(f"{names[row]}: {reason}" for row, reason in [*wrong.items()][:_SHOWN])
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise DataError(f"{len(wrong)} of {len(cells)} molecules of {path} cannot be read: {told}{more}")
        return names, prepared.encode(read)


def _cells(path: str, prepared: Preparation) -> tuple[tuple[str, ...], list[str | None]]:
    if path.endswith(LINES):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error})") from error
        cut = [line.split(maxsplit=1) for line in lines if line.strip()]
        if not cut:
            raise DataError(f"{path} holds no molecules")
        named = (of[1] if len(of) > 1 else f"molecule {place + 1}" for place, of in enumerate(cut))
        return tuple(named), [of[0] for of in cut]
    frame = tables.read(path, prepared.missing)
    cells = frame[molecule_table.smiles_column(frame, prepared.smiles)].to_list()
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
    if by_scaffold and stated is None:
        origin = {name: f"{text}, by scaffold" for name, text in origin.items()}
    return labels.fewer(rows, strata, data, seed), origin


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
    sliced: slices.Slices,
    rows: NDArray[np.int64],
    inputs: NDArray[Any],
) -> Split:
    """Molecules of one scaffold are one group; those without rings have nothing in common, so each is its own."""
    keys = tuple(table.smiles[row] for row in rows)
    groups = None
    if scaffolds is not None:
        groups = np.array([scaffolds[row] or key for row, key in zip(rows, keys, strict=True)])
    names = table.names()
    return Split(
        inputs,
        values[rows],
        groups,
        tuple(names[row] for row in rows),
        keys=keys,
        slices={name: of[rows] for name, of in sliced.items()},
    )


def _unlabelled(split: Split) -> Split:
    return Split(split.inputs, np.zeros(len(split), np.int64), split.groups, split.names, keys=split.keys)


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
