from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from tlexport.errors import DataError
from tlexport.evidence.accuracy.forecasts import diebold_mariano, tails
from tlexport.modalities import metrics


def overlapping(rng: np.random.Generator, periods: int, horizon: int) -> np.ndarray:
    """Differences of h-step forecasts' losses: a moving average of order h - 1."""
    shocks = rng.normal(size=periods + horizon - 1)
    return np.convolve(shocks, np.ones(horizon), mode="valid")


def test_it_is_the_formula_by_hand() -> None:
    """d = 1, 2, 3, 6 at horizon 1: mean 3, autocovariances 3.5, -0.5 (lag 1); one lag of weight 1/2."""
    found = diebold_mariano(np.zeros(4), np.array([1.0, 2, 3, 6]), None, 1, "qlike")
    assert (found.periods, found.lags, found.mean_difference) == (4, 1, 3.0)
    variance = 3.5 + 2 * 0.5 * (((-2) * (-1) + (-1) * 0 + 0 * 3) / 4)
    assert found.statistic == pytest.approx(3 / np.sqrt(variance / 4) * np.sqrt(3 / 4))
    assert 0.0 < found.p < 0.1


@pytest.mark.parametrize(("horizon", "periods"), [(1, 100), (3, 150), (5, 250), (5, 1000)])
def test_false_alarms_are_near_the_level_where_a_naive_test_raises_many(horizon: int, periods: int) -> None:
    """500 runs without a difference, at 5%. Bartlett's weights leave up to about 8% for overlapping forecasts:
    P(Bin(500, 0.08) > 55) = 0.8%, P(Bin(500, 0.05) < 12) = 0.2%.
    """
    rng, runs = np.random.default_rng(horizon * periods), 500
    alarms = naive = 0
    for _ in range(runs):
        difference = overlapping(rng, periods, horizon)
        alarms += diebold_mariano(np.zeros(periods), difference, None, horizon, "mse").p < 0.05
        naive += ttest_1samp(difference, 0).pvalue < 0.05
    assert binom.sf(55, runs, 0.08) < 0.01
    assert 12 <= alarms <= 55
    if horizon > 1:
        assert naive > 0.2 * runs


def test_a_planted_loss_is_seen_with_its_sign() -> None:
    rng = np.random.default_rng(0)
    base = rng.exponential(size=500)
    worse = diebold_mariano(base, base + 0.1 + 0.2 * rng.normal(size=500), None, 1, "mse")
    assert worse.mean_difference == pytest.approx(0.1, abs=0.03) and worse.statistic > 0 and worse.p < 1e-6
    better = diebold_mariano(base, base - 0.1 + 0.2 * rng.normal(size=500), None, 1, "mse")
    assert better.statistic < 0 and better.p < 1e-6


def test_assets_of_a_day_are_one_period() -> None:
    """Fifty assets that move together are no more evidence than one."""
    rng = np.random.default_rng(1)
    days = np.datetime64("2020-01-01") + np.arange(200)
    daily = rng.normal(size=200)
    one = diebold_mariano(np.zeros(200), daily, days, 1, "mse")
    order = rng.permutation(200 * 50)
    panel = diebold_mariano(
        np.zeros(10_000), np.repeat(daily, 50)[order], np.repeat(days, 50)[order], 1, "mse"
    )
    assert panel.periods == 200 and panel.statistic == pytest.approx(one.statistic)
    assert diebold_mariano(np.zeros(10_000), np.repeat(daily, 50), None, 1, "mse").periods == 10_000


def test_equal_losses_are_no_difference() -> None:
    loss = np.random.default_rng(2).random(50)
    found = diebold_mariano(loss, loss.copy(), None, 5, "mae")
    assert (found.statistic, found.p, found.mean_difference) == (0.0, 1.0, 0.0)


def test_what_cannot_be_tested_says_so() -> None:
    with pytest.raises(
        DataError, match="5 periods cannot compare the qlike of forecasts 5 ahead: more than 5"
    ):
        diebold_mariano(np.zeros(5), np.ones(5), None, 5, "qlike")
    with pytest.raises(DataError, match="the mae differs by 1 in every period"):
        diebold_mariano(np.zeros(50), np.ones(50), None, 1, "mae")


def test_tails_find_the_error_where_it_is() -> None:
    rng = np.random.default_rng(3)
    labels = rng.normal(size=(2000, 2))
    reference = labels + 0.1 * rng.normal(size=labels.shape)
    variant = np.where(labels > np.quantile(labels, 0.9, axis=0), reference - 1, reference)
    found = tails(labels, reference, variant)
    once = np.ones((1, 2000))
    assert found.rmse == pytest.approx(metrics.rmse(labels, variant)(once)[0])
    assert found.rmse_reference == pytest.approx(metrics.rmse(labels, reference)(once)[0])
    assert found.rmse_low_decile == found.rmse_low_decile_reference == pytest.approx(0.1, rel=0.1)
    assert found.rmse_high_decile == pytest.approx(1.0, rel=0.05) and found.rmse_high_decile_reference < 0.12
    assert found.p99_error > 1 > 0.3 > found.p99_error_reference


def test_equal_labels_have_tails() -> None:
    found = tails(np.ones((10, 1)), np.ones((10, 1)), np.full((10, 1), 3.0))
    assert found.rmse_low_decile == found.rmse_high_decile == found.p99_error == 2.0
