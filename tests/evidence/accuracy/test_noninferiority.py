from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tlexport.evidence.accuracy.bootstrap import Interval, paired_bootstrap
from tlexport.evidence.accuracy.noninferiority import Judgement, decide, holm


def interval(estimate: float, low: float, high: float, **other) -> Interval:
    values = {"confidence": 0.95, "resamples": 2000, "undefined": 0, "method": "bca", **other}
    return Interval(estimate=estimate, low=low, high=high, **values)


def of_drops(drops: np.ndarray, limit: float, seed: int = 0) -> Interval:
    """Of the mean of per-sample drops [n]."""
    return paired_bootstrap(
        lambda w: w @ drops / w.sum(axis=1),
        lambda w: 0 * w[:, 0],
        len(drops),
        resamples=1000,
        confidence=0.95,
        seed=seed,
        limit=limit,
    )


def judged(drops: np.ndarray, limit: float, seed: int = 0) -> Judgement:
    found = of_drops(drops, limit, seed)
    return decide(found, limit, n=len(drops), p_adjusted=found.p)


def test_holm_by_hand() -> None:
    """0.01 * 4, 0.02 * 3, then 0.022 * 2 is below its predecessor and raised to it, then 0.9."""
    found = holm({"a": 0.9, "b": 0.02, "c": 0.01, "d": 0.022})
    assert list(found) == ["a", "b", "c", "d"]
    assert found == pytest.approx({"a": 0.9, "b": 0.06, "c": 0.04, "d": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_holm_agrees_with_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(12) ** 3
    found = holm({str(i): value for i, value in enumerate(p)})
    assert list(found.values()) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_each_verdict_gives_its_reason() -> None:
    passed = decide(interval(0.004, 0.0, 0.008), 0.01, n=1000, p_adjusted=0.02, metric="auc")
    assert passed.verdict == "pass" and passed.needed is None
    assert passed.reason == "auc drop 0.004, at worst 0.008 (95% interval), within max_drop 0.01"
    failed = decide(interval(0.03, 0.02, 0.04), 0.01, n=1000, p_adjusted=1.0, metric="auc")
    assert failed.verdict == "fail" and failed.needed is None
    assert failed.reason == "auc drop 0.03, at best 0.02 (95% interval), over max_drop 0.01"
    open_ = decide(interval(0.004, -0.004, 0.012, p=0.07), 0.01, n=1000, p_adjusted=0.07, metric="auc")
    assert (open_.verdict, open_.needed) == ("undecided", 1800)  # (8/6)^2 * 1000 = 1778
    assert open_.reason == (
        "auc drop 0.004, at worst 0.012 (95% interval) against max_drop 0.01: undecided, "
        "needs about 1800 samples (has 1000)"
    )
    grouped = decide(
        interval(0.4, -0.4, 1.2), 1.0, n=1000, units=100, p_adjusted=0.07, metric="rmse", share_of=10.0
    )
    assert "against max_drop 0.1 of the reference's 10: undecided" in grouped.reason
    assert grouped.reason.endswith("needs about 1800 samples in 180 groups (has 1000 in 100 groups)")


def test_a_drop_over_the_limit_needs_samples_to_fail() -> None:
    found = decide(interval(0.02, 0.005, 0.04, p=0.9), 0.01, n=400, p_adjusted=0.9)
    assert (found.verdict, found.needed) == ("undecided", 900)  # (15/10)^2 * 400


def test_nothing_tells_a_drop_at_the_limit() -> None:
    found = decide(interval(0.01, 0.005, 0.015, p=0.5), 0.01, n=400, p_adjusted=0.5)
    assert (found.verdict, found.needed) == ("undecided", None)
    assert "no number of samples would tell (has 400)" in found.reason


def test_other_variants_ask_for_more_samples() -> None:
    """Within the limit alone, not after Holm over ten: z of 0.0025 is 2.81, of 0.025 1.96."""
    alone = interval(0.004, 0.0, 0.0095, p=0.01)
    assert decide(alone, 0.01, n=1000, p_adjusted=0.01).verdict == "pass"
    found = decide(alone, 0.01, n=1000, p_adjusted=0.1)
    expected = 1000 * (5.5 / 6 * 2.8070 / 1.9600) ** 2
    assert found.verdict == "undecided" and expected <= found.needed <= 1.06 * expected
    assert "undecided at p 0.1, adjusted, above 0.025, needs about" in found.reason


def test_a_constant_without_flips_needs_as_many_as_exclude_them() -> None:
    """0.99^n <= 0.025 from n = 368 on; half the level for two variants: from 437 on."""
    same = interval(0.0, 0.0, 0.0, method="constant", p=0.0)
    one = decide(same, 0.01, n=150, p_adjusted=0.99**150)
    assert (one.verdict, one.needed) == ("undecided", 370)
    two = decide(same, 0.01, n=150, p_adjusted=2 * 0.99**150)
    assert two.needed == 440
    assert decide(same, 0.01, n=150, p_adjusted=0.0).verdict == "pass"
    assert decide(same, 2.0, n=150, p_adjusted=0.5).needed is None


def test_the_number_needed_decides() -> None:
    """The same samples, repeated: fewer than asked for do not tell, a fifth more do. Both ways."""
    rng = np.random.default_rng(3)
    for mean in (0.0, 0.04):
        drops = rng.normal(size=100)
        drops = mean + 0.2 * (drops - drops.mean()) / drops.std()
        found = judged(drops, 0.02)
        assert found.verdict == "undecided" and 300 <= found.needed <= 500
        fewer, more = (np.resize(drops, int(share * found.needed)) for share in (0.6, 1.3))
        assert judged(fewer, 0.02).verdict == "undecided"
        assert judged(more, 0.02).verdict == ("pass" if mean == 0 else "fail")


def test_alarms_and_misses_of_the_verdict() -> None:
    """400 samples, 300 runs. At the limit a variant passes in 2.5% (P(Bin > 17) = 0.1%) and fails in 2.5%; at
    twice the limit, five standard errors off, it fails in at least 95%; without any drop it passes in at least 95%.
    """
    rng, runs, n, limit = np.random.default_rng(4), 300, 400, 0.05
    assert binom.sf(17, runs, 0.025) < 0.0012

    def verdicts(mean: float) -> list[str]:
        return [judged(rng.normal(mean, 0.2, size=n), limit, seed).verdict for seed in range(runs)]

    at_limit = verdicts(limit)
    assert at_limit.count("pass") <= 17 and at_limit.count("fail") <= 17
    assert verdicts(2 * limit).count("fail") >= 0.95 * runs
    assert verdicts(0.0).count("pass") >= 0.95 * runs


def test_a_rounding_does_not_fail() -> None:
    low = 0.865 - 0.86
    assert low > 0.005
    assert decide(interval(0.006, low, 0.007), 0.005, n=10, p_adjusted=1.0).verdict == "undecided"
    assert decide(interval(0.006, low + 1e-9, 0.007), 0.005, n=10, p_adjusted=1.0).verdict == "fail"
