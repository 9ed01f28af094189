"""Splicing holds if it gives what the typed graph gives: all of it, and any part of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torchvision

from tlexport.errors import ExportError
from tlexport.graph.calibration import calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.quantize import Flavour, quantize, tensors_to_calibrate
from tlexport.graph.splice import groups, lowered
from tlexport.graph.trace import trace

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def residual(example: torch.Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """ResNet-18 with random weights: residual sums read tensors that are quantised for other layers' sake."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision.models.resnet18(num_classes=5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.net(images.float() / 255), dim=1)

    return trace(
        Net().eval(),
        (example,),
        opset=20,
        metadata=metadata,
        input_names=("images",),
        output_name="probabilities",
    )


@pytest.mark.parametrize("flavour", ["cpu", "trt"])
@pytest.mark.parametrize("network", ["graph", "residual", "transformer"])
def test_a_part_is_what_excluding_the_rest_gives(
    network: str, flavour: Flavour, photographs: np.ndarray, run: Run, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(network)
    images = photographs[:8]
    ranges = calibrate(model, [{"images": images}], tensors_to_calibrate(model, flavour), method="max")
    typed = quantize(model, ranges, flavour)
    grouped = groups(model, typed)
    every = [name for group in grouped for name in group]
    np.testing.assert_allclose(run(lowered(model, typed, every), images), run(typed, images), atol=1e-6)
    rng = np.random.default_rng(0)
    low = [name for group in grouped if rng.random() < 0.5 for name in group]
    part = quantize(model, ranges, flavour, exclude=set(every) - set(low))
    found, expected = run(lowered(model, typed, low), images), run(part, images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - run(model, images)).max() > 1e-5  # something was lowered
    np.testing.assert_array_equal(run(lowered(model, typed, ()), images), run(model, images))


def test_fp16_products_stand_between_fp32_tensors(
    transformer: onnx.ModelProto, photographs: np.ndarray, run: Run
) -> None:
    typed = to_half(transformer, "fp16")
    every = [name for group in groups(transformer, typed) for name in group]
    spliced = lowered(transformer, typed, every[:3])
    onnx.checker.check_model(spliced)
    np.testing.assert_allclose(
        run(spliced, photographs[:4]), run(transformer, photographs[:4]), rtol=0.02, atol=1e-3
    )


def test_products_that_share_an_activation_are_one_group(
    residual: onnx.ModelProto, photographs: np.ndarray
) -> None:
    ranges = calibrate(residual, [{"images": photographs[:4]}], tensors_to_calibrate(residual, "trt"))
    grouped = groups(residual, quantize(residual, ranges, "trt"))
    assert sum(map(len, grouped)) == 21 and len(grouped) == 18  # three blocks begin with two branches
    assert ("net.layer2.0.conv1", "net.layer2.0.downsample.0") in grouped


def test_an_fp32_graph_with_other_weights_has_a_group_for_them(graph: onnx.ModelProto) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    name = "network.blocks.3.0.conv_pw.weight"
    (tensor,) = (t for t in changed.graph.initializer if t.name == name)
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight[0] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, name))
    assert groups(graph, graph) == []
    assert groups(graph, changed) == [("network.blocks.3.0.conv_pw",)]


def test_a_name_that_is_no_product_is_an_error(graph: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="no product of both graphs is named nowhere"):
        lowered(graph, graph, ["nowhere"])
