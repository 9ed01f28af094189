"""The searches, on judges whose answer is known: what they find, and how often they ask."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlexport.graph.search import fewest_promotions, locate


@given(st.integers(2, 200), st.data())
def test_bisection_finds_the_least_number_in_log2_evaluations(count: int, data: st.DataObject) -> None:
    needed = data.draw(st.integers(1, count))
    order = data.draw(st.permutations(range(count)))
    asked: list[frozenset[int]] = []

    def judge(promoted: frozenset[int]) -> bool:
        asked.append(promoted)
        return promoted >= set(order[:needed])

    found = fewest_promotions(order, judge, evaluations=100, gain=[0.0] * count)
    assert found.groups == set(order[:needed])
    bisection = math.ceil(math.log2(count))
    assert (
        found.evaluations == len(asked) <= 1 + bisection + needed - 1
    )  # what is left tries to take each one back


def test_a_group_that_was_not_needed_is_taken_back_the_most_expensive_first() -> None:
    order, needed = [4, 2, 7, 1, 0, 3, 5, 6], {4, 1}

    def judge(promoted: frozenset[int]) -> bool:
        return promoted >= needed

    gain = [0.0, 1.0, 5.0, 0.0, 2.0, 0.0, 0.0, 9.0]
    assert fewest_promotions(order, judge, evaluations=20, gain=gain).groups == needed
    tight = fewest_promotions(order, judge, evaluations=5, gain=gain)
    assert (
        tight.groups == {4, 2, 1} and tight.evaluations == 5
    )  # all, three halvings, and one left: group 7 costs most


def test_what_is_returned_was_judged_itself_though_the_drop_jumps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        passing = set(map(int, np.flatnonzero(rng.random(40) < 0.3)))
        judged: list[frozenset[int]] = []

        def judge(promoted: frozenset[int]) -> bool:
            judged.append(promoted)  # noqa: B023
            return len(promoted) in passing or len(promoted) == 40  # noqa: B023

        found = fewest_promotions(range(40), judge, evaluations=6, gain=[1.0] * 40)
        assert len(judged) <= 6
        assert found.groups is None or (found.groups in judged and len(found.groups) in {*passing, 40})


def test_no_graph_within_the_budget_is_none() -> None:
    found = fewest_promotions(range(50), lambda _: False, evaluations=12, gain=[1.0] * 50)
    assert found.groups is None and found.evaluations == 1


@pytest.mark.parametrize("count", [1, 2, 3, 33, 50, 64, 257])
def test_one_fault_among_noise_is_found_wherever_it_is(count: int) -> None:
    rng = np.random.default_rng(count)
    background = rng.random(count)
    for fault in range(count):
        size = background.copy()
        size[fault] += background.sum()  # larger than any difference of the others'
        found = locate(lambda low: float(sum(size[g] for g in low)), range(count))  # noqa: B023
        assert found.group == fault
        assert found.evaluations <= math.ceil(math.log2(count)) + 2
        assert found.share == pytest.approx(size[fault] / size.sum())


def test_of_two_faults_that_overflow_one_is_found_and_then_the_other() -> None:
    faults = {5, 40}

    def noise(low: frozenset[int]) -> float:
        return math.inf if faults & low else 1e-6 * len(low)

    first = locate(noise, range(50))
    assert first.group == 5 and first.share == 0.0  # without it the answer is still not finite
    second = locate(noise, set(range(50)) - {5})
    assert second.group == 40 and second.share == 1.0


def test_an_error_that_is_spread_is_not_blamed_on_one_layer() -> None:
    assert locate(lambda low: float(len(low)), range(40)).share == pytest.approx(1 / 40)
