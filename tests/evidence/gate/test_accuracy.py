from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tlexport.evidence.gate import accuracy
from tlexport.modalities.metrics import METRICS
from tlexport.results import GateVerdict


def gate(lost: int, mended: int, n: int = 1000, tolerance: float = 0.0) -> GateVerdict:
    """An old build that is right on all but 100, and a new one that loses and mends so many."""
    labels = np.zeros(n, np.int64)
    old = np.tile([0.9, 0.1], (n, 1))
    old[:100] = [0.1, 0.9]
    new = old.copy()
    new[100 : 100 + lost] = [0.1, 0.9]
    new[:mended] = [0.9, 0.1]
    right = [answers.argmax(axis=1) == labels for answers in (old, new)]
    prepare = METRICS["accuracy"]
    return accuracy.compare(
        prepare(labels, old),
        prepare(labels, new),
        n,
        name="m",
        against="old",
        metric="accuracy",
        tolerance=tolerance,
        mcnemar_p=accuracy.worse(*right),
    )


def test_a_drop_of_twice_the_margin_fails_and_none_passes() -> None:
    assert gate(40, 5, tolerance=0.01).verdict == "fail"
    assert gate(3, 3, tolerance=0.01).verdict == "pass"
    verdict = gate(15, 3, tolerance=0.01)
    assert verdict.verdict == "undecided" and verdict.needed is not None and verdict.needed > 1000
    assert "undecided on 1000 samples, about" in verdict.reason and verdict.value == pytest.approx(0.012)


def test_a_rounding_does_not_decide() -> None:
    same = gate(0, 0, tolerance=0.0)
    assert (same.verdict, same.value, same.low, same.high) == ("pass", 0.0, 0.0, 0.0)


def test_few_changed_decisions_need_mcnemar_too() -> None:
    """Four lost of four: no resample shows a gain, yet a coin falls so once in sixteen times."""
    verdict = gate(4, 0)
    assert verdict.low is not None and verdict.low > 0 and verdict.verdict == "undecided"
    assert verdict.reason.endswith("undecided on 1000 samples, too few decisions changed (McNemar's p 0.031)")
    assert gate(7, 0).verdict == "fail"


@pytest.mark.parametrize(("lost", "mended"), [(0, 0), (0, 5), (4, 0), (7, 2), (30, 30)])
def test_mcnemars_mid_p_is_the_binomials(lost: int, mended: int) -> None:
    old = np.repeat([True, False], [lost, mended])
    n = lost + mended
    expected = stats.binom.sf(lost, n, 0.5) + stats.binom.pmf(lost, n, 0.5) / 2 if n else 1.0
    assert accuracy.worse(old, ~old) == pytest.approx(expected)
