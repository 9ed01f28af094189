"""A client of the Open Inference Protocol v2, over HTTP or gRPC: infer, metadata, health. One connection; not for several threads.

A request's bytes are made once (`prepare`) and can be sent many times (`send`). Tensors travel in binary where the server
takes that, else as JSON.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlsplit

from tlexport.errors import RecipeError, ServerError
from tlexport.serving import datatypes, protocol, token
from tlexport.serving.datatypes import ProtocolError, listed
from tlexport.serving.protocol import Response, Tensors
from tlexport.serving.wire import Answer, Connection

TIMEOUT_S = 30.0
PORTS = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 8001}
Encoding = Literal["binary", "json", "grpc"]


@dataclass(frozen=True)
class Access:
    """How a server is reached. `ca`: certificates that are trusted beside none else; None trusts the system's."""

    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class Stated:
    """A tensor as a server states it; `shape` has -1 for any size. `dtype` is numpy's name, or the server's own word."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A model's metadata."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[Stated, ...]
    outputs: tuple[Stated, ...]


@dataclass(frozen=True)
class Server:
    name: str
    version: str
    extensions: tuple[str, ...]


class Client(Protocol):
    """`url` is what was given. Every call raises ServerError if the server cannot be reached or does not speak the protocol,
    and ProtocolError, with HTTP's status for it, if it refuses."""

    url: str
    encoding: Encoding

    def server(self) -> Server: ...

    def live(self) -> bool: ...

    def ready(self, model: str = "") -> bool:
        """Of the server, or of a model."""
        ...

    def model(self, name: str) -> Model: ...

    def models(self) -> tuple[str, ...]:
        """The names that the server has; empty where it does not tell."""
        ...

    def prepare(self, model: str, inputs: Tensors, id: str = "", timeout_us: int | None = None) -> bytes:
        """All bytes of an inference request, for `send`. timeout_us: what the server may take, as Triton's `timeout`."""
        ...

    def send(self, prepared: bytes) -> Response: ...

    def close(self) -> None: ...


def connect(url: str, access: Access | None = None) -> Client:
    """A client of `http://`, `https://`, `grpc://` or `grpcs://host:port`; nothing is sent yet.

    Raises RecipeError for another address, NotInstalledError where gRPC is asked for and not installed.
    """
    access = access or Access()
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise RecipeError(f"{url}: {error}") from error
    if parts.scheme not in PORTS or not parts.hostname or parts.query or parts.fragment:
        raise RecipeError(
            f"{url!r} is no address of a server; write for instance http://127.0.0.1:8000 or grpc://127.0.0.1:8001"
        )
    if parts.username or parts.password:
        raise RecipeError(
            f"an address holds no password; put a token into {token.VARIABLE} or a file (--token-file)"
        )
    host, port = parts.hostname, port or PORTS[parts.scheme]
    if parts.scheme.startswith("grpc"):
        from tlexport.serving.grpc_client import GrpcClient

        return GrpcClient(url, host, port, access, secure=parts.scheme == "grpcs")
    tls = _tls(access.ca) if parts.scheme == "https" else None
    return HttpClient(
        url, Connection(host, port, timeout_s=access.timeout_s, tls=tls), parts.path.rstrip("/"), access.token
    )


def choose(client: Client, wanted: str | None, name: str) -> Model:
    """The model `wanted`, else the one called `name`, else the server's only one. Raises ServerError naming what there is."""
    asked = wanted or name
    try:
        return client.model(asked)
    except ProtocolError as error:
        if error.status != 404 and error.status != 400:
            raise ServerError(f"{client.url}: {error}") from error
        refusal = error
    held = client.models()
    if wanted is None and len(held) == 1:
        return client.model(held[0])
    has = f"the server has: {listed(held)}" if held else f"the server says: {refusal}"
    raise ServerError(f"{client.url} has no model {asked!r}; {has}; name one with --model") from refusal


def require_ready(client: Client, model: str) -> None:
    """Raises ServerError where the server does not answer as the protocol says, or is not ready."""
    try:
        server, ready = client.server(), client.ready(model)
    except ProtocolError as error:
        raise ServerError(f"{client.url}: {error}") from error
    if not ready:
        raise ServerError(
            f"{client.url} ({server.name} {server.version}) is up, and model {model!r} is not ready; try again later"
        )


class HttpClient:
    """Over HTTP/1.1. `encoding` is binary until `negotiate` finds that the server does not take it."""

    def __init__(self, url: str, connection: Connection, prefix: str, token: str | None) -> None:
        self.url, self.connection = url, connection
        self.encoding: Encoding = "binary"
        self._prefix = prefix
        self._common = f"Host: {connection.where}\r\n" + (
            f"Authorization: Bearer {token}\r\n" if token else ""
        )

    def server(self) -> Server:
        document = self._document("/v2")
        extensions = document.get("extensions")
        return Server(
            name=str(document.get("name", "")),
            version=str(document.get("version", "")),
            extensions=tuple(map(str, extensions)) if isinstance(extensions, list) else (),
        )

    def live(self) -> bool:
        return self._get("/v2/health/live").status == 200

    def ready(self, model: str = "") -> bool:
        answer = self._get(f"/v2/models/{quote(model, safe='')}/ready" if model else "/v2/health/ready")
        if answer.status in (401, 403):
            raise _refused(answer)
        return answer.status == 200 and _said_ready(answer.body)

    def model(self, name: str) -> Model:
        document = self._document(f"/v2/models/{quote(name, safe='')}")
        versions = document.get("versions") or ()
        return Model(
            name=str(document.get("name", name)),
            versions=tuple(map(str, versions)) if isinstance(versions, list | tuple) else (),
            platform=str(document.get("platform", "")),
            inputs=_stated(document.get("inputs"), self.url),
            outputs=_stated(document.get("outputs"), self.url),
        )

    def models(self) -> tuple[str, ...]:
        """By Triton's repository index, or by the list that KServe has."""
        for method, path in (("POST", "/v2/repository/index"), ("GET", "/v2/models")):
            answer = self.connection.ask(self._request(method, path, b"{}" if method == "POST" else b""))
            found = _names(answer.body) if answer.status == 200 else ()
            if found:
                return found
        return ()

    def prepare(self, model: str, inputs: Tensors, id: str = "", timeout_us: int | None = None) -> bytes:
        body, length = protocol.encode_request(
            inputs, id=id, binary=self.encoding == "binary", timeout_us=timeout_us
        )
        return self._request("POST", f"/v2/models/{quote(model, safe='')}/infer", body, length)

    def send(self, prepared: bytes) -> Response:
        answer = self.connection.ask(prepared)
        if answer.status != 200:
            raise _refused(answer)
        length = answer.headers.get(protocol.HEADER_LENGTH.lower())
        if length is not None and not length.isdigit():
            raise ProtocolError(502, f"{protocol.HEADER_LENGTH} is {datatypes.quoted(length)}")
        return protocol.decode_response(answer.body, None if length is None else int(length))

    def close(self) -> None:
        self.connection.close()

    def _request(self, method: str, path: str, body: bytes = b"", json_length: int | None = None) -> bytes:
        kind = "application/json" if json_length is None else "application/octet-stream"
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._common}"
        if method == "POST":
            head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        if json_length is not None:
            head += f"{protocol.HEADER_LENGTH}: {json_length}\r\n"
        return head.encode("ascii") + b"\r\n" + body

    def _get(self, path: str) -> Answer:
        return self.connection.ask(self._request("GET", path))

    def _document(self, path: str) -> dict[str, Any]:
        answer = self._get(path)
        if answer.status != 200:
            raise _refused(answer)
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise ServerError(
                f"{self.url} does not speak the Open Inference Protocol v2: {path} is no JSON object"
            )
        return document


def negotiate(client: Client, model: str, inputs: Tensors) -> Encoding:
    """Ask once, in binary, and as JSON where that is refused; the client keeps to what was answered.

    Raises ProtocolError with the last refusal if neither is taken.
    """
    try:
        client.send(client.prepare(model, inputs))
    except ProtocolError as error:
        if not isinstance(client, HttpClient) or error.status in (401, 403, 404, 429, 503, 504):
            raise
        client.encoding = "json"
        client.send(client.prepare(model, inputs))
    return client.encoding


def _tls(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise RecipeError(f"{ca} holds no certificates: {error}") from error


def _refused(answer: Answer) -> ProtocolError:
    reason = protocol.error_reason(answer.body) or "no reason given"
    retry = answer.headers.get("retry-after", "")
    advice = {
        401: f" (a token is wanted: {token.VARIABLE} or --token-file)",
        403: " (the token is not taken)",
    }.get(answer.status, "")
    return ProtocolError(
        answer.status, f"HTTP {answer.status}: {reason}{advice}", float(retry) if retry.isdigit() else None
    )


def _said_ready(body: bytes) -> bool:
    """KServe says `{"ready": false}` with status 200."""
    try:
        document = json.loads(body)
    except ValueError:
        return True
    return not (isinstance(document, dict) and document.get("ready") is False)


def _names(body: bytes) -> tuple[str, ...]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    entries = document.get("models") if isinstance(document, dict) else document
    if not isinstance(entries, list):
        return ()
    named = (of.get("name") if isinstance(of, dict) else of for of in entries)
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str)))


def _stated(tensors: object, url: str) -> tuple[Stated, ...]:
    """Metadata of tensors; a server that states none has none."""
    found = []
    for tensor in tensors if isinstance(tensors, list) else ():
        shape = tensor.get("shape") if isinstance(tensor, Mapping) else None
        if (
            not isinstance(tensor, Mapping)
            or not isinstance(shape, list)
            or not all(type(side) is int for side in shape)
        ):
            raise ServerError(
                f"{url} states a tensor that the protocol does not know: {datatypes.quoted(tensor)}"
            )
        word = str(tensor.get("datatype", ""))
        found.append(Stated(str(tensor.get("name", "")), datatypes.NUMPY.get(word, word), tuple(shape)))
    return tuple(found)
