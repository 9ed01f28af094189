"""Which layers have to stay in the higher precision, and where an error enters: few evaluations, each of a whole graph.

Pure decisions: the caller judges a graph, these say which one to judge next. Groups of products go by their number, in the
graph's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Judge = Callable[[frozenset[int]], bool]  # groups left in the higher precision -> whether the budget is met
Noise = Callable[
    [frozenset[int]], float
]  # groups in the lower precision -> squared error of the output, may be infinite


@dataclass(frozen=True)
class Promoted:
    """`groups` stay in the higher precision; None: no graph met the budget. `evaluations` is how often `judge` was asked."""

    groups: frozenset[int] | None
    evaluations: int


def fewest_promotions(
    order: Sequence[int], judge: Judge, *, evaluations: int, gain: Sequence[float]
) -> Promoted:
    """The shortest prefix of `order` found that meets the budget when promoted, less what it turns out not to need.

    `order` holds the groups that may be promoted, the most harmful first; promoting none is known to miss the budget, and
    promoting all is judged first. Then bisection asks at most ceil(log2(len(order))) times. It rests on the drop falling as
    more is promoted; what is returned was judged itself, whether or not that holds. Evaluations that are left try to take
    promoted groups back, the one with the largest `gain` (by group: what the lower precision saves there) first.
    """
    if not order or not judge(frozenset(order)):
        return Promoted(None, min(1, len(order)))
    found, asked, low, high = frozenset(order), 1, 0, len(order)
    while high - low > 1 and asked < evaluations:
        middle = (low + high) // 2
        promoted = frozenset(order[:middle])
        asked += 1
        if judge(promoted):
            found, high = promoted, middle
        else:
            low = middle
    needed = {order[high - 1]} if high - low == 1 else set()
    for group in sorted(found - needed, key=lambda group: gain[group], reverse=True):
        if asked >= evaluations:
            break
        asked += 1
        if judge(found - {group}):
            found = found - {group}
    return Promoted(found, asked)


@dataclass(frozen=True)
class Located:
    """Where the error enters. `share` of the whole squared error is gone when `group` alone is left in FP32."""

    group: int
    share: float
    total: float
    evaluations: int


def locate(noise: Noise, suspects: Collection[int]) -> Located:
    """The group that the output's error comes from, by halving: 2 + ceil(log2(len(suspects))) evaluations.

    Groups that are no suspects stay in FP32 throughout. At each step only the first half of the suspects is in the lower
    precision: with two faults one is found, and not hidden by the other. Errors of layers add up in squares, so the second
    half's is what the first leaves of the whole. The answer is right wherever one group's error is larger than the
    difference of the others' in the two halves.
    """
    left = sorted(suspects)
    everything = frozenset(left)
    total = current = noise(everything)
    asked = 1
    while len(left) > 1:
        half = left[: len(left) // 2]
        here = noise(frozenset(half))
        asked += 1
        if here >= current / 2 or not math.isfinite(here):
            left, current = half, here
        else:
            left = left[len(half) :]
            current = max(current - here, 0.0)
    rest = noise(everything - {left[0]}) if len(everything) > 1 else 0.0
    return Located(left[0], _share(total, rest), total, asked + 1)


def _share(total: float, rest: float) -> float:
    if not math.isfinite(rest) or total <= 0:
        return 0.0
    return max(0.0, 1 - rest / total) if math.isfinite(total) else 1.0
