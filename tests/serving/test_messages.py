"""The protocol over gRPC: messages built at run time mean what the protocol's generated ones mean."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("google.protobuf")

from tlexport.serving import messages
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.messages import MESSAGES
from tlexport.serving.protocol import Interface
from tlexport.tensors import TensorSpec

MODEL = Interface(
    (TensorSpec(name="x", dtype="float32", shape=("batch", 2)),),
    (TensorSpec(name="y", dtype="float16", shape=("batch",)),),
    4,
)
X = np.array([[1.5, np.nan], [-0.0, 3.4e38]], np.float32)


def wired(message: object, name: str) -> object:
    return MESSAGES[name].FromString(message.SerializeToString())  # type: ignore[attr-defined]


def test_a_request_arrives_as_it_was_sent() -> None:
    sent = messages.encode_request("m", {"x": X}, model_version="v", id="i", outputs=["y"], timeout_us=9)
    message = wired(sent, "ModelInferRequest")
    assert (message.model_name, message.model_version) == ("m", "v")  # type: ignore[attr-defined]
    found = messages.decode_request(message, MODEL)
    assert (found.id, found.samples, found.outputs, found.timeout_us) == ("i", 2, (("y", True),), 9)
    assert found.inputs["x"].tobytes() == X.tobytes()


def test_an_answer_arrives_as_it_was_sent() -> None:
    request = messages.decode_request(messages.encode_request("m", {"x": X}, id="i"), MODEL)
    y = np.array([6e-8, np.inf], np.float16)
    answer = wired(messages.encode_response("m", "v", request, {"y": y}), "ModelInferResponse")
    found = messages.decode_response(answer)
    assert (found.model_name, found.model_version, found.id) == ("m", "v", "i")
    assert found.outputs["y"].dtype == np.float16
    assert found.outputs["y"].tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("dtype", "field", "numbers"),
    [
        ("bool", "bool_contents", [True, False]),
        ("int8", "int_contents", [-128, 127]),
        ("int64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("uint16", "uint_contents", [0, 65535]),
        ("uint64", "uint64_contents", [0, 2**64 - 1]),
        ("float32", "fp32_contents", [0.5, -1e-45]),
        ("float64", "fp64_contents", [0.5, 5e-324]),
    ],
)
def test_typed_contents(dtype: str, field: str, numbers: list) -> None:
    from tlexport.serving.datatypes import DATATYPE

    model = Interface((TensorSpec(name="x", dtype=dtype, shape=("batch",)),), (), 4)
    message = MESSAGES["ModelInferRequest"]()
    tensor = message.inputs.add(name="x", datatype=DATATYPE[dtype], shape=[2])
    getattr(tensor.contents, field).extend(numbers)
    found = messages.decode_request(message, model).inputs["x"]
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, np.array(numbers, dtype))


def change(**changes: object) -> object:
    message = messages.encode_request("m", {"x": X})
    tensor = message.inputs[0]
    for name, value in changes.items():
        if name == "raw":
            del message.raw_input_contents[:]
            message.raw_input_contents.extend(value)
        elif name == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        elif name == "contents":
            tensor.contents.fp32_contents.extend(value)
        elif name == "integers":
            tensor.contents.int_contents.extend(value)
        elif name == "again":
            message.inputs.add().CopyFrom(tensor)
        elif name == "output":
            message.outputs.add(name=value)
        elif name == "timeout":
            message.parameters["timeout"].int64_param = value
        elif name == "id":
            message.id = value
        else:
            setattr(tensor, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "w"}, "no input 'w'; the model has: x"),
        ({"again": True}, "given twice"),
        ({"output": "w"}, "no output 'w'; the model has: y"),
        ({"datatype": "FP16"}, "the model takes FP32"),
        ({"shape": [2, 3]}, "the model takes"),
        ({"shape": [-1, 2]}, "1 to 4"),
        ({"raw": [b"\0" * 15]}, "15 bytes"),
        ({"raw": [b"\0" * 16, b""]}, "2 raw_input_contents for 1 inputs"),
        ({"contents": [1.0] * 4}, "beside raw_input_contents"),
        ({"raw": [], "contents": [1.0] * 3}, "has 3 numbers"),
        ({"raw": []}, "has 0 numbers"),
        ({"raw": [], "integers": [1] * 4}, "belong in fp32_contents"),
        ({"timeout": -5}, "timeout is -5"),
        ({"id": "x" * 2000}, "at most 1024"),
    ],
)
def test_what_is_wrong_is_said(changes: dict, text: str) -> None:
    with pytest.raises(ProtocolError, match=text) as refused:
        messages.decode_request(change(**changes), MODEL)
    assert refused.value.status == 400


def test_half_precision_must_come_raw() -> None:
    model = Interface((TensorSpec(name="x", dtype="float16", shape=("batch",)),), (), 4)
    message = MESSAGES["ModelInferRequest"]()
    message.inputs.add(name="x", datatype="FP16", shape=[1]).contents.fp32_contents.append(1.0)
    with pytest.raises(ProtocolError, match="raw contents"):
        messages.decode_request(message, model)


def test_the_default_pool_stays_free_for_others() -> None:
    """A generated client registers the same names there, and two files with one name are refused."""
    code = (
        "import tlexport.serving.messages\n"
        "from google.protobuf import descriptor_pool\n"
        "try:\n    descriptor_pool.Default().FindMessageTypeByName('inference.ModelInferRequest')\n"
        "except KeyError:\n    print('free')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "free"
