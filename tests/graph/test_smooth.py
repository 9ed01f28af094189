from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from graphs import compute, constants_of, error, graph_of
from onnx import NodeProto, helper

from tlexport.errors import ExportError
from tlexport.graph import inspect, smooth
from tlexport.graph.calibration import calibrate
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.graph.trace import trace

Run = Callable[..., np.ndarray]
RANDOM = np.random.default_rng(7)
TOKENS = RANDOM.standard_normal((6, 5, 16)).astype(np.float32)
GAMMA = np.where(np.arange(16) == 3, 80, 1).astype(np.float32)  # one loud channel, as large transformers have


def _normalisation(kind: str) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """x [N, 5, 16] -> normalised [N, 5, 16], channel 3 loud."""
    if kind == "layer":
        node = helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normalised"], "norm", axis=-1)
        return [node], {"gamma": GAMMA, "beta": 0.1 * GAMMA}
    nodes = [
        helper.make_node("ReduceMean", ["x", "last"], ["mean"], "mean"),
        helper.make_node("Sub", ["x", "mean"], ["centred"], "centre"),
        helper.make_node("Mul", ["centred", "centred"], ["squares"], "square"),
        helper.make_node("ReduceMean", ["squares", "last"], ["variance"], "variance"),
        helper.make_node("Sqrt", ["variance"], ["deviation"], "sqrt"),
        helper.make_node("Div", ["centred", "deviation"], ["unit"], "divide"),
        helper.make_node("Mul", ["gamma", "unit"], ["scaled"], "scale"),
        helper.make_node("Add", ["scaled", "beta"], ["normalised"], "shift"),
    ]
    return nodes, {"gamma": GAMMA, "beta": 0.1 * GAMMA, "last": np.array([-1])}


def _attention_inputs(kind: str, joint: bool) -> onnx.ModelProto:
    """The normalised tokens to Q, K and V by one MatMul or by three, one of them a batch of Adds behind it."""
    nodes, constants = _normalisation(kind)
    names = ["qkv"] if joint else ["q", "k", "v"]
    for name in names:
        constants[name] = (RANDOM.standard_normal((16, 12)) / GAMMA[:, None]).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["normalised", name], [f"by_{name}"], name))
    nodes.append(helper.make_node("Sum", [f"by_{name}" for name in names], ["y"], "sum"))
    return graph_of(nodes, constants, {"x": (5, 16)}, {"y": (5, 12)})


def _spoilt(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> float:
    ranges = calibrate(model, feeds, tensors_to_calibrate(model, "trt"), method="max")
    found = np.concatenate([compute(quantize(model, ranges, "trt"), each) for each in feeds])
    return error(found, np.concatenate([compute(model, each) for each in feeds]))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kind", ["layer", "spelt out"])
def test_one_loud_channel_spoils_and_smoothing_repairs(kind: str, joint: bool) -> None:
    model = _attention_inputs(kind, joint)
    feeds = [{"x": TOKENS}, {"x": TOKENS[:1] + 1}]
    for alpha in (0.5, None):
        result = smooth.smooth(model, feeds, alpha=alpha)
        assert error(compute(result, feeds[0]), compute(model, feeds[0])) < 1e-5
        assert _spoilt(result, feeds) < 0.3 * _spoilt(model, feeds)


def test_the_factors_are_those_of_the_paper() -> None:
    model = _attention_inputs("layer", joint=False)
    result = smooth.smooth(model, [{"x": TOKENS}], alpha=0.6)
    before, after = constants_of(model), constants_of(result)
    found = after["q"][:, 0] / before["q"][:, 0]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("normalised", onnx.TensorProto.FLOAT, None))
    activations = np.abs(compute(model, {"x": TOKENS})).max(axis=(0, 1))
    activations = np.maximum(activations, activations.max() / 16)
    weights = np.max([np.abs(before[name]).max(axis=1) for name in "qkv"], axis=0)
    expected = activations**0.6 / weights**0.4
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-4)
    np.testing.assert_allclose(after["gamma"] * found, before["gamma"], rtol=1e-4)


def test_a_traced_transformer_computes_the_same(
    transformer: onnx.ModelProto, photographs: np.ndarray, run: Run
) -> None:
    """Two blocks: in front of each attention and each MLP stands a normalisation; the one before the head is pooled."""
    found = smooth.regions(transformer)
    assert len(found) == 4
    assert all(len(region.readers) == 1 and region.channels == 192 for region in found)
    result = smooth.smooth(transformer, [{"images": photographs[:4]}])
    np.testing.assert_allclose(run(result, photographs[4:8]), run(transformer, photographs[4:8]), atol=1e-5)
    changed = [
        name
        for name, value in constants_of(transformer).items()
        if not np.array_equal(value, constants_of(result)[name])
    ]
    assert len(changed) == 12  # factor, term and matrix of each


def test_a_root_mean_square_norm_as_our_exporter_spells_it(metadata: dict[str, str]) -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.left, self.right = (
                torch.nn.RMSNorm(8),
                torch.nn.Linear(8, 4),
                torch.nn.Linear(8, 4),
            )
            with torch.no_grad():
                self.norm.weight[2] = 50
                self.left.weight[:, 2] /= 50
                self.right.weight[:, 2] /= 50

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return self.left(x) * torch.sigmoid(self.right(x))

    model = trace(
        Gated(), (torch.zeros(2, 8),), opset=20, input_names=("x",), output_name="y", metadata=metadata
    )
    (region,) = smooth.regions(model)
    assert len(region.readers) == 2
    feeds = [{"x": TOKENS[:, 0, :8]}]
    assert _spoilt(smooth.smooth(model, feeds), feeds) < 0.5 * _spoilt(model, feeds)


def test_a_normalisation_that_a_residual_reads_too_is_left_alone() -> None:
    model = _attention_inputs("layer", joint=True)
    model.graph.node.append(helper.make_node("Softmax", ["normalised"], ["z"], "other"))
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    assert smooth.regions(model) == []
    assert smooth.smooth(model, [{"x": TOKENS}]) == model


def test_what_is_raised_and_the_argument_left_alone() -> None:
    model = _attention_inputs("layer", joint=True)
    before = model.SerializeToString(deterministic=True)
    smooth.smooth(model, [{"x": TOKENS}])
    assert model.SerializeToString(deterministic=True) == before
    with pytest.raises(ExportError, match=r"from 0 to 1, not -0\.1"):
        smooth.smooth(model, [{"x": TOKENS}], alpha=-0.1)
    with pytest.raises(ExportError, match="no samples"):
        smooth.smooth(model, [])
    strange = TOKENS.copy()
    strange[0] = np.nan
    with pytest.raises(ExportError, match="NaN or infinity on the calibration samples in normalised"):
        smooth.smooth(model, [{"x": strange}])
    assert set(inspect.compute_dtypes(model).values()) == {"fp32"}
