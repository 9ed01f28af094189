"""Drops on parts of the test samples: a class, a group, a value of a column. The average hides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.evidence.accuracy import bootstrap, flips, operating
from tlexport.evidence.accuracy.comparison import Comparison, Prepare
from tlexport.evidence.accuracy.noninferiority import holm
from tlexport.results import Decision, SliceDrop

Mask = NDArray[np.bool_]

MAX_GROUPS = 50
RESAMPLES = 500


def slices(
    labels: NDArray[Any],
    task: str,
    class_names: Sequence[str],
    groups: NDArray[Any] | None,
    columns: Mapping[str, NDArray[np.str_]],
) -> dict[str, Mask]:
    """Name -> bool [n]: `class=cat` (multilabel: `label=cat`, the samples that have it), `group=17` where there are at most
    MAX_GROUPS, and `sex=F` for each value of each column of text [n]. A regression has no classes.
    """
    found: dict[str, Mask] = {}
    if task == "multilabel":
        found |= {f"label={name}": labels[:, k] == 1 for k, name in enumerate(class_names)}
    elif task != "regression":
        found |= {f"class={name}": labels == k for k, name in enumerate(class_names)}
    if groups is not None and len(each := np.unique(groups)) <= MAX_GROUPS:
        found |= {f"group={group}": groups == group for group in each}
    for column, values in columns.items():
        found |= {f"{column}={value}": values == value for value in np.unique(values)}
    return found


def drops(
    comparison: Comparison,
    outputs: NDArray[Any],
    masks: Mapping[str, Mask],
    *,
    minimum: int = 30,
    decision: Decision | None = None,
) -> tuple[SliceDrop, ...]:
    """The drop of outputs [n, K] on each slice, worst first; those without one last, with a note that says why.

    A slice of one class has no AUC: there, of a metric that is better when higher, the share of right decisions is
    compared (the recall of that class), by `decision` (default: the most probable class, 0.5 for labels). Where all
    samples of a slice are of one group, they are resampled one by one: the drop is that group's.
    p is one-sided, of "the slice has no drop", after Holm over the slices that have one.
    """
    found: list[SliceDrop] = []
    p: dict[str, float] = {}
    for name, mask in masks.items():
        part, after = comparison.part(mask), outputs[mask]
        if len(part) < minimum:
            found.append(_without(name, part, f"{len(part)} samples, fewer than {minimum}"))
            continue
        part, notes = _comparable(part, decision)
        try:
            drop = part.drop(after)
        except DataError as error:
            found.append(_without(name, part, str(error)))
            continue
        p[name] = _p_of_no_drop(part, after, drop, decision)
        found.append(
            SliceDrop(
                slice=name,
                samples=len(part),
                reference=part.value,
                drop=drop.estimate,
                drop_low=drop.low,
                drop_high=drop.high,
                note="; ".join(notes),
            )
        )
    adjusted = holm(p)
    judged = (one.model_copy(update={"p": adjusted.get(one.slice)}) for one in found)
    return tuple(sorted(judged, key=lambda one: -np.inf if one.drop is None else one.drop, reverse=True))


def worst(found: Sequence[SliceDrop]) -> SliceDrop | None:
    """The slice with the largest drop; None if none has one above 0."""
    return next((one for one in found if one.drop is not None and one.drop > bootstrap.ROUNDING), None)


def _comparable(part: Comparison, decision: Decision | None) -> tuple[Comparison, list[str]]:
    """The part as it can be compared, and what about that has to be told."""
    notes = []
    groups, rule = part.groups, part.rule
    if groups is not None and (groups == groups[0]).all():
        groups = None
        notes.append("within one group")
    rule = replace(rule, resamples=min(rule.resamples, RESAMPLES))
    columns = _of_one_class(part)
    if columns is not None:
        rule = replace(rule, prepare=_recall(columns, decision), unbounded=False)
        notes.append("one class only: share of right decisions")
    return replace(part, rule=rule, groups=groups), notes


def _of_one_class(part: Comparison) -> NDArray[np.intp] | None:
    """Columns of the labels that have one class only, where that leaves the metric nothing to tell; None where it does."""
    if not part.rule.higher_is_better or not np.issubdtype(part.labels.dtype, np.integer):
        return None
    if part.labels.ndim == 1:
        return np.zeros(1, np.intp) if (part.labels == part.labels[0]).all() else None
    positive = np.flatnonzero((part.labels == 1).all(axis=0))
    return positive if len(positive) and np.isnan(part.value) else None


def _recall(columns: NDArray[np.intp], decision: Decision | None) -> Prepare:
    """Share of right decisions in these columns, as a metric of weights."""

    def prepare(labels: NDArray[Any], outputs: NDArray[Any]) -> bootstrap.Metric:
        right = _right(labels, outputs, decision)[:, columns].mean(axis=1)
        return lambda weights: weights @ right / weights.sum(axis=1)

    return prepare


def _right(labels: NDArray[Any], outputs: NDArray[Any], decision: Decision | None) -> Mask:
    """[n, 1], or [n, K] of labels."""
    task = "multilabel" if labels.ndim == 2 else "binary" if outputs.shape[1] == 2 else "multiclass"
    by = decision or operating.choose(labels, outputs, task, "half", 0.0)
    right: Mask = operating.decide(outputs, task, by) == labels
    return right.reshape(len(labels), -1)


def _p_of_no_drop(
    part: Comparison, outputs: NDArray[Any], drop: bootstrap.Interval, decision: Decision | None
) -> float:
    """One-sided p of "the true drop is 0 or less".

    Of a share of right decisions McNemar's, as few flips make the bootstrap's too small. Else a normal's, with the
    interval's width: resamples tell no p far out, where Holm over many slices looks. Simulated with the AUC of
    ten slices of 100 and of 300 samples without a drop, any p is below 0.05 in 1 and 3% of cases; with the
    interval's lower half instead in 11 and 8%.
    """
    if part.groups is None and part.labels.ndim == 1:
        before, after = (_right(part.labels, scores, decision)[:, 0] for scores in (part.outputs, outputs))
        harmful, mended = int((before & ~after).sum()), int((after & ~before).sum())
        if abs((harmful - mended) / len(part) - drop.estimate) <= bootstrap.ROUNDING:
            return flips.mcnemar_worse(harmful, mended)
    if drop.method == "constant":
        return 1 / (drop.resamples + 1) if drop.estimate > bootstrap.ROUNDING else 1.0
    normal = NormalDist()
    return normal.cdf(-2 * normal.inv_cdf((1 + drop.confidence) / 2) * drop.estimate / (drop.high - drop.low))


def _without(name: str, part: Comparison, note: str) -> SliceDrop:
    return SliceDrop(
        slice=name, samples=len(part), reference=None, drop=None, drop_low=None, drop_high=None, note=note
    )
