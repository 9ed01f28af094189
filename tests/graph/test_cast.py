from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tlexport.errors import ExportError
from tlexport.graph import inspect
from tlexport.graph.cast import HalfName, to_half

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def half(graph: onnx.ModelProto) -> onnx.ModelProto:
    return to_half(graph, "fp16")


def _mlp(first: np.ndarray, *, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """uint8 [N, 4] -> Cast -> MatMul -> Relu -> MatMul, whose output is the graph's."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], "cast", to=dtype),
        helper.make_node("MatMul", ["x", "first"], ["hidden"], "first"),
        helper.make_node("Relu", ["hidden"], ["active"], "relu"),
        helper.make_node("MatMul", ["active", "second"], ["probabilities"], "second"),
    ]
    numbers = helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"first": first, "second": np.eye(4)}
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 4])],
        [helper.make_tensor_value_info("probabilities", dtype, ["batch", 4])],
        [numpy_helper.from_array(weight.astype(numbers), name) for name, weight in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_compute_node_is_fp16(graph: onnx.ModelProto, half: onnx.ModelProto) -> None:
    dtypes = inspect.compute_dtypes(half)
    assert dtypes.keys() == inspect.compute_dtypes(graph).keys()
    assert set(dtypes.values()) == {"fp16"}
    assert half.ByteSize() < 0.51 * graph.ByteSize()


def test_inputs_outputs_and_metadata_are_kept(graph: onnx.ModelProto, half: onnx.ModelProto) -> None:
    assert inspect.io(half) == inspect.io(graph)
    assert inspect.metadata(half).items() >= inspect.metadata(graph).items()


def test_normalisation_and_softmax_stay_fp32(half: onnx.ModelProto) -> None:
    types = inspect.element_types(half)
    inputs = {node.op_type: types[node.input[0]] for node in half.graph.node}
    stem = next(node for node in half.graph.node if node.name == "network.conv_stem")
    producer = next(node for node in half.graph.node if stem.input[0] in node.output)
    assert inputs["Softmax"] == TensorProto.FLOAT
    assert producer.op_type == "Cast"
    assert types[producer.input[0]] == TensorProto.FLOAT
    assert inspect.summary(half).nodes["Cast"] == 3  # from uint8, to FP16, back to FP32


def test_the_error_is_that_of_fp16(
    graph: onnx.ModelProto, half: onnx.ModelProto, run: Run, cosine: Run, photographs: np.ndarray
) -> None:
    nearness = cosine(run(half, photographs), run(graph, photographs)).min()
    assert 0.998 < nearness < 0.999999  # 1 would mean that nothing was rounded


def test_a_transformer(transformer: onnx.ModelProto, run: Run, photographs: np.ndarray) -> None:
    half = to_half(transformer, "fp16")
    assert list(inspect.compute_dtypes(half).values()) == ["fp16"] * (1 + 2 * 6 + 1)
    expected = run(transformer, photographs)
    assert expected.std(axis=0).max() > 0.01
    assert np.abs(run(half, photographs) - expected).max() < 0.01


def test_the_argument_is_left_alone(graph: onnx.ModelProto) -> None:
    before = graph.SerializeToString(deterministic=True)
    to_half(graph, "fp16")
    assert graph.SerializeToString(deterministic=True) == before


def test_an_output_that_comes_from_a_compute_node_is_cast_back(run: Run) -> None:
    half = to_half(_mlp(np.eye(4) * 1.5), "fp16")
    images = np.array([[0, 1, 2, 255]], np.uint8)
    assert inspect.io(half)[1][0].dtype == "float32"
    np.testing.assert_array_equal(run(half, images), images * np.float32(1.5))


@pytest.mark.parametrize("value", [7e4, -7e4, np.nan])
def test_a_weight_that_fp16_cannot_hold_is_named(value: float) -> None:
    weight = np.eye(4)
    weight[2, 1] = value
    with pytest.raises(ExportError, match=r"beyond that or NaN: first \(largest (7e\+04|nan)\)"):
        to_half(_mlp(weight), "fp16")


def test_weights_that_become_zero_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    weight = np.eye(4)
    weight[0, 1:3] = 1e-9
    assert inspect.metadata(to_half(_mlp(weight), "fp16"))["fp16_flushed_to_zero"] == "2"
    assert "2 weights are too small" in caplog.text
    assert "fp16_flushed_to_zero" not in inspect.metadata(to_half(_mlp(np.eye(4)), "fp16"))


def test_only_fp32_graphs_are_cast(half: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="this one has fp16"):
        to_half(half, "fp16")
    with pytest.raises(ExportError, match="this one has fp64"):
        to_half(_mlp(np.eye(4), dtype=TensorProto.DOUBLE), "fp16")


def test_scales_of_resize_stay_fp32(run: Run) -> None:
    """ONNX types them as float32 whatever the data is."""
    model = _mlp(np.eye(4))
    resize = helper.make_node("Resize", ["hidden", "", "scales"], ["larger"], "resize", mode="nearest")
    model.graph.node.insert(2, resize)
    model.graph.node[3].input[0] = "larger"
    model.graph.node[4].input[1] = "wide"
    scales = np.array([1, 2], np.float32)
    wide = np.repeat(np.eye(4, dtype=np.float32), 2, axis=0)
    model.graph.initializer.extend(
        [numpy_helper.from_array(scales, "scales"), numpy_helper.from_array(wide, "wide")]
    )
    images = np.array([[1, 2, 3, 4]], np.uint8)
    np.testing.assert_array_equal(run(to_half(model, "fp16"), images), 2.0 * images)


def test_bfloat16_has_every_product_in_it_and_float32s_range(graph: onnx.ModelProto) -> None:
    half = to_half(graph, "bf16")
    assert set(inspect.compute_dtypes(half).values()) == {"bf16"}
    assert inspect.io(half) == inspect.io(graph)
    assert inspect.metadata(half).items() >= inspect.metadata(graph).items()
    assert inspect.opset(half) == 22 > inspect.opset(graph)  # the first that defines convolutions in BF16
    assert half.ByteSize() < 0.51 * graph.ByteSize()
    assert inspect.compute_dtypes(to_half(_mlp(np.eye(4) * 7e4), "bf16")) == {
        "first": "bf16",
        "second": "bf16",
    }


@pytest.mark.parametrize("value", [3.395e38, -3.395e38, np.nan])
def test_a_weight_that_bfloat16_cannot_hold_is_named(value: float) -> None:
    with pytest.raises(
        ExportError, match=r"BF16 holds .* first \(largest (3.395e\+38|nan)\); leave bf16 out"
    ):
        to_half(_mlp(np.eye(4) + np.diag([value, 0, 0], 1)), "bf16")


def test_the_lowest_float32_of_masks_becomes_the_lowest_of_the_type() -> None:
    lowest = np.where(np.eye(4) == 1, np.finfo(np.float32).min, 0)
    largest: dict[HalfName, float] = {"fp16": 65504, "bf16": 3.3895313892515355e38}
    for precision, expected in largest.items():
        half = to_half(_mlp(lowest), precision)
        weight = next(t for t in half.graph.initializer if t.name == f"first_{precision}")
        assert numpy_helper.to_array(weight).astype(np.float64).min() == -expected


def _chain(*operators: str) -> onnx.ModelProto:
    """Float [N, 4] through the operators in a row, each named by its place: MatMul by 1.5 times the identity, Relu ..."""
    nodes = []
    for place, kind in enumerate(operators):
        inputs = [f"t{place}", "w"] if kind in ("MatMul", "Add") else [f"t{place}"]
        nodes.append(helper.make_node(kind, inputs, [f"t{place + 1}"], f"{kind}_{place}"))
    ends = [helper.make_tensor_value_info(f"t{p}", TensorProto.FLOAT, ["batch", 4]) for p in (0, len(nodes))]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) * 1.5, "w")
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _in_fp32(model: onnx.ModelProto) -> list[str]:
    types = inspect.element_types(model)
    return [
        n.name for n in model.graph.node if n.op_type != "Cast" and types[n.output[0]] == TensorProto.FLOAT
    ]


@pytest.mark.parametrize(
    ("exclude", "in_fp32", "casts"),
    [
        ((), [], 2),
        (("MatMul_0",), ["MatMul_0", "Relu_1", "Neg_2"], 2),  # what lies below it holds its output
        (("MatMul_0", "MatMul_3"), ["MatMul_0", "Relu_1", "Neg_2", "MatMul_3", "Relu_4"], 2),
        (("MatMul_3",), ["MatMul_3", "Relu_4"], 4),
        (("MatMul_3", "MatMul_5"), ["MatMul_3", "Relu_4", "MatMul_5"], 2),  # no casts between the two
        (("MatMul_5",), ["MatMul_5"], 2),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_excluded_stays_fp32_with_the_fewest_casts(
    precision: HalfName, exclude: tuple[str, ...], in_fp32: list[str], casts: int
) -> None:
    half = to_half(_chain("MatMul", "Relu", "Neg", "MatMul", "Relu", "MatMul"), precision, exclude=exclude)
    assert _in_fp32(half) == in_fp32
    assert inspect.summary(half).nodes.get("Cast", 0) == casts
    assert {n for n, dtype in inspect.compute_dtypes(half).items() if dtype == "fp32"} == set(exclude)


def test_a_residual_sum_stays_in_16_bits_where_fp32_takes_more_casts() -> None:
    model = _chain("MatMul", "Relu", "MatMul", "Relu", "MatMul", "Relu", "MatMul")
    for place in (3, 5):  # sums of what goes in and out of the product before
        model.graph.node[place].op_type = "Add"
        model.graph.node[place].input.append(f"t{place - 1}")
    half = to_half(model, "fp16", exclude=["MatMul_2"])
    assert _in_fp32(half) == ["MatMul_2"]
    assert inspect.summary(half).nodes["Cast"] == 4


def test_excluding_a_layer_repairs_its_overflow() -> None:
    """Planted: 200 x 500 is beyond FP16, and what follows brings it back into range."""
    model = _mlp(np.eye(4) * 500)
    model.graph.node.insert(3, helper.make_node("Mul", ["active", "small"], ["scaled"], "scale"))
    model.graph.node[4].input[0] = "scaled"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1 / 500), "small"))
    images = np.full((1, 4), 200, np.uint8)
    with np.errstate(all="ignore"):
        assert not np.isfinite(_by_numpy(to_half(model, "fp16"), images)).any()
    kept = _by_numpy(to_half(model, "fp16", exclude=["first"]), images)
    np.testing.assert_allclose(kept, images, rtol=1e-3)
    np.testing.assert_allclose(_by_numpy(to_half(model, "fp16"), images // 2), images // 2, rtol=1e-3)


def _by_numpy(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """ONNX's reference evaluator: every tensor really has its own type."""
    return np.asarray(ReferenceEvaluator(model).run(None, {"images": images})[0])


def test_names_that_cannot_be_excluded() -> None:
    with pytest.raises(ExportError, match=r"no compute node is named third \(there are: first, second"):
        to_half(_mlp(np.eye(4)), "fp16", exclude=["third"])
    with pytest.raises(ExportError, match="nothing is left"):
        to_half(_mlp(np.eye(4)), "fp16", exclude=["first", "second"])
