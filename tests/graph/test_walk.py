from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import compute, conv, graph_of
from onnx import TensorProto, helper

from tlexport.graph.walk import Walk


def _model() -> onnx.ModelProto:
    """Two inputs; `a` is read at once and again at the end."""
    weight = np.random.default_rng(0).standard_normal((4, 2, 3, 3)).astype(np.float32)
    nodes = [
        conv("x", "w", "a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Add", ["b", "offset"], ["c"], "add"),
        helper.make_node("Sigmoid", ["c"], ["d"], "gate"),
        helper.make_node("Mul", ["d", "a"], ["y"], "mul"),
    ]
    return graph_of(nodes, {"w": weight}, {"x": (2, 5, 6), "offset": (4, 1, 1)}, {"y": (4, 5, 6)})


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [
        {
            "x": generator.standard_normal((n, 2, 5, 6)).astype(np.float32),
            "offset": generator.standard_normal((n, 4, 1, 1)).astype(np.float32),
        }
        for n in (3, 1)
    ]


def test_piece_by_piece_is_the_whole(batches: list[dict[str, np.ndarray]]) -> None:
    walk = Walk(_model(), batches)
    for output in ("a", "c", "c", "y"):
        walk.through(output)
    for values, batch in zip(walk.values, batches, strict=True):
        np.testing.assert_allclose(values["y"], compute(_model(), batch), rtol=1e-5, atol=1e-6)


def test_only_what_is_still_to_be_read_is_kept(batches: list[dict[str, np.ndarray]]) -> None:
    walk = Walk(_model(), batches)
    walk.through("b")
    assert set(walk.values[0]) == {"a", "b", "offset"}
    assert walk.before("y").name == "mul"
    assert set(walk.values[1]) == {"a", "d"}
    assert set(batches[0]) == {"x", "offset"}


def test_a_tensor_changed_on_the_way_changes_what_follows(batches: list[dict[str, np.ndarray]]) -> None:
    walk = Walk(_model(), batches)
    walk.through("a")
    for values in walk.values:
        values["a"] = np.zeros_like(values["a"])
    walk.through("y")
    assert not any(values["y"].any() for values in walk.values)


def test_what_a_branch_reads_is_kept(batches: list[dict[str, np.ndarray]]) -> None:
    model = _model()
    branches = {
        f"{kind}_branch": helper.make_graph(
            [helper.make_node("Add", ["a", "b"], [f"{kind}_out"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)],
        )
        for kind in ("then", "else")
    }
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(helper.make_node("If", ["always"], ["z"], "if", **branches))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    walk = Walk(model, batches)
    walk.through("y")
    assert {"a", "b", "y"} <= set(walk.values[0])
    walk.through("z")
    np.testing.assert_allclose(walk.values[0]["z"], compute_last(model, batches[0]), rtol=1e-5, atol=1e-6)


def compute_last(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    last = onnx.ModelProto()
    last.CopyFrom(model)
    del last.graph.output[0]
    return compute(last, feeds)
