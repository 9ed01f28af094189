"""The largest rate on a simulated M/D/1 queue, whose answer is known, and the knee of known curves."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from test_open_loop import Simulated

from tlexport.evidence.latency import capacity, open_loop
from tlexport.evidence.latency.capacity import knee, largest_rate, saturated

SERVICE = 0.001


def waits_below(t: Fraction, load: Fraction) -> float:
    """P(waiting <= t) in M/D/1, t in units of service (Erlang 1909; Franx 2001, equation 1), in exact arithmetic but for exp."""
    total = Fraction(0)
    for k in range(math.floor(t) + 1):
        x = load * (t - k)
        # exp by its series, exactly: the terms alternate and would cancel in floating point
        total += (-x) ** k / math.factorial(k) * sum(x**j / math.factorial(j) for j in range(60))
    return float((1 - load) * total)


def p99_of(load: float) -> float:
    """The p99 of the time in an M/D/1 system in seconds, by bisection."""
    exact = Fraction(load).limit_denominator(1000)
    low, high = 0.0, 60.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if waits_below(Fraction(middle).limit_denominator(10**6), exact) < 0.99
            else (low, middle)
        )
    return SERVICE * (1 + high)


def ask(rate: float, seconds: float, seed: int) -> open_loop.Served:
    clock = Simulated()
    call = clock.works(lambda _: SERVICE)
    return open_loop.run([call], open_loop.schedule(rate, seconds, "poisson", seed), clock=clock)


def test_the_oracle_is_right() -> None:
    """Against a long simulated queue: 200000 requests at a load of 0.6."""
    served = ask(600, 200_000 / 600, 7)
    assert p99_of(0.6) == pytest.approx(float(np.quantile(served.latency, 0.99)), rel=0.05)


@pytest.mark.parametrize(("load", "seed"), [(0.5, 0), (0.7, 1), (0.7, 2)])
def test_the_largest_rate_of_a_known_queue_is_found(load: float, seed: int) -> None:
    """The limit is the p99 at `load`. The found rate must meet it, and its p99 must not lie far below.

    A rate is only accepted if the upper end of its p99 is within the limit, twice, so that it lies above the true one with
    a probability of about (2.5%)^2. It lies below by what the interval is wide: probes of 120 s hold 60000 requests or more,
    whose p99 is known to about a tenth, and a tenth of the p99 is less than 0.08 of load (checked here with the oracle);
    CLOSE adds 5%.
    """
    limit = p99_of(load)
    found = largest_rate(
        ask, 1e3 * limit, service_s=SERVICE, workers=1, seed=1000 * seed, least_s=60, most_s=120
    )
    assert p99_of(load - 0.08) < 0.9 * limit
    assert found.rate_per_s is not None and found.over_per_s is not None
    assert (load - 0.08) / capacity.CLOSE <= found.rate_per_s * SERVICE <= load * 1.02
    assert found.over_per_s >= found.rate_per_s
    assert any(p.rate_per_s == found.rate_per_s and p.verdict == "within" for p in found.probes)
    assert len({(p.rate_per_s, p.p99.value_ms) for p in found.probes}) == len(found.probes), "a seed each"


def test_a_limit_that_no_rate_meets_is_said() -> None:
    found = largest_rate(ask, 0.9, service_s=SERVICE, workers=1, seed=0, least_s=2, most_s=100)
    assert found.rate_per_s is None and "no rate down to" in found.note
    assert all(probe.verdict == "over" for probe in found.probes)


def test_a_limit_that_every_rate_meets_has_no_rate_over_it() -> None:
    def instant(rate: float, seconds: float, seed: int) -> open_loop.Served:
        clock = Simulated()
        call = clock.works(lambda _: 1e-6)
        return open_loop.run([call], open_loop.schedule(rate, seconds, "fixed", seed), clock=clock)

    found = largest_rate(instant, 10, service_s=SERVICE, workers=1, seed=0, least_s=2, most_s=10)
    assert found.rate_per_s == 2000 and found.over_per_s is None


def test_a_lucky_probe_is_not_believed() -> None:
    """A server that meets the limit at any rate the first time and then only below 300/s."""
    seen: set[float] = set()

    def lucky(rate: float, seconds: float, seed: int) -> open_loop.Served:
        slow = rate in seen and rate > 300
        seen.add(rate)
        clock = Simulated()
        call = clock.works(lambda _: 0.0009 if slow else 1e-5)
        return open_loop.run([call], open_loop.schedule(rate, seconds, "fixed", seed), clock=clock)

    found = largest_rate(lucky, 0.5, service_s=SERVICE, workers=1, seed=0, least_s=2, most_s=10)
    assert found.rate_per_s is None and [probe.verdict for probe in found.probes].count("over") == 3


def test_a_late_generator_does_not_condemn_the_model() -> None:
    clock = Simulated(late=0.004)
    served = open_loop.run(
        [clock.works(lambda _: SERVICE)], open_loop.schedule(100, 20, "fixed", 0), clock=clock
    )
    probe = capacity.judged(served, 100, 20, limit_ms=3)
    assert probe.verdict == "undecided" and "generator itself was late" in probe.reason
    assert capacity.judged(served, 100, 20, limit_ms=6).verdict == "within"


def curve(fixed: float, each: float, sizes: tuple[int, ...]) -> dict[int, float]:
    return {size: size / (fixed + each * size) for size in sizes}


def test_the_knee_of_known_curves() -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    # a / (a + 2 c b) of gain from b to 2 b: at least a tenth up to b = 4.5 a / c, so that the knee is at most 9 a / c
    assert knee(curve(1.0, 1.0, sizes)).at == 8
    assert knee(curve(8.0, 1.0, sizes)).at == 64
    assert knee(curve(0.0, 1.0, sizes)).at == 1
    rising = knee(curve(1000.0, 1.0, sizes))
    assert (rising.at, rising.passed) == (128, False)
    found = knee(curve(1.0, 1.0, sizes))
    assert found.passed and found.share == pytest.approx((8 / 9) / (128 / 129))
    assert knee({}) is None


def test_a_dip_does_not_end_the_curve_and_a_fall_does() -> None:
    assert knee({1: 100, 2: 180, 4: 170, 8: 400}).at == 8
    assert knee({1: 100, 2: 180, 4: 150, 8: 120}).at == 2
    assert knee({1: 100, 32: 110}).at == 1, "five doublings for a tenth"


def test_workers_that_wait_for_something_else_add_up() -> None:
    def sleeps() -> None:
        time.sleep(0.01)

    one, two = saturated([sleeps], 4, 0.5), saturated([sleeps, sleeps], 4, 0.5)
    assert 0 < one.items_per_s <= 400 and (one.batch, one.concurrency) == (4, 1)
    assert two.items_per_s > 1.3 * one.items_per_s and two.p50_ms >= 10
    assert one.low is not None and one.low <= one.items_per_s <= one.high
    assert saturated([sleeps], 1, 0.02).low is None, "too few calls for an interval"
