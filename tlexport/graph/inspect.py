"""What a graph holds: its inputs and outputs, its metadata, and the precision every compute node is typed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.tensors import TensorSpec

QUANTISABLE = ("Conv", "Gemm", "MatMul")
COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")

NO_PRODUCTS = "the graph multiplies no matrices (no Conv, Gemm or MatMul), so there is nothing to turn into {}; it runs as it is, as fp32"

_LAYOUT_ONLY = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_PRECISION: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
}
_FEWER_BITS: dict[int, str] = {  # what DequantizeLinear reads
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
}


class Summary(BaseModel):
    """A graph's size. `parameters` and `bytes` count every initialiser, scales and shape constants included."""

    model_config = ConfigDict(frozen=True)

    opset: int
    nodes: dict[str, int]  # operator -> count, most frequent first
    parameters: int
    bytes: dict[str, int]  # numpy's dtype name -> bytes


def compute_dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each Conv, ConvTranspose, Gemm and MatMul -> `fp32`, `fp16`, `bf16`, `int8`, `fp8` or `int4` (rarely `fp64`, `int32` ...).

    A node is `int8` (`fp8`) if both its factors come from 8-bit integers (floats) through DequantizeLinear, with nothing
    but layout changes (Reshape, Transpose ...) in between, and `int4` if one comes from 4-bit integers and the other is a
    float: weights are stored in 4 bits, and the product is computed in floats. Else it computes in the type of its
    output. A graph of trees has none.
    """
    if all(node.op_type not in COMPUTE for node in model.graph.node):
        return {}  # a tree or a linear model in operators of its own, whose types ONNX does not always infer
    types = element_types(model)
    producers = {output: node for node in model.graph.node for output in node.output}
    dtypes: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in COMPUTE:
            stored = sorted(_dequantised(factor, producers, types) for factor in node.input[:2])
            one = stored[0] == stored[1] in ("int8", "fp8") or stored == ["", "int4"]
            dtypes[node.name] = stored[1] if one else _PRECISION[types[node.output[0]]]
    return dtypes


def io(model: onnx.ModelProto) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [_spec(value) for value in model.graph.input if value.name not in constants]
    return inputs, [_spec(value) for value in model.graph.output]


def summary(model: onnx.ModelProto) -> Summary:
    sizes: Counter[str] = Counter()
    parameters = 0
    for tensor in model.graph.initializer:
        elements = int(np.prod(tensor.dims, dtype=np.int64))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        parameters += elements
        sizes[str(dtype)] += elements * dtype.itemsize
    return Summary(
        opset=opset(model),
        nodes=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        parameters=parameters,
        bytes=dict(sizes),
    )


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The model's own key-value pairs: class names, preprocessing, task, opset, version of tlexport."""
    return {entry.key: entry.value for entry in model.metadata_props}


def opset(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Name of every value -> its TensorProto data type, by ONNX's own inference.

    Raises ExportError if the graph's types contradict each other or a node's output cannot be typed.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        told = origin.explained(str(error).strip(), model)
        raise ExportError(f"the graph's types and shapes do not fit together: {told}") from error
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    untyped = [node.name for node in graph.node for output in node.output if output and not types.get(output)]
    if untyped:
        raise ExportError(f"ONNX cannot tell the output type of {origin.listed(model, untyped)}")
    return types


def require_nodes(dtypes: Mapping[str, str], names: Collection[str]) -> None:
    """Raise ExportError if one of `names` is none of the compute nodes, the keys of `dtypes`."""
    if unknown := sorted(set(names) - set(dtypes)):
        raise ExportError(
            f"no compute node is named {', '.join(unknown)} (there are: {', '.join(list(dtypes)[:8])} ...)"
        )


def require_valid(model: onnx.ModelProto) -> None:
    """Raise ExportError unless ONNX's checker accepts the graph."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph is not valid: {str(error).strip().splitlines()[0]}") from error


def require_fp32(model: onnx.ModelProto, step: str) -> None:
    """Raise ExportError, naming the step, if any product of the graph computes in another type."""
    if wrong := sorted(set(compute_dtypes(model).values()) - {"fp32"}):
        raise ExportError(f"{step} starts from an FP32 graph; this one computes in {', '.join(wrong)}")


def require_loadable(model: onnx.ModelProto) -> None:
    """Raise ExportError unless ONNX's checker and ONNX Runtime both accept the graph."""
    import onnxruntime as ort

    require_valid(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors share no narrower base
        told = origin.explained(str(error).strip().splitlines()[0], model)
        raise ExportError(f"the graph is not valid: {told}") from error


def _dequantised(value: str, producers: dict[str, onnx.NodeProto], types: dict[str, int]) -> str:
    """The precision that a factor was stored in before a DequantizeLinear; empty if none made it, or one of other types."""
    node = producers.get(value)
    while node is not None and node.op_type in _LAYOUT_ONLY:
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return ""
    return _FEWER_BITS.get(types[node.input[0]], "")


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
        shape=tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or (f"free_{axis}" if axis else "batch")
            for axis, d in enumerate(tensor.shape.dim)
        ),
    )
