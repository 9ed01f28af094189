from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect
from tlexport.graph.cast import FLUSHED, to_fp16

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def half(graph: onnx.ModelProto) -> onnx.ModelProto:
    return to_fp16(graph)


def _mlp(first: np.ndarray, *, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """uint8 [N, 4] -> Cast -> MatMul -> Relu -> MatMul, whose output is the graph's."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], "cast", to=dtype),
        helper.make_node("MatMul", ["x", "first"], ["hidden"], "first"),
        helper.make_node("Relu", ["hidden"], ["active"], "relu"),
        helper.make_node("MatMul", ["active", "second"], ["probabilities"], "second"),
    ]
    numbers = helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"first": first, "second": np.eye(4)}
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 4])],
        [helper.make_tensor_value_info("probabilities", dtype, ["batch", 4])],
        [numpy_helper.from_array(weight.astype(numbers), name) for name, weight in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_compute_node_is_fp16(graph: onnx.ModelProto, half: onnx.ModelProto) -> None:
    dtypes = inspect.compute_dtypes(half)
    assert dtypes.keys() == inspect.compute_dtypes(graph).keys()
    assert set(dtypes.values()) == {"fp16"}
    assert half.ByteSize() < 0.51 * graph.ByteSize()


def test_inputs_outputs_and_metadata_are_kept(graph: onnx.ModelProto, half: onnx.ModelProto) -> None:
    assert inspect.io(half) == inspect.io(graph)
    assert inspect.metadata(half).items() >= inspect.metadata(graph).items()


def test_normalisation_and_softmax_stay_fp32(half: onnx.ModelProto) -> None:
    types = inspect.element_types(half)
    inputs = {node.op_type: types[node.input[0]] for node in half.graph.node}
    stem = next(node for node in half.graph.node if node.name == "network.conv_stem")
    producer = next(node for node in half.graph.node if stem.input[0] in node.output)
    assert inputs["Softmax"] == TensorProto.FLOAT
    assert producer.op_type == "Cast"
    assert types[producer.input[0]] == TensorProto.FLOAT
    assert inspect.summary(half).nodes["Cast"] == 3  # from uint8, to FP16, back to FP32


def test_the_error_is_that_of_fp16(
    graph: onnx.ModelProto, half: onnx.ModelProto, run: Run, cosine: Run, photographs: np.ndarray
) -> None:
    nearness = cosine(run(half, photographs), run(graph, photographs)).min()
    assert 0.998 < nearness < 0.999999  # 1 would mean that nothing was rounded


def test_a_transformer(transformer: onnx.ModelProto, run: Run, photographs: np.ndarray) -> None:
    half = to_fp16(transformer)
    assert list(inspect.compute_dtypes(half).values()) == ["fp16"] * (1 + 2 * 6 + 1)
    expected = run(transformer, photographs)
    assert expected.std(axis=0).max() > 0.01
    assert np.abs(run(half, photographs) - expected).max() < 0.01


def test_the_argument_is_left_alone(graph: onnx.ModelProto) -> None:
    before = graph.SerializeToString(deterministic=True)
    to_fp16(graph)
    assert graph.SerializeToString(deterministic=True) == before


def test_an_output_that_comes_from_a_compute_node_is_cast_back(run: Run) -> None:
    half = to_fp16(_mlp(np.eye(4) * 1.5))
    images = np.array([[0, 1, 2, 255]], np.uint8)
    assert inspect.io(half)[1][0].dtype == "float32"
    np.testing.assert_array_equal(run(half, images), images * np.float32(1.5))


@pytest.mark.parametrize("value", [7e4, -7e4, np.nan])
def test_a_weight_that_fp16_cannot_hold_is_named(value: float) -> None:
    weight = np.eye(4)
    weight[2, 1] = value
    with pytest.raises(ExportError, match=r"beyond that or NaN: first \(largest (7e\+04|nan)\)"):
        to_fp16(_mlp(weight))


def test_weights_that_become_zero_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    weight = np.eye(4)
    weight[0, 1:3] = 1e-9
    assert inspect.metadata(to_fp16(_mlp(weight)))[FLUSHED] == "2"
    assert "2 weights are too small" in caplog.text
    assert FLUSHED not in inspect.metadata(to_fp16(_mlp(np.eye(4))))


def test_only_fp32_graphs_are_cast(half: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="this one has fp16"):
        to_fp16(half)
    with pytest.raises(ExportError, match="this one has fp64"):
        to_fp16(_mlp(np.eye(4), dtype=TensorProto.DOUBLE))


def test_scales_of_resize_stay_fp32(run: Run) -> None:
    """ONNX types them as float32 whatever the data is."""
    model = _mlp(np.eye(4))
    resize = helper.make_node("Resize", ["hidden", "", "scales"], ["larger"], "resize", mode="nearest")
    model.graph.node.insert(2, resize)
    model.graph.node[3].input[0] = "larger"
    model.graph.node[4].input[1] = "wide"
    scales = np.array([1, 2], np.float32)
    wide = np.repeat(np.eye(4, dtype=np.float32), 2, axis=0)
    model.graph.initializer.extend(
        [numpy_helper.from_array(scales, "scales"), numpy_helper.from_array(wide, "wide")]
    )
    images = np.array([[1, 2, 3, 4]], np.uint8)
    np.testing.assert_array_equal(run(to_fp16(model), images), 2.0 * images)
