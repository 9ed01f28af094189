from __future__ import annotations

import numpy as np
import pytest

from tlexport.errors import ExportError
from tlexport.evidence.accuracy.parity import compare, disagreement, limit, usual_error


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


def test_one_far_sample_in_the_split_does_not_excuse_every_golden_one() -> None:
    reference, rng = outputs(200), np.random.default_rng(1)
    candidate = reference + rng.normal(scale=1e-3, size=reference.shape)
    candidate[17] = reference[17][::-1] + 0.5
    worst, usual = compare(reference, candidate).max_abs_error, usual_error(reference, candidate)
    assert worst > 0.4 and usual < 4e-3
    golden = slice(30, 38)
    assert disagreement(reference[golden], candidate[golden], worst, usual) == ""
    other = np.roll(reference[golden], 1, axis=1)
    assert (
        limit(worst, reference[golden]) > np.abs(other - reference[golden]).max()
    )  # by the largest error alone it passes
    assert "half of the samples differ by" in disagreement(reference[golden], other, worst, usual)
    assert disagreement(reference[golden], other, worst, None) == ""
    assert "verify measured 0.001" in disagreement(reference[golden], other, 1e-3, None)


def test_right_golden_samples_are_seldom_refused() -> None:
    """Of heavy-tailed errors, eight golden samples each: half of eight beyond a 90% quantile has a chance of 0.5%, and beyond three
    times it less; 400 draws have 2 on average at most, and 9 or more with a chance below 1 in 4000."""
    rng = np.random.default_rng(2)
    reference = outputs(500)
    candidate = reference + (1e-3 * rng.standard_t(1.5, size=(500, 1))) * rng.normal(size=reference.shape)
    worst, usual = compare(reference, candidate).max_abs_error, usual_error(reference, candidate)
    drawn = [rng.choice(500, 8, replace=False) for _ in range(400)]
    assert sum(bool(disagreement(reference[rows], candidate[rows], worst, usual)) for rows in drawn) <= 8
