"""Answers held against what they should be: limits, bits, places, metadata; and the stream that asks for them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tlexport.evidence.live import parity, stream, verdict
from tlexport.evidence.live.verdict import Seen, Truth
from tlexport.tensors import TensorSpec

RNG = np.random.default_rng(0)
OWN = RNG.random((6, 3)).astype(np.float32)


def truth(error: float = 0.001, **settings: object) -> Truth:
    given = {"expected": OWN, "error": error, "own": {1: OWN, 2: OWN}, "why_not": "", "decide": None}
    return Truth(**{**given, **settings})


def test_differences_name_the_worst_sample_and_what_is_not_finite() -> None:
    answers = OWN.copy()
    answers[4, 1] += 0.5
    found = parity.differences(answers, OWN, 0.1)
    assert found.over == 1 and found.worst_sample == 4 and found.max_abs_error == pytest.approx(0.5)
    answers[2, 0] = np.inf
    found = parity.differences(answers, OWN, 0.1)
    assert found.over == 2 and found.not_finite == (2,) and found.max_abs_error == pytest.approx(0.5)
    assert parity.differences(np.full_like(OWN, np.nan), OWN, 0.1).max_abs_error is None


def test_a_difference_of_twice_the_limit_fails_and_of_half_of_it_passes() -> None:
    of = truth()
    for share, wanted in ((2.0, "fail"), (0.5, "pass")):
        answers = OWN.copy()
        answers[0, 0] += share * of.limit
        seen = Seen(answers, {}, None)
        assert verdict.judged(of, seen, tuple).verdict == wanted


def test_bits_are_compared_with_those_at_every_batch_size() -> None:
    other, third = np.nextafter(OWN, np.float32(2)), np.nextafter(OWN, np.float32(-2))
    of = truth(own={1: OWN, 2: other, 4: other})
    mixed = np.concatenate([OWN[:2], other[2:3], third[3:]])
    one, two, four = verdict.bits(of, Seen(OWN, {2: OWN, 4: mixed}, None))
    assert (one.identical, one.at_other_batch) == (6, {})
    assert (two.identical, two.at_other_batch) == (0, {"1": 6})
    assert (four.identical, four.at_other_batch) == (1, {"1": 2}), "three are no session's at any size"
    (early,) = verdict.bits(of, Seen(other, {}, None))
    assert early.at_other_batch == {"2": 6}, "counted once, at the smallest size"
    zero = np.zeros((1, 2), np.float32)
    assert not parity.identical(zero, -zero)[0], "0 and -0 are equal and have other bits"
    assert parity.identical(zero * np.nan, zero * np.nan)[0]


def test_every_check_has_its_verdict_and_the_worst_is_the_whole() -> None:
    of = truth()
    far = OWN + np.float32(2 * of.limit)
    asked = stream.Asked((np.arange(6),), (OWN,))

    def verdicts(seen: Seen) -> tuple[str, list[str]]:
        found = verdict.judged(of, seen, tuple)
        assert found.reason or found.verdict == "pass"
        return found.verdict, [check.verdict for check in found.checks]

    assert verdicts(Seen(OWN, {2: OWN}, asked)) == ("pass", ["pass"] * 4)
    assert verdicts(Seen(OWN, {2: OWN}, None)) == ("pass", ["pass"] * 3), "no stream was asked for"
    assert verdicts(Seen(OWN, {2: OWN}, asked, ("another input",))) == ("fail", ["fail", *["pass"] * 3])
    assert verdicts(Seen(far, {2: OWN}, asked)) == ("fail", ["pass", "fail", "pass", "pass"])
    assert verdicts(Seen(OWN, {2: far}, asked)) == ("fail", ["pass", "pass", "fail", "pass"])
    swapped = stream.Asked((np.arange(6),), (OWN[::-1],))
    assert verdicts(Seen(OWN, {2: OWN}, swapped)) == ("fail", [*["pass"] * 3, "fail"])
    unknown = verdict.judged(truth(1.0), Seen(far, {}, None), tuple)
    assert [check.verdict for check in unknown.checks] == ["pass", "undecided"]
    assert unknown.reason == unknown.checks[1].reason
    both = verdict.judged(of, Seen(far, {2: far}, swapped), tuple)
    assert "in requests of 2" not in both.reason and "to other samples" in both.reason


def test_a_session_that_errs_as_the_server_does_excuses_nothing() -> None:
    """The variant computes otherwise on this machine than where it was verified: the server's answers are beyond the limit."""
    of = truth()
    far = OWN + np.float32(2 * of.limit)
    found = verdict.judged(truth(own={1: far}), Seen(far, {}, None), tuple)
    assert found.verdict == "fail" and "so do this machine's session's" in found.reason


def test_an_exchange_between_requests_is_told_from_a_difference() -> None:
    rows = np.array([0, 1, 2])
    found = parity.misplaced(7, rows, OWN[[0, 2, 1]], OWN, 1e-4)
    assert found is not None and found.request == 7 and found.answered == (0, 2, 1)
    duplicated = parity.misplaced(7, rows, OWN[[0, 0, 2]], OWN, 1e-4)
    assert duplicated is not None and duplicated.answered == (0, 0, 2)
    assert parity.misplaced(7, rows, OWN[rows], OWN, 1e-4) is None
    assert parity.misplaced(7, rows, OWN[rows] + 0.01, OWN, 1e-4) is None
    assert parity.indistinct(OWN, 1e-4) == 0 and parity.indistinct(OWN[[0, 0, 1]], 1e-4) == 1


def test_a_limit_as_wide_as_the_outputs_decides_nothing_alone() -> None:
    """Where verify measured an error as large as the outputs, any answer is within it: only a session here can tell."""
    other = OWN[::-1].copy()
    found = verdict.judged(truth(1.0, own={}, why_not="no GPU here"), Seen(OWN, {}, None), tuple)
    assert found.verdict == "undecided" and "no GPU here" in found.reason
    assert verdict.judged(truth(1.0), Seen(OWN, {}, None), tuple).verdict == "pass"
    assert verdict.judged(truth(1.0), Seen(other, {}, None), tuple).verdict == "undecided"
    shifted = OWN + np.float32(0.1)
    for seen in (
        Seen(OWN, {2: shifted}, None),
        Seen(OWN, {}, stream.Asked((np.arange(6),), (shifted,))),
    ):
        found = verdict.judged(truth(1.0), seen, tuple)
        assert found.verdict == "undecided" and "answers otherwise, by up to 0.1" in found.reason
    assert verdict.judged(truth(1.0), Seen(OWN, {2: OWN}, None), tuple).verdict == "pass"


def test_metadata_that_is_not_the_manifests_is_told() -> None:
    specs = [TensorSpec(name="images", dtype="uint8", shape=("batch", 3, 8, 8))]
    assert parity.metadata([("images", "uint8", (-1, 3, 8, 8))], specs, "input") == []
    (dtype,) = parity.metadata([("images", "float32", (-1, 3, 8, 8))], specs, "input")
    assert "float32" in dtype
    (shape,) = parity.metadata([("images", "uint8", (-1, 8, 8, 3))], specs, "input")
    assert "[-1, 8, 8, 3]" in shape
    missing, more = parity.metadata([("x", "uint8", (-1, 3, 8, 8))], specs, "input")
    assert "the server has: x" in missing and "none of that name" in more


def test_a_stream_asks_every_sample_as_often_in_mixed_sizes() -> None:
    requests = stream.drawn(6, 200, 8, 1)
    sizes = {len(rows) for rows in requests}
    counts = np.bincount(np.concatenate(requests), minlength=6)
    assert sizes == set(range(1, 9)) and (counts == counts[0]).all() and counts.sum() >= 200
    again = stream.drawn(6, 200, 8, 1)
    assert all((a == b).all() for a, b in zip(requests, again, strict=True))
    assert {len(rows) for rows in stream.drawn(6, 20, 1, 0)} == {1}


def test_answers_of_a_stream_stay_with_their_requests() -> None:
    requests = stream.drawn(6, 200, 4, 0)
    threads = set()

    def ask(index: int, rows: np.ndarray) -> np.ndarray:
        threads.add(threading.get_ident())
        return OWN[rows]

    found = stream.sent([ask, ask, ask], requests)
    assert len(found.answers) == len(requests)
    assert all((answers == OWN[rows]).all() for rows, answers in zip(found.rows, found.answers, strict=True))


def test_an_error_ends_a_stream() -> None:
    def ask(index: int, rows: np.ndarray) -> np.ndarray:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stream.sent([ask, ask], stream.drawn(6, 50, 4, 0))
