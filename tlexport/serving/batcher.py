"""Requests of one model version wait here for a worker that is free, which takes as many as it can answer at once.

Nothing waits for company: a free worker takes what is there, so that batches grow with the load alone (adaptive batching as
in Clipper, Crankshaw et al., NSDI 2017, section 4.3, without its delayed mode unless `max_delay` is given). Only the event
loop's thread touches the queue; a worker thread sees nothing but the batch it was handed. Where a run is shorter than a
hand-off to a thread and back, the loop's thread runs it itself (`inline`).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.protocol import Request, Tensors

_SOON = 0.001  # seconds: the resolution of the loop's timers
Outcome = Mapping[str, NDArray[Any]] | ProtocolError
Run = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


class Observer(Protocol):
    """Who is told what the workers do."""

    def ran(self, samples: int, waits: Sequence[float], seconds: float) -> None: ...

    def failed(self, error: Exception) -> None: ...


@dataclass(frozen=True)
class Limits:
    """`batch`: samples that a worker takes at once; `queue`: samples that may wait; `max_delay`: seconds a request may wait for others."""

    batch: int
    queue: int
    max_delay: float = 0.0
    inline: bool = False


@dataclass(eq=False)
class Waiting:
    """A request on its way. `answer` is called once, in the loop's thread, unless it is withdrawn. Times are time.monotonic's:
    uvloop's own clock stands still while the loop's thread works."""

    request: Request
    answer: Callable[[Outcome], None]
    arrived: float
    deadline: float
    withdrawn: bool = field(default=False)


class Batcher:
    """`runs`: for each worker, what answers a batch; they are called from one thread each at a time."""

    def __init__(
        self, runs: Sequence[Run], limits: Limits, observer: Observer, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.limits = limits
        self._observer = observer
        self._loop = loop
        self._free = list(runs)
        self._workers = len(runs)
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[tuple[Run, list[Waiting]] | None] = queue.SimpleQueue()
        if not limits.inline:
            for number in range(len(runs)):
                # A run that never returns must not keep the process from leaving.
                thread = threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        self._waiting: OrderedDict[int, Waiting] = OrderedDict()
        self._samples = 0
        self._scheduled = False
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_time = 0.0
        self._empty: asyncio.Future[None] | None = None

    @property
    def samples(self) -> int:
        """How many wait."""
        return self._samples

    @property
    def full(self) -> bool:
        """Whether not one sample more can wait."""
        return self._samples >= self.limits.queue

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or len(self._free) < self._workers

    def submit(
        self, request: Request, answer: Callable[[Outcome], None], arrived: float, deadline: float
    ) -> Waiting:
        """Queue a request. Raises ProtocolError: 429 if the queue is full, 504 if the deadline has passed.

        A request always finds room in an empty queue, however many samples it has.
        """
        if self._samples and self._samples + request.samples > self.limits.queue:
            raise overloaded()
        if deadline <= time.monotonic():
            raise expired()
        entry = Waiting(request, answer, arrived, deadline)
        self._waiting[id(entry)] = entry
        self._samples += request.samples
        if self._free and not self._scheduled:
            self._schedule()
        if self._sweep is None or deadline < self._sweep_time:
            self._sweep_at(deadline)
        return entry

    def withdraw(self, entry: Waiting) -> None:
        """Nobody wants the answer any more: it is not run if it still waits, and not delivered in any case."""
        entry.withdrawn = True
        self._leave(entry)

    async def drain(self) -> None:
        """Wait until nothing waits or runs, then end the threads. Nothing may be submitted afterwards."""
        if self.busy:
            self._empty = self._loop.create_future()
            await self._empty
        if self._sweep is not None:
            self._sweep.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _leave(self, entry: Waiting) -> bool:
        if self._waiting.pop(id(entry), None) is None:
            return False
        self._samples -= entry.request.samples
        self._tell_empty()
        return True

    def _schedule(self) -> None:
        """Dispatch after everything that this turn of the loop has read."""
        self._scheduled = True
        self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        while self._free and self._waiting:
            if (delay := self._worth_waiting()) > 0:
                self._scheduled = True
                self._loop.call_later(delay, self._dispatch)
                return
            batch = self._take()
            if not batch:
                return
            run = self._free.pop()
            if not self.limits.inline:
                self._jobs.put((run, batch))
                continue
            self._done(run, batch, *_answered(run, batch))
            if self._waiting and not self._scheduled:
                self._schedule()
            return

    def _worth_waiting(self) -> float:
        """Seconds until the oldest request has waited `max_delay`; none if a batch is full."""
        if not self.limits.max_delay or self._samples >= self.limits.batch:
            return 0.0
        oldest = next(iter(self._waiting.values()))
        return oldest.arrived + self.limits.max_delay - time.monotonic()

    def _take(self) -> list[Waiting]:
        """The next whole requests of at most `batch` samples together; one that has more alone. Those too late are dropped unrun."""
        batch: list[Waiting] = []
        samples, now = 0, time.monotonic()
        while self._waiting:
            entry = next(iter(self._waiting.values()))
            if entry.deadline <= now:
                self._drop(entry)
                continue
            if batch and samples + entry.request.samples > self.limits.batch:
                break
            self._waiting.popitem(last=False)
            self._samples -= entry.request.samples
            samples += entry.request.samples
            batch.append(entry)
        return batch

    def _work(self) -> None:
        """A worker's thread."""
        while (job := self._jobs.get()) is not None:
            run, batch = job
            outcomes, seconds, error = _answered(run, batch)
            with contextlib.suppress(
                RuntimeError
            ):  # the loop was closed at the end of a drain that ran out of time
                self._loop.call_soon_threadsafe(self._done, run, batch, outcomes, seconds, error)
            del job, run, batch, outcomes

    def _done(
        self, run: Run, batch: list[Waiting], outcomes: list[Outcome], seconds: float, error: Exception | None
    ) -> None:
        self._free.append(run)
        if error is not None:
            self._observer.failed(error)
        started = time.monotonic() - seconds
        waits = [started - entry.arrived for entry in batch]
        self._observer.ran(sum(entry.request.samples for entry in batch), waits, seconds)
        # The next batch starts before this one's answers are written.
        if not self.limits.inline and self._waiting and not self._scheduled:
            self._dispatch()
        for entry, outcome in zip(batch, outcomes, strict=True):
            self._tell(entry, outcome)
        self._tell_empty()

    def _drop(self, entry: Waiting) -> None:
        if self._leave(entry):
            self._tell(entry, expired())

    def _tell(self, entry: Waiting, outcome: Outcome) -> None:
        if entry.withdrawn:
            return
        try:
            entry.answer(outcome)
        except Exception as error:  # noqa: BLE001  one connection's trouble must not keep the others' answers
            self._observer.failed(error)

    def _sweep_at(self, when: float) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._sweep_time = when
        self._sweep = self._loop.call_later(max(when - time.monotonic(), _SOON), self._drop_expired)

    def _drop_expired(self) -> None:
        self._sweep = None
        now = time.monotonic()
        for entry in [entry for entry in self._waiting.values() if entry.deadline <= now]:
            self._drop(entry)
        if self._waiting:
            self._sweep_at(min(entry.deadline for entry in self._waiting.values()))

    def _tell_empty(self) -> None:
        if self._empty is not None and not self._empty.done() and not self.busy:
            self._empty.set_result(None)


def overloaded() -> ProtocolError:
    return ProtocolError(
        429, "overloaded: as many samples wait as may; try again after a moment", retry_after=1.0
    )


def expired() -> ProtocolError:
    return ProtocolError(504, "the deadline passed before a worker was free; the request was not run")


def _answered(run: Run, batch: Sequence[Waiting]) -> tuple[list[Outcome], float, Exception | None]:
    """An outcome for each request, the seconds it took, and what went wrong.

    Where a batch fails, each of its requests is run once more alone, so that one does not fail its neighbours.
    """
    started = time.perf_counter()
    try:
        outcomes: list[Outcome] = list(_split(run, batch))
    except Exception as error:  # noqa: BLE001  the runtimes' exceptions share no base, and the request is told
        failure = error
    else:
        return outcomes, time.perf_counter() - started, None
    if len(batch) == 1:
        return [_broken(failure)], time.perf_counter() - started, failure
    alone = [_answered(run, [entry]) for entry in batch]
    return [own[0][0] for own in alone], time.perf_counter() - started, failure


def _split(run: Run, batch: Sequence[Waiting]) -> list[Tensors]:
    """What each request gets of one run over all of them."""
    requests = [entry.request for entry in batch]
    if len(requests) == 1:
        inputs = {name: np.ascontiguousarray(array) for name, array in requests[0].inputs.items()}
    else:
        inputs = {
            name: np.concatenate([request.inputs[name] for request in requests])
            for name in requests[0].inputs
        }
    outputs = run(inputs)
    total = sum(request.samples for request in requests)
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != total:
            raise ValueError(f"output {name} has shape {array.shape} for {total} samples")
    found: list[Tensors] = []
    start = 0
    for request in requests:
        end = start + request.samples
        found.append({name: array[start:end] for name, array in outputs.items()})
        start = end
    return found


def _broken(error: Exception) -> ProtocolError:
    refused = ProtocolError(
        500, f"the model could not run this request ({type(error).__name__}); the server's log says why"
    )
    refused.__cause__ = error
    return refused
