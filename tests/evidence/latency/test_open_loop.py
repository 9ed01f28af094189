"""The open loop on simulated clocks, whose answers are known, and on the machine's own."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from tlexport.evidence.latency import open_loop, recorder
from tlexport.evidence.latency.open_loop import Served, late, overload, run, schedule, summary


class Simulated:
    """A clock that only moves where something waits or works; `late` delays every start that the generator waits for."""

    def __init__(self, late: float = 0.0) -> None:
        self.time, self.late = 1000.0, late

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        if moment > self.time:
            self.time = moment + self.late

    def works(self, seconds: Callable[[int], float]) -> Callable[[], None]:
        calls = iter(range(10**9))

        def call() -> None:
            self.time += seconds(next(calls))

        return call


def simulated(
    at: np.ndarray, seconds: Callable[[int], float], late: float = 0.0, grace_s: float = 1e9
) -> Served:
    clock = Simulated(late)
    return run([clock.works(seconds)], at, clock=clock, grace_s=grace_s)


def test_latency_counts_from_the_scheduled_start_and_requests_queue() -> None:
    """Four requests a second apart, each takes 1.5 s: they wait 0, 0.5, 1.0 and 1.5 s."""
    found = simulated(np.arange(4.0), lambda _: 1.5)
    assert found.latency == pytest.approx([1.5, 2.0, 2.5, 3.0])
    assert found.service == pytest.approx([1.5] * 4)
    assert found.lag == pytest.approx([0.0] * 4)


def test_the_collection_of_garbage_beforehand_is_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second in a process that holds torch; here ten, on the simulated clock."""
    clock = Simulated()
    monkeypatch.setattr(recorder.gc, "collect", lambda: setattr(clock, "time", clock.time + 10))
    found = run([clock.works(lambda _: 0.001)], schedule(10, 1, "fixed", 0), clock=clock)
    assert found.latency.max() == pytest.approx(0.001)


def stalled(call: int) -> float:
    return 0.2 if call == 1000 else 0.001


def test_a_stall_makes_those_behind_it_wait_and_the_p99_shows_it() -> None:
    """10 s at 200/s, one call of 200 ms: 40 requests are due meanwhile, and 20 of 2000 lie beyond the p99.

    The k-th request due in the stall waits 200 - 5 k ms, and the queue drains at 4 ms a request: about half of the 50
    that wait do so for more than 100 ms.
    """
    found = simulated(schedule(200, 10, "fixed", 0), stalled)
    assert np.quantile(found.latency, 0.99) >= 0.1
    assert np.sum(found.latency > 0.1) == pytest.approx(25, abs=2)
    # A generator that counts from the actual start sees one slow call of 2000, and nothing else.
    from_actual_start = found.done - found.started
    assert np.quantile(from_actual_start, 0.99) == pytest.approx(0.001)


def test_a_late_generator_is_told_from_a_slow_model() -> None:
    at = schedule(100, 20, "fixed", 0)
    prompt, late = simulated(at, lambda _: 0.001), simulated(at, lambda _: 0.001, late=0.002)
    assert prompt.lag.max() == pytest.approx(0) and late.lag[1:] == pytest.approx(np.full(1999, 0.002))
    assert open_loop.late(prompt) == ""
    assert re.search("mean would be 67% and the p99 67% lower", open_loop.late(late))
    assert summary(late, "fixed", 100).generator and summary(late, "fixed", 100).lag_p50_ms == pytest.approx(
        2.0
    )
    slow = simulated(at, lambda call: 0.009 if call % 7 else 0.02)
    assert slow.latency.max() > 0.02 and open_loop.late(slow) == "", (
        "a queue of the model's own is not blamed on it"
    )


def test_requests_behind_a_late_one_are_its_fault_too() -> None:
    """One start is 50 ms late: the five requests that queue behind it were late by the generator, though their lag is 0."""

    class Once(Simulated):
        def wait_until(self, moment: float) -> None:
            super().wait_until(moment)
            if moment == 1000.0 + 0.5:
                self.time += 0.05

    clock = Once()
    found = run([clock.works(lambda _: 0.0001)], schedule(100, 1, "fixed", 0), clock=clock)
    assert np.sum(found.lag > 0.001) == 1 and np.sum(found.latency > 0.008) == 5
    assert "generator itself was late" in open_loop.late(found)


def test_a_rate_beyond_the_capacity_is_overload_and_ends() -> None:
    at = schedule(200, 10, "poisson", 1)
    beyond = simulated(at, lambda _: 0.006)
    assert "the queue grew" in overload(beyond) and not len(beyond.waiting)
    cut = simulated(at, lambda _: 0.006, grace_s=0.5)
    assert len(cut.waiting) + len(cut.done) == 2000 and len(cut.waiting) > 200
    assert f"{len(cut.waiting)} of 2000 requests were not started" in overload(cut)
    found = summary(cut, "poisson", 200)
    assert found.unserved == len(cut.waiting) and found.requests == found.latency.count == 2000
    assert found.latency.max_ms > 1e3 * (cut.done - cut.scheduled).max() * 0.9, (
        "the unserved are not forgotten"
    )
    for seed in range(20):
        assert overload(simulated(schedule(100, 20, "poisson", seed), lambda _: 0.007)) == "", (
            "70% is no overload"
        )


@pytest.mark.parametrize("arrivals", ["poisson", "fixed"])
def test_a_schedule_has_its_rate_and_repeats_with_its_seed(arrivals: open_loop.Arrivals) -> None:
    at = schedule(500, 40, arrivals, 3)
    assert len(at) == 20_000 and np.all(np.diff(at) > 0)
    # The mean of 20000 exponential gaps has a relative standard error of 0.7%.
    assert len(at) / at[-1] == pytest.approx(500, rel=0.03)
    assert np.array_equal(at, schedule(500, 40, arrivals, 3))
    gaps = np.diff(at)
    assert gaps.std() / gaps.mean() == pytest.approx(1 if arrivals == "poisson" else 0, abs=0.04)


def test_several_workers_take_the_requests_in_order_each_with_its_own_call() -> None:
    """Two workers, each sleeps 20 ms, 60 requests a second: one alone could not keep up."""
    seen: dict[int, set[int]] = {0: set(), 1: set()}

    def worker(number: int) -> Callable[[], None]:
        def call() -> None:
            seen[number].add(threading.get_ident())
            time.sleep(0.02)

        return call

    found = run([worker(0), worker(1)], schedule(60, 1.5, "fixed", 0))
    # Each is asked once. Started in the order due is not sure: a worker may be held up between its turn and the clock.
    assert np.array_equal(found.scheduled, schedule(60, 1.5, "fixed", 0))
    assert [len(threads) for threads in seen.values()] == [1, 1] and seen[0] != seen[1]
    assert np.all(found.started >= found.scheduled) and found.workers == 2
    # The two overlap, which one worker cannot: more was worked than time passed.
    assert found.service.sum() > 1.1 * (found.done[-1] - found.started[0])


def test_what_a_call_raises_ends_the_run() -> None:
    def fails() -> None:
        raise RuntimeError("the engine died")

    began = time.monotonic()
    for calls in ([fails], [fails, lambda: None]):
        with pytest.raises(RuntimeError, match="the engine died"):
            run(calls, schedule(10, 60, "fixed", 0))
    assert time.monotonic() - began < 30


def test_mistaken_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="are none"):
        schedule(0.1, 1, "fixed", 0)
    with pytest.raises(ValueError, match="needs a call"):
        run([], np.array([0.0]))


def test_a_stall_shows_on_the_machines_clock() -> None:
    calls = iter(range(10**6))
    found = run([lambda: time.sleep(0.2 if next(calls) == 100 else 0)], schedule(200, 1, "fixed", 0))
    assert np.sum(found.latency > 0.05) >= 25, "of the 40 that were due in it"
    assert np.sum(found.service > 0.19) >= 1


def test_what_an_answer_is_held_against_is_no_part_of_its_time() -> None:
    clock = Simulated()
    judged: list[float] = []

    def judge() -> str:
        clock.time += 5.0
        judged.append(clock.now())
        return "ok"

    def call() -> object:
        clock.time += 1.0
        return judge

    served = run([call], np.array([0.0, 10.0, 12.0]), clock=clock)
    assert served.returned == ("ok", "ok", "ok") and len(judged) == 3
    np.testing.assert_allclose(served.service, 1.0)
    # The third was due while the second was being looked at: it waits, and that is told as the generator's lateness.
    np.testing.assert_allclose(served.latency, [1.0, 1.0, 5.0])
    assert "generator itself was late" in late(served)
