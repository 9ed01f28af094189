"""FP32 to INT8 or FP8 by QuantizeLinear and DequantizeLinear pairs, in the form each family of backends computes fastest.

`trt` (TensorRT, TensorRT-RTX): every factor of a compute node is symmetric S8, activations per tensor, weights per
output channel; biases stay float. `cpu` (ONNX Runtime, OpenVINO): activations are U8 with a zero point and biases S32; a
batch of weight matrices shares one scale. The outputs of convolutions, and of a Gemm with a Relu, are quantised too,
because ONNX Runtime fuses these only between Q/DQ on both sides; products of two activations (attention) stay FP32, which
OpenVINO runs faster and ONNX Runtime as fast. `fp8` (TensorRT from SM89 on): as `trt`, on the grid of float8 E4M3
(Micikevicius et al. 2022, arXiv:2209.05433), scaled so that the largest magnitude is its 448; convolutions whose
kernels have more than 32 places stay FP32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect
from tlexport.graph.grid import FP8_WEIGHTS, Grid, Range, Weights, of_activation, scale_of
from tlexport.graph.grid import Flavour as Flavour

MOST_TAPS_FP8 = (
    32  # TensorRT-RTX 1.7 computes convolutions with larger kernels in FP32, whatever the graph says
)
LARGEST_BIAS = 2**31 - 2**10  # in 32 bits, with room for rounding in float32


def tensors_to_calibrate(model: onnx.ModelProto, flavour: Flavour) -> list[str]:
    """Names of the activations `quantize` needs a range for, in the graph's order."""
    return _activations(model.graph, flavour, _chosen(model.graph, flavour, ()))


def products(model: onnx.ModelProto, flavour: Flavour) -> list[str]:
    """Names of the Conv, Gemm and MatMul that `quantize` takes, in the graph's order."""
    chosen = _chosen(model.graph, flavour, ())
    return [node.name for node in model.graph.node if node.name in chosen]


def quantize(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    flavour: Flavour,
    *,
    exclude: Collection[str] = (),
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """The graph with Q/DQ around every Conv, Gemm and MatMul that `exclude` does not name; the rest stays FP32.

    Flavour `cpu` also leaves MatMuls without a constant factor in FP32. No layer is left out by its place: on
    EfficientNet-Lite0 keeping the first or the last one in FP32 did not bring the output nearer to FP32's.

    `ranges` holds at least `tensors_to_calibrate(model, flavour)`. `reduce_range` keeps weights within 7 bits: needed
    on x86 CPUs without VNNI, where the sum of two 8-bit products saturates at 16 bits; of FP8 it is not asked.

    Requires an FP32 graph, for `fp8` of opset 19 or later. Raises ExportError if a range is missing, a name in `exclude`
    is not a compute node, or the result breaks its promise: both factors of each quantised node dequantised, scales
    positive and finite.
    """
    _require_fp32(model, exclude)
    chosen = _chosen(model.graph, flavour, exclude)
    _require_finite(model, ranges, chosen)
    if not any(node.op_type in inspect.QUANTISABLE for node in model.graph.node):
        raise ExportError(inspect.NO_PRODUCTS.format("FP8" if flavour == "fp8" else "INT8"))
    if not chosen:
        raise ExportError("there is no Conv, Gemm or MatMul left to quantise")
    activations = _activations(model.graph, flavour, chosen)
    if missing := [name for name in activations if name not in ranges]:
        shown = origin.explained(", ".join(missing[:5]), model)
        raise ExportError(f"{len(missing)} of {len(activations)} tensors have no calibrated range: {shown}")
    grids = {name: of_activation(ranges[name], flavour) for name in activations}
    weights = Weights(np.int8, 63 if reduce_range else 127)
    insertion = _Insertion(model.graph, grids, FP8_WEIGHTS if flavour == "fp8" else weights)
    for node in model.graph.node:
        if node.name in chosen:
            insertion.quantise(node, for_cpu=flavour == "cpu")
        else:
            insertion.copy(node, dequantised=flavour == "cpu" and node.name not in exclude)
        insertion.place(origin.module(node))
    result = insertion.applied_to(model)
    _ensure_quantised(result, chosen, "fp8" if flavour == "fp8" else "int8")
    return result


class _Insertion:
    """Builds the new node list in order; each tensor is quantised once, however many nodes read it."""

    def __init__(self, graph: onnx.GraphProto, grids: Mapping[str, Grid], weights: Weights) -> None:
        self.floats = {tensor.name: tensor for tensor in graph.initializer}
        self.grids = grids
        self.weights = weights
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._dequantised: dict[tuple[str, int | None, bytes], str] = {}
        self._placed = 0

    def place(self, module: str) -> None:
        """Take what was appended since the last call for part of this module of the PyTorch model."""
        for node in self.nodes[self._placed :]:
            origin.set_module(node, module)
        self._placed = len(self.nodes)

    def copy(self, original: NodeProto, *, dequantised: bool) -> None:
        """Append the node as it is; if `dequantised` it reads quantised activations through their Q/DQ."""
        node = _copied(original)
        if dequantised:
            node.input[:] = [
                self._activation(name) if name in self.grids else name for name in original.input
            ]
        self.nodes.append(node)

    def quantise(self, original: NodeProto, *, for_cpu: bool) -> None:
        """Append the compute node with both factors dequantised, and on CPUs the bias too where possible."""
        node = _copied(original)
        biased = for_cpu and _takes_integer_bias(original, self.grids, self.floats)
        for index, name in enumerate(original.input[:2]):
            if name in self.grids:
                node.input[index] = self._activation(name)
                continue
            weight = numpy_helper.to_array(self.floats[name])
            bias = numpy_helper.to_array(self.floats[original.input[2]]) if biased else None
            step = float(self.grids[original.input[0]].scale) if biased else 1.0
            # ONNX Runtime has no kernel for a batch of weights (an ensemble's) with a scale for each channel.
            batched = for_cpu and original.op_type == "MatMul" and weight.ndim > 2
            axis = None if batched else _channel_axis(original, index, weight.ndim)
            grid = self._weight_grid(weight, axis, bias, step)
            node.input[index] = self._constant(name, weight, grid, self.weights.largest)
            if bias is not None:
                bias_grid = Grid(
                    (grid.scale * step).astype(np.float32), np.zeros(grid.scale.shape, np.int32), axis=0
                )
                node.input[2] = self._constant(original.input[2], bias, bias_grid, LARGEST_BIAS)
        self.nodes.append(node)

    def applied_to(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with the new nodes and only the constants they read."""
        result = onnx.ModelProto()
        result.CopyFrom(model)
        del result.graph.node[:], result.graph.value_info[:], result.graph.initializer[:]
        result.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        result.graph.initializer.extend(
            tensor for name, tensor in (self.floats | self.constants).items() if name in read
        )
        return result

    def _activation(self, name: str) -> str:
        grid = self.grids[name]
        key = (name, None, grid.scale.tobytes())
        if key not in self._dequantised:
            parameters = self._parameters(name, grid)
            integers = f"{name}_quantized"
            self.nodes.append(
                helper.make_node("QuantizeLinear", [name, *parameters], [integers], f"{name}/QuantizeLinear")
            )
            self._dequantised[key] = self._dequantise(name, integers, parameters, None)
        return self._dequantised[key]

    def _weight_grid(
        self, weight: np.ndarray, axis: int | None, bias: np.ndarray | None, step: float
    ) -> Grid:
        """Symmetric per channel, no finer than what lets the bias fit in 32 bits at scale `step * scale`."""
        others = tuple(dimension for dimension in range(weight.ndim) if dimension != axis)
        magnitude = np.abs(weight).max(axis=others) if axis is not None else np.abs(weight).max()
        scale = scale_of(magnitude, self.weights.largest)
        if bias is not None:
            scale = np.maximum(scale, np.abs(bias) / (step * LARGEST_BIAS)).astype(np.float32)
        return Grid(scale, np.zeros(scale.shape, self.weights.dtype), axis)

    def _constant(self, name: str, values: np.ndarray, grid: Grid, largest: float) -> str:
        key = (name, grid.axis, grid.scale.tobytes())
        if key not in self._dequantised:
            variants = sum(known == name for known, _, _ in self._dequantised)
            base = f"{name}_{variants}" if variants else name
            integers = self._add(f"{base}_quantized", grid.quantise(values, largest))
            self._dequantised[key] = self._dequantise(base, integers, self._parameters(base, grid), grid.axis)
        return self._dequantised[key]

    def _parameters(self, base: str, grid: Grid) -> list[str]:
        return [self._add(f"{base}_scale", grid.scale), self._add(f"{base}_zero_point", grid.zero_point)]

    def _dequantise(self, base: str, integers: str, parameters: list[str], axis: int | None) -> str:
        output = f"{base}_dequantized"
        node = helper.make_node(
            "DequantizeLinear", [integers, *parameters], [output], f"{base}/DequantizeLinear"
        )
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return output

    def _add(self, name: str, values: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(
            np.ascontiguousarray(values).reshape(values.shape), name
        )
        return name


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _chosen(graph: onnx.GraphProto, flavour: Flavour, exclude: Collection[str]) -> frozenset[str]:
    """Names of the compute nodes to quantise."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return frozenset(
        node.name
        for node in graph.node
        if node.op_type in inspect.QUANTISABLE
        and node.name not in exclude
        and (flavour != "cpu" or weights.keys() & set(node.input[:2]))
        and not (flavour == "fp8" and node.op_type == "Conv" and _taps(node, weights) > MOST_TAPS_FP8)
    )


def _taps(convolution: NodeProto, weights: Mapping[str, tuple[int, ...]]) -> int:
    """How many places of the input one filter reads: 9 for 3 x 3."""
    kernel = _attribute(convolution, "kernel_shape", ())
    return math.prod(kernel or weights.get(convolution.input[1], ())[2:])


def _activations(graph: onnx.GraphProto, flavour: Flavour, chosen: Collection[str]) -> list[str]:
    """Names of the activations that get a Q/DQ pair, in the graph's order."""
    quantised = {name for node in graph.node if node.name in chosen for name in node.input[:2]}
    if flavour == "cpu":
        quantised |= {
            _fused_output(node, graph)
            for node in graph.node
            if node.name in chosen and _needs_integer_output(node, graph)
        }
        quantised -= {value.name for value in graph.output}
    order = [value.name for value in graph.input] + [name for node in graph.node for name in node.output]
    constants = {tensor.name for tensor in graph.initializer}
    return [name for name in order if name in quantised - constants]


def _needs_integer_output(node: NodeProto, graph: onnx.GraphProto) -> bool:
    """Where ONNX Runtime computes in integers only if an integer follows: a Conv; a Gemm that it first fuses with its Relu."""
    return node.op_type == "Conv" or (node.op_type == "Gemm" and _fused_output(node, graph) != node.output[0])


def _fused_output(product: NodeProto, graph: onnx.GraphProto) -> str:
    """What the product hands on: its output, or that of the Relu or Clip which alone reads it and vanishes into Q."""
    readers = [node for node in graph.node if product.output[0] in node.input]
    fused = len(readers) == 1 and readers[0].op_type in ("Relu", "Clip")
    return str(readers[0].output[0] if fused else product.output[0])


def _channel_axis(node: NodeProto, index: int, rank: int) -> int | None:
    """The axis of a weight along which the node's output channels lie; None: one scale for the whole weight."""
    if node.op_type == "Conv":
        return 0
    if rank < 2:
        return None
    if node.op_type == "Gemm":
        transposed = _attribute(node, "transB" if index == 1 else "transA", 0)
        return 0 if bool(transposed) == (index == 1) else 1
    return rank - 1 if index == 1 else rank - 2


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next(
        (helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name),
        default,
    )


def _takes_integer_bias(
    node: NodeProto, grids: Mapping[str, Grid], floats: Mapping[str, TensorProto]
) -> bool:
    """A constant vector, added unscaled to a product of a quantised activation and a constant weight."""
    return (
        len(node.input) == 3
        and node.input[0] in grids
        and node.input[1] in floats
        and node.input[2] in floats
        and len(floats[node.input[2]].dims) == 1
        and _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    )


def _require_fp32(model: onnx.ModelProto, exclude: Collection[str]) -> None:
    dtypes = inspect.compute_dtypes(model)
    if wrong := sorted(set(dtypes.values()) - {"fp32"}):
        raise ExportError(f"quantisation starts from an FP32 graph; this one computes in {', '.join(wrong)}")
    inspect.require_nodes(dtypes, exclude)


def _require_finite(model: onnx.ModelProto, ranges: Mapping[str, Range], chosen: Collection[str]) -> None:
    """Of the constants only those that are quantised: a vocabulary may well hold NaN, which equals nothing."""
    strange = [name for name, interval in ranges.items() if not np.isfinite(interval).all()]
    factors = {name for node in model.graph.node if node.name in chosen for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in factors and not np.isfinite(numpy_helper.to_array(tensor)).all():
            strange.append(tensor.name)
    if strange:
        shown = origin.explained(", ".join(strange[:5]), model)
        raise ExportError(f"NaN or infinity in weights or ranges: {shown}")


def _ensure_quantised(model: onnx.ModelProto, chosen: Collection[str], dtype: str) -> None:
    dtypes = inspect.compute_dtypes(model)
    if left := [name for name in chosen if dtypes[name] != dtype]:
        raise ExportError(f"not in {dtype.upper()} after quantisation: {origin.listed(model, left)}")
    scales = {
        node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in scales and not (np.isfinite(values) & (values > 0)).all():
            raise ExportError(f"the scale {tensor.name!r} is not positive and finite everywhere")
    inspect.require_loadable(model)
