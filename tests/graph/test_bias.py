from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graphs import compute, constants_of, conv, error, graph_of
from onnx import helper

from tlexport.errors import ExportError
from tlexport.graph import bias
from tlexport.graph.bias import correct_biases
from tlexport.graph.calibration import Range, calibrate
from tlexport.graph.quantize import Flavour, quantize, tensors_to_calibrate

Run = Callable[..., np.ndarray]
FLAVOURS: tuple[Flavour, ...] = ("trt", "cpu")


def _positive(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 1, shape).astype(np.float32)


def _rounded_down(*shape: int) -> np.ndarray:
    """Weights 0.4 of a step above their integers, but for the first of each row, which sets the step: rounding is biased."""
    integers = np.random.default_rng(0).integers(-90, 90, shape)
    weight = (integers + 0.4) / 127
    weight.reshape(shape[0], -1)[:, 0] = 1
    return weight.astype(np.float32)


def _ranges(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], flavour: Flavour) -> dict[str, Range]:
    return calibrate(model, feeds, tensors_to_calibrate(model, flavour), method="max")


def _channel_shift(found: np.ndarray, expected: np.ndarray, axis: int) -> float:
    others = tuple(d for d in range(found.ndim) if d != axis % found.ndim)
    return float(np.abs((found - expected).mean(axis=others)).max() / expected.std())


NODES = {
    "convolution without a bias": ([conv("x", "w", "y", strides=[2, 2], pads=[1, 0, 0, 1])], (8, 4, 3, 3), 1),
    "depthwise": ([conv("x", "w", "y", group=4)], (4, 1, 3, 3), 1),
    "grouped, with its bias": ([conv("x", "w", "y", bias="b", group=2)], (8, 2, 3, 3), 1),
    "behind a Relu": (
        [conv("x", "w", "a"), helper.make_node("Relu", ["a"], ["y"], "relu")],
        (8, 4, 3, 3),
        1,
    ),
    "matrix without a bias": ([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], (5, 6), -1),
    "matrix, the bias behind": (
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
            helper.make_node("Add", ["b", "a"], ["y"], "add"),
        ],
        (5, 6),
        -1,
    ),
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", NODES)
def test_biased_rounding_shifts_the_mean_and_correction_repairs_it(kind: str, flavour: Flavour) -> None:
    nodes, shape, axis = NODES[kind]
    weight = _rounded_down(*shape) if axis == 1 else _rounded_down(*shape[::-1]).T
    channels = shape[0] if axis == 1 else shape[1]
    constants = {"w": weight} | (
        {"b": _positive(channels, seed=2)} if any("b" in n.input for n in nodes) else {}
    )
    size, outputs = ((4, 9, 7), (channels, None, None)) if axis == 1 else ((3, 5), (3, 6))
    model = graph_of(nodes, constants, {"x": size}, {"y": outputs})
    seen, unseen = ([{"x": _positive(n, *size, seed=n)} for n in sizes] for sizes in ((40, 1, 20), (50,)))
    ranges = _ranges(model, seen, flavour)
    before = model.SerializeToString(deterministic=True)
    result = correct_biases(model, seen, ranges, flavour)
    assert model.SerializeToString(deterministic=True) == before
    expected = compute(model, unseen[0])
    plain, corrected = (compute(quantize(each, ranges, flavour), unseen[0]) for each in (model, result))
    assert _channel_shift(plain, expected, axis) > 0.01
    assert _channel_shift(corrected, expected, axis) < 0.3 * _channel_shift(plain, expected, axis)
    assert error(corrected, expected) < error(plain, expected)


def test_a_bias_that_two_products_share_becomes_two() -> None:
    nodes = [
        conv("x", "v", "a", bias="b"),
        conv("x", "w", "c", bias="b"),
        helper.make_node("Add", ["a", "c"], ["y"], "sum"),
    ]
    constants = {"v": _rounded_down(6, 4, 3, 3), "w": -_rounded_down(6, 4, 3, 3), "b": _positive(6, seed=4)}
    model = graph_of(nodes, constants, {"x": (4, 5, 5)}, {"y": (6, 3, 3)})
    feeds = [{"x": _positive(20, 4, 5, 5, seed=5)}]
    found = constants_of(correct_biases(model, feeds, _ranges(model, feeds, "trt"), "trt"))
    assert (
        (found["a/bias"] - constants["b"] > 0).mean()
        > 0.8
        > 0.2
        > (found["c/bias"] - constants["b"] > 0).mean()
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_trained_network_comes_nearer_on_unseen_samples(
    graph: onnx.ModelProto, photographs: np.ndarray, run: Run, cosine: Run, flavour: Flavour
) -> None:
    seen, unseen = photographs[::2], photographs[1::2]
    feeds = [{"images": seen[:12]}]
    ranges = calibrate(graph, feeds, tensors_to_calibrate(graph, flavour), method="percentile")
    result = correct_biases(graph, feeds, ranges, flavour, exclude=["network.conv_stem"])
    plain, corrected = (
        1
        - cosine(
            run(quantize(each, ranges, flavour, exclude=["network.conv_stem"]), unseen), run(graph, unseen)
        ).mean()
        for each in (graph, result)
    )
    assert corrected < 0.8 * plain
    changed = {
        name
        for name, value in constants_of(graph).items()
        if not np.array_equal(value, constants_of(result)[name])
    }
    assert "network.classifier.bias" in changed
    assert not any("stem" in name for name in changed) and not any(
        name.endswith("weight") for name in changed
    )


def test_attention_of_two_activations_has_no_bias(
    transformer: onnx.ModelProto, photographs: np.ndarray
) -> None:
    feeds = [{"images": photographs[:6]}]
    ranges = calibrate(transformer, feeds, tensors_to_calibrate(transformer, "trt"), method="max")
    result = correct_biases(transformer, feeds, ranges, "trt")
    assert len(result.graph.node) == len(transformer.graph.node)  # every matrix has an Add of its own already
    quantize(result, ranges, "trt")


def test_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, shape, _ = NODES["depthwise"]
    model = graph_of(nodes, {"w": _rounded_down(*shape)}, {"x": (4, 9, 7)}, {"y": (4, 7, 5)})
    feeds = [{"x": _positive(4, 4, 9, 7, seed=1)}]
    ranges = _ranges(model, feeds, "trt")
    with pytest.raises(ExportError, match="bias correction got no samples"):
        correct_biases(model, [], ranges, "trt")
    with pytest.raises(ExportError, match="1 of 1 tensors have no calibrated range"):
        correct_biases(model, feeds, {}, "trt")
    true = bias._corrections
    monkeypatch.setattr(
        bias, "_corrections", lambda *a: [-each for each in true(*a)]
    )  # planted: the wrong sign
    with pytest.raises(ExportError, match="left the mean outputs of 1 products further from FP32's"):
        correct_biases(model, feeds, ranges, "trt")
