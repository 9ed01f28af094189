"""Made-up markets: prices whose variance clusters, so that a forecast is possible, written as a desk would keep them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl


def bars(days: int, seed: int = 0, start: str = "2015-01-01") -> pl.DataFrame:
    """Open, high, low, close, volume of `days` days in a row; the log variance follows an AR(1)."""
    random = np.random.default_rng(seed)
    level = np.zeros(days)
    for day in range(1, days):
        level[day] = 0.95 * level[day - 1] + random.normal(0, 0.3)
    deviation = 0.01 * np.exp(level / 2)
    steps = random.normal(size=(days, 64)) * (deviation / 8)[:, None]
    paths = np.cumsum(np.concatenate([random.normal(0, 0.002, (days, 1)), steps], axis=1), axis=1)
    before = np.concatenate([[0.0], np.cumsum(paths[:, -1])[:-1]])
    logs = np.log(100) + before[:, None] + paths
    prices = np.exp(logs)
    dates = np.datetime64(start) + np.arange(days)
    return pl.DataFrame(
        {
            "Date": dates.astype(str),
            "Open": prices[:, 0],
            "High": prices.max(axis=1),
            "Low": prices.min(axis=1),
            "Close": prices[:, -1],
            "Volume": np.exp(12 + level + random.normal(0, 0.2, days)).round(),
        }
    )


def folder(path: Path, assets: int = 4, days: int = 300) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for number in range(assets):
        bars(days, seed=number).write_csv(path / f"asset{number}.csv")
    return path
