from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import entropy

from tlexport.errors import ExportError
from tlexport.graph import histogram as histograms
from tlexport.graph.calibration import FIXED, Method, Range, calibrate, calibrate_each
from tlexport.graph.grid import Flavour, of_activation
from tlexport.graph.histogram import BINS, Histogram
from tlexport.graph.quantize import quantize, tensors_to_calibrate

Run = Callable[..., np.ndarray]


def _batches(images: np.ndarray, size: int) -> Iterator[dict[str, np.ndarray]]:
    yield from ({"images": images[start : start + size]} for start in range(0, len(images), size))


def _identity(operator: str = "Relu") -> onnx.ModelProto:
    """float32 [N, M] -> `operator` -> float32 [N, M]: lets a test choose the activations."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["images"], ["y"], "node")],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", "m"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "m"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_max_is_the_exact_range(graph: onnx.ModelProto, photographs: np.ndarray) -> None:
    names = tensors_to_calibrate(graph, "cpu")
    ranges = calibrate(graph, _batches(photographs[:10], 4), names, method="max")
    observed = onnx.ModelProto()
    observed.CopyFrom(graph)
    observed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    session = ort.InferenceSession(observed.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = session.run(names, {"images": photographs[:10]})
    assert len(names) > 50
    for name, values in zip(names, whole, strict=True):
        np.testing.assert_allclose(ranges[name], (values.min(), values.max()), rtol=1e-4, atol=1e-5)


def test_a_growing_histogram_equals_one_made_at_once() -> None:
    generator = np.random.default_rng(0)
    parts = [(generator.standard_normal((50, 40)) * scale).astype(np.float32) for scale in (0, 0.1, 1, 30, 5)]
    histogram = Histogram()
    for part in parts:
        assert histogram.observe(part, counts=True)
    whole = np.concatenate(parts)
    expected, _ = np.histogram(np.abs(whole), bins=BINS, range=(0, histogram.limit))
    assert histogram.counts.sum() == whole.size
    assert histogram.largest == np.abs(whole).max()
    assert histogram.largest <= histogram.limit < 2 * histogram.largest
    assert np.abs(np.cumsum(histogram.counts) - np.cumsum(expected)).max() <= 3  # rounding at a bin's edge


def test_percentile(photographs: np.ndarray) -> None:
    values = np.random.default_rng(1).standard_normal((64, 500)).astype(np.float32)
    found = calibrate(
        _identity("Tanh"), _batches(values, 10), ["images"], method="percentile", percentile=99
    )["images"]
    expected = np.percentile(np.abs(values), 99)
    assert found == (-found.high, found.high)
    assert found.high == pytest.approx(expected, rel=0.005)


def test_clipping_keeps_a_bound_that_is_inside_the_threshold() -> None:
    values = np.linspace(-0.3, 10, 1000, dtype=np.float32).reshape(1, -1)
    found = calibrate(_identity(), [{"images": values}], ["images"], method="percentile", percentile=90)[
        "images"
    ]
    assert found.low == pytest.approx(-0.3)
    assert found.high == pytest.approx(8.95, abs=0.1)
    assert found.magnitude == found.high


def _quantisation_error(values: np.ndarray, interval: Range) -> float:
    scale = interval.magnitude / 127
    return float(np.square(np.clip(np.rint(values / scale), -127, 127) * scale - values).mean())


def test_clipping_beats_max_where_a_channel_holds_outliers() -> None:
    generator = np.random.default_rng(2)
    values = generator.standard_normal((200, 500)).astype(np.float32)
    values[7, :2] = 60  # two planted activations far beyond the rest
    errors = {
        method: _quantisation_error(
            values[8:], calibrate(_identity(), [{"images": values}], ["images"], method=method)["images"]
        )
        for method in ("max", "percentile", "entropy")
    }
    assert errors["percentile"] < errors["max"] / 10
    assert errors["entropy"] < errors["max"] / 10


def _least_divergent_plainly(counts: np.ndarray) -> int:
    """The search as the talk describes it: one candidate after the other, bin by bin."""
    counts = counts.copy()
    counts[0] = counts[1]
    divergences = {}
    for kept in range(128, len(counts) + 1):
        reference = counts[:kept].copy()
        reference[-1] += counts[kept:].sum()
        candidate = np.zeros(kept)
        for level in range(128):
            group = slice(level * kept // 128, (level + 1) * kept // 128)
            filled = reference[group] > 0
            if filled.any():
                candidate[group] = np.where(filled, counts[group].sum() / filled.sum(), 0)
        divergences[kept] = entropy(
            reference / reference.sum(), np.maximum(candidate / candidate.sum(), 1e-300)
        )
    return min(divergences, key=lambda kept: divergences[kept])


@pytest.mark.parametrize("seed", range(4))
def test_the_search_over_all_candidates_at_once_equals_the_plain_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tail = [
        generator.standard_normal,
        generator.standard_cauchy,
        generator.standard_exponential,
        generator.random,
    ][seed]
    values = np.abs(tail(3000))
    counts, _ = np.histogram(np.minimum(values, 20), bins=400)
    assert histograms._least_divergent(counts.astype(np.float64)) == _least_divergent_plainly(
        counts.astype(np.float64)
    )


@pytest.mark.parametrize("method", [*FIXED, "auto"])
def test_a_dead_tensor_has_an_empty_range(method: Method) -> None:
    zeros = np.zeros((3, 20), np.float32)
    assert calibrate(_identity(), [{"images": zeros}], ["y"], method=method) == {"y": (0, 0)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["max", "entropy", "auto"])
def test_nan_and_infinity_name_the_tensor(value: float, method: Method) -> None:
    ones, values = np.ones((2, 4, 20), np.float32)
    values[2, 3] = value
    with pytest.raises(
        ExportError, match=r"'images' holds [01] NaN and [01] infinite values of 80 .* leave int8 out"
    ):
        calibrate(_identity("Tanh"), _batches(np.concatenate([ones, values]), 4), ["images"], method=method)


def test_what_cannot_be_calibrated(graph: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="no samples"):
        calibrate(graph, [], tensors_to_calibrate(graph, "trt"))
    with pytest.raises(ExportError, match="not nowhere, images"):
        calibrate(graph, [], ["nowhere", "images"])


def test_memory_does_not_grow_with_the_number_of_samples(
    graph: onnx.ModelProto, photographs: np.ndarray
) -> None:
    """A batch of 8 leaves about 40 MB of activations behind if they are kept."""
    resident: list[int] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(10):
            resident.append(psutil.Process().memory_info().rss)
            yield {"images": photographs[:8]}

    calibrate(graph, batches(), tensors_to_calibrate(graph, "cpu"), method="entropy")
    assert resident[-1] - resident[3] < 30 * 2**20


def _squared_error(values: np.ndarray, interval: Range, flavour: Flavour) -> float:
    """Of rounding and clipping onto the grid that the quantised graph will have."""
    grid = of_activation(interval, flavour)
    lowest, highest = (-128, 127) if flavour == "trt" else (0, 255)
    integers = np.clip(np.rint(values / grid.scale) + int(grid.zero_point), lowest, highest)
    return float(np.square((integers - int(grid.zero_point)) * grid.scale - values).mean())


def _samples(kind: str) -> np.ndarray:
    generator = np.random.default_rng(11)
    normal = generator.standard_normal((100, 400))
    values = {
        "normal": normal,
        "heavy": generator.laplace(size=(100, 400)) ** 3,
        "relu": np.maximum(normal, 0),
        "skewed": np.exp(normal) - 1,
        "uniform": generator.uniform(-3, 1, (100, 400)),
        "negative": -np.exp(normal),
    }[kind]
    return values.astype(np.float32)


@pytest.mark.parametrize("flavour", ["trt", "cpu"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "relu", "skewed", "uniform", "negative"])
def test_mse_finds_the_least_error_that_a_plain_search_finds(kind: str, flavour: Flavour) -> None:
    values = _samples(kind)
    found = calibrate(_identity(), [{"images": values}], ["images"], method="mse", flavour=flavour)["images"]
    low, high = float(values.min()), float(values.max())
    least = min(
        _squared_error(values, Range(max(low, -threshold), min(high, threshold)), flavour)
        for threshold in np.linspace(0.05, 1, 60) * max(-low, high)
    )
    assert _squared_error(values, found, flavour) < 1.03 * least
    assert low <= found.low <= found.high <= high


def test_a_zero_point_lets_mse_clip_one_side_more() -> None:
    values = np.concatenate([_samples("skewed"), np.full((100, 4), -0.9, np.float32)], axis=1)
    cpu, trt = (
        calibrate(_identity(), [{"images": values}], ["images"], method="mse", flavour=flavour)["images"]
        for flavour in ("cpu", "trt")
    )
    assert cpu.low == pytest.approx(float(values.min()), abs=0.1)
    assert cpu.high < values.max()
    assert _squared_error(values, cpu, "cpu") < _squared_error(values, trt, "cpu")


def _two_products(weight: np.ndarray) -> onnx.ModelProto:
    """float32 [N, 8] -> Relu -> `shared`, read by two MatMuls whose outputs [N, 4] are added."""
    names = {"left": weight, "right": weight[::-1].copy()}
    nodes = [
        helper.make_node("Relu", ["images"], ["shared"], "relu"),
        *(helper.make_node("MatMul", ["shared", name], [f"by_{name}"], name) for name in names),
        helper.make_node("Add", ["by_left", "by_right"], ["y"], "add"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in names.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("flavour", ["trt", "cpu"])
def test_auto_judges_by_the_products_and_not_by_the_tensor(flavour: Flavour) -> None:
    """The loud channel is alone in mattering: whoever clips it wins the tensor's error and loses the products'."""
    generator = np.random.default_rng(12)
    values = np.abs(generator.standard_normal((400, 8))).astype(np.float32)
    values[::20, 0] = 40 + values[::20, 0]
    matters = generator.standard_normal((8, 4)) * 0.001
    matters[0] = matters[7] = [1, 2, -1, 1]
    for weight, clips in (
        (matters, False),
        (np.vstack([np.zeros((1, 4)), np.ones((6, 4)), np.zeros((1, 4))]), True),
    ):
        found = calibrate_each(
            _two_products(weight),
            _batches(values, 30),
            ["images", "shared"],
            method="auto",
            percentile=99.3,
            flavour=flavour,
        )
        assert (found.ranges["shared"].high < 30) == clips
        assert (found.methods["shared"] in ("percentile", "entropy")) == clips
        assert set(found.methods) == {"images", "shared"}


@pytest.mark.parametrize("flavour", ["trt", "cpu"])
def test_auto_on_a_trained_network(
    graph: onnx.ModelProto, photographs: np.ndarray, flavour: Flavour, run: Run, cosine: Run
) -> None:
    names = tensors_to_calibrate(graph, flavour)
    found = calibrate_each(graph, _batches(photographs[:8], 4), names, method="auto", flavour=flavour)
    assert list(found.ranges) == names
    assert len(set(found.methods.values())) > 1
    for method in set(found.methods.values()):
        alone = calibrate(graph, _batches(photographs[:8], 4), names, method=method, flavour=flavour)
        assert all(alone[name] == found.ranges[name] for name in names if found.methods[name] == method)
    quantised = quantize(graph, found.ranges, flavour)
    assert cosine(run(quantised, photographs[8:16]), run(graph, photographs[8:16])).mean() > 0.97
