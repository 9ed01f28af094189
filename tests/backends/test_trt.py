"""TensorRT-RTX compiles here for real, without a GPU; the log's format is also checked on lines kept from it."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from tlexport import hardware
from tlexport.backends import registry, trt
from tlexport.errors import CompileError, NotInstalledError
from tlexport.tensors import Profile

needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")
PROFILE = Profile(min=1, opt=2, max=8)


def build(graphs, precision: str, target: str, out, **changes):
    expected = changes.get("expected", graphs.expected(precision))
    path = changes.get("path", graphs.paths[precision])
    return registry.build("tensorrt_rtx", path, out, target, PROFILE, expected, timeout=120)


@needs_rtx
@pytest.mark.parametrize(
    "precision, target",
    [
        ("fp32", "sm89"),
        ("fp16", "sm75"),
        ("fp16", "sm120"),
        ("int8-trt", "sm86"),
        ("int8-trt", "sm89"),
        ("int8-trt", "sm120"),
    ],
)
def test_built_as_asked(precision, target, graphs, tmp_path) -> None:
    out = tmp_path / "model.rtx.engine"
    receipt = build(graphs, precision, target, out).receipt
    assert receipt.disagreements == ()
    assert receipt.built() == graphs.expected(precision) and len(receipt.layers) > 3
    assert "build log" in receipt.source
    assert out.stat().st_size > 10_000


@needs_rtx
def test_fp32_where_int8_was_asked_is_named(graphs, tmp_path) -> None:
    expected = dict.fromkeys(graphs.expected("fp32"), "int8")
    receipt = build(graphs, "fp32", "sm89", tmp_path / "m.engine", expected=expected).receipt
    assert [line.split(":")[0] for line in receipt.disagreements] == list(expected)
    assert all("asked int8, built fp32" in line for line in receipt.disagreements)


@needs_rtx
def test_one_node_left_in_float_is_the_one_named(graphs, tmp_path) -> None:
    """The weights' and activations' Q/DQ of one convolution are bypassed."""
    model = onnx.load(graphs.paths["int8-trt"])
    victim = [node for node in model.graph.node if node.op_type == "Conv"][1]
    producers = {node.output[0]: node for node in model.graph.node}
    victim.input[0] = producers[producers[victim.input[0]].input[0]].input[0]
    path = tmp_path / "planted.onnx"
    onnx.save(model, path)
    receipt = build(graphs, "int8-trt", "sm89", tmp_path / "m.engine", path=path).receipt
    assert [line.split(":")[0] for line in receipt.disagreements] == [victim.name]


@needs_rtx
def test_fp32_products_on_turing_fail_with_advice(graphs, tmp_path) -> None:
    with pytest.raises(CompileError, match=r"FP32 GEMM is not supported(.|\n)*use fp16"):
        build(graphs, "fp32", "sm75", tmp_path / "m.engine")
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
def test_refusals_say_what_can_be_done() -> None:
    assert "fp16" in trt.RTX.refusal("sm75", "fp32") and "fp16" in trt.RTX.refusal("sm75", "int8")
    assert trt.RTX.refusal("sm75", "fp16") == trt.RTX.refusal("sm89", "int8") == ""
    for target in ("sm87", "sm90", "sm100", "sm103"):
        assert "sm89" in trt.RTX.refusal(target, "fp16")
        assert target not in trt.RTX.availability().builds
    assert "onnxruntime" in trt.RTX.refusal("cpu", "fp32")
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(trt.RTX.availability().builds)


def test_tensorrt_never_crosses() -> None:
    here = hardware.capability()
    other = next(t for t in ("sm75", "sm89") if t != here)
    assert "only for the GPU it runs on" in trt.TENSORRT.refusal(other, "fp16")
    if here:
        assert trt.TENSORRT.refusal(here, "fp16") == ""


def test_tensorrt_that_is_missing_names_the_extra(tmp_path) -> None:
    if trt.TENSORRT.availability().installed:
        pytest.skip("tensorrt is installed")
    assert "tlexport[tensorrt]" in trt.TENSORRT.availability().note
    with pytest.raises(NotInstalledError, match=r"tlexport\[tensorrt\]"):
        trt.TENSORRT.build(tmp_path / "g.onnx", tmp_path / "m.engine", "sm89", PROFILE, {})


@needs_rtx
@pytest.mark.parametrize(
    "kind, words", [("text", "ONNX"), ("operator", "Frobnicate"), ("dangling", "nowhere|registered")]
)
def test_a_broken_graph_gives_the_parsers_words(kind, words, graphs, tmp_path) -> None:
    model = onnx.load(graphs.paths["fp32"])
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    if kind == "operator":
        node.op_type = "Frobnicate"
    if kind == "dangling":
        node.input[1] = "nowhere"
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph" if kind == "text" else model.SerializeToString())
    with pytest.raises(CompileError, match=rf"broken\.onnx(.|\n)*({words})") as caught:
        build(graphs, "fp32", "sm89", tmp_path / "m.engine", path=path)
    assert kind == "text" or repr(node.name) in str(caught.value)


@needs_rtx
def test_the_profile_reaches_the_engine(graphs, tmp_path, monkeypatch) -> None:
    """The log lists it; read here in this process."""
    kept = []
    monkeypatch.setattr(trt, "read_layers", lambda log: kept.append(log) or [])
    trt.RTX.build(graphs.paths["fp32"], tmp_path / "m.engine", "sm89", Profile(min=2, opt=3, max=5), {})
    found = re.search(r"MinShape: \[(\d+),.*?OptShape: \[(\d+),.*?MaxShape: \[(\d+),", kept[0])
    assert found and found.groups() == ("2", "3", "5")


@needs_rtx
def test_only_the_batch_may_be_dynamic(graphs, tmp_path) -> None:
    model = onnx.load(graphs.paths["fp32"])
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "dynamic.onnx")
    with pytest.raises(CompileError, match="only the batch may be dynamic"):
        build(graphs, "fp32", "sm89", tmp_path / "m.engine", path=tmp_path / "dynamic.onnx")


@needs_rtx
def test_running_without_a_gpu_says_so(tmp_path) -> None:
    if hardware.capability():
        pytest.skip("this machine has a GPU")
    (tmp_path / "m.engine").write_bytes(b"never loaded")
    with (
        pytest.raises(CompileError, match="needs an NVIDIA GPU"),
        trt.RTX.runner(tmp_path / "m.engine", threads=1, device="cuda"),
    ):
        pass


@pytest.mark.gpu
@needs_rtx
def test_an_engine_for_this_gpu_agrees_with_eager(graphs, tmp_path) -> None:
    target = hardware.capability()
    if target not in trt.RTX.availability().builds:
        pytest.skip("needs an NVIDIA GPU that TensorRT-RTX compiles for")
    build(graphs, "fp16", target, tmp_path / "m.engine")
    with trt.RTX.runner(tmp_path / "m.engine", threads=1, device="cuda") as runner:
        found = runner.run({"images": graphs.images})["probabilities"]
        with pytest.raises(CompileError, match="profile"):
            runner.run({"images": np.repeat(graphs.images, 2, axis=0)})
    assert np.abs(found - graphs.reference()).max() < 5e-3


def line(
    kind: str,
    inputs: str,
    constants: str,
    nodes: str,
    rest: str = "",
    name: str = "",
    outputs: str = "Float:-1,8",
) -> str:
    def listing(types: str) -> str:
        tensors = [t.split(":") for t in types.split()]
        return ", ".join(
            f"{{ Name: t{i}, Dimensions: [{shape}], Strides: [{shape}], StrideOrder: [1,0], "
            f"Datatype: {dtype}, Format: (Linear) Row major linear format }}"
            for i, (dtype, shape) in enumerate(tensors)
        )

    names = "".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return (
        f"Name: {name or kind}_1, LayerType: {kind}, Inputs: [ {listing(inputs)}], Constants: [ {listing(constants)}], "
        f"Outputs: [ {listing(outputs)}], {rest}TacticName: x, StreamId: 0, Metadata: {names}"
    )


@pytest.mark.parametrize(
    "text, dtype",
    [
        (line("correlation", "Int8:-1,8,4,4 Float:-1,8,4,4", "Int8:8,8,3,3 Float:1,8,1,1", "c"), "int8"),
        (line("correlation", "Half:-1,8,4,4", "Half:8,8,3,3 Float:1 Float:1 Half:1,8,1,1", "c"), "fp16"),
        (line("correlation", "Half:-1,8,4,4", "Int8:8,8,3,3 Float:1", "c"), "fp16"),
        (line("gemm", "Int8:-1,8", "Float:8,8 Float:1", "c"), "fp32"),
        (line("gemm", "Int8:-1,8 Int8:-1,8", "Float:1 Float:1", "c"), "int8"),
        (line("gemm", "Int8:-1,8 Half:-1,8", "Float:1", "c"), "fp16"),
        (line("runtime_fusion", "Half:-1,8", "Half:1,6 Half:8,6", "c"), "fp16"),
        (line("runtime_fusion", "Half:-1,64", "Int4:64,8 Half:4,8", "c"), "int4"),
        (line("runtime_fusion", "Half:-1,64 Half:64,8", "Half:1,8", "c"), "fp16"),
        (line("gemm", "Half:-1,64", "Int4:64,8 Half:4,8", "c"), "int4"),
        (line("correlation", "FP8:-1,8,4,4", "FP8:8,8,3,3 Float:1,8,1,1", "c"), "fp8"),
        (line("correlation", "FP8:-1,8,4,4", "Float:8,8,3,3", "c"), "fp32"),
        (line("runtime_fusion", "Half:-1,8", "Half:1,6 Float:8,6", "c"), "fp32"),
        (line("kgen", "Int8:-1,8 Int8:-1,8 Int8:-1,8", "", "c"), "int8"),
        (
            line("CaskConvolution", "Int8:-1,8,4,4", "", "c", 'Weights: {"Type": "Float", "Count": 9}, '),
            "fp32",
        ),
        (
            line("CaskConvolution", "Int8:-1,8,4,4", "", "c", 'Weights: {"Type": "Int8", "Count": 9}, '),
            "int8",
        ),
    ],
)
def test_the_dtype_of_a_layer(text, dtype) -> None:
    (layer,) = trt.read_layers(f"Layers:\n{text}\n\nBindings:\nimages\n")
    assert (layer.dtype, layer.nodes) == (dtype, ("c",))


ATTENTION = "Int8:-1,24,32 Int8:-1,32,24 Float:-1,1,1,24 Int8:-1,24,32"


@pytest.mark.parametrize(
    "text, dtype",
    [
        pytest.param(line("kgen", ATTENTION, "", "c", name="_gemm_mha_v2_myl0"), "int8", id="a mask is added"),
        pytest.param(
            line("kgen", ATTENTION.replace("Int8:-1,32", "Float:-1,32"), "", "c", name="_gemm_mha_v2_myl0"),
            "fp32",
            id="a factor in FP32",
        ),
        pytest.param(
            line("runtime_fusion", "Float:-1,2 Half:-1,16", "Half:1,2 Half:16,2", "c", name="__myl_FcAddCastAdd", outputs="Float:-1,2"),
            "fp16",
            id="a residual is added",
        ),
        pytest.param(
            line("runtime_fusion", "Float:-1,1 Half:-1,8", "Half:1,8 Half:8,8", "c", name="__myl_FcAddCastMul_myl0", outputs="Float:-1,8"),
            "fp16",
            id="a unit is put back",
        ),
        pytest.param(
            line("runtime_fusion", "Float:-1,2 Float:-1,16", "Half:1,2 Half:16,2", "c", name="__myl_FcAdd_myl0", outputs="Float:-1,2"),
            "fp32",
            id="the data in FP32",
        ),
        pytest.param(
            line("runtime_fusion", "Int8:-1,64 Float:1,64,192", "", "c", name="__myl_CastMulFc_myl0", outputs="Float:1,-1,192"),
            "fp32",
            id="dequantised before the product",
        ),
    ],
)  # fmt: skip
def test_what_is_only_added_does_not_speak_for_a_fused_product(text, dtype) -> None:
    (layer,) = trt.read_layers(f"Layers:\n{text}\n\nBindings:\nimages\n")
    assert (layer.dtype, layer.nodes) == (dtype, ("c",))


def test_the_kernel_that_adds_a_bias_does_not_speak_for_int4_weights() -> None:
    log = "\n".join(
        [
            "Layers:",
            line("runtime_fusion", "Half:-1,64", "Int4:64,8 Half:4,8", "dq c"),
            line("kgen", "Half:-1,8", "Half:1,8", "c relu"),
        ]
    )
    owners = [layer for layer in trt.read_layers(log) if "c" in layer.nodes]
    assert [(layer.kind, layer.dtype) for layer in owners] == [("runtime_fusion", "int4")]


def test_weights_that_become_floats_first_are_no_int4() -> None:
    """The kernel that makes floats of them is not the product."""
    log = "\n".join(
        [
            "Layers:",
            line("kgen", "", "Int4:64,7 Half:4,7", "dq", outputs="Half:64,8"),
            line("gemm", "Half:-1,64 Half:64,8", "", "c"),
        ]
    )
    assert [(layer.nodes, layer.dtype) for layer in trt.read_layers(log)] == [
        (("dq",), "int4"),
        (("c",), "fp16"),
    ]


def test_casts_around_a_product_do_not_speak_for_it() -> None:
    log = "\n".join(
        [
            "Layers:",
            line("kgen", "UInt8:-1,8", "", "c cast"),
            line("correlation", "Int8:-1,8,4,4", "Int8:8,8,3,3", "c"),
            line("kgen", "Float:-1,8", "", "c relu"),
        ]
    )
    owners = [layer for layer in trt.read_layers(log) if "c" in layer.nodes]
    assert [(layer.kind, layer.dtype) for layer in owners] == [("correlation", "int8")]
    assert [layer.nodes for layer in trt.read_layers(log)] == [("cast",), ("c",), ("relu",)]
