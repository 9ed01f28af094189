"""The protocol over HTTP: what one side writes the other reads, bit for bit; what is wrong is refused with what was right."""

from __future__ import annotations

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from tlexport.serving import datatypes, protocol
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.protocol import Interface
from tlexport.tensors import TensorSpec

MODEL = Interface(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", 2, 3)),
        TensorSpec(name="code", dtype="uint8", shape=("batch",)),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", 2)),
        TensorSpec(name="z", dtype="int64", shape=("batch",)),
    ),
    largest=4,
)


def inputs(samples: int = 2) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    x = chance.standard_normal((samples, 2, 3)).astype(np.float32)
    x.flat[:4] = np.nan, np.inf, -np.inf, -0.0
    return {"x": x, "code": chance.integers(0, 256, samples, dtype=np.uint8)}


def equal_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_arrives_as_it_was_sent(binary: bool) -> None:
    sent = inputs()
    body, length = protocol.encode_request(sent, id='a"b', outputs=["z"], binary=binary, timeout_us=500)
    assert (length is not None) == binary
    for _ in range(2):  # the second time the JSON part is known
        found = protocol.decode_request(body, length, MODEL)
        assert (found.id, found.samples, found.timeout_us) == ('a"b', 2, 500)
        assert found.outputs == (("z", binary),)
        assert all(equal_bits(found.inputs[name], array) for name, array in sent.items())


@pytest.mark.parametrize("binary", [True, False])
def test_an_answer_arrives_as_it_was_sent(binary: bool) -> None:
    request = protocol.decode_request(*protocol.encode_request(inputs(), id="7", binary=binary), MODEL)
    sent = {
        "y": np.array([[np.nan, 1e-45], [-np.inf, 3.4e38]], np.float32),
        "z": np.array([-(2**63), 2**63 - 1]),
    }
    found = protocol.decode_response(*protocol.encode_response("m", "v", request, sent))
    assert (found.model_name, found.model_version, found.id) == ("m", "v", "7")
    assert list(found.outputs) == ["y", "z"]
    assert all(equal_bits(found.outputs[name], array) for name, array in sent.items())


@pytest.mark.parametrize("datatype", list(datatypes.NUMPY))
@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_both_ways(datatype: str, binary: bool) -> None:
    name = datatypes.NUMPY[datatype]
    kind = datatypes.dtype(name)
    if name == "bool":
        array = np.array([[True, False]])
    elif kind.kind in "iu":
        array = np.array([[np.iinfo(kind).min, np.iinfo(kind).max]], kind)
    else:
        limits = ml_dtypes.finfo(kind)
        array = np.array([[limits.smallest_subnormal, limits.max]], kind)
    model = Interface((TensorSpec(name="x", dtype=name, shape=("batch", 2)),), (), 4)
    body, length = protocol.encode_request({"x": array}, binary=binary)
    assert equal_bits(protocol.decode_request(body, length, model).inputs["x"], array)


def test_nested_and_flat_data_are_the_same() -> None:
    sent = inputs()
    tensors = [
        {
            "name": name,
            "datatype": datatypes.datatype(array),
            "shape": list(array.shape),
            "data": array.tolist(),
        }
        for name, array in sent.items()
    ]
    nested = protocol.decode_request(json.dumps({"inputs": tensors}).encode(), None, MODEL)
    assert all(equal_bits(nested.inputs[name], array) for name, array in sent.items())


def test_null_is_a_missing_number() -> None:
    model = Interface((TensorSpec(name="x", dtype="float32", shape=("batch", 2)),), (), 4)
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[null,1]}]}'
    found = protocol.decode_request(body, None, model).inputs["x"]
    assert np.isnan(found[0, 0])
    assert found[0, 1] == 1


def test_null_is_a_member_without_a_value() -> None:
    """As MLServer's client writes its requests."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": None, "data": [1, 2]}
    request = {
        "id": None,
        "parameters": {"timeout": None, "binary_data_output": None, "content_type": None},
        "inputs": [x],
        "outputs": [{"name": "y", "parameters": None}],
    }
    model = Interface(
        (TensorSpec(name="x", dtype="float32", shape=("batch", 2)),),
        (TensorSpec(name="y", dtype="float32", shape=("batch",)),),
        4,
    )
    found = protocol.decode_request(json.dumps(request).encode(), None, model)
    assert (found.id, found.outputs, found.timeout_us) == ("", (("y", False),), None)


def test_long_words_take_no_memory() -> None:
    """numpy would make every element as wide as the longest: here 8 GB."""
    body = edited(data=["x" * 200_000, *[""] * 9_999])
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="numbers alone"):
        protocol.decode_request(body, None, MODEL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * len(body)


def edited(**changes: object) -> bytes:
    """A right request in JSON with its first input or itself changed; None removes a member."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2, 3], "data": [1.0] * 6}
    whole = {
        "id": "1",
        "inputs": [x, {"name": "code", "datatype": "UINT8", "shape": [1], "data": [7]}],
        "outputs": [{"name": "y"}],
    }
    for key, value in changes.items():
        holder = x if key in ("name", "datatype", "shape", "data", "tensor_parameters") else whole
        holder[key.removeprefix("tensor_")] = value
    return json.dumps({k: v for k, v in whole.items() if v is not None}).encode()


def test_the_unchanged_request_is_right() -> None:
    assert protocol.decode_request(edited(), None, MODEL).samples == 1


WRONG = {
    "unknown input": (edited(name="w"), "no input 'w'; the model has: x, code"),
    "input twice": (edited(name="code"), "code"),
    "inputs missing": (edited(inputs=[]), "input x, code is missing"),
    "inputs no array": (edited(inputs={}), "must be an array"),
    "inputs of numbers": (edited(inputs=[1]), "must be an array of objects"),
    "unknown output": (edited(outputs=[{"name": "w"}]), "no output 'w'; the model has: y, z"),
    "output twice": (edited(outputs=[{"name": "y"}, {"name": "y"}]), "given twice"),
    "datatype": (edited(datatype="FP64"), "the model takes FP32"),
    "datatype unhashable": (edited(datatype=[]), "the model takes FP32"),
    "shape": (edited(shape=[1, 3, 2]), r"the model takes \[-1, 2, 3\]"),
    "shape of words": (edited(shape=["1", 2, 3]), "array of integers"),
    "shape negative": (edited(shape=[-1, 2, 3]), "none below 0"),
    "shape huge": (edited(shape=[2**70, 2, 3]), "array of integers"),
    "shape boolean": (edited(shape=[True, 2, 3]), "array of integers"),
    "no samples": (edited(shape=[0, 2, 3], data=[]), "1 to 4"),
    "too many samples": (edited(shape=[5, 2, 3]), "1 to 4"),
    "samples differ": (edited(shape=[2, 2, 3], data=[1.0] * 12), "another input 2"),
    "too few numbers": (edited(data=[1.0] * 5), "that many in a row"),
    "ragged": (edited(data=[[1.0, 2.0], [3.0]]), "no tensor"),
    "words": (edited(data=["1"] * 6), "numbers alone"),
    "a word among rows": (edited(data=[[1.0, 2.0, 3.0], [1.0, "2", 3.0]]), "numbers alone"),
    "an integer beyond every float": (edited(data=[10**400] * 6), "beyond its range"),
    "booleans": (edited(data=[True] * 6), "numbers alone"),
    "beyond range": (edited(data=[1e300] * 6), "beyond its range"),
    "data no array": (edited(data=1.0), "needs `data` that is an array"),
    "id a number": (edited(id=1), "`id` must be a string"),
    "id long": (edited(id="x" * 2000), "at most 1024"),
    "parameters": (edited(parameters=[]), "must be an object"),
    "timeout": (edited(parameters={"timeout": -1}), "timeout is -1"),
    "sequence": (edited(parameters={"sequence_id": 3}), "does not support the parameter sequence_id"),
    "classification": (
        edited(outputs=[{"name": "y", "parameters": {"classification": 2}}]),
        "does not support the parameter classification",
    ),
    "binary flag": (edited(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), "true or false"),
    "data and binary": (edited(tensor_parameters={"binary_data_size": 24}), "both"),
    "not JSON": (b"{", "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "not JSON"),
    "no object": (b"[]", "no JSON object"),
    "nested deeply": (b'{"inputs":' + b"[" * 100_000, "not JSON"),
    "long number": (b'{"inputs":' + b"1" * 10_000, "not JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    body, text = WRONG[name]
    with pytest.raises(ProtocolError, match=text) as refused:
        protocol.decode_request(body, None, MODEL)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("value", "text"),
    [(300, "0 to 255"), (-1, "0 to 255"), (1.5, "integers alone"), (2**80, "integers alone")],
)
def test_integers_are_not_bent(value: object, text: str) -> None:
    body = edited(
        inputs=[
            {"name": "x", "datatype": "FP32", "shape": [1, 2, 3], "data": [0] * 6},
            {"name": "code", "datatype": "UINT8", "shape": [1], "data": [value]},
        ]
    )
    with pytest.raises(ProtocolError, match=text):
        protocol.decode_request(body, None, MODEL)


def test_binary_parts_must_fit() -> None:
    body, length = protocol.encode_request(inputs())
    assert length is not None
    for wrong, text in (
        (body[:-1], "are left in the body"),
        (body + b"x", "1 bytes in the body belong to no input"),
    ):
        with pytest.raises(ProtocolError, match=text):
            protocol.decode_request(wrong, length, MODEL)
    for size in (len(body) + 1, 10**15):
        with pytest.raises(ProtocolError, match="the body has"):
            protocol.decode_request(body, size, MODEL)
    with pytest.raises(ProtocolError, match="not JSON"):
        protocol.decode_request(body, length - 12, MODEL)
    resized = body[:length].replace(b'"binary_data_size":48', b'"binary_data_size":44')
    with pytest.raises(ProtocolError, match=r"44 bytes; \[2, 2, 3\] of FP32 are 48"):
        protocol.decode_request(resized + body[length:], length, MODEL)


def test_a_bool_is_zero_or_one() -> None:
    model = Interface((TensorSpec(name="x", dtype="bool", shape=("batch",)),), (), 4)
    body, length = protocol.encode_request({"x": np.array([True, False])})
    assert length is not None
    with pytest.raises(ProtocolError, match="neither 0 nor 1"):
        protocol.decode_request(body[:length] + b"\2\0", length, model)


def test_limits_hold_the_largest_request_and_little_more() -> None:
    sent = {"x": np.full((4, 2, 3), np.float32(-1.1754943508222875e-38)), "code": np.full(4, 255, np.uint8)}
    for binary, most in ((True, MODEL.largest_binary), (False, MODEL.largest_json)):
        body, _ = protocol.encode_request(sent, binary=binary)
        assert len(body) <= most <= len(body) + protocol.LARGEST_JSON_FRAME + 24 * 27


def test_remembered_frames_are_bounded() -> None:
    for number in range(3 * protocol.MOST_KEPT):
        protocol.decode_request(*protocol.encode_request(inputs(), id=str(number)), MODEL)
    assert len(MODEL.frames) <= protocol.MOST_KEPT


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"outputs":[1]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[1]}]}',
        b'{"outputs":[{"name":"y","datatype":"?","shape":[1],"data":[1]}]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}',
    ],
)
def test_an_answer_that_is_none_is_a_bad_gateway(body: bytes) -> None:
    with pytest.raises(ProtocolError) as refused:
        protocol.decode_response(body, None)
    assert refused.value.status == 502


def test_tritonclient_writes_what_we_read_and_reads_what_we_write() -> None:
    client = pytest.importorskip("tritonclient.http")
    sent = inputs()
    for binary in (True, False):
        given = []
        for name, array in sent.items():
            finite = np.nan_to_num(array) if not binary else array
            tensor = client.InferInput(name, list(array.shape), datatypes.datatype(array))
            given.append(tensor.set_data_from_numpy(finite, binary_data=binary))
        wanted = [client.InferRequestedOutput("y", binary_data=binary)]
        body, length = client.InferenceServerClient.generate_request_body(given, wanted, request_id="q")
        request = protocol.decode_request(body, length, MODEL)
        assert request.id == "q"
        assert all(
            equal_bits(request.inputs[name], np.nan_to_num(array) if not binary else array)
            for name, array in sent.items()
        )
        y = np.array([[1.5, -2.25], [0.1, 3e-9]], np.float32)
        answer, length = protocol.encode_response("m", "v", request, {"y": y})
        found = client.InferenceServerClient.parse_response_body(answer, header_length=length)
        assert equal_bits(found.as_numpy("y"), y)
        assert found.get_response()["id"] == "q"
