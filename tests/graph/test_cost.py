from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import cost
from tlexport.graph.calibration import calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.graph.trace import trace


def test_mobilenet_has_its_published_operations(metadata: dict[str, str]) -> None:
    """300 M multiply-accumulates (Sandler et al. 2018, MobileNetV2, table 4)."""
    network = torchvision.models.mobilenet_v2().eval()
    graph = trace(
        network,
        (torch.zeros(2, 3, 224, 224),),
        opset=20,
        metadata=metadata,
        input_names=("images",),
        output_name="scores",
    )
    assert sum(cost.macs(graph).values()) == pytest.approx(300.8e6, rel=1e-3)


def _one(
    op: str, shapes: list[tuple[int, ...]], out: tuple[int, ...], **attributes: object
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shapes[0][1:]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *out[1:]])
    weight = numpy_helper.from_array(np.ones(shapes[1], np.float32), "w")
    node = helper.make_node(op, ["x", "w"], ["y"], "product", **attributes)
    return helper.make_model(
        helper.make_graph([node], "g", [x], [y], [weight]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


@pytest.mark.parametrize(
    ("op", "shapes", "out", "attributes", "expected"),
    [
        ("Conv", [(1, 4, 8, 8), (6, 2, 3, 3)], (1, 6, 6, 6), {"group": 2}, 6 * 36 * 2 * 9),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 2, 2)], (1, 3, 10, 10), {"strides": [2, 2]}, 4 * 25 * 3 * 4),
        ("Gemm", [(1, 7), (7, 5)], (1, 5), {}, 35),
        ("Gemm", [(1, 7), (5, 7)], (1, 5), {"transB": 1}, 35),
        ("MatMul", [(1, 3, 7), (7, 5)], (1, 3, 5), {}, 105),
    ],
)
def test_operations_of_each_product(
    op: str,
    shapes: list[tuple[int, ...]],
    out: tuple[int, ...],
    attributes: dict[str, object],
    expected: int,
) -> None:
    assert cost.macs(_one(op, shapes, out, **attributes)) == {"product": expected}


def test_lower_precision_costs_less_and_the_share_counts_operations(
    graph: onnx.ModelProto, photographs: np.ndarray
) -> None:
    ranges = calibrate(graph, [{"images": photographs[:4]}], tensors_to_calibrate(graph, "trt"), method="max")
    stem = "network.conv_stem"
    int8, part = (
        quantize(graph, ranges, "trt"),
        quantize(graph, ranges, "trt", exclude=[stem]),
    )
    macs = cost.macs(graph)
    assert cost.share(int8) == 1 and cost.share(graph) == 0
    assert cost.share(part) == pytest.approx(1 - macs[stem] / sum(macs.values()))
    times = [cost.seconds(g, cost.GPU) for g in (int8, part, to_half(graph, "fp16"), graph)]
    assert times[0] < times[1] < times[3] and times[0] < times[2] < times[3]


def test_a_shape_that_stays_open_is_an_error() -> None:
    model = _one("MatMul", [(1, 3, 7), (7, 5)], (1, 3, 5))
    node = helper.make_node("NonZero", ["x"], ["z"], "open")
    model.graph.node.insert(0, node)
    model.graph.node[1].input[0] = "f"
    model.graph.node.insert(1, helper.make_node("Cast", ["z"], ["f"], "cast", to=TensorProto.FLOAT))
    with pytest.raises(ExportError, match="cannot be counted"):
        cost.macs(model)
