from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from tlexport.errors import ExportError
from tlexport.graph import inspect
from tlexport.graph.versions import at_least


def test_a_raised_graph_is_the_same_graph(graph: onnx.ModelProto) -> None:
    raised = at_least(graph, 22)
    assert inspect.opset(raised) == 22 and inspect.opset(graph) == 20
    assert raised.graph.node == graph.graph.node
    assert raised.graph.initializer == graph.graph.initializer
    assert raised.metadata_props == graph.metadata_props
    assert inspect.io(raised) == inspect.io(graph)
    assert at_least(raised, 20) is raised


def test_what_no_opset_knows_is_not_raised() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Frobnicate", ["x"], ["y"], "f")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(ExportError, match=r"from opset 20 to 22.*export it with opset 22"):
        at_least(model, 22)
