"""500 malformed requests, made from right ones by the protocol's schema: none crashes the server, none gets a 5xx, and its
answers to right requests are bit for bit what they were.
"""

from __future__ import annotations

import copy
import http.client
import json
import random
from collections import Counter
from collections.abc import Callable

import pytest

pytest.importorskip("grpc")
pytest.importorskip("httptools")
pytest.importorskip("prometheus_client")
import grpc
from live_server import Live, ask, sample

from tlexport.serving import messages, protocol
from tlexport.serving.messages import MESSAGES

JUNK: tuple[object, ...] = (
    None, True, False, 0, -7, 2**31, 2**63, 2**64, 1e308, 0.5, "", "x", "FP32", "\0", "é\ud7ff", [], {}, [[]], [None],
    [1, [2]], {"name": "x"}, ["x"] * 3, [2**70], "x" * 3000,
)  # fmt: skip
ALLOWED = {200, 400, 404, 405, 411, 413, 415, 431}


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The way to every member and element."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    if isinstance(value, list):
        for index in range(len(value)):
            found += places(value[index], (*path, index))
    return found


def changed(document: dict, chance: random.Random) -> dict:
    """A copy with one to three places replaced, removed, doubled, or given a new member."""
    made = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        ways = places(made)
        if not ways:
            break
        *way, last = chance.choice(ways)
        holder = made
        for step in way:
            holder = holder[step]
        action = chance.randrange(4)
        if action == 0:
            holder[last] = chance.choice(JUNK)
        elif action == 1:
            del holder[last]
        elif action == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif isinstance(holder, dict):
            word = chance.choice(["parameters", "data", "timeout", "binary_data_size", "name", "shape", "\0"])
            holder[word] = chance.choice(JUNK)
    return made


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut off, inserted or doubled."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made)) if made else 0
        action = chance.randrange(4)
        if action == 0 and made:
            made[at] = chance.randrange(256)
        elif action == 1:
            del made[at:]
        elif action == 2:
            made[at:at] = chance.randbytes(chance.randint(1, 9))
        else:
            made[at:at] = made[at : at + 16]
    return bytes(made)


def http_requests(count: int, chance: random.Random) -> list[tuple[str, bytes, dict[str, str]]]:
    """Path, body and headers."""
    made = []
    for number in range(count):
        binary = number % 2 == 0
        body, length = protocol.encode_request(
            sample(number, 2),
            id=str(number),
            binary=binary,
            outputs=["y"] if number % 3 else [],
            timeout_us=10**7,
        )
        header, rest = body[:length], body[length:] if length else b""
        path = "/v2/models/echo/infer"
        if number % 5 == 0:
            body = flipped(body, chance)
        else:
            header = json.dumps(changed(json.loads(header), chance)).encode("utf-8", "surrogatepass")
            body, length = header + rest, len(header) if length else None
        headers = {} if length is None else {protocol.HEADER_LENGTH: str(length)}
        if number % 7 == 0:
            headers[protocol.HEADER_LENGTH] = chance.choice(
                ["-1", "0", "1e3", "9" * 30, " 5", str(len(body) + 1), "x"]
            )
        if number % 11 == 0:
            path = chance.choice(
                ["/v2/models//infer", "/v2/models/%00/infer", "/v2/models/echo/versions//infer", "/v2"]
            )
        made.append((path, body, headers))
    return made


@pytest.mark.parametrize("seed", [0])
def test_malformed_requests_over_http(echo: Callable[..., Live], seed: int) -> None:
    live = echo(inline=True)
    golden = ask(live.connect(), sample(11, 3))
    statuses: Counter[int] = Counter()
    connection = live.connect()
    for path, body, headers in http_requests(350, random.Random(seed)):
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
        except http.client.HTTPException:
            raise AssertionError(f"no answer to {path} {body!r} {headers}") from None
        content = answer.read()
        statuses[answer.status] += 1
        assert answer.status in ALLOWED, (answer.status, content, body, headers)
        if answer.status != 200:
            assert json.loads(content)["error"]
    _unharmed(live, golden)
    assert statuses[400] > 200, statuses
    assert "mistake" not in {line["event"] for line in live.log()}


def test_malformed_bytes_instead_of_http(echo: Callable[..., Live]) -> None:
    import socket

    live = echo(inline=True)
    golden = ask(live.connect(), sample(11, 3))
    chance = random.Random(1)
    body, length = protocol.encode_request(sample(5))
    right = (
        f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n"
        f"{protocol.HEADER_LENGTH}: {length}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    for _ in range(75):
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
            raw.sendall(flipped(right, chance))
            raw.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while part := raw.recv(65536):
                    received += part
            except ConnectionResetError:
                continue
            assert not received.startswith(b"HTTP/1.1 5"), received
    _unharmed(live, golden)
    assert "mistake" not in {line["event"] for line in live.log()}


def test_malformed_requests_over_grpc(echo: Callable[..., Live]) -> None:
    live = echo(inline=True)
    golden = ask(live.connect(), sample(11, 3))
    chance = random.Random(2)
    allowed = {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.DEADLINE_EXCEEDED,  # a changed `timeout` of a few microseconds
    }
    codes: Counter[grpc.StatusCode] = Counter()
    with grpc.insecure_channel(live.grpc.removeprefix("grpc://")) as channel:
        for number in range(150):
            method = ("ModelInfer", "ModelInfer", "ModelMetadata", "ModelReady")[number % 4]
            right = messages.encode_request(
                "echo", sample(number, 2), id="x", outputs=["y"], timeout_us=10**7
            )
            if method != "ModelInfer":
                right = MESSAGES[f"{method}Request"](name="echo", version="one")
            data = flipped(right.SerializeToString(), chance)
            call = channel.unary_unary(f"/{messages.SERVICE}/{method}")
            try:
                call(data, timeout=20)
                code = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code = error.code()  # type: ignore[attr-defined]
            codes[code] += 1
            assert code in allowed, (code, method, data)
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 50, codes
    _unharmed(live, golden)


def _unharmed(live: Live, golden: tuple[int, object]) -> None:
    status, answer = ask(live.connect(), sample(11, 3))
    assert status == 200
    assert isinstance(answer, protocol.Response)
    assert isinstance(golden[1], protocol.Response)
    for name, array in golden[1].outputs.items():
        assert answer.outputs[name].tobytes() == array.tobytes()
    assert live.metric("tlexport_requests_in_flight") == 0
    assert live.process.poll() is None
