"""The reference: a torch module run as it is. Every claim about a variant is held against this."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.backends import Bound, Runner, Tensors, round_trip, torch_threads
from tlexport.errors import CompileError

if TYPE_CHECKING:
    import torch

NAME = "eager"


@dataclass
class _EagerRunner:
    """`inputs` names the module's arguments in order."""

    module: torch.nn.Module
    inputs: tuple[str, ...]
    output: str
    memory_format: torch.memory_format
    device: torch.device
    provider: str
    claim: Callable[[], None]

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        import torch

        self.claim()
        with torch.inference_mode():
            return {self.output: self._numpy(self.module(*self._tensors(inputs, self.device)))}

    def bind(self, inputs: Tensors) -> Bound:
        """On the CPU a call is the module alone, on tensors that are ready."""
        import torch

        if self.device.type != "cpu":
            return self._bound_there(inputs)
        module, claim = self.module, self.claim
        tensors = self._tensors(inputs, self.device)
        latest: list[torch.Tensor] = [torch.empty(0)]

        @torch.inference_mode()
        def call() -> None:
            claim()
            latest[0] = module(*tensors)

        return Bound(call, lambda: {self.output: self._numpy(latest[0])})

    def _bound_there(self, inputs: Tensors) -> Bound:
        import torch

        cuda: Any = torch.cuda
        trip = round_trip.RoundTrip(self._given(inputs), cuda.Stream())

        @torch.inference_mode()
        def compute() -> dict[str, torch.Tensor]:
            self.claim()
            return {self.output: self.module(*self._laid_out(trip.held.values())).float()}

        return trip.bound(compute)

    def _tensors(self, inputs: Tensors, device: torch.device) -> list[torch.Tensor]:
        import torch

        return self._laid_out(torch.from_numpy(array).to(device) for array in self._given(inputs).values())

    def _given(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """The module's own inputs, in its order."""
        if missing := [name for name in self.inputs if name not in inputs]:
            raise CompileError(f"the module needs {', '.join(missing)}; given: {', '.join(inputs)}")
        return {name: inputs[name] for name in self.inputs}

    def _laid_out(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [t.contiguous(memory_format=self.memory_format) if t.ndim == 4 else t for t in tensors]

    def _numpy(self, answer: torch.Tensor) -> np.ndarray:
        return answer.float().cpu().numpy()


@contextlib.contextmanager
def runner_for(
    module: torch.nn.Module,
    *,
    inputs: tuple[str, ...],
    output: str,
    threads: int | None = None,
    channels_last: bool = False,
) -> Iterator[Runner]:
    """Run `module` in eval mode on the device that holds it: one argument [n, ...] for each of `inputs`, in order.

    `output` names what it returns, float32 [n, k]. `threads` (default: as it is) is set for the whole process and put
    back on leaving: torch has one pool. With `channels_last` a copy of the module is converted, so that other runners
    of the same module keep its layout; it concerns inputs of four dimensions only.
    """
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = copy.deepcopy(module).to(memory_format=layout) if channels_last else module
    held = next(itertools.chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if held is None else held.device
    training, previous = module.training, torch.get_num_threads()
    module.eval()
    torch.set_num_threads(threads or previous)
    try:
        where = f"torch {torch.__version__} on {device.type}"
        claim = torch_threads.claim(threads or previous)
        yield _EagerRunner(module, inputs, output, layout, device, where, claim)
    finally:
        module.train(training)
        torch.set_num_threads(previous)
