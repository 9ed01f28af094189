from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from graphs import compute, constants_of, conv, error, graph_of
from onnx import helper

from tlexport.errors import ExportError
from tlexport.graph import patches, rounding
from tlexport.graph.bias import correct_biases
from tlexport.graph.calibration import Range, calibrate
from tlexport.graph.quantize import Flavour, quantize, tensors_to_calibrate
from tlexport.graph.rounding import learn_rounding

Run = Callable[..., np.ndarray]
FLAVOURS: tuple[Flavour, ...] = ("trt", "cpu")


def _weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _correlated(count: int, channels: int, *size: int, seed: int) -> np.ndarray:
    """Channels that follow a few causes, as those of a trained network do: float32 [count, channels, *size]."""
    causes = np.maximum(np.random.default_rng(seed).standard_normal((count, 3, *size)), 0)
    mixing = np.random.default_rng(99).uniform(0, 1, (channels, 3))
    noise = np.random.default_rng(seed + 1).standard_normal((count, channels, *size))
    return (np.einsum("ck,nk...->nc...", mixing, causes) + 0.1 * noise).astype(np.float32)


PRODUCTS = {
    "strided and padded": (conv("x", "w", "y", strides=[2, 1], pads=[0, 1, 2, 1]), (8, 6, 3, 3), (9, 7)),
    "grouped and dilated": (conv("x", "w", "y", group=2, dilations=[1, 2]), (8, 3, 3, 2), (9, 7)),
    "depthwise, same padding": (conv("x", "w", "y", group=6, auto_pad="SAME_LOWER"), (12, 1, 4, 3), (9, 7)),
    "one dimension": (conv("x", "w", "y"), (5, 6, 4), (30,)),
    "gemm": (helper.make_node("Gemm", ["x", "w", "b"], ["y"], "y", transB=1), (8, 6), ()),
}


def _model(kind: str) -> onnx.ModelProto:
    node, shape, size = PRODUCTS[kind]
    outputs = (shape[0], *[None] * len(size))
    return graph_of(
        [node], {"w": _weight(*shape), "b": _weight(shape[0], seed=1)}, {"x": (6, *size)}, {"y": outputs}
    )


def _feeds(kind: str) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    size = PRODUCTS[kind][2]
    counts = (40, 1, 23) if size else (400, 1, 230)
    return (
        [{"x": _correlated(n, 6, *size, seed=n)} for n in counts],
        {"x": _correlated(counts[0], 6, *size, seed=500)},
    )


def _ranges(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], flavour: Flavour) -> dict[str, Range]:
    return calibrate(model, feeds, tensors_to_calibrate(model, flavour), method="max")


@pytest.mark.parametrize("kind", PRODUCTS)
def test_patches_times_rows_are_the_product(kind: str) -> None:
    node, shape, _ = PRODUCTS[kind]
    model, (_, feed) = _model(kind), _feeds(kind)
    expected = compute(model, feed)
    if len(node.input) == 3:
        expected = expected - constants_of(model)["b"]
    weight = constants_of(model)["w"]
    chosen = patches.places(feed["x"], node, shape[2:], 5, seed=3)
    assert len(set(chosen)) == len(chosen) == min(5, math.prod(expected.shape[2:]))
    rows = patches.rows_of(weight, node)
    found = patches.patches(feed["x"], node, shape[2:], chosen) @ rows.transpose(0, 2, 1)
    flat = expected.reshape(len(expected), shape[0], -1)[:, :, chosen]
    wanted = flat.reshape(len(expected), len(rows), -1, len(chosen)).transpose(1, 0, 3, 2)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-4)
    np.testing.assert_array_equal(patches.like(weight, rows, node), weight)


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_learnt_rounding_beats_nearest_on_samples_it_has_not_seen(
    kind: str, flavour: Flavour, reduce_range: bool
) -> None:
    model, (feeds, unseen) = _model(kind), _feeds(kind)
    before = model.SerializeToString(deterministic=True)
    result = learn_rounding(model, feeds, _ranges(model, feeds, flavour), flavour, reduce_range=reduce_range)
    assert model.SerializeToString(deterministic=True) == before
    constants = {**constants_of(model), "w": _dequantised(model, reduce_range)}
    rounded = graph_of(model.graph.node, constants, {"x": (6, *PRODUCTS[kind][2])}, {})
    rounded.graph.output.extend(model.graph.output)
    expected = compute(model, unseen)
    less = 0.97 if "depthwise" in kind else 0.85  # white noise at 12 places leaves little to cancel
    # In FP32 graphs, so that what is compared is the weights' error alone.
    assert error(compute(result, unseen), expected) < less * error(compute(rounded, unseen), expected)
    old, new = (_integers(each, reduce_range) for each in (model, result))
    assert 0 < np.abs(new - old).max() <= 1
    largest = np.abs(constants_of(model)["w"].reshape(len(old), -1)).max(axis=1)
    np.testing.assert_array_equal(
        np.abs(constants_of(result)["w"].reshape(len(old), -1)).max(axis=1), largest
    )


def _quantised(model: onnx.ModelProto, reduce_range: bool) -> dict[str, np.ndarray]:
    return constants_of(
        quantize(model, {"x": Range(-1, 1), "y": Range(-1, 1)}, "trt", reduce_range=reduce_range)
    )


def _integers(model: onnx.ModelProto, reduce_range: bool) -> np.ndarray:
    return _quantised(model, reduce_range)["w_quantized"].astype(int)


def _dequantised(model: onnx.ModelProto, reduce_range: bool) -> np.ndarray:
    found = _quantised(model, reduce_range)
    integers = found["w_quantized"].astype(np.float32)
    return integers * found["w_scale"].reshape(-1, *[1] * (integers.ndim - 1))


def test_what_keeps_nearest_rounding() -> None:
    """A shared weight; a dead channel; a channel whose bias sets the scale; a layer that is not named."""
    shared, dead, other = _weight(6, 6, seed=1), _weight(6, 6, seed=2), _weight(6, 6, seed=3)
    dead[:, 2], dead[:, 4] = 0, dead[:, 4] * 1e-8
    nodes = [
        helper.make_node("MatMul", ["x", "shared"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "shared"], ["c"], "second"),
        helper.make_node("Gemm", ["c", "dead", "b"], ["d"], "third"),
        helper.make_node("MatMul", ["d", "other"], ["y"], "fourth"),
    ]
    constants = {"shared": shared, "dead": dead, "other": other, "b": np.full(6, 100, np.float32)}
    model = graph_of(nodes, constants, {"x": (6,)}, {"y": (6,)})
    feeds = [{"x": _correlated(300, 6, seed=4)}]
    ranges = _ranges(model, feeds, "cpu")
    found = constants_of(learn_rounding(model, feeds, ranges, "cpu", layers=["third", "second"]))
    np.testing.assert_array_equal(found["shared"], shared)
    np.testing.assert_array_equal(found["other"], other)
    np.testing.assert_array_equal(found["dead"][:, [2, 4]], dead[:, [2, 4]])
    assert not np.array_equal(found["dead"][:, 3], dead[:, 3])


def test_a_trained_network_comes_nearer_and_takes_corrected_biases_too(
    graph: onnx.ModelProto, photographs: np.ndarray, run: Run, cosine: Run
) -> None:
    seen, unseen = photographs[::2], photographs[1::2]
    feeds = [{"images": seen[:12]}]
    ranges = calibrate(graph, feeds, tensors_to_calibrate(graph, "trt"), method="percentile")
    layers = [
        "network.conv_stem",
        *(f"network.blocks.{n}.0.{part}" for n in (0, 1, 2) for part in ("conv_dw", "conv_pw")),
    ]
    result = learn_rounding(graph, feeds, ranges, "trt", layers=layers, iterations=150)
    both = correct_biases(result, feeds, ranges, "trt", reference=graph)
    far = [
        1 - cosine(run(quantize(each, ranges, "trt"), unseen), run(graph, unseen)).mean()
        for each in (graph, result, both)
    ]
    assert far[2] < far[1] < far[0]
    integers = [
        {
            k: v
            for k, v in constants_of(quantize(each, ranges, "trt")).items()
            if k.endswith("weight_quantized")
        }
        for each in (result, both)
    ]
    assert all(np.array_equal(value, integers[1][name]) for name, value in integers[0].items())


def test_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (feeds, _) = _model("gemm"), _feeds("gemm")
    ranges = _ranges(model, feeds, "trt")
    with pytest.raises(ExportError, match="learning to round got no samples"):
        learn_rounding(model, [], ranges, "trt")
    with pytest.raises(ExportError, match=r"no product .* is named nowhere \(there are: y \.\.\.\)"):
        learn_rounding(model, feeds, ranges, "trt", layers=["nowhere"])
    true = rounding._Layer.weights
    monkeypatch.setattr(
        rounding._Layer, "weights", lambda self, q: true(self, np.roll(q, 1, axis=2))
    )  # planted
    with pytest.raises(ExportError, match="weights of 'y' are quantised to other integers than those learnt"):
        learn_rounding(model, feeds, ranges, "trt")


def test_the_same_arguments_give_the_same_weights() -> None:
    model, (feeds, _) = _model("one dimension"), _feeds("one dimension")
    ranges = _ranges(model, feeds, "trt")
    torch.manual_seed(1)
    first = learn_rounding(model, feeds, ranges, "trt")
    torch.manual_seed(2)
    assert learn_rounding(model, feeds, ranges, "trt") == first
