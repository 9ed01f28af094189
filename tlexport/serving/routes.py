"""The protocol's HTTP paths: what each takes, and what it answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from tlexport.serving import metrics, protocol
from tlexport.serving.batcher import Waiting
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.protocol import Request, Tensors
from tlexport.serving.service import Call, Head, Service
from tlexport.serving.slot import Served

MOST_PATHS_KEPT = 64
JSON, BINARY = "application/json", "application/octet-stream"
_PATHS = (
    "/v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/VERSION][/ready or /infer], /metrics"
)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


Reply = Callable[[Answer], None]


class Exchange:
    """A request that was let in by its head: `limit` bytes of body may come, then `finish` is called."""

    limit = 32 << 10

    def finish(self, body: bytes) -> None:
        raise NotImplementedError

    def gone(self) -> None:
        """The client has left: whatever is under way is for nobody."""


class Simple(Exchange):
    """An answer that needs no body and is there at once."""

    def __init__(self, answer: Answer, reply: Reply) -> None:
        self._answer, self._reply = answer, reply

    def finish(self, body: bytes) -> None:
        self._reply(self._answer)


class Refused(Simple):
    """A request refused by its head; a body of no more than `limit` is read over, so that the connection can stay."""

    limit = 64 << 20

    def __init__(self, error: ProtocolError, reply: Reply) -> None:
        super().__init__(refusal(error), reply)
        self.error = error


class Inference(Exchange):
    def __init__(self, service: Service, head: Head, name: str, version: str, reply: Reply) -> None:
        self._service, self._reply = service, reply
        self._call = Call(service, "http", head.headers, self.refuse)
        self._waiting: Waiting | None = None
        self._served: Served
        try:
            self._header_length = _header_length(head.headers.get("inference-header-content-length"))
            if head.headers.get("content-encoding", "identity").lower() != "identity":
                raise ProtocolError(
                    415, "this server takes no compressed bodies: send them without Content-Encoding"
                )
            self._served = service.admit(name, version)
        except ProtocolError as error:
            self._call.end(error.status)
            raise
        interface = self._served.model.interface
        self.limit = interface.largest_json if self._header_length is None else interface.largest_binary

    def finish(self, body: bytes) -> None:
        try:
            model = self._served.model
            self._service.require_room()
            request = protocol.decode_request(body, self._header_length, model.interface)
            self._waiting = self._service.infer(
                self._call, self._served, request, functools.partial(self._answer, request)
            )
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _answer(self, request: Request, outputs: Tensors) -> None:
        try:
            model = self._served.model
            encoded, length = protocol.encode_response(model.name, model.version, request, outputs)
            self._call.end(200, request.samples)
            binary = length is not None
            headers = ((protocol.HEADER_LENGTH, str(length)),) if binary else ()
            self._reply(Answer(200, encoded, BINARY if binary else JSON, headers))
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Whatever went wrong, the client is answered: it would wait for ever, and its connection would be lost."""
        self.refuse(error if isinstance(error, ProtocolError) else self._service.mistaken(error))

    def refuse(self, error: ProtocolError) -> None:
        self._call.end(error.status)
        self._reply(refusal(error))

    def gone(self) -> None:
        self._call.end(499)
        if self._waiting is not None:
            self._served.batcher.withdraw(self._waiting)


def opened(service: Service, head: Head, reply: Reply) -> Exchange:
    """What answers a request. Raises ProtocolError if its head says enough to refuse it."""
    path = head.path.rstrip("/")
    if path in ("/v2/health/live", "/v2/health/ready"):
        _require(head, "GET")
        return Simple(_health(service, path.rpartition("/")[2]), reply)
    service.authorize(head.headers.get("authorization", ""))
    if path == "/metrics":
        _require(head, "GET")
        return Simple(Answer(200, service.metrics.page(), metrics.CONTENT_TYPE), reply)
    if path == "/v2":
        _require(head, "GET")
        return Simple(_json(service.metadata()), reply)
    name, version, action = _model(path)
    if action == "infer":
        _require(head, "POST")
        return Inference(service, head, name, version, reply)
    _require(head, "GET")
    if action == "ready":
        ready = service.slot.find(name, version) is not None and service.ready
        return Simple(_json({"name": name, "ready": ready}, 200 if ready else 503), reply)
    return Simple(_json(service.slot.find(name, version).model.metadata()), reply)


def refusal(error: ProtocolError) -> Answer:
    headers: tuple[tuple[str, str], ...] = ()
    if error.retry_after is not None:
        headers = (("Retry-After", str(max(1, round(error.retry_after)))),)
    if error.status == 401:  # RFC 9110, section 11.6.1: it comes with a challenge
        headers = (("WWW-Authenticate", "Bearer"),)
    if isinstance(error, MethodError):
        headers = (("Allow", error.allowed),)
    return Answer(error.status, protocol.error_body(str(error)), JSON, headers)


class MethodError(ProtocolError):
    def __init__(self, head: Head, allowed: str) -> None:
        super().__init__(405, f"{head.method} is not for {head.path[:200]}; use {allowed}")
        self.allowed = allowed


def _require(head: Head, method: str) -> None:
    """HEAD is GET without the body."""
    if head.method != method and (head.method, method) != ("HEAD", "GET"):
        raise MethodError(head, method)


def _health(service: Service, which: str) -> Answer:
    if which == "live":
        return _json({"live": True})
    return _json({"live": True, "ready": service.ready}, 200 if service.ready else 503)


@functools.lru_cache(MOST_PATHS_KEPT)
def _model(path: str) -> tuple[str, str, str]:
    """Name, version (may be empty) and action (may be empty) of /v2/models/... Raises ProtocolError (404)."""
    rest, _, action = path.rpartition("/")
    words = (rest if action in ("ready", "infer") else path).split("/")
    action = action if action in ("ready", "infer") else ""
    if words[:3] == ["", "v2", "models"]:
        if len(words) == 4:
            return unquote(words[3]), "", action
        if len(words) == 6 and words[4] == "versions":
            return unquote(words[3]), unquote(words[5]), action
    raise ProtocolError(404, f"nothing at {path[:200]!r}; there are: {_PATHS}")


def _header_length(value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 16):  # digits enough for any body
        raise ProtocolError(400, f"{protocol.HEADER_LENGTH} must be a number of bytes")
    return int(value)


def _json(document: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(document).encode())
