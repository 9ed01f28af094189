"""Plain models for tables: as good as the library says, and their graphs answer as the library does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import polars as pl
import pytest

from tlexport import baselines
from tlexport.baselines import fitted
from tlexport.errors import NotInstalledError, RecipeError
from tlexport.modalities import metrics, tabular
from tlexport.modalities.dataset import Dataset
from tlexport.progress import Silent
from tlexport.recipe import Data

pytest.importorskip("lightgbm")


@pytest.fixture(params=["binary", "multiclass", "regression"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    random = np.random.default_rng(0)
    n = 600
    amount, rate = random.lognormal(8, 1, n), random.normal(size=n)
    kind = random.choice(["a", "b", "c"], n)
    score = amount / 5000 + (kind == "b") + 0.3 * rate - 1
    labels = {
        "binary": np.where(score > 0, "yes", "no"),
        "multiclass": np.array(["low", "middle", "top"])[np.digitize(score, [0, 1])],
        "regression": score * 1000,
    }[request.param]
    table = pl.DataFrame({"amount": amount, "rate": rate, "kind": kind, "y": labels})
    table = table.with_columns(rate=pl.when(pl.col("rate") > 1.5).then(None).otherwise(pl.col("rate")))
    table.write_csv(tmp_path / "table.csv")
    recipe = Data.model_validate({"path": str(tmp_path / "table.csv"), "table": {"target": "y"}})
    return tabular.load(recipe, task="auto", seed=0, cache=None)


def test_they_learn_and_their_graphs_say_the_same(data: Dataset) -> None:
    for found in baselines.fit("tabular", data, ("auto",), seed=0, progress=Silent()):
        judged = metrics.evaluate(data.test.labels, found.test, data.task)
        assert judged["r2" if data.task == "regression" else "auc"] > 0.8, found.name
        assert found.graph is not None, found.why_not
        session = ort.InferenceSession(found.graph, providers=["CPUExecutionProvider"])
        (output,) = session.get_outputs()
        assert output.name == ("values" if data.task == "regression" else "probabilities")
        (got,) = session.run(None, {"features": data.test.inputs})
        scale = float(np.ptp(found.test)) if data.task == "regression" else 1.0
        np.testing.assert_allclose(got, found.test, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_several_labels_or_values_are_each_learned(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 600))
    table = pl.DataFrame({"a": a, "b": b, "one": a - b, "other": a + b})
    if kind == "labels":
        # The second label is measured in a third of the rows; the third never holds.
        known = np.arange(600) % 3 == 0
        table = table.with_columns(
            one=(table["one"] > 0).cast(pl.Int8),
            other=pl.when(pl.Series(known)).then((table["other"] > 0).cast(pl.Int8)),
            never=pl.lit(0),
        )
    table.write_csv(tmp_path / "table.csv")
    target = table.columns[2:]
    recipe = Data.model_validate({"path": str(tmp_path / "table.csv"), "table": {"target": target}})
    data = tabular.load(recipe.model_copy(update={"max_corrupt": 600}), task="auto", seed=0, cache=None)
    for found in baselines.fit("tabular", data, ("auto",), seed=0, progress=Silent()):
        assert found.test.shape == data.test.labels.shape and found.test.dtype == np.float32
        judged = metrics.evaluate(data.test.labels[:, :2], found.test[:, :2], data.task)
        assert judged["auc" if kind == "labels" else "r2"] > 0.9, found.name
        assert found.graph is not None or "only a single one becomes a graph" in found.why_not
        if kind == "labels":
            assert not found.test[:, 2].any()


def test_a_graph_that_answers_otherwise_is_not_offered(data: Dataset) -> None:
    (found,) = baselines.fit("tabular", data, ("linear",), seed=0, progress=Silent())
    assert found.graph is not None
    graph = onnx.load_from_string(found.graph)
    content, why = fitted.checked(
        graph, data, data.val.inputs, "features", found.val + 0.01 * np.ptp(found.val)
    )
    assert content is None and "differs from the library by" in why


def test_an_unknown_name_lists_what_there_is(data: Dataset) -> None:
    with pytest.raises(RecipeError, match="there are: linear, lightgbm"):
        baselines.fit("tabular", data, ("xgboost",), seed=0, progress=Silent())


def test_an_extra_that_is_not_there_is_told_or_an_error(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lightgbm" else real(name))
    told: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "warn", told.append)
    found = baselines.fit("tabular", data, ("auto",), seed=0, progress=progress)
    assert len(found) == 1 and found[0].name in ("logistic_regression", "ridge")
    assert "tlexport[tabular]" in told[0]
    with pytest.raises(NotInstalledError):
        baselines.fit("tabular", data, ("lightgbm",), seed=0, progress=Silent())
