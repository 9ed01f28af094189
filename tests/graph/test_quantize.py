from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect
from tlexport.graph.calibration import Method, Range, calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.quantize import Flavour, quantize, tensors_to_calibrate

Run = Callable[..., np.ndarray]
FLAVOURS: tuple[Flavour, ...] = ("trt", "cpu")


@pytest.fixture(scope="module")
def ranges(graph: onnx.ModelProto, photographs: np.ndarray) -> dict[str, Range]:
    return calibrate(
        graph, [{"images": photographs[:24]}], tensors_to_calibrate(graph, "cpu"), method="percentile"
    )


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("method", "least"), [("max", 0.98), ("percentile", 0.98), ("entropy", 0.97)])
def test_int8_stays_near_fp32(
    graph: onnx.ModelProto,
    run: Run,
    cosine: Run,
    photographs: np.ndarray,
    flavour: Flavour,
    method: Method,
    least: float,
) -> None:
    seen, unseen = photographs[::2], photographs[1::2]
    ranges = calibrate(graph, [{"images": seen}], tensors_to_calibrate(graph, flavour), method=method)
    found, expected = run(quantize(graph, ranges, flavour), unseen), run(graph, unseen)
    assert least < cosine(found, expected).mean() < 0.9999  # 1 would mean that nothing was quantised
    sure = expected.max(1) > 0.5
    assert sure.sum() > 10
    assert (found.argmax(1) == expected.argmax(1))[sure].mean() >= 0.85


def test_trt_is_symmetric_and_per_channel(graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    model = quantize(graph, ranges, "trt")
    constants = _constants(model)
    assert set(inspect.compute_dtypes(model).values()) == {"int8"}
    assert "int32" not in inspect.summary(model).bytes
    assert all(
        not value.any() and value.dtype == np.int8
        for name, value in constants.items()
        if name.endswith("zero_point")
    )
    depthwise = constants["network.blocks.0.0.conv_dw.weight_quantized"]
    assert constants["network.blocks.0.0.conv_dw.weight_scale"].shape == (len(depthwise),) == (32,)
    largest = np.abs(depthwise).reshape(32, -1).max(axis=1)
    assert np.count_nonzero(largest == 127) == 31  # and one channel of the trained network is dead
    assert np.count_nonzero(largest == 0) == 1
    assert model.ByteSize() < 0.3 * graph.ByteSize()


def test_cpu_is_asymmetric_with_integer_biases(graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    constants = _constants(quantize(graph, ranges, "cpu"))
    zero_points = [v for k, v in constants.items() if k.endswith("zero_point") and v.dtype == np.uint8]
    assert len(zero_points) == len(tensors_to_calibrate(graph, "cpu"))
    assert {0} < {int(zero_point) for zero_point in zero_points}  # 0 after a ReLU6, elsewhere between
    assert constants["network.classifier.bias_quantized"].dtype == np.int32
    assert {value.dtype for name, value in constants.items() if name.endswith("weight_quantized")} == {
        np.dtype(np.int8)
    }


@pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 63)])
def test_reduced_range_keeps_weights_within_7_bits(
    graph: onnx.ModelProto, ranges: dict[str, Range], reduce_range: bool, largest: int
) -> None:
    constants = _constants(quantize(graph, ranges, "cpu", reduce_range=reduce_range))
    assert (
        max(np.abs(v.astype(int)).max() for k, v in constants.items() if k.endswith("weight_quantized"))
        == largest
    )


def test_onnxruntime_fuses_integer_convolutions(
    graph: onnx.ModelProto, ranges: dict[str, Range], tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    model = quantize(graph, ranges, "cpu")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = inspect.summary(onnx.load(tmp_path / "optimised.onnx")).nodes
    assert nodes["QLinearConv"] == 49
    assert "Conv" not in nodes and "Clip" not in nodes


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_excluded_nodes_stay_fp32(graph: onnx.ModelProto, ranges: dict[str, Range], flavour: Flavour) -> None:
    excluded = {"network.conv_stem", "network.blocks.1.0.conv_dw"}
    model = quantize(graph, ranges, flavour, exclude=excluded)
    assert {name for name, dtype in inspect.compute_dtypes(model).items() if dtype == "fp32"} == excluded
    stem = next(node for node in model.graph.node if node.name == "network.conv_stem")
    assert "network.conv_stem.weight" in stem.input


def test_attention(transformer: onnx.ModelProto, run: Run, cosine: Run, photographs: np.ndarray) -> None:
    """TensorRT multiplies activations in INT8, the CPU only activations with weights."""
    expected = run(transformer, photographs)
    for flavour, products in (("trt", 14), ("cpu", 10)):
        ranges = calibrate(
            transformer,
            [{"images": photographs[:16]}],
            tensors_to_calibrate(transformer, flavour),
            method="max",
        )
        model = quantize(transformer, ranges, flavour)
        assert (
            sorted(inspect.compute_dtypes(model).values()) == ["fp32"] * (14 - products) + ["int8"] * products
        )
        assert cosine(run(model, photographs), expected).mean() > 0.98


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_argument_is_left_alone(
    graph: onnx.ModelProto, ranges: dict[str, Range], flavour: Flavour
) -> None:
    before = graph.SerializeToString(deterministic=True)
    quantize(graph, ranges, flavour)
    assert graph.SerializeToString(deterministic=True) == before


def test_what_cannot_be_quantised(graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    some = dict(list(ranges.items())[3:])
    with pytest.raises(ExportError, match=r"3 of \d+ tensors have no calibrated range"):
        quantize(graph, some, "cpu")
    with pytest.raises(ExportError, match=r"no compute node is named network\.nowhere"):
        quantize(graph, ranges, "cpu", exclude=["network.nowhere"])
    with pytest.raises(ExportError, match="no Conv, Gemm or MatMul left"):
        quantize(graph, ranges, "trt", exclude=list(inspect.compute_dtypes(graph)))
    with pytest.raises(ExportError, match="this one computes in fp16"):
        quantize(to_half(graph, "fp16"), ranges, "trt")
    first = next(iter(ranges))
    with pytest.raises(ExportError, match=f"NaN or infinity in weights or ranges: {first}"):
        quantize(graph, {**ranges, first: Range(0, float("nan"))}, "trt")


def _layers(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """float32 [N, 4] in and out."""
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _check(model: onnx.ModelProto, run: Run, flavour: Flavour, tolerance: float = 0.02) -> onnx.ModelProto:
    """Quantise with the ranges of random inputs and compare, as a share of the largest output."""
    inputs = np.random.default_rng(5).uniform(-1, 1, (200, 4)).astype(np.float32)
    ranges = calibrate(model, [{"images": inputs}], tensors_to_calibrate(model, flavour), method="max")
    result = quantize(model, ranges, flavour)
    expected = run(model, inputs)
    assert np.abs(run(result, inputs) - expected).max() <= tolerance * np.abs(expected).max()
    return result


WEIGHT = np.random.default_rng(4).standard_normal((4, 4)) * np.array(
    [0.01, 1, 10, 100]
)  # columns of different scale


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_is_per_output_channel_either_way(run: Run, flavour: Flavour, transposed: int) -> None:
    gemm = helper.make_node("Gemm", ["images", "w", "b"], ["y"], "gemm", transB=transposed)
    weight = WEIGHT.T if transposed else WEIGHT
    model = _check(_layers([gemm], {"w": weight, "b": [0.01, 1, 10, 100]}), run, flavour)
    expected = np.abs(WEIGHT).max(axis=0) / 127
    np.testing.assert_allclose(_constants(model)["w_scale"], expected, rtol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_weight_that_two_nodes_share(run: Run, flavour: Flavour) -> None:
    nodes = [
        helper.make_node("MatMul", ["images", "w"], ["x"], "first"),
        helper.make_node("MatMul", ["x", "w"], ["z"], "second"),
        helper.make_node("Gemm", ["z", "w"], ["y"], "transposed", transB=1),
    ]
    model = _check(
        _layers(nodes, {"w": np.random.default_rng(3).standard_normal((4, 4))}), run, flavour, 0.05
    )
    assert set(inspect.compute_dtypes(model).values()) == {"int8"}
    readers = {node.name: node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    assert readers["first"] == readers["second"] != readers["transposed"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_dead_channels_and_dead_tensors(run: Run, flavour: Flavour) -> None:
    weight = WEIGHT.copy()
    weight[:, 1] = 0
    nodes = [
        helper.make_node("Sub", ["images", "images"], ["dead"], "sub"),
        helper.make_node("MatMul", ["dead", "w"], ["nothing"], "first"),
        helper.make_node("MatMul", ["images", "w"], ["something"], "second"),
        helper.make_node("Add", ["nothing", "something"], ["y"], "add"),
    ]
    constants = _constants(_check(_layers(nodes, {"w": weight}), run, flavour))
    assert constants["dead_scale"] == 1
    assert constants["w_scale"][1] == 1


def test_a_bias_that_dwarfs_its_weights_still_fits_32_bits(run: Run) -> None:
    weight = WEIGHT.copy()
    weight[:, 2] = 1e-8
    gemm = helper.make_node("Gemm", ["images", "w", "b"], ["y"], "gemm")
    model = _check(_layers([gemm], {"w": weight, "b": [1, 1, 1000, 1]}), run, "cpu")
    assert np.abs(_constants(model)["b_quantized"].astype(np.int64)).max() < 2**31


def test_a_nan_weight_is_named() -> None:
    weight = WEIGHT.copy()
    weight[0, 0] = np.nan
    model = _layers([helper.make_node("MatMul", ["images", "w"], ["y"], "product")], {"w": weight})
    with pytest.raises(ExportError, match="NaN or infinity in weights or ranges: w"):
        quantize(model, {"images": Range(-1, 1)}, "trt")


def test_openvino_agrees(
    graph: onnx.ModelProto, ranges: dict[str, Range], run: Run, cosine: Run, photographs: np.ndarray
) -> None:
    openvino = pytest.importorskip("openvino")
    model = quantize(graph, ranges, "cpu", reduce_range=True)
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString(), b""), "CPU", {"INFERENCE_NUM_THREADS": 1}
    )
    found = compiled(photographs[:8])[0]
    assert cosine(found, run(graph, photographs[:8])).mean() > 0.95


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_rtx_compiles_for_ada(
    graph: onnx.ModelProto, transformer: onnx.ModelProto, photographs: np.ndarray, precision: str
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for model in (graph, transformer):
        ranges = calibrate(
            model, [{"images": photographs[:4]}], tensors_to_calibrate(model, "trt"), method="max"
        )
        typed = to_half(model, "fp16") if precision == "fp16" else quantize(model, ranges, "trt")
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(typed.SerializeToString()), [
            parser.get_error(i).desc() for i in range(parser.num_errors)
        ]
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        profile = builder.create_optimization_profile()
        profile.set_shape("images", *[(n, 3, 96, 96) for n in (1, 1, 4)])
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None


@pytest.fixture(scope="module")
def fp8(graph: onnx.ModelProto, photographs: np.ndarray) -> onnx.ModelProto:
    tensors = tensors_to_calibrate(graph, "fp8")
    return quantize(graph, calibrate(graph, [{"images": photographs[:24]}], tensors, method="max"), "fp8")


def test_fp8_has_every_product_on_the_grid_of_float8(fp8: onnx.ModelProto, graph: onnx.ModelProto) -> None:
    assert set(inspect.compute_dtypes(fp8).values()) == {"fp8"}
    assert inspect.io(fp8) == inspect.io(graph)
    assert fp8.ByteSize() < 0.27 * graph.ByteSize()
    weights = {t.name: t for t in graph.graph.initializer}
    for name, stored in _constants(fp8).items():
        if name.endswith("_quantized"):
            full = numpy_helper.to_array(weights[name.removesuffix("_quantized")])
            scale = _constants(fp8)[name.replace("_quantized", "_scale")]
            shape = [-1] + [1] * (full.ndim - 1)
            steps = torch.from_numpy(full.astype(np.float64) / scale.reshape(shape)).clamp(-448, 448)
            expected = steps.float().to(torch.float8_e4m3fn).float().numpy()
            wide = stored.astype(np.float32)
            assert (wide == expected).mean() > 0.9999  # torch rounds twice, by way of float32
            others = tuple(range(1, wide.ndim))
            largest = np.abs(wide).max(axis=others)
            assert np.isin(largest, (0, 448)).all() and (largest > 0).mean() > 0.9  # a channel may be dead


def test_fp8_noise_is_that_of_three_bits(run: Run) -> None:
    """One layer alone: a rounding to 3 bits of mantissa errs by 2.6 percent of the value, in quadratic mean."""
    model = _one_conv(np.random.default_rng(0).normal(size=(8, 3, 3, 3)))
    batch = np.random.default_rng(1).normal(size=(4, 3, 12, 12)).astype(np.float32)
    ranges = calibrate(model, [{"x": batch}], tensors_to_calibrate(model, "fp8"), method="max")
    expected = run(model, batch)
    noise = np.sqrt(np.square(run(quantize(model, ranges, "fp8"), batch) - expected).mean() / expected.var())
    assert 0.02 < noise < 0.055


def _one_conv(weight: np.ndarray, *, group: int = 1) -> onnx.ModelProto:
    channels = weight.shape[1] * group
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv", group=group)]
    size = [40 if weight.ndim == 3 else 12] * (weight.ndim - 2)
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, *size]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    tensor = numpy_helper.from_array(weight.astype(np.float32), "w")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    return model


@pytest.mark.parametrize(
    ("kernel", "quantised"),
    [((3, 3), True), ((4, 8), True), ((32,), True), ((6, 6), False), ((3, 11), False), ((4, 3, 3), False)],
)
def test_fp8_leaves_out_large_kernels(kernel: tuple[int, ...], quantised: bool) -> None:
    model = _one_conv(np.ones((4, 2, *kernel)))
    assert (tensors_to_calibrate(model, "fp8") == ["x"]) == quantised
    if not quantised:
        with pytest.raises(ExportError, match="left to quantise"):
            quantize(model, {}, "fp8")


def test_a_layer_that_is_kept_out_of_fp8_stays_fp32(graph: onnx.ModelProto, photographs: np.ndarray) -> None:
    first = next(iter(inspect.compute_dtypes(graph)))
    tensors = tensors_to_calibrate(graph, "fp8")
    ranges = calibrate(graph, [{"images": photographs[:2]}], tensors, method="max")
    kept = inspect.compute_dtypes(quantize(graph, ranges, "fp8", exclude=[first]))
    assert {name for name, dtype in kept.items() if dtype != "fp8"} == {first} and kept[first] == "fp32"
