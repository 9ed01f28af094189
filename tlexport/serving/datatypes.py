"""The protocol's datatypes and the elements of one tensor: numpy <-> little-endian bytes, numpy <-> JSON numbers.

Sources: kserve/open-inference-protocol, inference_rest.md, "Tensor Data" and "Tensor Data Types"; Triton's binary tensor data
extension (extension_binary_data.md). BYTES is left out: no graph of this package reads or makes strings.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import TlexportError

NUMPY = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "bfloat16",
}
DATATYPE = {name: datatype for datatype, name in NUMPY.items()}
# Characters of one element in JSON at most, with the comma and the space behind it.
JSON_CHARACTERS = {"bool": 7, "uint8": 5, "int8": 6, "uint16": 7, "int16": 8, "uint32": 12, "int32": 13}
LONGEST_JSON = 27  # -2.2250738585072014e-308 and 64-bit integers
_QUOTED = 80


class ProtocolError(TlexportError):
    """A request that is refused, or an answer that is none: the HTTP status that says so, and the reason.

    `retry_after`: seconds after which another try makes sense, where the refusal is about load.
    """

    def __init__(self, status: int, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after


@functools.cache
def dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype, little-endian, by its name (bfloat16 too). Raises TypeError for an unknown one."""
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name).newbyteorder("<")
    return found


def datatype(array: NDArray[Any]) -> str:
    """The protocol's word for an array's dtype. Raises ProtocolError for one that it has no word for."""
    return _word(array.dtype)


@functools.lru_cache(64)
def _word(kind: np.dtype[Any]) -> str:
    found = DATATYPE.get(
        kind.name
    )  # numpy makes the name anew each time, which takes as long as all the rest of an answer
    if found is None:
        raise ProtocolError(500, f"the protocol has no datatype for {kind.name}")
    return found


def from_bytes(data: Any, offset: int, size: int, name: str, shape: Sequence[int], what: str) -> NDArray[Any]:
    """A tensor of numpy dtype `name` that lies in the buffer `data`; not copied where it is aligned, and read-only then.

    Raises ProtocolError if `size` bytes are not what the shape needs, or if a BOOL is neither 0 nor 1.
    """
    kind = dtype(name)
    needed = math.prod(shape) * kind.itemsize
    if size != needed:
        raise ProtocolError(400, f"{what} has {size} bytes; {list(shape)} of {DATATYPE[name]} are {needed}")
    if name == "bool":
        raw = np.frombuffer(data, np.uint8, size, offset)
        if size and int(raw.max()) > 1:
            raise ProtocolError(400, f"{what} is BOOL and has bytes that are neither 0 nor 1")
        return raw.view(np.bool_).reshape(shape)
    array = np.frombuffer(data, kind, size // kind.itemsize, offset).reshape(shape)
    return array if array.flags.aligned else array.copy()


def to_bytes(array: NDArray[Any]) -> bytes:
    """The elements, row-major and little-endian."""
    if array.dtype.isnative and sys.byteorder == "little":
        return array.tobytes()
    return array.astype(dtype(array.dtype.name), copy=False).tobytes()


def from_numbers(data: object, name: str, shape: Sequence[int], what: str) -> NDArray[Any]:
    """A tensor of numpy dtype `name` from JSON's `data`, nested as `shape` or flat.

    A floating-point tensor takes integers, `NaN`, `Infinity` (as Triton and Python write them) and null, which is NaN: a
    missing value, and true or false among numbers is 1 or 0. Nothing else is converted: no string, no fraction into an
    integer, no number into a BOOL, nothing out of range. Raises ProtocolError.
    """
    if not isinstance(data, list):
        raise ProtocolError(400, f"{what} needs `data` that is an array")
    if _has_text(data):  # numpy would make each element as wide as the longest: gigabytes of a few kilobytes
        raise _of_another_kind(name, what)
    try:
        array = np.asarray(data) if data else np.empty(0, np.int64)
        if name == "uint64" and array.dtype.kind == "f":
            # Of integers on both sides of 2**63 numpy makes fractions; as objects they stay what they are.
            exact = np.asarray(data, object)
            array = exact.astype(np.uint64) if all(type(value) is int for value in exact.flat) else array
    except (ValueError, OverflowError) as error:  # ragged, or an integer beyond every type
        raise ProtocolError(400, f"{what}: `data` is no tensor: {_short(error)}") from error
    if array.shape != tuple(shape) and not (array.ndim == 1 and array.size == math.prod(shape)):
        raise ProtocolError(
            400,
            f"{what} has `data` of shape {_sizes(array.shape)}; wanted: {list(shape)}, or that many in a row",
        )
    return _converted(array, name, what).reshape(shape)


def to_numbers(array: NDArray[Any]) -> list[Any]:
    """The elements in a row, row-major: Python numbers that read back to the same bits."""
    kind = array.dtype.name
    flat = array.reshape(-1)
    if kind in ("float16", "bfloat16"):
        flat = flat.astype(np.float32)
    found: list[Any] = flat.tolist()
    return found


def _has_text(data: list[Any]) -> bool:
    """Whether a string is among the elements, at whatever depth."""
    level = data
    while list in (kinds := set(map(type, level))):
        if str in kinds:
            return True
        level = [element for inner in level if type(inner) is list for element in inner]
    return str in kinds


def _floating(kind: np.dtype[Any]) -> bool:
    return kind.name == "bfloat16" or kind.kind == "f"


def _of_another_kind(name: str, what: str) -> ProtocolError:
    kind = dtype(name)
    wanted = "numbers" if _floating(kind) else "true or false" if kind.kind == "b" else "integers"
    return ProtocolError(400, f"{what} is {DATATYPE[name]}: `data` must hold {wanted} alone")


def _converted(array: NDArray[Any], name: str, what: str) -> NDArray[Any]:
    kind = dtype(name)
    floating = _floating(kind)
    if array.dtype == object and floating and all(_number(value) for value in array.flat):
        try:
            array = array.astype(np.float64)
        except OverflowError as error:
            raise _beyond(name, what) from error
    if array.dtype.kind not in ("fiu" if floating else kind.kind if kind.kind == "b" else "iu"):
        raise _of_another_kind(name, what)
    if not floating and kind.kind != "b" and array.size:
        limits = np.iinfo(kind)
        least, most = int(array.min()), int(array.max())
        if least < limits.min or most > limits.max:
            raise ProtocolError(
                400,
                f"{what} is {DATATYPE[name]}, {limits.min} to {limits.max}; `data` goes from {least} to {most}",
            )
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(kind)
    if floating and not np.array_equal(np.isinf(converted), np.isinf(array.astype(np.float64))):
        raise _beyond(name, what)
    return converted


def _beyond(name: str, what: str) -> ProtocolError:
    return ProtocolError(400, f"{what} is {DATATYPE[name]}: a number in `data` is beyond its range")


def _number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def quoted(value: object) -> str:
    """A value from outside, short enough for an error text."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _sizes(shape: Sequence[int]) -> str:
    return quoted(list(shape[:8]))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:_QUOTED]
