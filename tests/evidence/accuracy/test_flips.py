from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tlexport.evidence.accuracy.flips import between, flip_bound


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
    assert (found.count, found.harmful, found.harmless, found.share) == (3, 1, 2, 0.6)


def test_multilabel_flips_count_samples() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1]])
    after = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 0]])
    found = between(labels, after, labels)
    assert (found.count, found.harmful, found.samples) == (2, 2, 3)
    with pytest.raises(ValueError, match=r"\(3, 3\), \(3, 3\) and \(3,\)"):
        between(labels, after, labels[:, 0])
