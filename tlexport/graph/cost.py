"""What a graph costs by operations and bytes: a model, for where a target cannot be timed. It is never called a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
from onnx import NodeProto, helper

from tlexport.errors import ExportError
from tlexport.graph import inspect

WIDTH = {"int4": 0.5, "int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}  # bytes a value


@dataclass(frozen=True)
class Machine:
    """Peak rates of one machine: operations a second by dtype (a multiply-accumulate is two), bytes a second."""

    name: str
    operations: dict[str, float]
    bandwidth: float


# NVIDIA's L4 datasheet (2023): dense rates, which are half of the ones it states for sparse matrices.
GPU = Machine(
    "roofline of an NVIDIA L4",
    {"fp32": 30.3e12, "fp16": 121e12, "bf16": 121e12, "int8": 242e12, "fp8": 242e12, "int4": 121e12},
    300e9,
)
# Two cores with AVX-512 at 2.6 GHz: 64 FP32 operations a cycle and core, four times as many with VNNI.
CPU = Machine(
    "roofline of two AVX-512 VNNI cores",
    {dtype: 2 * 2.6e9 * 64 * (4 if dtype == "int8" else 1) for dtype in WIDTH},
    20e9,
)


def macs(model: onnx.ModelProto) -> dict[str, int]:
    """Name of each Conv, ConvTranspose, Gemm and MatMul -> multiply-accumulates for one sample.

    Raises ExportError if a product's shapes are not known once the batch is.
    """
    shapes = _shapes(model)
    return {node.name: _macs(node, shapes) for node in model.graph.node if node.op_type in inspect.COMPUTE}


def share(model: onnx.ModelProto, dtype: str = "int8") -> float:
    """Share of the multiply-accumulates that the graph computes in `dtype`, 0 to 1."""
    counted, dtypes = macs(model), inspect.compute_dtypes(model)
    return sum(n for name, n in counted.items() if dtypes[name] == dtype) / max(sum(counted.values()), 1)


def seconds(model: onnx.ModelProto, machine: Machine) -> float:
    """Time of one sample by the roofline (Williams et al. 2009): each product takes the longer of computing and moving.

    A product moves its two factors in its own dtype and its output in FP32; all other nodes are taken to be fused.
    """
    shapes, dtypes = _shapes(model), inspect.compute_dtypes(model)
    total = 0.0
    for node in model.graph.node:
        if node.op_type not in inspect.COMPUTE:
            continue
        dtype = dtypes[node.name]
        values = sum(math.prod(shapes[name]) for name in node.input[:2])
        moved = WIDTH.get(dtype, 4) * values + 4 * math.prod(shapes[node.output[0]])
        rate = machine.operations.get(dtype, machine.operations["fp32"])
        total += max(2 * _macs(node, shapes) / rate, moved / machine.bandwidth)
    return total


def _macs(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    first, second, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":  # weight [out, in / groups, ...]: each output value sums over one filter
        return math.prod(out) * math.prod(second[1:])
    if (
        node.op_type == "ConvTranspose"
    ):  # weight [in, out / groups, ...]: each input value is spread over one filter
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(out) * first[0 if transposed else 1]
    return math.prod(out) * first[-1]


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Value -> its shape at batch 1. Raises ExportError naming a product whose shape stays open."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.HasField("dim_param"):
                dimension.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in inspect.COMPUTE:
            for name in (*node.input[:2], node.output[0]):
                if name not in shapes:
                    raise ExportError(
                        f"the shape of {name!r} at {node.op_type} {node.name!r} is not known, so its operations "
                        f"cannot be counted (inputs: {', '.join(v.name + helper.printable_type(v.type) for v in model.graph.input)})"
                    )
    return shapes
