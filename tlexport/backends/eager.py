"""The reference: a torch module run as it is. Every claim about a variant is held against this."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tlexport.backends import Runner, Tensors

if TYPE_CHECKING:
    import torch

NAME = "eager"
OUTPUT = "probabilities"


@dataclass
class _EagerRunner:
    module: torch.nn.Module
    memory_format: torch.memory_format
    device: torch.device
    provider: str

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        import torch

        (image,) = inputs.values()
        with torch.inference_mode():
            batch = torch.from_numpy(image).to(self.device).contiguous(memory_format=self.memory_format)
            return {OUTPUT: self.module(batch).float().cpu().numpy()}


@contextlib.contextmanager
def runner_for(
    module: torch.nn.Module, threads: int | None = None, channels_last: bool = False
) -> Iterator[Runner]:
    """Run `module` (uint8 [n x c x h x w] -> probabilities [n x k]) in eval mode on the device that holds it.

    `threads` (default: as it is) is set for the whole process and put back on leaving: torch has one pool. With
    `channels_last` a copy of the module is converted, so that other runners of the same module keep its layout.
    """
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = copy.deepcopy(module).to(memory_format=layout) if channels_last else module
    device = next(module.parameters()).device
    training, previous = module.training, torch.get_num_threads()
    module.eval()
    torch.set_num_threads(threads or previous)
    try:
        yield _EagerRunner(module, layout, device, f"torch {torch.__version__} on {device.type}")
    finally:
        module.train(training)
        torch.set_num_threads(previous)
