"""Tables become three splits; what is wrong with them is counted and told, and what leaks is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.model_selection import StratifiedKFold

from tlexport.errors import DataError, LeakageError
from tlexport.modalities import tabular
from tlexport.modalities.dataset import Dataset
from tlexport.recipe import Data


def frame(n: int = 300, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    income = random.lognormal(10, 1, n)
    risk = random.random(n) < 1 / (1 + np.exp((np.log(income) - 10) * 2))
    return pl.DataFrame(
        {
            "client": np.arange(1000, 1000 + n),
            "income": income,
            "region": random.choice(["north", "south", "west"], n, p=[0.6, 0.3, 0.1]),
            "grade": random.choice([1, 2, 5], n),
            "same": ["x"] * n,
            "bad": np.where(risk, "yes", "no"),
        }
    )


def load(rows: pl.DataFrame, folder: Path, **changes: Any) -> Dataset:
    path = folder / "table.csv"
    rows.write_csv(path)
    columns = {"target": "bad", "categorical": ("grade",)} | changes.pop("table", {})
    task, seed = changes.pop("task", "auto"), changes.pop("seed", 0)
    data = Data.model_validate({"path": str(path), "table": columns, **changes})
    return tabular.load(data, task=task, seed=seed, cache=None)


def test_the_schema_is_what_the_columns_are(tmp_path: Path) -> None:
    data = load(frame(), tmp_path)
    schema = data.preprocessing
    assert [(c.name, c.kind) for c in schema.columns] == [
        ("income", "numeric"),
        ("region", "categorical"),
        ("grade", "categorical"),
    ]
    assert schema.columns[1].vocabulary == ("north", "south", "west")
    assert sorted(schema.columns[2].codes()) == [1.0, 2.0, 5.0]
    assert "identifier" in schema.excluded["client"] and "constant" in schema.excluded["same"]
    assert any("left out: client" in note for note in data.report.notes)
    assert data.task == "binary" and data.class_names == ("no", "yes")
    assert data.train.inputs.dtype == np.float32
    assert not set(data.train.names) & set(data.test.names)


def test_cells_are_encoded_as_the_manifest_says(tmp_path: Path) -> None:
    schema = load(frame(), tmp_path).preprocessing
    rows = pl.DataFrame(
        {"income": ["1e6", None], "region": ["south", "east"], "grade": ["5.0", None], "new": [1, 2]}
    )
    features, wrong = schema.encode(rows)
    np.testing.assert_array_equal(features, np.array([[1e6, 1, 5], [np.nan, -1, np.nan]], np.float32))
    assert wrong == {}


def test_a_changed_schema_names_the_columns(tmp_path: Path) -> None:
    schema = load(frame(), tmp_path).preprocessing
    with pytest.raises(DataError, match=r"lacks 1 columns of the schema: 'income'; .*did not have: 'Income'"):
        schema.encode(frame().rename({"income": "Income"}))


def test_text_in_a_numeric_column_is_counted_and_bounded(tmp_path: Path) -> None:
    cells = [f"{value:.2f}" for value in frame()["income"]]
    cells[3], cells[7] = "n.a.", "unknown"
    table = frame().with_columns(pl.Series("income", cells))
    with pytest.raises(
        DataError, match=r"2 of 300 cells of the numeric column 'income' are no numbers, the first: 'n.a.'"
    ):
        load(table, tmp_path)
    data = load(table, tmp_path, max_corrupt=2)
    assert "2 of 300 cells" in data.report.problems[0]
    parts = [split.inputs for split in (data.train, data.val, data.test)]
    assert int(np.isnan(np.concatenate(parts)[:, 0]).sum()) == 2


def test_rows_without_a_label_are_counted_and_bounded(tmp_path: Path) -> None:
    labels = frame()["bad"].to_list()
    labels[5] = None
    table = frame().with_columns(pl.Series("bad", labels))
    with pytest.raises(DataError, match="1 of 300 rows have no label, the first is row 7"):
        load(table, tmp_path)
    assert sum(load(table, tmp_path, max_corrupt=0.01).report.samples.values()) == 299


def test_a_column_that_gives_the_label_away_is_reported(tmp_path: Path) -> None:
    assert load(frame(), tmp_path).report.leaks == ()
    paid = pl.when(pl.col("bad") == "yes").then(pl.lit(0.0)).otherwise(pl.col("income")).alias("paid_back")
    leaks = load(frame().with_columns(paid), tmp_path).report.leaks
    assert len(leaks) == 1 and "'paid_back' alone predicts the label" in leaks[0]
    assert load(frame().with_columns(paid), tmp_path, table={"exclude": ("paid_back",)}).report.leaks == ()


def test_rows_on_both_sides_are_reported_dropped_or_refused(tmp_path: Path) -> None:
    table = pl.concat([frame(), frame()[:40]]).drop("client")
    assert "test rows have the same features as a train row" in load(table, tmp_path).report.leaks[0]
    with pytest.raises(LeakageError, match="test rows"):
        load(table, tmp_path, duplicates="fail")
    kept = load(table, tmp_path, duplicates="drop")
    known = {row.tobytes() for row in kept.train.inputs}
    assert not any(row.tobytes() in known for row in kept.test.inputs)


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    table = frame().with_columns(pl.Series("household", [f"h{i % 40}" for i in range(300)]))
    data = load(table, tmp_path, table={"group": "household"})
    sides = [set(split.groups) for split in (data.train, data.val, data.test) if split.groups is not None]
    assert len(sides) == 3
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert "household" in data.preprocessing.excluded


def test_folds_are_those_of_scikit_learn(tmp_path: Path) -> None:
    table = frame()
    labels = (table["bad"] == "yes").to_numpy().astype(int)
    theirs = [test for _, test in StratifiedKFold(5, shuffle=True, random_state=3).split(labels, labels)]
    for fold, test in enumerate(theirs):
        data = load(table, tmp_path, seed=3, split={"folds": 5, "fold": fold})
        assert data.test.names == tuple(f"row {row + 2}" for row in test)


def test_a_split_by_time_has_the_latest_rows_in_test(tmp_path: Path) -> None:
    days = [f"2024-{1 + i // 28:02d}-{1 + i % 28:02d}" for i in np.random.default_rng(1).permutation(300)]
    table = frame().with_columns(pl.Series("day", days))
    data = load(table, tmp_path, table={"time": "day"}, split={"by": "time"})
    moment = {f"row {i + 2}": day for i, day in enumerate(days)}
    train, val, test = ([moment[name] for name in split.names] for split in (data.train, data.val, data.test))
    assert max(train) < min(val) and max(val) < min(test)


def test_fewer_training_rows_leave_the_test_split_alone(tmp_path: Path) -> None:
    whole, few = load(frame(), tmp_path), load(frame(), tmp_path, train_size=50)
    assert len(few.train) == 50 and few.test.names == whole.test.names
    assert set(few.train.names) < set(whole.train.names)


def test_pretraining_sees_the_same_split_without_labels(tmp_path: Path) -> None:
    labelled, unlabelled = load(frame(), tmp_path), load(frame(), tmp_path, task="pretrain")
    assert unlabelled.train.names == labelled.train.names and unlabelled.test.names == labelled.test.names
    assert unlabelled.class_names == () and not unlabelled.train.labels.any()


def test_values_and_several_labels(tmp_path: Path) -> None:
    data = load(frame(), tmp_path, table={"target": "income", "categorical": ()})
    assert data.task == "regression" and data.train.labels.shape == (210, 1)
    flags = frame().with_columns(a=pl.Series([1, 0, None] * 100), b=pl.Series([0, 1, 1] * 100))
    data = load(flags, tmp_path, table={"target": ("a", "b")}, max_corrupt=300)
    assert data.task == "multilabel" and set(np.unique(data.train.labels)) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": {"target": None}}, "data.table.target is not set; the columns are: client"),
        ({"table": {"target": "worse"}}, "there is no column 'worse'"),
        ({"table": {"exclude": ("nothing",)}}, "data.table names 'nothing'"),
        ({"task": "binary", "table": {"target": "region"}}, "has 3 classes"),
        ({"split": {"folds": 3, "fold": 3}}, "there are 3 folds"),
        ({"table": {"exclude": ("income", "region", "grade")}}, "no column is left"),
    ],
)
def test_mistakes_say_what_there_is(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(frame(), tmp_path, **changes)
