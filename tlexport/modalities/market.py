"""Prices as they stand in files: a CSV or Parquet an asset, one long table, one wide table of closes, or a packaged set.

What is read is checked row by row: a row that no market can have printed is left out, counted and told, and stops the
command beyond `data.max_corrupt`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import labels, tables

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Days = NDArray[np.datetime64]

OHLC = ("open", "high", "low", "close")
CHANNELS = ((*OHLC, "volume"), OHLC, ("close",))  # from the most that an asset can have to the least
ALIASES = {
    "open": ("open", "o"),
    "high": ("high", "h"),
    "low": ("low", "l"),
    "close": ("close", "c", "last", "price", "px_last", "adj close", "adj_close", "adjclose"),
    "volume": ("volume", "vol", "v"),
}
TIMES = ("date", "time", "timestamp", "datetime", "day")
ASSETS = ("asset", "ticker", "symbol", "name")
SUFFIXES = (".csv", ".csv.gz", ".parquet", ".pq")
MOST_ASSETS = 20_000
_TIME_OF_DAY = r"[T ](?:0[1-9]|1\d|2[0-3]|00:(?:0[1-9]|[1-5]\d))"
ROUNDING = 1e-5  # a close above its day's high by less than this share is a rounded one


@dataclass(frozen=True)
class Bars:
    """One asset without a break: `days` rising, datetime64 [n] (of seconds where rows have times of day); `values` float64
    [n, C] in the market's channels."""

    asset: str
    days: Days
    values: Floats


@dataclass(frozen=True)
class Market:
    """Every asset's unbroken stretches, and what was left out of the files: reason -> rows, each with its first place."""

    channels: tuple[str, ...]
    bars: tuple[Bars, ...]
    rows: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Found:
    """Rows left out so far, by reason."""

    count: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave_out(self, reason: str, asset: str, rows: NDArray[np.bool_], where: NDArray[Any]) -> None:
        if rows.any():
            self.count[reason] += int(rows.sum())
            self.first.setdefault(reason, f"{asset} row {where[int(np.flatnonzero(rows)[0])]}")

    def told(self) -> list[str]:
        return [
            f"{count} rows {reason}, the first: {self.first[reason]}" for reason, count in self.count.items()
        ]


def read(data: recipe.Data, channels: tuple[str, ...] | None = None) -> Market:
    """All assets of `data.path`. `channels` are those a model was trained on; None: the most that every asset has.

    Raises DataError for what cannot be read, for channels or columns that are not there, and where more rows are
    impossible than `data.max_corrupt` allows.
    """
    frames = _frames(data)
    if len(frames) > MOST_ASSETS:
        raise DataError(f"{data.path} holds {len(frames)} assets; at most {MOST_ASSETS} are read")
    columns = {asset: _columns(frame, data.series) for asset, frame in frames.items()}
    chosen = channels or _common(columns)
    if lacking := [asset for asset, found in columns.items() if not set(chosen) <= set(found)]:
        raise DataError(
            f"{len(lacking)} of {len(frames)} assets lack {', '.join(chosen)}: {tables.some(lacking)} "
            f"(the first has: {', '.join(columns[lacking[0]])})"
        )
    found, total, bars, breaks = _Found(), 0, [], 0
    for asset, frame in frames.items():
        total += len(frame)
        days, values = _cleaned(asset, frame, columns[asset], chosen, found)
        parts = _unbroken(asset, days, values, data.series.max_gap)
        breaks += max(len(parts) - 1, 0)
        bars += parts
    told = found.told()
    count = sum(found.count.values())
    if count:
        labels.allow(
            count, total, data, f"{count} of {total} rows of {data.path} cannot be used ({'; '.join(told)})"
        )
    notes = [f"{len(frames)} assets, {total} rows; {', '.join(chosen)}"]
    if breaks:
        notes.append(
            f"{breaks} gaps of more than {data.series.max_gap} days (data.series.max_gap) break a series: no window crosses one"
        )
    return Market(
        chosen, tuple(bars), total, tuple(f"{text}; they were left out" for text in told), tuple(notes)
    )


def variance(values: Floats, channels: tuple[str, ...]) -> Floats:
    """float64 [n] from [n, C]: variance of each day's log price.

    From the day's range where there is one (Parkinson 1980, J. Business 53, eq. 4: ln(high/low)^2 / (4 ln 2)), else the
    squared change from the close before (0 for the first day).
    """
    if "high" in channels:
        high, low = values[:, channels.index("high")], values[:, channels.index("low")]
        return np.asarray(np.log(high / low) ** 2 / (4 * np.log(2)), np.float64)
    close = np.log(values[:, channels.index("close")])
    return np.asarray(np.diff(close, prepend=close[:1]) ** 2, np.float64)


def _frames(data: recipe.Data) -> dict[str, pl.DataFrame]:
    """Asset -> its rows, with the columns as the file names them."""
    path = Path(data.path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path} holds no price files (looked for: {', '.join(SUFFIXES)})")
        parts = [_of_file(file, data.series) for file in files]
    elif data.path in PACKAGED:
        parts = [_split(PACKAGED[data.path](), data.path.rpartition("/")[2], data.series)]
    elif not path.exists():
        raise DataError(
            f"data.path {data.path} is not there (give a folder of files, a CSV, Parquet, or one of: {', '.join(PACKAGED)})"
        )
    else:
        parts = [_of_file(path, data.series)]
    assets = Counter(asset for part in parts for asset in part)
    if twice := [asset for asset, count in assets.items() if count > 1]:
        raise DataError(
            f"{len(twice)} assets stand in several files: {tables.some(twice)}; each must be in one"
        )
    return {asset: frame for part in parts for asset, frame in part.items()}


def _read(path: str) -> pl.DataFrame:
    return tables.read(path, ("", "NA", "N/A", "NaN", "nan", "null", "None"), moments=True)


def _of_file(path: Path, series: recipe.Series) -> dict[str, pl.DataFrame]:
    frame = _read(str(path))
    try:
        return _split(frame, _stem(path), series)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error


def _stem(path: Path) -> str:
    return path.name.split(".")[0].removesuffix("_data")


def _split(frame: pl.DataFrame, name: str, series: recipe.Series) -> dict[str, pl.DataFrame]:
    """One file's assets: by its asset column, by its columns of closes, or the file as a whole."""
    import polars as pl

    known = {column.lower().strip(): column for column in frame.columns}
    asset = _named(series.asset, "asset", frame) or next((known[n] for n in ASSETS if n in known), None)
    if asset is not None:
        groups = frame.partition_by(asset, as_dict=True, maintain_order=True)
        return {str(key[0]): part for key, part in groups.items()}
    if known.keys() & set(ALIASES["close"]):
        return {name: frame}
    time = _time(frame, series)
    wide = [column for column in frame.columns if column != time]
    if not wide:
        raise DataError(f"{name} has no column but {time!r}; prices need close, or a column an asset")
    return {
        column: frame.select(pl.col(time), pl.col(column).alias("close")).drop_nulls("close")
        for column in wide
    }


def _time(frame: pl.DataFrame, series: recipe.Series) -> str:
    known = {column.lower().strip(): column for column in frame.columns}
    found = _named(series.time, "time", frame) or next((known[n] for n in TIMES if n in known), None)
    if found is None and frame.columns and frame.columns[0].strip() in ("", "column_1"):
        found = frame.columns[0]  # an index that was written without a name
    if found is None:
        raise DataError(
            f"no date column is among {', '.join(frame.columns[:20])}; name it with data.series.time "
            f"(looked for: {', '.join(TIMES)})"
        )
    return found


def _named(wanted: str | None, role: str, frame: pl.DataFrame) -> str | None:
    if wanted is not None and wanted not in frame.columns:
        raise DataError(
            f"data.series.{role}={wanted} is no column; the columns are: {', '.join(frame.columns[:20])}"
        )
    return wanted


def _columns(frame: pl.DataFrame, series: recipe.Series) -> dict[str, str]:
    """Channel -> column, and `time`."""
    known = {column.lower().strip(): column for column in frame.columns}
    found = {"time": _time(frame, series)}
    for channel, aliases in ALIASES.items():
        if names := [known[alias] for alias in aliases if alias in known]:
            found[channel] = names[0]
    return found


def _common(columns: dict[str, dict[str, str]]) -> tuple[str, ...]:
    shared = set.intersection(*(set(found) for found in columns.values()))
    chosen = next((channels for channels in CHANNELS if set(channels) <= shared), None)
    if chosen is None:
        without = [asset for asset, found in columns.items() if "close" not in found]
        raise DataError(f"{len(without)} of {len(columns)} assets have no close: {tables.some(without)}")
    return chosen


def _cleaned(
    asset: str, frame: pl.DataFrame, columns: dict[str, str], channels: tuple[str, ...], found: _Found
) -> tuple[Days, Floats]:
    """Rows that can be true, by rising day; the others are counted in `found`."""
    days = _days(frame[columns["time"]])
    values = np.stack([tables.numbers_of(frame[columns[channel]])[0] for channel in channels], axis=1)
    where = np.arange(len(days)) + 2  # as an editor counts, below the header
    checks: list[tuple[str, NDArray[np.bool_]]] = [
        ("have no date", np.isnat(days)),
        ("lack a price or hold text for one", np.asarray(~np.isfinite(values).all(axis=1))),
    ]
    left = np.zeros(len(days), bool)
    for reason, wrong in [*checks, *_impossible(values, channels)]:
        found.leave_out(reason, asset, wrong & ~left, where)
        left |= wrong
    days, values, where = days[~left], values[~left], where[~left]
    order = np.argsort(days, kind="stable")
    days, values, where = days[order], values[order], where[order]
    again = np.r_[False, days[1:] == days[:-1]] if len(days) else np.zeros(0, bool)
    found.leave_out("repeat a moment of the same asset", asset, again, where)
    return days[~again], values[~again]


def _impossible(values: Floats, channels: tuple[str, ...]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Reason -> rows that no market printed. NaN rows are not judged."""
    prices = values[:, : len(channels) - ("volume" in channels)]
    with np.errstate(invalid="ignore"):
        found: list[tuple[str, NDArray[np.bool_]]] = [
            ("have a price of zero or below", np.asarray((prices <= 0).any(axis=1)))
        ]
        if "volume" in channels:
            found.append(("have a volume below zero", values[:, -1] < 0))
        if "high" in channels:
            opened, high, low, close = prices.T
            room = ROUNDING * close
            outside = (np.maximum(opened, close) > high + room) | (np.minimum(opened, close) < low - room)
            found.append(("have an open or close outside the day's range", (high < low) | outside))
            found.append(("have a high equal to the low: no trade moved the price", high == low))
    return found


def _days(series: pl.Series) -> Days:
    """datetime64 [n], NaT where there is no date: of days, or of seconds where any row has a time of day (its time zone, if
    there is one, is left off). Accepts ISO dates and times, and days and months by / or . ."""
    import polars as pl

    if series.dtype.is_temporal():
        whole = series.dtype == pl.Date or bool(
            (series.drop_nulls().cast(pl.Datetime).dt.time() == pl.time(0)).all()
        )
        plain = series.cast(pl.Date) if whole else series.cast(pl.Datetime).dt.replace_time_zone(None)
        return np.asarray(plain.to_numpy(), "datetime64[D]" if whole else "datetime64[s]")
    text = series.cast(pl.String).str.strip_chars()
    if text.str.contains(_TIME_OF_DAY).any():
        moments = text.str.replace("T", " ").str.slice(0, 19)
        with_seconds = moments.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False)
        without = moments.str.slice(0, 16).str.to_datetime("%Y-%m-%d %H:%M", strict=False)
        return np.asarray(with_seconds.fill_null(without).to_numpy(), "datetime64[s]")
    dates = text.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)
    for form in ("%Y/%m/%d", "%Y%m%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y"):
        if not dates.null_count():
            break
        other = text.str.to_date(form, strict=False)
        if other.null_count() < dates.null_count():
            dates = other
    return np.asarray(dates.to_numpy(), "datetime64[D]")


def _unbroken(asset: str, days: Days, values: Floats, max_gap: int) -> list[Bars]:
    cuts = np.flatnonzero(np.diff(days) > np.timedelta64(max_gap, "D")) + 1
    return [
        Bars(asset, part, rows)
        for part, rows in zip(np.split(days, cuts), np.split(values, cuts), strict=True)
        if len(part)
    ]


def _skfolio_sp500() -> pl.DataFrame:
    """Daily adjusted closes of 20 US stocks, 1990 to 2022 (as skfolio ships them)."""
    return _read(str(tables.shipped("skfolio", "datasets/data/sp500_dataset.csv.gz")))


def _arch(name: str) -> Callable[[], pl.DataFrame]:
    """Daily open, high, low, close and volume of an index, 1999 to 2018 (as arch ships it)."""
    return lambda: _read(str(tables.shipped("arch", f"data/{name}/{name}.csv.gz")))


PACKAGED: dict[str, Callable[[], Any]] = {
    "skfolio/sp500": _skfolio_sp500,
    "arch/sp500": _arch("sp500"),
    "arch/nasdaq": _arch("nasdaq"),
}
