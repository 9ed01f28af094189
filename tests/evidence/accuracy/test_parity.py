from __future__ import annotations

import numpy as np
import pytest

from tlexport.errors import ExportError
from tlexport.evidence.accuracy.parity import compare


def outputs(n: int = 12, classes: int = 4) -> np.ndarray:
    logits = np.random.default_rng(0).normal(size=(n, classes)).astype(np.float32)
    exponents = np.exp(logits)
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_equal_outputs_have_no_error_and_a_real_scale() -> None:
    reference = outputs()
    found = compare(reference, reference.copy())
    assert found.max_abs_error == found.relative == found.rms_error == 0.0
    assert found.scale == pytest.approx(np.ptp(reference, axis=0).max())
    assert found.samples == 12


def test_a_planted_error_is_found_where_it_is() -> None:
    reference = outputs()
    candidate = reference.copy()
    candidate[7, 2] += 0.25
    found = compare(reference, candidate)
    assert found.worst_index == (7, 2)
    assert found.max_abs_error == pytest.approx(0.25, rel=1e-6)
    assert found.relative == pytest.approx(0.25 / found.scale, rel=1e-6)
    assert found.rms_error == pytest.approx(0.25 / np.sqrt(48), rel=1e-6)


def test_the_scale_is_what_varies_not_how_large_it_is() -> None:
    """A candidate that ignores its input is far off, though the outputs all stand near 1000."""
    reference = 1000 + outputs().astype(np.float64)
    found = compare(reference, np.broadcast_to(reference.mean(axis=0), reference.shape))
    assert found.relative > 0.4


def test_half_precision_and_single_values_compare() -> None:
    reference = np.linspace(-3, 3, 20, dtype=np.float32)
    found = compare(reference, reference.astype(np.float16))
    assert 0 < found.relative < 1e-3 and len(found.worst_index) == 1


@pytest.mark.parametrize(
    ("reference", "what"),
    [
        (np.zeros((8, 3)), "does not vary over 8 samples"),
        (np.full((8, 3), 1 / 3), "does not vary over 8 samples"),
        (1e-14 * np.random.default_rng(1).normal(size=(8, 3)), "does not vary over 8 samples"),
        (0.5 + 1e-6 * np.random.default_rng(1).normal(size=(8, 3)), "does not vary over 8 samples"),
        (np.ones((1, 3)), "fewer than two samples"),
        (np.ones((0, 3)), "fewer than two samples"),
        (
            np.where(np.arange(24).reshape(8, 3) == 5, np.nan, 1.0),
            "the reference's probability holds 1 values",
        ),
    ],
)
def test_a_reference_that_proves_nothing_is_refused(reference: np.ndarray, what: str) -> None:
    with pytest.raises(ExportError, match=what):
        compare(reference, reference.copy(), name="probability")


def test_outputs_of_random_weights_are_refused() -> None:
    """The case seen in practice: an untrained network's answers barely depend on its input."""
    rng = np.random.default_rng(2)
    signal = rng.normal(size=(16, 64))
    for _ in range(8):
        signal = np.maximum(signal @ (rng.normal(size=(64, 64)) * 0.02), 0)
    probabilities = 1 / (1 + np.exp(-signal))
    with pytest.raises(ExportError, match="prove nothing; use trained weights"):
        compare(probabilities, probabilities)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_candidate_that_is_not_finite_is_refused(broken: float) -> None:
    candidate = outputs()
    candidate[[3, 5], 1] = broken
    with pytest.raises(ExportError, match=r"holds 2 values that are not finite.*2 of 12 samples.*sample 3"):
        compare(outputs(), candidate)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ExportError, match=r"\(12, 3\), the reference has \(12, 4\)"):
        compare(outputs(), outputs()[:, :3])
