"""What is made of an open loop's requests: counted on simulated ones, so that no clock decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tlexport.evidence.latency import capacity
from tlexport.evidence.latency.open_loop import Served
from tlexport.evidence.live import traffic
from tlexport.evidence.live.traffic import Traffic


def loop(kinds: list[str], rate: float = 100.0) -> Traffic:
    """One request every 1/rate seconds, started when it is due and answered in about a millisecond, each by itself."""
    at = np.arange(len(kinds)) / rate
    service_s = np.random.default_rng(0).uniform(0.0005, 0.0015, len(at))
    return Traffic(
        Served(
            scheduled=at,
            started=at,
            done=at + service_s,
            free=np.maximum(at - 0.001, 0.0),
            waiting=np.empty(0),
            ended=float((at + service_s)[-1]),
            workers=1,
            returned=tuple(kinds),
        )
    )


def test_only_right_answers_are_goodput() -> None:
    found = loop(["ok"] * 60 + ["overload"] * 30 + ["wrong"] * 10)
    assert found.counts == {"ok": 60, "overload": 30, "wrong": 10}
    assert found.goodput == pytest.approx(60 / found.served.ended) and found.shed == 0.3
    assert found.failed == pytest.approx(0.4) and len(found.latency) == 60


def test_a_refusal_is_no_fast_answer() -> None:
    """2% are refused within a microsecond: the p99 of all is over any limit, though that of the answered is 1 ms."""
    found = loop((["ok"] * 49 + ["overload"]) * 40)
    assert capacity.judged(found.served, 100, 20, 50.0).verdict == "within"
    assert capacity.judged(found.as_one(30.0), 100, 20, 50.0).verdict == "over"
    assert capacity.judged(loop(["ok"] * 2000).as_one(30.0), 100, 20, 50.0).verdict == "within"


def test_requests_that_find_every_connection_busy_are_told() -> None:
    found = loop(["ok"] * 100)
    assert found.held_back() == "" and found.waited == 0
    busy = replace(found.served, free=found.served.scheduled + 0.004, started=found.served.scheduled + 0.004)
    assert Traffic(busy).waited == 1 and "raise --concurrency" in Traffic(busy).held_back()
    unsent = replace(found.served, waiting=np.array([2.0, 3.0]), ended=10.0)
    assert Traffic(unsent).counts["unsent"] == 2 and Traffic(unsent).failed == pytest.approx(2 / 102)


def test_an_answer_is_wrong_beyond_the_limit_in_another_shape_or_not_finite() -> None:
    expected = np.zeros((2, 3), np.float32)
    assert traffic.wrong(expected + 0.05, expected, 0.1) == (False, pytest.approx(0.05))
    assert traffic.wrong(expected + 0.2, expected, 0.1)[0]
    assert traffic.wrong(expected[:1], expected, 0.1)[0]
    assert traffic.wrong(np.full_like(expected, np.nan), expected, 0.1)[0]


def test_what_was_said_first_is_kept() -> None:
    assert traffic.first_of_each([{"overload": "a"}, {"overload": "b", "wrong": "c"}]) == {
        "overload": "a",
        "wrong": "c",
    }
