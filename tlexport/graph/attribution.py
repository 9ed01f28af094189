"""Where a typed graph departs from the FP32 one: the signal-to-noise ratio of every layer, and what is wrong with one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from tlexport.graph import inspect, probe

OUTLIER = 8.0  # times the median channel: it leaves that one 16 of 127 levels, 24 dB
CLIPPED = 1e-2  # of a tensor's squared values: more lies in what is cut off than the rounding of 8 bits costs
STEPS = 1.5  # of the grid: a learnt rounding moves a weight by less than one

# Type -> its name, largest number, bits of precision (ONNX's operator specification of Cast).
HALVES: dict[int, tuple[str, float, int]] = {
    TensorProto.FLOAT16: ("FP16", 65504.0, 11),
    TensorProto.BFLOAT16: ("BF16", 3.3895e38, 8),
}

Batches = Sequence[Mapping[str, np.ndarray]]
Executable = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass(frozen=True)
class LayerRatio:
    """Signal-to-quantisation-noise ratio of a layer's output in dB: 10 log10 of squared values over squared errors.

    None: infinite (no error at all), negative infinity is a value that is not finite.
    """

    layer: str
    operator: str
    db: float | None


def ratios(
    model: onnx.ModelProto, typed: onnx.ModelProto, batches: Batches, executable: Executable
) -> list[LayerRatio]:
    """Each layer that makes a float tensor of the same name in both graphs, in the FP32 graph's order. Errors accumulate."""
    ours, theirs = inspect.element_types(model), inspect.element_types(typed)
    floats = (TensorProto.FLOAT, *HALVES)
    layers = [
        node
        for node in model.graph.node
        if ours.get(node.output[0]) == TensorProto.FLOAT and theirs.get(node.output[0]) in floats
    ]
    names = [str(node.output[0]) for node in layers]
    signal, noise = np.zeros(len(names)), np.zeros(len(names))
    right, wrong = probe.showing(model, names), probe.showing(executable(typed), names)
    for batch in batches:
        for index, (x, y) in enumerate(
            zip(right.run(None, dict(batch)), wrong.run(None, dict(batch)), strict=True)
        ):
            with np.errstate(invalid="ignore", over="ignore"):
                signal[index] += float(np.square(x, dtype=np.float64).sum())
                noise[index] += float(np.square(np.subtract(x, y, dtype=np.float64)).sum())
    return [
        LayerRatio(str(node.name), str(node.op_type), _decibels(signal[index], noise[index]))
        for index, node in enumerate(layers)
    ]


def cause(model: onnx.ModelProto, typed: onnx.ModelProto, layer: str, batches: Batches) -> str:
    """What is wrong with a product, in words, by what can be seen in its weights and in the FP32 graph's tensors around it.

    In this order: weights that are not the FP32 graph's, values beyond FP16, values the grid cuts off, an outlier channel.
    """
    node = next(node for node in model.graph.node if node.name == layer)
    typed_node = next(node for node in typed.graph.node if node.name == layer)
    if found := _foreign_weights(model, typed, node, typed_node):
        return found
    tensors = [name for name in (node.input[0], node.output[0]) if _is_float(model, name)]
    seen = _observed(model, tensors, batches)
    kind = inspect.element_types(typed)[typed_node.output[0]]
    if kind in HALVES:
        return _beyond_half(node, seen, *HALVES[kind])
    grid = _grid(typed, typed_node.input[0])
    return _on_the_grid(node, seen, grid) or "its tensors are spread so that 8 bits resolve them badly"


def _on_the_grid(node: NodeProto, seen: Mapping[str, _Channels], grid: tuple[float, float] | None) -> str:
    channels = seen.get(node.input[0])
    if channels is None:
        return ""
    worst, median = int(channels.largest.argmax()), float(np.median(channels.largest))
    top = float(channels.largest[worst])
    if grid is not None and top > max(abs(grid[0]), abs(grid[1])):
        lost = channels.lost(*grid)
        if lost > CLIPPED:
            return (
                f"its input reaches {top:.4g} and its grid ends at {max(abs(grid[0]), abs(grid[1])):.4g}: {lost:.0%} of the "
                "signal's power is cut off; calibrate on samples like these, or with calibration.method=max"
            )
    if median > 0 and top > OUTLIER * median:
        return (
            f"channel {worst} of its input reaches {top:.4g}, {top / median:.0f} times the median channel, and one scale "
            "serves them all"
        )
    return ""


def _beyond_half(node: NodeProto, seen: Mapping[str, _Channels], name: str, largest: float, bits: int) -> str:
    where = {"input": seen.get(node.input[0]), "output": seen.get(node.output[0])}
    for side, channels in where.items():
        if channels is not None and (top := float(channels.largest.max())) > largest:
            return f"its {side} reaches {top:.4g}, beyond {name}'s {largest:.5g}"
    return f"it loses what {name}'s {bits} bits of precision do not hold"


def _foreign_weights(
    model: onnx.ModelProto, typed: onnx.ModelProto, node: NodeProto, typed_node: NodeProto
) -> str:
    """Whether a constant factor is further from the FP32 graph's than its grid explains."""
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    for before, after in zip(node.input[:2], typed_node.input[:2], strict=True):
        if before not in floats:
            continue
        right = numpy_helper.to_array(floats[before]).astype(np.float64)
        held = _constant(typed, after)
        if held is None:
            continue
        wrong, step = held
        with np.errstate(invalid="ignore"):
            off = np.abs(wrong - right) > STEPS * step + 1e-6 * np.abs(right)
        off |= ~np.isfinite(wrong)
        if off.any():
            return (
                f"{int(off.sum())} of its {off.size} weights are not those of the FP32 graph (by up to "
                f"{float(np.abs(wrong - right)[off].max()):.3g}): the file was changed, make it again with tlexport quantize"
            )
    return ""


def _constant(typed: onnx.ModelProto, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A constant factor's values and the step of its grid at each, float64 of its shape; None for an activation."""
    constants = {tensor.name: tensor for tensor in typed.graph.initializer}
    if name in constants:
        values = numpy_helper.to_array(constants[name])
        wide = values.astype(np.float64)
        exact = values.dtype == np.float32
        return wide, np.zeros_like(wide) if exact else 2.0**-8 * np.abs(wide) + 6e-8
    node = next((n for n in typed.graph.node if name in n.output), None)
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in constants:
        return None
    integers = numpy_helper.to_array(constants[node.input[0]]).astype(np.float64)
    scale = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [-1 if d == axis else 1 for d in range(integers.ndim)] if scale.ndim == 1 else [1] * integers.ndim
    step = np.broadcast_to(scale.reshape(shape), integers.shape)
    return integers * step, step


def _grid(typed: onnx.ModelProto, name: str) -> tuple[float, float] | None:
    """The lowest and highest value that a quantised activation's grid holds."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in typed.graph.initializer}
    node = next((n for n in typed.graph.node if name in n.output), None)
    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in constants:
        return None
    scale, zero = constants[node.input[1]], constants.get(node.input[2] if len(node.input) > 2 else "")
    if scale.ndim or zero is None or zero.dtype not in (np.int8, np.uint8):
        return None
    limits = np.iinfo(zero.dtype)
    return float(scale) * (limits.min - int(zero)), float(scale) * (limits.max - int(zero))


class _Channels:
    """The largest |x| of each channel of a tensor [n, C, ...] or [n, ..., C], and its values' power, over the batches."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.largest = np.zeros(0)
        self.kept: list[np.ndarray] = []

    def observe(self, values: np.ndarray) -> None:
        others = tuple(d for d in range(values.ndim) if d != self.axis % values.ndim)
        largest = np.abs(values).max(axis=others)
        self.largest = np.maximum(self.largest, largest) if self.largest.size else largest
        self.kept.append(values)

    def lost(self, low: float, high: float) -> float:
        """Share of the power that lies beyond the interval."""
        cut = sum(float(np.square(v - np.clip(v, low, high), dtype=np.float64).sum()) for v in self.kept)
        return cut / max(sum(float(np.square(v, dtype=np.float64).sum()) for v in self.kept), 1e-300)


def _observed(model: onnx.ModelProto, names: Sequence[str], batches: Batches) -> dict[str, _Channels]:
    readers = {name: node for node in model.graph.node for name in node.input}
    found = {
        name: _Channels(1 if readers.get(name) is not None and readers[name].op_type == "Conv" else -1)
        for name in names
    }
    given = {value.name for value in model.graph.input}
    computed = probe.showing(model, [name for name in names if name not in given])
    made = [name for name in names if name not in given]
    for batch in batches:
        values = dict(zip(made, computed.run(None, dict(batch)), strict=True)) if made else {}
        for name in names:
            found[name].observe(values[name] if name in values else batch[name])
    return found


def _is_float(model: onnx.ModelProto, name: str) -> bool:
    return inspect.element_types(model).get(name) == TensorProto.FLOAT


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
