"""Backends: each module builds an artifact from a typed graph and runs it. One dict, one Protocol.

The modules import their library inside functions, so that importing this package costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tlexport.backends.receipt import Receipt
from tlexport.tensors import Profile

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here. `runs` is what it can execute on (`cpu`, `cuda`), `note` why not."""

    installed: bool
    version: str = ""
    builds: tuple[str, ...] = ()  # targets it can compile for on this machine
    runs: tuple[str, ...] = ()  # targets whose artifacts it can execute on this machine
    note: str = ""  # what is missing and the pip command that brings it


@dataclass(frozen=True)
class Artifact:
    """What a build left: the file a server loads and what is known of its layers."""

    path: Path
    receipt: Receipt


class Runner(Protocol):
    """A loaded artifact. `provider` is where it really runs, as the library reports it."""

    provider: str

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]: ...


class Backend(Protocol):
    """What each module of this package offers."""

    NAME: str
    EXTRA: str  # the pip extra that brings it; empty: always there
    SUFFIX: str  # of the artifact's file

    def availability(self) -> Availability: ...

    def refusal(self, target: str, precision: str) -> str:
        """Why this backend cannot make `precision` for `target`; empty if it can."""
        ...

    def build(
        self, graph: Path, out: Path, target: str, profile: Profile, expected: Mapping[str, str]
    ) -> Artifact:
        """Compile `graph` into the file `out`. `expected`: node name -> dtype of each compute node of the graph."""
        ...

    def runner(
        self, artifact: Path, *, threads: int, device: str = "cpu", judge: bool = False
    ) -> AbstractContextManager[Runner]:
        """Load an artifact. `judge` asks for the least-optimised faithful execution (to judge another target's graph)."""
        ...
