"""Splits: drawn stratified by a seed, never through a group; and checks that no sample stands on both sides.

Labels are int64 [n] (one class a sample) or 0/1 [n, K] (multilabel); groups are [n] of strings or integers
(a patient, a slide). Every function gives the same answer for the same arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError, LeakageError

Indices = NDArray[np.int64]

NAMES = ("train", "val", "test")
ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SHOWN = 5


def stratified(
    labels: NDArray[Any],
    fractions: Sequence[float],
    seed: int,
    groups: NDArray[Any] | None = None,
) -> list[Indices]:
    """Draw one part for each of `fractions`, the rest first: [rest, part 1, part 2 ...], sorted indices.

    Each class keeps its share in every part as far as whole samples allow, and at least one sample in the
    rest; a class with enough samples has at least one in every part. With groups whole groups are dealt
    out, so shares are approximate. Raises DataError if there are fewer samples or groups than parts.
    """
    parts = len(fractions) + 1
    units = len(labels) if groups is None else len(np.unique(groups))
    if units < parts:
        what = "samples" if groups is None else "groups"
        raise DataError(
            f"{units} {what} cannot be split into {parts} parts; add {what}, or state the splits in the data"
        )
    shares = np.array([1 - sum(fractions), *fractions])
    generator = np.random.default_rng(seed)
    if groups is None:
        owner = _deal_samples(_strata(labels, min(shares)), shares, generator)
    else:
        owner = _deal_groups(labels, shares, groups, generator)
    return [np.flatnonzero(owner == part) for part in range(parts)]


def subset(labels: NDArray[Any], count: int, seed: int) -> Indices:
    """`count` sorted indices, or all if there are fewer; stratified up to rounding."""
    if count >= len(labels):
        return np.arange(len(labels))
    first, others = stratified(labels, [1 - count / len(labels)], seed)
    generator = np.random.default_rng(seed)
    return np.sort(np.concatenate([generator.permutation(first), generator.permutation(others)])[:count])


def divide(
    labels: NDArray[Any],
    stated: NDArray[Any] | None,
    groups: NDArray[Any] | None,
    fractions: tuple[float, float],
    seed: int,
) -> tuple[dict[str, Indices], dict[str, str]]:
    """train, val and test as indices, and in words where each came from.

    `stated` holds train, val or test for each sample, or None. All three: taken as they are. Train and test:
    val is drawn from train. Train and val: the stated val becomes test, because it must not be used to choose
    a model and to judge it too, and val is drawn from train. Otherwise all three are drawn. `fractions` are
    the shares of val and test. Raises LeakageError if stated splits share a group.
    """
    parts = {} if stated is None else {name: np.flatnonzero(stated == name) for name in np.unique(stated)}
    if groups is not None:
        check_groups({name: groups[rows] for name, rows in parts.items()})
    if parts and "train" not in parts:
        raise DataError(
            f"the data states {' and '.join(parts)} but no train; add it, or draw new splits with data.resplit=true"
        )
    drawn = f"stratified{' by group' if groups is not None else ''}, seed {seed}"
    if len(parts) < 2:
        rows = stratified(labels, fractions, seed, groups)
        origin = f"drawn from all samples, {drawn}"
        return dict(zip(NAMES, rows, strict=True)), dict.fromkeys(NAMES, origin)
    if len(parts) == len(NAMES):
        return {name: parts[name] for name in NAMES}, dict.fromkeys(NAMES, "given")
    pool, held = parts["train"], "test" if "test" in parts else "val"
    rest, val = stratified(labels[pool], fractions[:1], seed, None if groups is None else groups[pool])
    origins = {
        "train": "given, without what was drawn for val",
        "val": f"drawn from the given train ({fractions[0]:.0%}), {drawn}",
        "test": "given" if held == "test" else "the given val",
    }
    return {"train": pool[rest], "val": pool[val], "test": parts[held]}, origins


def check_groups(groups: Mapping[str, NDArray[Any] | None]) -> None:
    """Raise LeakageError naming the groups if two of the named splits share any."""
    known = {name: {str(group) for group in np.unique(of)} for name, of in groups.items() if of is not None}
    for (one, left), (other, right) in combinations(known.items(), 2):
        shared = sorted(left & right)
        if shared:
            raise LeakageError(
                f"{len(shared)} group{'s' * (len(shared) > 1)} in both {one} and {other}: {_few(shared)}; "
                "a group must stay in one split. Correct the data, or draw new splits with data.resplit=true"
            )


def content_hashes(images: NDArray[np.uint8]) -> list[bytes]:
    """One 16-byte hash an image, of its shape and pixels; `images` is uint8 [n, h, w, C]."""
    shape = repr(images.shape[1:]).encode()
    contiguous = (np.ascontiguousarray(image) for image in images)
    return [hashlib.blake2b(image.data, digest_size=16, key=shape).digest() for image in contiguous]


def shared_with(hashes: Sequence[bytes], others: Sequence[bytes]) -> list[tuple[int, int]]:
    """(index in `hashes`, first index in `others`) of each image that is also among the others."""
    first: dict[bytes, int] = {}
    for index, value in enumerate(others):
        first.setdefault(value, index)
    return [(index, first[value]) for index, value in enumerate(hashes) if value in first]


def _strata(labels: NDArray[Any], smallest_share: float) -> Indices:
    """The class of each sample; for multilabel its set of labels, or its rarest one if the set is rare."""
    if labels.ndim == 1:
        return labels.astype(np.int64)
    sets, which, counts = np.unique(labels > 0, axis=0, return_inverse=True, return_counts=True)
    frequency = np.where(labels > 0, (labels > 0).sum(axis=0), len(labels) + 1)
    rarest = np.where((labels > 0).any(axis=1), frequency.argmin(axis=1), labels.shape[1])
    common = counts[which.ravel()] * smallest_share >= 1
    strata: Indices = np.where(common, len(sets) + labels.shape[1] + which.ravel(), rarest)
    return strata


def _deal_samples(strata: Indices, shares: NDArray[np.float64], generator: np.random.Generator) -> Indices:
    owner = np.zeros(len(strata), np.int64)
    targets = np.round(shares * len(strata)).astype(np.int64)
    dealt = np.zeros_like(targets)
    values, counts = np.unique(strata, return_counts=True)
    for value, count in sorted(zip(values, counts, strict=True), key=lambda pair: pair[1]):
        take = _apportion(count, shares, targets - dealt)
        dealt += take
        members = generator.permutation(np.flatnonzero(strata == value))
        owner[members] = np.repeat(np.arange(len(shares)), take)
    return owner


def _apportion(count: int, shares: NDArray[np.float64], open_places: Indices) -> Indices:
    """Largest remainders: how many of a stratum's `count` samples each part gets, the first one or more."""
    ideal = shares * count
    take = np.floor(ideal).astype(np.int64)
    if count >= len(shares):
        take = np.maximum(take, 1)
    take[0] = max(take[0], 1)
    while take.sum() > count:
        take[np.argmax(np.where(take > 1, take - ideal, -np.inf))] -= 1
    for _ in range(count - int(take.sum())):
        take[np.lexsort((open_places - take, ideal - take))[-1]] += 1
    return take


def _deal_groups(
    labels: NDArray[Any],
    shares: NDArray[np.float64],
    groups: NDArray[Any],
    generator: np.random.Generator,
) -> Indices:
    """Greedy: large lopsided groups first, each to the part it leaves nearest to its share of every class."""
    positive = labels > 0 if labels.ndim == 2 else labels[:, None] == np.unique(labels)
    rows = np.hstack([positive, np.ones((len(labels), 1), bool)])
    names, which = np.unique(groups, return_inverse=True)
    content = np.zeros((len(names), rows.shape[1]))
    np.add.at(content, which.ravel(), rows)
    scale = np.maximum(content.sum(axis=0), 1)
    wanted = shares[:, None] * content.sum(axis=0)
    held = np.zeros_like(wanted)
    owner = np.zeros(len(names), np.int64)
    shuffled = generator.permutation(len(names))
    for group in shuffled[np.argsort(-content[shuffled].max(axis=1), kind="stable")]:
        before = ((held - wanted) ** 2 / scale).sum(axis=1)
        after = ((held + content[group] - wanted) ** 2 / scale).sum(axis=1)
        owner[group] = np.argmin(after - before)
        held[owner[group]] += content[group]
    _fill(owner, content, shares)
    of_samples: Indices = owner[which.ravel()]
    return of_samples


def _fill(owner: Indices, content: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
    """Move small groups, in place, until the first part has every class and no part is empty."""
    size = content[:, -1]
    for column in range(content.shape[1] - 1):
        holders = np.flatnonzero(content[:, column])
        if len(holders) and not (owner[holders] == 0).any():
            owner[holders[np.argmin(size[holders])]] = 0
    for part in range(1, len(shares)):
        if not (owner == part).any():
            donors = np.flatnonzero(np.bincount(owner, minlength=len(shares))[owner] > 1)
            owner[donors[np.argmin(size[donors])]] = part


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def folded(
    strata: NDArray[Any], folds: int, fold: int, val: float, seed: int, groups: NDArray[Any] | None
) -> tuple[dict[str, Indices], dict[str, str]]:
    """The test split is fold `fold` of scikit-learn's shuffled StratifiedKFold (StratifiedGroupKFold with groups), the
    same folds that published baselines use; val is drawn from the rest. Raises DataError if there is no such fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if fold >= folds:
        raise DataError(f"data.split.fold={fold}, but there are {folds} folds (0 to {folds - 1})")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    parts = kind(folds, shuffle=True, random_state=seed).split(strata, strata, groups)
    pool, test = list(parts)[fold]
    rest, chosen = stratified(strata[pool], [val], seed, None if groups is None else groups[pool])
    origin = f"fold {fold} of {folds}, stratified, seed {seed}"
    origins = {
        "train": "the other folds without val",
        "val": f"drawn from the other folds ({val:.0%})",
        "test": origin,
    }
    return {"train": pool[rest], "val": pool[chosen], "test": test}, origins


def ordered(times: NDArray[Any], fractions: tuple[float, float]) -> tuple[dict[str, Indices], dict[str, str]]:
    """The latest rows are the test split, those before them val; rows of one moment stay together."""
    moments = np.unique(times)
    cuts = [moments[int(len(moments) * share)] for share in (1 - sum(fractions), 1 - fractions[1])]
    order = {
        "train": times < cuts[0],
        "val": (times >= cuts[0]) & (times < cuts[1]),
        "test": times >= cuts[1],
    }
    told = {
        name: f"by time: {times[of].min()} to {times[of].max()}" for name, of in order.items() if of.any()
    }
    if len(told) < len(NAMES):
        raise DataError(f"{len(moments)} moments cannot be split into train, val and test by time")
    return {name: np.flatnonzero(of) for name, of in order.items()}, told


def largest_first(
    groups: NDArray[Any], fractions: tuple[float, float]
) -> tuple[dict[str, Indices], dict[str, str]]:
    """Whole groups, the largest first, fill train, then val, then test: the scaffold split of MoleculeNet (Wu et al.,
    Chem. Sci. 2018, 9, 513) as DeepChem computes it; of two equally large groups the one whose first row is later comes
    first. Nothing is drawn. Raises DataError if a split is left empty.
    """
    members: dict[Any, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    most_train, most_val = (len(groups) * share for share in (1 - sum(fractions), 1 - fractions[1]))
    rows: dict[str, list[int]] = {name: [] for name in NAMES}
    for of in sorted(members.values(), key=lambda own: (len(own), own[0]), reverse=True):
        if len(rows["train"]) + len(of) <= most_train:
            rows["train"] += of
        elif len(rows["train"]) + len(rows["val"]) + len(of) <= most_val:
            rows["val"] += of
        else:
            rows["test"] += of
    if empty := [name for name, of in rows.items() if not of]:
        raise DataError(
            f"{len(members)} groups of {len(groups)} rows leave {' and '.join(empty)} empty; use data.split.by=random"
        )
    return {name: np.sort(np.array(of, np.int64)) for name, of in rows.items()}, dict.fromkeys(
        NAMES, "whole groups, the largest first"
    )


def nested(labels: NDArray[Any], count: int, seed: int) -> Indices:
    """`count` sorted indices, or all if there are fewer: each class by its share, and at least one of each.

    A smaller count gives a part of what a larger one gives, so that learning curves grow by the same samples.
    """
    if count >= len(labels):
        return np.arange(len(labels))
    drawn = np.random.default_rng(seed).permutation(len(labels))
    strata = _strata(labels, 0.1)[drawn]
    place = np.zeros(len(labels))
    for value in np.unique(strata):
        members = np.flatnonzero(strata == value)
        place[members] = np.arange(len(members)) / len(members)
    return np.sort(drawn[np.argsort(place, kind="stable")[:count]])


def walk_forward(
    origins: NDArray[Any],
    until: NDArray[Any],
    fractions: tuple[float, float],
    *,
    purge: int,
    fold: tuple[int, int] = (0, 1),
) -> tuple[dict[str, Indices], dict[str, str]]:
    """Train, val and test one after the other in time, with `purge` days between them that belong to none.

    `origins` [n] are the last days a sample's inputs know of, `until` the last days its label does. `fold` (i, k) cuts the
    test days into k stretches, of which the i-th is the test split; what lies before it is there to learn from. In every
    case a label ends no later than the first day from which the next split is forecast.
    Raises DataError if there are too few days.
    """
    days = np.unique(origins)
    which, count = fold
    if which >= count:
        raise DataError(f"data.split.fold={which}, but there are {count} folds (0 to {count - 1})")
    val_share, test_share = fractions
    edges = np.linspace(1 - test_share, 1, count + 1)[[which, which + 1]]
    val, test, end = (round(len(days) * share) for share in (edges[0] - val_share, edges[0], edges[1]))
    if not 0 < val < test < end or val - purge < 1 or test - val - purge < 1:
        raise DataError(
            f"{len(days)} days cannot be split by time into train, val ({val_share:.0%}) and test ({test_share:.0%}) "
            f"with {purge} days purged between them"
        )
    place = np.searchsorted(days, origins)
    parts = {
        "train": (place < val - purge + 1) & (until <= days[val]),
        "val": (place >= val) & (place < test - purge + 1) & (until <= days[test]),
        "test": (place >= test) & (place < end),
    }
    stretch = f", stretch {which + 1} of {count}" if count > 1 else ""
    told = {
        name: f"by time: {origins[of].min()} to {origins[of].max()}{stretch if name == 'test' else ''}"
        for name, of in parts.items()
        if of.any()
    }
    if len(told) < len(NAMES):
        raise DataError(
            f"{len(days)} days leave no samples for {', '.join(n for n in NAMES if n not in told)}"
        )
    return {name: np.flatnonzero(of) for name, of in parts.items()}, told
