"""What Prometheus is told. Names begin with tlexport_; times are seconds, as its naming rules want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)

from tlexport.serving.log import Log

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """A registry of the server's own, and the observer of its queue."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tlexport_requests", "Inference requests answered", ["protocol", "code"], registry=registry
        )
        self.latency = Histogram(
            "tlexport_request_seconds",
            "From the request's head to its answer, of those answered 200",
            ["protocol"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "tlexport_requests_in_flight", "Accepted and not yet answered", registry=registry
        )
        self.depth = Gauge("tlexport_queue_samples", "Samples that wait for a worker", registry=registry)
        self.wait = Histogram(
            "tlexport_queue_seconds", "A request's wait for a worker", buckets=_SECONDS, registry=registry
        )
        self.batch = Histogram(
            "tlexport_batch_samples", "Samples of one run", buckets=_SIZES, registry=registry
        )
        self.run = Histogram(
            "tlexport_run_seconds", "One run of the model", buckets=_SECONDS, registry=registry
        )
        self.failures = Counter("tlexport_run_failures", "Runs that failed", registry=registry)
        self.reloads = Counter(
            "tlexport_reloads", "New versions, by what became of them", ["result"], registry=registry
        )
        self.model = Info("tlexport_model", "What is served", registry=registry)

    def queued(self, samples: int) -> None:
        self.depth.set(samples)

    def ran(self, samples: int, waits: Sequence[float], seconds: float) -> None:
        self.batch.observe(samples)
        self.run.observe(seconds)
        for wait in waits:
            self.wait.observe(max(wait, 0.0))

    def failed(self, error: Exception) -> None:
        self.failures.inc()
        self._log.write("run failed", error=type(error).__name__, reason=" ".join(str(error).split())[:500])

    def answered(self, protocol: str, code: int, seconds: float) -> None:
        self.requests.labels(protocol, str(code)).inc()
        if code == 200:
            self.latency.labels(protocol).observe(seconds)

    def serves(self, facts: Mapping[str, str]) -> None:
        self.model.info(dict(facts))

    def page(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
