"""Windows of prices: what the graph takes, how a client makes one, and what followed each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tlexport.modalities import dataset, market
from tlexport.modalities.market import Bars, Days, Floats

Target = Literal["variance", "direction", "drawdown", "spike"]
LEAST_VARIANCE = 1e-8  # of a day: a hundredth of a per cent; below it a variance has no useful logarithm
CLASSES = {"direction": ("down", "up"), "drawdown": ("no", "drawdown"), "spike": ("no", "spike")}


class Windows(BaseModel):
    """How prices become a sample, and what is forecast of it."""

    model_config = ConfigDict(frozen=True)

    channels: tuple[str, ...]
    window: int
    horizon: int
    target: Target
    threshold: float | None
    max_gap: int
    max_corrupt: float

    def describe(self) -> dict[str, Any]:
        return {
            "input": "prices float32 [n, window, channels]: raw prices of the last trading days of one asset, oldest first, "
            "in this order of channels; no scaling",
            "output": self.meaning(),
            "left out": "impossible rows (a price of zero or below, outside the day's range, a high equal to the low) and "
            "repeated days, up to max_corrupt of all (a count from 1 on, else a share); a window never spans more than "
            "max_gap calendar days between two rows",
            **self.model_dump(mode="json"),
        }

    def meaning(self) -> str:
        """What the graph answers, in words with units."""
        days = "the next trading day" if self.horizon == 1 else f"the next {self.horizon} trading days"
        if self.target == "variance":
            how = "Parkinson's, of high and low" if "high" in self.channels else "squared change of the close"
            return (
                f"mean daily variance of the log price over {days} ({how}); its root is the daily volatility"
            )
        if self.target == "direction":
            return f"probability that the close after {days} is above the last one"
        if self.target == "drawdown":
            return f"probability of a fall of at least {self.threshold:g} below the last close within {days}"
        return f"probability that the variance over {days} is at least {self.threshold:g} times the window's"


@dataclass(frozen=True, kw_only=True)
class Split(dataset.Split):
    """`inputs` are int64 [n], the row of `bars` [rows, C] where each window starts; `batch` cuts the windows out.

    assets  str [n]
    """

    bars: NDArray[np.float32]
    window: int
    assets: NDArray[np.str_]

    def part(self, rows: NDArray[np.integer[Any]]) -> Split:
        return replace(super().part(rows), assets=self.assets[rows])

    def batch(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """float32 [B, window, C]."""
        cut: NDArray[np.float32] = self.bars[self.inputs[rows][:, None] + np.arange(self.window)]
        return cut


@dataclass(frozen=True)
class SeriesData(dataset.Dataset):
    """A data set of windows that is ready to train on."""

    train: Split
    val: Split
    test: Split
    preprocessing: Windows


@dataclass(frozen=True)
class Samples:
    """Every window with a future, over all assets; arrays [n] but `bars` float32 [rows, C].

    origins: the last day of each window; until: the last day of what is forecast; labels as in dataset.Split.
    """

    bars: NDArray[np.float32]
    starts: NDArray[np.int64]
    labels: NDArray[Any]
    origins: Days
    until: Days
    assets: NDArray[np.str_]


def samples_of(bars: tuple[Bars, ...], windows: Windows, *, labelled: bool) -> Samples:
    """All windows of all stretches that are long enough, stretch by stretch, by rising day."""
    starts, labels, origins, until, assets, offset = [], [], [], [], [], 0
    for part in bars:
        first = np.arange(len(part.days) - windows.window - windows.horizon + 1)
        if len(first):
            last = first + windows.window - 1
            starts.append(first + offset)
            labels.append(_labels(part.values, last, windows) if labelled else np.zeros(len(first), np.int64))
            origins.append(part.days[last])
            until.append(part.days[last + windows.horizon])
            assets.append(np.full(len(first), part.asset))
        offset += len(part.days)
    rows = np.concatenate([part.values for part in bars]).astype(np.float32)
    return Samples(rows, *(np.concatenate(of) for of in (starts, labels, origins, until, assets)))


def _labels(values: Floats, last: NDArray[np.int64], windows: Windows) -> NDArray[Any]:
    """What follows each window that ends in row `last`: float32 [n, 1] of a variance, else int64 [n]."""
    ahead = last[:, None] + np.arange(1, windows.horizon + 1)
    close = values[:, windows.channels.index("close")]
    if windows.target == "direction":
        return np.asarray(close[ahead[:, -1]] > close[last], np.int64)
    if windows.target == "drawdown":
        low = values[:, windows.channels.index("low")] if "low" in windows.channels else close
        fall = 1 - low[ahead].min(axis=1) / close[last]
        return np.asarray(fall >= _threshold(windows), np.int64)
    daily = market.variance(values, windows.channels)
    future = daily[ahead].mean(axis=1)
    if windows.target == "variance":
        return np.asarray(np.maximum(future, LEAST_VARIANCE), np.float32)[:, None]
    # The first row's change is unknown without a high and a low; it is left out of the window's mean.
    before = last[:, None] - np.arange(windows.window - 1)
    return np.asarray(future >= _threshold(windows) * daily[before].mean(axis=1), np.int64)


def _threshold(windows: Windows) -> float:
    assert windows.threshold is not None
    return windows.threshold
