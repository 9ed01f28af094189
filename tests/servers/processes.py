"""Processes that tests start: waited for, and ended; and what to do where a part is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest


def missing(reason: str) -> None:
    if os.environ.get("CI_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{reason} (CI_REQUIRE_SERVERS=1)")
    pytest.skip(reason)


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            missing(f"needs {module}; make test-server installs it")


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} is not ready:\n{log.read_text(errors='replace')[-3000:]}")


def ended(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
