"""What is said of a variant: planted faults of each kind are found, and what is numerically the same passes on few samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlexport.evidence.accuracy.assessment import Assessed, Assessor, Question, adjusted
from tlexport.evidence.accuracy.comparison import Rule
from tlexport.modalities import metrics
from tlexport.results import Decision

HALF = Decision(rule="probability of at least 0.5", thresholds=(0.5,))
LEVEL = 0.025


def binary(n: int, seed: int = 0, sharp: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and the probabilities [n, 2] of a calibrated model."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-sharp * rng.normal(size=n)))
    labels = (rng.random(n) < p).astype(np.int64)
    return labels, np.stack([1 - p, p], axis=1).astype(np.float32)


def assessor(
    folder: Path,
    labels: np.ndarray,
    outputs: np.ndarray,
    metric: str = "accuracy",
    limit: float = 0.01,
    **kept: Any,
) -> Assessor:
    folder.mkdir(exist_ok=True)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "outputs.npy", outputs)
    if "times" in kept:
        np.save(folder / "times.npy", kept["times"])
    if "slices" in kept:
        np.savez(folder / "slices.npz", **kept["slices"])
    rule = Rule(
        metrics.METRICS[metric],
        metrics.HIGHER_IS_BETTER[metric],
        metric in metrics.UNBOUNDED,
        limit,
        0.95,
        500,
        0,
    )
    regression = labels.dtype.kind == "f"
    question = Question(
        metric=metric,
        task="regression" if regression else "binary",
        class_names=("value",) if regression else ("well", "ill"),
        decision=None if regression else kept.get("decision", HALF),
        horizon=1,
        least=30,
    )
    return Assessor(folder, rule, question)


def shifted(outputs: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """Probabilities of class 1 moved in logits."""
    logit = np.log(outputs[:, 1] / outputs[:, 0]) + by
    p = 1 / (1 + np.exp(-logit))
    return np.stack([1 - p, p], axis=1).astype(np.float32)


def test_rounding_errors_pass_on_few_samples_and_larger_ones_need_more(tmp_path: Path) -> None:
    """No decision changes in either; 150 samples alone leave a harmful share of 2.5% open."""
    labels, outputs = binary(150, sharp=4.0)
    own = assessor(tmp_path / "few", labels, outputs)
    rng = np.random.default_rng(1)
    fp32 = own.assess("fp32", shifted(outputs, rng.normal(size=150) * 1e-6)).drop
    assert fp32.estimate == 0 and 0 < fp32.high < 1e-3 and fp32.p is not None and fp32.p <= LEVEL
    margin = np.abs(np.log(outputs[:, 1] / outputs[:, 0]))
    coarse = shifted(outputs, np.minimum(0.3, 0.5 * margin) * rng.choice([-1, 1], 150))
    int8 = own.assess("int8", coarse)
    assert int8.evidence.flips is not None and int8.evidence.flips.count == 0
    assert (
        int8.drop.estimate == 0 and int8.drop.high > 0.01 and int8.drop.p is not None and int8.drop.p > LEVEL
    )
    labels, outputs = np.tile(labels, 8), np.tile(outputs, (8, 1))
    many = assessor(tmp_path / "many", labels, outputs).assess("int8", np.tile(coarse, (8, 1))).drop
    assert many.high < 0.01 and many.p is not None and many.p <= LEVEL


def test_a_slice_that_suffers_is_named(tmp_path: Path) -> None:
    """Planted: every second answer for one hospital of ten percent is turned around."""
    labels, outputs = binary(3000, sharp=6.0)
    rng = np.random.default_rng(2)
    hospital = rng.choice(["north", "south", "west"], size=3000, p=[0.6, 0.3, 0.1])
    hurt = (hospital == "west") & (rng.random(3000) < 0.5)
    worse = np.where(hurt[:, None], outputs[:, ::-1], outputs)
    own = assessor(tmp_path / "r", labels, outputs, limit=0.1, slices={"hospital": hospital})
    found = own.assess("int8", worse).evidence
    assert "hospital=west" in found.worst_slice
    first = found.slices[0]
    assert first.slice == "hospital=west" and first.drop is not None and first.drop > 0.3
    assert first.p is not None and first.p < 0.001
    spared = next(part for part in found.slices if part.slice == "hospital=north")
    assert spared.drop == 0 and spared.p is not None and spared.p > 0.5


def test_a_sharpened_model_is_badly_calibrated_though_no_decision_changes(tmp_path: Path) -> None:
    labels, outputs = binary(3000)
    logit = np.log(outputs[:, 1] / outputs[:, 0])
    found = assessor(tmp_path / "r", labels, outputs).assess("int8", shifted(outputs, 2 * logit)).evidence
    assert found.flips is not None and found.flips.count == 0
    assert found.calibration is not None
    assert found.calibration.ece_drift_low > 0.05 and found.calibration.brier_drift_low > 0
    assert found.calibration.ece_reference < 0.02
    assert found.auc is not None and found.auc.drop == pytest.approx(
        0, abs=1e-5
    )  # float32 answers near 1 tie


def test_flips_are_counted_at_the_operating_threshold(tmp_path: Path) -> None:
    """Planted: answers between 0.8 and 0.9 rise over a cut-off of 0.9; at 0.5 nothing changes."""
    labels, outputs = binary(1000)
    p = outputs[:, 1]
    raised = np.where((p > 0.8) & (p < 0.9), 0.95, p)
    variant = np.stack([1 - raised, raised], axis=1)
    moved = int(((p > 0.8) & (p < 0.9)).sum())
    clinical = Decision(rule="sensitivity", thresholds=(0.9,), samples=10)
    found = assessor(tmp_path / "r", labels, outputs, decision=clinical).assess("v", variant).evidence.flips
    assert found is not None and found.count == moved > 20
    harmful = int((((p > 0.8) & (p < 0.9)) & (labels == 0)).sum())
    assert (found.harmful, found.harmless) == (harmful, moved - harmful)
    plain = assessor(tmp_path / "r", labels, outputs).assess("v", variant).evidence.flips
    assert plain is not None and plain.count == 0 and plain.mcnemar_p == 1


def test_a_biased_forecast_is_told_by_its_losses(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    days = np.repeat(np.arange("2020-01-01", "2021-01-01", dtype="datetime64[D]"), 5)
    truth = rng.lognormal(-9, 1, len(days))
    labels = (truth * rng.chisquare(5, len(days)) / 5).astype(np.float32)[:, None]
    outputs = truth.astype(np.float32)[:, None]
    own = assessor(tmp_path / "r", labels, outputs, metric="qlike", times=days)
    biased = own.assess("v", outputs * 1.6).evidence
    assert biased.forecast is not None and biased.forecast.periods == 366
    assert biased.forecast.mean_difference > 0 and biased.forecast.p < 0.01
    noisy = own.assess("v", outputs * (1 + 1e-4 * rng.normal(size=outputs.shape))).evidence
    assert noisy.forecast is not None and noisy.forecast.p > 0.01
    assert biased.tails is not None and biased.tails.rmse > biased.tails.rmse_reference
    assert biased.flips is None and biased.calibration is None and biased.auc is None


def test_variants_are_so_many_chances_to_pass(tmp_path: Path) -> None:
    labels, outputs = binary(600, sharp=4.0)
    own = assessor(tmp_path / "r", labels, outputs)
    rng = np.random.default_rng(4)
    found: dict[str, Assessed] = {
        f"v{i}": own.assess(f"v{i}", shifted(outputs, 0.05 * rng.normal(size=600))) for i in range(4)
    }
    corrected = adjusted(found)
    p = sorted(one.drop.p or 0.0 for one in found.values())
    smallest = min(own.evidence.p_adjusted or 0.0 for own in corrected.values())
    assert smallest == pytest.approx(4 * p[0])
    assert all((corrected[n].evidence.p_adjusted or 0) >= (found[n].drop.p or 0) for n in found)


def test_rare_classes_weigh_more_where_classes_count_alike(tmp_path: Path) -> None:
    """1000 samples without a flip bound the accuracy's drop to 0.4%, that of the balanced accuracy by 20 ill to 10 times as much."""
    rng = np.random.default_rng(5)
    labels = np.r_[np.ones(50), np.zeros(950)].astype(np.int64)
    p = np.where(labels == 1, rng.uniform(0.7, 0.95, 1000), rng.uniform(0.05, 0.3, 1000))
    outputs = np.stack([1 - p, p], axis=1).astype(np.float32)
    coarse = shifted(outputs, rng.uniform(-0.5, 0.5, 1000))
    plain = assessor(tmp_path / "a", labels, outputs).assess("v", coarse).drop
    alike = assessor(tmp_path / "b", labels, outputs, metric="balanced_accuracy").assess("v", coarse).drop
    assert plain.estimate == alike.estimate == 0
    assert plain.high < 0.005 and alike.high == pytest.approx(10 * plain.high)
