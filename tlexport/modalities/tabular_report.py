"""What a table's report says: columns that give the label away, what differs between the splits, what is rare or missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.modalities import labels
from tlexport.modalities.dataset import Split
from tlexport.modalities.metrics import METRICS
from tlexport.modalities.tabular_schema import Schema

GIVES_AWAY = 0.995  # AUC, or rank correlation with a value, of a single column
FEWEST = 5  # rows of a class; less of them are told apart by chance
_JUDGED = 20_000  # training rows that are looked at


def giveaways(schema: Schema, train: Split, names: tuple[str, ...], task: str) -> list[str]:
    """Columns that tell a label (nearly) by themselves: usually written down after the fact."""
    every = slice(None, None, max(1, len(train) // _JUDGED))
    inputs = train.inputs[every]
    told = []
    for index, column in enumerate(schema.columns):
        for what, target in _questions(train.labels[every], names, task):
            known = np.isfinite(target)
            value = _tells(inputs[known, index], target[known], column.kind)
            if value >= GIVES_AWAY:
                kind = "rank correlation" if task == "regression" else "AUC"
                told.append(
                    f"the column {column.name!r} alone predicts {what} ({kind} {value:.3f} on train): is it "
                    "known when the model is asked? data.table.exclude leaves it out"
                )
                break
    return told


def shifts(schema: Schema, made: Mapping[str, Split]) -> Iterator[str]:
    """Columns whose cells are missing, or of a category that train does not have, in val or test."""
    for index, column in enumerate(schema.columns):
        for name in ("val", "test"):
            cells = made[name].inputs[:, index]
            if np.isnan(cells).all():
                share = float(np.isnan(made["train"].inputs[:, index]).mean())
                if share < 1:
                    yield f"the column {column.name!r} is empty in {name} (missing in {share:.1%} of train)"
            elif column.kind == "categorical" and (count := int((cells == column.unknown).sum())):
                yield f"{count} of {len(cells)} {name} rows have a category in {column.name!r} that train does not have"


def notes(schema: Schema, made: Mapping[str, Split], names: tuple[str, ...], task: str) -> Iterator[str]:
    train = made["train"]
    kinds = [column.kind for column in schema.columns]
    yield f"{kinds.count('numeric')} numeric and {kinds.count('categorical')} categorical columns"
    yield from (f"left out: {name} ({why})" for name, why in schema.excluded.items())
    if empty := float(np.isnan(train.inputs).mean()):
        yield f"{empty:.1%} of the cells are missing; the graph fills them in"
    for name, split in made.items():
        absent = [label for label, count in labels.counts(split.labels, names, task).items() if not count]
        if absent:
            yield f"{name} has no row of {', '.join(absent[:5])}"
    yield from labels.imbalance(train.labels, names, task)


def _questions(
    labels: NDArray[Any], names: tuple[str, ...], task: str
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """What one column may give away, in words, and float64 [n] of it: 0 or 1, or a value; NaN where it is not known."""
    if task == "pretrain":
        return
    if task == "binary":
        yield "the label", labels.astype(np.float64)
    elif task == "multiclass":
        yield from ((f"the class {name!r}", (labels == k).astype(np.float64)) for k, name in enumerate(names))
    else:
        values = labels.astype(np.float64)
        if task == "multilabel":
            values[labels < 0] = np.nan
        yield from ((f"{name!r}", values[:, k]) for k, name in enumerate(names))


def _tells(cells: NDArray[np.float32], target: NDArray[np.float64], kind: str) -> float:
    """How well one column orders the target: AUC of 0 and 1, absolute rank correlation with values; 0 if nothing can be said."""
    flags = bool(np.isin(target, (0, 1)).all())
    if len(target) < 2 * FEWEST or (flags and not FEWEST <= target.sum() <= len(target) - FEWEST):
        return 0.0
    if kind == "categorical":
        codes = np.unique(cells, return_inverse=True)[1]
        if len(np.unique(codes)) > len(cells) / 20:
            return 0.0  # a category of a few rows tells any label by chance
        order = (np.bincount(codes, weights=target) / np.bincount(codes))[codes]
    else:
        lowest = np.nextafter(np.nanmin(cells), -np.inf) if np.isfinite(cells).any() else 0.0
        order = np.where(np.isnan(cells), lowest, cells).astype(np.float64)
    if not flags:
        return _rank_correlation(order, target)
    both = np.stack([-order, order], axis=1)
    value = float(METRICS["auc"](target.astype(np.int64), both)(np.ones((1, len(order))))[0])
    return max(value, 1 - value)


def _rank_correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(one), rankdata(other)])
    spread = ranks.std(axis=1)
    return float(abs(np.corrcoef(ranks)[0, 1])) if spread.all() else 0.0
