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


def _factors(first: int, second: int) -> onnx.ModelProto:
    """One MatMul of two constants [4, 4] of these types, each through DequantizeLinear unless it is a float."""
    nodes, constants = [], [numpy_helper.from_array(np.float32(1), "one")]
    for name, kind in (("a", first), ("b", second)):
        stored = helper.tensor_dtype_to_np_dtype(kind)
        constants.append(numpy_helper.from_array(np.eye(4).astype(stored), name))
        if kind != TensorProto.FLOAT:
            nodes.append(helper.make_node("DequantizeLinear", [name, "one"], [f"{name}d"], f"dq_{name}"))
    reads = ["a" if first == TensorProto.FLOAT else "ad", "b" if second == TensorProto.FLOAT else "bd"]
    nodes.append(helper.make_node("MatMul", reads, ["y"], "product"))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])
    graph = helper.make_graph(nodes, "g", [], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FN, "fp8"),
        (TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN, "fp32"),
        (TensorProto.INT8, TensorProto.FLOAT8E4M3FN, "fp32"),
        (TensorProto.FLOAT, TensorProto.INT4, "int4"),
        (TensorProto.UINT4, TensorProto.FLOAT, "int4"),
        (TensorProto.INT8, TensorProto.INT4, "fp32"),
        (TensorProto.FLOAT, TensorProto.INT8, "fp32"),
        (TensorProto.INT8, TensorProto.UINT8, "int8"),
    ],
)
def test_what_two_factors_make(first: int, second: int, dtype: str) -> None:
    assert inspect.compute_dtypes(_factors(first, second)) == {"product": dtype}


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
