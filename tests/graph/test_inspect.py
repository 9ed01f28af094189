from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect


def _product(
    weight_type: type[np.generic] = np.int8, *, layout: bool = False, float_data: bool = False
) -> onnx.ModelProto:
    """One MatMul of activations [N, 4] and a [4, 4] weight, both through Q/DQ unless told otherwise."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "one"], ["wd"], "dqw"),
        helper.make_node("Transpose", ["wd"], ["wt"], "transpose"),
        helper.make_node("MatMul", ["x" if float_data else "xd", "wt" if layout else "wd"], ["y"], "product"),
    ]
    constants = {"one": np.float32(1), "zero": np.uint8(0), "w": np.eye(4, dtype=weight_type)}
    graph = helper.make_graph(
        [node for node in nodes if layout or node.op_type != "Transpose"],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_int8_needs_both_factors_from_8_bits() -> None:
    assert inspect.compute_dtypes(_product()) == {"product": "int8"}
    assert inspect.compute_dtypes(_product(layout=True)) == {"product": "int8"}
    assert inspect.compute_dtypes(_product(float_data=True)) == {"product": "fp32"}
    assert inspect.compute_dtypes(_product(np.int16)) == {"product": "fp32"}


def test_a_real_graph_is_fp32(graph: onnx.ModelProto) -> None:
    assert list(inspect.compute_dtypes(graph).values()) == ["fp32"] * 50


def test_summary(graph: onnx.ModelProto) -> None:
    summary = inspect.summary(graph)
    assert summary.opset == 20
    assert summary.nodes["Conv"] + summary.nodes["Gemm"] == 50
    assert (
        4_600_000 < summary.parameters < 4_660_000
    )  # EfficientNet-Lite0 has 4.65 million, BatchNorm's included
    assert summary.bytes["float32"] == pytest.approx(4 * summary.parameters, rel=1e-4)
    assert inspect.summary(_product()).bytes == {"float32": 4, "uint8": 1, "int8": 16}


def test_types_that_do_not_fit_together() -> None:
    model = _product()
    model.graph.node.append(helper.make_node("Add", ["x", "xq"], ["sum"], "add"))
    with pytest.raises(ExportError, match="do not fit together"):
        inspect.element_types(model)


def test_loadable() -> None:
    model = _product()
    inspect.require_loadable(model)
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ExportError, match="not valid"):
        inspect.require_loadable(model)
