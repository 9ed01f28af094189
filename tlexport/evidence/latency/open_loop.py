"""How long a request waits and is served when requests arrive at a rate of their own, whatever happened to the last one.

An open loop: the schedule is drawn beforehand, and a latency counts from the *scheduled* start. A loop that counts from the
real start, or that waits for an answer before it asks again, leaves out just the requests that a stall makes wait
(Tene's coordinated omission; Schroeder, Wierman and Harchol-Balter 2006, Open versus closed). Requests queue in the order
of their arrival for the first worker that is free.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from tlexport.evidence.latency import histogram, stationarity
from tlexport.evidence.latency.quantiles import Floats, queued_percentile
from tlexport.evidence.latency.recorder import Call, collector_off
from tlexport.timings import Latency, OpenLoop

Arrivals = Literal["poisson", "fixed"]

SPIN_S = 0.0003  # a sleep ends up to a tenth of a millisecond late, and seldom more
GRACE_S = 5.0
LATE = 0.1  # share of the latency that may be the generator's own lateness
GROWN = 2.0  # a last tenth that waits so many times the first half


_Row = tuple[int, float, float, float, object]  # request, free, started, done, what the call returned


class Clock(Protocol):
    """Where the loop's time comes from: the machine, or a simulation."""

    def now(self) -> float:
        """Seconds since any fixed moment."""
        ...

    def wait_until(self, moment: float) -> None: ...


class Wall:
    """The machine's clock. The last SPIN_S are spun; several workers give the interpreter away meanwhile."""

    def __init__(self, workers: int = 1) -> None:
        self.now = time.perf_counter
        # A thread that spins holds the interpreter for 5 ms at a time, which the other workers' answers would show.
        self._pause: Callable[[], object] = (lambda: None) if workers == 1 else (lambda: time.sleep(0))

    def wait_until(self, moment: float) -> None:
        now, pause = self.now, self._pause
        if (left := moment - now()) > SPIN_S:
            time.sleep(left - SPIN_S)
        while now() < moment:
            pause()


@dataclass(frozen=True)
class Served:
    """What became of each request that was started, in the order of arrival: seconds [n] since the loop began."""

    scheduled: Floats
    started: Floats
    done: Floats
    free: Floats  # when its worker had nothing else to do any more
    waiting: Floats  # [u] scheduled starts of those that no worker had taken up when the time was up
    ended: float  # when the last worker stopped
    workers: int
    returned: tuple[object, ...] = ()  # what the call of each returned, or what that returned

    @property
    def latency(self) -> Floats:
        """Seconds [n + u] from the scheduled start to the answer; of the unserved, what they had waited at the end."""
        return np.concatenate([self.done - self.scheduled, self.ended - self.waiting])

    @property
    def service(self) -> Floats:
        """Seconds [n] from the real start to the answer."""
        return self.done - self.started

    @property
    def lag(self) -> Floats:
        """Seconds [n] for which a request was due and its worker free, and the generator had not started it yet."""
        return self.started - np.maximum(self.scheduled, self.free)


def schedule(rate_per_s: float, seconds: float, arrivals: Arrivals, seed: int) -> Floats:
    """Scheduled starts [n] in seconds from 0, rising: `rate_per_s * seconds` of them, rounded.

    Poisson: exponential gaps, so that the last start is only about `seconds` away. Raises ValueError if there is none.
    """
    count = round(rate_per_s * seconds)
    if count < 1 or not math.isfinite(rate_per_s):
        raise ValueError(
            f"{rate_per_s:g} requests a second for {seconds:g} s are none; ask for more or for longer"
        )
    if arrivals == "fixed":
        return np.arange(count, dtype=np.float64) / rate_per_s
    return np.random.default_rng(seed).exponential(1 / rate_per_s, size=count).cumsum()


def run(calls: Sequence[Call], at: Floats, *, clock: Clock | None = None, grace_s: float = GRACE_S) -> Served:
    """Ask at the moments `at` [n >= 1] in seconds, with one worker for each of `calls`; a call must return when it is answered.

    What a call returns is kept. If that can be called, it is, once the time of the answer is taken: looking at the answer is no
    part of it, and the worker is free only afterwards. One worker runs in this thread, several in threads of their own; each call
    is only ever made by one of them. Requests not started `grace_s` after the last moment are left unserved: a rate beyond the
    capacity ends too. A simulated clock can have one worker only. What a call raises ends the run and is raised here.
    """
    if not calls or not len(at):
        raise ValueError("an open loop needs a call and a moment")
    kept = clock or Wall(len(calls))
    queue = deque(enumerate(at.tolist()))
    with collector_off():
        # Only now: the collection that goes before takes as long as a hundred requests.
        began = kept.now()
        rows = _together(calls, queue, kept, began, began + float(at[-1]) + grace_s)
        ended = kept.now() - began
    ordered = sorted((row for of in rows for row in of), key=lambda row: row[0])
    table = np.array([row[:4] for row in ordered], dtype=np.float64).reshape(-1, 4)
    taken = table[:, 0].astype(int)
    free, started, done = (table[:, column] - began for column in (1, 2, 3))
    return Served(
        scheduled=at[taken],
        started=started,
        done=done,
        free=free,
        waiting=np.delete(at, taken),
        ended=ended,
        workers=len(calls),
        returned=tuple(row[4] for row in ordered),
    )


def _together(
    calls: Sequence[Call], queue: deque[tuple[int, float]], clock: Clock, began: float, stop: float
) -> list[list[_Row]]:
    """What each worker did; a single one works in this thread."""
    if len(calls) == 1:
        return [_work(calls[0], queue, clock, began, stop)]

    def work(call: Call) -> list[_Row]:
        try:
            return _work(call, queue, clock, began, stop)
        except BaseException:
            queue.clear()  # the others end, too
            raise

    with ThreadPoolExecutor(len(calls), thread_name_prefix="open-loop") as pool:
        futures = [pool.submit(work, call) for call in calls]
        try:
            return [future.result() for future in futures]
        finally:
            queue.clear()


def _work(call: Call, queue: deque[tuple[int, float]], clock: Clock, began: float, stop: float) -> list[_Row]:
    """One worker: what became of each request that it took, on the clock."""
    now, wait_until = clock.now, clock.wait_until
    rows: list[_Row] = []
    free = now()
    while True:
        try:
            request, moment = queue.popleft()
        except IndexError:
            return rows
        wait_until(began + moment)
        started = now()
        if started > stop:
            return rows
        returned = call()
        done = now()
        if callable(returned):
            returned = returned()
            rows.append((request, free, started, done, returned))
            free = now()
        else:
            rows.append((request, free, started, done, returned))
            free = done


def summary(served: Served, arrivals: Arrivals, rate_per_s: float) -> OpenLoop:
    """Describe an open loop. Raises ValueError if not one request was served."""
    if not len(served.done):
        raise ValueError("not one request was served")
    span = served.ended
    requests = len(served.latency)
    last = float(max(served.scheduled.max(), served.waiting.max(initial=0.0)))
    return OpenLoop(
        arrivals=arrivals,
        rate_per_s=rate_per_s,
        offered_per_s=(requests - 1) / last if last else float(requests),
        completed_per_s=len(served.done) / span,
        workers=served.workers,
        seconds=span,
        requests=requests,
        unserved=len(served.waiting),
        utilisation=float(served.service.sum()) / (served.workers * span),
        latency=distribution(served.latency, span),
        service=distribution(served.service, span, drift=stationarity.drift(served.service)),
        lag_p50_ms=1e3 * float(np.median(served.lag)),
        lag_p99_ms=1e3 * float(np.quantile(served.lag, 0.99)),
        generator=late(served),
        overload=overload(served),
    )


def distribution(seconds: Floats, span: float, drift: str = "") -> Latency:
    """Describe times [n >= 1] in seconds of requests that queue, in the order of arrival, over `span` seconds."""
    return Latency(
        count=len(seconds),
        p50=queued_percentile(seconds, 0.5),
        p90=queued_percentile(seconds, 0.9),
        p99=queued_percentile(seconds, 0.99),
        mean_ms=1e3 * float(seconds.mean()),
        min_ms=1e3 * float(seconds.min()),
        max_ms=1e3 * float(seconds.max()),
        throughput_per_s=len(seconds) / span,
        histogram=histogram.encode(seconds),
        drift=drift,
    )


def late(served: Served) -> str:
    """What to say if it was the generator, and not the model, that made requests late; empty if it was not.

    The same requests are queued once more with the same times of service, each started the moment that it is due and a worker
    free. What that leaves of the latency is the model's.
    """
    if not len(served.done):
        return ""
    real, due = served.done - served.scheduled, prompt(served)
    everywhere = 1 - float(due.mean() / real.mean())
    in_tail = 1 - float(np.quantile(due, 0.99) / np.quantile(real, 0.99))
    if max(everywhere, in_tail) <= LATE:
        return ""
    return (
        f"the generator itself was late: without its lateness the mean would be {everywhere:.0%} and the p99 {in_tail:.0%} "
        "lower; use a lower rate, fewer workers or an idler machine"
    )


def prompt(served: Served) -> Floats:
    """Seconds [n] from the scheduled start to the answer in a queue with the real times of service and nothing else."""
    free = [0.0] * served.workers  # a heap of when each is
    answered = []
    for moment, takes in zip(served.scheduled.tolist(), served.service.tolist(), strict=True):
        done = max(moment, free[0]) + takes
        heapq.heapreplace(free, done)
        answered.append(done)
    return np.array(answered) - served.scheduled


def overload(served: Served) -> str:
    """What to say if the queue grew until the end; empty if it did not."""
    if len(served.waiting):
        return (
            f"{len(served.waiting)} of {len(served.latency)} requests were not started "
            f"{served.ended - served.scheduled[-1]:.1f} s after they were due: the rate is beyond what can be served"
        )
    waits = prompt(served) - served.service  # a generator that falls behind is no queue of the model's
    if len(waits) < 2 * stationarity.DRIFT_PARTS:
        return ""
    parts = np.array([np.median(part) for part in np.array_split(waits, stationarity.DRIFT_PARTS)])
    grew = stationarity.trend(parts) < stationarity.DRIFT_LEVEL and parts[-1] > parts[0]
    usual = float(np.median(served.service))
    if not grew or parts[-2:].mean() < max(GROWN * parts[: len(parts) // 2].mean(), usual):
        return ""
    return (
        f"the queue grew: requests waited {1e3 * parts[0]:.3g} ms at first and {1e3 * parts[-1]:.3g} ms at the end; "
        "the rate is beyond what can be served"
    )
