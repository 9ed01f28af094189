"""What bench/serve.py serves and with what: bundles of networks with random weights, and each server in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from latency import traced
from latency_cases import Case

BENCH = Path(__file__).parent
START_S = 180.0
LARGEST = 32


@dataclass(frozen=True)
class Live:
    """A server that is up. `process` is the first of its processes."""

    url: str
    process: subprocess.Popen[bytes]

    def memory_mib(self) -> float | None:
        """Proportional set size of all its processes: pages that several share are counted once. None where it cannot be read."""
        total = 0.0
        for pid in _family(self.process.pid):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                return None
            total += next(float(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        return total / 1024


def bundle(case: Case, name: str, out: Path, threads: int) -> Path:
    """The network's FP32 graph as a bundle for the CPU, its golden answers the graph's own."""
    from tlexport.backends import registry
    from tlexport.bundle import manifest
    from tlexport.graph import inspect
    from tlexport.results import Variant
    from tlexport.tensors import Profile

    graph = traced(case)
    inputs, outputs = inspect.io(graph)
    content = graph.SerializeToString()
    beside = out.parent / f"{out.name}-files"
    beside.mkdir()
    (beside / "model.onnx").write_bytes(content)
    with registry.get("onnxruntime").runner(beside / "model.onnx", threads=threads) as runner:
        expected = next(iter(runner.run(case.fresh).values()))
    np.save(beside / "inputs.npy", next(iter(case.fresh.values())))
    np.save(beside / "outputs.npy", expected)
    variant = Variant(
        name="cpu-onnxruntime-fp32", backend="onnxruntime", target="cpu", precision="fp32", threads=threads,
        max_abs_error=1e-5, verdict="pass",
    )  # fmt: skip
    document = manifest.Manifest(
        name=name,
        modality="none",
        backbone=name,
        task=case.about["task"],
        classes=tuple(map(str, range(expected.shape[1]))),
        preprocessing={},
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batch=Profile(min=1, opt=1, max=LARGEST),
        metric="accuracy",
        reference=None,
        gates={},
        targets={
            "cpu": manifest.Entry(
                variant=variant, file="models/cpu/model.onnx", receipt="models/cpu/receipt.json", reason=""
            )
        },
        provenance={},
    )
    sources: dict[str, Path | bytes] = {
        "graphs/fp32.onnx": content,
        "models/cpu/model.onnx": content,
        "models/cpu/receipt.json": b"{}",
        "golden/inputs.npy": beside / "inputs.npy",
        "golden/outputs.npy": beside / "outputs.npy",
    }
    manifest.write(document, sources, out)
    return out


@contextlib.contextmanager
def live(
    server: str, held: Path, name: str, threads: int, folder: Path, pythons: Mapping[str, Path]
) -> Iterator[Live]:
    """A server of `held`, ready to be asked. Raises SystemExit with the end of its log if it does not come up."""
    from tlexport.errors import ServerError
    from tlexport.serving.client import connect
    from tlexport.serving.datatypes import ProtocolError

    http, grpc, metrics = free_ports(3)
    folder.mkdir()
    command, environment, ours = _command(server, held, name, threads, folder, pythons, (http, grpc, metrics))
    path = [str(ROOT)] if ours else []
    environment |= {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join([*path, str(folder)]), "OMP_NUM_THREADS": str(threads)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            client, until = connect(f"http://127.0.0.1:{http}"), time.monotonic() + START_S
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{server} does not come up:\n{(folder / 'log').read_text()[-2000:]}")
                with contextlib.suppress(ServerError, ProtocolError):
                    if client.ready(name):
                        break
                time.sleep(0.1)
            client.close()
            yield Live(f"http://127.0.0.1:{http}", process)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _command(
    server: str, held: Path, name: str, threads: int, folder: Path, pythons: Mapping[str, Path],
    ports: tuple[int, int, int],
) -> tuple[list[str], dict[str, str], bool]:  # fmt: skip
    """Command line, environment and whether this package is to be importable there."""
    http, grpc = map(str, ports[:2])
    graph, python = str(held / "models/cpu/model.onnx"), str(pythons.get(server, Path(sys.executable)))
    if server == "tlexport":
        words = ["serve", str(held), "--port", http, "--grpc-port", grpc, "--threads", str(threads), "-q"]
        return [sys.executable, "-m", "tlexport", *words], {}, True
    if server == "ray":
        # Ray counts how far its sockets' path may be, and keeps what it started there.
        return (
            [sys.executable, str(BENCH / "ray_server.py"), str(held), http, str(threads)],
            {"RAY_DEDUP_LOGS": "1"},
            True,
        )
    if server == "kserve":
        return [python, str(BENCH / "kserve_server.py"), graph, name, http, grpc, str(threads)], {}, False
    settings = {
        "http_port": ports[0],
        "grpc_port": ports[1],
        "metrics_port": ports[2],
        "host": "127.0.0.1",
        "parallel_workers": 0,
    }
    model = {
        "name": name,
        "implementation": "mlserver_model.Graph",
        "parameters": {"uri": graph, "extra": {"threads": threads}},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    (folder / "mlserver_model.py").write_bytes((BENCH / "mlserver_model.py").read_bytes())
    return [str(Path(python).parent / "mlserver"), "start", str(folder)], {}, False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [of.getsockname()[1] for of in held]


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return [pid]
    return [pid, *(one for child in text.split() for one in _family(int(child)))]


def versions(pythons: Mapping[str, Path]) -> dict[str, Any]:
    """Server -> the version of its package in its own environment."""
    import importlib.metadata

    import tlexport

    found: dict[str, Any] = {"tlexport": tlexport.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["ray"] = importlib.metadata.version("ray")
    for server, python in pythons.items():
        code = f"import importlib.metadata as m; print(m.version({server!r}), m.version('onnxruntime'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        found[server] = done.stdout.strip() or None
    return found
