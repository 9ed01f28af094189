"""A call that crosses to the GPU and back: copies and computation on one stream, each timed apart by CUDA events.

Host memory is page-locked, so that a copy is one transfer that the host need not wait for, and every buffer is made once,
so that its address may be part of a CUDA graph. The tests run it on a stand-in for torch.cuda where there is no GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.backends import Bound, Tensors
from tlexport.errors import CompileError

if TYPE_CHECKING:
    import torch

GRAPH = "CUDA graph"  # how a call is made; else a note says why not

# Puts the computation on the current stream and does not wait for it. Output name -> tensor on the GPU.
Compute = Callable[[], Mapping[str, "torch.Tensor"]]


class RoundTrip:
    """`held`: the inputs' buffers on the GPU, which a call fills from page-locked copies of `inputs`; all on `stream`."""

    def __init__(self, inputs: Tensors, stream: Any) -> None:
        import torch

        self.stream = stream
        # A copy, since a single row of a structured array keeps the whole row's stride, which torch refuses.
        self._given = {name: torch.from_numpy(array.copy()).pin_memory() for name, array in inputs.items()}
        self.held = {name: torch.empty_like(tensor, device="cuda") for name, tensor in self._given.items()}

    def bound(self, compute: Compute, *, capture: bool = False, note: str = "") -> Bound:
        """Copy the inputs to the GPU, `compute`, copy the outputs back and wait for all of it: that is a call.

        With `capture` the computation is recorded once and replayed as a CUDA graph; where that fails it stays as it is, and
        the binding's note gives the reason. `note` is the note otherwise. Raises what the first call raises.
        """
        import torch

        cuda: Any = torch.cuda
        cuda.current_stream().synchronize()  # the buffers' first owners are done with them
        # Once as it is: kernels are loaded and memory is taken, which no graph may hold.
        with cuda.stream(self.stream):
            self._send()
            made = compute()
            answers = {
                name: torch.empty(tuple(tensor.shape), dtype=tensor.dtype, pin_memory=True)
                for name, tensor in made.items()
            }
            _receive(answers, made)
        self.stream.synchronize()
        if capture:
            compute, note = captured(compute, self.stream)

        def call() -> None:
            with cuda.stream(self.stream):
                self._send()
                _receive(answers, compute())
            self.stream.synchronize()

        def timed_parts() -> dict[str, float]:
            marks = [cuda.Event(enable_timing=True) for _ in range(4)]
            with cuda.stream(self.stream):
                began = time.perf_counter()
                marks[0].record()
                self._send()
                marks[1].record()
                made = compute()
                marks[2].record()
                _receive(answers, made)
                marks[3].record()
                enqueue = 1e3 * (time.perf_counter() - began)
            self.stream.synchronize()
            h2d, computed, d2h = (float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks))
            return {"enqueue": enqueue, "h2d": h2d, "compute": computed, "d2h": d2h}

        if capture:
            call()
        return Bound(
            call, lambda: {name: _array(tensor) for name, tensor in answers.items()}, timed_parts, note
        )

    def _send(self) -> None:
        for name, tensor in self.held.items():
            tensor.copy_(self._given[name], non_blocking=True)


def captured(compute: Compute, stream: Any) -> tuple[Compute, str]:
    """`compute` recorded as a CUDA graph with GRAPH for a note, or as it is with the reason why it cannot be recorded.

    It must have run once on `stream` with the same buffers. Captured as trtexec does: other threads may go on. A library may
    fail without a word while a stream is captured, so that one replay must be seen to write every output.
    """
    import torch

    cuda: Any = torch.cuda
    graph = cuda.CUDAGraph()
    try:
        # The outer context puts the current stream back where a failed capture does not.
        with cuda.stream(stream), cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            made = compute()
        with cuda.stream(stream):
            for tensor in made.values():
                tensor.fill_(torch.nan)
            graph.replay()
            unwritten = [name for name, tensor in made.items() if bool(tensor.isnan().all())]
    except (RuntimeError, CompileError) as error:  # torch's errors of CUDA are RuntimeErrors
        return compute, without_graph(error)
    if unwritten:
        return compute, without_graph(RuntimeError(f"a replay does not write {', '.join(unwritten)}"))

    def replay() -> Mapping[str, torch.Tensor]:
        graph.replay()
        return made

    return replay, GRAPH


def without_graph(error: Exception) -> str:
    """The note of a binding whose computation could not be captured."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"no {GRAPH}: {lines[0] if lines else type(error).__name__}"


def _receive(answers: Mapping[str, torch.Tensor], made: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in answers.items():
        tensor.copy_(made[name], non_blocking=True)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().copy()
