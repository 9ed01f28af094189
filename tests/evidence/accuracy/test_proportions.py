"""Tango's score test: published values, its own inverse, and coverage where the bootstrap fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlexport.evidence.accuracy.proportions import interval, p_value


def test_a_published_interval() -> None:
    """Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009), 21 children, 1 and 7 of whom change:
    -0.517 to -0.026 by Tango's method in Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, 2850-2875."""
    low, high = interval(1, 7, 21, 0.95)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    assert interval(7, 1, 21, 0.95) == pytest.approx((-high, -low), abs=1e-9)


def test_no_change_has_a_closed_form() -> None:
    """b = c = 0: the score is sqrt(n d / (1 - d)), so the end is z^2 / (n + z^2)."""
    z = 1.959963984540054
    for n in (36, 153, 1000):
        low, high = interval(0, 0, n, 0.95)
        assert high == pytest.approx(z * z / (n + z * z), abs=1e-9) and low == pytest.approx(-high, abs=1e-9)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(60, 3000), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_p_value_at_the_end_is_the_level(harmful: int, mended: int, n: int, confidence: float) -> None:
    low, high = interval(harmful, mended, n, confidence)
    assert -1 <= low <= (harmful - mended) / n <= high <= 1
    assert p_value(harmful, mended, n, high) == pytest.approx((1 - confidence) / 2, abs=1e-6)
    assert p_value(harmful, mended, n, low) == pytest.approx((1 + confidence) / 2, abs=1e-6)


@pytest.mark.parametrize("n", [300, 400, 600, 1000, 2000])
@pytest.mark.parametrize("share", [0.005, 0.01, 0.02])
def test_it_holds_where_few_decisions_change(n: int, share: float) -> None:
    """The true share of harmful flips is above the end in at most 2.5% of draws, by exact sums of the binomial.

    A bootstrap's end is 0 whenever none was drawn: at n = 300 and 0.5% that alone is 22%.
    """
    above = sum(
        math.comb(n, b) * share**b * (1 - share) ** (n - b)
        for b in range(n + 1 if n < 500 else 120)
        if interval(b, 0, n, 0.95)[1] < share
    )
    assert above <= 0.025


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 harmful and 2 mended decisions of 4"):
        p_value(3, 2, 4, 0.1)
    assert p_value(0, 0, 10, 1.0) == 0.0 and p_value(5, 0, 10, -1.0) == 1.0
    assert np.isfinite(p_value(10, 0, 10, 0.5))
