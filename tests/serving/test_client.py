"""The client on real sockets: against the embedded server, and against servers that answer in every way but the right one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import networks
import numpy as np
import planted
import pytest

from tlexport.errors import RecipeError, ServerError
from tlexport.serving import client as clients
from tlexport.serving import protocol, token
from tlexport.serving.client import Access, HttpClient, connect
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.place import Bound
from tlexport.serving.wire import LARGEST_BODY
from tlexport.tensors import TensorSpec

INTERFACE = protocol.Interface(
    (TensorSpec(name="x", dtype="float32", shape=("batch", 2)),), (TensorSpec(name="y", dtype="float32", shape=("batch", 2)),), 4
)  # fmt: skip
X = {"x": np.array([[1.5, np.nan]], np.float32)}
Answer = Callable[[bytes], bytes | None]  # a request -> all bytes of the answer; None closes the connection


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bound]:
    with planted.served(networks.table()[0], tmp_path_factory.mktemp("live")) as bound:
        yield bound


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """A server on a port of its own that reads whole requests and answers each by `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(link: socket.socket) -> None:
        held = b""
        with link, contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in held:
                    if not (part := link.recv(65536)):
                        return
                    held += part
                head, _, rest = held.partition(b"\r\n\r\n")
                size = next(
                    (
                        int(line[15:])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length:")
                    ),
                    0,
                )
                while len(rest) < size:
                    rest += link.recv(65536)
                held = rest[size:]
                made = answer(head + b"\r\n\r\n" + rest[:size])
                if made is None:
                    return
                link.sendall(made)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def said(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def echo(request: bytes) -> bytes:
    head, _, body = request.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Inference-Header")),
        None,
    )
    asked = protocol.decode_request(body, length, INTERFACE)
    made, size = protocol.encode_response("m", "1", asked, {"y": asked.inputs["x"]})
    return said(made, headers="" if size is None else f"inference-header-content-length: {size}\r\n")


@pytest.mark.parametrize("how", ["http", "grpc"])
def test_both_ways_to_the_embedded_server(live: Bound, how: str) -> None:
    url = live.http if how == "http" else live.grpc
    assert url is not None
    client = connect(url)
    assert client.live() and client.ready() and client.ready("planted") and client.server().name == "tlexport"
    model = clients.choose(client, None, "planted")
    assert [of.shape for of in model.inputs] == [(-1, 6)] and model.outputs[0].dtype == "float32"
    graph, cells = networks.table()
    assert clients.negotiate(client, "planted", {"features": cells[:1]}) == (
        "binary" if how == "http" else "grpc"
    )
    prepared = client.prepare("planted", {"features": cells[:3]}, id="seven")
    first, again = client.send(prepared), client.send(prepared)
    assert first.id == "seven"
    assert (first.outputs["probabilities"] == again.outputs["probabilities"]).all()
    np.testing.assert_array_equal(first.outputs["probabilities"], planted.outputs(graph, cells[:3]))
    with pytest.raises(ServerError, match=r"no model 'other'; .*planted"):
        clients.choose(client, "other", "planted")
    with pytest.raises(ProtocolError, match="features"):
        client.send(client.prepare("planted", {"wrong": cells[:1]}))
    client.close()


def test_json_where_binary_is_not_taken() -> None:
    def json_alone(request: bytes) -> bytes:
        return (
            said(b'{"error": "not JSON"}', "400 Bad Request") if b"octet-stream" in request else echo(request)
        )

    with answering(json_alone) as url:
        client = connect(url)
        assert clients.negotiate(client, "m", X) == "json" == client.encoding
        made = client.send(client.prepare("m", X)).outputs["y"]
        np.testing.assert_array_equal(made, X["x"])


def test_answers_in_chunks_and_on_one_connection() -> None:
    opened = set()

    def chunked(request: bytes) -> bytes:
        opened.add(threading.get_ident())
        head, _, body = echo(request).partition(b"\r\n\r\n")
        length = int(head.rpartition(b":")[2])
        parts = (body[:7], body[7:])
        return (
            f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\ninference-header-content-length: {length}\r\n\r\n".encode()
            + b"".join(b"%x;x=1\r\n%s\r\n" % (len(part), part) for part in parts)
            + b"0\r\n\r\n"
        )

    with answering(chunked) as url:
        client = connect(url)
        for _ in range(3):
            response = client.send(client.prepare("m", {"x": np.ones((1, 2), np.float32)}))
            assert response.outputs["y"].tolist() == [[1, 1]]
        assert len(opened) == 1


def test_a_connection_that_was_closed_while_idle_is_opened_again() -> None:
    asked = []

    def every_second(request: bytes) -> bytes | None:
        asked.append(request)
        return None if len(asked) % 2 == 0 else echo(request)

    with answering(every_second) as url:
        client = connect(url)
        for _ in range(3):
            client.send(client.prepare("m", X))
    assert len(asked) == 5, "the second and the third were sent again, on a new connection"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda _: None, "closed the connection without an answer"),
        (lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "did not answer within"),
        (lambda _: b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP/1.1"),
        (lambda _: b"\x00\x00\x18\x04" + b"x" * 70000, "more than 64 KiB of headers"),
        (lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n", "announces an answer"),
        (
            lambda _: f"HTTP/1.1 200 OK\r\nContent-Length: {LARGEST_BODY + 1}\r\n\r\n".encode(),
            "announces an answer",
        ),
        (lambda _: said(b"<html>hello</html>"), "no JSON object"),
    ],
)
def test_what_is_no_answer_is_told(answer: Answer, told: str) -> None:
    with answering(answer) as url:
        client = connect(url, Access(timeout_s=0.5))
        with pytest.raises(ServerError, match=told):
            client.server()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (said(b'{"outputs": 3}'), "no array `outputs`"),
        (said(b"{}", headers="Inference-Header-Content-Length: 99\r\n"), "99"),
        (said(b"{}", headers="Inference-Header-Content-Length: many\r\n"), "many"),
        (said(b'{"error": "busy"}', "429 Too Many", "Retry-After: 2\r\n"), "HTTP 429: busy"),
        (said(b"", "401 Unauthorized"), "TLEXPORT_TOKEN"),
    ],
)
def test_a_refusal_and_a_broken_answer_keep_their_status(answer: bytes, told: str) -> None:
    with answering(lambda _: answer) as url, pytest.raises(ProtocolError, match=told) as caught:
        connect(url).send(connect(url).prepare("m", X))
    assert caught.value.status in (502, 429, 401)
    assert (caught.value.retry_after == 2) == (caught.value.status == 429)


def test_the_only_model_is_taken_and_of_several_one_must_be_named() -> None:
    held = ["a"]

    def listing(request: bytes) -> bytes:
        path = request.split(b" ")[1]
        if path == b"/v2/models":
            return said(json.dumps({"models": held}).encode())
        if path == b"/v2/models/a":
            return said(b'{"name": "a", "inputs": [], "outputs": []}')
        return said(b'{"error": "unknown"}', "404 Not Found")

    with answering(listing) as url:
        assert clients.choose(connect(url), None, "bundle").name == "a"
        held.append("b")
        with pytest.raises(ServerError, match="the server has: a, b; name one with --model"):
            clients.choose(connect(url), None, "bundle")


def test_a_token_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def look(request: bytes) -> bytes:
        seen.append(request)
        return said(b"{}")

    monkeypatch.setenv("TLEXPORT_TOKEN", "from-the-environment-1")
    assert token.read(None) == "from-the-environment-1"
    file = tmp_path / "token"
    file.write_text("from-a-file-123456\n")
    access = Access(token=token.read(file))
    assert "123456" not in repr(access)
    with answering(look) as url:
        connect(url, access).server()
    assert b"Authorization: Bearer from-a-file-123456\r\n" in seen[0]
    file.write_text("two words")
    with pytest.raises(RecipeError, match="one token"):
        token.read(file)


def test_nobody_there_and_nobody_who_answers() -> None:
    pytest.importorskip("grpc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", f"grpc://127.0.0.1:{port}"):
        with pytest.raises(ServerError, match="nothing answers at"):
            connect(url, Access(timeout_s=5)).live()
    silent = threading.Event()
    with answering(lambda _: silent.wait(10) and None) as url:
        with pytest.raises(ServerError, match=r"did not answer within 0\.2 s") as caught:
            connect(url, Access(timeout_s=0.2)).live()
        silent.set()
    assert caught.value.timed_out


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "http://a:b@127.0.0.1", "http://x:99999", "http://x/?a=1"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(RecipeError):
        connect(url)


def test_a_gateway_prefix_and_an_ipv6_address() -> None:
    seen = []
    with answering(lambda request: seen.append(request) or said(b"{}")) as url:
        connect(url + "/gateway/").server()
    assert seen[0].startswith(b"GET /gateway/v2 HTTP/1.1\r\n")
    client = connect("http://[::1]:9")
    assert isinstance(client, HttpClient) and client.connection.where == "[::1]:9"
