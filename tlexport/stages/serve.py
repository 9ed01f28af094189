"""serve: a bundle behind the Open Inference Protocol, on one machine. A new version of the bundle is taken up without a pause."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import cores, tensors
from tlexport.backends import DEFAULTS, Runner, registry
from tlexport.bundle import golden, manifest, preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import BundleError, GateError, NotInstalledError, RecipeError
from tlexport.evidence.accuracy import parity
from tlexport.results import ServeResult, Variant
from tlexport.run import digest
from tlexport.serving.place import Bound, Place
from tlexport.timings import Knee

if TYPE_CHECKING:
    from tlexport.serving.batcher import Limits
    from tlexport.serving.slot import Model

INLINE_S = 0.001  # a run shorter than this is not worth a hand-off to a thread and back, 0.05 to 0.1 ms, and its wake-ups
WAIT_S = 0.1  # of work that may wait by default: later answers are for nobody
LONGEST_QUEUE = 1024
PLATFORMS = {".onnx": "onnx_onnxv1", ".engine": "tensorrt_plan"}  # inference_rest.md, "Platforms"
_TIMED = 5


@dataclass(frozen=True)
class Serving:
    """How a bundle is served. None: chosen from what bench measured of the variant, and from this machine.

    `queue`: samples that may wait; `max_delay`: seconds; `timeout`: seconds a request may take.
    """

    target: str | None = None
    threads: int | None = None
    workers: int = 1
    max_batch: int | None = None
    max_delay: float = 0.0
    queue: int | None = None
    timeout: float = 30.0
    access_log: bool = False
    token: str | None = None
    insecure: bool = False
    trust: Trust = NOBODY


def run(bundle: Path, place: Place, how: Serving, ready: Callable[[ServeResult], None]) -> bool:
    """Serve until a signal. `ready` is told the addresses once golden samples came out right.

    Returns whether every thread has ended; else the process is to leave by os._exit, as server.run says.

    Raises PreflightError or BundleError for a bundle that may not be served, RecipeError for an address that is open to others
    without a token and TLS, NotInstalledError, CompileError, or ListenError.
    """
    _require_safe(place, how)
    serve = _server().run
    from tlexport.serving.service import Settings

    settings = Settings(
        timeout=how.timeout,
        token=how.token.encode() if how.token is not None else None,
        access_log=how.access_log,
    )

    def told(bound: Bound) -> None:
        ready(ServeResult(bundle=str(bundle), **bound.__dict__, process=os.getpid()))

    ended: bool = serve(Bundle(bundle, how), settings, place, sys.stderr, told)
    return ended


class Bundle:
    """A bundle's directory as a source of model versions."""

    def __init__(self, path: Path, how: Serving) -> None:
        self.path, self.how = path, how

    def state(self) -> str | None:
        """Of the manifest and the signature: both are written with the directory they stand in."""
        found = []
        for name in (manifest.NAME, manifest.SIGNATURE):
            try:
                about = (self.path / name).stat()
            except OSError:
                found.append("none")
            else:
                found.append(f"{about.st_ino} {about.st_mtime_ns} {about.st_size}")
        return None if found[0] == "none" else "; ".join(found)

    def load(self) -> Model:
        """Preflight, load, golden samples, warm-up. Raises PreflightError, BundleError, GateError, CompileError, NotInstalledError,
        RecipeError for a batch that the bundle does not allow.
        """
        before = _manifest_digest(self.path)
        document, target = preflight.for_target(self.path, self.how.target, trust=self.how.trust)
        self._require_batch(document)
        opened = contextlib.ExitStack()
        try:
            model = self._loaded(document, target, before[:12], opened)
            if _manifest_digest(self.path) != before:
                raise BundleError(f"{self.path} was changed while it was loaded")
        except BaseException:
            opened.close()
            raise
        return model

    def _require_batch(self, document: manifest.Manifest) -> None:
        asked, most = self.how.max_batch, document.batch.max
        if asked is not None and asked > most:
            raise RecipeError(
                f"--max-batch {asked} is more than {self.path} allows, {most}; ask for {most} at most, or build it with "
                f"export.batch.max={asked}"
            )

    def _loaded(
        self, document: manifest.Manifest, target: str, version: str, opened: contextlib.ExitStack
    ) -> Model:
        from tlexport.serving.protocol import Interface
        from tlexport.serving.slot import Model

        entry, how = document.targets[target], self.how
        threads = how.threads or max(1, cores.usable() // how.workers)
        load = registry.loader(entry.variant.backend, self.path / entry.file, target, DEFAULTS)
        runners = [opened.enter_context(load(threads)) for _ in range(how.workers)]
        inputs, expected = golden.load(self.path, document)
        for runner in runners:
            if why := _disagreement(runner, document, inputs, expected, entry.variant):
                raise GateError(f"{self.path}: the answer to golden samples {why}")
        limits = self._limits(document, entry.variant.knee, runners, inputs)
        return Model(
            name=document.name,
            version=version,
            platform=PLATFORMS.get(
                suffix := Path(entry.file).suffix, f"{entry.variant.backend}_{suffix[1:]}"
            ),
            interface=Interface(document.inputs, document.outputs, document.batch.max),
            runs=tuple(runner.run for runner in runners),
            limits=limits,
            warnings=tuple(_warnings(limits, how.workers, threads, cores.usable())),
            close=opened.close,
            facts={
                "variant": entry.variant.name,
                "backend": entry.variant.backend,
                "target": target,
                "provider": runners[0].provider,
                "threads": str(threads),
            },
        )

    def _limits(
        self, document: manifest.Manifest, knee: Knee | None, runners: Sequence[Runner], inputs: NDArray[Any]
    ) -> Limits:
        """What a worker takes at once, and what may wait: by default a tenth of a second of work. Warms every worker up."""
        from tlexport.serving.batcher import Limits

        how, most = self.how, document.batch.max
        batch = how.max_batch or (min(most, knee.at) if knee else most)
        names = [spec.name for spec in document.inputs]
        seconds = 0.0
        for runner in runners:
            for size in sorted({1, batch, most}):
                took = _timed(runner, tensors.filled(inputs, names, size))
                seconds = took if size == batch else seconds
        wait = round(WAIT_S * batch * how.workers / seconds)
        queue = how.queue or max(most, 2 * batch * how.workers, min(LONGEST_QUEUE, wait))
        return Limits(batch, queue, how.max_delay, inline=how.workers == 1 and seconds < INLINE_S)


def _warnings(limits: Limits, workers: int, threads: int, usable: int) -> Iterator[str]:
    """What was asked for, is done, and serves nobody."""
    if limits.queue < limits.batch:
        yield (
            f"{limits.queue} samples may wait and a worker takes {limits.batch} at once: requests are refused before a batch is "
            f"full; --queue {limits.batch} at least, or a smaller --max-batch"
        )
    if workers * threads > usable:
        yield (
            f"{workers} workers of {threads} threads are more than the {usable} cores that this process may use: they wait for each "
            "other; fewer --workers or --threads"
        )


def _disagreement(
    runner: Runner,
    document: manifest.Manifest,
    inputs: NDArray[Any],
    expected: NDArray[Any],
    variant: Variant,
) -> str:
    """Why what the runner answers to golden samples is not the reference's within the error that verify measured."""
    names, size = [spec.name for spec in document.inputs], document.batch.max
    parts = [
        runner.run(tensors.named(inputs[start : start + size], names))
        for start in range(0, len(inputs), size)
    ]
    output = document.outputs[0].name
    outputs = np.concatenate([part[output] for part in parts])
    parity.compare(expected, outputs)  # of one shape, finite, and not the same for every sample
    return parity.disagreement(expected, outputs, variant.max_abs_error, variant.usual_error)


def _timed(runner: Runner, inputs: dict[str, NDArray[Any]]) -> float:
    """Seconds of one run, the median of a few after the first."""
    times = []
    for _ in range(1 + _TIMED):
        started = time.perf_counter()
        runner.run(inputs)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _manifest_digest(bundle: Path) -> str:
    try:
        return digest(bundle / manifest.NAME)
    except OSError as error:
        raise BundleError(f"{bundle} is not a bundle (no {manifest.NAME} in it)") from error


def _require_safe(place: Place, how: Serving) -> None:
    """Raises RecipeError if others could reach the server without a token, or read it and the answers on the way."""
    if (place.certificate is None) != (place.key is None):
        raise RecipeError("TLS needs --tls-cert and --tls-key: give both")
    if _loopback(place.host) or how.insecure:
        return
    lacks = {
        "a token (--token-file FILE, or the variable TLEXPORT_TOKEN)": how.token is None,
        "TLS (--tls-cert and --tls-key)": place.certificate is None,
    }
    if missing := " and ".join(what for what, lacking in lacks.items() if lacking):
        raise RecipeError(
            f"{place.host} can be reached from other machines, which needs {missing}; "
            "serve on 127.0.0.1, or say --insecure if the network itself keeps others out"
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server() -> ModuleType:
    try:
        from tlexport.serving import server
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"what the server needs ({error.name})", "serve") from error
    return server
