"""How much can be served: throughput against batch size and workers, its knee, and the largest rate within a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tlexport.evidence.latency import open_loop
from tlexport.evidence.latency.limits import side, told
from tlexport.evidence.latency.open_loop import Served
from tlexport.evidence.latency.quantiles import queued_percentile
from tlexport.evidence.latency.recorder import Call, collector_off
from tlexport.timings import CurvePoint, Knee, LargestRate, Probe

Ask = Callable[[float, float, int], Served]  # (requests a second, seconds, seed) -> what became of them

LEAST_GAIN = 0.1  # more throughput from twice as much
SLICES = 8

Q = 0.99
CLOSE = 1.05  # the search ends where the rates within and over the limit are so near
FIRST_SHARE = 0.5  # of the rate that would keep the workers busy
REQUESTS = 4000  # of a first probe: enough to bound the p99 up to about half of the capacity
LONGER = 4.0  # a probe that cannot tell is repeated once, so many times as long
STEPS_DOWN = 6  # halvings after which no rate is said to meet the limit
CONFIRMATIONS = 3  # rates stepped back to where a second look at the found one disagrees


def knee(throughput: Mapping[int, float]) -> Knee | None:
    """Where a larger batch, or more workers, stops to pay; None where nothing was measured.

    The largest size that still gave LEAST_GAIN more throughput for every doubling since the last such size. Where a call
    takes a + c * size seconds that is at nine tenths of the best throughput, and so near where Kneedle (Satopaa et al. 2011)
    finds the knee of a dense curve; of the four or five sizes that are measured, differences of a normalised curve
    hang on which one is last. A single dip does not end it.
    """
    if not throughput:
        return None
    sizes = sorted(throughput)
    at = sizes[0]
    for size in sizes[1:]:
        if throughput[size] >= throughput[at] * (1 + LEAST_GAIN) ** math.log2(size / at):
            at = size
    return Knee(
        at=at,
        items_per_s=throughput[at],
        share=throughput[at] / max(throughput.values()),
        passed=at != sizes[-1],
        rule=f"largest that gave at least {LEAST_GAIN:.0%} more throughput for every doubling",
    )


def saturated(calls: Sequence[Call], batch: int, seconds: float, confidence: float = 0.95) -> CurvePoint:
    """Throughput of so many workers that never wait, each with a call of its own that answers `batch` items.

    Calls are counted where they end, within `seconds` cut into SLICES; the interval is Student's t over the slices' rates,
    and withheld below SLICES calls in all.
    """
    with collector_off(), ThreadPoolExecutor(len(calls), thread_name_prefix="saturated") as pool:
        for call in calls:
            call()
        began = time.perf_counter()
        found = [pool.submit(_always, call, began + seconds) for call in calls]
        ends = [np.array(future.result()) - began for future in found]
    took = np.concatenate([np.diff(of, prepend=0.0) for of in ends])
    done = np.concatenate(ends)
    last = max(float(of[-1]) for of in ends)
    rate = batch * sum(len(of) / float(of[-1]) for of in ends)
    low, high = _interval(np.histogram(done, SLICES, (0, min(seconds, last)))[0], rate, confidence)
    return CurvePoint(
        batch=batch, concurrency=len(calls), items_per_s=rate, low=low, high=high,
        p50_ms=1e3 * float(np.median(took)), calls=len(done),
    )  # fmt: skip


def _always(call: Call, until: float) -> list[float]:
    """When each call ended; one is always made."""
    ends: list[float] = []
    while not ends or ends[-1] < until:
        call()
        ends.append(time.perf_counter())
    return ends


def _interval(counts: np.ndarray, rate: float, confidence: float) -> tuple[float | None, float | None]:
    from scipy.special import stdtrit

    if counts.sum() < SLICES:
        return None, None
    error = counts.std(ddof=1) / counts.mean() / math.sqrt(SLICES)
    reach = float(stdtrit(SLICES - 1, (1 + confidence) / 2) * error)
    return rate * max(0.0, 1 - reach), rate * (1 + reach)


def largest_rate(
    ask: Ask,
    limit_ms: float,
    *,
    service_s: float,
    workers: int,
    seed: int,
    least_s: float = 2.0,
    most_s: float = 30.0,
    progress: Callable[[float, str], None] = lambda done, doing: None,
) -> LargestRate:
    """The largest rate whose p99 from the scheduled start is within `limit_ms`, by the upper end of its interval.

    From a share of the capacity that `service_s` seconds a request suggest, the rate is halved or doubled until one is
    within the limit and one is over it, then bisected by their geometric mean down to CLOSE. A probe that cannot tell
    is repeated once, longer; if it still cannot, the rate counts as over. A p99 is measured with noise, so the found rate is
    asked a second time with another seed, and where that disagrees the next smaller rate that was within takes its place.
    least_s, most_s: of one probe. progress: called with (share done, what comes).
    """
    search = _Search(ask, limit_ms, seed, least_s, most_s, progress)
    within, over = search.bracket(FIRST_SHARE * workers / service_s, workers / service_s)
    while within is not None and over is not None and over / within > CLOSE:
        middle = math.sqrt(within * over)
        if search.probe(middle):
            within = middle
        else:
            over = middle
    found = search.confirmed(within) if within is not None else None
    beyond = [probe.rate_per_s for probe in search.probes if probe.verdict != "within"]
    return LargestRate(
        limit_ms=limit_ms,
        rate_per_s=found,
        over_per_s=min((rate for rate in beyond if found is None or rate >= found), default=None),
        probes=tuple(search.probes),
        note="" if found is not None else _none(search.probes, limit_ms),
    )


class _Search:
    """The probes so far, each with a seed of its own."""

    def __init__(
        self,
        ask: Ask,
        limit_ms: float,
        seed: int,
        least_s: float,
        most_s: float,
        progress: Callable[[float, str], None],
    ) -> None:
        self.ask, self.limit_ms, self.seed = ask, limit_ms, seed
        self.least_s, self.most_s, self.progress = least_s, most_s, progress
        self.probes: list[Probe] = []

    def bracket(self, first: float, most: float) -> tuple[float | None, float | None]:
        """A rate within the limit and one over it. None: no rate is within, or none up to twice the capacity is over."""
        if self.probe(first):
            within, rate = first, 2 * first
            while rate <= 2.1 * most:
                if not self.probe(rate):
                    return within, rate
                within, rate = rate, 2 * rate
            return within, None
        for down in range(1, STEPS_DOWN + 1):
            if self.probe(first / 2**down):
                return first / 2**down, first / 2 ** (down - 1)
        return None, first / 2**STEPS_DOWN

    def confirmed(self, rate: float) -> float | None:
        """The largest rate found within the limit that is so a second time."""
        rates = sorted({probe.rate_per_s for probe in self.probes if probe.verdict == "within"}, reverse=True)
        for candidate in [known for known in rates if known <= rate][:CONFIRMATIONS]:
            if self.probe(candidate):
                return candidate
        return None

    def probe(self, rate: float) -> bool:
        """Whether the p99 at `rate` is within the limit for sure."""
        seconds = min(max(self.least_s, REQUESTS / rate), self.most_s)
        found = self._once(rate, seconds)
        if found.verdict == "undecided" and seconds < self.most_s:
            found = self._once(rate, min(LONGER * seconds, self.most_s))
        return found.verdict == "within"

    def _once(self, rate: float, seconds: float) -> Probe:
        done = len(self.probes)
        self.progress(done / (done + 6), f"{rate:.4g}/s for {seconds:.3g} s")
        served = self.ask(rate, seconds, self.seed + done)
        found = judged(served, rate, seconds, self.limit_ms)
        self.probes.append(found)
        return found


def judged(served: Served, rate: float, seconds: float, limit_ms: float) -> Probe:
    """Whether the p99 of an open loop is within the limit: by its interval, which must be on one side of it.

    Where the generator itself was late, a p99 is over the limit only if it would be without that lateness, too.
    """
    p99 = queued_percentile(served.latency, Q)
    verdict, reason = side(p99, limit_ms), told(p99)
    lateness = "" if verdict == "within" else open_loop.late(served)
    if lateness:
        verdict = side(queued_percentile(open_loop.prompt(served), Q), limit_ms)
        verdict, reason = ("over", reason) if verdict == "over" else ("undecided", f"{reason}; {lateness}")
    if grew := open_loop.overload(served):
        verdict, reason = "over", f"{reason}; {grew}"
    return Probe(
        rate_per_s=rate, seconds=seconds, requests=len(served.latency), p99=p99, verdict=verdict, reason=reason
    )  # fmt: skip


def _none(probes: Sequence[Probe], limit_ms: float) -> str:
    slowest = min(probes, key=lambda probe: probe.rate_per_s)
    return f"no rate down to {slowest.rate_per_s:.3g}/s had a p99 within {limit_ms:g} ms for sure; there: {slowest.reason}"
