"""A graph under a later opset, where a type or an attribute needs one."""

from __future__ import annotations

import onnx
from onnx import version_converter

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect


def at_least(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same graph under `opset`, by ONNX's own converter; the argument itself where it is there already.

    Values, nodes, weights and metadata keep their names and order. Raises ExportError where the converter knows no way.
    """
    if (now := inspect.opset(model)) >= opset:
        return model
    try:
        raised = version_converter.convert_version(model, opset)
    except RuntimeError as error:  # what it raises for an operator or a domain that it has no adapter for
        raise ExportError(
            f"the graph cannot be raised from opset {now} to {opset}: {str(error).strip()}; export it with opset {opset}"
        ) from error
    names = [[node.name for node in graph.node] for graph in (raised.graph, model.graph)]
    if names[0] != names[1]:
        raise ExportError(
            f"raising the graph from opset {now} to {opset} changed its nodes; export it with opset {opset}"
        )
    for node, original in zip(raised.graph.node, model.graph.node, strict=True):
        origin.set_module(node, origin.module(original))  # the converter drops it
    return raised
