"""Backends: each module builds an artifact from a typed graph and runs it. One dict, one Protocol.

The modules import their library inside functions, so that importing this package costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tlexport.backends.receipt import Receipt
from tlexport.recipe import TensorRT
from tlexport.tensors import Profile

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here. `runs` is what it can execute on (`cpu`, `cuda`), `note` why not."""

    installed: bool
    version: str = ""
    builds: tuple[str, ...] = ()  # targets it can compile for on this machine
    runs: tuple[str, ...] = ()  # targets whose artifacts it can execute on this machine
    note: str = ""  # what is missing and the pip command that brings it
    options: tuple[str, ...] = ()  # of the recipe's section for it, those that it honours


@dataclass(frozen=True)
class Artifact:
    """What a build left: the file a server loads and what is known of its layers."""

    path: Path
    receipt: Receipt


@dataclass(frozen=True)
class Network:
    """A PyTorch module in eval mode and its ends: one tensor [n, ...] for each of `inputs`, in order, to float32 [n, k]."""

    module: torch.nn.Module
    inputs: tuple[str, ...]
    output: str
    example: tuple[torch.Tensor, ...]  # n = 2, of any values


Load = Callable[[], Network]  # makes the network in the process that calls it


def unheard(phase: str, share: float) -> None:
    """A report to nobody."""


@dataclass(frozen=True)
class Options:
    """What a build or a runner may be told beyond its graph. A backend reads its own and refuses what it cannot do."""

    tensorrt: TensorRT = field(default_factory=TensorRT)
    network: Load | None = None  # makes what the graph was traced from: for backends that compile PyTorch
    report: Callable[[str, float], None] = unheard  # how far a build is: (phase, share of the whole, 0 to 1)
    cuda_graphs: bool = (
        False  # a bound call replays a CUDA graph, on GPUs and where the backend can capture one
    )


DEFAULTS = Options()


class Held(functools.partial[object]):
    """A call that keeps alive `memory`: what it reads and writes by address, which no library keeps for it."""

    memory: object = None


@dataclass(frozen=True)
class Bound:
    """`call()` computes the answer anew; `outputs()` reads what the last call left, on the host. Each may outlive the other.

    `timed_parts()`, on GPUs alone, is a call that returns its parts in milliseconds: `enqueue`, how long the host took to
    submit it, and by CUDA events `h2d`, `compute` and `d2h` (copy there, computation, copy back), which overlap `enqueue` and
    include waiting for it where the GPU is the faster one. `note`, there, says that calls replay a CUDA graph, or why none.
    """

    call: Callable[[], object]
    outputs: Callable[[], dict[str, np.ndarray]]
    timed_parts: Callable[[], dict[str, float]] | None = None
    note: str = ""


class Runner(Protocol):
    """A loaded artifact. `provider` is where it really runs, as the library reports it."""

    provider: str

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """Input name -> contiguous array [n, ...]; returns output name -> array."""
        ...

    def bind(self, inputs: Tensors) -> Bound:
        """Allocate and bind everything now, so that a call computes the answer to these inputs and does nothing else.

        Where the device has memory of its own, a call still copies the inputs to it and the outputs back: that is
        part of the answer, and a binding holds until the runner's next `bind` or `run`.
        """
        ...


class Backend(Protocol):
    """What each module of this package offers."""

    NAME: str
    EXTRA: str  # the pip extra that brings it; empty: always there
    SUFFIX: str  # of the artifact's file
    BOUND: str  # what a bound call has done beforehand, for who wants the same times

    def availability(self) -> Availability: ...

    def refusal(self, target: str, precision: str) -> str:
        """Why this backend cannot make `precision` for `target`; empty if it can."""
        ...

    def build(
        self,
        graph: Path,
        out: Path,
        target: str,
        profile: Profile,
        expected: Mapping[str, str],
        options: Options = DEFAULTS,
    ) -> Artifact:
        """Compile `graph` into the file `out`. `expected`: node name -> dtype of each compute node of the graph."""
        ...

    def runner(
        self,
        artifact: Path,
        *,
        threads: int,
        device: str = "cpu",
        judge: bool = False,
        options: Options = DEFAULTS,
    ) -> AbstractContextManager[Runner]:
        """Load an artifact. `judge` asks for the least-optimised faithful execution (to judge another target's graph)."""
        ...
