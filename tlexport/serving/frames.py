"""The JSON part of a request or an answer: read strictly, and each mistake said with what would have been right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlexport.serving import datatypes
from tlexport.serving.datatypes import ProtocolError, listed, quoted
from tlexport.tensors import TensorSpec

if TYPE_CHECKING:
    from tlexport.serving.protocol import Interface

LONGEST_ID = 1024
LONGEST_TIMEOUT_US = 86_400_000_000  # a day
_UNSUPPORTED = ("classification", "shared_memory_region", "sequence_id")


@dataclass(frozen=True)
class Part:
    """A tensor that the JSON part announces: how many bytes it has in the binary part, or (None) its numbers."""

    name: str
    dtype: str
    shape: Sequence[int]
    size: int | None
    data: object
    what: str


@dataclass(frozen=True)
class Frame:
    """All that the JSON part of a request says."""

    id: str
    parts: tuple[Part, ...]
    samples: int
    outputs: tuple[tuple[str, bool], ...]
    timeout_us: int | None


def read(header: bytes, interface: Interface) -> Frame:
    """Raises ProtocolError (400)."""
    document = _filled_in(document_of(header, 400))
    parameters = _parameters(document, "the request")
    if unsupported := [name for name in _UNSUPPORTED if parameters.get(name)]:
        raise ProtocolError(400, f"this server does not support the parameter {listed(unsupported)}")
    tensors = _named(document.get("inputs"), "inputs", tuple(interface.input))
    if missing := [name for name in interface.input if name not in tensors]:
        raise ProtocolError(
            400, f"input {listed(missing)} is missing; the model reads: {listed(interface.input)}"
        )
    parts, samples = [], 0
    for name, tensor in tensors.items():
        spec, what = interface.input[name], f"input {name!r}"
        shape = shape_of(tensor.get("shape"), what)
        samples = check_tensor(spec, tensor.get("datatype"), shape, samples, interface.largest)
        parts.append(Part(name, spec.dtype, shape, binary_size(tensor, what), tensor.get("data"), what))
    return Frame(
        id=text_of(document, "id", 400),
        parts=tuple(parts),
        samples=samples,
        outputs=_wanted(document.get("outputs"), parameters, interface),
        timeout_us=checked_timeout(parameters.get("timeout")),
    )


@dataclass(frozen=True)
class Answered:
    """All that the JSON part of an answer says."""

    model_name: str
    model_version: str
    id: str
    parts: tuple[Part, ...]
    parameters: Mapping[str, Any]


def answer(header: bytes) -> Answered:
    """Raises ProtocolError (502)."""
    document = _filled_in(document_of(header, 502))
    tensors = document.get("outputs")
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise ProtocolError(502, "the answer has no array `outputs`")
    parts: dict[str, Part] = {}
    for tensor in map(_filled_in, tensors):
        name, what = tensor.get("name"), f"output {quoted(tensor.get('name'))}"
        if not isinstance(name, str) or name in parts:
            raise ProtocolError(502, f"the answer has an output without a name of its own: {quoted(name)}")
        if tensor.get("datatype") not in datatypes.NUMPY:
            raise ProtocolError(502, f"{what} has datatype {quoted(tensor.get('datatype'))}")
        dtype = datatypes.NUMPY[tensor["datatype"]]
        try:
            shape, size = shape_of(tensor.get("shape"), what), binary_size(tensor, what)
        except ProtocolError as error:
            raise ProtocolError(502, f"the answer is not as announced: {error}") from error
        parts[name] = Part(name, dtype, shape, size, tensor.get("data"), what)
    parameters = document.get("parameters")
    return Answered(
        model_name=text_of(document, "model_name", 502),
        model_version=text_of(document, "model_version", 502),
        id=text_of(document, "id", 502),
        parts=tuple(parts.values()),
        parameters=parameters if isinstance(parameters, dict) else {},
    )


def check_tensor(spec: TensorSpec, datatype: object, shape: Sequence[int], samples: int, largest: int) -> int:
    """The number of samples in a tensor that fits `spec`; `samples`, if not 0, is what the tensors before it had.

    Raises ProtocolError (400) that names the datatype and the shape which the model takes.
    """
    wanted = datatypes.DATATYPE[spec.dtype]
    if datatype != wanted:
        raise ProtocolError(
            400, f"input {spec.name!r} has datatype {quoted(datatype)}; the model takes {wanted}"
        )
    found = shape[0] if shape else 0
    if list(spec.at(found)) != list(shape):
        takes = [-1 if isinstance(d, str) else d for d in spec.shape]
        raise ProtocolError(
            400, f"input {spec.name!r} has shape {quoted(list(shape[:8]))}; the model takes {takes}"
        )
    if not 1 <= found <= largest:
        raise ProtocolError(400, f"input {spec.name!r} has {found} samples; a request has 1 to {largest}")
    if samples and samples != found:
        raise ProtocolError(400, f"input {spec.name!r} has {found} samples, another input {samples}")
    return found


def checked_timeout(value: object) -> int | None:
    """Triton's `timeout` in microseconds; 0 is none. Raises ProtocolError (400)."""
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= LONGEST_TIMEOUT_US:
        raise ProtocolError(
            400, f"the parameter timeout is {quoted(value)}; it is an integer of microseconds, at most a day"
        )
    return value or None


def document_of(header: bytes, status: int) -> dict[str, Any]:
    try:
        document = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(status, f"the body is not JSON: {quoted(str(error))}") from error
    if not isinstance(document, dict):
        raise ProtocolError(status, "the body is no JSON object")
    return document


def _parameters(holder: Mapping[str, Any], what: str) -> dict[str, Any]:
    found = holder.get("parameters", {})
    if not isinstance(found, dict):
        raise ProtocolError(400, f"`parameters` of {what} must be an object")
    return _filled_in(found)


def _named(tensors: object, what: str, known: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Name -> tensor of a request's `inputs` or `outputs`; each name is known and given once."""
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise ProtocolError(400, f"`{what}` must be an array of objects")
    found: dict[str, dict[str, Any]] = {}
    for tensor in map(_filled_in, tensors):
        name = tensor.get("name")
        if not isinstance(name, str) or name not in known:
            raise ProtocolError(400, f"no {what[:-1]} {quoted(name)}; the model has: {listed(known)}")
        if name in found:
            raise ProtocolError(400, f"{what[:-1]} {name!r} is given twice")
        found[name] = tensor
    return found


def _wanted(
    outputs: object, parameters: Mapping[str, Any], interface: Interface
) -> tuple[tuple[str, bool], ...]:
    default = _flag(parameters, "binary_data_output", default=False)
    if outputs is None or outputs == []:
        return tuple((name, default) for name in interface.output_names)
    wanted = []
    for name, tensor in _named(outputs, "outputs", interface.output_names).items():
        own = _parameters(tensor, f"output {name!r}")
        if unsupported := [word for word in _UNSUPPORTED if own.get(word)]:
            raise ProtocolError(400, f"this server does not support the parameter {listed(unsupported)}")
        wanted.append((name, _flag(own, "binary_data", default=default)))
    return tuple(wanted)


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(400, f"the parameter {name} is {quoted(value)}; it is true or false")
    return value


def shape_of(shape: object, what: str) -> list[int]:
    if not isinstance(shape, list) or not all(type(d) is int and 0 <= d < 1 << 63 for d in shape):
        raise ProtocolError(
            400, f"{what} has shape {quoted(shape)}; it is an array of integers, none below 0"
        )
    return shape


def binary_size(tensor: Mapping[str, Any], what: str) -> int | None:
    """How many bytes behind the JSON are the tensor's; None if its numbers are in the JSON."""
    size = _parameters(tensor, what).get("binary_data_size")
    if size is None:
        if "data" not in tensor:
            raise ProtocolError(400, f"{what} has neither `data` nor the parameter binary_data_size")
        return None
    if type(size) is not int or size < 0:
        raise ProtocolError(400, f"{what} has binary_data_size {quoted(size)}; it is a number of bytes")
    if "data" in tensor:
        raise ProtocolError(400, f"{what} has both `data` and binary_data_size")
    return size


def text_of(document: Mapping[str, Any], name: str, status: int) -> str:
    value = document.get(name, "")
    if not isinstance(value, str) or len(value) > LONGEST_ID:
        raise ProtocolError(status, f"`{name}` must be a string of at most {LONGEST_ID} characters")
    return value


def _filled_in(holder: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is written as null: KServe's server and MLServer's client do that with every field without a value."""
    return {name: value for name, value in holder.items() if value is not None}
