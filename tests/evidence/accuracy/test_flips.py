from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tlexport.evidence.accuracy.flips import between, flip_bound, mcnemar, p_unseen, unseen


def test_flip_bound_is_clopper_and_pearsons() -> None:
    for count, n in ((0, 50), (1, 300), (7, 624), (49, 50)):
        bound = flip_bound(count, n, 0.95)
        assert binom.cdf(count, n, bound) == pytest.approx(0.05)
    assert flip_bound(50, 50) == 1.0
    with pytest.raises(ValueError, match="51 flips in 50"):
        flip_bound(51, 50)


def test_flips_tell_harm_from_chance() -> None:
    labels = np.array([0, 1, 2, 2, 1])
    before = np.array([0, 1, 2, 0, 0])
    after = np.array([0, 2, 2, 2, 2])  # right to wrong, wrong to right, wrong to otherwise wrong
    found = between(before, after, labels)
    assert (found.count, found.harmful, found.harmless, found.mended, found.share) == (3, 1, 2, 1, 0.6)


def test_multilabel_flips_count_samples() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1]])
    after = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 0]])
    found = between(labels, after, labels)
    assert (found.count, found.harmful, found.samples) == (2, 2, 3)
    with pytest.raises(ValueError, match=r"\(3, 3\), \(3, 3\) and \(3,\)"):
        between(labels, after, labels[:, 0])


def test_mcnemar_is_fagerlands_mid_p() -> None:
    """Their table 1 (Bentur et al.): 1 against 7 discordant pairs, mid-p 0.039, exact 0.070."""
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(0.0391, abs=5e-5)
    exact = 2 * binom.cdf(1, 8, 0.5)
    assert mcnemar(1, 7) == pytest.approx(exact - binom.pmf(1, 8, 0.5)) and exact == pytest.approx(
        0.0703, abs=5e-5
    )
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(40, 10) < 1e-4


def test_mcnemar_rejects_as_often_as_it_says() -> None:
    """Mid-p holds its level on average over the number of flips, and hardly ever exceeds it for one."""
    level = []
    for total in range(20, 60):
        harmful = np.arange(total + 1)
        rejected = np.array([mcnemar(int(h), total - int(h)) <= 0.05 for h in harmful])
        level.append(binom.pmf(harmful, total, 0.5)[rejected].sum())
    assert 0.035 < np.mean(level) < 0.055 and max(level) < 0.07


def classifier(n: int, classes: int, seed: int = 0, sharpness: float = 3.0) -> np.ndarray:
    scores = np.exp(sharpness * np.random.default_rng(seed).normal(size=(n, classes)))
    return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


def shifted(reference: np.ndarray, error: float, seed: int = 1) -> np.ndarray:
    return reference + np.random.default_rng(seed).uniform(-error, error, size=reference.shape)


@pytest.mark.parametrize(
    ("task", "classes", "thresholds"),
    [("binary", 2, (0.3,)), ("multiclass", 5, None), ("multilabel", 3, (0.2, 0.5, 0.7))],
)
def test_tiny_errors_bound_the_unseen_flips_and_large_ones_do_not(
    task: str, classes: int, thresholds: tuple[float, ...] | None
) -> None:
    """150 samples without a flip allow 2% by their number alone: rounding errors allow far less."""
    reference = classifier(150, classes)
    alone = flip_bound(0, 150, 0.95)
    fp32 = unseen(reference, shifted(reference, 1e-6), task, 0, 150, 0.95, thresholds)
    int8 = unseen(reference, shifted(reference, 0.03), task, 0, 150, 0.95, thresholds)
    assert fp32 < 0.001 < 0.01 < int8 == alone
    for error, passes in ((1e-6, True), (0.03, False)):
        p = p_unseen(reference, shifted(reference, error), task, 0, 150, 0.95, 0.01, thresholds)
        assert p == (0.0 if passes else pytest.approx(0.99**150))
    assert unseen(reference, shifted(reference, 1e-6), task, 1, 150, 0.95, thresholds) == flip_bound(
        1, 150, 0.95
    )


def test_the_bound_on_unseen_flips_holds_in_the_population() -> None:
    """Errors like a low precision's, 300 test sets without a flip: the true share is above the 95% bound in none to 5%."""
    million = classifier(400_000, 2)[:, 1].astype(np.float64)
    rng = np.random.default_rng(3)
    judged = above = 0
    for error in (1e-5, 1e-4, 1e-3):
        after = million + rng.normal(0, error, size=million.shape)
        truth = ((million >= 0.5) != (after >= 0.5)).mean()
        for _ in range(100):
            drawn = rng.integers(len(million), size=300)
            reference, variant = (np.stack([1 - p, p], axis=1) for p in (million[drawn], after[drawn]))
            count = int(((reference[:, 1] >= 0.5) != (variant[:, 1] >= 0.5)).sum())
            bound = unseen(reference, variant, "binary", count, 300, 0.95)
            judged += 1
            above += truth > bound
    assert judged == 300 and above <= 15


def test_p_unseen_inverts_the_exact_bound() -> None:
    reference = classifier(200, 2)
    variant = shifted(reference, 0.2)
    for count in (0, 3):
        limit = flip_bound(count, 200, 0.975)
        assert p_unseen(reference, variant, "binary", count, 200, 0.95, limit) == pytest.approx(0.025)
    assert p_unseen(reference, reference, "binary", 0, 200, 0.95, 0.0) == 1.0
    with pytest.raises(ValueError, match="outputs of 200 and 200 samples, 150"):
        unseen(reference, variant, "binary", 0, 150, 0.95)


def test_too_few_samples_to_read_a_density_leave_the_count_alone() -> None:
    reference = classifier(9, 2)
    assert unseen(reference, reference, "binary", 0, 9, 0.95) == flip_bound(0, 9, 0.95)
