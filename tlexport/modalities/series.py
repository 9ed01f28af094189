"""Series: windows of many assets' daily prices, one model for all of them, split by time.

The graph takes raw prices and answers in the target's own unit (`series_windows.Windows.describe`). Nothing of a sample's
input lies after its last day, and no label of one split reaches into the next: the days between are purged.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from tlexport import recipe
from tlexport.errors import DataError, RecipeError
from tlexport.modalities import labels, market, series_windows, splits, tables
from tlexport.modalities.dataset import DataReport, DataWarning
from tlexport.modalities.market import Market
from tlexport.modalities.metrics import HIGHER_IS_BETTER, METRICS
from tlexport.modalities.series_windows import CLASSES, LEAST_VARIANCE, Samples, SeriesData, Split, Windows

__all__ = ["HIGHER_IS_BETTER", "METRICS", "load", "samples"]


def load(
    data: recipe.Data,
    *,
    task: str,
    seed: int,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> SeriesData:
    """Read, check, cut windows, split by time. Raises DataError for what a person has to decide or repair."""
    windows = _windows(data, market.CHANNELS[0], task)
    found = market.read(data)
    windows = windows.model_copy(update={"channels": found.channels})
    pretraining = task == "pretrain"
    _require_length(found, windows)
    every = series_windows.samples_of(found.bars, windows, labelled=not pretraining)
    rows, origin, purged = _divided(every, data, seed)
    days = np.unique(every.origins)
    made = {name: _split(every, of, days, windows) for name, of in rows.items()}
    kind = "pretrain" if pretraining else "regression" if windows.target == "variance" else "binary"
    names = () if pretraining else CLASSES.get(windows.target, (windows.target,))
    report = DataReport(
        source=data.path,
        samples={name: len(split) for name, split in made.items()},
        counts={name: labels.counts(split.labels, names, kind) for name, split in made.items()},
        split_origin=origin,
        groups={n: len(np.unique(s.groups)) for n, s in made.items() if s.groups is not None},
        problems=(*found.problems, *_short(found, windows)),
        sha256=_fingerprint(made, windows),
        notes=(*found.notes, *_notes(every, made, windows, purged, names, kind)),
    )
    return SeriesData(**made, task=kind, class_names=names, preprocessing=windows, report=report)


def samples(path: str, preprocessing: Mapping[str, Any]) -> tuple[tuple[str, ...], NDArray[Any]]:
    """The latest window of every asset in `path`: names (asset and last day) and float32 [n, window, C].

    `preprocessing` is what a bundle's manifest holds. Raises DataError where rows are impossible, columns are missing or
    no asset has a whole window.
    """
    try:
        windows = Windows.model_validate(
            {k: preprocessing[k] for k in Windows.model_fields if k in preprocessing}
        )
    except ValidationError as error:
        raise DataError(f"this is no description of windows of prices: {error.errors()[0]['msg']}") from error
    asked = recipe.Data(
        path=path, max_corrupt=windows.max_corrupt, series=recipe.Series(max_gap=windows.max_gap)
    )
    found = market.read(asked, windows.channels)
    for text in found.problems:
        warnings.warn(text, DataWarning, stacklevel=2)
    latest = {part.asset: part for part in found.bars}
    whole = [part for part in latest.values() if len(part.days) >= windows.window]
    if len(whole) < len(latest):
        lacking = [part.asset for part in latest.values() if len(part.days) < windows.window]
        raise DataError(
            f"{len(lacking)} of {len(latest)} assets have no {windows.window} days without a gap at their end: {tables.some(lacking)}"
        )
    inputs = np.stack([part.values[-windows.window :] for part in whole]).astype(np.float32)
    return tuple(f"{part.asset} {part.days[-1]}" for part in whole), inputs


def _windows(data: recipe.Data, channels: tuple[str, ...], task: str) -> Windows:
    """Raises RecipeError where target, threshold, task or purge do not go together."""
    series = data.series
    classes = series.target in CLASSES
    if task not in ("auto", "pretrain", "binary" if classes else "regression"):
        raise RecipeError(f"task={task} does not fit data.series.target={series.target}; leave it at auto")
    needs = series.target in ("drawdown", "spike")
    if needs != (series.threshold is not None):
        asked = "needs data.series.threshold" if needs else "takes no data.series.threshold"
        raise RecipeError(f"data.series.target={series.target} {asked}")
    if series.target == "drawdown" and series.threshold is not None and series.threshold >= 1:
        raise RecipeError(
            f"data.series.threshold={series.threshold:g}: a fall is a share of the price, below 1"
        )
    if series.purge is not None and series.purge < series.horizon:
        raise RecipeError(
            f"data.series.purge={series.purge} is less than the horizon of {series.horizon} days: labels of one split "
            "would reach into the next"
        )
    return Windows(
        channels=channels,
        window=series.window,
        horizon=series.horizon,
        target=series.target,
        threshold=series.threshold,
        max_gap=series.max_gap,
        max_corrupt=data.max_corrupt,
    )


def _require_length(found: Market, windows: Windows) -> None:
    need = windows.window + windows.horizon
    if not any(len(part.days) >= need for part in found.bars):
        longest = max((len(part.days) for part in found.bars), default=0)
        raise DataError(
            f"no asset has {need} days without a gap (window {windows.window} and horizon {windows.horizon}); "
            f"the longest stretch has {longest}: shorten data.series.window, or allow longer gaps by data.series.max_gap"
        )


def _short(found: Market, windows: Windows) -> tuple[str, ...]:
    """Assets that give no sample at all."""
    need = windows.window + windows.horizon
    long = {part.asset for part in found.bars if len(part.days) >= need}
    short = sorted({part.asset for part in found.bars} - long)
    return (
        (f"{len(short)} assets have no {need} days without a gap and give no sample: {tables.some(short)}",)
        if short
        else ()
    )


def _divided(
    every: Samples, data: recipe.Data, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, str], int]:
    """Rows of each split, where they come from, and how many samples were purged between them."""
    if data.split.by not in ("auto", "time"):
        raise RecipeError(
            f"data.split.by={data.split.by}: series are split by time, or the future would be learned from"
        )
    fold = (data.split.fold, data.split.folds or 1)
    rows, origin = splits.walk_forward(
        every.origins,
        every.until,
        (data.split.val, data.split.test),
        fold=fold,
        purge=data.series.purge or data.series.horizon,
    )
    inside = sum(len(of) for of in rows.values())
    last = every.origins[rows["test"]].max()
    purged = int((every.origins <= last).sum()) - inside
    rows["train"] = rows["train"][_strided(every, rows["train"], data.series.stride)]
    strata = labels.strata(every.labels)
    if data.limit:
        rows = {name: of[splits.subset(strata[of], data.limit, seed)] for name, of in rows.items()}
    if data.train_size:
        train = rows["train"]
        rows["train"] = train[splits.nested(strata[train], data.train_size, seed)]
    return rows, origin, purged


def _strided(every: Samples, rows: NDArray[np.int64], stride: int) -> NDArray[np.intp]:
    """Every `stride`-th of each asset's rows, the latest among them."""
    assets = every.assets[rows]
    ends = np.r_[assets[1:] != assets[:-1], True]
    behind = np.flatnonzero(ends)[np.searchsorted(np.flatnonzero(ends), np.arange(len(rows)))] - np.arange(
        len(rows)
    )
    return np.flatnonzero(behind % stride == 0)


def _split(every: Samples, rows: NDArray[np.int64], days: NDArray[Any], windows: Windows) -> Split:
    """Samples of one stretch of `horizon` days are a group: they share days of what they forecast, and the market."""
    origins, assets = every.origins[rows], every.assets[rows]
    return Split(
        inputs=every.starts[rows],
        labels=every.labels[rows],
        groups=np.array([f"days {block}" for block in np.searchsorted(days, origins) // windows.horizon]),
        names=tuple(f"{asset} {day}" for asset, day in zip(assets, origins, strict=True)),
        times=origins,
        slices={"asset": assets.astype(np.str_), "year": origins.astype("datetime64[Y]").astype(np.str_)},
        bars=every.bars,
        window=windows.window,
        assets=assets,
    )


def _notes(
    every: Samples, made: dict[str, Split], windows: Windows, purged: int, names: tuple[str, ...], kind: str
) -> list[str]:
    notes = [f"forecast: {windows.meaning()}", f"{purged} samples between the splits were purged"]
    if kind == "regression" and (floored := int((every.labels <= LEAST_VARIANCE).sum())):
        notes.append(f"{floored} variances below {LEAST_VARIANCE:g} count as that (days without a move)")
    return notes + labels.imbalance(made["train"].labels, names, kind)


def _fingerprint(made: dict[str, Split], windows: Windows) -> str:
    whole = hashlib.sha256(windows.model_dump_json().encode())
    whole.update(made["train"].bars.tobytes())
    for name, split in made.items():
        whole.update(f"{name} {len(split)}\n".encode())
        whole.update(np.ascontiguousarray(split.inputs).tobytes())
        whole.update(np.ascontiguousarray(split.labels).tobytes())
        whole.update("\0".join(split.names).encode())
    return whole.hexdigest()
