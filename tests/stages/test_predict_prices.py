"""predict on prices: a desk's folder of raw prices becomes a forecast an asset."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import prices
import pytest
from pipeline import Ended

Cli = Callable[..., Ended]
TINY = (
    "data.series.window=32",
    "backbone.options={width: 8, summary: 16, depth: 1}",
    "transfer.epochs=1",
    "verify.resamples=200",
    "gates.max_drop=1",
    "bench.samples=10",
    "bench.batch_sizes=[1]",
    "calibration.samples=16",
    "precision=[fp32]",
)


@pytest.fixture
def bundle(tlx: Cli, tmp_path: Path) -> Path:
    folder = prices.folder(tmp_path / "prices", assets=3, days=260)
    done = tlx("finetune", "volatility", f"data.path={folder}", *TINY, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert {b["name"] for b in done.json["baselines"]} >= {"har", "ewma"}
    done = tlx("build", tmp_path / "run", "--out", tmp_path / "bundle", "--json")
    assert done.code == 0, done.err
    return tmp_path / "bundle"


def test_a_folder_of_prices_becomes_a_forecast_an_asset(tlx: Cli, bundle: Path, tmp_path: Path) -> None:
    folder = prices.folder(tmp_path / "new", assets=2, days=60)
    out = tmp_path / "forecast.csv"
    done = tlx("predict", bundle, folder, "--out", out, "--json")
    assert done.code == 0, done.err
    rows = list(csv.DictReader(out.open()))
    assert [row["name"] for row in rows] == ["asset0 2015-03-01", "asset1 2015-03-01"]
    assert all(1e-6 < float(row["variance"]) < 1e-2 for row in rows)
    # The planted wild day: the last day's range ten times as wide must raise that asset's forecast, and no other's.
    wild = pl.read_csv(folder / "asset0.csv").with_row_index()
    last = pl.col("index") == len(wild) - 1
    wild = wild.with_columns(High=pl.when(last).then(pl.col("High") * 1.2).otherwise(pl.col("High"))).drop(
        "index"
    )
    wild.write_csv(folder / "asset0.csv")
    done = tlx("predict", bundle, folder, "--out", out, "--json")
    after = list(csv.DictReader(out.open()))
    assert float(after[0]["variance"]) > 1.5 * float(rows[0]["variance"])
    assert np.isclose(float(after[1]["variance"]), float(rows[1]["variance"]), rtol=1e-5)


def test_prices_that_cannot_be_are_refused(tlx: Cli, bundle: Path, tmp_path: Path) -> None:
    prices.bars(60).with_columns(Low=pl.lit(-1.0)).write_csv(tmp_path / "x.csv")
    done = tlx("predict", bundle, tmp_path / "x.csv", "--out", tmp_path / "o.csv")
    assert done.code == 3 and "60 rows have a price of zero or below" in done.err
    prices.bars(10).write_csv(tmp_path / "x.csv")
    done = tlx("predict", bundle, tmp_path / "x.csv", "--out", tmp_path / "o.csv")
    assert done.code == 3 and "have no 32 days" in done.err
