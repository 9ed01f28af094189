"""Servers in child processes, and the plainest possible HTTP client, which lets a test send anything."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from tlexport.serving import protocol

ROOT = Path(__file__).parents[2]


@dataclass
class Live:
    """A server that answers."""

    process: subprocess.Popen[str]
    folder: Path
    http: str
    grpc: str
    version: str

    @property
    def port(self) -> int:
        return urlsplit(self.http).port or 0

    def connect(self, timeout: float = 20.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = self.connect()
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def metric(self, line: str) -> float:
        """The value of one line of /metrics; 0 if it is not there."""
        for text in self.get("/metrics")[1].decode().splitlines():
            if text.startswith(f"{line} "):
                return float(text.split()[-1])
        return 0.0

    def log(self) -> list[dict]:
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, event: str, seconds: float = 20.0) -> dict:
        """Wait for a line of the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := [line for line in self.log() if line["event"] == event]:
                return found[-1]
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} in {self.log()}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def start(command: list[str], folder: Path, variables: dict[str, str] | None = None) -> Live:
    """Run a server until it says on standard output, as JSON, where it listens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(variables or {})}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder
        )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.rstrip().endswith("}"):
            break
    if not text:
        raise AssertionError((folder / "log").read_text())
    said = json.loads(text)
    return Live(process, folder, said["http"], said["grpc"], said["version"])


def sample(mark: int, samples: int = 1) -> dict[str, np.ndarray]:
    """Inputs of the echo graph that carry who asked."""
    x = np.full((samples, 4), mark, np.float32) + np.arange(samples, dtype=np.float32)[:, None] / 1024
    return {"x": x, "mark": np.full(samples, mark, np.int64)}


def ask(
    connection: http.client.HTTPConnection,
    inputs: dict[str, np.ndarray],
    *,
    headers: dict[str, str] | None = None,
    path: str = "/v2/models/echo/infer",
    **options: object,
) -> tuple[int, protocol.Response | str]:
    """The status, and the decoded answer or what the error says."""
    body, length = protocol.encode_request(inputs, **options)  # type: ignore[arg-type]
    framed = {} if length is None else {protocol.HEADER_LENGTH: str(length)}
    connection.request("POST", path, body, {**framed, **(headers or {})})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        return answer.status, protocol.error_reason(content)
    found = answer.headers.get(protocol.HEADER_LENGTH)
    return 200, protocol.decode_response(content, None if found is None else int(found))
