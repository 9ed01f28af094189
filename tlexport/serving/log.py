"""One JSON object a line. A line never holds a tensor, a token or a key: only what is named here by the caller."""

from __future__ import annotations

import json
import threading
import time
from typing import TextIO


class Log:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, event: str, **fields: object) -> None:
        """`fields` are JSON values, bounded by the caller where they come from outside."""
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
        line = json.dumps({"time": stamp, "event": event, **fields}, default=str)
        with self._lock:
            self._stream.write(f"{line}\n")
            self._stream.flush()
