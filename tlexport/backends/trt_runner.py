"""What runs an engine of TensorRT or TensorRT-RTX on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.backends import Bound, Tensors
from tlexport.backends.round_trip import RoundTrip
from tlexport.errors import CompileError

if TYPE_CHECKING:
    import torch


@dataclass
class EngineRunner:
    """`capture`: bound calls replay a CUDA graph of the engine. `note`: of bindings that do not (Bound.note)."""

    trt: Any
    engine: Any
    context: Any
    provider: str
    capture: bool = False
    note: str = ""

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """Once, so that no graph is captured for it."""
        return self._bound(inputs, capture=False).outputs()

    def bind(self, inputs: Tensors) -> Bound:
        """A call copies the inputs to the GPU, executes, copies the outputs back and waits for all of it."""
        return self._bound(inputs, capture=self.capture)

    def _bound(self, inputs: Tensors, *, capture: bool) -> Bound:
        import torch

        cuda: Any = torch.cuda
        stream = cuda.Stream()
        trip = RoundTrip(inputs, stream)
        for name, tensor in trip.held.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise CompileError(f"{name} of shape {tuple(tensor.shape)} is outside the engine's profile")
        made = {name: self._output(name) for name in self._output_names()}
        for name, tensor in (trip.held | made).items():
            self.context.set_tensor_address(name, tensor.data_ptr())

        def compute() -> Mapping[str, torch.Tensor]:
            if not self.context.execute_async_v3(stream.cuda_stream):
                raise CompileError(f"{self.provider}: the engine's execution failed")
            return made

        return trip.bound(compute, capture=capture, note=self.note)

    def _output_names(self) -> list[str]:
        names = map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        return [n for n in names if self.engine.get_tensor_mode(n) == self.trt.TensorIOMode.OUTPUT]

    def _output(self, name: str) -> torch.Tensor:
        """An uninitialised tensor on the GPU, of the shape that the inputs' shapes imply."""
        import torch

        dtype = torch.from_numpy(np.empty(0, self.trt.nptype(self.engine.get_tensor_dtype(name)))).dtype
        return torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device="cuda")
