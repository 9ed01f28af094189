from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tlexport.evidence.gate import rule
from tlexport.evidence.gate.rule import Session
from tlexport.results import GateVerdict

NAMES = {"name": "m", "against": "old"}


def side(
    ratio: float, rounds: int = 20, tolerance: float = 0.0, seed: int = 0, spread: float = 0.01
) -> GateVerdict:
    rng = np.random.default_rng(seed)
    old = 1e-3 * np.exp(rng.normal(scale=spread, size=rounds))
    new = ratio * 1e-3 * np.exp(rng.normal(scale=spread, size=rounds))
    return rule.side_by_side(old, new, tolerance=tolerance, **NAMES)


def occasion(
    rng: np.random.Generator, *, n: int = 10, slower: float = 1.0, machine: float = 1.0, shares: float = 1.0
) -> list[Session]:
    """Sessions on a machine that is `machine` times slower, of a model that feels the power `shares` of it."""
    wobble = machine * np.exp(rng.normal(scale=0.02, size=n))
    noise = np.exp(rng.normal(size=(n, 2)) * (0.01, 0.002))
    return [
        Session(seconds=1e-3 * slower * w**shares * a, control=1e-5 * w * b)
        for w, (a, b) in zip(wobble, noise, strict=True)
    ]


def stored(past: list[list[Session]], new: list[Session], tolerance: float = 0.0) -> GateVerdict:
    return rule.against_baseline(past, new, tolerance=tolerance, **NAMES)


def share(alarms: list[bool]) -> float:
    return float(np.mean(alarms))


def bounds(rate: float, runs: int) -> tuple[float, float]:
    """Where a binomial share lies in all but one of ten thousand tests."""
    low, high = stats.binom.interval(0.9999, runs, rate)
    return low / runs, high / runs


def test_the_signed_rank_interval_is_exact_for_every_pattern_of_signs() -> None:
    """All 2^8 sign patterns of eight distinct distances are equally likely if nothing differs; counted, not sampled."""
    distances = np.array([1.0, 2.3, 3.1, 4.7, 5.9, 7.2, 8.8, 10.1])
    for confidence in (0.9, 0.95):
        above = [
            rule.signed_rank(distances * signs, confidence)[1] > 0
            for signs in itertools.product([-1, 1], repeat=8)
        ]
        reference = [
            stats.wilcoxon(distances * signs, alternative="greater", method="exact").pvalue
            <= (1 - confidence) / 2
            for signs in itertools.product([-1, 1], repeat=8)
        ]
        assert above == reference and 0 < share(above) <= (1 - confidence) / 2


def test_too_few_rounds_have_no_interval() -> None:
    verdict = side(2.0, rounds=5)
    assert (verdict.verdict, verdict.low, verdict.needed) == ("undecided", None, None)
    assert "too few for an interval" in verdict.reason
    assert side(2.0, rounds=6).verdict == "fail"


def test_a_planted_slow_down_fails_and_a_tolerated_one_passes() -> None:
    slow = side(1.10, tolerance=0.05)
    assert slow.verdict == "fail" and slow.low is not None and slow.low > 1.05 and slow.limit == 1.05
    assert "m: 1.1" in slow.reason and "tolerated 1.05" in slow.reason and "\n" not in slow.reason
    assert side(1.02, tolerance=0.05).verdict == "pass"
    assert side(0.9).verdict == "pass", "a faster build passes even where nothing is tolerated"


def test_what_cannot_be_told_says_what_would_tell() -> None:
    verdict = side(1.06, tolerance=0.05, spread=0.05)
    assert verdict.verdict == "undecided" and verdict.needed is not None and verdict.needed > 20
    assert f"about {verdict.needed} would tell" in verdict.reason
    assert rule.needed(1.0, 0.9, 1.1, 1.0, 10) is None, "an estimate on the limit is never decided"
    # The half-width of 0.02 has to shrink to 0.01: four times as many.
    assert rule.needed(0.0, -0.02, 0.02, 0.01, 10) == 40


def test_false_alarms_side_by_side_are_as_stated_under_heavy_tails() -> None:
    """Student's t with 1.5 degrees of freedom, which has no variance, as rounds that another process disturbs."""
    rng, runs = np.random.default_rng(3), 2000
    alarms = []
    for _ in range(runs):
        old, new = np.exp(0.01 * rng.standard_t(1.5, size=(2, 12)))
        alarms.append(rule.side_by_side(old, new, tolerance=0.0, **NAMES).verdict == "fail")
    exact = 0.0212  # P(rank sum >= 65 of 12), the largest that is at most 2.5%
    low, high = bounds(exact, runs)
    assert low <= share(alarms) <= high


@pytest.mark.parametrize("shares", [0.0, 0.5, 1.0])
def test_a_machine_that_is_five_percent_slower_is_not_taken_for_the_model(shares: float) -> None:
    """Whether the model feels the machine's speed wholly, by half or not at all: the slope is estimated. The errors are
    normal, so the interval is exact but for the control's own noise, a tenth of its wobble."""
    rng, runs = np.random.default_rng(4), 1000
    alarms, naive = [], []
    for _ in range(runs):
        old, new = occasion(rng, shares=shares), occasion(rng, machine=1.05, shares=shares)
        verdict = stored([old], new)
        alarms.append(verdict.verdict == "fail")
        naive.append(rule.welch(*(np.log([s.seconds for s in of]) for of in (old, new)), 0.95)[1] > 0)
    assert share(alarms) <= bounds(0.025, runs)[1]
    assert shares < 1 or share(naive) > 0.9, "what the control is for"


def test_stored_sessions_catch_ten_percent() -> None:
    rng = np.random.default_rng(5)
    caught = [stored([occasion(rng)], occasion(rng, slower=1.1)).verdict == "fail" for _ in range(300)]
    assert share(caught) >= 0.99


def test_a_machine_of_another_speed_is_undecided_whatever_the_model_shows() -> None:
    rng = np.random.default_rng(6)
    verdict = stored([occasion(rng)], occasion(rng, machine=1.25, slower=2.0))
    assert verdict.verdict == "undecided" and verdict.needed is None
    assert (
        "the machine is 2" in verdict.reason
        and "slower than when the baseline was recorded" in verdict.reason
    )
    assert "faster" in stored([occasion(rng)], occasion(rng, machine=0.8)).reason


def test_accepted_runs_widen_the_interval_and_leave_its_middle() -> None:
    rng = np.random.default_rng(7)
    base, new = occasion(rng), occasion(rng, slower=1.04)
    alone = stored([base], new)
    drifting = [occasion(rng, slower=slower) for slower in (1.03, 0.97, 1.05, 0.96)]
    among = stored([base, *drifting], new)
    assert alone.verdict == "fail" and among.verdict == "undecided"
    assert among.value == pytest.approx(alone.value, rel=0.01)
    steady = stored([base, *(occasion(rng) for _ in range(4))], new)
    assert steady.verdict == "fail", "runs that agree do not hide a loss"


def test_small_losses_add_up() -> None:
    """Each run is 1% slower than the one before: an accepted run never becomes what the next is held against. The creep itself
    widens the interval, so that it is undecided, which does not pass either, before it fails."""
    rng = np.random.default_rng(8)
    past = [occasion(rng)]
    verdicts = []
    for step in range(1, 25):
        new = occasion(rng, slower=1.01**step)
        verdicts.append(stored(past, new, tolerance=0.05).verdict)
        if verdicts[-1] == "pass":
            past.append(new)
    assert verdicts[0] == "pass" and "pass" not in verdicts[5:] and verdicts[-1] == "fail"


def test_prediction_intervals_hold_with_history() -> None:
    """Occasions differ by 2% beyond their sessions; a plain comparison would raise an alarm in a fifth of the runs."""
    rng, runs = np.random.default_rng(9), 600
    alone, among = [], []
    for _ in range(runs):
        speeds = np.exp(rng.normal(scale=0.02, size=10))
        past = [occasion(rng, slower=slower) for slower in speeds[:-1]]
        new = occasion(rng, slower=speeds[-1])
        alone.append(stored(past[:1], new).verdict == "fail")
        among.append(stored(past, new).verdict == "fail")
    assert share(alone) > 0.15
    assert share(among) <= bounds(0.04, runs)[1], "2.5%, and what estimating a variance from nine runs costs"


def test_too_few_sessions_and_standing_clocks() -> None:
    rng = np.random.default_rng(10)
    with pytest.raises(ValueError, match="at least 5"):
        stored([occasion(rng)], occasion(rng, n=4))
    still = [Session(seconds=1e-3, control=1e-5)] * 5
    assert stored([still], still, tolerance=0.05).verdict == "pass"
    assert stored([still], [Session(seconds=1.2e-3, control=1e-5)] * 5).verdict == "fail"
