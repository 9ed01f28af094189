"""The client over gRPC. Import this module only where gRPC is spoken."""

from __future__ import annotations

from typing import Any

from tlexport.errors import NotInstalledError, RecipeError, ServerError
from tlexport.serving import datatypes
from tlexport.serving.client import Access, Encoding, Model, Server, Stated
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.protocol import Response, Tensors

try:
    import grpc

    from tlexport.serving import messages
except ImportError as error:
    raise NotInstalledError("gRPC", "serve", "http:// needs nothing more") from error

LARGEST = 1 << 30
# What HTTP says for the codes that a server gives; the rest are its faults.
STATUS = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "UNIMPLEMENTED": 404,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
}
# UNAVAILABLE is said by a server that is overloaded, and by the library where there is no server; only its words tell.
_NO_SERVER = (
    "failed to connect",
    "connection refused",
    "socket closed",
    "connection reset",
    "name resolution",
    "handshake",
    "goaway",
    "broken pipe",
    "recvmsg",
)


class GrpcClient:
    encoding: Encoding = "grpc"

    def __init__(self, url: str, host: str, port: int, access: Access, *, secure: bool) -> None:
        self.url, self._timeout_s = url, access.timeout_s
        self._metadata = (("authorization", f"Bearer {access.token}"),) if access.token else ()
        options = [
            ("grpc.max_receive_message_length", LARGEST),
            ("grpc.max_send_message_length", LARGEST),
            ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, as with HTTP
            ("grpc.enable_http_proxy", 0),
        ]
        where = f"{f'[{host}]' if ':' in host else host}:{port}"
        if secure:
            self._channel = grpc.secure_channel(where, _credentials(access), options)
        else:
            self._channel = grpc.insecure_channel(where, options)
        self._methods = {
            name: self._channel.unary_unary(
                f"/{messages.SERVICE}/{name}",
                request_serializer=None,
                response_deserializer=messages.MESSAGES[f"{name}Response"].FromString,
            )
            for name in messages.METHODS
        }

    def server(self) -> Server:
        found = self._ask("ServerMetadata")
        return Server(found.name, found.version, tuple(found.extensions))

    def live(self) -> bool:
        return bool(self._ask("ServerLive").live)

    def ready(self, model: str = "") -> bool:
        return bool(self._ask("ModelReady", name=model).ready if model else self._ask("ServerReady").ready)

    def model(self, name: str) -> Model:
        found = self._ask("ModelMetadata", name=name)
        return Model(
            found.name or name,
            tuple(found.versions),
            found.platform,
            _stated(found.inputs),
            _stated(found.outputs),
        )

    def models(self) -> tuple[str, ...]:
        return ()  # the protocol has no call for it

    def prepare(self, model: str, inputs: Tensors, id: str = "", timeout_us: int | None = None) -> bytes:
        message = messages.encode_request(model, inputs, id=id, timeout_us=timeout_us)
        serialized: bytes = message.SerializeToString()
        return serialized

    def send(self, prepared: bytes) -> Response:
        return messages.decode_response(self._call("ModelInfer", prepared))

    def close(self) -> None:
        self._channel.close()

    def _ask(self, method: str, **fields: Any) -> Any:
        return self._call(method, messages.MESSAGES[f"{method}Request"](**fields).SerializeToString())

    def _call(self, method: str, request: bytes) -> Any:
        try:
            return self._methods[method](request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._told(error) from error

    def _told(self, error: Any) -> ProtocolError | ServerError:
        code, details = error.code().name, error.details() or ""
        said = " ".join(details.split())
        if code == "UNAVAILABLE":
            if any(words in said.lower() for words in _NO_SERVER):
                return ServerError(
                    f"nothing answers at {self.url} ({said[:200]}); is the server up, and is it its gRPC port?"
                )
            return ProtocolError(503, f"UNAVAILABLE: {said}")
        if code == "DEADLINE_EXCEEDED" and said.lower().startswith("deadline exceeded"):
            return ServerError(
                f"{self.url} did not answer within {self._timeout_s:g} s; give it longer with --timeout",
                timed_out=True,
            )
        return ProtocolError(STATUS.get(code, 500), f"{code}: {said}")


def _credentials(access: Access) -> Any:
    try:
        return grpc.ssl_channel_credentials(access.ca.read_bytes() if access.ca else None)
    except OSError as error:
        raise RecipeError(f"{access.ca} holds no certificates: {error}") from error


def _stated(tensors: Any) -> tuple[Stated, ...]:
    return tuple(
        Stated(of.name, datatypes.NUMPY.get(of.datatype, of.datatype), tuple(map(int, of.shape)))
        for of in tensors
    )
