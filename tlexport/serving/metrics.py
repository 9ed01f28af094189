"""What Prometheus is told. Names begin with tlexport_; times are seconds, as its naming rules want.

The counts are plain numbers of the event loop's thread, made into prometheus_client's types when they are asked for: its own
counters lock, which would be a tenth of a small request's time.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from tlexport.serving.log import Log

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Distribution:
    """Counts by upper bound, and the sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus's cumulative buckets, and the sum."""
        buckets, total = [], 0
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets, self._sum


class Metrics:
    """Counts, and the observer of the queue. `now` says what is at this moment: gauge's name -> its value."""

    def __init__(self, log: Log, now: Callable[[], Mapping[str, float]]) -> None:
        self._log = log
        self._now = now
        self._facts: dict[str, str] = {}
        self.requests: Counter[tuple[str, int]] = Counter()
        self.reloads: Counter[str] = Counter()
        self._latency = {protocol: Distribution(_SECONDS) for protocol in ("http", "grpc")}
        self._wait, self._run, self._batch = (Distribution(b) for b in (_SECONDS, _SECONDS, _SIZES))
        self._failures = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def ran(self, samples: int, waits: Sequence[float], seconds: float) -> None:
        self._batch.add(samples)
        self._run.add(seconds)
        for wait in waits:
            self._wait.add(max(wait, 0.0))

    def failed(self, error: Exception) -> None:
        self._failures += 1
        self._log.write("run failed", error=type(error).__name__, reason=" ".join(str(error).split())[:500])

    def answered(self, protocol: str, code: int, seconds: float) -> None:
        self.requests[protocol, code] += 1
        if code == 200:
            self._latency[protocol].add(seconds)

    def serves(self, facts: Mapping[str, str]) -> None:
        self._facts = dict(facts)

    def page(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        requests = CounterMetricFamily(
            "tlexport_requests", "Inference requests by status", labels=["protocol", "code"]
        )
        for (protocol, code), count in sorted(self.requests.items()):
            requests.add_metric([protocol, str(code)], count)
        yield requests
        latency = HistogramMetricFamily(
            "tlexport_request_seconds",
            "From a request's head to its answer, if that is 200",
            labels=["protocol"],
        )
        for name, distribution in self._latency.items():
            latency.add_metric([name], *distribution.told())
        yield latency
        for name, text, distribution in (
            ("tlexport_queue_seconds", "A request's wait for a worker", self._wait),
            ("tlexport_run_seconds", "One run of the model", self._run),
            ("tlexport_batch_samples", "Samples of one run", self._batch),
        ):
            buckets, total = distribution.told()
            yield HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)
        yield CounterMetricFamily("tlexport_run_failures", "Runs that failed", value=self._failures)
        reloads = CounterMetricFamily(
            "tlexport_reloads", "New versions by what became of them", labels=["result"]
        )
        for result in ("loaded", "refused"):
            reloads.add_metric([result], self.reloads[result])
        yield reloads
        for name, value in self._now().items():
            yield GaugeMetricFamily(f"tlexport_{name}", f"{name.replace('_', ' ')}, now", value=value)
        yield InfoMetricFamily("tlexport_model", "What is served", value=self._facts)
