"""The tritonserver of the wheel nvidia-pytriton, in an environment of its own: started, asked and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ended

READY_S = 60.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Triton:
    http: int
    grpc: int
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, path: str, document: Any = None) -> Any:
        """GET, or POST of a JSON document; the answer as JSON, None if it is empty."""
        data = None if document is None else json.dumps(document).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", data=data)
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
        return json.loads(content) if content else None

    def load(self, name: str) -> None:
        self.ask(f"/v2/repository/models/{name}/load", {})


@contextlib.contextmanager
def triton(python: Path, repository: Path, scratch: Path, *, first: Path | None = None) -> Iterator[Triton]:
    """Explicit model control on free ports of the loopback; ended, with whatever it started, at the end.

    `first`: a folder whose packages come before those of its Python, which looks in its working directory first.
    """
    told = subprocess.run(
        [python, "-c", "import sys, sysconfig; print(sysconfig.get_path('purelib')); print(sysconfig.get_config_var('LIBDIR')); "
         "print('%d.%d' % sys.version_info[:2])"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    packages, libraries, version = Path(told[0]), told[1], told[2]
    server = packages / "pytriton" / "tritonserver"
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True)
    for source in (
        *(server / "backends" / "python").glob("*.*"),
        *(server / "python_backend_stubs" / version).iterdir(),
    ):
        if source.is_file():
            (backend / source.name).symlink_to(source)
    http, grpc, metrics = free_ports(3)
    log = scratch / "triton.log"
    command = [
        str(server / "bin" / "tritonserver"), f"--model-repository={repository}", f"--backend-directory={scratch / 'backends'}",
        "--model-control-mode=explicit", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--disable-auto-complete-config",
    ]  # fmt: skip
    environment = {
        **{key: own for key, own in os.environ.items() if key != "PYTHONPATH"},
        "LD_LIBRARY_PATH": f"{libraries}:{packages / 'nvidia_pytriton.libs'}",
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # the stub looks for its Python there
        "PYTHONPATH": str(packages),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, cwd=first, start_new_session=True
        )
    own = Triton(http, grpc, log, process)
    try:
        _wait(own)
        yield own
    finally:
        ended(process)


def _wait(server: Triton) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            server.ask("/v2/health/live")
            return
        time.sleep(0.1)
    raise AssertionError(f"tritonserver is not ready:\n{server.log.read_text()[-3000:]}")
