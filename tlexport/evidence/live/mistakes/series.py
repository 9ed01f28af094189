"""Mistakes with windows of prices: float32 [n, days, channels], oldest day first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np

from tlexport.evidence.live.mistakes import ROUGH, Mistake, Samples


def known(channels: Sequence[str]) -> tuple[Mistake, ...]:
    """For windows of these channels."""
    prices = [index for index, name in enumerate(channels) if name != "volume"]
    raw = "send prices as they are: the graph makes returns of them"
    found = [
        Mistake(
            "reversed time: the newest day first",
            "send the oldest day first",
            lambda x: np.ascontiguousarray(x[:, ::-1]),
        ),
        Mistake("returns for prices: each day's change", raw, partial(_returns, prices=prices)),
        Mistake("logarithmic returns for prices", raw, partial(_returns, prices=prices, logarithmic=True)),
        Mistake("logarithms of prices for prices", raw, partial(_at, prices=prices, made=np.log)),
        Mistake(
            "growth for prices: each day's price over the day before's", raw, partial(_growth, prices=prices)
        ),
        Mistake("standardised windows for prices", raw, _standardised),
        Mistake(
            "a day late: the window ends a day before it should (only an approximation: the day before the first is "
            "not in the golden samples, the first is repeated)",
            "send the window that ends with the newest day",
            lambda x: np.concatenate([x[:, :1], x[:, :-1]], axis=1),
            ROUGH,
        ),
    ]
    if "volume" in channels:
        index = channels.index("volume")
        found.append(Mistake("no volume: zeros", "send the volume", partial(_zeroed, index=index)))
    return (*found, *_orders(channels))


def _returns(x: Samples, prices: list[int], logarithmic: bool = False) -> Samples:
    made = x.copy()
    ratio = x[:, 1:, prices] / x[:, :-1, prices]
    made[:, 0, prices] = 0
    made[:, 1:, prices] = np.log(ratio) if logarithmic else ratio - 1
    return made


def _growth(x: Samples, prices: list[int]) -> Samples:
    made = _returns(x, prices)
    made[..., prices] += 1
    return made


def _at(x: Samples, prices: list[int], made: np.ufunc) -> Samples:
    changed = x.copy()
    changed[..., prices] = made(x[..., prices])
    return changed


def _standardised(x: Samples) -> Samples:
    spread = x.std(axis=1, keepdims=True)
    made: Samples = (x - x.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return made.astype(np.float32)


def _zeroed(x: Samples, index: int) -> Samples:
    made = x.copy()
    made[..., index] = 0
    return made


def _orders(channels: Sequence[str]) -> list[Mistake]:
    advice = f"send the channels in this order: {', '.join(channels)}"
    orders = {
        "channels in alphabetical order": sorted(range(len(channels)), key=lambda i: channels[i]),
        "channels in reverse order": list(range(len(channels)))[::-1],
    }
    for a, b in itertools.combinations(range(len(channels)), 2):
        order = list(range(len(channels)))
        order[a], order[b] = b, a
        orders[f"channels swapped: {channels[a]} and {channels[b]}"] = order
    return [Mistake(says, advice, partial(_taken, order=order)) for says, order in orders.items()]


def _taken(x: Samples, order: list[int]) -> Samples:
    return np.ascontiguousarray(x[..., order])
