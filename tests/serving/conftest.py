"""Fixtures of the server's tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import Live, start


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Starts echo_server.py; what is not said is as small and fast as it can be."""
    started: list[Live] = []

    def launch(
        *,
        delay: float = 0.0,
        slow: float = 0.0,
        batch: int = 16,
        queue: int = 64,
        workers: int = 1,
        inline: bool = False,
        timeout: float = 30.0,
        token: str = "",
        patience: dict[str, float] | None = None,
        **place: object,
    ) -> Live:
        folder = tmp_path / f"echo-{len(started)}"
        folder.mkdir()
        (folder / "version").write_text("one")
        settings = {
            "delay": delay,
            "slow": slow,
            "batch": batch,
            "queue": queue,
            "workers": workers,
            "inline": inline,
            "timeout": timeout,
            "token": token,
            "patience": patience or {},
            "place": place,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        command = [
            sys.executable,
            str(Path(__file__).parent / "echo_server.py"),
            str(folder / "settings.json"),
        ]
        started.append(start(command, folder))
        return started[-1]

    yield launch
    for live in started:
        live.close()
