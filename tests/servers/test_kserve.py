"""KServe's own server, a second implementation of the protocol: golden samples over HTTP and gRPC, and load."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import networks
import numpy as np
import planted
import pytest

from tlexport.errors import ServerError
from tlexport.progress import Silent
from tlexport.serving.client import Access, connect
from tlexport.stages import check_server, load

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "bench" / "kserve_server.py"


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter that has kserve and onnxruntime: kserve pins protobuf below 7, so it has an environment of its own."""
    found = Path(os.environ.get("TLEXPORT_KSERVE_PYTHON", ROOT / ".venv-kserve" / "bin" / "python"))
    if not found.exists():
        reason = "needs .venv-kserve with kserve and onnxruntime, or TLEXPORT_KSERVE_PYTHON"
        if os.environ.get("CI_REQUIRE_SERVERS") == "1":
            pytest.fail(f"{reason} (CI_REQUIRE_SERVERS=1)")
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph, cells = networks.table()
    columns = {"columns": [{"name": name, "kind": "numeric"} for name in networks.COLUMNS]}
    return planted.bundle(tmp_path_factory.mktemp("table") / "bundle", graph, cells, "tabular", columns)


@pytest.fixture(scope="module")
def live(python: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Its HTTP and gRPC addresses."""
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        http, grpc = one.getsockname()[1], other.getsockname()[1]
    log = tmp_path_factory.mktemp("kserve") / "log"
    command = [python, PROGRAM, bundle / "models/cpu/model.onnx", "planted", http, grpc, 1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("w") as out:
        child = subprocess.Popen([*map(str, command)], stdout=out, stderr=out, env=environment)
        try:
            client, until = connect(f"http://127.0.0.1:{http}"), time.monotonic() + 120
            while True:
                assert child.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                try:
                    if client.ready("planted"):
                        break
                except ServerError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}"
        finally:
            child.terminate()
            child.wait(60)


@pytest.mark.parametrize("way", [0, 1], ids=["http", "grpc"])
def test_golden_samples_are_answered_as_by_the_reference(
    live: tuple[str, str], bundle: Path, way: int
) -> None:
    """Another ONNX Runtime than ours may add in another order: the verified error holds, bits need not be the same."""
    result = check_server.run(live[way], bundle, check_server.Ask(), Access(), Silent())
    assert result.verdict == "pass", result.reason
    assert (
        result.encoding == ("binary", "grpc")[way] and result.stream is not None and result.stream.over == 0
    )
    assert result.metadata == () and not result.misplaced


def test_json_tensors_too(live: tuple[str, str], bundle: Path) -> None:
    client = connect(live[0])
    client.encoding = "json"
    cells = np.load(bundle / "golden/inputs.npy")
    known = np.nan_to_num(cells)  # JSON has no word for a missing value that every server reads
    made = client.send(client.prepare("planted", {"features": known})).outputs["probabilities"]
    np.testing.assert_allclose(made, planted.outputs(networks.table()[0], known), atol=1e-6)


def test_load_is_answered(live: tuple[str, str], bundle: Path) -> None:
    ask = load.Ask(rate=30, seconds=2, concurrency=8)
    assert load.run(live[0], bundle, ask, Access(), Silent()).counts == {"ok": 60}
