"""Every cell of the table that can be tried here is held against what the real compiler does with such a graph."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tlexport.backends import capabilities, ort, ov, registry, trt
from tlexport.errors import CompileError
from tlexport.graph import calibration, cast, inspect, int4, quantize, trace
from tlexport.targets import CAPABILITIES, KNOWN
from tlexport.tensors import Profile

needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")
needs_openvino = pytest.mark.skipif(not ov.availability().installed, reason="openvino is not installed")
PROFILE = Profile(min=1, opt=2, max=8)
COMPILED = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True)
class Typed:
    """The small network in one precision, for a CPU or a GPU."""

    path: Path
    expected: dict[str, str]


class Mixed(nn.Module):
    """uint8 images [n x 3 x 16 x 16] -> probabilities [n x 6]: convolutions of each kind, Gemm with a Relu and without."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.Conv2d(16, 32, 1), nn.ReLU(),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(32, 48), nn.Linear(48, 6, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features((images.float() / 255 - 0.5) / 0.5).mean((2, 3))
        return torch.softmax(self.head(torch.relu(self.hidden(x))), -1)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Typed]:
    """(precision, for a CPU) -> graph, by the passes that a run uses."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": "multiclass"}
    model = trace.trace(
        Mixed().eval(), (images[:2],), opset=20, metadata=metadata, input_names=("images",), output_name="p"
    )
    batch = {"images": images.numpy()}
    importance = int4.mean_squares(model, [batch])

    def in_8_bits(flavour: quantize.Flavour) -> onnx.ModelProto:
        wanted = quantize.tensors_to_calibrate(model, flavour)
        return quantize.quantize(
            model, calibration.calibrate(model, [batch], wanted, method="max"), flavour, reduce_range=True
        )

    gpu = {
        "fp32": model,
        "fp16": cast.to_half(model, "fp16"),
        "bf16": cast.to_half(model, "bf16"),
        "int8": in_8_bits("trt"),
        "fp8": in_8_bits("fp8"),
        "int4": int4.weights_to_int4(cast.to_half(model, "fp16"), importance),
    }
    cpu = gpu | {"int8": in_8_bits("cpu"), "int4": int4.weights_to_int4(model, importance, for_cpu=True)}
    folder = tmp_path_factory.mktemp("typed")
    made = {}
    for for_cpu, kept in ((True, cpu), (False, gpu)):
        for precision, graph in kept.items():
            path = folder / f"{precision}-{'cpu' if for_cpu else 'gpu'}.onnx"
            onnx.save(graph, path)
            made[precision, for_cpu] = Typed(path, inspect.compute_dtypes(graph))
    return made


def holds(backend: str, target: str, graph: Typed, out: Path) -> bool:
    """Whether the compiler takes the graph and the receipt agrees with it in every node."""
    try:
        built = registry.build(backend, graph.path, out, target, PROFILE, graph.expected, timeout=120)
    except CompileError:
        return False
    return built.receipt.agrees


def test_the_graphs_are_what_they_are_called(typed) -> None:
    for (precision, _), graph in typed.items():
        dtypes = list(graph.expected.values())
        assert dtypes[-2:] == [precision] * 2 and len(dtypes) == 5
        assert precision == "int4" or set(dtypes) == {precision}


@needs_rtx
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("precision", capabilities.PRECISIONS)
def test_tensorrt_rtx(precision: str, target: str, typed, tmp_path) -> None:
    refused = trt.RTX.refusal(target, precision)
    assert holds("tensorrt_rtx", target, typed[precision, False], tmp_path / "m.engine") == (not refused)


@needs_rtx
def test_tensorrt_rtx_compiles_for_what_the_table_says() -> None:
    assert trt.RTX.availability().builds == COMPILED
    for target in KNOWN:
        for precision in ("", *capabilities.PRECISIONS):
            reason = trt.RTX.refusal(target, precision)
            assert reason or target in COMPILED, (target, precision)


@pytest.mark.parametrize("precision", capabilities.PRECISIONS)
@pytest.mark.parametrize("backend", [ort, pytest.param(ov, marks=needs_openvino)])
def test_on_the_cpu(backend, precision: str, typed, tmp_path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("other CPUs have other kernels")
    refused = backend.refusal("cpu", precision)
    assert holds(backend.NAME, "cpu", typed[precision, True], tmp_path / "m.onnx") == (not refused)


@pytest.mark.parametrize("target", KNOWN)
@pytest.mark.parametrize("precision", capabilities.PRECISIONS)
def test_a_reason_says_what_to_use_instead(precision: str, target: str) -> None:
    for backend in registry.BACKENDS:
        reason = capabilities.refusal(backend, target, precision)
        assert not reason or re.search(
            r"\buse (fp32|fp16|int8|onnxruntime|tensorrt)\b|builds for cpu", reason
        ), reason
        assert "{" not in reason


def test_every_target_keeps_a_precision() -> None:
    for target in ("cpu", *CAPABILITIES):
        assert any(
            not capabilities.refusal(backend, target, precision)
            for backend in registry.BACKENDS
            for precision in capabilities.PRECISIONS
        )


@pytest.mark.parametrize(
    ("backend", "target", "precision", "words"),
    [
        ("tensorrt_rtx", "sm86", "fp8", "before SM89.*int8 or fp16 for sm86"),
        ("tensorrt_rtx", "sm75", "bf16", "before SM80 compute no BF16; use fp16"),
        ("tensorrt_rtx", "sm75", "int4", "tensorrt_rtx has no kernels with INT4"),
        ("tensorrt_rtx", "sm90", "fp16", "ahead of time for sm90 .*sm89.*tensorrt on a machine"),
        ("tensorrt", "sm86", "fp8", "before SM89"),
        ("onnxruntime", "cpu", "bf16", "no BF16 kernels; use fp32"),
        ("openvino", "sm80", "bf16", "builds for cpu"),
    ],
)
def test_the_words(backend: str, target: str, precision: str, words: str) -> None:
    assert re.search(words, capabilities.refusal(backend, target, precision))


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "words"), [("bf16", "BF16 takes SM80"), ("fp8", "FP8 takes SM89"), ("int4", "INT4 weights take")]
)  # fmt: skip
def test_a_compiler_that_refuses_is_translated(precision: str, words: str, typed, tmp_path) -> None:
    graph = typed[precision, False]
    with pytest.raises(CompileError, match=f"HW-specific(.|\n)*{words}"):
        registry.build(
            "tensorrt_rtx", graph.path, tmp_path / "m", "sm75", PROFILE, graph.expected, timeout=120
        )


def _planted(typed: Typed, path: Path, *, victim: int) -> str:
    """One node reads the floats that its Q/DQ, or the DequantizeLinear of its weights, stands for."""
    model = onnx.load(typed.path)
    node = [n for n in model.graph.node if n.op_type in inspect.COMPUTE][victim]
    producers = {n.output[0]: n for n in model.graph.node}
    weights = producers[node.input[1]]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    integers, scale = (constants[name].astype(np.float32) for name in weights.input[:2])
    axis = next(onnx.helper.get_attribute_value(a) for a in weights.attribute if a.name == "axis")
    block = next((a.i for a in weights.attribute if a.name == "block_size"), 1)
    if block > 1:
        floats = integers * np.repeat(scale, block, axis=axis)
    else:
        floats = integers * scale.reshape([-1 if d == axis else 1 for d in range(integers.ndim)])
    kind = constants[weights.input[1]].dtype
    model.graph.initializer.append(onnx.numpy_helper.from_array(floats.astype(kind), "planted"))
    node.input[1] = "planted"
    if block == 1:
        node.input[0] = producers[producers[node.input[0]].input[0]].input[0]
    onnx.save(model, path)
    return str(node.name)


@needs_rtx
@pytest.mark.parametrize(("precision", "victim"), [("fp8", 1), ("fp8", 3), ("int4", 4)])
def test_a_layer_left_in_floats_is_the_one_named(precision: str, victim: int, typed, tmp_path) -> None:
    graph = typed[precision, False]
    name = _planted(graph, tmp_path / "planted.onnx", victim=victim)
    receipt = registry.build(
        "tensorrt_rtx", tmp_path / "planted.onnx", tmp_path / "m", "sm89", PROFILE, graph.expected, timeout=120
    ).receipt  # fmt: skip
    assert [line.split(":")[0] for line in receipt.disagreements] == [name]
    assert f"asked {precision}, built fp" in receipt.disagreements[0]


@pytest.mark.parametrize("backend", [ort, pytest.param(ov, marks=needs_openvino)])
def test_weights_left_in_floats_are_seen_on_the_cpu(backend, typed, tmp_path) -> None:
    graph = typed["int4", True]
    name = _planted(graph, tmp_path / "planted.onnx", victim=3)
    receipt = backend.build(tmp_path / "planted.onnx", tmp_path / "m", "cpu", PROFILE, graph.expected).receipt
    assert receipt.disagreements == (f"{name}: asked int4, built fp32",)


@needs_rtx
def test_bf16_layers_that_are_fp16_fail_the_receipt(typed, tmp_path) -> None:
    receipt = registry.build(
        "tensorrt_rtx", typed["fp16", False].path, tmp_path / "m", "sm89", PROFILE, typed["bf16", False].expected,
        timeout=120,
    ).receipt  # fmt: skip
    assert len(receipt.disagreements) == 5 and "asked bf16, built fp16" in receipt.disagreements[0]
