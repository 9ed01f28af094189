"""Samples of which the answers are known, asked of a server over one connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tlexport import tensors
from tlexport.serving.client import Client
from tlexport.serving.datatypes import ProtocolError, listed
from tlexport.serving.protocol import Response
from tlexport.tensors import TensorSpec

T = TypeVar("T")

PATIENCE_S = 30.0  # with a server that says it is overloaded
PAUSE_S = 0.05
OVERLOADED = (429, 503)


class Asking:
    """samples: [n, ...], or structured with a field an input; inputs, output: as the model has them."""

    def __init__(
        self,
        client: Client,
        model: str,
        samples: NDArray[Any],
        inputs: tuple[TensorSpec, ...],
        output: TensorSpec,
    ) -> None:
        self.client, self.model, self.samples, self.output = client, model, samples, output
        self.names = tuple(spec.name for spec in inputs)

    def prepared(self, rows: NDArray[np.intp], id: str = "", timeout_us: int | None = None) -> bytes:
        return self.client.prepare(self.model, tensors.named(self.samples[rows], self.names), id, timeout_us)

    def __call__(self, request: int, rows: NDArray[np.intp]) -> NDArray[Any]:
        """Answers [b, ...] to these samples. Raises ProtocolError if they belong to another request or have another shape."""
        name = f"{request}-{len(rows)}"
        prepared = self.prepared(rows, name)
        response = patiently(lambda: self.client.send(prepared))
        if response.id and response.id != name:
            raise ProtocolError(502, f"the answer to request {name!r} has the id {response.id!r}")
        return self.answers(response, len(rows))

    def answers(self, response: Response, count: int) -> NDArray[Any]:
        """The output's tensor. Raises ProtocolError (502) if it is not there or not of `count` samples."""
        name = self.output.name
        if name not in response.outputs:
            raise ProtocolError(
                502, f"the answer has no output {name!r} (it has: {listed(response.outputs)})"
            )
        found, wanted = response.outputs[name], self.output.at(count)
        if found.shape != wanted:
            told = f"is {list(found.shape)} for {count} samples; the model makes {list(wanted)}"
            raise ProtocolError(502, f"output {name!r} {told}")
        return found

    def all_in(self, size: int) -> NDArray[Any]:
        """All samples in requests of `size`: [n, ...]."""
        parts = np.split(filled(len(self.samples), size), -(-len(self.samples) // size))
        return np.concatenate([self(index, part) for index, part in enumerate(parts)])[: len(self.samples)]


def filled(count: int, size: int) -> NDArray[np.intp]:
    """Samples 0 to count - 1, then from 0 again until requests of `size` are full."""
    return np.resize(np.arange(count), -(-count // size) * size)


def patiently(call: Callable[[], T]) -> T:
    """Its result; asked again while the server says that it is overloaded or not ready, for PATIENCE_S."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except ProtocolError as error:
            if error.status not in OVERLOADED or time.monotonic() > until:
                raise
            time.sleep(min(error.retry_after or PAUSE_S, 1.0))
