"""The server's life: it loads the model, listens, takes up new versions, and on a signal answers what it holds and leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import ssl
import threading
import time
from collections.abc import Callable
from typing import TextIO

import uvloop

from tlexport.errors import BundleError, ListenError
from tlexport.run import write_json
from tlexport.serving import rpc
from tlexport.serving.connection import Connection
from tlexport.serving.log import Log
from tlexport.serving.place import Bound, Place
from tlexport.serving.service import Service, Settings
from tlexport.serving.slot import Model

BACKLOG = 1024
_TICK = 1.0  # seconds between looks at the connections and at the bundle
_LOADING = 5.0  # seconds that the end waits for a version that is being loaded


class Source:
    """Where model versions come from. Both methods are called in a thread of their own, one at a time."""

    def state(self) -> str | None:
        """Changes when there may be a new version; None while there is nothing. Cheap: called every second."""
        raise NotImplementedError

    def load(self) -> Model:
        """Check, load, test and warm up what is there now. Raises TlexportError if it may not be served."""
        raise NotImplementedError


def run(
    source: Source, settings: Settings, place: Place, stream: TextIO, ready: Callable[[Bound], None]
) -> bool:
    """Serve until SIGTERM or SIGINT; `ready` is told the addresses. SIGHUP looks for a new version.

    Returns whether every thread has ended. One that is still in a runtime's native code would abort the process when the
    interpreter is finalised under it (Python's gh-87135): then leave by os._exit.

    Raises what `source.load` raises for the first version, and ListenError.
    """
    alone: bool = uvloop.run(_Server(source, settings, place, Log(stream)).live(ready))
    return alone


class _Server:
    def __init__(self, source: Source, settings: Settings, place: Place, log: Log) -> None:
        self.source, self.settings, self.place, self.log = source, settings, place, log
        self.connections: set[Connection] = set()
        self.message_limit = 0  # bytes of a gRPC message, from when it listens

    async def live(self, ready: Callable[[Bound], None]) -> bool:
        """Returns whether every thread has ended."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        look = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, look.set)
        self.service = Service(self.settings, self.log)
        state = self.source.state()
        model = await loop.run_in_executor(None, self.source.load)
        self._serve(model)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection shall walk over it while a request waits
        listener, grpc_server, bound = await self._listen(model)
        if self.place.ports_file is not None:
            write_json(self.place.ports_file, bound.__dict__)
        self.log.write("ready", **bound.__dict__)
        ready(bound)
        ended = threading.Event()
        reloader = threading.Thread(
            target=self._reload, args=(state, look, ended, loop), name="reload", daemon=True
        )
        reloader.start()
        tidying = loop.create_task(self._tidy())
        await stop.wait()
        ended.set()
        look.set()
        alone = await self._drain(listener, grpc_server, reloader)
        tidying.cancel()
        return alone

    def _serve(self, model: Model) -> None:
        self.service.slot.put(model)
        self.service.metrics.serves({"name": model.name, "version": model.version, **model.facts})
        for reason in model.warnings:
            self.log.write("warning", reason=reason)

    async def _listen(self, model: Model) -> tuple[asyncio.AbstractServer, object, Bound]:
        loop, place = asyncio.get_running_loop(), self.place
        context = _tls(place)
        try:
            listener = await loop.create_server(
                lambda: Connection(self.service, self.connections, place.connections),
                place.host,
                place.port,
                backlog=BACKLOG,
                ssl=context,
            )
        except OSError as error:
            raise ListenError(_in_use(place.host, place.port, "--port", str(error))) from error
        port = listener.sockets[0].getsockname()[1]
        secure = "s" if context else ""
        grpc_server, grpc_address = None, None
        if place.grpc_port is not None:
            grpc_server, number = await self._listen_grpc(model)
            grpc_address = f"grpc{secure}://{_host(place.host)}:{number}"
        http = f"http{secure}://{_host(place.host)}:{port}"
        return listener, grpc_server, Bound(http, grpc_address, model.name, model.version)

    async def _listen_grpc(self, model: Model) -> tuple[object, int]:
        import grpc

        place = self.place
        self.message_limit = rpc.message_limit(model.interface)
        made = rpc.server(self.service, self.message_limit, place.connections)
        address = f"{_host(place.host)}:{place.grpc_port}"
        try:
            if place.certificate is None or place.key is None:
                number = made.add_insecure_port(address)
            else:
                pair = (place.key.read_bytes(), place.certificate.read_bytes())
                number = made.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise ListenError(_in_use(place.host, place.grpc_port or 0, "--grpc-port", str(error))) from error
        await made.start()
        return made, int(number)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.expire(now)

    def _reload(
        self,
        state: str | None,
        look: threading.Event,
        ended: threading.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """In a thread of its own: a new version is loaded beside the old one, which serves on if the new one is refused."""
        refused: str | None = None
        reason = ""
        while not ended.is_set():
            asked = look.wait(_TICK if self.place.watch else None)
            look.clear()
            found = self.source.state()
            if ended.is_set() or found in (None, state) or (found == refused and not asked):
                continue
            self.log.write("version found")
            try:
                model = self.source.load()
                self._require_room(model)
            except Exception as error:  # noqa: BLE001  whatever is wrong with the new version, the old one stays
                refused = found
                if (told := " ".join(str(error).split())[:1000]) != reason:
                    reason = told
                    self.log.write("version refused", error=type(error).__name__, reason=reason)
                loop.call_soon_threadsafe(self._count_reload, "refused")
                continue
            state, refused, reason = found, None, ""
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._take_up, model)

    def _require_room(self, model: Model) -> None:
        """Raises BundleError, the model closed, if its largest requests are beyond what gRPC was opened for."""
        needed = rpc.largest_message(model.interface)
        if self.place.grpc_port is None or needed <= self.message_limit:
            return
        model.close()
        raise BundleError(
            f"version {model.version} reads requests of up to {needed} bytes, and gRPC was opened for {self.message_limit} when the "
            "server started; start it anew with this version, or with --no-grpc"
        )

    def _count_reload(self, result: str) -> None:
        self.service.metrics.reloads[result] += 1

    def _take_up(self, model: Model) -> None:
        current = self.service.slot.current
        if self.service.draining or (current is not None and current.model.version == model.version):
            model.close()
            return
        self._serve(model)
        self._count_reload("loaded")
        self.log.write("version loaded", model=model.name, version=model.version)

    async def _drain(
        self, listener: asyncio.AbstractServer, grpc_server: object, reloader: threading.Thread
    ) -> bool:
        """Returns whether nothing is left: no request, no worker's thread, no version that is being loaded."""
        service, place = self.service, self.place
        service.draining = True
        self.log.write("draining", in_flight=service.in_flight)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + place.drain_seconds
        while service.in_flight and loop.time() < deadline:
            await asyncio.sleep(0.01)
        listener.close()
        for connection in list(self.connections):
            connection.close(idle_only=True)
        while self.connections and loop.time() < deadline:
            await asyncio.sleep(0.01)
            for connection in list(self.connections):
                connection.expire(time.monotonic())
        left = service.in_flight
        for connection in list(self.connections):
            connection.close(idle_only=False)
        if grpc_server is not None:
            await grpc_server.stop(max(0.0, min(1.0, deadline - loop.time())))  # type: ignore[attr-defined]
        try:
            await asyncio.wait_for(service.slot.close(), max(0.1, deadline - loop.time()))
            closed = True
        except asyncio.TimeoutError:
            closed = False
        await loop.run_in_executor(None, reloader.join, max(0.1, min(_LOADING, deadline - loop.time())))
        loading = reloader.is_alive()
        self.log.write("stopped", unanswered=left, loading=loading)
        return closed and not loading


def _tls(place: Place) -> ssl.SSLContext | None:
    if place.certificate is None or place.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(place.certificate, place.key)
    except (OSError, ssl.SSLError) as error:
        raise ListenError(
            f"{place.certificate} and {place.key} are no certificate with its key in PEM: {error}"
        ) from error
    return context


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _in_use(host: str, port: int, flag: str, reason: str) -> str:
    return (
        f"cannot listen on {_host(host)}:{port}: {reason}; choose another with {flag} (0: any that is free)"
    )
