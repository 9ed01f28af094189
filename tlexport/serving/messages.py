"""Open Inference Protocol v2 over gRPC: its messages, made from descriptors at run time, and requests and answers in them.

Source: kserve/open-inference-protocol, open_inference_grpc.proto (package inference). Generated code would bind the package to
one protobuf major version, and registering the names in the default pool would clash with other clients of the protocol.
Import this module only where gRPC is spoken: it needs protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tlexport.serving import datatypes
from tlexport.serving.datatypes import ProtocolError, listed, quoted
from tlexport.serving.frames import LONGEST_ID, check_tensor, checked_timeout
from tlexport.serving.protocol import Interface, Request, Response, Tensors

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

# Message -> its fields in the order of their numbers, from 1: "name type", `*` repeated, `{}` a map from string, `|` in a oneof.
_FIELDS = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready bool",
    "ModelReadyRequest": "name string, version string",
    "ModelReadyResponse": "ready bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name string, version string, extensions *string",
    "ModelMetadataRequest": "name string, version string",
    "ModelMetadataResponse": "name string, versions *string, platform string, inputs *.TensorMetadata, "
    "outputs *.TensorMetadata, properties {}string",
    "ModelMetadataResponse.TensorMetadata": "name string, datatype string, shape *int64",
    "ModelInferRequest": "model_name string, model_version string, id string, parameters {}InferParameter, "
    "inputs *.InferInputTensor, outputs *.InferRequestedOutputTensor, raw_input_contents *bytes",
    "ModelInferRequest.InferInputTensor": "name string, datatype string, shape *int64, "
    "parameters {}InferParameter, contents InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": "name string, parameters {}InferParameter",
    "ModelInferResponse": "model_name string, model_version string, id string, parameters {}InferParameter, "
    "outputs *.InferOutputTensor, raw_output_contents *bytes",
    "ModelInferResponse.InferOutputTensor": "name string, datatype string, shape *int64, "
    "parameters {}InferParameter, contents InferTensorContents",
    "InferParameter": "bool_param |bool, int64_param |int64, string_param |string, double_param |double, "
    "uint64_param |uint64",
    "InferTensorContents": "bool_contents *bool, int_contents *int32, int64_contents *int64, uint_contents *uint32, "
    "uint64_contents *uint64, fp32_contents *float, fp64_contents *double, bytes_contents *bytes",
}
_ONEOF = "parameter_choice"
_SCALARS = {"bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes"}
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def encode_request(
    model_name: str,
    inputs: Tensors,
    *,
    model_version: str = "",
    id: str = "",
    outputs: Sequence[str] = (),
    timeout_us: int | None = None,
) -> Any:
    """A ModelInferRequest with raw contents."""
    message = MESSAGES["ModelInferRequest"](model_name=model_name, model_version=model_version, id=id)
    if timeout_us is not None:
        message.parameters["timeout"].int64_param = timeout_us
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=datatypes.datatype(array), shape=array.shape)
        message.raw_input_contents.append(datatypes.to_bytes(array))
    for name in outputs:
        message.outputs.add(name=name)
    return message


def decode_request(message: Any, interface: Interface) -> Request:
    """Raises ProtocolError (400) that says what is wrong and what the model would have taken."""
    _require_unique([tensor.name for tensor in message.inputs], "input", tuple(interface.input))
    if missing := interface.input.keys() - {tensor.name for tensor in message.inputs}:
        raise ProtocolError(
            400, f"input {listed(sorted(missing))} is missing; the model reads: {listed(interface.input)}"
        )
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise ProtocolError(400, f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs")
    inputs, samples = {}, 0
    for position, tensor in enumerate(message.inputs):
        spec, what = interface.input[tensor.name], f"input {tensor.name!r}"
        samples = check_tensor(spec, tensor.datatype, list(tensor.shape), samples, interface.largest)
        if raw and tensor.HasField("contents"):
            raise ProtocolError(400, f"{what} has contents beside raw_input_contents")
        inputs[tensor.name] = (
            datatypes.from_bytes(raw[position], 0, len(raw[position]), spec.dtype, tensor.shape, what)
            if raw
            else _typed(tensor, spec.dtype, what)
        )
    if len(message.id) > LONGEST_ID:
        raise ProtocolError(400, f"`id` must be a string of at most {LONGEST_ID} characters")
    wanted = [tensor.name for tensor in message.outputs]
    _require_unique(wanted, "output", interface.output_names)
    return Request(
        id=message.id,
        inputs=inputs,
        samples=samples,
        outputs=tuple((name, True) for name in wanted or interface.output_names),
        timeout_us=checked_timeout(parameters(message.parameters).get("timeout")),
    )


def encode_response(model_name: str, model_version: str, request: Request, outputs: Tensors) -> Any:
    """A ModelInferResponse with raw contents."""
    message = MESSAGES["ModelInferResponse"](
        model_name=model_name, model_version=model_version, id=request.id
    )
    for name, _ in request.outputs:
        array = outputs[name]
        message.outputs.add(name=name, datatype=datatypes.datatype(array), shape=array.shape)
        message.raw_output_contents.append(datatypes.to_bytes(array))
    return message


def decode_response(message: Any) -> Response:
    """Raises ProtocolError (502) if the message contradicts itself."""
    raw = message.raw_output_contents
    if raw and len(raw) != len(message.outputs):
        raise ProtocolError(
            502, f"the answer has {len(raw)} raw_output_contents for {len(message.outputs)} outputs"
        )
    outputs: dict[str, NDArray[Any]] = {}
    for position, tensor in enumerate(message.outputs):
        what = f"output {quoted(tensor.name)}"
        if tensor.name in outputs or tensor.datatype not in datatypes.NUMPY:
            raise ProtocolError(
                502, f"the answer has {what} of datatype {quoted(tensor.datatype)}, or has it twice"
            )
        dtype, shape = datatypes.NUMPY[tensor.datatype], list(tensor.shape)
        try:
            outputs[tensor.name] = (
                datatypes.from_bytes(raw[position], 0, len(raw[position]), dtype, shape, what)
                if raw
                else _typed(tensor, dtype, what)
            )
        except ProtocolError as error:
            raise ProtocolError(502, f"the answer is not as announced: {error}") from error
    return Response(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        outputs=outputs,
        parameters=parameters(message.parameters),
    )


def parameters(found: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of a map of InferParameter; one without a value is left out."""
    chosen = ((name, value, value.WhichOneof(_ONEOF)) for name, value in found.items())
    return {name: getattr(value, which) for name, value, which in chosen if which}


def _typed(tensor: Any, dtype: str, what: str) -> NDArray[Any]:
    """A tensor from `contents`, whose numbers are wider than its own type, so that they may not fit."""
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise ProtocolError(400, f"{what} is {tensor.datatype}: it must come in raw contents")
    filled = [name.name for name, _ in tensor.contents.ListFields()]
    if filled not in ([field], []):
        raise ProtocolError(
            400, f"{what} is {tensor.datatype}: its numbers belong in {field}, not in {listed(filled)}"
        )
    numbers = np.asarray(getattr(tensor.contents, field))
    needed = int(np.prod([int(d) for d in tensor.shape], dtype=object))
    if numbers.size != needed:
        raise ProtocolError(400, f"{what} has {numbers.size} numbers; {list(tensor.shape)} are {needed}")
    kind = datatypes.dtype(dtype)
    if kind.kind in "iu" and numbers.size:
        limits = np.iinfo(kind)
        if int(numbers.min()) < limits.min or int(numbers.max()) > limits.max:
            raise ProtocolError(
                400, f"{what} is {tensor.datatype}, {limits.min} to {limits.max}: a number is beyond"
            )
    return numbers.astype(kind).reshape(list(tensor.shape))


def _require_unique(names: Sequence[str], what: str, known: tuple[str, ...]) -> None:
    for position, name in enumerate(names):
        if name not in known:
            raise ProtocolError(400, f"no {what} {quoted(name)}; the model has: {listed(known)}")
        if name in names[:position]:
            raise ProtocolError(400, f"{what} {name!r} is given twice")


def _built() -> dict[str, Any]:
    """Message name (without the package) -> its class."""
    file = descriptor_pb2.FileDescriptorProto(
        name="tlexport/inference.proto", package="inference", syntax="proto3"
    )
    holders: dict[str, Any] = {}
    for name, fields in _FIELDS.items():
        outer, _, inner = name.rpartition(".")
        holders[name] = message = (
            holders[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=inner)
        )
        for number, field in enumerate(filter(None, fields.split(", ")), start=1):
            _add_field(message, f".inference.{name}", number, *field.split(" "))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"inference.{name}")) for name in _FIELDS}


def _add_field(message: Any, full_name: str, number: int, name: str, kind: str) -> None:
    field = message.field.add(
        name=name, number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
    )
    if kind.startswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name=_ONEOF)
        field.oneof_index, kind = 0, kind[1:]
    if kind.startswith("{}"):
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "", 1, "key", "string")
        _add_field(entry, "", 2, "value", kind[2:])
        kind = f"*.{entry.name}"
    if kind.startswith("*"):
        field.label, kind = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED, kind[1:]
    if kind in _SCALARS:
        field.type = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}")
    else:
        field.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f"{full_name}{kind}" if kind.startswith(".") else f".inference.{kind}"


MESSAGES = _built()
