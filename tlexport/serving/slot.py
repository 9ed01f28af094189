"""The place of the model that answers: a new version takes it in one step, the old one finishes what it was given and is freed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tlexport.serving.batcher import Batcher, Limits, Observer, Run
from tlexport.serving.datatypes import DATATYPE, ProtocolError, quoted
from tlexport.serving.protocol import Interface
from tlexport.tensors import TensorSpec


@dataclass(frozen=True)
class Model:
    """A model version that is loaded, tested and warm. `runs`: what answers a batch, one for each worker; `warnings`: for the log,
    of how it is served.
    """

    name: str
    version: str
    platform: str
    interface: Interface
    runs: tuple[Run, ...]
    limits: Limits
    close: Callable[[], None]
    facts: Mapping[str, str] = field(default_factory=dict)  # what /metrics and the log tell of it
    warnings: tuple[str, ...] = ()

    def metadata(self) -> dict[str, object]:
        """The protocol's $metadata_model_response."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": self.platform,
            "inputs": [_described(spec) for spec in self.interface.inputs],
            "outputs": [_described(spec) for spec in self.interface.outputs],
        }


@dataclass(frozen=True)
class Served:
    model: Model
    batcher: Batcher


class Slot:
    """One model, in one version at a time. All methods are for the event loop's thread."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._current: Served | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> Served | None:
        return self._current

    @property
    def busy(self) -> bool:
        return bool(self._leaving) or (self._current is not None and self._current.batcher.busy)

    def put(self, model: Model) -> None:
        """Serve `model` from now on; the one before it answers what it holds, and is then closed."""
        loop = asyncio.get_running_loop()
        replaced = self._current
        self._current = Served(model, Batcher(model.runs, model.limits, self._observer, loop))
        if replaced is not None:
            self._retire(replaced)

    def find(self, name: str, version: str) -> Served:
        """The model of that name, and version if one is named. Raises ProtocolError: 404 that says what there is, 503 while
        nothing is loaded.
        """
        if self._current is None:
            raise ProtocolError(503, "the server is not ready: no model is loaded", retry_after=1.0)
        model = self._current.model
        if name != model.name:
            raise ProtocolError(404, f"no model {quoted(name)}; this server has: {model.name}")
        if version and version != model.version:
            raise ProtocolError(
                404, f"no version {quoted(version)} of {name}; this server has: {model.version}"
            )
        return self._current

    async def close(self) -> None:
        """Answer all that waits, then free everything."""
        if self._current is not None:
            self._retire(self._current)
        while self._leaving:
            await asyncio.wait(self._leaving)

    def _retire(self, served: Served) -> None:
        task = asyncio.get_running_loop().create_task(_retired(served))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


async def _retired(served: Served) -> None:
    await served.batcher.drain()
    await asyncio.get_running_loop().run_in_executor(None, served.model.close)


def _described(spec: TensorSpec) -> dict[str, object]:
    shape = [-1 if isinstance(d, str) else d for d in spec.shape]
    return {"name": spec.name, "datatype": DATATYPE[spec.dtype], "shape": shape}
