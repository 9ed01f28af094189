"""What the types in a graph say, and a graph that rounds to FP16 where a CPU would compute in FP32 all along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlexport.errors import CompileError

if TYPE_CHECKING:
    import onnx

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Facts:
    half: bool  # some tensor is FP16
    quantized: bool  # there are Q/DQ nodes


def load(path: Path) -> onnx.ModelProto:
    """Read a graph that is one file. Raises CompileError if it is broken or keeps its weights elsewhere."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own, whose package has no types
        raise CompileError(f"{path} is not a readable ONNX file ({error}); export it again") from error
    if not model.graph.node:
        raise CompileError(f"{path} holds no graph; export it again")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise CompileError(f"{path} keeps weights in other files; save it as one file (external_data=False)")
    return model


def require_standard(path: Path, backend: str) -> None:
    """Raise CompileError if the graph holds operators of `ai.onnx.ml` (trees, scalers ...), which only ONNX Runtime has."""
    foreign = sorted({node.op_type for node in load(path).graph.node if node.domain == "ai.onnx.ml"})
    if foreign:
        raise CompileError(
            f"{backend} has no {', '.join(foreign)} (domain ai.onnx.ml); build it for onnxruntime"
        )


def facts(path: Path) -> Facts:
    import onnx

    graph = load(path).graph
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer) or any(
        attribute.i == onnx.TensorProto.FLOAT16
        for node in graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
    )
    return Facts(half, quantized=any(node.op_type == "DequantizeLinear" for node in graph.node))


def node_types(path: Path) -> dict[str, str]:
    """Compute node -> dtype as the graph has it: int8 where both operands come from DequantizeLinear."""
    from onnx import TensorProto

    model = load(path)
    types = _element_types(model)
    names: dict[int, str] = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
    }
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name: "int8" if dequantized.issuperset(node.input[:2]) else names[types[node.input[0]]]
        for node in model.graph.node
        if node.op_type in COMPUTE
    }


def rounding_to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The FP16 graph as an FP32 graph that rounds every tensor to FP16 and back.

    ONNX Runtime's and OpenVINO's CPU code drop the conversions between the FP16 nodes of a graph, so that neither
    rounding nor overflow (65504) shows. Explicit pairs of Cast are kept. Products are summed in FP32 within
    a node, as on tensor cores. Raises CompileError if a tensor's type cannot be inferred.
    """
    import onnx
    from onnx import TensorProto

    types = _element_types(model)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    graph = rounded.graph
    if any(types[value.name] == TensorProto.FLOAT16 for value in [*graph.input, *graph.output]):
        raise CompileError("the graph has FP16 inputs or outputs; its interface must be uint8 and FP32")
    for tensor in graph.initializer:
        _widen(tensor)
    nodes = [piece for node in graph.node for piece in _rounded(node, types)]
    graph.ClearField("node")
    graph.ClearField("value_info")
    graph.node.extend(nodes)
    onnx.checker.check_model(rounded)
    return rounded


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[onnx.NodeProto]:
    """`node` in FP32, then two casts for each of its outputs that was FP16."""
    from onnx import TensorProto, helper

    halves = {name: f"{name}.fp32" for name in node.output if types.get(name) == TensorProto.FLOAT16}
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t"):
            _widen(attribute.t)
    outputs = [halves.get(name, name) for name in node.output]
    node.ClearField("output")
    node.output.extend(outputs)
    yield node
    for name, wide in halves.items():
        yield helper.make_node("Cast", [wide], [f"{name}.fp16"], to=TensorProto.FLOAT16)
        yield helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT)


def _widen(tensor: onnx.TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.FLOAT16:
        wide = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        tensor.CopyFrom(wide)


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> ONNX element type, for every tensor of the graph."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError as error:
        raise CompileError(f"the graph's types cannot be inferred: {error}") from error
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    unknown = [name for node in graph.node for name in node.output if name and not types.get(name)]
    if unknown:
        raise CompileError(
            f"the types of {', '.join(unknown[:5])} cannot be inferred; export to standard ONNX operators"
        )
    return types
