from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect, int4
from tlexport.graph.cast import to_half

Run = Callable[..., np.ndarray]


def _mlp(
    *, k: int = 64, n: int = 32, relu: bool = False, scaled: bool = False, shared: bool = False
) -> onnx.ModelProto:
    """Two inputs x, z [N, k]: x through a Gemm with transB and a bias; z through a MatMul, or the Gemm's own weight."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(n, k)),
        "b": rng.normal(size=n),
        "m": rng.normal(size=(k, n)),
        "three": np.array(3.0),
    }
    second = ("Gemm", ["z", "w"], {"transB": 1}) if shared else ("MatMul", ["z", "m"], {})
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"], "gemm", transB=1),
        helper.make_node("Relu" if relu else "Neg", ["g"], ["r"], "after"),
        helper.make_node(second[0], second[1], ["p"], "second", **second[2]),
        helper.make_node("Mul", ["p", "three"], ["s"], "scale")
        if scaled
        else helper.make_node("Neg", ["p"], ["s"], "negate"),
        helper.make_node("Add", ["r", "s"], ["y"], "sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", k]) for name in "xz"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", n])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _batch(k: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    loud = np.where(np.arange(k) < k // 8, 8.0, 0.1)  # a few channels carry the signal
    return {name: (rng.normal(size=(40, k)) * loud).astype(np.float32) for name in "xz"}


def _run(model: onnx.ModelProto, batch: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return np.asarray(ort.InferenceSession(model.SerializeToString(), options).run(None, batch)[0])


def test_a_transformer_keeps_its_weights_in_4_bits(
    transformer: onnx.ModelProto, run: Run, cosine: Run, photographs: np.ndarray
) -> None:
    seen, unseen = photographs[::2], photographs[1::2]
    small = int4.weights_to_int4(transformer, int4.mean_squares(transformer, [{"images": seen}]))
    dtypes = list(inspect.compute_dtypes(small).values())
    assert dtypes.count("int4") == 2 * 4 + 1 and dtypes.count("fp32") == 1 + 2 * 2
    assert small.ByteSize() < 0.3 * transformer.ByteSize()
    known = origin.modules(small)
    assert all(node.name in known for node in small.graph.node if node.op_type == "DequantizeLinear")
    assert inspect.opset(small) == 21 and inspect.io(small) == inspect.io(transformer)
    assert 0.9 < cosine(run(small, unseen), run(transformer, unseen)).mean() < 0.9999


def test_the_rest_may_be_fp16(transformer: onnx.ModelProto, photographs: np.ndarray) -> None:
    importance = int4.mean_squares(transformer, [{"images": photographs[:4]}])
    small = int4.weights_to_int4(to_half(transformer, "fp16"), importance)
    assert set(inspect.compute_dtypes(small).values()) == {"int4", "fp16"}


def test_the_argument_is_left_alone(transformer: onnx.ModelProto, photographs: np.ndarray) -> None:
    before = transformer.SerializeToString(deterministic=True)
    int4.weights_to_int4(transformer, int4.mean_squares(transformer, [{"images": photographs[:2]}]))
    assert transformer.SerializeToString(deterministic=True) == before


def test_scales_count_an_error_by_the_activation_it_meets() -> None:
    """On other samples the output's error is lower than with scales made of the largest weight alone."""
    model, batch = _mlp(), _batch(64)
    small = int4.weights_to_int4(model, int4.mean_squares(model, [batch]))
    by_largest = {name: np.ones(64) for name in ("gemm", "second")}
    other = _batch(64, seed=1)
    errors = [
        np.square(_run(graph, other) - _run(model, other)).mean()
        for graph in (small, int4.weights_to_int4(model, by_largest))
    ]
    assert 0 < errors[0] < 0.8 * errors[1]


def test_the_grid_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 6)).astype(np.float32)
    weights[16:32, 2] = 0
    weights[0, 0] = 30.0
    integers, scales = int4.quantised(weights, 16, np.ones(64))
    assert scales.shape == (4, 6) and scales.dtype == np.float32 and scales[1, 2] == 1
    wide = integers.astype(np.float32)
    assert wide.min() >= -8 and wide.max() <= 7 and not wide[16:32, 2].any()
    assert wide[0, 0] * scales[0, 0] == pytest.approx(30, rel=0.2)
    steps = weights / np.repeat(scales, 16, axis=0)
    assert np.abs(np.clip(steps, -8, 7) - wide).max() <= 0.5 + 1e-4


def test_mean_squares_are_over_all_samples() -> None:
    model = _mlp()
    batches = [{name: rows[start : start + 16] for name, rows in _batch(64).items()} for start in (0, 16, 32)]
    found = int4.mean_squares(model, batches)
    np.testing.assert_allclose(found["gemm"], np.square(_batch(64)["x"].astype(np.float64)).mean(axis=0))
    np.testing.assert_allclose(found["second"], np.square(_batch(64)["z"].astype(np.float64)).mean(axis=0))


def test_a_shared_weight_is_quantised_once() -> None:
    model = _mlp(shared=True)
    small = int4.weights_to_int4(model, int4.mean_squares(model, [_batch(64)]))
    assert inspect.summary(small).nodes["DequantizeLinear"] == 1
    assert inspect.compute_dtypes(small) == {"gemm": "int4", "second": "int4"}
    other = _batch(64, seed=1)
    assert np.square(_run(small, other) - _run(model, other)).mean() < 0.05 * _run(model, other).var()
    kept = int4.weights_to_int4(model, int4.mean_squares(model, [_batch(64)]), exclude=["second"])
    assert inspect.compute_dtypes(kept) == {"gemm": "int4", "second": "fp32"}


def test_for_cpus_a_relu_is_a_maximum_and_scaled_products_stay() -> None:
    model, other = _mlp(relu=True, scaled=True), _batch(64, seed=1)
    importance = int4.mean_squares(model, [_batch(64)])
    small = int4.weights_to_int4(model, importance, for_cpu=True)
    assert inspect.compute_dtypes(small) == {"gemm": "int4", "second": "fp32"}
    assert "Relu" not in inspect.summary(small).nodes
    same = int4.weights_to_int4(model, importance, exclude=["second"])
    assert "Relu" in inspect.summary(same).nodes
    np.testing.assert_array_equal(_run(small, other), _run(same, other))
    assert set(inspect.compute_dtypes(int4.weights_to_int4(model, importance)).values()) == {"int4"}


@pytest.mark.parametrize(("k", "n"), [(24, 32), (16, 32), (72, 32), (64, 31)])
def test_weights_that_compilers_would_turn_into_floats_stay(k: int, n: int) -> None:
    model = _mlp(k=k, n=n)
    assert int4.quantisable(model) == {}
    with pytest.raises(
        ExportError, match=r"multiple of 16 and at least 32.*even.*gemm, second.*leave int4 out"
    ):
        int4.weights_to_int4(model, {})


@pytest.mark.parametrize(("k", "block"), [(32, 16), (48, 16), (64, 32), (96, 32), (128, 64), (192, 64)])
def test_blocks_fit_the_inner_dimension_twice(k: int, block: int) -> None:
    assert {weight.block for weight in int4.quantisable(_mlp(k=k)).values()} == {block}


def test_what_cannot_be_quantised_is_named(graph: onnx.ModelProto) -> None:
    model = _mlp()
    importance = int4.mean_squares(model, [_batch(64)])
    with pytest.raises(ExportError, match=r"no compute node is named third \(there are: gemm, second"):
        int4.weights_to_int4(model, importance, exclude=["third"])
    with pytest.raises(ExportError, match="no mean squares are given for second"):
        int4.weights_to_int4(model, {"gemm": importance["gemm"]})
    with pytest.raises(ExportError, match="no calibration samples"):
        int4.mean_squares(model, [])
    with pytest.raises(ExportError, match="tensors x are not finite"):
        int4.mean_squares(model, [{**_batch(64), "x": np.full((40, 64), np.nan, np.float32)}])
    next(t for t in model.graph.initializer if t.name == "m").CopyFrom(
        numpy_helper.from_array(np.full((64, 32), np.inf, np.float32), "m")
    )
    with pytest.raises(ExportError, match="NaN or infinity in weights: m"):
        int4.weights_to_int4(model, importance)
