"""Deploys a bundle, and is killed before the Nth thing it changes at the place: dying.py BUNDLE PLACE N."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tlexport.progress import Silent
from tlexport.stages import deploy

CHANGES = ("create", "write", "put", "remove")


class Dying:
    """A store that ends its process, halfway through a `put`."""

    def __init__(self, inner: Any, left: int) -> None:
        self.inner, self.left = inner, left

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return self._counted(found) if name in CHANGES else found

    def _counted(self, change: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if change.__name__ == "put":
                    name, source, _ = arguments
                    return change(name, source, lambda moved: os.kill(os.getpid(), signal.SIGKILL))
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments)

        return call


if __name__ == "__main__":
    bundle, place, left = sys.argv[1:]
    real = deploy.store
    deploy.store = lambda where: Dying(real(where), int(left))
    deploy.run(Path(bundle), place, Silent(), options=deploy.Options(flavour="", name="digits"))
