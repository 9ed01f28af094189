"""Where a server listens, and for how long it waits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Port 0 is any free one, `grpc_port` None no gRPC. `certificate` and `key` are PEM files for TLS.

    `connections`: open at a time; `drain_seconds`: for what is under way at the end; `watch`: look for new versions every
    second, else on SIGHUP alone; `ports_file`: JSON file that gets the bound addresses.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    certificate: Path | None = None
    key: Path | None = None
    connections: int = 1024
    drain_seconds: float = 30.0
    watch: bool = True
    ports_file: Path | None = None


@dataclass(frozen=True)
class Bound:
    """The addresses that a server listens on, and what it serves."""

    http: str
    grpc: str | None
    model: str
    version: str
