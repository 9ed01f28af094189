"""Tables as people have them: what is wrong is refused by name or counted and told, and never ends in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tlexport.errors import DataError
from tlexport.modalities import tabular
from tlexport.modalities.dataset import Dataset
from tlexport.recipe import Data

N = 120
SPLIT = ["train"] * 80 + ["val"] * 20 + ["Test"] * 20
LATE = pl.int_range(N) >= 100  # the rows of the test split
Change = Callable[[pl.DataFrame], pl.DataFrame]


def frame() -> pl.DataFrame:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, N))
    kind = random.choice(["x", "y", "z"], N)
    return pl.DataFrame({"a": a, "b": b, "kind": kind, "split": SPLIT, "y": np.where(a + b > 0, "yes", "no")})


def load(rows: pl.DataFrame, folder: Path, *, task: str = "auto", **changes: Any) -> Dataset:
    path = folder / "table.parquet"
    rows.write_parquet(path)
    columns = {"target": "y", "split": "split"} | changes.pop("table", {})
    data = Data.model_validate({"path": str(path), "table": columns, **changes})
    return tabular.load(data, task=task, seed=0, cache=None)


def test_what_differs_in_test_is_told(tmp_path: Path) -> None:
    assert load(frame(), tmp_path).report.problems == ()
    rows = frame().with_columns(
        a=pl.when(LATE).then(None).otherwise("a"), kind=pl.when(LATE).then(pl.lit("new")).otherwise("kind")
    )
    problems = load(rows, tmp_path).report.problems
    assert "the column 'a' is empty in test" in problems[0]
    assert problems[1] == "20 of 20 test rows have a category in 'kind' that train does not have"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.with_columns(y=pl.when(LATE).then(pl.lit("other")).otherwise("y")),
            "test has rows of 'other' and train has none",
        ),
        (
            lambda rows: rows.with_columns(y=pl.when(pl.int_range(N) < 80).then(pl.lit("yes")).otherwise("y")),
            "val has rows of 'no' and train has none",
        ),
        (lambda rows: rows.with_columns(y=pl.lit("yes")), "y has one class only"),
        (lambda rows: rows.with_columns(y=pl.lit(None, pl.String)), "120 of 120 rows have no label"),
        (lambda rows: rows.with_columns(y=pl.Series([[1], [2]] * 60)), r"'y' holds List\(Int64\) cells"),
        (lambda rows: rows.select("y", "split"), "no column is left to learn from"),
        (
            lambda rows: rows.with_columns(c=pl.lit(1.0)).select("c", "y", "split"),
            r"no column is left to learn from \(.*c: constant in train\)",
        ),
        (
            lambda rows: rows.with_columns(split=pl.when(LATE).then(pl.lit("holdout")).otherwise("split")),
            "'split' must say train, val or test; it has: 'holdout'",
        ),
        (
            lambda rows: rows.with_columns(split=pl.when(LATE).then(None).otherwise("split")),
            "20 of 120 rows have no 'split'",
        ),
        (
            lambda rows: rows.with_columns(a=pl.when(LATE).then(float("inf")).otherwise("a")),
            "20 of 120 cells of the numeric column 'a' are no numbers, the first: 'inf'",
        ),
        (
            lambda rows: rows.with_columns(a=pl.when(LATE).then(1e300).otherwise("a")),
            "20 of 120 cells of the numeric column 'a' are no numbers, the first: '1e",
        ),
        (lambda rows: rows.head(1), "one class only"),
        (lambda rows: rows.head(2).with_columns(y=pl.Series(["yes", "no"])), "2 samples cannot be split into 3 parts"),
    ],
)  # fmt: skip
def test_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(change(frame()), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": {"target": ["a", "a"]}}, "names a column twice"),
        ({"table": {"numeric": ["kind"]}}, "data.table.numeric names 'kind', which holds no number"),
        ({"table": {"group": "gap"}}, "60 of 120 rows have no 'gap', by which the rows are split"),
        ({"table": {"time": "gap"}, "split": {"by": "time"}}, "60 of 120 rows have no 'gap'"),
        (
            {"table": {"time": "slashes"}, "split": {"by": "time"}},
            r"orders rows by numbers or ISO dates .*'slashes' has: '01/01/2024'",
        ),
        (
            {"class_names": ["no", "yes", "maybe"], "table": {"exclude": ["vast"]}},
            "there is no row of 'maybe' to train on",
        ),
        ({"table": {"target": "vast"}}, "120 rows have a value of vast beyond float32"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = frame().with_columns(
        gap=pl.Series([None, "g"] * 60),
        slashes=pl.Series([f"{1 + i % 28:02d}/01/2024" for i in range(N)]),
        vast=pl.col("a") * 1e300 + 1e290,
    )
    with pytest.raises(DataError, match=message):
        load(rows, tmp_path, **changes)


def test_numbers_that_tell_the_time_are_ordered_as_numbers(tmp_path: Path) -> None:
    """As texts 100 would come before 20."""
    order = np.random.default_rng(1).permutation(N)
    rows = frame().with_columns(t=pl.Series([str(i) for i in order]))
    data = load(rows, tmp_path, table={"time": "t", "split": None}, split={"by": "time"})
    moment = {f"row {i + 2}": value for i, value in enumerate(order)}
    train, test = ([moment[name] for name in split.names] for split in (data.train, data.test))
    assert max(train) < min(test) and min(test) == 102


def test_what_is_no_value_a_cell_is_left_out_and_told(tmp_path: Path) -> None:
    rows = frame().with_columns(
        tags=pl.Series([["u"], ["v", "w"]] * 60),
        record=pl.struct("a", "b"),
        blob=pl.Series([b"1", b"2"] * 60),
        nothing=pl.Series([None] * N),
        same=pl.lit("s"),
    )
    data = load(rows, tmp_path)
    assert [column.name for column in data.preprocessing.columns] == ["a", "b", "kind"]
    excluded = data.preprocessing.excluded
    assert "List(String) cells" in excluded["tags"] and "Struct" in excluded["record"]
    assert "Binary" in excluded["blob"] and excluded["nothing"] == "empty in train"
    assert sum("left out" in note for note in data.report.notes) == 6


@pytest.mark.parametrize("task", ["multiclass", "regression", "multilabel"])
def test_a_column_that_gives_the_label_away_is_seen_in_every_task(task: str, tmp_path: Path) -> None:
    rows = frame()
    target: Any = "y"
    if task == "multiclass":
        rows = rows.with_columns(y="kind", leak=pl.col("kind").replace_strict({"x": 3.0, "y": 1.0, "z": 2.0}))
        rows = rows.drop("kind")
    elif task == "regression":
        rows = rows.with_columns(y=pl.Series(np.random.default_rng(2).normal(size=N)))
        rows = rows.with_columns(leak=pl.col("y").exp() * 7)
    else:
        flags = np.random.default_rng(3).integers(0, 2, (N, 2))
        rows = rows.with_columns(y=pl.Series(flags[:, 0]), z=pl.Series(flags[:, 1]))
        rows, target = rows.with_columns(leak=1 - pl.col("z")), ["y", "z"]
    (leak,) = load(rows, tmp_path, task=task, table={"target": target}).report.leaks
    assert "the column 'leak' alone predicts" in leak
    assert load(rows.drop("leak"), tmp_path, task=task, table={"target": target}).report.leaks == ()


def test_a_class_of_few_rows_is_told_apart_by_chance_and_reported_by_none(tmp_path: Path) -> None:
    rows = frame().with_columns(
        y=pl.when(pl.int_range(N) < 4).then(pl.lit("rare")).otherwise(pl.lit("usual"))
    )
    rows = rows.with_columns(chance=pl.when(pl.int_range(N) < 4).then(9.0).otherwise("a"))
    assert load(rows, tmp_path).report.leaks == ()


def test_categories_that_are_numbers_keep_apart(tmp_path: Path) -> None:
    """-1 may be a category, 1 and 1.0 are one, and whole numbers past 2^24 would be one float32."""
    rows = frame().with_columns(
        status=pl.Series(["-1", "0", "1", "1.0"] * 30), code=pl.Series([16777216, 16777217] * 60)
    )
    schema = load(rows, tmp_path, table={"categorical": ["status", "code"]}).preprocessing
    status, code = schema.columns[-2:]
    assert sorted(status.vocabulary) == ["-1", "0", "1"] and status.unknown == -2 and status.numbers
    assert sorted(code.vocabulary) == ["16777216", "16777217"] and not code.numbers
    new = pl.DataFrame(
        {"a": [0.0] * 4, "b": [0.0] * 4, "kind": ["x"] * 4}
        | {"status": ["-1.0", "01", "5", None], "code": [16777217, 16777216, 1, None]}
    )
    features, wrong = schema.encode(new)
    assert wrong == {}
    np.testing.assert_array_equal(features[:, 3], [-1, 1, -2, np.nan])
    codes = dict(zip(code.vocabulary, code.codes(), strict=True))
    expected = [codes["16777217"], codes["16777216"], code.unknown, np.nan]
    np.testing.assert_array_equal(features[:, 4], np.array(expected, np.float32))


def test_three_hundred_columns_with_any_names(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    wide = {f"größe {i} 📏": random.normal(size=N) for i in range(300)}
    data = load(frame().with_columns(**wide), tmp_path)
    assert data.train.inputs.shape == (80, 303) and data.preprocessing.columns[5].name == "größe 2 📏"


def test_values_near_the_end_of_float32_stay_finite(tmp_path: Path) -> None:
    rows = frame().with_columns(vast=pl.Series([3e38, -3e38, 1.0] * 40))
    assert np.isfinite(load(rows, tmp_path).train.inputs).all()
