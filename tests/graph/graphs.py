"""Small graphs whose weights a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


def graph_of(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, np.ndarray],
    shapes: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
) -> onnx.ModelProto:
    """Inputs and outputs float32 [N, *shape], by name; ONNX infers the rest."""
    values = (
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
            for name, shape in each.items()
        ]
        for each in (shapes, outputs)
    )
    made = helper.make_graph(
        list(nodes),
        "g",
        *values,
        [
            numpy_helper.from_array(np.asarray(value, np.float32), name)
            if np.asarray(value).dtype.kind == "f"
            else numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def conv(source: str, weight: str, output: str, bias: str = "", **attributes: object) -> NodeProto:
    return helper.make_node(
        "Conv", [source, weight, *([bias] if bias else [])], [output], output, **attributes
    )


def constants_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def compute(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output, computed as the graph is typed."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(feeds))[0])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference as a share of the expected values' own."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
