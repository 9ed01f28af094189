from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tlexport.evidence.accuracy.comparison import Comparison, Rule
from tlexport.modalities import metrics
from tlexport.recipe import parse


def _rule(metric: str, max_drop: float) -> Rule:
    recipe = parse(
        {"name": "x", "metric": metric, "data": {"path": "x"}, "gates": {"max_drop": max_drop}},
        [],
        origin="test",
    )
    return Rule.of(recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)


def _decided(right: int, of: int) -> np.ndarray:
    """Probabilities [n, 2] of a model that decides so many of the samples of class 1 rightly."""
    p = np.where(np.arange(of) < right, 0.9, 0.1)
    return np.stack([1 - p, p], axis=1).astype(np.float32)


def test_five_of_a_thousand_samples_are_within_0_005(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.ones(1000, np.int64))
    np.save(tmp_path / "outputs.npy", _decided(865, 1000))
    reference = Comparison.read(tmp_path, _rule("accuracy", 0.005))
    assert reference.value == pytest.approx(0.865) and reference.groups is None and len(reference) == 1000
    drop = reference.drop(_decided(860, 1000))
    assert drop.estimate > 0.005  # a rounding more: 0.865 - 0.86
    assert reference.within(drop.model_copy(update={"high": drop.estimate}))
    assert not reference.within(drop.model_copy(update={"high": drop.estimate + 1e-6}))
    assert not reference.within(drop)  # the interval's end, not the estimate


def test_an_error_without_a_limit_is_held_as_a_share_of_the_references_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(400, 1)).astype(np.float32)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "outputs.npy", labels + 2)
    reference = Comparison.read(tmp_path, _rule("rmse", 0.01))
    assert reference.limit == pytest.approx(0.02) and reference.value == pytest.approx(2)
    worse, better = reference.drop(labels + 2.01), reference.drop(labels + 1.9)
    assert worse.estimate == pytest.approx(0.01, abs=1e-4) and reference.within(worse)
    assert better.estimate < 0 and not reference.within(reference.drop(labels + 2.1))
