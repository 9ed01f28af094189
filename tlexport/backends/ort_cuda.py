"""ONNX Runtime's sessions on an NVIDIA GPU: on a stream of our own, with buffers bound once, as a CUDA graph if asked.

What the provider options and run options mean: onnxruntime.ai, "CUDA Execution Provider", sections on them and on CUDA graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.backends import Bound, Tensors
from tlexport.backends.round_trip import GRAPH, RoundTrip, without_graph
from tlexport.errors import CompileError

if TYPE_CHECKING:
    import torch

_PLAIN = "-1"  # as a graph's number: neither captured nor replayed


@dataclass
class CudaRunner:
    """`stream` is the one that the session computes on. `captures`: it was opened to capture CUDA graphs."""

    session: Any
    stream: Any
    captures: bool
    note: str
    provider: str
    # A graph belongs to the buffers of one binding, so that no number is used twice.
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(inputs), _told()), strict=True))

    def bind(self, inputs: Tensors) -> Bound:
        """A call copies the inputs to the GPU, computes in bound buffers, copies the outputs back and waits for all of it."""
        import torch

        outputs = self.run(inputs)
        trip = RoundTrip(inputs, self.stream)
        made = {
            name: torch.empty_like(torch.from_numpy(array), device="cuda") for name, array in outputs.items()
        }
        binding = self.session.io_binding()
        for name, tensor in trip.held.items():
            binding.bind_input(name, *_place(tensor, inputs[name].dtype))
        for name, tensor in made.items():
            binding.bind_output(name, *_place(tensor, outputs[name].dtype))
        if not self.captures:
            return trip.bound(self._compute(binding, made, _PLAIN), note=self.note)
        try:
            return trip.bound(self._compute(binding, made, str(next(self._numbers))), note=GRAPH)
        except Exception as error:  # noqa: BLE001  its exceptions share no other base, and the note gives the reason
            return trip.bound(self._compute(binding, made, _PLAIN), note=without_graph(error))

    def _compute(
        self, binding: Any, made: Mapping[str, torch.Tensor], graph: str
    ) -> Callable[[], Mapping[str, torch.Tensor]]:
        told = _told(gpu_graph_id=graph, disable_synchronize_execution_providers="1")

        def compute() -> Mapping[str, torch.Tensor]:
            self.session.run_with_iobinding(binding, told)
            return made

        return compute


def opened(session: Callable[[Mapping[str, str]], Any], *, graphs: bool) -> CudaRunner:
    """The runner of a session, which `session` opens with options of the CUDA provider.

    With `graphs` a graph with nodes that CUDA does not run is opened without, and the note of its bindings says so. Raises
    CompileError where it cannot be opened at all.
    """
    import torch

    cuda: Any = torch.cuda
    stream = cuda.Stream()
    settings = {"user_compute_stream": str(stream.cuda_stream)}
    note = ""
    if graphs:
        try:
            capturing = session(settings | {"enable_cuda_graph": "1"})
            return CudaRunner(capturing, stream, True, GRAPH, capturing.get_providers()[0])
        except CompileError as error:
            note = without_graph(error)
    plain = session(settings)
    return CudaRunner(plain, stream, False, note, plain.get_providers()[0])


def _told(**entries: str) -> Any:
    """Options of a run: one without a graph that waits for its answer, unless told otherwise."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    for key, value in ({"gpu_graph_id": _PLAIN} | entries).items():
        options.add_run_config_entry(key, value)
    return options


def _place(tensor: torch.Tensor, dtype: np.dtype) -> tuple[str, int, Any, tuple[int, ...], int]:
    """What IOBinding asks of a buffer: device and its number, element type, shape, address."""
    return "cuda", 0, dtype.type, tuple(tensor.shape), tensor.data_ptr()
