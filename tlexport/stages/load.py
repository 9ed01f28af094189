"""load: requests through a live server at a rate of their own, each answer checked against the bundle's golden ones.

Latency counts from the scheduled start (evidence.latency.open_loop), over as many connections as it takes. A refusal is no
answer: goodput counts right answers alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tlexport import tensors
from tlexport.bundle import golden, manifest, preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import GateError, LatencyGateError, RecipeError, ServerError, UndecidedError
from tlexport.evidence import machine
from tlexport.evidence.accuracy import parity
from tlexport.evidence.latency import capacity, limits, open_loop
from tlexport.evidence.latency.watch import Watcher
from tlexport.evidence.live import traffic
from tlexport.evidence.live.traffic import Traffic
from tlexport.progress import Progress
from tlexport.results import LoadResult
from tlexport.run import replacing, write_json
from tlexport.serving import asking
from tlexport.serving import client as clients
from tlexport.serving.asking import Asking
from tlexport.serving.client import Access
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.protocol import Response
from tlexport.timings import LargestRate, Watch

WARM = 20  # requests one after the other, before anything is timed
PARALLEL = 4  # requests at once that a first guess of the capacity grants the server
NEAR = 0.05  # share of the outputs' spread within which the server's own first answers are to be repeated


class Ask(BaseModel):
    """What load is put on the server."""

    model_config = ConfigDict(frozen=True)

    rate: float | None = Field(
        None, gt=0, description="requests a second; none: find the largest within max_p99_ms"
    )
    seconds: float = Field(10.0, gt=0, description="of the loop, or of one probe at most")
    arrivals: open_loop.Arrivals = "poisson"
    concurrency: int = Field(32, ge=1, le=1024, description="connections: so many requests can be under way")
    batch: int = Field(1, ge=1, description="samples a request")
    max_p99_ms: float | None = Field(None, gt=0)
    model: str | None = None
    target: str | None = None
    timeout_ms: float | None = Field(None, gt=0, description="that the server is told to answer within")
    seed: int = Field(0, ge=0)
    out: Path | None = Field(None, description="JSON file; every request goes beside it")


def run(
    url: str, bundle: Path, ask: Ask, access: Access, progress: Progress, *, trust: Trust = NOBODY
) -> LoadResult:
    """Load the server at `url`, which serves `bundle`; the bundle is checked first.

    Raises PreflightError if it is not as packaged, RecipeError where neither a rate nor a limit is given, ServerError if the
    server cannot be reached or asked.
    """
    if ask.rate is None and ask.max_p99_ms is None:
        raise RecipeError("load needs --rate, or --max-p99 to find the largest rate within it")
    if ask.rate is not None and round(ask.rate * ask.seconds) < 1:
        raise RecipeError(f"{ask.rate:g}/s for {ask.seconds:g} s is not one request; ask for more --seconds")
    document = preflight.check(bundle, trust=trust)
    with ExitStack() as stack:
        client = clients.connect(url, access)
        stack.callback(client.close)
        clients.require_ready(client, "")
        model = clients.choose(client, ask.model, document.name)
        golden = _golden(bundle, document, ask, model.name, client)
        workers = [_Worker(golden, client)]
        for _ in range(ask.concurrency - 1):
            other = clients.connect(url, access)
            other.encoding = client.encoding
            stack.callback(other.close)
            workers.append(_Worker(golden, other))
        with Watcher() as watcher:
            loaded = _Load(workers, ask, access.timeout_s, progress)
            found = loaded.at_rate() if ask.rate is not None else None
            largest = loaded.largest() if ask.rate is None else None
        result = _result(
            url, bundle, model.name, client.encoding, ask, loaded, found, largest, watcher.record()
        )
    if ask.out:
        _write(ask.out, result, found)
    return result


def failure(result: LoadResult) -> GateError | None:
    """Wrong answers go before a limit that is not met."""
    if wrong := traffic.wrong_told(result.counts, result.errors):
        return GateError(f"{result.url}: {wrong}")
    if result.verdict == "fail":
        return LatencyGateError(f"{result.url}: {result.reason}")
    return UndecidedError(f"{result.url}: {result.reason}") if result.verdict == "undecided" else None


@dataclass(frozen=True)
class _Golden:
    """Requests that are asked again and again, and what each is to be answered."""

    asking: Asking
    requests: tuple[bytes, ...]
    expected: tuple[NDArray[Any], ...]
    limit: float
    note: str


def _golden(
    bundle: Path, document: manifest.Manifest, ask: Ask, model: str, client: clients.Client
) -> _Golden:
    """One request for each golden sample, which it begins with. The server is asked them once."""
    if ask.batch > document.batch.max:
        raise RecipeError(
            f"a request of {ask.batch} samples is beyond the largest batch, {document.batch.max}"
        )
    variant = document.targets[manifest.target(document, ask.target)].variant
    inputs, expected = golden.load(bundle, document)
    of = Asking(client, model, inputs, document.inputs, document.outputs[0])
    try:
        asking.patiently(lambda: clients.negotiate(client, model, tensors.named(inputs[:1], of.names)))
        answered = of.all_in(1)
    except ProtocolError as error:
        raise ServerError(f"{client.url} cannot be asked the golden samples: {error}") from error
    limit, note = parity.limit(variant.max_abs_error, expected), ""
    if parity.wide(variant.max_abs_error, expected):
        limit, expected = NEAR * parity.spread(expected), answered
        note = "the variant's verified error is too wide to check by: answers are held against the server's own first ones"
    rows = [np.arange(start, start + ask.batch) % len(inputs) for start in range(len(inputs))]
    timeout = None if ask.timeout_ms is None else round(1e3 * ask.timeout_ms)
    prepared = tuple(of.prepared(part, timeout_us=timeout) for part in rows)
    return _Golden(of, prepared, tuple(expected[part] for part in rows), limit, note)


class _Worker:
    """One connection. A call sends the next request and returns what became of it (traffic's kinds), or what will look at the
    answer and say so: that is this side's work, and no part of the server's time."""

    def __init__(self, golden: _Golden, client: clients.Client) -> None:
        self.golden, self.client = golden, client
        self.next = itertools.cycle(range(len(golden.requests)))
        self.said: dict[str, str] = {}
        self.error = 0.0

    def __call__(self) -> str | Callable[[], str]:
        index = next(self.next)
        try:
            response = self.client.send(self.golden.requests[index])
        except ProtocolError as error:
            return self._refused(error)
        except ServerError as error:
            return self._kind(traffic.TIMEOUT if error.timed_out else traffic.BROKEN, str(error))
        return partial(self._judged, index, response)

    def _judged(self, index: int, response: Response) -> str:
        expected = self.golden.expected[index]
        try:
            answers = self.golden.asking.answers(response, len(expected))
        except ProtocolError as error:
            return self._refused(error)
        wrong, by = traffic.wrong(answers, expected, self.golden.limit)
        self.error = max(self.error, by)
        if wrong:
            return self._kind(
                traffic.WRONG,
                f"sample {index} is answered {by:.3g} off, and {self.golden.limit:.3g} is allowed",
            )
        return traffic.OK

    def _refused(self, error: ProtocolError) -> str:
        return self._kind(traffic.KINDS.get(error.status, f"error {error.status}"), str(error))

    def _kind(self, kind: str, said: str) -> str:
        self.said.setdefault(kind, said)
        return kind


class _Load:
    """All connections to one server, asked in several ways one after the other."""

    def __init__(self, workers: list[_Worker], ask: Ask, timeout_s: float, progress: Progress) -> None:
        self.workers, self.ask, self.timeout_s, self.progress = workers, ask, timeout_s, progress

    def at_rate(self) -> Traffic:
        assert self.ask.rate is not None
        self._warm()
        # Nothing is drawn meanwhile: it would be timed, too.
        self.progress.say(
            f"open loop: {self.ask.rate:g}/s for {self.ask.seconds:g} s over {len(self.workers)} connections"
        )
        return self._run(self.ask.rate, self.ask.seconds, self.ask.seed)

    def largest(self) -> LargestRate:
        assert self.ask.max_p99_ms is not None
        service = self._warm()

        def once(rate: float, seconds: float, seed: int) -> open_loop.Served:
            return self._run(rate, seconds, seed).as_one(self.timeout_s)

        with self.progress.bar("largest rate", still=True) as step:
            return capacity.largest_rate(
                once,
                self.ask.max_p99_ms,
                service_s=service,
                workers=PARALLEL,
                seed=self.ask.seed,
                least_s=min(2.0, self.ask.seconds),
                most_s=self.ask.seconds,
                progress=lambda done, doing: step(100 * done, 100, doing),
            )

    def _run(self, rate: float, seconds: float, seed: int) -> Traffic:
        at = open_loop.schedule(rate, seconds, self.ask.arrivals, seed)
        found = Traffic(open_loop.run(self.workers, at))
        if found.counts.get(traffic.BROKEN, 0) == len(found.kinds):
            raise ServerError(self.said()[traffic.BROKEN])
        return found

    def _warm(self) -> float:
        """Every connection is opened; seconds a request takes alone, the median."""
        for worker in self.workers:
            worker()
        alone = partial(_timed, self.workers[0])
        return float(np.median([alone() for _ in range(WARM)]))

    def said(self) -> dict[str, str]:
        return traffic.first_of_each([worker.said for worker in self.workers])


def _timed(call: Callable[[], object]) -> float:
    clock = open_loop.Wall()
    began = clock.now()
    call()
    return clock.now() - began


def _result(
    url: str, bundle: Path, model: str, encoding: str, ask: Ask, loaded: _Load, found: Traffic | None,
    largest: LargestRate | None, watch: Watch,
) -> LoadResult:  # fmt: skip
    opened = open_loop.summary(found.served, ask.arrivals, ask.rate) if found and ask.rate else None
    verdict, reason = _verdict(ask, found, largest, loaded.timeout_s)
    said = [
        loaded.workers[0].golden.note,
        found.held_back() if found else "",
        *((opened.generator, opened.overload) if opened else ()),
        *watch.warnings,
    ]
    return LoadResult(
        url=url,
        bundle=str(bundle),
        model=model,
        encoding=encoding,
        batch=ask.batch,
        connections=len(loaded.workers),
        open=opened,
        served=open_loop.distribution(found.latency, found.served.ended)
        if found and len(found.latency)
        else None,
        counts=found.counts if found else {},
        errors=loaded.said(),
        offered_per_s=opened.offered_per_s if opened else None,
        goodput_per_s=found.goodput if found else None,
        shed=found.shed if found else None,
        waited=found.waited if found else None,
        max_abs_error=max(worker.error for worker in loaded.workers),
        largest=largest,
        machine=machine.describe().model_dump(mode="json"),
        watch=watch,
        limit_ms=ask.max_p99_ms,
        verdict=verdict,
        reason=reason,
        notes=tuple(text for text in said if text),
        raw=str(ask.out.with_suffix(".npz")) if ask.out else None,
    )


def _verdict(
    ask: Ask, found: Traffic | None, largest: LargestRate | None, never_s: float
) -> tuple[Literal["pass", "fail", "undecided"] | None, str]:
    """Of all requests, whatever became of them: one that is refused was not answered in time."""
    limit = ask.max_p99_ms
    if limit is None:
        return None, ""
    if found is None or ask.rate is None:
        assert largest is not None
        if largest.rate_per_s is not None:
            return "pass", ""
        slowest = min(largest.probes, key=lambda probe: probe.rate_per_s)
        return "fail" if slowest.verdict == "over" else "undecided", largest.note
    if found.failed > traffic.LOST:
        counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
        failed = f"{found.failed:.1%} of the requests were not answered ({counts})"
        return "fail", f"at {ask.rate:g}/s {failed}: no p99 of all is within {limit:g} ms"
    probe = capacity.judged(found.as_one(never_s), ask.rate, ask.seconds, limit)
    reason = f"at {ask.rate:g}/s: {probe.reason}, limit {limit:g} ms"
    if probe.verdict == "undecided":
        return "undecided", f"{reason}: undecided, {limits.needs(probe.p99, limit)}"
    return "pass" if probe.verdict == "within" else "fail", reason


def _write(out: Path, result: LoadResult, found: Traffic | None) -> None:
    """The result as JSON, and every request in seconds beside it."""
    if found is not None:
        served = found.served
        with replacing(out.with_suffix(".npz")) as beside, beside.open("wb") as handle:
            np.savez(
                handle, allow_pickle=False, scheduled=served.scheduled, started=served.started, done=served.done,
                unsent=served.waiting, kinds=np.array(found.kinds, np.str_),
            )  # fmt: skip
    write_json(out, json.loads(result.model_dump_json()))
