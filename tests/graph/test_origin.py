"""Each node knows the module of the PyTorch model that it comes from, through every pass, and messages say it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import calibration, cast, inspect, quantize
from tlexport.graph.trace import trace

METADATA = {"class_names": json.dumps([]), "preprocessing": json.dumps({}), "task": "multiclass"}
Batch = Callable[[int], dict[str, np.ndarray]]


class Scores(nn.Module):
    """Attention weights from learnt queries, by einsum, and no module of their own for the products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btd,qd->bqt", x, self.queries).softmax(-1) @ x


class Own(nn.Module):
    """A user's network: Sequential in Sequential, a layer used twice, a transposed convolution, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Hardswish())
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Sequential(self.shared, nn.Sequential(self.shared, nn.ConvTranspose2d(4, 6, 2, 2))),
        )
        self.scores = Scores(6)
        self.head = nn.Linear(18 + 2, 5)

    def forward(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        tokens = self.net(images.float() / 255).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.scores(tokens).flatten(1), numbers], 1)).softmax(-1)


def inputs(count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 3, 11, 9), dtype=np.uint8)
    return {"images": images, "numbers": generator.normal(size=(count, 2)).astype(np.float32)}


def traced(module: nn.Module, example: dict[str, np.ndarray], opset: int = 20) -> onnx.ModelProto:
    return trace(
        module,
        tuple(torch.from_numpy(array) for array in example.values()),
        opset=opset,
        input_names=tuple(example),
        output_name="probabilities",
        metadata=METADATA,
    )


@pytest.fixture(scope="module")
def own() -> onnx.ModelProto:
    return traced(Own(), inputs(2))


def of_type(model: onnx.ModelProto, operator: str) -> list[str]:
    return [origin.module(node) for node in model.graph.node if node.op_type == operator]


def test_every_node_of_a_users_network_is_placed(own: onnx.ModelProto) -> None:
    # A layer that is used twice goes by the place of each use.
    assert of_type(own, "Conv") == ["net.0", "net.2.0.0", "net.2.1.0.0"]
    assert of_type(own, "ConvTranspose") == ["net.2.1.1"]
    assert of_type(own, "HardSwish") == ["net.2.0.1", "net.2.1.0.1"]
    assert of_type(own, "MatMul") == ["scores", "scores"]  # einsum's and the plain one
    assert of_type(own, "Gemm") == ["head"]
    paths = {name for name, _ in Own().named_modules(remove_duplicate=False)}
    assert {origin.module(node) for node in own.graph.node} <= paths


@pytest.mark.parametrize(
    ("name", "expected"),
    [("test_vit", "network.blocks.3.attn"), ("test_convnext", "network.stages.1.blocks.0.conv_dw")],
)
def test_networks_of_timm(name: str, expected: str) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model(name)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images.float() / 255).softmax(1)

    module = Classifier()
    size = module.network.default_cfg["input_size"][1:]
    model = traced(module, {"images": np.zeros((2, 3, *size), np.uint8)})
    found = origin.modules(model)
    assert set(found.values()) <= {name for name, _ in module.named_modules()}
    assert all(found.get(node) for node in inspect.compute_dtypes(model))  # every product has a layer
    assert expected in found.values()


def test_nothing_else_of_the_exporters_notes_is_left(own: onnx.ModelProto) -> None:
    assert {entry.key for node in own.graph.node for entry in node.metadata_props} == {origin.MODULE}
    content = own.SerializeToString()
    for trait in (b"pkg.torch", b".py", b"site-packages", str(Path.home()).encode() + b"/"):
        assert trait not in content
    again = traced(Own(), inputs(2))
    assert own.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


@pytest.mark.parametrize("convert", ["opset 23", "fp16", "int8-trt", "int8-cpu"])
def test_the_passes_keep_it_and_place_what_they_add(own: onnx.ModelProto, convert: str) -> None:
    kind, _, flavour = convert.partition("-")
    if kind == "opset 23":
        changed = traced(Own(), inputs(2), opset=23)
    elif kind == "fp16":
        changed = cast.to_half(own, "fp16")
    else:
        ranges = calibration.calibrate(own, [inputs(4)], quantize.tensors_to_calibrate(own, flavour))
        changed = quantize.quantize(own, ranges, flavour)
    before, after = origin.modules(own), origin.modules(changed)
    assert {name: after.get(name) for name in before} == before
    added = [node for node in changed.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert bool(added) == (kind == "int8") and all(origin.module(node) for node in added)


def test_weights_that_do_not_fit_are_placed() -> None:
    module = Own()
    with torch.no_grad():
        module.scores.queries[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"largest 1e\+06.*\[in the PyTorch model: .*\(module scores\)\]"):
        cast.to_half(traced(module, inputs(2)), "fp16")
    with pytest.raises(ExportError, match=r"not one matrix product") as refused:
        traced(Summing(), {"images": np.zeros((2, 3, 4, 4), np.uint8)})
    assert "(module inner)" in str(refused.value)


class Summing(nn.Module):
    """An einsum that is no matrix product, one module down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Diagonal()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images.float())


class Diagonal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,bchw,bchw->bc", x, x, x)


def test_a_contradiction_in_the_types_is_placed(own: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(own)
    node = next(node for node in broken.graph.node if node.op_type == "ConvTranspose")
    weight = next(tensor for tensor in broken.graph.initializer if tensor.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    with pytest.raises(ExportError, match=r"do not fit together.*net\.2\.1\.1"):
        inspect.element_types(broken)


def test_how_a_place_is_told(own: onnx.ModelProto) -> None:
    assert origin.named("MatMul_3", "net.blocks.0.attn") == "MatMul_3 (module net.blocks.0.attn)"
    assert origin.named("head", "head") == origin.named("head", "") == "head"
    product = next(node for node in own.graph.node if node.op_type == "MatMul")
    for text in (
        f"no kernel for '{product.name}'",
        f"value {product.output[0]}: bad",
        "unsupported: MatMul-20",
    ):
        told = origin.explained(text, own)
        assert told.startswith(text) and "MatMul_0 (module scores)" in told
    for text in ("the disk is full", f"prefix{product.name} is another name", "no kernel for 'head'"):
        assert origin.explained(text, own) == text


def test_a_graph_from_elsewhere_has_no_places(own: onnx.ModelProto) -> None:
    foreign: Any = onnx.ModelProto()
    foreign.CopyFrom(own)
    for node in foreign.graph.node:
        node.ClearField("metadata_props")
    assert origin.modules(foreign) == {}
    assert origin.explained("MatMul_0 failed", foreign) == "MatMul_0 failed"
    assert origin.listed(foreign, [node.name for node in foreign.graph.node]).endswith("more")
