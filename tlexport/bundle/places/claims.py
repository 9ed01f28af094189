"""Who writes a version: a file that one deployer creates, and that tells the next one whether its owner still lives."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

NAME = "claim.json"
STALE_S = 24 * 3600.0  # of an owner elsewhere, who cannot be asked


def owner() -> bytes:
    """This process, as others can find it."""
    document = {
        "machine": _machine(),
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
        "time": time.time(),
    }
    return json.dumps(document).encode()


def is_dead(content: bytes, now: float) -> bool:
    """Whether the owner is a process of this machine that ended, or one elsewhere that has had a day."""
    try:
        document: dict[str, Any] = json.loads(content)
        here = document["machine"] == _machine()
        process, started, since = (
            int(document["process"]),
            float(document["started"]),
            float(document["time"]),
        )
    except (ValueError, KeyError, TypeError):
        return True  # no deployer ever writes a broken one: it is created whole
    if not here:
        return now - since > STALE_S
    try:
        return bool(abs(psutil.Process(process).create_time() - started) > 1.0)
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Tells containers apart too: process numbers are those of a namespace."""
    namespace = Path("/proc/self/ns/pid")
    boot = Path("/proc/sys/kernel/random/boot_id")
    return ":".join(
        [
            platform.node(),
            boot.read_text().strip() if boot.exists() else "",
            str(namespace.readlink()) if namespace.exists() else "",
        ]
    )
