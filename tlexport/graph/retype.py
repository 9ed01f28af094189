"""A graph that takes real numbers where it took whole ones: to ask it what no byte can say."""

from __future__ import annotations

import onnx
from onnx import TensorProto


def taking_floats(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy whose uint8 inputs are float32, cast to the graph's own type where it casts them. None where there is no such
    input, or where something before the Cast takes bytes alone.
    """
    bytes_ = {of.name for of in model.graph.input if of.type.tensor_type.elem_type == TensorProto.UINT8}
    if not bytes_:
        return None
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for of in made.graph.input:
        if of.name in bytes_:
            of.type.tensor_type.elem_type = TensorProto.FLOAT
    known = [of for of in made.graph.value_info if of.type.tensor_type.elem_type != TensorProto.UINT8]
    del made.graph.value_info[:]
    made.graph.value_info.extend(known)
    try:
        onnx.checker.check_model(made, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    return made
