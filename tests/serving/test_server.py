"""A live server over loopback: routes, overload, deadlines, drain, reload, tokens, TLS, slow clients and those that leave."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import http.client
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("httptools")
pytest.importorskip("prometheus_client")
import grpc
from live_server import Live, ask, sample

from tlexport.serving import messages, protocol
from tlexport.serving import rpc as server_rpc
from tlexport.serving.messages import MESSAGES
from tlexport.tensors import TensorSpec

Launch = Callable[..., Live]


def right(answer: object, mark: int, samples: int = 1) -> bool:
    """Whether it is the whole answer to the sample with that mark, and no other's."""
    wanted = sample(mark, samples)
    return (
        isinstance(answer, protocol.Response)
        and answer.outputs["y"].tobytes() == wanted["x"].tobytes()
        and answer.outputs["stamp"].tobytes() == wanted["mark"].tobytes()
    )


def rpc(live: Live, method: str, request: object, **options: object) -> object:
    with grpc.insecure_channel(live.grpc.removeprefix("grpc://")) as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/{method}")
        answer = call(
            request if isinstance(request, bytes) else request.SerializeToString(),  # type: ignore[attr-defined]
            timeout=options.pop("timeout", 20),
            **options,
        )
        return MESSAGES[f"{method}Response"].FromString(answer)


def test_what_there_is_and_what_there_is_not(echo: Launch) -> None:
    live = echo()
    status, body = live.get("/v2")
    assert status == 200
    assert json.loads(body)["extensions"] == ["binary_tensor_data", "schedule_policy"]
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/echo/ready",
        "/v2/models/echo/versions/one/ready",
    ):
        assert live.get(path)[0] == 200
    for path in ("/v2/models/echo", "/v2/models/echo/versions/one", "/v2/models/ech%6F?x=1"):
        described = json.loads(live.get(path)[1])
        assert described["name"] == "echo"
        assert described["versions"] == ["one"]
        assert described["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    for path, told in (
        ("/", "/v2/models/NAME"),
        ("/v2/models/other", "this server has: echo"),
        ("/v2/models/echo/versions/7", "this server has: one"),
        ("/v2/models/echo/versions/7/ready", "this server has: one"),
        ("/v2/models", "/v2/models/NAME"),
        ("/v2/models/echo/explain", "/v2/models/NAME"),
    ):
        status, body = live.get(path)
        assert status == 404
        assert told in json.loads(body)["error"]
    connection = live.connect()
    connection.request("DELETE", "/v2/models/echo/infer")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert live.stop() == 0


def test_answers_over_both_protocols_in_both_encodings(echo: Launch) -> None:
    live = echo()
    connection = live.connect()
    for binary in (True, False):
        status, answer = ask(connection, sample(5, 3), id="mine", binary=binary)
        assert status == 200
        assert right(answer, 5, 3)
        assert isinstance(answer, protocol.Response)
        assert (answer.id, answer.model_name, answer.model_version) == ("mine", "echo", "one")
        status, answer = ask(connection, sample(5), outputs=["stamp"], binary=binary)
        assert isinstance(answer, protocol.Response)
        assert list(answer.outputs) == ["stamp"]
    found = messages.decode_response(
        rpc(live, "ModelInfer", messages.encode_request("echo", sample(7, 2), id="g"))
    )
    assert right(found, 7, 2)
    assert found.id == "g"
    assert rpc(live, "ServerLive", b"").live  # type: ignore[attr-defined]
    assert rpc(live, "ServerReady", b"").ready  # type: ignore[attr-defined]
    assert rpc(live, "ModelReady", MESSAGES["ModelReadyRequest"](name="echo")).ready  # type: ignore[attr-defined]
    assert rpc(live, "ServerMetadata", b"").name == "tlexport"  # type: ignore[attr-defined]
    described = rpc(live, "ModelMetadata", MESSAGES["ModelMetadataRequest"](name="echo"))
    assert list(described.inputs[0].shape) == [-1, 4]  # type: ignore[attr-defined]
    for method, request, code in (
        ("ModelReady", MESSAGES["ModelReadyRequest"](name="other"), grpc.StatusCode.NOT_FOUND),
        ("ModelInfer", messages.encode_request("other", sample(1)), grpc.StatusCode.NOT_FOUND),
        (
            "ModelInfer",
            messages.encode_request("echo", {"x": sample(1)["x"]}),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        ("ModelInfer", b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            rpc(live, method, request)
        assert refused.value.code() == code  # type: ignore[attr-defined]
    assert live.metric('tlexport_requests_total{code="200",protocol="http"}') == 4
    assert live.metric('tlexport_requests_total{code="200",protocol="grpc"}') == 1
    assert live.metric("tlexport_batch_samples_count") == 5
    assert 'tlexport_model_info{name="echo",version="one"} 1.0' in live.get("/metrics")[1].decode()


def test_tritonclient_speaks_to_it(echo: Launch) -> None:
    client = pytest.importorskip("tritonclient.http")
    live = echo()
    triton = client.InferenceServerClient(live.http.removeprefix("http://"))
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("echo", "one")
    assert triton.get_model_metadata("echo")["outputs"][1]["datatype"] == "INT64"
    for binary in (True, False):
        given = []
        for name, array in sample(3, 2).items():
            tensor = client.InferInput(name, list(array.shape), "FP32" if name == "x" else "INT64")
            given.append(tensor.set_data_from_numpy(array, binary_data=binary))
        found = triton.infer("echo", given, request_id="t", timeout=5_000_000)
        assert found.as_numpy("y").tobytes() == sample(3, 2)["x"].tobytes()
    with pytest.raises(client.InferenceServerException, match="no compressed bodies"):
        triton.infer("echo", given, request_compression_algorithm="gzip")
    triton.close()


@pytest.mark.parametrize("inline", [True, False])
def test_under_concurrency_every_answer_belongs_to_its_request(echo: Launch, inline: bool) -> None:
    live = echo(inline=inline, queue=1024, workers=1 if inline else 2)

    def client(number: int) -> int:
        connection = live.connect()
        count = 0
        for turn in range(60):
            mark, samples = number * 1000 + turn, 1 + (number + turn) % 5
            status, answer = ask(connection, sample(mark, samples), binary=turn % 3 > 0)
            count += status == 200 and right(answer, mark, samples)
        return count

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(client, range(16))) == [60] * 16


def test_overload_is_shed_and_what_was_accepted_is_answered(echo: Launch) -> None:
    live = echo(delay=0.02, batch=2, queue=4)
    statuses: Counter[int] = Counter()
    wrong = []

    def client(number: int) -> None:
        connection = live.connect()
        for turn in range(15):
            mark = number * 1000 + turn
            status, answer = ask(connection, sample(mark))
            statuses[status] += 1
            if status == 200 and not right(answer, mark):
                wrong.append(mark)
            if status == 429:
                assert "overloaded" in str(answer)
                assert connection.sock is not None, "the connection stays"

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        list(pool.map(client, range(24)))
    assert wrong == []
    assert set(statuses) == {200, 429}
    assert live.metric('tlexport_requests_total{code="429",protocol="http"}') == statuses[429]
    assert live.metric("tlexport_queue_samples") == 0
    assert live.metric("tlexport_requests_in_flight") == 0


def test_a_full_server_sheds_what_it_knows_and_still_reads_what_it_does_not(echo: Launch) -> None:
    """The short way of refusing is for requests that were let in before, byte for byte in their heads."""
    live = echo(delay=1.0, batch=1, queue=1, token="a-token-of-the-test")
    right_one = {"Authorization": "Bearer a-token-of-the-test"}
    connection = live.connect()
    assert ask(connection, sample(1), headers=right_one)[0] == 200
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(ask, live.connect(), sample(2), headers=right_one)]
        until(lambda: metric_with(live, right_one, "tlexport_requests_in_flight") == 1)
        busy.append(pool.submit(ask, live.connect(), sample(3), headers=right_one))
        until(lambda: metric_with(live, right_one, "tlexport_queue_samples") == 1)
        assert ask(connection, sample(4), headers=right_one)[0] == 429
        assert ask(connection, sample(4), headers={"Authorization": "Bearer a-token-of-the-tesT"})[0] == 401
        assert ask(connection, sample(4), headers=right_one, path="/v2/models/other/infer")[0] == 404
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read()
        assert ask(connection, sample(4, 2), headers=right_one)[0] == 429
        assert all(right(future.result()[1], mark) for mark, future in zip((2, 3), busy, strict=True))
    assert ask(connection, sample(5), headers=right_one)[0] == 200
    assert metric_with(live, right_one, 'tlexport_requests_total{code="429",protocol="http"}') == 2


def metric_with(live: Live, headers: dict[str, str], line: str) -> float:
    page = live.get("/metrics", headers)[1].decode()
    return next((float(text.split()[-1]) for text in page.splitlines() if text.startswith(f"{line} ")), 0.0)


def test_overload_over_grpc_is_unavailable(echo: Launch) -> None:
    live = echo(delay=0.3, batch=1, queue=1)
    request = messages.encode_request("echo", sample(1)).SerializeToString()
    with grpc.insecure_channel(live.grpc.removeprefix("grpc://")) as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer")
        futures = [call.future(request, timeout=20) for _ in range(8)]
        codes = Counter(future.code() for future in futures)
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_deadlines(echo: Launch) -> None:
    live = echo(delay=0.5, batch=1, queue=100)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(lambda: ask(live.connect(), sample(1)))
        time.sleep(0.2)  # it runs now
        late = pool.submit(lambda: ask(live.connect(), sample(2), timeout_us=50_000))
        assert late.result()[0] == 504
        assert not first.done() or first.result()[0] == 200
        assert first.result()[0] == 200
    with pytest.raises(grpc.RpcError) as refused:
        rpc(live, "ModelInfer", messages.encode_request("echo", sample(3), timeout_us=1))
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert live.metric("tlexport_batch_samples_count") == 1, "what was too late was not run"


def test_who_has_left_is_not_served(echo: Launch) -> None:
    live = echo(delay=0.3, batch=1, queue=100)
    body, length = protocol.encode_request(sample(1))
    head = f"POST /v2/models/echo/infer HTTP/1.1\r\nContent-Length: {len(body)}\r\n{protocol.HEADER_LENGTH}: {length}\r\n\r\n"
    impatient = []
    for _ in range(10):
        raw = socket.create_connection(("127.0.0.1", live.port))
        raw.sendall(head.encode() + body)
        impatient.append(raw)
    time.sleep(0.1)
    for raw in impatient:
        raw.close()
    assert ask(live.connect(), sample(2))[0] == 200
    assert live.metric("tlexport_batch_samples_count") < 11
    assert live.metric('tlexport_requests_total{code="499",protocol="http"}') >= 8
    assert live.metric("tlexport_requests_in_flight") == 0


def test_a_signal_lets_what_is_under_way_be_answered(echo: Launch) -> None:
    live = echo(delay=0.2, batch=1, queue=100)
    keeper = live.connect()
    assert ask(keeper, sample(0))[0] == 200
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        under_way = [pool.submit(ask, live.connect(), sample(mark)) for mark in range(1, 6)]
        while live.metric("tlexport_requests_in_flight") < 5:
            time.sleep(0.01)
        live.process.send_signal(signal.SIGTERM)
        live.logged("draining")
        status, reason = ask(keeper, sample(9))
        assert (status, "shutting down" in str(reason)) == (503, True)
        for mark, future in enumerate(under_way, start=1):
            status, answer = future.result()
            assert status == 200
            assert right(answer, mark)
    assert live.process.wait(20) == 0
    assert live.logged("stopped")["unanswered"] == 0


def test_it_leaves_in_time_though_a_run_never_ends(echo: Launch) -> None:
    live = echo(delay=3600, drain_seconds=0.5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(ask, live.connect(), sample(1))
        while live.metric("tlexport_requests_in_flight") < 1:
            time.sleep(0.01)
        live.process.send_signal(signal.SIGINT)
        assert live.process.wait(20) == 0
        with pytest.raises((OSError, http.client.HTTPException)):
            hanging.result()
    assert live.logged("stopped")["unanswered"] == 1


@pytest.mark.parametrize(("slow", "drain_seconds"), [(0.5, 30.0), (3600.0, 0.5)])
def test_it_leaves_while_a_version_loads(echo: Launch, slow: float, drain_seconds: float) -> None:
    for turn in range(
        4
    ):  # what a thread in native code does to a process that ends differs from time to time
        live = echo(slow=slow, drain_seconds=drain_seconds)
        (live.folder / "version").write_text("slow")
        live.process.send_signal(signal.SIGHUP)
        live.logged("version found")
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(20) == 0, (turn, (live.folder / "log").read_text())
        assert live.logged("stopped")["loading"] == (slow > 10)


def test_a_new_version_is_taken_up_with_no_failed_request(echo: Launch) -> None:
    live = echo(delay=0.002, queue=1000)
    stop = threading.Event()
    statuses: Counter[tuple[int, str]] = Counter()

    def client(number: int) -> int:
        connection, turn = live.connect(), 0
        while not stop.is_set():
            mark = number * 100_000 + turn
            status, answer = ask(connection, sample(mark))
            version = answer.model_version if isinstance(answer, protocol.Response) else str(answer)
            statuses[status, version] += 1
            assert right(answer, mark)
            turn += 1
        return turn

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            for version in ("two", "three"):
                (live.folder / "version").write_text(version)
                live.process.send_signal(signal.SIGHUP)
                until(lambda version=version: statuses[200, version] > 20)
            (live.folder / "version").write_text("refuse")
            refused = live.logged("version refused")
            seen = statuses[200, "three"]
            until(lambda: statuses[200, "three"] > seen + 20)
            (live.folder / "version").write_text("four")
            until(lambda: statuses[200, "four"] > 20)
        finally:
            stop.set()
        for future in clients:
            future.result()
    assert {status for status, _ in statuses} == {200}
    assert {version for _, version in statuses} == {"one", "two", "three", "four"}
    assert "planted" in refused["reason"]
    assert live.metric('tlexport_reloads_total{result="loaded"}') == 3
    assert live.metric('tlexport_reloads_total{result="refused"}') == 1
    assert live.get("/v2/models/echo/versions/one")[0] == 404
    assert live.get("/v2/models/echo/versions/four")[0] == 200


def wide(columns: int) -> dict[str, np.ndarray]:
    return sample(3, 16) | {"x": np.full((16, columns), 3, np.float32)}


def reloaded(live: Live, version: str, event: str) -> dict:
    (live.folder / "version").write_text(version)
    live.process.send_signal(signal.SIGHUP)
    return live.logged(event)


def test_a_new_version_that_reads_a_thousand_times_as_much(echo: Launch) -> None:
    live = echo()
    reloaded(live, "wide-4000", "version loaded")
    status, answer = ask(live.connect(), wide(4000))
    assert status == 200
    assert isinstance(answer, protocol.Response)
    found = messages.decode_response(rpc(live, "ModelInfer", messages.encode_request("echo", wide(4000))))
    assert found.outputs["y"].tobytes() == answer.outputs["y"].tobytes() == wide(4000)["x"].tobytes()


def test_a_new_version_that_reads_more_than_grpc_was_opened_for_is_refused(echo: Launch) -> None:
    live = echo()
    refused = reloaded(live, "wide-40000", "version refused")
    assert "gRPC was opened for 4194304" in refused["reason"] and "start it anew" in refused["reason"]
    assert ask(live.connect(), sample(1))[0] == 200, "the old version serves on"
    over_http = echo(grpc_port=None)
    reloaded(over_http, "wide-40000", "version loaded")
    assert ask(over_http.connect(), wide(40000))[0] == 200


def test_grpc_reads_no_more_than_the_version_that_is_served(echo: Launch) -> None:
    live = echo()
    with pytest.raises(grpc.RpcError) as refused:
        rpc(live, "ModelInfer", messages.encode_request("echo", wide(4000)))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert "more than the model reads" in refused.value.details()  # type: ignore[attr-defined]


def test_room_for_later_versions_is_bounded() -> None:
    mebibyte = 1 << 20
    for columns in (10, mebibyte, 6 * mebibyte, 40 * mebibyte):  # 5 bytes each as JSON numbers
        kind = TensorSpec(name="x", dtype="uint8", shape=("batch", columns))
        interface = protocol.Interface((kind,), (kind,), 1)
        needed = server_rpc.largest_message(interface)
        opened = {10: 4 * mebibyte, mebibyte: 4 * needed, 6 * mebibyte: 64 * mebibyte}.get(columns, needed)
        assert server_rpc.message_limit(interface) == opened


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_token_is_asked_for_and_never_logged(echo: Launch) -> None:
    live = echo(token="a-token-of-the-test")
    connection = live.connect()
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic a-token-of-the-test"}, 401),
        ({"Authorization": "Bearer a-token-of-the-tes\xe9"}, 401),
        ({"Authorization": "Bearer a-token-of-the-test"}, 200),
        ({"Authorization": "bearer a-token-of-the-test"}, 200),
    ):
        assert ask(connection, sample(1), headers=headers)[0] == status
    for path, status in (
        ("/v2/health/ready", 200),
        ("/v2", 401),
        ("/metrics", 401),
        ("/v2/models/echo", 401),
    ):
        assert live.get(path)[0] == status
    request = messages.encode_request("echo", sample(1))
    with pytest.raises(grpc.RpcError) as refused:
        rpc(live, "ModelInfer", request)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    assert rpc(live, "ModelInfer", request, metadata=[("authorization", "Bearer a-token-of-the-test")])
    assert live.stop() == 0
    log = (live.folder / "log").read_text()
    assert "a-token" not in log
    assert "wrong" not in log


def test_the_log_has_a_line_a_request_and_nothing_of_what_was_in_it(echo: Launch) -> None:
    live = echo()
    connection = live.connect()
    secret = {"x": np.full((2, 4), 31337.25, np.float32), "mark": np.full(2, 8675309, np.int64)}
    for binary in (True, False):
        assert ask(connection, secret, id="an-id-of-a-patient", binary=binary)[0] == 200
    assert ask(connection, {"x": secret["x"]}, id="an-id-of-a-patient", binary=False)[0] == 400
    rpc(live, "ModelInfer", messages.encode_request("echo", secret, id="an-id-of-a-patient"))
    assert live.stop() == 0
    lines = [line for line in live.log() if line["event"] == "request"]
    assert [(line["protocol"], line["status"], line["samples"]) for line in lines] == [
        ("http", 200, 2),
        ("http", 200, 2),
        ("http", 400, 0),
        ("grpc", 200, 2),
    ]
    assert all(line["ms"] > 0 for line in lines)
    log = (live.folder / "log").read_text()
    assert not any(word in log for word in ("31337", "8675309", "patient"))


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed one for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_file, key_file


def test_tls(echo: Launch, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    live = echo(certificate=str(cert), key=str(key))
    assert live.http.startswith("https://")
    context = ssl.create_default_context(cafile=str(cert))
    secure = http.client.HTTPSConnection("127.0.0.1", live.port, context=context, timeout=20)
    status, answer = ask(secure, sample(4))
    assert status == 200
    assert right(answer, 4)
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(live.connect(), sample(4))
    credentials = grpc.ssl_channel_credentials(cert.read_bytes())
    with grpc.secure_channel(live.grpc.removeprefix("grpcs://"), credentials) as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/ServerLive")
        assert MESSAGES["ServerLiveResponse"].FromString(call(b"", timeout=20)).live


def raw(live: Live, data: bytes, seconds: float = 20.0) -> bytes:
    """All that the server sends to these bytes until it closes, or until `seconds` of silence."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
        return received


def test_bounds(echo: Launch) -> None:
    live = echo()
    path = b"POST /v2/models/echo/infer HTTP/1.1\r\n"
    for request, status in (
        (path + b"Content-Length: 99999999999\r\n\r\n", b"413"),
        (path + b"Content-Length: 9999999999999999999999999\r\n\r\n", b"400"),
        (path + b"Transfer-Encoding: chunked\r\n\r\n" + b"20000\r\n" + b"x" * 0x20000 + b"\r\n", b"413"),
        (path + b"X: " + b"y" * 40_000 + b"\r\n\r\n", b"431"),
        (path + b"".join(b"X%d: y\r\n" % i for i in range(200)) + b"\r\n", b"431"),
        (b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"\x16\x03\x01 this is TLS", b"400"),
        (path + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (path + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
        (b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", b"405"),
        (path + b"Content-Length: 2\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n{}", b"415"),
        (
            path
            + b"Content-Length: 2\r\nConnection: close\r\n"
            + protocol.HEADER_LENGTH.encode()
            + b": -1\r\n\r\n{}",
            b"400",
        ),
    ):
        answer = raw(live, request)
        assert answer.startswith(b"HTTP/1.1 " + status), (request[:100], answer)
        assert b"Connection: close" in answer
    assert ask(live.connect(), sample(1))[0] == 200
    assert live.metric("tlexport_requests_in_flight") == 0


def test_a_wish_for_another_protocol_is_passed_over(echo: Launch) -> None:
    live = echo()
    body, length = protocol.encode_request(sample(7), id="7")
    head = (
        f"POST /v2/models/echo/infer HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        f"HTTP2-Settings: AAMAAABkAAQAAP__\r\n{protocol.HEADER_LENGTH}: {length}\r\n"
    ).encode()
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    get = b"GET /v2 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    last = b"GET /v2 HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = raw(live, (whole + get + chunked) * 20 + whole + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 62
    assert answer.count(b'"id":"7"') == 41
    assert live.metric("tlexport_requests_in_flight") == 0


def test_head_is_get_without_the_body(echo: Launch) -> None:
    live = echo()
    paths = (b"/v2/health/live", b"/v2/models/echo", b"/v2/models/other", b"/v2/models/echo/infer")
    asked = b"".join(b"HEAD %b HTTP/1.1\r\n\r\n" % path for path in paths)
    answer = raw(live, asked + b"GET /v2/health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
    heads = answer.split(b"HTTP/1.1 ")[1:]
    assert [head[:3] for head in heads] == [b"200", b"200", b"404", b"405", b"200"]
    assert all(head.endswith(b"\r\n\r\n") and b"Content-Length: 0" not in head for head in heads[:4])
    assert heads[4].endswith(b'{"live": true}')


def test_a_target_that_names_the_host(echo: Launch) -> None:
    live = echo()
    for target, status in (("http://any:1/v2", b"200"), ("http://any:1", b"404"), ("*", b"404")):
        answer = raw(live, f"GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 " + status), target


def test_a_header_twice_is_not_the_last_one(echo: Launch) -> None:
    live = echo(token="0123456789abcdef")
    body, length = protocol.encode_request(sample(1))
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
    own, token = f"{protocol.HEADER_LENGTH}: ", "Authorization: Bearer 0123456789abcdef\r\n"
    for lines, status in (
        (f"{token}{own}{length}\r\n", b"200"),
        (f"{token}{own}5\r\n{own}{length}\r\n", b"400"),
        (f"Authorization: Bearer x\r\n{token}{own}{length}\r\n", b"401"),
    ):
        answer = raw(live, head + lines.encode() + b"\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 " + status), lines


def asking_first(version: str, connection: str) -> tuple[bytes, bytes]:
    """Head and body of a request that waits for a 100 Continue."""
    body, length = protocol.encode_request(sample(1))
    head = (
        f"POST /v2/models/echo/infer HTTP/{version}\r\nExpect: 100-continue\r\nConnection: {connection}\r\n"
        f"Content-Length: {len(body)}\r\n{protocol.HEADER_LENGTH}: {length}\r\n\r\n"
    )
    return head.encode(), body


def test_http_1_0_gets_its_answer_and_no_more(echo: Launch) -> None:
    live = echo()
    head, body = asking_first("1.0", "keep-alive")
    answer = raw(live, head + body)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"Connection: close" in answer


def test_a_mistake_of_the_server_is_answered_and_logged(echo: Launch) -> None:
    live = echo()
    wrong = {
        **sample(1),
        "x": np.full_like(sample(1)["x"], -2),
    }
    for _ in range(2):
        status, answer = ask(live.connect(), wrong)
        assert status == 500, answer
    message = messages.encode_request("echo", wrong)
    with pytest.raises(grpc.RpcError) as refused:
        rpc(live, "ModelInfer", message)
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    assert live.logged("mistake")["error"] == "KeyError"
    assert live.metric("tlexport_requests_in_flight") == 0
    assert ask(live.connect(), sample(1))[0] == 200


def test_pipelined_requests_are_answered_in_order(echo: Launch) -> None:
    live = echo(delay=0.005)
    data = b""
    for mark in range(40):
        body, length = protocol.encode_request(sample(mark), id=str(mark))
        last = "Connection: close\r\n" if mark == 39 else ""
        data += (
            f"POST /v2/models/echo/infer HTTP/1.1\r\n{last}Content-Length: {len(body)}\r\n"
            f"{protocol.HEADER_LENGTH}: {length}\r\n\r\n"
        ).encode() + body
        data += b"GET /v2/health/live HTTP/1.1\r\n\r\n" if mark < 39 else b""
    answer = raw(live, data)
    ids = [int(part.split(b'"')[0]) for part in answer.split(b'"id":"')[1:]]
    assert ids == list(range(40))
    assert answer.count(b"HTTP/1.1 200 OK") == 79


def test_a_client_that_asks_first_is_told_to_go_on(echo: Launch) -> None:
    live = echo()
    head, body = asking_first("1.1", "close")
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(head)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("state", "start"),
    [
        ("head", b"GET /v2/health/live HTT"),
        ("body", b"POST /v2/models/echo/infer HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"),
        ("idle", b"GET /v2/health/live HTTP/1.1\r\n\r\n"),
    ],
)
def test_slow_clients_are_cut_off(echo: Launch, state: str, start: bytes) -> None:
    live = echo(patience={state: 0.2})
    with socket.create_connection(("127.0.0.1", live.port), timeout=8) as slow:  # less than the other bounds
        slow.sendall(start)
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(1000):  # the server's silence would raise TimeoutError
                pass
    assert live.metric("tlexport_requests_in_flight") == 0


def test_a_client_that_does_not_read_is_cut_off(echo: Launch) -> None:
    live = echo(patience={"writing": 0.2})
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as deaf:
        with pytest.raises(ConnectionError):  # waiting for the server would be a TimeoutError
            for _ in range(10_000):
                deaf.sendall(b"GET /v2/models/echo HTTP/1.1\r\n\r\n" * 100)
    assert live.get("/v2/health/live")[0] == 200


def test_connections_are_bounded(echo: Launch) -> None:
    live = echo(connections=4)
    held = [socket.create_connection(("127.0.0.1", live.port), timeout=30) for _ in range(4)]
    for connection in held:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    over = raw(live, b"")
    assert over.startswith(b"HTTP/1.1 503")
    assert b"too many connections" in over
    held.pop().close()
    until(
        lambda: raw(live, b"GET /v2/health/live HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )
    )


def test_a_port_in_use_is_said(echo: Launch) -> None:
    live = echo()
    code = (
        "import asyncio, sys\n"
        "from echo_server import Echo\n"
        "from tlexport.serving import server\n"
        "from tlexport.serving.place import Place\n"
        "from tlexport.serving.service import Settings\n"
        "from pathlib import Path\n"
        "how = {'delay': 0, 'batch': 1, 'queue': 1, 'workers': 1, 'inline': True}\n"
        "try:\n    server.run(Echo(Path(sys.argv[1]), how), Settings(), Place(**eval(sys.argv[2])), sys.stderr, print)\n"
        "except server.ListenError as error:\n    print(error)\n"
    )
    root = Path(__file__).parents[2]
    grpc_port = int(live.grpc.rpartition(":")[2])
    for place, flag in (
        ({"port": live.port}, "--port"),
        ({"port": 0, "grpc_port": grpc_port}, "--grpc-port"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, str(live.folder), repr(place)],
            capture_output=True,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"},
            timeout=60,
        )
        assert "cannot listen on 127.0.0.1:" in done.stdout, done.stderr
        assert f"{flag} (0: any that is free)" in done.stdout


def test_a_thousand_requests_leave_no_memory_behind(echo: Launch) -> None:
    """Resident memory between two equal halves of a run, after a first one that fills every cache: within 2%."""
    live = echo(inline=True)

    def half() -> None:
        for _ in range(4):
            connection = live.connect()
            for mark in range(400):
                ask(connection, sample(mark, 16), id=str(mark), binary=mark % 4 > 0)
            connection.close()
        live.get("/metrics")

    def resident() -> int:
        text = Path(f"/proc/{live.process.pid}/statm").read_text()
        return int(text.split()[1])

    half()
    half()
    before = resident()
    half()
    after = resident()
    assert after <= before * 1.02
