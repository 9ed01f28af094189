"""Open Inference Protocol v2 over HTTP, both directions: JSON, and Triton's binary tensors behind the JSON.

Sources: kserve/open-inference-protocol, inference_rest.md; Triton's extension_binary_data.md (`binary_data_size`,
`binary_data`, `binary_data_output`, the header Inference-Header-Content-Length) and its request parameter `timeout` in
microseconds (extension_schedule_policy.md).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from tlexport.serving import datatypes, frames
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.frames import Frame
from tlexport.tensors import TensorSpec

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "schedule_policy")
LARGEST_JSON_FRAME = 64 << 10  # all of a request's JSON but its numbers
LONGEST_KEPT, MOST_KEPT = 2048, 64  # bytes of a JSON part that is remembered, and how many are

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Interface:
    """What a model reads and makes. Symbolic dimensions are the number of samples, of which a request has 1 to `largest`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    largest: int
    # JSON parts seen before: a client's are alike but for its tensors, and reading one anew costs more than all else.
    frames: dict[bytes, Frame] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def input(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    @functools.cached_property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    @functools.cached_property
    def largest_binary(self) -> int:
        """Bytes of the largest sensible request with binary tensors."""
        sizes = (math.prod(s.at(self.largest)) * datatypes.dtype(s.dtype).itemsize for s in self.inputs)
        return LARGEST_JSON_FRAME + sum(sizes)

    @functools.cached_property
    def largest_json(self) -> int:
        """Bytes of the largest sensible request whose tensors are JSON numbers."""
        longest = datatypes.LONGEST_JSON
        sizes = (
            math.prod(s.at(self.largest)) * datatypes.JSON_CHARACTERS.get(s.dtype, longest)
            for s in self.inputs
        )
        return LARGEST_JSON_FRAME + sum(sizes)


@dataclass(frozen=True)
class Request:
    """A decoded request: input name -> array [samples, ...] of the model's dtype."""

    id: str
    inputs: Tensors
    samples: int
    outputs: tuple[
        tuple[str, bool], ...
    ]  # name and whether its tensor is wanted in binary, in the order wanted
    timeout_us: int | None = None  # from the arrival; None: the server's own


@dataclass(frozen=True)
class Response:
    """A decoded answer: output name -> array."""

    model_name: str
    model_version: str
    id: str
    outputs: Tensors
    parameters: Mapping[str, Any] = field(default_factory=dict)


def encode_request(
    inputs: Tensors,
    *,
    id: str = "",
    outputs: Sequence[str] = (),
    binary: bool = True,
    timeout_us: int | None = None,
) -> tuple[bytes, int | None]:
    """The body of an inference request, and the length of its JSON part (None: it is all JSON).

    `binary` sends the tensors, and asks for the outputs, as bytes. The JSON part is padded so that the first tensor is aligned.
    """
    parameters: dict[str, Any] = {} if timeout_us is None else {"timeout": timeout_us}
    if binary and not outputs:
        parameters["binary_data_output"] = True
    members = [f'"id":{_string(id)}'] if id else []
    if parameters:
        members.append(f'"parameters":{json.dumps(parameters)}')
    tensors, parts = _tensors(inputs, dict.fromkeys(inputs, binary))
    members.append(f'"inputs":[{tensors}]')
    if outputs:
        wanted = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
        members.append(f'"outputs":{json.dumps(wanted)}')
    return _framed(members, parts)


def decode_request(body: bytes, header_length: int | None, interface: Interface) -> Request:
    """Raises ProtocolError (400) that says what is wrong and what the model would have taken."""
    header, binary = _parts(body, header_length, 400)
    frame = interface.frames.get(header)
    if frame is None:
        frame = frames.read(header, interface)
        if len(header) <= LONGEST_KEPT and all(part.size is not None for part in frame.parts):
            if len(interface.frames) >= MOST_KEPT:
                interface.frames.clear()
            interface.frames[header] = frame
    inputs, left = _arrays(frame.parts, binary)
    if left:
        raise ProtocolError(400, f"{left} bytes in the body belong to no input")
    return Request(frame.id, inputs, frame.samples, frame.outputs, frame.timeout_us)


def encode_response(
    model_name: str, model_version: str, request: Request, outputs: Tensors
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON part (None: it is all JSON).

    Non-finite values in JSON are `NaN`, `Infinity` and `-Infinity`, as Triton writes them; binary tensors need no such words.
    """
    members = [f'"model_name":{_string(model_name)}', f'"model_version":{_string(model_version)}']
    if request.id:
        members.append(f'"id":{_string(request.id)}')
    wanted = dict(request.outputs)
    tensors, parts = _tensors({name: outputs[name] for name in wanted}, wanted)
    members.append(f'"outputs":[{tensors}]')
    return _framed(members, parts)


def decode_response(body: bytes, header_length: int | None) -> Response:
    """Raises ProtocolError (502) if the body is no answer of the protocol."""
    header, binary = _parts(body, header_length, 502)
    said = (frames.answer if len(header) > LONGEST_KEPT else _kept_answer)(header)
    try:
        outputs, left = _arrays(said.parts, binary)
    except ProtocolError as error:
        raise ProtocolError(502, f"the answer is not as announced: {error}") from error
    if left:
        raise ProtocolError(502, f"{left} bytes of the answer belong to no output")
    return Response(said.model_name, said.model_version, said.id, outputs, said.parameters)


_kept_answer = functools.lru_cache(MOST_KEPT)(frames.answer)  # answers to one client's requests are alike


def error_body(reason: str) -> bytes:
    return json.dumps({"error": reason}).encode()


def error_reason(body: bytes) -> str:
    """What an error body says; its start, if it is none of the protocol's."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("error"), str):
        return str(document["error"])
    return body[:200].decode("utf-8", "replace")


def _parts(body: bytes, header_length: int | None, status: int) -> tuple[bytes, memoryview]:
    """The JSON part, and the bytes behind it."""
    size = len(body) if header_length is None else header_length
    if not 0 <= size <= len(body):
        raise ProtocolError(status, f"{HEADER_LENGTH} is {size}, the body has {len(body)} bytes")
    return body[:size], memoryview(body)[size:]


def _arrays(parts: Sequence[frames.Part], binary: memoryview) -> tuple[dict[str, NDArray[Any]], int]:
    """Name -> array of what a frame announces, and how many bytes of the binary part are left over. Raises ProtocolError (400)."""
    found, offset = {}, 0
    for part in parts:
        if part.size is None:
            found[part.name] = datatypes.from_numbers(part.data, part.dtype, part.shape, part.what)
            continue
        if part.size > len(binary) - offset:
            raise ProtocolError(
                400,
                f"{part.what} has binary_data_size {part.size}, but {len(binary) - offset} bytes are left in the body",
            )
        found[part.name] = datatypes.from_bytes(binary, offset, part.size, part.dtype, part.shape, part.what)
        offset += part.size
    return found, len(binary) - offset


def _tensors(arrays: Tensors, binary: Mapping[str, bool]) -> tuple[str, list[bytes]]:
    """The JSON of the tensors, and the bytes of those that are sent in binary. Text by hand: a third of json.dumps's time."""
    found, parts = [], []
    for name, array in arrays.items():
        if binary[name]:
            parts.append(datatypes.to_bytes(array))
            values = f'"parameters":{{"binary_data_size":{len(parts[-1])}}}'
        else:
            values = f'"data":{json.dumps(datatypes.to_numbers(array))}'
        shape = ",".join(map(str, array.shape))
        kind = datatypes.datatype(array)
        found.append(f'{{"name":{_string(name)},"datatype":"{kind}","shape":[{shape}],{values}}}')
    return ",".join(found), parts


@functools.lru_cache(256)
def _string(text: str) -> str:
    return json.dumps(text)


def _framed(members: list[str], parts: list[bytes]) -> tuple[bytes, int | None]:
    header = f"{{{','.join(members)}}}".encode()
    if not parts:
        return header, None
    header += b" " * (-len(header) % 8)
    return b"".join([header, *parts]), len(header)
