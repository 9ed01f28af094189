"""A graph that takes real numbers where it took whole ones: to ask it what no byte can say."""

from __future__ import annotations

import onnx
from onnx import TensorProto


def taking_floats(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy whose uint8 inputs are float32. None where there is none, or where one is read by another node than a Cast.

    A Cast takes any type, so nothing behind it changes.
    """
    bytes_ = {of.name for of in model.graph.input if of.type.tensor_type.elem_type == TensorProto.UINT8}
    readers = {node.op_type for node in model.graph.node if bytes_ & set(node.input)}
    if not bytes_ or readers != {"Cast"}:
        return None
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for of in made.graph.input:
        if of.name in bytes_:
            of.type.tensor_type.elem_type = TensorProto.FLOAT
    return made
