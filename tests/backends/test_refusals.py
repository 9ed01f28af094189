"""What a backend refuses is named with the layer, and with the module of the PyTorch model that it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from tlexport.backends import ort, ov, trt, typed
from tlexport.errors import CompileError
from tlexport.graph import inspect, trace
from tlexport.tensors import Profile

METADATA = {"class_names": json.dumps([]), "preprocessing": json.dumps({}), "task": "multiclass"}
PROFILE = Profile(min=1, opt=1, max=4)
needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")
needs_openvino = pytest.mark.skipif(not ov.availability().installed, reason="openvino is not installed")


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.det(x[:, :, :4, :4])[..., None, None]


class DoublePooling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x.double(), 2).float()


class Foreign(nn.Module):
    """A network with one operator that a backend lacks, two Sequential deep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), layer))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.float() / 255).mean((2, 3)).softmax(1)


def saved(layer: nn.Module, path: Path) -> Path:
    example = (torch.zeros(2, 3, 10, 10, dtype=torch.uint8),)
    ends = {"input_names": ("images",), "output_name": "probabilities"}
    trace.save(trace.trace(Foreign(layer), example, opset=20, metadata=METADATA, **ends), path)
    return path


@pytest.mark.parametrize(
    ("backend", "target", "layer", "node"),
    [
        pytest.param(ort, "cpu", DoublePooling(), "AveragePool_0", id="onnxruntime"),
        pytest.param(ov, "cpu", Determinant(), "Det_0", id="openvino", marks=needs_openvino),
        pytest.param(trt.RTX, "sm89", Determinant(), "Det_0", id="tensorrt_rtx", marks=needs_rtx),
    ],
)
def test_an_operator_that_the_backend_lacks(backend, target, layer, node, tmp_path) -> None:
    path, out = saved(layer, tmp_path / "g.onnx"), tmp_path / f"model{backend.SUFFIX}"
    with pytest.raises(CompileError) as refused:
        backend.build(path, out, target, PROFILE, inspect.compute_dtypes(trace.load(path)))
    assert f"{node} (module net.1.1)" in str(refused.value)
    assert not out.exists()


@needs_rtx
def test_a_constant_that_tensorrt_cannot_read_is_placed_by_who_reads_it(tmp_path) -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.int() << 2).float()

    path = saved(Shift(), tmp_path / "g.onnx")
    with pytest.raises(CompileError, match=r"initializer.*BitShift_0 \(module net\.1\.1\)"):
        trt.RTX.build(path, tmp_path / "m.engine", "sm89", PROFILE, {})


@needs_openvino
def test_an_operator_of_another_domain_is_placed(tmp_path) -> None:
    path = saved(Determinant(), tmp_path / "g.onnx")
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Det")
    node.op_type, node.domain = "Scaler", "ai.onnx.ml"
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, path)
    with pytest.raises(CompileError, match=r"OpenVINO has no Scaler .*Det_0 \(module net\.1\.1\)"):
        typed.require_standard(path, "OpenVINO")


def test_a_layer_that_was_not_built_as_asked_is_placed(tmp_path) -> None:
    class Products(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(-1, -2)

    path = saved(Products(), tmp_path / "g.onnx")
    expected = dict.fromkeys(inspect.compute_dtypes(trace.load(path)), "int8")
    made = ort.build(path, tmp_path / "m.onnx", "cpu", PROFILE, expected)
    assert made.receipt.disagreements == (
        "net.0: asked int8, built fp32",
        "MatMul_0 (module net.1.1): asked int8, built fp32",
    )
