"""HTTP/1.1 from the client's side on one kept connection: a request's bytes are made once and sent many times.

http.client reads an answer's headers with the email parser, which takes longer than a small model; this reads what the
protocol needs and nothing else.
"""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

from tlexport.errors import ServerError

LARGEST_HEAD = 64 << 10
LARGEST_BODY = 1 << 30
_CHUNK = 256 << 10


@dataclass(frozen=True)
class Answer:
    """`headers` by lower-case name."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class Lost(ServerError):
    """The connection broke before the answer was whole. `unanswered`: before its first byte."""

    def __init__(self, message: str, *, unanswered: bool) -> None:
        super().__init__(message)
        self.unanswered = unanswered


class Connection:
    """One connection, opened when it is first needed and again where the server has closed it. Not for several threads."""

    def __init__(self, host: str, port: int, *, timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        self.host, self.port, self.timeout_s, self.tls = host, port, timeout_s, tls
        self._socket: socket.socket | None = None

    @property
    def where(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def ask(self, request: bytes) -> Answer:
        """Send the bytes of a whole request and read the answer.

        A connection that the server closed while nothing was under way is opened again, once. Raises ServerError if
        there is no connection to be had, Lost if it breaks, and a ServerError that is `timed_out` if the time is up.
        """
        used = self._socket is not None
        try:
            return self._ask(request)
        except Lost as error:
            self.close()
            if not (used and error.unanswered):
                raise
        except BaseException:
            self.close()  # what is still to come would be taken for the next answer
            raise
        try:
            return self._ask(request)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, request: bytes) -> Answer:
        link = self._socket = self._socket or self._opened()
        held = bytearray()
        try:
            link.sendall(request)
            return self._read(link, held)
        except TimeoutError as error:
            raise ServerError(
                f"{self.where} did not answer within {self.timeout_s:g} s; give it longer with --timeout",
                timed_out=True,
            ) from error
        except OSError as error:
            raise Lost(
                f"the connection to {self.where} broke: {_said(error)}", unanswered=not held
            ) from error

    def _opened(self) -> socket.socket:
        try:
            link = socket.create_connection((self.host, self.port), self.timeout_s)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self.tls.wrap_socket(link, server_hostname=self.host) if self.tls else link
        except ssl.SSLCertVerificationError as error:
            raise ServerError(
                f"{self.where} has a certificate that is not trusted ({error.verify_message}); name its authority with --ca"
            ) from error
        except ssl.SSLError as error:
            raise ServerError(
                f"{self.where} does not speak TLS ({_said(error)}); is it http:// there?"
            ) from error
        except TimeoutError as error:
            raise ServerError(f"{self.where} cannot be reached within {self.timeout_s:g} s") from error
        except OSError as error:
            raise ServerError(
                f"nothing answers at {self.where} ({_said(error)}); is the server up, and is it this port?"
            ) from error

    def _read(self, link: socket.socket, held: bytearray) -> Answer:
        while (end := held.find(b"\r\n\r\n")) < 0:
            if len(held) > LARGEST_HEAD:
                raise ServerError(
                    f"{self.where} sends more than {LARGEST_HEAD >> 10} KiB of headers: that is no HTTP answer"
                )
            self._more(link, held)
        status, headers = _head(bytes(held[:end]), self.where)
        del held[: end + 4]
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = self._chunks(link, held)
        else:
            size = _size(headers.get("content-length", "0"), 10, self.where)
            while len(held) < size:
                self._more(link, held)
            body = bytes(held[:size])
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Answer(status, headers, body)

    def _chunks(self, link: socket.socket, held: bytearray) -> bytes:
        body = bytearray()
        while True:
            while (end := held.find(b"\r\n")) < 0:
                self._more(link, held)
            size = _size(bytes(held[:end]).partition(b";")[0].decode("latin-1"), 16, self.where)
            while len(held) < end + 2 + size + 2:
                self._more(link, held)
            if len(body) + size > LARGEST_BODY:
                raise ServerError(f"{self.where} sends more than {LARGEST_BODY >> 20} MiB")
            body += held[end + 2 : end + 2 + size]
            del held[: end + 2 + size + 2]
            if not size:
                return bytes(body)

    def _more(self, link: socket.socket, held: bytearray) -> None:
        part = link.recv(_CHUNK)
        if not part:
            raise Lost(
                f"{self.where} closed the connection {'in the middle of an answer' if held else 'without an answer'}",
                unanswered=not held,
            )
        held += part


@functools.lru_cache(64)  # the answers to one client's requests have heads that are alike
def _head(text: bytes, where: str) -> tuple[int, Mapping[str, str]]:
    first, *lines = text.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise ServerError(
            f"{where} does not speak HTTP/1.1; is it its gRPC port (grpc://), or does it want https://?"
        )
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


def _size(text: str, base: int, where: str) -> int:
    try:
        size = int(text, base)
    except ValueError:
        size = -1
    if not 0 <= size <= LARGEST_BODY:
        raise ServerError(f"{where} announces an answer of {text[:20]!r} bytes")
    return size


def _said(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
