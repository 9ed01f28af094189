from __future__ import annotations

import pytest

from tlexport.bundle.choice import against_gpu, choose, front, losers, shown
from tlexport.results import Variant


def variant(name: str, p50_ms: float | None, **changes: object) -> Variant:
    target = name.partition("-")[0]
    fields = {"backend": "b", "precision": "fp32", "file": "f", "size_bytes": 1, "verdict": "pass", **changes}
    return Variant.model_validate({"name": name, "target": target, "p50_ms": p50_ms, **fields})


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.000456, "0.46 µs"),
        (0.0123, "12.3 µs"),
        (0.9, "900 µs"),
        (1, "1.00 ms"),
        (45.67, "45.7 ms"),
        (1234.5, "1234 ms"),
        (None, "not measured"),
    ],
)
def test_a_latency_is_shown_with_three_digits(ms: float | None, text: str) -> None:
    assert shown(ms) == text


def test_the_reason_without_a_pytorch_model_claims_no_speedup() -> None:
    chosen = choose("cpu", (variant("cpu-a", 0.0512), variant("cpu-b", 0.01)))
    assert chosen.reason == "fastest of 2 passing: p50 10.0 µs; next cpu-a at 51.2 µs"
    timed = choose("cpu", (variant("cpu-b", 0.01, speedup=12.345),))
    assert timed.reason == "fastest of 1 passing: p50 10.0 µs, 12.35x torch eager"


def test_a_gpu_that_was_timed_is_compared_as_measured() -> None:
    cpu, gpu = variant("cpu-a", 0.045), variant("sm90-b", 0.0712)
    (note,) = against_gpu((cpu, variant("cpu-slow", 0.2), gpu), {"sm90-b": 3})
    assert (
        "45.0 µs on the CPU (cpu-a) and 71.2 µs on the GPU, copies included (sm90-b): keep it on the CPU"
        in note
    )
    assert "not measured" not in note
    assert against_gpu((variant("cpu-a", 0.08), gpu), {"sm90-b": 3}) == ()


def test_a_gpu_that_is_not_here_is_judged_by_what_its_round_trip_costs_at_least() -> None:
    engine = variant("sm89-b", None, verdict="compiled, not run here")
    (sure,) = against_gpu((variant("cpu-a", 0.012), engine), {"sm89-b": 17})
    assert (
        "at least 32.7 µs: keep it on the CPU (not measured here" in sure and "17 kernels of sm89-b" in sure
    )
    (unsure,) = against_gpu((variant("cpu-a", 0.045), engine), {"sm89-b": 17})
    assert "78.0 µs launched kernel by kernel, and at least 32.7 µs" in unsure and "keep it" not in unsure
    assert against_gpu((variant("cpu-a", 0.5), engine), {"sm89-b": 17}) == ()
    (without,) = against_gpu((variant("cpu-a", 0.012),), {})
    assert "at least 15.1 µs" in without and "1 kernel at" in without


def test_nothing_is_said_where_the_cpu_was_not_measured_or_failed() -> None:
    assert against_gpu((), {}) == against_gpu((variant("cpu-a", None),), {}) == ()
    assert against_gpu((variant("cpu-a", 0.01, verdict="fail"),), {}) == ()


def test_each_loser_is_explained_in_one_line() -> None:
    best = variant("cpu-a", 0.010, size_bytes=4_000_000)
    others = (
        variant("cpu-b", 0.025),
        variant("cpu-c", 0.1, dropped="median 0.1 ms after 40 calls, more than 2 times the 0.01 ms of cpu-a"),
        variant("cpu-d", None, verdict="fail", reason="auc drop 0.1, over max_drop 0.01"),
        variant("cpu-e", None, verdict="refused", reason="no FP16 kernels", file=None),
        variant("sm89-f", None, verdict="compiled, not run here"),
    )
    assert losers("cpu", (best, *others), best) == {
        "cpu-b": "2.50x the time: p50 25.0 µs",
        "cpu-c": "not timed to the end: median 0.1 ms after 40 calls, more than 2 times the 0.01 ms of cpu-a",
        "cpu-d": "fail: auc drop 0.1, over max_drop 0.01",
        "cpu-e": "refused: no FP16 kernels",
    }


def test_where_nothing_could_be_timed_the_cost_model_chooses_and_says_so() -> None:
    away = {"verdict": "compiled, not run here"}
    small = variant("sm89-int8", None, cost_ms=0.05, size_bytes=3_000_000, **away)
    large = variant("sm89-fp16", None, cost_ms=0.08, size_bytes=2_000_000, **away)
    chosen = choose("sm89", (large, small))
    assert chosen.variant is small
    assert chosen.reason == (
        "cheapest by the cost model (50.0 µs, 3.0 MB) of 2 within the gates; its latency was not measured: no sm89 here"
    )
    assert losers("sm89", (large, small), small) == {"sm89-fp16": "1.60x the cost by the model, 2.0 MB"}


def test_the_front_holds_what_nothing_beats() -> None:
    fast = variant("cpu-fast", 0.01, drop_high=0.02, size_bytes=4)
    exact = variant("cpu-exact", 0.05, drop_high=0.0, size_bytes=16)
    beaten = variant("cpu-beaten", 0.06, drop_high=0.01, size_bytes=16)
    elsewhere = variant("sm89-x", None, drop_high=0.5, cost_ms=0.02, size_bytes=99)
    unjudged = variant("cpu-failed", 0.001)
    assert front((fast, exact, beaten, elsewhere, unjudged)) == ("cpu-fast", "cpu-exact", "sm89-x")
