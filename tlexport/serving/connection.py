"""HTTP/1.1 on one connection: requests are answered one at a time and in order, with bounds on sizes and on time.

A protocol of its own over httptools rather than ASGI: a refusal costs no more than the head of its request, a client that has
left is noticed at once, and slow ones are cut off, none of which an ASGI server offers.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import time
from http import HTTPStatus

import httptools

from tlexport.serving.batcher import overloaded
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.routes import Answer, Exchange, Inference, Refused, opened, refusal
from tlexport.serving.service import Head, Service

LARGEST_HEAD = 32 << 10  # bytes of target and headers
MOST_HEADERS = 100
MOST_PIPELINED = 8  # requests of one connection that wait for the answers before theirs
_STATUS_LINES = {int(status): f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus}
# Seconds that the other side may take: for a head, a body, its next request, to read an answer, to close after an error.
PATIENCE = {"head": 10.0, "body": 60.0, "idle": 75.0, "writing": 30.0, "closing": 2.0}


class Connection(asyncio.Protocol):
    """`connections`: all that are open, of which there may be `most`."""

    def __init__(self, service: Service, connections: set[Connection], most: int) -> None:
        self._service = service
        self._all = connections
        self._most = most
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._url = b""
        self._headers: dict[str, str] = {}
        self._head_size = 0
        self._head: Head
        self._exchange: Exchange | None = None  # the request that is being read
        self._body: list[bytes] = []
        self._body_size = 0
        self._ready: collections.deque[tuple[Exchange, bytes, bool]] = collections.deque()
        self._answering: Exchange | None = None
        self._advancing = False
        self._keep_alive = True
        self._whole = b""  # what was read last, if a request begins with it
        self._paused = False  # reading is
        self._deaf = False  # what still comes is read over
        self._state = "idle"  # a key of PATIENCE, or answering
        self._since = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._all.add(self)
        if len(self._all) > self._most:
            self._fail(ProtocolError(503, "the server has too many connections", retry_after=1.0))

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._state == "idle":
            if (known := self._service.heads.find(data)) is not None:
                self._again(data, *known)
                return
            self._turn("head")
            self._whole = data
        else:
            self._whole = b""
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, ProtocolError):
                cause = self._service.mistaken(cause or error)
            self._fail(cause)
        except httptools.HttpParserError as error:
            self._fail(ProtocolError(400, f"this is not HTTP/1.1: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        self._turn("closing")
        for exchange in (self._answering, *(entry[0] for entry in self._ready), self._exchange):
            if exchange is not None:
                exchange.gone()
        self._ready.clear()
        self._answering = self._exchange = None

    def pause_writing(self) -> None:
        """The other side does not read: nothing more is read from it either, so that no answers pile up."""
        self._turn("writing")
        self._regulate()

    def resume_writing(self) -> None:
        if self._state == "writing":
            self._turn("answering" if self._answering is not None else "idle")
        self._regulate()

    def on_message_begin(self) -> None:
        self._url, self._headers, self._head_size = b"", {}, 0
        self._exchange, self._body, self._body_size = None, [], 0

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._bound_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._bound_head(len(name) + len(value))
        if len(self._headers) >= MOST_HEADERS:
            raise ProtocolError(431, f"more than {MOST_HEADERS} headers")
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        # Lines of one name are one list (RFC 9110, section 5.3), which is no length and no token.
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # `_feed` reads it again
        if self._state == "head":
            self._turn("body")
        method = self._parser.get_method().decode("latin-1")
        self._head = Head(method, _path(self._url), self._headers)
        self._exchange = self._opened(self._head)
        length = self._headers.get("content-length", "0")
        self._bound_body(int(length) if length.isdigit() else 0)
        asks = self._headers.get("expect", "").lower() == "100-continue" and not self._old
        if asks and self._answering is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        self._bound_body(self._body_size)
        if not isinstance(self._exchange, Refused):
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._exchange is None:
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        stay = self._parser.should_keep_alive() and not self._old
        if stay and isinstance(self._exchange, Inference):
            self._service.heads.remember(self._whole, len(body), self._head)
        self._ready.append((self._exchange, body, stay))
        self._exchange, self._body = None, []
        self._regulate()
        self._advance()

    def expire(self, now: float) -> None:
        """Cut the connection off if the other side has taken too long. It is not hurried while it waits for us."""
        if now - self._since > PATIENCE.get(self._state, float("inf")):
            self._transport.abort()

    def close(self, *, idle_only: bool) -> None:
        if not idle_only:
            self._transport.abort()
        elif self._answering is None and not self._ready and self._exchange is None:
            self._transport.close()

    @property
    def _old(self) -> bool:
        """Whether the request is of HTTP/1.0, which knows neither 100 Continue nor a connection that stays unless both say so."""
        return bool(self._parser.get_http_version() == "1.0")

    def _feed(self, data: bytes) -> None:
        """Parse. A request that would rather go on in another protocol (curl and Java offer HTTP/2) is read without that wish,
        which a server may ignore (RFC 9110, section 7.8); the parser takes no body of one that has it.
        """
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                method = self._parser.get_method()
                if method == b"CONNECT":
                    self._fail(ProtocolError(405, "this server is no proxy"))
                    return
                lines = [f"{key}: {text}" for key, text in self._headers.items() if key != "upgrade"]
                head = b"%s %s HTTP/1.1\r\n" % (method, self._url)
                head += "\r\n".join([*lines, "", ""]).encode("latin-1")
                data = head + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            else:
                return

    def _advance(self) -> None:
        """Answer what is read, in order, until one takes time."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._answering is None and self._ready:
                self._answering, body, self._keep_alive = self._ready.popleft()
                if self._state != "writing":
                    self._turn("answering")
                self._answering.finish(body)
        finally:
            self._advancing = False
        self._regulate()

    def _reply(self, answer: Answer, *, bare: bool = False) -> None:
        """Write the answer to the request whose turn it is; `bare`: without the body that it announces."""
        stay = self._keep_alive and not self._service.draining
        self._answering = None
        self._transport.write(written(answer, stay=stay, bare=bare))
        if not stay:
            self._close_gently()
        elif self._state != "writing":
            self._turn("idle")
        self._advance()

    def _again(self, data: bytes, head: Head, body: int) -> None:
        """A whole request whose like was let in before: it is not parsed. A full server spends its time on refusing these."""
        if self._service.full:
            self._service.shed()
            self._transport.write(SHED)
            return
        self._ready.append((self._opened(head), data[body:], True))
        self._advance()

    def _opened(self, head: Head) -> Exchange:
        reply = functools.partial(self._reply, bare=True) if head.method == "HEAD" else self._reply
        try:
            return opened(self._service, head, reply)
        except ProtocolError as error:
            return Refused(error, reply)

    def _fail(self, error: ProtocolError) -> None:
        """What follows cannot be read: say why after the answers that are due, and close."""
        if self._exchange is not None:
            self._exchange.gone()
            self._exchange = None
        self._ready.append((Refused(error, self._reply), b"", False))
        self._deaf = True
        self._advance()

    def _close_gently(self) -> None:
        """What the other side still sends is read over for a moment: a reset would take the answer from it (RFC 9112, 9.6)."""
        for exchange, _, _ in self._ready:
            exchange.gone()
        self._ready.clear()
        self._deaf = True
        self._turn("closing")
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _bound_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > LARGEST_HEAD:
            raise ProtocolError(431, f"the request's target and headers are more than {LARGEST_HEAD} bytes")

    def _bound_body(self, size: int) -> None:
        exchange = self._exchange
        if exchange is None or size <= exchange.limit:
            return
        if isinstance(exchange, Refused):
            raise exchange.error
        raise ProtocolError(413, f"the body is larger than any sensible one ({exchange.limit} bytes)")

    def _regulate(self) -> None:
        """Read on, or not while too much waits to be answered or to be read by the other side."""
        pause = self._state == "writing" or len(self._ready) > MOST_PIPELINED
        if pause != self._paused and not self._transport.is_closing():
            self._paused = pause
            (self._transport.pause_reading if pause else self._transport.resume_reading)()

    def _turn(self, state: str) -> None:
        self._state = state
        self._since = time.monotonic()


def _path(target: bytes) -> str:
    """Of a request's target, which names the host as well if it was sent as to a proxy (RFC 9112, section 3.2.2)."""
    path = target.partition(b"?")[0]
    if not path.startswith(b"/") and b"://" in path:
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    return path.decode("latin-1")


def written(answer: Answer, *, stay: bool, bare: bool = False) -> bytes:
    """An answer as bytes; `stay`: the connection does; `bare`: the body is left out, as HEAD wants it."""
    lines = [
        _STATUS_LINES[answer.status],
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        *[f"{name}: {value}" for name, value in answer.headers],
    ]
    if not stay:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if bare else answer.body)


SHED = written(refusal(overloaded()), stay=True)
