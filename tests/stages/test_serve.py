"""serve: a real bundle behind the protocol, refused where it may not be served, and replaced while it answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("httptools")
pytest.importorskip("prometheus_client")
import grpc

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from live_server import ROOT, Live, ask, start

from tlexport import cores, tensors
from tlexport.backends import DEFAULTS, registry
from tlexport.bundle import manifest
from tlexport.errors import GateError, PreflightError, RecipeError
from tlexport.run import digest, replacing, write_json
from tlexport.serving import messages, protocol, token
from tlexport.serving.messages import MESSAGES
from tlexport.serving.place import Place
from tlexport.stages import serve


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def serving(bundle: Path, *flags: str) -> Live:
        folder = tmp_path / f"serve-{len(started)}"
        folder.mkdir()
        command = [
            sys.executable,
            "-m",
            "tlexport",
            "serve",
            str(bundle),
            "--json",
            "--port",
            "0",
            "--grpc-port",
            "0",
        ]
        started.append(start([*command, "--threads", "1", *flags], folder))
        return started[-1]

    yield serving
    for live in started:
        live.close()


def rewritten(bundle: Path, **changes: object) -> None:
    """The bundle with other metadata and right hashes: another version of it, as `package` would write it."""
    document = json.loads((bundle / manifest.NAME).read_text())
    document.update(changes)
    files = {
        name: {"sha256": digest(bundle / name), "bytes": (bundle / name).stat().st_size}
        for name in document["files"]
    }
    write_json(bundle / manifest.NAME, {**document, "files": files})


def golden(bundle: Path) -> tuple[manifest.Manifest, dict[str, np.ndarray]]:
    document = manifest.read(bundle)
    held = np.load(bundle / "golden/inputs.npy")
    return document, tensors.named(held, [spec.name for spec in document.inputs])


def test_golden_samples_come_out_bit_for_bit_as_from_the_local_session(
    bundle_copy: Path, launch: Callable[..., Live]
) -> None:
    document, inputs = golden(bundle_copy)
    entry = document.targets["cpu"]
    ports = bundle_copy.parent / "ports.json"
    live = launch(bundle_copy, "--ports-file", str(ports), "--max-batch", "1")
    assert json.loads(ports.read_text()) == {
        "http": live.http,
        "grpc": live.grpc,
        "model": document.name,
        "version": digest(bundle_copy / manifest.NAME)[:12],
    }
    path = f"/v2/models/{document.name}/infer"
    load = registry.loader(entry.variant.backend, bundle_copy / entry.file, "cpu", DEFAULTS)
    connection = live.connect()
    with load(1) as runner, grpc.insecure_channel(live.grpc.removeprefix("grpc://")) as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer")
        for size in sorted(
            {1, min(3, document.batch.max), min(len(next(iter(inputs.values()))), document.batch.max)}
        ):
            batch = {name: array[:size] for name, array in inputs.items()}
            (name, wanted), *_ = runner.run(batch).items()
            for binary in (True, False):
                status, answer = ask(connection, batch, path=path, binary=binary)
                assert status == 200
                assert isinstance(answer, protocol.Response)
                assert answer.outputs[name].tobytes() == wanted.tobytes()
            request = messages.encode_request(document.name, batch).SerializeToString()
            message = MESSAGES["ModelInferResponse"].FromString(call(request, timeout=20))
            assert messages.decode_response(message).outputs[name].tobytes() == wanted.tobytes()
    described = json.loads(live.get(f"/v2/models/{document.name}")[1])
    assert [tensor["name"] for tensor in described["inputs"]] == [spec.name for spec in document.inputs]
    assert live.stop() == 0


def test_limits_come_from_what_bench_found(bundle_copy: Path) -> None:
    document = manifest.read(bundle_copy)
    knee = document.targets["cpu"].variant.knee
    model = serve.Bundle(bundle_copy, serve.Serving()).load()
    assert model.limits.batch == (knee.at if knee else document.batch.max)
    assert model.limits.queue >= document.batch.max
    model.close()
    asked = serve.Serving(max_batch=document.batch.max, queue=7, workers=2, threads=1)
    model = serve.Bundle(bundle_copy, asked).load()
    assert (model.limits.batch, model.limits.queue) == (document.batch.max, 7)
    assert len(model.runs) == 2
    assert not model.limits.inline
    model.close()


def test_a_batch_that_the_bundle_does_not_allow_is_refused(
    bundle_copy: Path, launch: Callable[..., Live]
) -> None:
    most = manifest.read(bundle_copy).batch.max
    with pytest.raises(
        RecipeError, match=f"--max-batch {most + 1} .* allows, {most}; .* export.batch.max={most + 1}"
    ):
        serve.Bundle(bundle_copy, serve.Serving(max_batch=most + 1)).load()
    live = launch(bundle_copy, "--max-batch", str(most))
    rewritten(bundle_copy, batch={"min": 1, "opt": 1, "max": most - 1})
    refused = live.logged("version refused")
    assert refused["error"] == "RecipeError"
    assert f"--max-batch {most} is more" in refused["reason"]


def test_what_is_asked_for_in_vain_is_a_warning_in_the_log(
    bundle_copy: Path, launch: Callable[..., Live]
) -> None:
    live = launch(bundle_copy, "--max-batch", "4", "--queue", "3", "--workers", str(cores.usable() + 1))
    queue, workers = (line["reason"] for line in live.log() if line["event"] == "warning")
    assert "3 samples may wait and a worker takes 4 at once" in queue
    assert f"{cores.usable() + 1} workers of 1 threads are more than the {cores.usable()} cores" in workers
    silent = launch(bundle_copy, "--max-batch", "3", "--queue", "3")
    assert not [line for line in silent.log() if line["event"] == "warning"]


def test_a_changed_byte_is_refused_before_anything_listens(bundle_copy: Path) -> None:
    file = bundle_copy / manifest.read(bundle_copy).targets["cpu"].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(PreflightError):
        serve.Bundle(bundle_copy, serve.Serving()).load()
    done = _command(str(bundle_copy), "--port", "0", "--no-grpc", "--json")
    assert done.returncode == 11
    assert json.loads(done.stdout)["kind"] == "PreflightError"


def test_golden_samples_that_come_out_otherwise_are_refused(bundle_copy: Path) -> None:
    outputs = np.load(bundle_copy / "golden/outputs.npy")
    np.save(bundle_copy / "golden/outputs.npy", outputs + 5)  # beyond three times any error of a probability
    rewritten(bundle_copy)
    with pytest.raises(GateError, match="golden samples differs by"):
        serve.Bundle(bundle_copy, serve.Serving()).load()


@pytest.mark.parametrize(
    ("place", "how", "text"),
    [
        (Place(host="0.0.0.0"), serve.Serving(), "needs a token .* and TLS"),
        (Place(host="::"), serve.Serving(token="x" * 32), "which needs TLS"),
        (Place(certificate=Path("x")), serve.Serving(), "TLS needs --tls-cert and --tls-key"),
        (Place(), serve.Serving(target="sm75"), "the bundle holds nothing for sm75"),
    ],
)
def test_what_is_asked_for_must_be_safe(
    built_bundle: Path, place: Place, how: serve.Serving, text: str
) -> None:
    with pytest.raises(RecipeError, match=text):
        serve.run(built_bundle, place, how, print)


def test_the_command_refuses_to_be_open_to_all(built_bundle: Path) -> None:
    done = _command(str(built_bundle), "--host", "0.0.0.0", "--port", "0", "--no-grpc")
    assert done.returncode == 2
    assert "say --insecure" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def built_bundle(built: object) -> Path:
    return built.bundle  # type: ignore[attr-defined, no-any-return]


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tlexport", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLEXPORT_TOKEN", raising=False)
    assert token.read(None, shortest=token.SHORTEST) is None
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    assert token.read(file, shortest=token.SHORTEST) == "0123456789abcdef"
    monkeypatch.setenv("TLEXPORT_TOKEN", "x" * 32)
    assert token.read(None, shortest=token.SHORTEST) == "x" * 32
    for wrong in ("", "short", "0123456789abcde\x7f0", "ä" * 20, "x" * 5000):
        file.write_text(wrong)
        with pytest.raises(RecipeError, match="token"):
            token.read(file, shortest=token.SHORTEST)


def test_loopback_alone_needs_nothing(built_bundle: Path) -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        serve._require_safe(Place(host=host), serve.Serving())
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(RecipeError):
            serve._require_safe(Place(host=host), serve.Serving())
        serve._require_safe(Place(host=host), serve.Serving(insecure=True))


def test_versions_come_and_go_under_load_with_no_failed_request(
    bundle_copy: Path, launch: Callable[..., Live]
) -> None:
    """A good version, a bad one, a bundle that is away for a while, and a writer that is killed."""
    document, inputs = golden(bundle_copy)
    one = {name: array[:1] for name, array in inputs.items()}
    live = launch(bundle_copy, "--queue", "1000")
    stop, statuses = threading.Event(), Counter()

    def client() -> None:
        connection = live.connect()
        while not stop.is_set():
            status, answer = ask(connection, one, path=f"/v2/models/{document.name}/infer")
            statuses[status, answer.model_version if isinstance(answer, protocol.Response) else answer] += 1

    def served(version: str, more: int = 10) -> None:
        wanted, end = statuses[200, version] + more, time.monotonic() + 60
        while statuses[200, version] < wanted:
            assert time.monotonic() < end, (version, statuses, live.log())
            time.sleep(0.02)

    def replace(**changes: object) -> str:
        with replacing(bundle_copy) as partial:
            shutil.copytree(bundle_copy, partial)
            rewritten(partial, **changes)
        return digest(bundle_copy / manifest.NAME)[:12]

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    try:
        first = live.version
        served(first)
        second = replace(backbone="second")
        served(second)
        # Killed while it writes: what stands under the name is the old one, whole.
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(bundle_copy)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        served(second)
        bundle_copy.rename(bundle_copy.with_name("away"))
        served(second)
        bundle_copy.with_name("away").rename(bundle_copy)
        # Copied in place, without a rename: it is refused until the last file is there.
        file = bundle_copy / document.targets["cpu"].file
        whole = file.read_bytes()
        rewritten(bundle_copy, backbone="third")
        file.write_bytes(whole[: len(whole) // 2])
        refused = live.logged("version refused")
        assert "altered" in refused["reason"] or "bytes" in refused["reason"] or "size" in refused["reason"]
        served(second)
        file.write_bytes(whole)
        live.process.send_signal(signal.SIGHUP)
        served(digest(bundle_copy / manifest.NAME)[:12])
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert {status for status, _ in statuses} == {200}, statuses
    assert live.stop() == 0


WRITER = """
import shutil, sys, time
from pathlib import Path
from tlexport.run import replacing
bundle = Path(sys.argv[1])
with replacing(bundle) as partial:
    partial.mkdir()
    shutil.copy(bundle / "manifest.json", partial)
    print("writing", flush=True)
    time.sleep(600)
"""
