"""Which layers have to stay in the higher precision, and where an error enters: few evaluations, each of a whole graph.

Pure decisions: the caller judges a graph, these say which one to judge next. Groups of products go by their number, in the
graph's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

    `order` holds every group, the most harmful first; promoting none is known to miss the budget and promoting all leaves
    nothing in the lower precision. Bisection asks at most ceil(log2(len(order))) times. It rests on the drop falling as
    more is promoted; what is returned was judged itself, whether or not that holds. Evaluations that are left try to take
    promoted groups back, the one with the largest `gain` (by group: what the lower precision saves there) first.
    """
    asked, low, high = 0, 0, len(order)
    found: frozenset[int] | None = None
    while high - low > 1 and asked < evaluations:
        middle = (low + high) // 2
        promoted = frozenset(order[:middle])
        asked += 1
        if judge(promoted):
            found, high = promoted, middle
        else:
            low = middle
    if found is None:
        return Promoted(None, asked)
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


def locate(count: int, noise: Noise, *, among: frozenset[int] | None = None) -> Located:
    """The group that the output's error comes from, by halving: 1 + ceil(log2(count)) + 1 evaluations.

    At each step only the first half of the suspects is in the lower precision: with two faults the first one is found, and
    not hidden by the other. Errors of layers add up in squares, so that the second half's is what is left of the whole.
    `among` restricts the suspects, the others stay in FP32 throughout (to find a second fault behind a first).
    The answer is right wherever one group's error is larger than the difference of the others' in the two halves.
    """
    suspects = sorted(among if among is not None else range(count))
    everything = frozenset(suspects)
    total = current = noise(everything)
    asked = 1
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        here = noise(frozenset(half))
        asked += 1
        if here >= current / 2 or not math.isfinite(here):
            suspects, current = half, here
        else:
            suspects = suspects[len(half) :]
            current = current if not math.isfinite(current) else max(current - here, 0.0)
    rest = noise(everything - {suspects[0]})
    share = 1.0 if not math.isfinite(total) and math.isfinite(rest) else _share(total, rest)
    return Located(suspects[0], share, total, asked + 1)


def _share(total: float, rest: float) -> float:
    if not math.isfinite(total) or not math.isfinite(rest) or total <= 0:
        return 0.0
    return max(0.0, 1 - rest / total)
