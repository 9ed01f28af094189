"""Windows of prices: labels from the future alone, splits that no label crosses, and nothing of the future in an input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import prices
import pytest

from tlexport.errors import DataError, RecipeError
from tlexport.modalities import market, series, splits
from tlexport.modalities.series_windows import SeriesData
from tlexport.recipe import Data


def load(path: Path, task: str = "auto", split: dict[str, Any] | None = None, **wanted: Any) -> SeriesData:
    own = {"window": 30, **wanted.pop("series", {})}
    document = {"path": str(path), "series": own, "split": split or {"val": 0.2, "test": 0.2}, **wanted}
    return series.load(Data.model_validate(document), task=task, seed=0, cache=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prices.folder(tmp_path_factory.mktemp("prices"), assets=3, days=200)


def test_windows_and_labels_are_the_files_own_numbers(folder: Path) -> None:
    data = load(folder, series={"horizon": 5})
    assert data.task == "regression" and data.class_names == ("variance",)
    for split in (data.train, data.val, data.test):
        for row in (0, len(split) // 2, len(split) - 1):
            asset, day = split.names[row].split()
            frame = pl.read_csv(folder / f"{asset}.csv")
            last = frame["Date"].to_list().index(day)
            values = frame.select("Open", "High", "Low", "Close", "Volume").to_numpy()
            np.testing.assert_allclose(
                split.batch(np.array([row]))[0], values[last - 29 : last + 1], rtol=1e-6
            )
            future = market.variance(values[last + 1 : last + 6], market.CHANNELS[0])
            assert float(split.labels[row, 0]) == pytest.approx(future.mean(), rel=1e-5)


@pytest.mark.parametrize(
    "target", [{"target": "direction"}, {"target": "drawdown", "threshold": 0.02, "horizon": 5}]
)
def test_events_are_the_files_own(folder: Path, target: dict[str, Any]) -> None:
    data, horizon = load(folder, series=target), target.get("horizon", 1)
    assert data.task == "binary" and 0.05 < data.train.labels.mean() < 0.95
    for row in range(0, len(data.test), 17):
        asset, day = data.test.names[row].split()
        frame = pl.read_csv(folder / f"{asset}.csv")
        last = frame["Date"].to_list().index(day)
        close, low = frame["Close"].to_numpy(), frame["Low"].to_numpy()
        ahead = slice(last + 1, last + 1 + horizon)
        happened = (
            close[last + horizon] > close[last]
            if target["target"] == "direction"
            else low[ahead].min() <= close[last] * (1 - 0.02)
        )
        assert data.test.labels[row] == happened


def test_spikes_are_against_the_windows_own_variance(folder: Path) -> None:
    calm, any_move = (load(folder, series={"target": "spike", "threshold": t}) for t in (1e6, 1e-6))
    assert calm.train.labels.sum() == 0 and any_move.train.labels.all()


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_no_label_reaches_into_the_next_split(folder: Path, horizon: int) -> None:
    data = load(folder, series={"horizon": horizon})
    for earlier, later in ((data.train, data.val), (data.val, data.test)):
        assert earlier.times is not None and later.times is not None
        # The files hold every day: a label's last day is `horizon` days after the window's.
        assert earlier.times.max() + horizon <= later.times.min()
    wide = load(folder, series={"horizon": horizon, "purge": horizon + 7})
    assert wide.train.times is not None and wide.val.times is not None
    assert wide.train.times.max() + horizon + 7 <= wide.val.times.min()


def test_a_changed_future_changes_no_input_and_no_earlier_label(folder: Path, tmp_path: Path) -> None:
    """The planted look-ahead: were anything of the future in a training sample, doubling all later prices would show."""
    before = load(folder, series={"horizon": 3})
    cut = before.val.times.min()  # type: ignore[union-attr]
    for file in folder.iterdir():
        frame = pl.read_csv(file)
        later = pl.col("Date") > str(cut)
        pairs = [
            pl.when(later).then(pl.col(c) * 2).otherwise(pl.col(c)) for c in ("Open", "High", "Low", "Close")
        ]
        frame.with_columns(pairs).write_csv(tmp_path / file.name)
    after = load(tmp_path, series={"horizon": 3})
    rows = np.arange(len(before.train))
    assert before.train.names == after.train.names
    assert (before.train.batch(rows) == after.train.batch(rows)).all()
    assert (before.train.labels == after.train.labels).all()
    assert not (before.test.batch(np.arange(9)) == after.test.batch(np.arange(9))).all()


def test_folds_walk_forward(folder: Path) -> None:
    folds = [load(folder, split={"val": 0.1, "test": 0.3, "folds": 3, "fold": k}) for k in range(3)]
    for data, following in itertools.pairwise(folds):
        assert data.test.times.max() < following.test.times.min()  # type: ignore[union-attr]
        assert len(data.train) < len(following.train)
    whole = load(folder, split={"val": 0.1, "test": 0.3})
    assert sum(len(data.test) for data in folds) == len(whole.test)
    with pytest.raises(DataError, match="there are 3 folds"):
        load(folder, split={"val": 0.1, "test": 0.3, "folds": 3, "fold": 3})


def test_walk_forward_holds_where_assets_miss_days() -> None:
    """An asset without prices for a month has labels that end late: they must not reach over the border."""
    days = np.datetime64("2020-01-01") + np.arange(100)
    origins, until = np.tile(days[:-1], 2), np.tile(days[1:], 2)
    until[58] = days[90]  # the next row of that asset is a month later
    rows, _ = splits.walk_forward(origins, until, (0.2, 0.2), purge=1)
    assert 58 not in rows["train"] and 57 in rows["train"]
    assert until[rows["train"]].max() <= origins[rows["val"]].min()


def test_a_day_is_a_group_and_several_where_labels_overlap(folder: Path) -> None:
    assert load(folder).report.groups["test"] == len(np.unique(load(folder).test.times))  # type: ignore[index,arg-type]
    data = load(folder, series={"horizon": 5})
    assert data.test.groups is not None and data.test.times is not None
    for group in np.unique(data.test.groups):
        assert np.ptp(data.test.times[data.test.groups == group].astype(int)) <= 4


def test_sizes_and_strides(folder: Path) -> None:
    assert len(load(folder, train_size=20).train) == 20
    small, large = (set(load(folder, train_size=n).train.names) for n in (20, 50))
    assert small < large, "a larger training set holds the smaller one"
    every, third = load(folder), load(folder, series={"stride": 3})
    assert len(third.test) == len(every.test)
    assert len(third.train) == pytest.approx(len(every.train) / 3, abs=3)


def test_a_part_is_the_same_samples(folder: Path) -> None:
    data = load(folder)
    rows = np.array([5, 2, 40])
    part = data.test.part(rows)
    assert part.names == tuple(data.test.names[row] for row in rows)
    assert (part.assets == data.test.assets[rows]).all() and len(part) == 3
    assert (part.batch(np.arange(3)) == data.test.batch(rows)).all()


def test_pretraining_sees_no_labels(folder: Path) -> None:
    data = load(folder, task="pretrain")
    assert data.task == "pretrain" and data.class_names == () and not data.train.labels.any()


def test_too_few_days_are_explained(tmp_path: Path) -> None:
    prices.bars(25).write_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"no asset has 31 days without a gap .* the longest stretch has 25"):
        load(tmp_path / "x.csv")
    prices.bars(33).write_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match="3 days cannot be split by time"):
        load(tmp_path / "x.csv")
    folder = prices.folder(tmp_path / "two", assets=2, days=100)
    prices.bars(20).write_csv(folder / "short.csv")
    assert (
        "1 assets have no 31 days without a gap and give no sample: 'short'"
        in load(folder).report.problems[0]
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"series": {"target": "drawdown"}}, r"needs data\.series\.threshold"),
        ({"series": {"threshold": 0.1}}, r"takes no data\.series\.threshold"),
        ({"series": {"target": "drawdown", "threshold": 5}}, "a share of the price"),
        ({"series": {"horizon": 5, "purge": 3}}, "less than the horizon"),
        ({"split": {"by": "random"}}, "the future would be learned from"),
        ({"task": "binary"}, "task=binary does not fit"),
    ],
)
def test_what_does_not_go_together_is_refused(folder: Path, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(folder, **wanted)


def test_new_prices_by_the_description_alone(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    names, inputs = series.samples(str(folder), data.preprocessing.describe())
    assert names[0] == "asset0 2015-07-19" and inputs.shape == (3, 30, 5) and inputs.dtype == np.float32
    expected = (
        pl.read_csv(folder / "asset0.csv").select("Open", "High", "Low", "Close", "Volume").to_numpy()[-30:]
    )
    np.testing.assert_allclose(inputs[0], expected, rtol=1e-6)
    prices.bars(20).write_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match="1 of 1 assets have no 30 days"):
        series.samples(str(tmp_path / "x.csv"), data.preprocessing.describe())
    prices.bars(50).drop("Volume").write_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match="lack open, high, low, close, volume"):
        series.samples(str(tmp_path / "x.csv"), data.preprocessing.describe())
    with pytest.raises(DataError, match="no description of windows"):
        series.samples(str(folder), {"window": 3})
