"""A shuffled stream of golden samples in requests of mixed sizes, over several connections at once, each answer kept with its request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
Ask = Callable[[int, Rows], NDArray[Any]]  # (number of the request, golden samples in it) -> answers [b, K]


@dataclass(frozen=True)
class Asked:
    """rows[i], answers[i]: what request i was of and what came back."""

    rows: tuple[Rows, ...]
    answers: tuple[NDArray[Any], ...]


def drawn(golden: int, samples: int, largest: int, seed: int) -> tuple[Rows, ...]:
    """Golden samples for each request, of 1 to `largest` and small ones as often as large ones (log-uniform), until there are
    at least `samples` in all; every one is in it about as often as the others, in random order.
    """
    rng = np.random.default_rng(seed)
    rounds = -(-samples // golden)
    order = np.concatenate([rng.permutation(golden) for _ in range(rounds)])
    requests, at = [], 0
    while at < len(order):
        size = int(np.exp(rng.uniform(0, np.log(largest + 1))))
        requests.append(order[at : at + size])
        at += size
    return tuple(requests)


def sent(asks: Sequence[Ask], requests: Sequence[Rows]) -> Asked:
    """Every request over the connection that is free next. What an ask raises ends the stream and is raised here."""
    answers: list[NDArray[Any] | None] = [None] * len(requests)
    waiting = iter(range(len(requests)))
    taking = threading.Lock()
    failed = threading.Event()

    def work(ask: Ask) -> None:
        while not failed.is_set():
            with taking:
                index = next(waiting, None)
            if index is None:
                return
            try:
                answers[index] = ask(index, requests[index])
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(len(asks), thread_name_prefix="stream") as pool:
        futures = [pool.submit(work, ask) for ask in asks]
        for future in futures:
            future.result()
    return Asked(tuple(requests), tuple(of for of in answers if of is not None))
