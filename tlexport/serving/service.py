"""What the server does, whichever protocol asks: health, metadata, and inference with deadline, metrics, span and log line."""

from __future__ import annotations

import hmac
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tlexport
from tlexport.serving.batcher import Outcome, Waiting, overloaded
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.log import Log
from tlexport.serving.metrics import Metrics
from tlexport.serving.protocol import EXTENSIONS, Request, Tensors
from tlexport.serving.slot import Served, Slot
from tlexport.serving.tracing import Tracer

_END = b"\r\n\r\n"
LONGEST_HEAD_KEPT, MOST_HEADS_KEPT = 2048, 256


@dataclass(frozen=True)
class Settings:
    """`timeout`: seconds that a request has if it says nothing else, and at most. `token`: what callers must show."""

    timeout: float = 30.0
    token: bytes | None = None
    access_log: bool = False


class Service:
    """For the event loop's thread alone."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings = settings
        self.log = log
        self.metrics = Metrics(log, self._now)
        self.slot = Slot(self.metrics)
        self.heads = Heads()
        self.draining = False
        self.in_flight = 0
        self.tracer = Tracer()

    def _now(self) -> dict[str, float]:
        served = self.slot.current
        return {
            "requests_in_flight": self.in_flight,
            "queue_samples": served.batcher.samples if served else 0,
            "ready": self.ready,
        }

    @property
    def ready(self) -> bool:
        return self.slot.current is not None and not self.draining

    def metadata(self) -> dict[str, object]:
        """The protocol's $metadata_server_response."""
        return {"name": "tlexport", "version": tlexport.__version__, "extensions": list(EXTENSIONS)}

    def authorize(self, authorization: str) -> None:
        """Raises ProtocolError (401) unless the value of the header Authorization holds the token."""
        token = self.settings.token
        if token is None:
            return
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token):
            raise ProtocolError(401, "this server wants its token: Authorization: Bearer TOKEN")

    @property
    def full(self) -> bool:
        """Whether an inference would be refused for overload."""
        served = self.slot.current
        return served is not None and served.batcher.full and not self.draining

    def shed(self) -> None:
        """Count a request that was refused for overload before it was parsed."""
        self.metrics.answered("http", 429, 0.0)
        if self.settings.access_log:
            self.log.write("request", protocol="http", status=429, samples=0, ms=0.0)

    def failed(self, error: BaseException) -> None:
        """Something went wrong here that is nobody's request's fault."""
        where = traceback.extract_tb(error.__traceback__)[-1:]
        self.log.write(
            "mistake",
            error=type(error).__name__,
            reason=" ".join(str(error).split())[:500],
            where=[f"{Path(frame.filename).name}:{frame.lineno}" for frame in where],
        )

    def mistaken(self, error: BaseException) -> ProtocolError:
        """`failed`, and what the client is told of it."""
        self.failed(error)
        return ProtocolError(500, "the server made a mistake; its log says which")

    def require_room(self) -> None:
        """Before a body is looked at. Raises ProtocolError: 503 while shutting down, 429 if the queue is full."""
        if self.draining:
            raise ProtocolError(503, "the server is shutting down", retry_after=1.0)
        if self.full:
            raise overloaded()

    def admit(self, name: str, version: str) -> Served:
        """The model that a request is for. Raises ProtocolError: 404, 429 or 503."""
        served = self.slot.find(name, version)
        self.require_room()
        return served

    def infer(
        self, call: Call, served: Served, request: Request, reply: Callable[[Tensors], None]
    ) -> Waiting:
        """Queue a decoded request. `reply` is called with the answer, unless `call.refuse` is. Raises ProtocolError."""
        timeout = self.settings.timeout
        if request.timeout_us is not None:
            timeout = min(timeout, request.timeout_us / 1e6)
        if call.seconds_left is not None:
            timeout = min(timeout, call.seconds_left)

        def answer(outcome: Outcome) -> None:
            if isinstance(outcome, ProtocolError):
                call.refuse(outcome)
            else:
                reply(outcome)

        return served.batcher.submit(request, answer, call.arrived, call.arrived + timeout)


@dataclass(frozen=True)
class Head:
    """A request without its body; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


class Heads:
    """Heads of inference requests that were let in, with the whole request's length: a client's are alike, request by request,
    and parsing one takes as long as a small model's answer."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[int, Head]] = {}

    def remember(self, request: bytes, body: int, head: Head) -> None:
        """`request`: what was read at once, if it is one whole request with a body of `body` bytes; else nothing is kept."""
        end = request.find(_END) + len(_END)
        if end + body != len(request) or end > LONGEST_HEAD_KEPT:
            return
        if len(self._kept) >= MOST_HEADS_KEPT:
            self._kept.clear()
        self._kept[request[:end]] = len(request), head

    def find(self, request: bytes) -> tuple[Head, int] | None:
        """The head and where the body begins, if this is one whole request whose head, the token in it included, was let in before."""
        end = request.find(_END) + len(_END)
        length, head = self._kept.get(request[:end], (0, None))
        return (head, end) if head is not None and length == len(request) else None


class Call:
    """One inference request from its head to its answer; `end` counts it once."""

    def __init__(
        self,
        service: Service,
        protocol: str,
        headers: Mapping[str, str],
        refuse: Callable[[ProtocolError], None],
        seconds_left: float | None = None,
    ) -> None:
        self.arrived = time.monotonic()
        self.refuse = refuse
        self.seconds_left = seconds_left
        self._service = service
        self._protocol = protocol
        self._ended = False
        self._end_span = service.tracer.start(headers)
        service.in_flight += 1

    def end(self, status: int, samples: int = 0) -> None:
        """The answer is on its way, or nobody waits for it (499). Later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        service = self._service
        service.in_flight -= 1
        seconds = time.monotonic() - self.arrived
        service.metrics.answered(self._protocol, status, seconds)
        self._end_span(status)
        if service.settings.access_log:
            service.log.write(
                "request",
                protocol=self._protocol,
                status=status,
                samples=samples,
                ms=round(seconds * 1e3, 3),
            )
