"""The protocol's gRPC service, over the same core as HTTP.

Requests arrive as bytes and are parsed here: an overloaded server refuses without parsing, and what is no message is the
client's mistake (INVALID_ARGUMENT), where gRPC's own parsing would report an internal error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tlexport.serving import messages
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.messages import MESSAGES
from tlexport.serving.protocol import Interface, Tensors
from tlexport.serving.service import Call, Service

STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.UNAVAILABLE,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
MOST_METADATA = 32 << 10
GROWTH, LEAST_LIMIT, MOST_ROOM = 4, 4 << 20, 64 << 20  # gRPC's own limit is 4 MiB
Method = Callable[[Service, bytes, Any], Awaitable[Any]]  # of the request's bytes and the call's context


def server(service: Service, largest: int, most: int) -> Any:
    """A grpc.aio server without a port. `largest`: bytes of a message; `most`: calls at a time."""
    options = [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MOST_METADATA),
        ("grpc.so_reuseport", 0),
    ]
    made = grpc.aio.server(options=options, maximum_concurrent_rpcs=most)
    methods: dict[str, Method] = {
        "ServerLive": _server_live,
        "ServerReady": _server_ready,
        "ModelReady": _model_ready,
        "ServerMetadata": _server_metadata,
        "ModelMetadata": _model_metadata,
        "ModelInfer": _model_infer,
    }
    handlers = {name: _handler(service, name, method) for name, method in methods.items()}
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    return made


def largest_message(interface: Interface) -> int:
    """Bytes of the largest sensible request: typed contents are at most as long as JSON numbers."""
    return max(interface.largest_binary, interface.largest_json)


def message_limit(interface: Interface) -> int:
    """Bytes of a message that a server is opened for with a first version of this interface.

    gRPC cannot change it while it runs, and a later version may read more: there is room for four times as much, but none is
    made beyond 64 MiB.
    """
    needed = largest_message(interface)
    return max(needed, min(max(GROWTH * needed, LEAST_LIMIT), MOST_ROOM))


def _handler(service: Service, name: str, method: Method) -> Any:
    async def behave(request: bytes, context: Any) -> Any:
        try:
            if name not in ("ServerLive", "ServerReady"):
                service.authorize(_metadata(context).get("authorization", ""))
            return await method(service, request, context)
        except ProtocolError as error:
            await context.abort(STATUS[error.status], str(error))
        except Exception as error:  # noqa: BLE001  gRPC would tell the client the exception's own text
            told = service.mistaken(error)
            await context.abort(STATUS[told.status], str(told))

    return grpc.unary_unary_rpc_method_handler(
        behave, request_deserializer=None, response_serializer=MESSAGES[f"{name}Response"].SerializeToString
    )


async def _server_live(service: Service, request: bytes, context: Any) -> Any:
    return MESSAGES["ServerLiveResponse"](live=True)


async def _server_ready(service: Service, request: bytes, context: Any) -> Any:
    return MESSAGES["ServerReadyResponse"](ready=service.ready)


async def _model_ready(service: Service, request: bytes, context: Any) -> Any:
    asked = _parsed("ModelReadyRequest", request)
    service.slot.find(asked.name, asked.version)
    return MESSAGES["ModelReadyResponse"](ready=service.ready)


async def _server_metadata(service: Service, request: bytes, context: Any) -> Any:
    return MESSAGES["ServerMetadataResponse"](**service.metadata())


async def _model_metadata(service: Service, request: bytes, context: Any) -> Any:
    asked = _parsed("ModelMetadataRequest", request)
    return MESSAGES["ModelMetadataResponse"](**service.slot.find(asked.name, asked.version).model.metadata())


async def _model_infer(service: Service, request: bytes, context: Any) -> Any:
    future: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()

    def reply(outputs: Tensors) -> None:
        if not future.done():
            future.set_result(outputs)

    def refuse(error: ProtocolError) -> None:
        if not future.done():
            future.set_exception(error)

    call = Call(service, "grpc", _metadata(context), refuse, context.time_remaining())
    served = waiting = None
    status, samples = 499, 0  # what it is if this task is cancelled: the client has left
    try:
        service.require_room()
        _require_size(service, request)
        message = _parsed("ModelInferRequest", request)
        served = service.admit(message.model_name, message.model_version)
        decoded = messages.decode_request(message, served.model.interface)
        samples = decoded.samples
        waiting = service.infer(call, served, decoded, reply)
        outputs = await future
        answer = messages.encode_response(served.model.name, served.model.version, decoded, outputs)
        status = 200
    except ProtocolError as error:
        status = error.status
        raise
    except Exception:
        status = 500
        raise
    finally:
        call.end(status, samples)
        if waiting is not None and served is not None and not future.done():
            served.batcher.withdraw(waiting)
    return answer


def _require_size(service: Service, request: bytes) -> None:
    """The server takes more than this version may read. Raises ProtocolError (413)."""
    served = service.slot.current
    if served is not None and len(request) > (largest := largest_message(served.model.interface)):
        raise ProtocolError(
            413, f"a request of {len(request)} bytes is more than the model reads: at most {largest}"
        )


def _parsed(name: str, data: bytes) -> Any:
    try:
        return MESSAGES[name].FromString(data)
    except DecodeError as error:
        raise ProtocolError(400, f"this is no {name}") from error


def _metadata(context: Any) -> Mapping[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
