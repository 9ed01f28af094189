"""Faults planted in one layer of a network of 33, one after the other: each must be found, in few evaluations, with its cause."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tlexport.backends.typed import rounding_to_half
from tlexport.graph import attribution, probe, search, splice
from tlexport.graph.calibration import calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.graph.sensitivity import Answers, sensitivities
from tlexport.graph.trace import trace

LAYERS = 32
WIDTH = 16


class Chain(torch.nn.Module):
    """32 convolutions with ReLU and a linear head: every pair can be rescaled without changing the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(3 if i == 0 else WIDTH, WIDTH, 3, padding=1) for i in range(LAYERS)
        )
        self.head = torch.nn.Linear(WIDTH, 5)
        for layer in self.layers:
            torch.nn.init.kaiming_normal_(layer.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 8)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return torch.softmax(self.head(x.mean((2, 3))), dim=1)


@pytest.fixture(scope="module")
def sound(example: torch.Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    torch.manual_seed(0)
    return trace(
        Chain().eval(),
        (example,),
        opset=20,
        metadata=metadata,
        input_names=("images",),
        output_name="probabilities",
    )


@pytest.fixture(scope="module")
def batches(photographs: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"images": photographs[:16]}, {"images": photographs[16:32]}]


def _int8(graph: onnx.ModelProto, batches: list[dict[str, np.ndarray]]) -> onnx.ModelProto:
    ranges = calibrate(graph, batches, tensors_to_calibrate(graph, "trt"), method="max")
    return quantize(graph, ranges, "trt")


def _rescaled(graph: onnx.ModelProto, layer: int, by: float, channel: int | None = None) -> onnx.ModelProto:
    """The same function with a layer's output channels larger and the next layer's weights smaller by as much."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    rows = slice(None) if channel is None else slice(channel, channel + 1)
    factors = {f"layers.{layer}.weight": (rows, by), f"layers.{layer}.bias": (rows, by)}
    factors[f"layers.{layer + 1}.weight"] = ((slice(None), rows), 1 / by)
    for tensor in changed.graph.initializer:
        if tensor.name in factors:
            where, factor = factors[tensor.name]
            values = numpy_helper.to_array(tensor).copy()
            values[where] *= factor
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return changed


def _perturbed(typed: onnx.ModelProto, layer: int) -> onnx.ModelProto:
    """The typed graph with the weights of one layer shuffled, as if the file had been damaged."""
    changed = onnx.ModelProto()
    changed.CopyFrom(typed)
    (tensor,) = (t for t in changed.graph.initializer if t.name == f"layers.{layer}.weight_quantized")
    weight = numpy_helper.to_array(tensor)
    shuffled = np.random.default_rng(layer).permutation(weight.ravel()).reshape(weight.shape)
    tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    return changed


def _found(
    graph: onnx.ModelProto,
    typed: onnx.ModelProto,
    batches: list[dict[str, np.ndarray]],
    executable: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model,
) -> tuple[str, float, int, int]:
    """The layer that is blamed, its share of the error, the evaluations and the number of groups."""
    groups = splice.groups(graph, typed)
    answers = Answers(graph, batches, executable)

    def noise(low: frozenset[int]) -> float:
        return answers.noise(splice.lowered(graph, typed, [n for g in low for n in groups[g]]))

    located = search.locate(noise, range(len(groups)))
    return groups[located.group][0], located.share, located.evaluations, len(groups)


def test_fifty_planted_faults_are_all_found(
    sound: onnx.ModelProto, batches: list[dict[str, np.ndarray]]
) -> None:
    int8 = _int8(sound, batches)
    rng = np.random.default_rng(1)
    most = math.ceil(math.log2(LAYERS + 1)) + 3
    for number in range(50):
        layer = int(rng.integers(LAYERS - 1))
        kind = ("overflow", "outlier", "perturbed")[number % 3]
        if kind == "perturbed":
            graph, typed, culprit, executable = sound, _perturbed(int8, layer), layer, lambda model: model
            words = "weights are not those of the FP32 graph"
        elif kind == "outlier":
            channel = _strongest(sound, batches, layer)
            graph = _rescaled(sound, layer, 300.0, channel)
            typed, culprit, executable = _int8(graph, batches), layer + 1, lambda model: model
            words = f"channel {channel} of its input reaches"
        else:
            graph = _rescaled(sound, layer, 5e4)
            typed, culprit, executable = to_half(graph, "fp16"), layer, rounding_to_half
            words = "its output reaches"
        blamed, share, evaluations, groups = _found(graph, typed, batches, executable)
        assert blamed == f"layers.{culprit}", (number, kind, layer, blamed, share)
        assert groups == LAYERS + 1 and evaluations <= most
        assert words in attribution.cause(graph, typed, blamed, batches), (kind, layer)


def _strongest(graph: onnx.ModelProto, batches: list[dict[str, np.ndarray]], layer: int) -> int:
    """The channel of a layer's output that carries most: one that is dead would hide the fault."""
    relu = next(
        n for n in graph.graph.node if n.op_type == "Relu" and n.input[0] == _output(graph, f"layers.{layer}")
    )
    values = probe.showing(graph, [relu.output[0]]).run(None, batches[0])[0]
    return int(np.square(values).mean(axis=(0, 2, 3)).argmax())


def _output(graph: onnx.ModelProto, node: str) -> str:
    return next(n.output[0] for n in graph.graph.node if n.name == node)


def test_the_ratio_of_each_layer_falls_where_the_fault_is(
    sound: onnx.ModelProto, batches: list[dict[str, np.ndarray]]
) -> None:
    graph = sound
    typed = _perturbed(_int8(graph, batches), 10)
    ratios = {
        ratio.layer: ratio.db for ratio in attribution.ratios(graph, typed, batches, lambda model: model)
    }
    assert min(ratios[f"layers.{i}"] for i in range(10)) > 20 > 5 > ratios["layers.10"]
    exact = attribution.ratios(graph, graph, batches, lambda model: model)
    assert all(ratio.db is None for ratio in exact) and len(exact) > LAYERS


def test_overflow_is_a_ratio_of_minus_infinity(
    sound: onnx.ModelProto, batches: list[dict[str, np.ndarray]]
) -> None:
    graph = _rescaled(sound, 5, 1e5)
    ratios = {
        r.layer: r.db for r in attribution.ratios(graph, to_half(graph, "fp16"), batches, rounding_to_half)
    }
    assert ratios["layers.4"] > 30 and ratios["layers.5"] == -math.inf


def test_what_calibration_cut_off_is_named(
    sound: onnx.ModelProto, batches: list[dict[str, np.ndarray]]
) -> None:
    graph = sound
    ranges = calibrate(graph, batches, tensors_to_calibrate(graph, "trt"), method="max")
    name = next(n.input[0] for n in graph.graph.node if n.name == "layers.7")
    narrow = {**ranges, name: type(ranges[name])(0.0, ranges[name].high / 10)}
    typed = quantize(graph, narrow, "trt")
    blamed, share, *_ = _found(graph, typed, batches)
    assert blamed == "layers.7" and share > 0.5
    assert "its grid ends at" in attribution.cause(graph, typed, blamed, batches)


def test_sensitivities_rank_the_faulty_layer_first_and_add_up(
    sound: onnx.ModelProto, batches: list[dict[str, np.ndarray]]
) -> None:
    graph = sound
    int8 = _int8(graph, batches)
    answers, groups = Answers(graph, batches), splice.groups(graph, int8)
    assert answers.noise(graph) == 0
    sound = sensitivities(answers, graph, int8, groups)
    assert 0.3 < sum(sound) / answers.noise(int8) < 3  # errors of layers add up in squares, roughly
    faulty = sensitivities(answers, graph, _perturbed(int8, 20), groups)
    assert groups[int(np.argmax(faulty))] == ("layers.20",)
