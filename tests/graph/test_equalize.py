from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import compute, constants_of, conv, error, graph_of
from onnx import helper

from tlexport.errors import ExportError
from tlexport.graph import probe, rescaling
from tlexport.graph.calibration import calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.equalize import equalize, regions
from tlexport.graph.quantize import Flavour, quantize, tensors_to_calibrate

FLAVOURS: tuple[Flavour, ...] = ("trt", "cpu")


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


LOUD = np.array([300, 1, 1, 1, 0.5, 1, 2, 1], np.float32)  # of 8 channels
IMAGES = _random(6, 3, 9, 7, seed=1)


def _outlier(
    reader: onnx.NodeProto, weight: np.ndarray, channels: int, between: str = "Relu"
) -> onnx.ModelProto:
    """Conv with one loud channel of 8, which the reader hardly weighs -> `between` -> the reader."""
    first = _random(8, 3, 3, 3, seed=2) * LOUD[:, None, None, None]
    constants = {"first": first, "term": _random(8, seed=3), "second": weight}
    if between == "Clip":
        constants |= {"zero": np.float32(0), "six": np.float32(6)}
        middle = helper.make_node("Clip", ["a", "zero", "six"], ["b"], "between")
    else:
        middle = helper.make_node(between, ["a"], ["b"], "between")
    nodes = [conv("images", "first", "a", "term", strides=[2, 1]), middle, reader]
    return graph_of(nodes, constants, {"images": (3, 9, 7)}, {"y": (channels, None, None)})


def _quiet(weight: np.ndarray) -> np.ndarray:
    """The reader's weights, small where its input is loud."""
    return (weight / LOUD[:, None, None]).astype(np.float32)


READERS = {
    "plain": (conv("b", "second", "y", dilations=[2, 1]), _quiet(_random(5, 8, 2, 3, seed=4)), 5),
    "depthwise": (
        conv("b", "second", "y", group=8),
        _random(8, 1, 3, 3, seed=5) / LOUD.reshape(8, 1, 1, 1),
        8,
    ),
    "two for each": (
        conv("b", "second", "y", group=8),
        _random(16, 1, 2, 2, seed=6) / LOUD.repeat(2).reshape(16, 1, 1, 1),
        16,
    ),
    "grouped": (
        conv("b", "second", "y", group=4),
        (_random(12, 2, 2, 1, seed=7).reshape(4, 3, 2, 2, 1) / LOUD.reshape(4, 1, 2, 1, 1)).reshape(
            12, 2, 2, 1
        ),
        12,
    ),
}


def _spoilt(model: onnx.ModelProto, flavour: Flavour, feeds: list[dict[str, np.ndarray]]) -> float:
    ranges = calibrate(model, feeds, tensors_to_calibrate(model, flavour), method="max")
    found = [compute(quantize(model, ranges, flavour), each) for each in feeds]
    return error(np.concatenate(found), np.concatenate([compute(model, each) for each in feeds]))


@pytest.mark.parametrize("between", ["Relu", "LeakyRelu", "Identity"])
@pytest.mark.parametrize("kind", READERS)
def test_one_loud_channel_spoils_and_equalisation_repairs(kind: str, between: str) -> None:
    node, weight, channels = READERS[kind]
    model = _outlier(node, weight, channels, between)
    feeds = [{"images": IMAGES}]
    result = equalize(model, feeds)
    assert error(compute(result, feeds[0]), compute(model, feeds[0])) < 1e-5
    assert _spoilt(result, "trt", feeds) < 0.5 * _spoilt(model, "trt", feeds)
    if kind == "plain":
        assert _spoilt(model, "trt", feeds) > 0.1 > 0.03 > _spoilt(result, "trt", feeds)


def test_relu6_is_not_homogeneous_and_left_alone() -> None:
    node, weight, channels = READERS["plain"]
    model = _outlier(node, weight, channels, "Clip")
    assert regions(model) == []
    assert equalize(model, [{"images": IMAGES}]) == model


def test_residual_sums_pooling_and_constants_are_one_region() -> None:
    """x = pool(stem); x += block(x); y = head(x + term): all that meets in the sums has one factor."""
    nodes = [
        conv("images", "stem", "a"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MaxPool", ["b"], ["c"], "pool", kernel_shape=[2, 2]),
        conv("c", "block", "d", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "d"], ["e"], "sum"),
        helper.make_node("Sub", ["e", "term"], ["f"], "difference"),
        conv("f", "head", "y"),
    ]
    constants = {
        "stem": _random(8, 3, 3, 3, seed=2) * LOUD[:, None, None, None],
        "block": _random(8, 8, 3, 3, seed=8) * 0.1 * LOUD[:, None, None, None] / LOUD[:, None, None],
        "term": np.float32(0.5),
        "head": _quiet(_random(4, 8, 1, 1, seed=9)),
    }
    model = graph_of(nodes, constants, {"images": (3, 9, 7)}, {"y": (4, None, None)})
    (region,) = regions(model)
    assert set(region.tensors) == {"a", "b", "c", "d", "e", "f"}
    assert (set(region.producers), set(region.readers)) == ({"a", "d"}, {"d", "y"})
    feeds = [{"images": IMAGES}]
    result = equalize(model, feeds)
    assert constants_of(result)["term"].shape == (1, 8, 1, 1)
    assert _spoilt(result, "trt", feeds) < 0.5 * _spoilt(model, "trt", feeds)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_and_matmul_with_the_bias_behind(transposed: int) -> None:
    first, second = _random(6, 8, seed=1) * LOUD, _random(8, 3, seed=2) / LOUD[:, None]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], "first"),
        helper.make_node("Add", ["a", "term"], ["b"], "add"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("Gemm", ["c", "second"], ["y"], "second", transB=transposed, alpha=0.5),
    ]
    constants = {"first": first, "term": _random(8, seed=3), "second": second.T if transposed else second}
    model = graph_of(nodes, constants, {"x": (6,)}, {"y": (3,)})
    feeds = [{"x": _random(50, 6, seed=4)}, {"x": _random(1, 6, seed=5)}]
    result = equalize(model, feeds)
    assert _spoilt(result, "trt", feeds) < 0.3 * _spoilt(model, "trt", feeds)
    assert _spoilt(result, "cpu", feeds) < 0.3 * _spoilt(model, "cpu", feeds)


@pytest.mark.parametrize("reason", ["shared weight", "output", "concatenation", "unquantised reader"])
def test_what_cannot_take_up_a_factor_is_left_alone(reason: str) -> None:
    node, weight, channels = READERS["plain"]
    model = _outlier(node, weight, channels)
    if reason == "output":
        model.graph.output.append(helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None))
    else:
        other = {
            "shared weight": conv("b", "second", "z", dilations=[2, 1]),
            "concatenation": helper.make_node("Concat", ["b", "b"], ["z"], "cat", axis=1),
            "unquantised reader": helper.make_node("Sigmoid", ["b"], ["z"], "gate"),
        }[reason]
        model.graph.node.append(other)
        model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    assert regions(model) == []


def test_two_inputs_and_a_dead_channel() -> None:
    first = _random(8, 3, 3, 3, seed=2) * LOUD[:, None, None, None]
    first[2] = 0
    nodes = [
        conv("left", "first", "a"),
        conv("right", "other", "b"),
        helper.make_node("Add", ["a", "b"], ["c"], "sum"),
        helper.make_node("Relu", ["c"], ["d"], "relu"),
        conv("d", "second", "y"),
    ]
    second = _quiet(_random(5, 8, 1, 1, seed=4))
    second[:, 4] = 0
    other = _random(8, 3, 3, 3, seed=6)
    other[2] = 0
    model = graph_of(
        nodes,
        {"first": first, "other": other, "second": second},
        {"left": (3, 5, 5), "right": (3, 5, 5)},
        {"y": (5, 3, 3)},
    )
    feeds = [
        {"left": _random(1, 3, 5, 5, seed=n), "right": _random(1, 3, 5, 5, seed=n + 9)} for n in range(4)
    ]
    result = equalize(model, feeds)
    assert all(np.isfinite(value).all() for value in constants_of(result).values())
    assert _spoilt(result, "trt", feeds) < 0.5 * _spoilt(model, "trt", feeds)


def test_the_argument_is_left_alone_and_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    node, weight, channels = READERS["plain"]
    model = _outlier(node, weight, channels)
    before = model.SerializeToString(deterministic=True)
    equalize(model, [{"images": IMAGES}])
    assert model.SerializeToString(deterministic=True) == before
    with pytest.raises(ExportError, match="no samples"):
        equalize(model, [])
    with pytest.raises(ExportError, match=r"from 0 to 1, not 1\.5"):
        equalize(model, [{"images": IMAGES}], alpha=1.5)
    with pytest.raises(
        ExportError, match="equalisation starts from an FP32 graph; this one computes in fp16"
    ):
        equalize(to_half(model, "fp16"), [{"images": IMAGES}])


def test_a_factor_that_one_side_does_not_take_up_is_caught() -> None:
    node, weight, channels = READERS["plain"]
    model = _outlier(node, weight, channels)
    (region,) = regions(model)
    region.readers.clear()  # planted: nobody undoes the division
    broken = rescaling.rescaled(model, [(region, np.full(8, 1.01))])
    with pytest.raises(
        ExportError, match=r"equalisation changed the FP32 output 'y' by 1.0e-02 of its spread"
    ):
        probe.require_same_outputs(model, broken, [{"images": IMAGES}], "equalisation")
    nothing = onnx.ModelProto()
    nothing.CopyFrom(model)
    nothing.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(
            np.full((8, 3, 3, 3), np.nan, np.float32), nothing.graph.initializer[0].name
        )
    )
    with pytest.raises(ExportError, match="equalisation made NaN or infinity in 'y'"):
        probe.require_same_outputs(model, nothing, [{"images": IMAGES}], "equalisation")
