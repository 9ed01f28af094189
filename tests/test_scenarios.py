"""Every shipped recipe goes the whole way on real rows by its `quick` set, through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from pipeline import Ended

from tlexport.baselines import BASELINES
from tlexport.recipe import load, sets_of, shipped
from tlexport.tensors import named

# Where the recipe's own data is the user's or has to be downloaded, what stands for it in the folder of real data.
DATA = {
    "chest-xray": "pneumoniamnist/pneumoniamnist.npz",
    "cifar10-resnet50": "cifar10_subset/cifar10_subset.npz",
    "gi-lesion": "hymenoptera",
    "insects": "hymenoptera",
    "pathology": "blood_cells/blood_cells.npz",
    "credit-scoring": "credit/uci_credit_card_default.csv",
    "credit-pretrain": "credit/uci_credit_card_default.csv",
    "market-pretrain": "market_ohlcv",
    "price-direction": "market_ohlcv",
    "risk-events": "market_ohlcv",
    "volatility": "market_ohlcv",
    "volatility-week": "market_ohlcv",
    "drug-activity": "molecules/bace.csv",
    "drug-property": "molecules/delaney-processed.csv",
    "drug-tox21": "molecules/tox21.csv",
    "molecule-pretrain": "molecules/delaney-processed.csv",
}
EXTRA = {"tabular": "lightgbm", "molecule": "rdkit"}
Run = Callable[..., Ended]


def data_of(name: str, request: pytest.FixtureRequest) -> list[str]:
    if name not in DATA:
        return []
    folder: Path = request.getfixturevalue("shared_data")
    return [f"data.path={folder / DATA[name]}"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_has_a_quick_set_that_parses(name: str) -> None:
    assert "quick" in sets_of(name)
    assert load(name, sets=["quick"]).name == name


@pytest.mark.parametrize("name", sorted(name for name in shipped() if not name.endswith("-pretrain")))
def test_goes_the_whole_way(name: str, tlx: Run, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe = load(name)
    if recipe.modality in EXTRA:
        pytest.importorskip(EXTRA[recipe.modality])
    if recipe.backbone.weights.startswith("package:"):
        pytest.importorskip(recipe.backbone.weights.removeprefix("package:"))
    words = [
        *data_of(name, request),
        *(["backbone.weights=none"] if recipe.backbone.weights == "default" else []),
    ]
    done = tlx("finetune", name, *words, "--set", "quick", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    tuned = done.json
    assert np.isfinite(list(tuned["metrics"]["test"].values())).all()
    assert tuned["baselines"] or not BASELINES[recipe.modality], "a plain model must stand beside"
    done = tlx("build", tmp_path / "run", "--out", tmp_path / "bundle", "--json")
    assert done.code == 0, done.err
    require_golden(tmp_path / "bundle", done.json)


def require_golden(bundle: Path, built: dict[str, Any]) -> None:
    """A client that has only the bundle: its graph answers the golden samples as the reference did."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = [spec["name"] for spec in manifest["inputs"]]
    inputs = np.load(bundle / "golden/inputs.npy", allow_pickle=False)
    expected = np.load(bundle / "golden/outputs.npy", allow_pickle=False)
    session = ort.InferenceSession(bundle / "graphs/fp32.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run([manifest["outputs"][0]["name"]], named(inputs, names))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(np.abs(expected).max())))
    assert built["chosen"]["cpu"]


@pytest.mark.parametrize("name", sorted(name for name in shipped() if name.endswith("-pretrain")))
def test_pretrains(name: str, tlx: Run, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if load(name).modality in EXTRA:
        pytest.importorskip(EXTRA[load(name).modality])
    done = tlx(
        "pretrain", name, *data_of(name, request), "--set", "quick", "--out", tmp_path / "run", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["val_loss"] < done.json["first_loss"]
    again = tlx(
        "pretrain", name, *data_of(name, request), "--set", "quick", "--out", tmp_path / "run", "--json"
    )
    assert again.json == done.json
    assert "unchanged" in again.err


def test_a_plain_baseline_goes_the_same_way(tlx: Run, tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    pytest.importorskip("onnxmltools")
    done = tlx("finetune", "breast-cancer", "--set", "quick", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    won = min(done.json["baselines"], key=lambda baseline: baseline["lead"])
    assert won["lead"] < 0, "three epochs do not beat logistic regression"
    assert (
        done.json["headline"].startswith(f"The plain baseline {won['name']}")
        and won["run"] in done.json["headline"]
    )
    done = tlx("build", won["run"], "--out", tmp_path / "bundle", "--json")
    assert done.code == 0, done.err
    assert done.json["chosen"] == {"cpu": "cpu-onnxruntime-fp32"}
    assert done.json["reference"]["p50_ms"] is None and done.json["variants"][0]["p50_ms"] > 0
    require_golden(tmp_path / "bundle", done.json)
