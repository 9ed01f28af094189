"""Price files in every layout, and every row that no market can have printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import prices
import pytest

from tlexport.errors import DataError
from tlexport.modalities import market
from tlexport.recipe import Data, Series


def read(path: Path, **series: object) -> market.Market:
    return market.read(Data.model_validate({"path": str(path), "series": series}))


def test_a_folder_a_long_table_and_parquet_hold_the_same(tmp_path: Path) -> None:
    folder = prices.folder(tmp_path / "folder", assets=2, days=50)
    found = read(folder)
    assert [part.asset for part in found.bars] == ["asset0", "asset1"] and found.channels == market.CHANNELS[
        0
    ]
    assert found.rows == 100 and found.problems == ()
    frames = [pl.read_csv(file).with_columns(ticker=pl.lit(file.stem)) for file in sorted(folder.iterdir())]
    long = pl.concat(frames).sample(fraction=1.0, shuffle=True, seed=0)
    long.write_csv(tmp_path / "long.csv")
    long.with_columns(pl.col("Date").str.to_date()).write_parquet(tmp_path / "long.parquet")
    for name in ("long.csv", "long.parquet"):
        other = {part.asset: part for part in read(tmp_path / name).bars}
        for part in found.bars:
            assert (other[part.asset].days == part.days).all()
            np.testing.assert_allclose(other[part.asset].values, part.values, rtol=1e-12)


def test_a_wide_table_of_closes(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"Date": ["2020-01-01", "2020-01-02", "2020-01-03"], "A": [1.0, 2, 3], "B": [None, 5.0, 6]}
    )
    frame.write_csv(tmp_path / "wide.csv")
    found = read(tmp_path / "wide.csv")
    assert found.channels == ("close",)
    assert {part.asset: part.values[:, 0].tolist() for part in found.bars} == {"A": [1, 2, 3], "B": [5, 6]}


@pytest.mark.parametrize(
    "written",
    ["2020-02-03", "2020-02-03T00:00:00", "2020/02/03", "20200203", "03.02.2020", "2/3/2020", "02/03/2020"],
)
def test_dates_as_people_write_them(written: str, tmp_path: Path) -> None:
    pl.DataFrame({"date": [written], "close": ["1.5"]}).write_csv(tmp_path / "x.csv")
    assert str(read(tmp_path / "x.csv").bars[0].days[0]) == "2020-02-03"


FAULTS = {
    "have a price of zero or below": {"Low": "0", "Open": "0"},
    "lack a price or hold text for one": {"Close": "n/v"},
    "have no date": {"Date": "yesterday"},
    "have a volume below zero": {"Volume": "-1"},
    "have an open or close outside the day's range": {"Close": "1000"},
    "have a high equal to the low": {"Open": "7", "High": "7", "Low": "7", "Close": "7"},
    "repeat a moment of the same asset": {"Date": "2015-01-03"},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_an_impossible_row_stops_the_command_or_is_counted(reason: str, tmp_path: Path) -> None:
    lines = prices.bars(40).with_columns(pl.all().cast(pl.String)).to_dicts()
    lines[20] |= FAULTS[reason]
    pl.DataFrame(lines).write_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"1 of 40 rows .* cannot be used") as stop:
        read(tmp_path / "x.csv")
    assert reason in str(stop.value) and "row 22" in str(stop.value)
    found = market.read(Data(path=str(tmp_path / "x.csv"), max_corrupt=1))
    assert len(found.bars[0].days) == 39 and reason in found.problems[0]


def test_no_window_may_cross_a_gap(tmp_path: Path) -> None:
    frame = pl.concat([prices.bars(30), prices.bars(30, start="2016-01-01")])
    frame.write_csv(tmp_path / "x.csv")
    found = read(tmp_path / "x.csv")
    assert [len(part.days) for part in found.bars] == [30, 30]
    assert any("1 gaps of more than 10 days" in note for note in found.notes)
    assert len(read(tmp_path / "x.csv", max_gap=1000).bars) == 1


def test_rows_may_have_times_of_day_and_other_names(tmp_path: Path) -> None:
    rows = {
        "Timestamp": ["2020-01-02 09:30", "2020-01-02T10:30:00", "2020-01-02 11:30:00-05:00"],
        "Adj Close": [1.0, 2, 3],
        "Vol": [5, 6, 7],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "x.csv")
    (found,) = read(tmp_path / "x.csv").bars
    assert found.asset == "x" and found.values[:, 0].tolist() == [1, 2, 3]
    assert [str(moment) for moment in found.days] == [
        "2020-01-02T09:30:00",
        "2020-01-02T10:30:00",
        "2020-01-02T11:30:00",
    ]
    zoned = [f"2020-01-{day} 00:00:00-05:00" for day in ("02", "03", "06")]
    pl.DataFrame(rows | {"Timestamp": zoned}).write_csv(tmp_path / "x.csv")
    assert [str(day) for day in read(tmp_path / "x.csv").bars[0].days] == [
        "2020-01-02",
        "2020-01-03",
        "2020-01-06",
    ]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not there .*skfolio/sp500"):
        read(tmp_path / "nothing.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no price files"):
        read(tmp_path / "empty")
    pl.DataFrame({"when": ["2020-01-01"], "close": [1.0]}).write_csv(tmp_path / "x.csv")
    with pytest.raises(
        DataError, match=r"no date column is among when, close; name it with data\.series\.time"
    ):
        read(tmp_path / "x.csv")
    assert read(tmp_path / "x.csv", time="when").rows == 1
    with pytest.raises(DataError, match=r"data\.series\.asset=who is no column"):
        read(tmp_path / "x.csv", time="when", asset="who")
    folder = prices.folder(tmp_path / "two", assets=2, days=5)
    prices.bars(5).drop("High").write_csv(folder / "asset1.csv")
    assert read(folder).channels == ("close",)
    with pytest.raises(DataError, match="1 of 2 assets lack open, high, low, close, volume: 'asset1'"):
        market.read(Data(path=str(folder)), market.CHANNELS[0])


def test_packaged_sets() -> None:
    pytest.importorskip("skfolio")
    pytest.importorskip("arch")
    found = market.read(Data(path="skfolio/sp500"))
    assert len(found.bars) == 20 and found.channels == ("close",) and len(found.bars[0].days) > 8000
    index = market.read(Data(path="arch/sp500", series=Series()))
    assert index.channels == market.CHANNELS[0] and str(index.bars[0].days[0]) == "1999-01-04"


def test_variance_is_parkinsons_or_the_closes() -> None:
    values = np.array([[10.0, 11, 9.5, 10.5], [10.5, 12, 10, 11]])
    found = market.variance(values, market.OHLC)
    np.testing.assert_allclose(found, np.log([11 / 9.5, 12 / 10]) ** 2 / (4 * np.log(2)))
    np.testing.assert_allclose(market.variance(values[:, 3:], ("close",)), [0, np.log(11 / 10.5) ** 2])
