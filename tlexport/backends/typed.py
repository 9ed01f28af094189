"""What the types in a graph say, and a graph that rounds to 16 bits where a CPU would compute in FP32 all along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlexport import origin
from tlexport.errors import CompileError

if TYPE_CHECKING:
    import onnx

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Facts:
    half: bool  # some tensor is FP16 or BF16
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
    model = load(path)
    foreign = [node for node in model.graph.node if node.domain == "ai.onnx.ml"]
    if foreign:
        operators = ", ".join(sorted({node.op_type for node in foreign}))
        where = origin.listed(model, [node.name for node in foreign if origin.module(node)])
        raise CompileError(
            f"{backend} has no {operators} (domain ai.onnx.ml){f': {where}' if where else ''}; build it for onnxruntime"
        )


def modules(path: Path) -> dict[str, str]:
    """Node name -> path of its module in the PyTorch model, for the nodes that know it."""
    return origin.modules(load(path))


def explained(text: str, source: Path | bytes) -> str:
    """A library's refusal of a graph, with the modules of the nodes it mentions (tlexport.origin.explained)."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = parsed(source)
    except DecodeError:  # then that is what the text is about
        return text
    return origin.explained(text, model)


def parsed(source: Path | bytes) -> onnx.ModelProto:
    """The graph without weights that stand in files beside it."""
    import onnx

    return onnx.load_model_from_string(source if isinstance(source, bytes) else source.read_bytes())


def facts(path: Path) -> Facts:
    model = load(path)
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    return Facts(_has_halves(model), quantized)


def _has_halves(model: onnx.ModelProto) -> bool:
    halves = _halves()
    return any(tensor.data_type in halves for tensor in model.graph.initializer) or any(
        attribute.name == "to" and attribute.i in halves
        for node in model.graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
    )


def executable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph that ONNX Runtime's CPU code computes in `model`'s own types: with roundings to 16 bits where it has such."""
    return rounding_to_half(model) if _has_halves(model) else model


def rounding_to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The FP16 or BF16 graph as an FP32 graph that rounds every tensor to that type and back.

    ONNX Runtime's and OpenVINO's CPU code drop the conversions between the FP16 nodes of a graph, so that neither
    rounding nor overflow (65504) shows; BF16 nodes ONNX Runtime has none of. Explicit pairs of Cast are kept, and
    round to the nearest number, ties to even. Products are summed in FP32 within a node, as on tensor cores. Raises
    CompileError if a tensor's type cannot be inferred.
    """
    import onnx

    types = _element_types(model)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    graph = rounded.graph
    halves = _halves()
    if any(types[value.name] in halves for value in [*graph.input, *graph.output]):
        raise CompileError(
            "the graph has FP16 or BF16 inputs or outputs; its interface must be uint8 and FP32"
        )
    for tensor in graph.initializer:
        _widen(tensor, halves)
    nodes = [piece for node in graph.node for piece in _rounded(node, types, halves)]
    graph.ClearField("node")
    graph.ClearField("value_info")
    graph.node.extend(nodes)
    onnx.checker.check_model(rounded)
    return rounded


def _halves() -> dict[int, str]:
    """The 16-bit floats among ONNX's element types, and what a tensor rounded to them is called."""
    from onnx import TensorProto

    return {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def _rounded(node: onnx.NodeProto, types: dict[str, int], halves: dict[int, str]) -> Iterator[onnx.NodeProto]:
    """`node` in FP32, then two casts for each of its outputs that was of 16 bits."""
    from onnx import TensorProto, helper

    narrow = {name: types[name] for name in node.output if types.get(name) in halves}
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in halves:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t"):
            _widen(attribute.t, halves)
    outputs = [f"{name}.fp32" if name in narrow else name for name in node.output]
    node.ClearField("output")
    node.output.extend(outputs)
    yield node
    for name, kind in narrow.items():
        rounded = f"{name}.{halves[kind]}"
        yield helper.make_node("Cast", [f"{name}.fp32"], [rounded], to=kind)
        yield helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT)


def _widen(tensor: onnx.TensorProto, halves: dict[int, str]) -> None:
    from onnx import numpy_helper

    if tensor.data_type in halves:
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
            origin.explained(f"the types of {', '.join(unknown[:5])} cannot be inferred", model)
            + "; export to standard ONNX operators"
        )
    return types
