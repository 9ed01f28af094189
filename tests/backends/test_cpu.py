"""ONNX Runtime and OpenVINO on the CPU, and the eager reference: real builds, real receipts, real numbers."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tlexport.backends import eager, ort, ov, registry, typed
from tlexport.errors import CompileError
from tlexport.graph.cast import to_half
from tlexport.tensors import Profile

pytest.importorskip("onnxruntime")
needs_openvino = pytest.mark.skipif(not ov.availability().installed, reason="openvino is not installed")
CPU = [pytest.param(ort, id="onnxruntime"), pytest.param(ov, id="openvino", marks=needs_openvino)]
IMAGES = ("images",)
PROFILE = Profile(min=1, opt=2, max=8)
TOLERANCE = {"fp32": 1e-5, "int8-cpu": 0.06}


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("precision", ["fp32", "int8-cpu"])
def test_built_as_asked_and_agrees_with_eager(backend, precision, graphs, tmp_path) -> None:
    out = tmp_path / f"model{backend.SUFFIX}"
    expected = graphs.expected(precision)
    artifact = backend.build(graphs.paths[precision], out, "cpu", PROFILE, expected)
    assert artifact.receipt.disagreements == ()
    assert artifact.receipt.built() == expected and len(expected) == 3
    with backend.runner(out, threads=1) as runner:
        found = runner.run({"images": graphs.images})
    assert "CPU" in runner.provider
    assert list(found) == ["probabilities"]
    assert np.abs(found["probabilities"] - graphs.reference()).max() < TOLERANCE[precision]
    assert graphs.reference().std() > 0.02  # else agreement would mean nothing


@pytest.mark.parametrize("backend", CPU)
def test_fp32_where_int8_was_asked_is_named(backend, graphs, tmp_path) -> None:
    expected = dict.fromkeys(graphs.expected("fp32"), "int8")
    receipt = backend.build(graphs.paths["fp32"], tmp_path / "m.onnx", "cpu", PROFILE, expected).receipt
    assert not receipt.agrees
    assert [line.split(":")[0] for line in receipt.disagreements] == list(expected)
    assert all("asked int8, built fp32" in line for line in receipt.disagreements)


@pytest.mark.parametrize("backend", CPU)
def test_a_node_that_is_not_in_the_artifact_is_not_claimed(backend, graphs, tmp_path) -> None:
    expected = {"node_of_another_graph": "fp32", **graphs.expected("fp32")}
    receipt = backend.build(graphs.paths["fp32"], tmp_path / "m.onnx", "cpu", PROFILE, expected).receipt
    assert receipt.disagreements == ("node_of_another_graph: asked fp32, built not found in the artifact",)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have FP16 kernels")
@pytest.mark.parametrize("backend", CPU)
def test_fp16_on_this_cpu_is_refused_and_the_receipt_says_why(backend, graphs, tmp_path) -> None:
    assert "FP32" in backend.refusal("cpu", "fp16")
    assert backend.refusal("cpu", "fp32") == backend.refusal("cpu", "int8") == ""
    expected = graphs.expected("fp16")
    receipt = backend.build(graphs.paths["fp16"], tmp_path / "m.onnx", "cpu", PROFILE, expected).receipt
    assert set(receipt.built().values()) == {"fp32"} and not receipt.agrees


def test_onnxruntime_shows_that_it_computes_a_tensorrt_graph_in_float(graphs, tmp_path) -> None:
    expected = graphs.expected("int8-trt")
    built = ort.build(graphs.paths["int8-trt"], tmp_path / "m.onnx", "cpu", PROFILE, expected).receipt.built()
    convolutions = [dtype for node, dtype in built.items() if "Conv" in node or "conv" in node]
    assert convolutions == ["fp32", "fp32"]


@pytest.mark.parametrize("precision", ["int8-trt", "fp16"])
def test_judging_on_the_cpu_is_faithful(precision, graphs) -> None:
    with ort.runner(graphs.paths[precision], threads=1, judge=True) as runner:
        found = runner.run({"images": graphs.images})["probabilities"]
    error = np.abs(found - graphs.reference()).max()
    assert error < {"int8-trt": 0.05, "fp16": 5e-3}[precision]
    assert error > 1e-6  # a judge that does not round at all judges another graph


def overflowing(path: Path) -> Path:
    """x * 300 * 300 / 90000 in FP16: overflows for x of 1 and more, in FP32 it does not."""
    steps = [
        ("Cast", ["x"], "a"),
        ("Mul", ["a", "k"], "b"),
        ("Mul", ["b", "k"], "c"),
        ("Mul", ["c", "j"], "d"),
    ]
    nodes = [
        helper.make_node(kind, inputs, [out], to=TensorProto.FLOAT16)
        if kind == "Cast"
        else helper.make_node(kind, inputs, [out])
        for kind, inputs, out in steps
    ]
    nodes.append(helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT))
    constants = [
        numpy_helper.from_array(np.array(v, np.float16), n) for n, v in (("k", 300), ("j", 1 / 90000))
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_judging_shows_an_overflow_that_the_cpu_would_hide(tmp_path) -> None:
    path, x = overflowing(tmp_path / "g.onnx"), np.array([0.1, 0.5, 1, 2], np.float32)
    with ort.runner(path, threads=1, judge=True) as judge:
        assert np.isfinite(judge.run({"x": x})["y"]).tolist() == [True, True, False, False]


def test_bfloat16_is_judged_by_rounding_every_tensor(graphs, tmp_path) -> None:
    """ONNX Runtime's CPU provider has no BF16 kernels: the typed graph itself is refused."""
    path = tmp_path / "bf16.onnx"
    onnx.save(to_half(onnx.load(graphs.paths["fp32"]), "bf16"), path)
    with pytest.raises(CompileError), ort.runner(path, threads=1):
        pass
    with ort.runner(path, threads=1, judge=True) as runner:
        found = runner.run({"images": graphs.images})["probabilities"]
    error = np.abs(found - graphs.reference()).max()
    with ort.runner(graphs.paths["fp16"], threads=1, judge=True) as runner:
        half = runner.run({"images": graphs.images})["probabilities"]
    assert np.abs(half - graphs.reference()).max() < error < 0.03  # 8 bits of mantissa against FP16's 11


def test_rounding_to_bfloat16_is_torchs_bit_for_bit(tmp_path) -> None:
    """Every pattern of the upper half, with lower halves at a tie and on both sides of it: subnormals, infinities, NaN too."""
    steps = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
        helper.make_node("Neg", ["a"], ["b"]),
    ]
    steps.append(helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    model = helper.make_model(
        helper.make_graph(steps, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 22)], ir_version=10
    )
    onnx.save(model, tmp_path / "g.onnx")
    upper = np.arange(2**16, dtype=np.uint32) << 16
    given = np.concatenate([upper | low for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(
        np.float32
    )
    with ort.runner(tmp_path / "g.onnx", threads=1, judge=True) as judge:
        found = judge.run({"x": given})["y"]
    expected = (-torch.from_numpy(given.copy()).to(torch.bfloat16)).float().numpy()
    nan = np.isnan(given)
    assert np.isnan(found[nan]).all() and np.isinf(found).sum() > 4
    assert np.array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def test_a_graph_whose_types_are_unknown_is_not_judged(tmp_path) -> None:
    path = overflowing(tmp_path / "g.onnx")
    model = onnx.load(path)
    model.graph.node[1].domain = "unknown.domain"
    onnx.save(model, path)
    with pytest.raises(CompileError, match=r"unknown\.domain"):
        typed.rounding_to_half(typed.load(path))
    model.opset_import.append(helper.make_opsetid("unknown.domain", 1))
    onnx.save(model, path)
    with pytest.raises(CompileError, match="types of b, c, d"):
        typed.rounding_to_half(typed.load(path))


def broken(path: Path, kind: str, source: Path) -> Path:
    data = source.read_bytes()
    model = onnx.load(source)
    if kind == "operator":
        model.graph.node[0].op_type = "Frobnicate"
        data = model.SerializeToString()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "text": b"not a graph", "empty": b""}.get(kind, data)
    )
    return path


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "operator"])
def test_a_broken_graph_is_an_error_and_leaves_nothing(backend, kind, graphs, tmp_path) -> None:
    path, out = broken(tmp_path / "broken.onnx", kind, graphs.paths["fp32"]), tmp_path / "out" / "m.onnx"
    with pytest.raises(CompileError, match=r"broken\.onnx"):
        backend.build(path, out, "cpu", PROFILE, graphs.expected("fp32"))
    assert not out.exists()


def test_weights_in_another_file_are_refused(graphs, tmp_path) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(
        onnx.load(graphs.paths["fp32"]), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    with pytest.raises(CompileError, match="one file"):
        ort.build(path, tmp_path / "m.onnx", "cpu", PROFILE, {})


def test_cuda_without_a_gpu_is_refused_not_replaced(graphs) -> None:
    if len(ort.availability().runs) > 1:
        pytest.skip("this machine has a working CUDA provider")
    with (
        pytest.raises(CompileError, match=r"GPU|CUDA"),
        ort.runner(graphs.paths["fp32"], threads=1, device="cuda"),
    ):
        pass
    assert ort.availability().note


def test_an_operator_that_the_graph_has_not_got_is_told_for_what_it_is(tmp_path) -> None:
    """Clip (a ReLU6) has no kernel in BF16, on a CPU or GPU: ONNX Runtime expands it, and then lacks Less."""
    make, tensor = onnx.helper.make_node, onnx.helper.make_tensor
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    bf16 = onnx.TensorProto.BFLOAT16
    nodes = [
        make("Cast", ["x"], ["narrow"], to=bf16),
        make("Clip", ["narrow", "low", "high"], ["clipped"]),
        make("Cast", ["clipped"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    ends = [tensor("low", bf16, [], [0.0]), tensor("high", bf16, [], [6.0])]
    graph = onnx.helper.make_graph(nodes, "relu6", [x], [y], ends)
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "relu6.onnx")
    with (
        pytest.raises(CompileError, match="the graph has no Less"),
        ort.runner(tmp_path / "relu6.onnx", threads=1),
    ):
        pass


def test_a_cuda_target_is_not_vouched_for_from_another_machine(graphs, tmp_path) -> None:
    if "sm89" in ort.availability().builds:
        pytest.skip("this machine is the target")
    with pytest.raises(CompileError, match="sm89"):
        ort.build(graphs.paths["fp16"], tmp_path / "m.onnx", "sm89", PROFILE, graphs.expected("fp16"))
    assert not (tmp_path / "m.onnx").exists()
    assert "INT8" in ort.refusal("sm89", "int8")


@pytest.mark.gpu
def test_onnxruntime_runs_on_the_gpu_when_asked(graphs) -> None:
    if len(ort.availability().runs) < 2:
        pytest.skip("needs an NVIDIA GPU and ONNX Runtime's CUDA provider")
    with ort.runner(graphs.paths["fp32"], threads=1, device="cuda") as runner:
        assert runner.provider == "CUDAExecutionProvider"
        assert (
            np.abs(runner.run({"images": graphs.images})["probabilities"] - graphs.reference()).max() < 1e-4
        )


@needs_openvino
def test_openvino_takes_the_cpu_only_and_keeps_the_callers_cores(graphs, tmp_path) -> None:
    before = os.sched_getaffinity(0)
    with ov.runner(graphs.paths["fp32"], threads=1) as runner:
        first = runner.run({"images": graphs.images})["probabilities"]
        kept = first.copy()
        runner.run({"images": 255 - graphs.images})
        assert np.array_equal(first, kept)  # outputs are copies
    assert os.sched_getaffinity(0) == before
    assert "NVIDIA" in ov.refusal("sm89", "fp32")
    with pytest.raises(CompileError, match="sm89"):
        ov.build(graphs.paths["fp32"], tmp_path / "m.onnx", "sm89", PROFILE, {})


@needs_openvino
def test_openvino_is_told_not_to_use_bf16(graphs) -> None:
    model = ov._compile(graphs.paths["fp32"], threads=1)
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert model.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_eager_is_the_module_itself(channels_last, graphs) -> None:
    threads, stride = torch.get_num_threads(), graphs.module.features[3].weight.stride()
    with eager.runner_for(
        graphs.module,
        inputs=("images",),
        output="probabilities",
        threads=threads + 1,
        channels_last=channels_last,
    ) as runner:
        assert torch.get_num_threads() == threads + 1
        found = runner.run({"images": graphs.images})["probabilities"]
    assert torch.get_num_threads() == threads
    assert graphs.module.features[3].weight.stride() == stride  # the caller's module keeps its layout
    assert np.abs(found - graphs.reference()).max() < 1e-6 and "cpu" in runner.provider


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_predict_runs_every_sample_in_batches(name, graphs, tmp_path) -> None:
    inputs, output = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(inputs, graphs.images)
    provider = registry.predict(
        name, graphs.paths["fp32"], inputs, output, input_names=IMAGES, batch_size=4, threads=1, timeout=60
    )
    found = np.load(output, allow_pickle=False)
    assert "CPU" in provider and found.dtype == np.float32
    assert np.abs(found - graphs.reference()).max() < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "y.npy"]


def test_predict_leaves_nothing_when_it_fails(graphs, tmp_path) -> None:
    inputs, output = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(inputs, graphs.images[:, :, :8, :8])
    with pytest.raises(CompileError, match=r"onnxruntime: running"):
        registry.predict(
            "onnxruntime",
            graphs.paths["fp32"],
            inputs,
            output,
            input_names=IMAGES,
            batch_size=4,
            threads=1,
            timeout=60,
        )
    assert not output.exists()
    np.save(inputs, graphs.images[:0])
    with pytest.raises(CompileError, match="no samples"):
        registry.predict(
            "onnxruntime",
            graphs.paths["fp32"],
            inputs,
            output,
            input_names=IMAGES,
            batch_size=4,
            threads=1,
            timeout=60,
        )


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(CompileError, match=r"onnxruntime, openvino, tensorrt_rtx, tensorrt"):
        registry.get("tvm")
