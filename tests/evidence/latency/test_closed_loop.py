from __future__ import annotations

import gc
import re
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tlexport.evidence.latency.closed_loop import (
    Call,
    Schedule,
    Timed,
    interleave,
    speedup,
    summary,
    throughput,
)


def busy(ms: float) -> Call:
    """A call that takes `ms` of CPU time, as a model does."""

    def call() -> None:
        until = time.perf_counter_ns() + ms * 1e6
        while time.perf_counter_ns() < until:
            pass

    return call


def timed(
    candidates: dict[str, Call], samples: int = 24, protected: tuple[str, ...] = (), **turns: object
) -> Timed:
    schedule = Schedule.model_validate({"warmup_s": 0.05, **turns})
    return interleave(candidates, samples=samples, seed=0, protected=protected, schedule=schedule)


def test_a_slower_candidate_is_seen_as_slower() -> None:
    seconds = timed({"fast": busy(0.5), "slow": busy(0.8)}, samples=80)
    found = speedup(seconds["slow"], seconds["fast"])
    assert len(seconds["fast"]) == len(seconds["slow"]) == found.count == 80
    assert found.low > 1.2
    assert 0.5e-3 <= np.median(seconds["fast"]) < 0.8e-3
    assert seconds.dropped == {}


def test_one_stall_is_kept_in_the_samples() -> None:
    calls = iter(range(10_000))

    def stalls_once() -> None:
        time.sleep(0.08 if next(calls) == 40 else 0.0005)

    seconds = timed({"a": stalls_once}, samples=60, warmup_s=0, settle_s=0)
    found = summary(seconds["a"])
    assert found.max_ms >= 80 > 20 * found.p50.value_ms
    stalled, started = int(np.argmax(seconds["a"])), seconds.started["a"]
    assert started[stalled + 1] - started[stalled] >= 0.08
    assert np.all(np.diff(started) > 0)


def test_a_clearly_slow_candidate_is_not_measured_to_the_end_unless_protected() -> None:
    candidates = {"best": busy(0.3), "slow": busy(3), "reference": busy(3)}
    seconds = timed(candidates, samples=48, screen=2, protected=("reference",))
    assert {name: len(found) for name, found in seconds.items()} == {"best": 48, "slow": 16, "reference": 48}
    assert list(seconds.dropped) == ["slow"]
    assert re.search("after 16 calls, more than 2 times the 0.3.* ms of best", seconds.dropped["slow"])
    assert len(timed(candidates, samples=32, screen=2, drop_ratio=None)["slow"]) == 32


def test_first_calls_of_a_block_do_not_count() -> None:
    """Each candidate pays for its predecessor's caches on the first two calls of its turn."""
    last: list[str] = []

    def call(name: str) -> Call:
        def run() -> None:
            fresh = last[-2:] != [name, name]
            last.append(name)
            busy(5.0 if fresh else 0.2)()

        return run

    candidates = {"a": call("a"), "b": call("b")}
    assert np.median(np.concatenate(list(timed(candidates, samples=16).values()))) < 1e-3
    assert np.max(timed(candidates, samples=20, settle=0)["a"]) >= 5e-3


def test_short_calls_are_timed_several_at_once_so_that_the_clock_does_not_count() -> None:
    def short() -> None:
        sum(range(40))

    seconds = timed({"short": short, "long": busy(0.5)}, samples=40, drop_ratio=None)
    together = seconds.calls_per_sample
    assert together["long"] == 1 < together["short"]
    took = np.median(seconds["short"]) * together["short"] * 1e9
    assert seconds.clock_ns > 0 and took > 50 * seconds.clock_ns  # 100 at the warm-up's speed
    alone = timed({"short": short}, samples=40, clock_share=None)
    assert alone.calls_per_sample == {"short": 1}
    assert np.median(seconds["long"]) == pytest.approx(0.5e-3, rel=0.1)


def test_a_short_call_settles_for_some_time_and_not_for_two_calls_only() -> None:
    made: list[float] = []
    timed({"a": lambda: made.append(time.perf_counter())}, samples=8, warmup_s=0, settle_s=0.02)
    assert made[-1] - made[1] >= 0.02


def test_rounds_take_turns_in_changing_order_and_repeat_with_the_seed() -> None:
    def order(seed: int) -> str:
        seen: list[str] = []
        calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
        turns = Schedule(block=2, settle=1, settle_s=0, clock_share=None, warmup_s=0, drop_ratio=None)
        interleave(calls, samples=12, seed=seed, schedule=turns)
        return "".join(seen[3::2])

    turns = [order(1)[i : i + 3] for i in range(0, 36, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    assert order(1) == order(1) != order(2)


def test_warm_up_waits_until_times_stand_still() -> None:
    calls = iter(range(10_000))

    def settles_late() -> None:
        time.sleep(0.003 + 0.03 * 0.9 ** next(calls))

    seconds = timed({"a": settles_late}, samples=8, warmup_s=5)
    assert seconds.unsettled == () and seconds.warmup_calls["a"] > 40
    assert np.median(seconds["a"]) < 4e-3
    hurried = timed({"a": settles_late}, samples=8, warmup_s=0.005)
    assert hurried.unsettled == ("a",) and hurried.warmup_calls["a"] < 20


def test_the_budget_stops_after_whole_rounds_and_one_always_runs() -> None:
    progress: list[tuple[int, int]] = []
    candidates = {"a": busy(2), "b": busy(2)}
    turns = Schedule(warmup_s=0.05, budget_s=0.2)
    seconds = interleave(
        candidates, samples=800, seed=0, schedule=turns, progress=lambda *at: progress.append(at)
    )
    assert 8 <= len(seconds["a"]) == len(seconds["b"]) <= 40
    assert progress[0] == (1, 100) and len(progress) == len(seconds["a"]) // 8
    assert len(timed(candidates, samples=80, budget_s=0.001)["a"]) == 8


def test_garbage_collection_is_off_while_timing_and_as_before_afterwards() -> None:
    seen: list[bool] = []

    def fails() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 5:
            raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        timed({"a": fails})
    assert seen == [False] * 6 and gc.isenabled()
    gc.disable()
    try:
        timed({"a": busy(0.01)}, samples=8)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_mistaken_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="refernce"):
        timed({"a": busy(1)}, protected=("refernce",))
    with pytest.raises(ValueError, match="nothing to time"):
        timed({})
    with pytest.raises(ValidationError, match="must be smaller than block"):
        Schedule(block=2, settle=2)


def test_throughput_of_a_slower_candidate_is_lower_and_counts_the_batch() -> None:
    found = throughput({"fast": busy(1.0), "slow": busy(2.0)}, 8, seed=0)
    assert found["fast"].low > found["slow"].high
    assert found["fast"].low <= found["fast"].items_per_s <= found["fast"].high <= 8000
    assert (found["slow"].batch, found["slow"].count) == (8, 32)
    short = throughput({"a": busy(0.5)}, 4, seed=0, samples=8)["a"]
    assert short.low is short.high is None and 0 < short.items_per_s <= 8000


def test_raw_times_can_be_stored_without_pickle(tmp_path: Path) -> None:
    seconds = timed({"a": busy(0.1), "b": busy(0.1)}, samples=8)
    np.savez(tmp_path / "raw.npz", **seconds)
    with np.load(tmp_path / "raw.npz", allow_pickle=False) as raw:
        assert sorted(raw.files) == ["a", "b"] and np.array_equal(raw["a"], seconds["a"])
