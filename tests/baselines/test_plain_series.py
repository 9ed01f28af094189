"""Plain forecasts: by their formulas, from the same windows, and their graphs answer alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import prices
import pytest

from tlexport import baselines
from tlexport.baselines import series as plain
from tlexport.errors import NotInstalledError, RecipeError
from tlexport.modalities import market, metrics, series
from tlexport.modalities.series_windows import SeriesData
from tlexport.progress import Silent
from tlexport.recipe import Data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prices.folder(tmp_path_factory.mktemp("prices"), assets=4, days=400)


def load(folder: Path, **wanted: Any) -> SeriesData:
    document = {"path": str(folder), "series": {"window": 40, **wanted}, "split": {"val": 0.2, "test": 0.2}}
    return series.load(Data.model_validate(document), task="auto", seed=0, cache=None)


TARGETS: list[dict[str, Any]] = [
    {},
    {"horizon": 5},
    {"target": "direction"},
    {"target": "spike", "threshold": 1.2},
]


@pytest.mark.parametrize("target", TARGETS)
def test_graphs_answer_as_the_library_does(folder: Path, target: dict[str, Any]) -> None:
    data = load(folder, **target)
    rows = np.arange(len(data.test))
    found = baselines.fit("series", data, ("auto",), seed=0, progress=Silent())
    assert found
    for one in found:
        assert one.test.shape == (len(data.test), len(data.class_names)) and np.isfinite(one.test).all()
        if one.graph is None:
            assert one.name == "garch" and one.why_not
            continue
        session = ort.InferenceSession(one.graph, providers=["CPUExecutionProvider"])
        assert session.get_outputs()[0].name == ("values" if data.task == "regression" else "probabilities")
        (got,) = session.run(None, {"prices": data.test.batch(rows)})
        np.testing.assert_allclose(got, one.test, rtol=1e-4)


def test_har_and_ewma_are_their_formulas(folder: Path) -> None:
    data = load(folder)
    rows = np.arange(len(data.test))
    daily = np.stack(
        [market.variance(w.astype(np.float64), market.CHANNELS[0]) for w in data.test.batch(rows)]
    )
    weights = 0.94 ** np.arange(39)[::-1]
    np.testing.assert_allclose(
        plain.ewma(data, 0).test[:, 0], daily[:, 1:] @ (weights / weights.sum()), rtol=1e-3
    )
    train = np.stack(
        [
            market.variance(w.astype(np.float64), market.CHANNELS[0])
            for w in data.train.batch(np.arange(len(data.train)))
        ]
    )

    def design(of: np.ndarray) -> np.ndarray:
        logs = np.log(of)
        return np.column_stack([np.ones(len(of)), *(logs[:, -days:].mean(axis=1) for days in (1, 5, 22))])

    labels = data.train.labels[:, 0].astype(np.float64)
    weights = np.linalg.lstsq(design(train), np.log(labels), rcond=None)[0]
    smeared = np.exp(design(daily) @ weights) * np.mean(labels / np.exp(design(train) @ weights))
    np.testing.assert_allclose(plain.har(data, 0).test[:, 0], smeared, rtol=2e-3)
    both = (plain.har(data, 0), plain.ewma(data, 0))
    judged = {b.name: metrics.evaluate(data.test.labels, b.test, "regression")["qlike"] for b in both}
    assert judged["har"] < judged["ewma"], "these variances follow an AR(1)"


def test_garch_tells_calm_from_wild(folder: Path) -> None:
    pytest.importorskip("arch")
    data = load(folder)
    found = plain.garch(data, 0)
    constant = np.full_like(found.test, data.train.labels.mean())
    judged, flat = (
        metrics.evaluate(data.test.labels, v, "regression")["qlike"] for v in (found.test, constant)
    )
    assert judged < flat and found.graph is None and "parameters of its own" in found.why_not


def test_an_event_that_the_variance_tells_is_found(folder: Path) -> None:
    data = load(folder, target="drawdown", threshold=0.03, horizon=5)
    found = plain.har_logistic(data, 0)
    assert metrics.evaluate(data.test.labels, found.test, "binary")["auc"] > 0.6
    shares = plain.majority(data, 0).test
    assert np.ptp(shares, axis=0).max() == 0 and shares[0, 1] == pytest.approx(
        data.train.labels.mean(), abs=1e-6
    )


def test_what_does_not_fit_the_target_is_refused_and_garch_needs_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"no baseline har for series data .there are: majority, momentum"):
        baselines.fit("series", load(folder, target="direction"), ("har",), seed=0, progress=Silent())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "arch" else real(name))
    data = load(folder)
    names = [one.name for one in baselines.fit("series", data, ("auto",), seed=0, progress=Silent())]
    assert names == ["har", "ewma"]
    with pytest.raises(NotInstalledError, match=r"tlexport\[series\]"):
        baselines.fit("series", data, ("garch",), seed=0, progress=Silent())
